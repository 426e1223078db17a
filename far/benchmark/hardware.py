"""The machine: its name, its measured limits, and the memory that a call takes."""

import contextlib
import ctypes
import platform
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from far.benchmark.timing import clock, paired
from far.packing import Int8Linear

_BANDWIDTH_BYTES = 2**30
_PRODUCT_SIDE = 2048


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


def read_bandwidth(device: str | torch.device = "cpu") -> float:
    """Return the bytes per second at which one gigabyte is read, the best of five."""
    block = torch.ones(_BANDWIDTH_BYTES // 4, device=device)
    return block.nbytes / _best_seconds(block.sum, block.device)


def product_peak(dtype: torch.dtype, device: str | torch.device = "cpu") -> float:
    """Return the operations per second of a large matrix product, the best of five.

    For ``torch.int8``, the product is a linear layer and includes the quantization of its inputs.
    """
    a = torch.randn(_PRODUCT_SIDE, _PRODUCT_SIDE, device=device)
    if dtype == torch.int8:
        layer = Int8Linear(nn.Linear(_PRODUCT_SIDE, _PRODUCT_SIDE, bias=False))
        return 2 * _PRODUCT_SIDE**3 / _best_seconds(lambda: layer(a), a.device)
    a = a.to(dtype)
    return 2 * _PRODUCT_SIDE**3 / _best_seconds(lambda: a @ a, a.device)


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


def _resident(name: str) -> int:
    """Return an entry of the process's status in bytes."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) * 1024
