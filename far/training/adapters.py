"""Low-rank adapters (LoRA, arXiv 2106.09685), small additions to the linear layers of a trained module."""

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class AdaptedLinear(nn.Module):
    """A frozen linear layer whose weight becomes ``weight + up · down``.

    ``up`` starts at zero, so nothing changes at first.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        like = base.weight
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(
            torch.randn(rank, base.in_features, device=like.device, dtype=like.dtype) * base.in_features**-0.5
        )
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=like.device, dtype=like.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


def _layers(module: nn.Module, kind: type[M]) -> list[tuple[nn.Module, str, M]]:
    """Return (parent, name, layer) of each layer of a kind. Checkpoints number adapters in this order."""
    return [
        (parent, name, layer)
        for parent in module.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, kind)
    ]


def add_adapters(module: nn.Module, rank: int) -> None:
    """Freeze ``module`` and adapt its linear layers, in place. Only its :func:`adapters` remain trainable."""
    module.requires_grad_(False)
    for parent, name, layer in _layers(module, nn.Linear):
        setattr(parent, name, AdaptedLinear(layer, rank))


def adapters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module's adapters. Sharding replaces them, so call this afterwards."""
    return [matrix for _, _, layer in _layers(module, AdaptedLinear) for matrix in (layer.down, layer.up)]


@torch.no_grad()
def merged(module: M) -> M:
    """Return a copy of ``module`` with plain linear layers whose weights include the adapters."""
    module = copy.deepcopy(module)
    for parent, name, layer in _layers(module, AdaptedLinear):
        layer.base.weight += layer.up @ layer.down
        setattr(parent, name, layer.base)
    return module
