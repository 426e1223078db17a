"""Devices, the dtypes that they multiply natively, and threads. Importing this needs no torch."""

import functools
import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from far.config import check_count
from far.errors import InputError

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"auto|cpu(:0)?|(cuda|mps|xpu)(:(0|[1-9]\d{0,3}))?")
# Dtype of the forward pass in training. Weights are float32.
TrainingDtype = Literal["auto", "float32", "bfloat16", "float16"]
TRAINING_DTYPES: tuple[TrainingDtype, ...] = ("auto", "float32", "bfloat16", "float16")


def check_device_name(name: str) -> None:
    """Raise an :class:`InputError` unless ``name`` is a valid device name. The device need not exist."""
    if not _NAME.fullmatch(name):
        raise InputError(f"device {name!r} is unknown. Give auto, cpu, cuda, cuda:1 …, mps or xpu")


def resolve_device(device: "str | torch.device" = "auto") -> "torch.device":
    """Return a device after a trial of a model's operations on it.

    ``"auto"`` takes CUDA if torch finds a CUDA device, else MPS if it works, else the CPU. The first CUDA
    device of a process turns TF32 off in convolutions, as it is in matrix products, and gives cuBLAS a
    workspace of fixed size, unless CUBLAS_WORKSPACE_CONFIG has one.

    Raises:
        InputError: the name is unknown, or the device cannot be used on this machine.
    """
    import torch

    name, remedy = str(device), "cpu, or auto"
    check_device_name(name)
    if name == "auto":
        remedy = "cpu"
        works = torch.backends.mps.is_available() and _refusal("mps") is None
        name = "cuda" if torch.cuda.is_available() else "mps" if works else "cpu"
    if name.startswith("cuda"):
        _turn_tf32_off()
        # cuBLAS and torch read it at the first product, before training.deterministic is known.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if reason := _refusal(name):
        raise InputError(f"device {name!r} cannot be used here ({reason}). Give {remedy}")
    return torch.device(name)


@functools.cache
def _turn_tf32_off() -> None:
    """Turn off cuDNN's TF32, which changes pixels by about 1e-3; only once, so that users can turn it on."""
    import torch

    torch.backends.cudnn.allow_tf32 = False


def _refusal(name: str) -> str | None:
    """Return why a device cannot compute, in a few words; None if it can."""
    import torch

    kind, _, number = name.partition(":")
    if kind == "cpu":
        return None
    if not {"cuda": torch.cuda, "mps": torch.backends.mps, "xpu": torch.xpu}[kind].is_available():
        return "torch finds no such device"
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        return f"the last one is cuda:{torch.cuda.device_count() - 1}"
    try:
        return None if _computes(name) else "its results are wrong"
    except RuntimeError as error:
        return str(error).partition("\n")[0][:200]


@functools.cache
def _computes(name: str) -> bool:
    """Return whether a device computes convolution, norms, linear layer and attention as the CPU does."""
    import torch
    import torch.nn.functional as F

    def results(device: str) -> torch.Tensor:
        x = torch.linspace(-1, 1, 2 * 4 * 8 * 8).view(2, 4, 8, 8).to(device)
        image = F.silu(F.group_norm(F.conv2d(x, x[:, :, :3, :3].repeat(2, 1, 1, 1), padding=1), 2))
        tokens = F.layer_norm(F.linear(image.flatten(2), x.view(8, 64)), (8,))
        return F.scaled_dot_product_attention(tokens, tokens, tokens).cpu()

    # The tolerance is wide, to find broken devices and not rounding.
    return torch.allclose(results(name), results("cpu"), atol=1e-2)


def to_device(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """Return a tensor on a device. Copies to CUDA leave from pinned memory, so that nothing waits."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch raised an error because a device, or the CPU, has too little memory."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def device_title(device: "torch.device") -> str:
    """Return a device's name for display, such as ``cuda:1 (NVIDIA H100)``."""
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def has_fast_bfloat16(device: "torch.device") -> bool:
    """Return whether a device multiplies bfloat16 faster than float32.

    CUDA devices do from compute capability 8.0, processors with AMX, and others than Intel's with
    AVX512_BF16, unless the environment keeps oneDNN from using AVX-512 (``ONEDNN_MAX_CPU_ISA=AVX2``). Intel's
    AVX512_BF16 multiplies no faster than its float32 instructions, and models take up to 1.7 times as long.
    Processors that are not x86 are taken to, if oneDNN multiplies bfloat16 there; MPS and XPU are not.
    """
    import torch

    from far.kernels import bfloat16_fault

    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or bfloat16_fault():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    # On AVX-512 without BF16, the matrix library converts to float32 and back.
    avx512 = torch.cpu._is_avx512_bf16_supported() and not _is_intel()
    return avx512 or torch.cpu._is_amx_tile_supported()


@functools.cache
def _is_intel() -> bool:
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # other systems than Linux
        described = platform.processor()
    return "GenuineIntel" in described


def resolve_training_dtype(name: TrainingDtype, device: "torch.device") -> TrainingDtype:
    """Return ``name``, or for ``auto`` bfloat16 if the device multiplies it faster, else float32."""
    if name != "auto":
        return name
    return "bfloat16" if has_fast_bfloat16(device) else "float32"


def check_threads(count: int) -> None:
    """Raise an :class:`InputError` unless ``count`` is within 1 to 1024."""
    check_count("threads", count, 1024)


def set_threads(count: int) -> None:
    """Set the number of torch's threads after :func:`check_threads`."""
    check_threads(count)

    import torch

    torch.set_num_threads(count)
