"""Base class of all backbones: known tokens and a class → conditions ``z`` at query positions."""

import abc
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Cache(Protocol):
    """Keys and values that a backbone keeps between the AR steps of a generation."""

    def clear(self) -> None:
        """Hold nothing, so that the next AR step computes everything."""


class Backbone(nn.Module, abc.ABC):
    """Base class of all backbones. The label ``classes`` means "no class", as guidance needs it.

    Attributes:
        any_order: tokens may become known in any order and several at once, not only one by one in raster
            order.
        exact_cache: conditions from a cache equal those computed without, because known tokens do not depend
            on later ones.
        config: configuration of this backbone.
        tokens: length of the sequence.
    """

    any_order: bool
    exact_cache: bool
    config: Any
    tokens: int

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """Channels of ``z``."""

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
            cache: from :meth:`new_cache`, one per generation; by default, every call computes everything.
        """

    @abc.abstractmethod
    def training_inputs(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return input tokens ``[b, n, channels]``, known and query positions of one training step."""

    @abc.abstractmethod
    def new_cache(self, rows: int) -> Cache:
        """Return an empty cache for a generation of ``rows`` sequences; see :meth:`forward`."""
