"""An exponential moving average of a module's parameters, kept as a second, frozen module."""

import copy

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from far.training.parallel import own, whole


class Ema:
    """Average ``module`` of a trained one: ``ema ← decay · ema + (1 − decay) · trained`` after each step.

    The decay warms up as ``(1 + step) / (10 + step)``, so that early averages forget the initial weights.
    """

    def __init__(self, trained: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(trained).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, trained: nn.Module, step: int) -> None:
        """Move the average toward ``trained`` after optimizer step ``step`` (0, 1, …)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        pairs = list(zip(self.module.parameters(), trained.parameters(), strict=True))
        # Skip frozen parameters: they equal their average, and reading them costs more than training a head.
        pairs = [(average, parameter) for average, parameter in pairs if parameter.requires_grad]
        averages = [own(average) for average, _ in pairs]
        # A sharded average takes the matching shard of the parameter, a whole one the whole parameter.
        current = [own(now) if isinstance(average, DTensor) else whole(now) for average, now in pairs]
        torch._foreach_lerp_(averages, current, weight)
        for buffer, now in zip(self.module.buffers(), trained.buffers()):
            buffer.copy_(now)
