"""Paired timing for the benchmark scripts: alternatives in turn, so that a drifting machine hits all alike."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from far.heads.head import Head


def paired(alternatives: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each call, ``rounds`` a name, taken in turn after ``warmup`` uncounted rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for turn in range(warmup + rounds):
        for name, call in alternatives.items():
            start = time.perf_counter()
            call()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def with_head_share(head: Head, call: Callable[[], object], shares: list[float]) -> Callable[[], None]:
    """``call``, which also appends the share of its time that ``head.sample`` took to ``shares``."""

    def measured_call() -> None:
        inside = 0.0
        sample = head.sample

        def measured(*values: Any, **options: Any) -> torch.Tensor:
            nonlocal inside
            start = time.perf_counter()
            result = sample(*values, **options)
            inside += time.perf_counter() - start
            return result

        start = time.perf_counter()
        head.sample = measured  # type: ignore[method-assign]
        try:
            call()
        finally:
            del head.sample
        shares.append(inside / (time.perf_counter() - start))

    return measured_call


def summary(seconds: list[float]) -> str:
    """Median and range in seconds."""
    return f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"


def median_ratio(a: list[float], b: list[float]) -> float:
    """The median over rounds of ``a / b``, pair by pair."""
    return statistics.median(x / y for x, y in zip(a, b))


def machine() -> str:
    """One line that says where the figures come from."""
    threads = f"{torch.get_num_threads()} threads"
    return (
        f"torch {torch.__version__}, {threads}, Python {platform.python_version()}, {processor()} {torch.backends.cpu.get_cpu_capability()}"
    )


def processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
