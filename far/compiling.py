"""Compiled blocks: ``torch.compile`` for the blocks of backbones and heads, which take most of the time.

A compiled block runs the operations between two matrix products as one kernel, so it launches fewer kernels
and moves less memory. Sums are in another order, so results differ from those of plain blocks by rounding.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from far.errors import InputError
from far.layers import blocks_of
from far.packing import Int8Linear, PackedLinear

# A block has variants by kind, state of the cache, number of axes, sizes of one, dtype and gradient mode.
# torch counts those of all blocks together, and beyond eight it runs further ones uncompiled.
_VARIANTS = 64

# Reasons why compiling failed in this process; after the first one, nothing else is compiled.
_faults: list[str] = []


def compile_blocks(module: nn.Module, *, checkpointed: bool = False) -> None:
    """Compile the blocks of a backbone and a head in place, each when it first runs.

    Sizes are symbolic, so AR steps and batches share compiled code. Parameters keep their names, and copies
    of the module are plain.
    Blocks with packed or 8-bit weights stay plain, and all do if compiling fails, for example without a C++
    compiler: one line on stderr names the reason.

    With ``checkpointed``, only forward methods are compiled, in copies of the module too, so that activation
    checkpointing can wrap them. Within a compiled block it would repeat other dropout if compiling fails.

    Raises:
        InputError: the module has no such blocks, as an autoencoder.
    """
    blocks = blocks_of(module)
    if not blocks:
        raise InputError(f"compile is for generators, not for {type(module).__name__}. Set it to false")
    if any(isinstance(part, PackedLinear | Int8Linear) for part in module.modules()):
        return _print_once("blocks are not compiled: their weights are packed for this processor")
    try:
        for block in blocks:
            if checkpointed:
                # Not a bound method, which a copy of the block would call with the block's own weights.
                forward = torch.compile(type(block).forward, backend=_inductor, dynamic=True)
                block.forward = functools.partial(forward, block)
            else:
                block.compile(backend=_inductor, dynamic=True)
        dynamo = torch._dynamo.config
    except RuntimeError as error:  # torch.compile does not support this Python or platform
        return _stay_plain(error)
    dynamo.recompile_limit = max(dynamo.recompile_limit, _VARIANTS)
    dynamo.optimize_ddp = False  # would cut blocks at the borders of gradient buckets


def compile_fault() -> str | None:
    """Return why compiling failed in this process, after which all blocks are plain, or None."""
    return _faults[0] if _faults else None


def plain_blocks() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which compiled blocks run as plain ones, as forward-mode derivatives need."""
    if "torch._dynamo" in sys.modules:  # importing it takes seconds; without it, nothing is compiled
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def _inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Compile a graph of a block with torch's default compiler, or return it as it is if that fails."""
    if not _faults:
        _print_once("compiling blocks: the first batch of a kind takes longer, by a minute or more")
        try:
            return torch._dynamo.lookup_backend("inductor")(graph, inputs)
        except torch._dynamo.exc.RestartAnalysis:  # not a failure: torch captures the graph again
            raise
        except Exception as error:  # a missing compiler, or an operation that it does not support
            _stay_plain(error)
    return graph.forward  # type: ignore[no-any-return]


def _stay_plain(error: Exception) -> None:
    _faults.append(next(iter(str(error).strip().splitlines()), type(error).__name__))
    _print_once(f"blocks are not compiled: {_faults[0]}")


@functools.cache
def _print_once(line: str) -> None:
    """Print a line on stderr, on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"far: {line}", file=sys.stderr)
