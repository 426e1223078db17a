"""Low-rank adapters (LoRA, arXiv 2106.09685): a trained module is tuned by a small addition to each of its linear layers."""

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class AdaptedLinear(nn.Module):
    """A frozen linear layer whose weight is ``weight + up · down``; ``up`` starts at zero, so that at first nothing changes."""

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


def add_adapters(module: nn.Module, rank: int) -> None:
    """Freeze ``module`` and adapt every linear layer in it; :func:`adapters` alone are trained."""
    module.requires_grad_(False)
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                setattr(parent, name, AdaptedLinear(layer, rank))


def adapters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module's adapters; sharding replaces them, so they are asked for after it."""
    adapted = [
        layer
        for parent in module.modules()
        for layer in parent.children()
        if isinstance(layer, AdaptedLinear)
    ]
    return [parameter for layer in adapted for parameter in (layer.down, layer.up)]


@torch.no_grad()
def merged(module: M) -> M:
    """A copy of ``module`` with plain linear layers, the adapters in their weights."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, AdaptedLinear):
                layer.base.weight += layer.up @ layer.down
                setattr(parent, name, layer.base)
    return module
