"""Compiled blocks in ``benchmarks.gpu``: the images that they draw, recorded or not, and the time they take.

Without a GPU, the graphs of the blocks run uncompiled, which is quicker.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_checks import recording_case
from benchmarks.gpu_speed import Calls, drawing_case


def compiled_blocks(device: torch.device, small: bool) -> Calls:
    """Return a check of the default bundled model, and times of 4 head steps beside those of plain blocks."""
    check = functools.partial(recording_case, "avatars-64", device, 1 if small else 4, small, compiled=True)
    case = functools.partial(drawing_case, device, small, sampling={"head_steps": 4}, compiled=True)
    calls: Calls = {"avatars-64": check} | {
        f"{name}, 4 head steps, compiled, batch {batch}": functools.partial(case, name, batch)
        for name in ("far-b", "far-causal-b")
        for batch in ((1, 2) if small else (1, 64, 8, 256))
    }
    return {name: functools.partial(_call, call) for name, call in calls.items()} if small else calls


def _call(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    with torch.compiler.set_stance(force_backend="eager"):
        return call()
