"""Seconds of calls that take turns, so that a change of the machine's speed affects all of them alike."""

import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


def clock(device: torch.device) -> Callable[[], float]:
    """Return a function that waits for all work on ``device`` and returns the time in seconds."""

    def reading() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    return reading


def paired(
    alternatives: dict[Key, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[Key, list[float]]:
    """Call the alternatives in turn, and return the seconds of each call after ``warmup`` untimed rounds."""
    seconds: dict[Key, list[float]] = {name: [] for name in alternatives}
    for turn in range(warmup + rounds):
        for name, call in alternatives.items():
            start = time.perf_counter()
            call()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: Sequence[float]) -> str:
    """Return median and range as text."""
    return f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the median over rounds of ``a / b``."""
    return statistics.median(x / y for x, y in zip(a, b))
