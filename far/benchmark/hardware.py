"""The machine: its name, its measured limits, and the memory that a call takes."""

import contextlib
import ctypes
import platform
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
    software = (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, Python {platform.python_version()}"
    )
    return f"{software}, {processor()} {torch.backends.cpu.get_cpu_capability()}"


def processor() -> str:
    """Return the processor's name on Linux, elsewhere its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def read_bandwidth(device: str | torch.device = "cpu") -> float:
    """Return the bytes per second at which one gigabyte is read, the best of five."""
    block = torch.ones(_BANDWIDTH_BYTES // 4, device=device)
    return block.nbytes / min(paired({"read": _finished(block.sum, block.device)}, 5)["read"])


def product_peak(dtype: torch.dtype, device: str | torch.device = "cpu") -> float:
    """Return the operations per second of a large matrix product, the best of five."""
    a = torch.randn(_PRODUCT_SIDE, _PRODUCT_SIDE, device=device).to(dtype)
    return _product_speed(lambda: a @ a, a.device)


def int8_product_peak() -> float:
    """Return the operations per second of a large int8 linear layer, including quantization of its inputs."""
    layer = Int8Linear(nn.Linear(_PRODUCT_SIDE, _PRODUCT_SIDE, bias=False))
    a = torch.randn(_PRODUCT_SIDE, _PRODUCT_SIDE)
    return _product_speed(lambda: layer(a), a.device)


def _product_speed(call: Callable[[], object], device: torch.device) -> float:
    return 2 * _PRODUCT_SIDE**3 / min(paired({"product": _finished(call, device)}, 5)["product"])


def _finished(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    reading = clock(device)

    def finished() -> None:
        call()
        reading()

    return finished


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
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
