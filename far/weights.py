"""Weights on disk: ``config.json`` beside safetensors files ↔ modules. No pickle, ever.

Published checkpoints of other projects are read by ``far.convert``, training state by
``far.training.checkpoint``.
"""

from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from far.autoencoder import Autoencoder, AutoencoderConfig
from far.config import from_dict, to_dict
from far.errors import InputError
from far.files import atomic_path, read_json, write_json

M = TypeVar("M", bound=nn.Module)


def save_tensors(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write tensors as safetensors, atomically; floating point ones as ``dtype`` where given."""

    def plain(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.is_mkldnn:  # of a packed linear layer
            tensor = tensor.to_dense()
        return tensor.to("cpu", dtype if tensor.is_floating_point() else None).contiguous().clone()

    converted = {name: plain(tensor) for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(converted, temporary)


def to_device(module: M, device: str, dtype: torch.dtype | None = None) -> M:
    """``module`` on a device, and in a dtype where given.

    Raises:
        InputError: there is no such device here.
    """
    try:
        return module.to(device, dtype)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used here ({str(error).splitlines()[0]}); try cpu") from error


def load_module(module: nn.Module, path: Path) -> None:
    """Load a safetensors file into ``module``, keeping the module's dtype.

    Raises:
        InputError: the file is missing or damaged, or a key or shape differs (the first is named).
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is missing or damaged ({error}); restore or remake it") from error
    load_state(module, tensors, str(path))


def load_state(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """``module.load_state_dict`` with an error of one line that names the first difference.

    Raises:
        InputError: a key is missing or left over, or a shape differs.
    """
    wanted = module.state_dict()
    for name in wanted:
        if name not in tensors:
            raise InputError(f"{source} lacks the tensor {name}; the weights are of another model than the config")
        if tensors[name].shape != wanted[name].shape:
            raise InputError(f"{source}: {name} has shape {list(tensors[name].shape)}, the config asks for {list(wanted[name].shape)}")
    for name in tensors:
        if name not in wanted:
            raise InputError(f"{source} holds the tensor {name}, which the model does not have")
    module.load_state_dict(tensors)


def save_autoencoder(autoencoder: Autoencoder, folder: Path, results: dict[str, Any] | None = None) -> None:
    """Write ``config.json`` and ``autoencoder.safetensors``; ``results`` are measured figures to keep beside."""
    save_tensors(folder / "autoencoder.safetensors", autoencoder.state_dict())
    write_json(folder / "config.json", {"autoencoder": to_dict(autoencoder.config), "results": results or {}})


def load_autoencoder(folder: Path) -> Autoencoder:
    """The autoencoder of a folder that :func:`save_autoencoder` or a pipeline wrote, in evaluation mode.

    Raises:
        InputError: a file is missing, damaged, or of another model.
    """
    values = read_json(folder / "config.json")
    if not isinstance(values, dict) or "autoencoder" not in values:
        raise InputError(f"{folder / 'config.json'} describes no autoencoder; give a folder with an 'autoencoder' entry")
    autoencoder = Autoencoder(from_dict(AutoencoderConfig, values["autoencoder"], str(folder / "config.json")))
    load_module(autoencoder, folder / "autoencoder.safetensors")
    return autoencoder.eval()
