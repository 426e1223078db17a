"""Paired timing for the benchmark scripts: alternatives in turn, so that a drifting machine hits all alike."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from far.benchmark import machine, median_ratio, paired
from far.heads.head import Head

__all__ = ["machine", "median_ratio", "paired", "summary", "with_head_share"]


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
