"""Base class of networks in closed form, which replace a head's network."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


class ExactNetwork(nn.Module):
    """Base class that embeds conditions and times as themselves. A subclass defines ``forward``."""

    def embed_condition(self, z: Tensor) -> Tensor:
        return z

    def embed_times(self, *times: Tensor) -> Tensor:
        return torch.stack(times, dim=-1) if times else torch.empty(0)

    def conditioned(self, x: Tensor, condition: Tensor, times: Tensor) -> Tensor:
        return self(x, condition, *times.unbind(-1))

    def at_times(self, condition: Tensor, times: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        return (lambda x, time=time: self.conditioned(x, condition, time) for time in times)  # type: ignore[misc]
