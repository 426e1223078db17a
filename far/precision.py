"""Dtypes that a model runs in, and the layout of its weights for inference. Importing it needs no torch."""

from typing import TYPE_CHECKING, TypeVar

from far.devices import resolve_device, resolve_training_dtype
from far.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

M = TypeVar("M", bound="nn.Module")

# The names that users give; "auto" depends on the device, see resolve_dtype.
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")


def resolve_dtype(dtype: "str | torch.dtype", device: "str | torch.device") -> str:
    """Return the name of a dtype; for ``auto`` bfloat16 if the device multiplies it faster, else float32.

    Raises:
        InputError: the dtype or device is not available, or the dtype cannot be used on this device.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} does not exist. Choose one of {', '.join(DTYPES)}")
    device = resolve_device(device)
    if name == "int8":
        from far.kernels import no_int8

        if device.type != "cpu":
            raise InputError(f"dtype int8 is for CPUs, not for device {str(device)!r}. Give auto")
        if reason := no_int8():
            raise InputError(f"dtype int8 cannot be used here: {reason}. Give auto")
    return resolve_training_dtype("auto", device) if name == "auto" else name


def torch_dtype(name: str) -> "torch.dtype":
    """Return the dtype of a model's plain tensors; those of an int8 model are float32."""
    import torch

    dtype: torch.dtype = getattr(torch, "float32" if name == "int8" else name)
    return dtype


def prepare(model: M, dtype: "str | torch.dtype", device: "str | torch.device") -> M:
    """Move a generator to a device and dtype, in place, and lay out its weights for inference.

    Raises:
        InputError: the dtype or device is not available here.
    """
    from far.packing import pack_linear_layers, quantize_linear_layers

    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    model = model.to(device, torch_dtype(dtype))
    if dtype == "int8":
        quantize_linear_layers(model)
    pack_linear_layers(model)
    return model


def prepare_autoencoder(autoencoder: M, dtype: "str | torch.dtype", device: "str | torch.device") -> M:
    """Move the autoencoder of a generator of some dtype to a device, in place, with channels last.

    It becomes bfloat16 beside bfloat16 and, if the device multiplies it faster, beside int8; otherwise
    float32. In float16 its values could overflow.

    Raises:
        InputError: the dtype or device is not available here.
    """
    import torch

    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    low = dtype == "bfloat16" or (dtype == "int8" and resolve_dtype("auto", device) == "bfloat16")
    autoencoder = autoencoder.to(device, torch.bfloat16 if low else torch.float32)
    return autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
