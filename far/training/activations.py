"""Activation checkpointing: blocks keep their inputs for the backward pass and compute the rest again."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.utils.checkpoint import checkpoint

from far.errors import InputError
from far.layers import blocks_of


def checkpoint_activations(module: nn.Module) -> None:
    """Let the blocks of a backbone and a head keep only their inputs for the backward pass.

    The backward pass runs the block's forward pass again, with the same dropout, so gradients are the same to
    the bit. Without gradients, as in drawing, blocks run as before. Parameters keep their names.

    Raises:
        InputError: the module has no such blocks, as an autoencoder.
    """
    if not (blocks := blocks_of(module)):
        problem = f"checkpoint_activations is for generators, not for {type(module).__name__}"
        raise InputError(f"{problem}. Set it to false")
    for block in blocks:
        # Not the call: the hooks by which FSDP2 gathers a block's weights stay outside.
        block.forward = functools.partial(_checkpointed, block.forward)


def _checkpointed(forward: Callable[..., Tensor], *inputs: Any, **options: Any) -> Tensor:
    # Tangents of a forward-mode derivative, which some heads take, would be lost.
    if any(map(_has_tangent, inputs)):
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, **options)  # type: ignore[no-any-return]


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and unpack_dual(value).tangent is not None
