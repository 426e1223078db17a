"""An exponential moving average of a module's parameters, kept as a second, frozen module."""

import copy

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from far.training.parallel import own, whole


class Ema:
    """``module`` follows the trained one as ``ema ← decay · ema + (1 − decay) · trained``.

    The decay warms up as ``(1 + step) / (10 + step)``, so that early averages forget the initial weights.
    """

    def __init__(self, trained: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(trained).eval().requires_grad_(False)

    def decay_at(self, step: int) -> float:
        """The decay used after optimizer step ``step`` (0, 1, …)."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, trained: nn.Module, step: int) -> None:
        weight = 1 - self.decay_at(step)
        # What is frozen is its own average; of a backbone, reading it would take longer than training the head.
        pairs = [
            pair
            for pair in zip(self.module.parameters(), trained.parameters(), strict=True)
            if pair[1].requires_grad
        ]
        averages = [own(average) for average, _ in pairs]
        # Where the average is a shard, that of the same place; else all of what may be shards.
        current = [
            own(parameter) if isinstance(average, DTensor) else whole(parameter)
            for average, parameter in pairs
        ]
        torch._foreach_lerp_(averages, current, weight)
        for buffer, now in zip(self.module.buffers(), trained.buffers()):
            buffer.copy_(now)
