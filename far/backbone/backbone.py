"""What every backbone is: known tokens and a class → conditions ``z`` at chosen positions.

A backbone knows no head, no generation schedule, no guidance: its one question is :meth:`Backbone.forward`. The registry
of backbones is in ``far.backbone``.
"""

import abc
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Cache(Protocol):
    """What a backbone keeps between the AR steps of a generation."""

    def clear(self) -> None:
        """Hold nothing; the next step computes everything."""


class Backbone(nn.Module, abc.ABC):
    """Base of all backbones. A label equal to ``classes`` stands for "no class" (guidance's unconditional half).

    ``any_order`` tells whether tokens may become known in any order and several at once; otherwise they are drawn
    one by one, row by row.
    """

    any_order: bool
    config: Any
    tokens: int

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """The width of ``z``."""

    @abc.abstractmethod
    def forward(
        self, tokens: Tensor, known: Tensor, query: Tensor, labels: Tensor, cache: Any = None
    ) -> Tensor:
        """Return ``z [b, m, width]`` at the positions ``query [b, m]``.

        Args:
            tokens: ``[b, n, channels]``; only the known ones are read.
            known: positions ``[b, k]`` of the known tokens.
            query: positions ``[b, m]`` to compute ``z`` at.
            labels: ``[b]``, 0 … classes.
            cache: from :meth:`new_cache`, the same one at each step of a generation. Without one, every call
                computes everything.
        """

    @abc.abstractmethod
    def training_inputs(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return one training step's arguments of :meth:`forward`: input tokens ``[b, n, channels]``, known and
        query positions."""

    @abc.abstractmethod
    def new_cache(self, rows: int) -> Cache:
        """Return an empty cache for a generation of ``rows`` sequences; see :meth:`forward`."""
