"""The machine: its name, its measured limits, and the memory that a call takes."""

import contextlib
import ctypes
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from far.benchmark.timing import clock, paired
from far.packing import Int8Linear

# A GPU takes a millisecond for these sizes, beside which the microseconds of a launch do not count.
_BANDWIDTH_BYTES = {"cpu": 2**30, "cuda": 2**32}
_PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}


def machine() -> str:
    """Return one line that names versions, threads and processor."""
    threads, python = torch.get_num_threads(), platform.python_version()
    versions = f"torch {torch.__version__}, {threads} threads, Python {python}"
    return f"{versions}, {processor()} {torch.backends.cpu.get_cpu_capability()}"


def processor() -> str:
    """Return the processor's name on Linux, elsewhere its architecture."""
    with contextlib.suppress(OSError):
        if match := re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return match[1].strip()
    return platform.machine()


def cuda_settings() -> dict[str, Any]:
    """Return CUDA's versions, and whether float32 products and convolutions are computed in TF32."""
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32 products": torch.backends.cuda.matmul.allow_tf32,
        "tf32 convolutions": torch.backends.cudnn.allow_tf32,
    }


def read_bandwidth(device: str | torch.device = "cpu") -> float:
    """Return the bytes per second at which a large block is read, the best of five."""
    device = torch.device(device)
    block = torch.ones(_size(_BANDWIDTH_BYTES, device) // 4, device=device)
    return block.nbytes / _best_seconds(block.sum, block.device)


def product_peak(dtype: torch.dtype, device: str | torch.device = "cpu") -> float:
    """Return the operations per second of a large matrix product, the best of five.

    For ``torch.int8``, the product is a linear layer and includes the quantization of its inputs.
    """
    side = _size(_PRODUCT_SIDE, torch.device(device))
    a = torch.randn(side, side, device=device)
    if dtype == torch.int8:
        layer = Int8Linear(nn.Linear(side, side, bias=False))
        return 2 * side**3 / _best_seconds(lambda: layer(a), a.device)
    a = a.to(dtype)
    return 2 * side**3 / _best_seconds(lambda: a @ a, a.device)


def _size(sizes: dict[str, int], device: torch.device) -> int:
    return sizes.get(device.type, sizes["cpu"])


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    reading = clock(device)
    return min(paired({"call": lambda: (call(), reading())}, 5)["call"])


def peak_memory(call: Callable[[], object]) -> int | None:
    """Run ``call`` and return the bytes by which it raised this process's memory, None except on Linux."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # memory that earlier work freed must not hide this call's
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the resident memory
        before = _resident("VmRSS")
    except OSError:
        call()
        return None
    call()
    return max(0, _resident("VmHWM") - before)


def peak_device_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Run ``call`` and return the bytes by which its tensors raised a GPU's memory, None without CUDA."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def _resident(name: str) -> int:
    """Return an entry of the process's status in bytes."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) * 1024
