"""Tensors on disk: safetensors files with a checksum ↔ modules. No pickle is ever read here.

Which files a folder holds, and their configuration, is in ``far.folder``. Checkpoints of other projects are
read by ``far.convert``, training state by ``far.training.checkpoint``.
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

from far.errors import InputError
from far.files import atomic_path

# Dtypes that weights can have. Others cannot be converted: float4 packs two values into one element.
FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64)

M = TypeVar("M", bound=nn.Module)


def save_tensors(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype | str | None = None) -> None:
    """Write tensors as safetensors with their checksum, atomically.

    Floating point tensors are converted to ``dtype``, if given, and packed weights to plain ones.

    Raises:
        InputError: ``dtype`` is not a floating point dtype, or the file cannot be written.
    """
    converted_to = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(converted_to, torch.dtype) and converted_to.is_floating_point):
        raise InputError(f"dtype {dtype!r} is not a floating point dtype of torch, such as torch.float16")

    def plain(tensor: Tensor) -> Tensor:
        return (
            dense(tensor).to("cpu", converted_to if tensor.is_floating_point() else None).contiguous().clone()
        )

    converted = {name: plain(tensor) for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(converted, temporary, {"sha256": digest(converted)})


def digest(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values of tensors on the CPU, in hexadecimal."""
    made = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        made.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        made.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()


def dense(tensor: Tensor) -> Tensor:
    """Return a weight as a plain tensor, also that of a packed linear layer."""
    tensor = tensor.detach()
    return tensor.to_dense() if tensor.is_mkldnn else tensor


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file and verify its checksum, if there is one.

    The expected :func:`digest` is ``sha256``, else the one that :func:`save_tensors` wrote into the file.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if sha256 is None and metadata and "format" not in metadata:
            sha256 = metadata.get("sha256", "")
        if sha256 is not None and sha256 != digest(tensors):
            raise ValueError("its checksum differs")
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is missing or damaged ({reason}). Restore or remake it") from error
    return tensors


def build_module(
    build: Callable[[], M],
    tensors: dict[str, Tensor],
    path: Path,
    fallback: Callable[[], dict[str, Tensor]] | None = None,
) -> M:
    """Build a module and load its weights, in the module's dtype.

    Memory is allocated only after all tensors fit, so no configuration can demand more than its weights do.

    Args:
        build: makes the module.
        tensors: the weights.
        path: the file that they are from, for errors.
        fallback: returns tensors for the names that ``tensors`` lacks; called only if there are any.

    Raises:
        InputError: a name, shape or dtype differs; the message names the first.
    """
    with NoInitialization():
        with torch.device("meta"):
            expected = build().state_dict()
        if fallback is not None and not expected.keys() <= tensors.keys():
            tensors = {name: tensor for name, tensor in fallback().items() if name in expected} | tensors
        _check_tensors(tensors, expected, path)
        module = build()
    module.load_state_dict(tensors)
    return module


class NoInitialization(TorchFunctionMode):
    """Skips initializing weights that will be replaced; torch's first draw on "meta" takes a second."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else arguments["tensor"]
        return function(*args, **arguments)


def _check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    for name, like in expected.items():
        if name not in tensors:
            raise InputError(f"{path} lacks the tensor {name} of its config.json. Restore both files")
        shape, dtype = list(tensors[name].shape), tensors[name].dtype
        if shape != list(like.shape):
            raise InputError(
                f"{path}: {name} has shape {shape}, but config.json requires {list(like.shape)}. "
                "Restore both files"
            )
        if dtype not in (FLOATS if like.is_floating_point() else (like.dtype,)):
            raise InputError(f"{path}: {name} is of {dtype}, but {like.dtype} is required. Save it again")
    if left_over := [name for name in tensors if name not in expected]:
        raise InputError(f"{path}: config.json describes no tensor {left_over[0]!r}. Restore both files")


def changed_tensors(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those of ``tensors`` that ``others`` lacks or holds with other values, whatever the dtypes."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name not in others or not torch.equal(dense(tensor).cpu().double(), others[name].double())
    }
