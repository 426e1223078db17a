"""Base class of all heads: generative models of one token given its condition."""

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from far.errors import InputError
from far.heads.config import HeadConfig


@dataclasses.dataclass(frozen=True)
class Condition:
    """Condition of each token, and how strongly it guides.

    Attributes:
        z: outputs of the backbone ``[…, channels]``.
        uncond: outputs of the backbone without the class, shaped as ``z``, or None.
        scale: guidance scale, a number or ``[…, 1]``; 1 is off.
    """

    z: Tensor
    uncond: Tensor | None = None
    scale: Tensor | float = 1.0

    def map(self, embed: Callable[[Tensor], Tensor]) -> "Condition":
        """Return the condition with ``embed`` applied to ``z`` and to ``uncond``."""
        return Condition(embed(self.z), None if self.uncond is None else embed(self.uncond), self.scale)

    def mix(self) -> Tensor:
        """Return ``uncond + scale · (z − uncond)``: guidance for heads whose prediction cannot be guided."""
        return self.z if self.uncond is None else self.uncond.lerp(self.z, self.scale)

    def guide(self, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the guided prediction ``uncond + scale · (cond − uncond)`` of a network.

        Both halves go through it in one pass, stacked along a new first axis.
        """
        return self.combine(network(self.stacked()))

    def stacked(self) -> Tensor:
        """Return ``z``, or ``[2, …, channels]`` of ``z`` and ``uncond`` if guidance needs both."""
        return self.z if (uncond := self._needed_uncond()) is None else torch.stack([self.z, uncond])

    def combine(self, prediction: Tensor) -> Tensor:
        """Return the guided prediction, from that for :meth:`stacked`."""
        if self._needed_uncond() is None:
            return prediction
        cond, uncond = prediction
        return uncond + self.scale * (cond - uncond)

    def _needed_uncond(self) -> Tensor | None:
        off = not isinstance(self.scale, Tensor) and self.scale == 1.0
        return None if off else self.uncond


# Each call returns fresh standard normal noise ``[…, channels]``.
Normal = Callable[[], Tensor]
# Draws tokens ``[…, channels]`` from a condition, noise and a temperature; see :meth:`Head.sampler`.
Draw = Callable[[Condition, Normal, float], Tensor]


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """Training loss of a batch of tokens, and values to log.

    Attributes:
        value: loss of each token ``[tokens]``, to be minimized.
        samples: loss of each noise sample, 1-D.
        t: time of each noise sample, 0 noise … 1 data, 1-D.
        terms: loss terms by name, each 1-D.
    """

    value: Tensor
    samples: Tensor
    t: Tensor
    terms: dict[str, Tensor]

    @classmethod
    def mean_of(cls, losses: Tensor, t: Tensor, **terms: Tensor) -> "TokenLoss":
        """Return the mean over samples of ``losses [samples, tokens]`` at times ``t``, with terms to log."""
        logged = {name: term.detach().flatten() for name, term in terms.items()}
        return cls(losses.mean(dim=0), losses.detach().flatten(), t.flatten(), logged)


@contextlib.contextmanager
def without_gradient() -> Iterator[None]:
    """Context for targets by the head that is being trained: no gradient, and no weights kept by autocast.

    torch 2.10's autocast would otherwise reuse a weight that it cast here, without gradient, in later passes.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


class Head(nn.Module, abc.ABC):
    """Base class of all heads.

    A subclass is constructed from its configuration, the channels of a token and the channels of a condition.

    Attributes:
        config_class: class of the head's configuration; its ``kind`` names the head.
        default_steps: steps per token of a preset.
        max_steps: largest number of steps per token.
        max_guidance: largest guidance scale that the head has learned to apply without ``uncond``, or 1.
    """

    config_class: ClassVar[type[HeadConfig]]
    default_steps: int
    max_steps: int
    max_guidance: float = 1.0
    config: Any

    def __init__(self, config: Any, channels: int, condition: int) -> None:
        super().__init__()
        self.config = config

    @abc.abstractmethod
    def loss(
        self, x: Tensor, condition: Condition, generator: torch.Generator, teacher: "Head", step: int = 0
    ) -> TokenLoss:
        """Return the training loss of tokens ``x [tokens, channels]``.

        Args:
            condition: ``z [tokens, width]``; for heads that learn guidance also ``uncond [m, width]`` of the
                first ``m ≤ tokens`` tokens.
            generator: source of all noise, on the CPU.
            teacher: head that provides targets to heads that learn from their own predictions: in training
                this head itself, whose targets are taken :func:`without_gradient`.
            step: training step, from 0.
        """

    @abc.abstractmethod
    def sampler(self, steps: int, like: Tensor) -> Draw:
        """Return ``draw(condition, normal, temperature)``, which draws tokens ``[…, channels]``.

        Called once per generation, it does everything that does not depend on the tokens, such as embedding
        the times of the steps. The returned function is called once per AR step, for ``condition.z […,
        width]``. Each of its :meth:`noise_draws` calls of ``normal()`` returns new standard normal noise
        ``[…, channels]``, which ``temperature`` multiplies. Drawing must not copy from or wait for the host,
        which would stall a GPU.

        Args:
            steps: steps per token, within 1 … ``max_steps``; see :meth:`check_steps`.
            like: any tensor with the device and dtype of the tokens.
        """

    def noise_draws(self, steps: int) -> int:
        """Return how often a draw of ``steps`` steps calls ``normal()``."""
        return 1

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the velocity ``E[x − ε | x_t]`` of the flow from noise (0) to token (1), ``[…, channels]``.

        Args:
            x: points of the flow ``[…, channels]``.
            t: times, broadcastable to the leading axes of ``x``.
            condition: ``z […, width]``. Guidance needs ``uncond``.

        Raises:
            InputError: the head has no velocity, so it cannot be distilled.
        """
        kind = self.config.kind
        raise InputError(f"a head of kind {kind} cannot be distilled. Use a diffusion or flow head")

    def check_steps(self, steps: int) -> None:
        """Raise an :class:`InputError` unless ``steps`` is within 1 … ``max_steps``."""
        if not 1 <= steps <= self.max_steps:
            raise InputError(f"head_steps {steps} is out of range. This head takes 1 to {self.max_steps}")
