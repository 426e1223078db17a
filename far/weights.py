"""Weights on disk: ``config.json`` beside safetensors files ↔ modules. No pickle, ever.

Published checkpoints of other projects are read by ``far.convert``, training state by
``far.training.checkpoint``.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from far.autoencoder import Autoencoder, AutoencoderConfig
from far.config import from_dict, to_dict
from far.errors import InputError
from far.files import atomic_path, read_json, sha256, write_json
from far.names import BUNDLED, bundled_names
from far.names import find_folder as find_folder

# What weights may be of. Others cannot be converted, such as float4, of which two are one element.
FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64)

M = TypeVar("M", bound=nn.Module)


def describe_base(name: str) -> dict[str, Any]:
    """A bundled model as the base of another: its name and files.

    Raises:
        InputError: there is none of that name, or it has a base itself.
    """
    if name not in bundled_names():
        raise InputError(f"base {name!r} is no bundled model; bundled: {', '.join(bundled_names())}")
    if "base" in (config := read_json(BUNDLED / name / "config.json")):
        raise InputError(
            f"base {name!r} is not whole itself; give the one that it takes from, {config['base']['weights']!r}"
        )
    return {
        "weights": name,
        "sha256": {path.name: sha256(path) for path in sorted((BUNDLED / name).glob("*.safetensors"))},
    }


def find_base(described: Any, source: str) -> Path:
    """The folder of a base as :func:`describe_base` gave it; ``source`` names the file in errors.

    Raises:
        InputError: there is no such model here, or its files are others.
    """
    name = described.get("weights") if isinstance(described, dict) else None
    if not isinstance(name, str) or describe_base(name) != described:
        raise InputError(
            f"{source}: the base {name!r} is not the bundled model of that name; install the version of far that it is from"
        )
    return BUNDLED / name


def save_tensors(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write tensors as safetensors with their checksum, atomically; floating point ones as ``dtype`` where given."""

    def plain(tensor: Tensor) -> Tensor:
        return _dense(tensor).to("cpu", dtype if tensor.is_floating_point() else None).contiguous().clone()

    converted = {name: plain(tensor) for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(converted, temporary, {"sha256": _digest(converted)})


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _dense(tensor: Tensor) -> Tensor:
    """A weight as a plain tensor, a packed linear layer's too."""
    tensor = tensor.detach()
    return tensor.to_dense() if tensor.is_mkldnn else tensor


def load_module(build: Callable[[], M], path: Path, base: Path | None = None, *, listed: Any = None) -> M:
    """The module that ``build`` makes, with the weights of a safetensors file in the module's dtype.

    Args:
        build: is called once the file is known to hold what it asks for, so that no config can ask for more memory.
        path: the file.
        base: a file to take from what that one lacks.
        listed: SHA-256 by file name, of files that were written before they held their own checksum.

    Raises:
        InputError: a file is missing or damaged, or a key, shape or kind of number differs (the first is named).
    """
    tensors = read_tensors(path)
    if isinstance(listed, dict) and listed.get(path.name, digest := sha256(path)) != digest:
        raise InputError(f"{path} is damaged (its checksum differs); restore or remake it")
    with _NoInitialization():
        with torch.device("meta"):
            wanted = build().state_dict()
        if base is not None and not wanted.keys() <= tensors.keys():
            tensors = {
                name: tensor for name, tensor in read_tensors(base).items() if name in wanted
            } | tensors
        _check_tensors(tensors, wanted, path)
        module = build()
    module.load_state_dict(tensors)
    return module


class _NoInitialization(TorchFunctionMode):
    """Leaves new weights as they are: they are replaced, and torch's first random draw for the meta device takes a second."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else arguments["tensor"]
        return function(*args, **arguments)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; of one that :func:`save_tensors` wrote, as they were then.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        # Other programs' files, which name a format, and our older ones have no checksum.
        if metadata and "format" not in metadata and metadata != {"sha256": _digest(tensors)}:
            raise ValueError("its checksum differs")
    except FileNotFoundError as error:
        raise InputError(
            f"{path} does not exist. Copy or download the folder again, or run the command that wrote it"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{path} is missing or damaged ({' '.join(str(error).split())}); restore or remake it"
        ) from error
    return tensors


def _check_tensors(tensors: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    for name, like in wanted.items():
        if name not in tensors:
            raise InputError(
                f"{path} lacks the tensor {name}; the weights are of another model than the config"
            )
        if tensors[name].shape != like.shape:
            raise InputError(
                f"{path}: {name} has shape {list(tensors[name].shape)}, the config asks for {list(like.shape)}"
            )
        if tensors[name].dtype not in (FLOATS if like.is_floating_point() else (like.dtype,)):
            raise InputError(f"{path}: {name} is of {tensors[name].dtype}, where {like.dtype} is needed")
    for name in tensors:
        if name not in wanted:
            raise InputError(f"{path} holds the tensor {name!r}, which the model does not have")


def changed_tensors(module: nn.Module, other: nn.Module) -> dict[str, Tensor]:
    """The tensors of ``module`` that ``other``, in float32 on the CPU, does not have, or not with the same values."""
    ours, theirs = module.state_dict(), other.state_dict()
    return {
        name: tensor
        for name, tensor in ours.items()
        if name not in theirs or not torch.equal(_dense(tensor).cpu(), theirs[name])
    }


def save_autoencoder(autoencoder: Autoencoder, folder: Path, results: dict[str, Any] | None = None) -> None:
    """Write ``config.json`` and ``autoencoder.safetensors``; ``results`` are measured figures to keep beside."""
    save_tensors(folder / "autoencoder.safetensors", autoencoder.state_dict())
    write_json(folder / "config.json", {"autoencoder": to_dict(autoencoder.config), "results": results or {}})


def load_autoencoder(folder: Path) -> Autoencoder:
    """The autoencoder of a folder that :func:`save_autoencoder` or a pipeline wrote, or of its base, in evaluation mode.

    Raises:
        InputError: a file is missing, damaged, or of another model.
    """
    source = str(folder / "config.json")
    values = read_json(folder / "config.json")
    if not isinstance(values, dict) or not values.keys() & {"autoencoder", "base"}:
        raise InputError(f"{source} describes no autoencoder; give a folder with an 'autoencoder' entry")
    if "autoencoder" not in values:
        return load_autoencoder(find_base(values["base"], source))
    config = from_dict(AutoencoderConfig, values["autoencoder"], source)
    return load_module(
        lambda: Autoencoder(config), folder / "autoencoder.safetensors", listed=values.get("sha256")
    ).eval()
