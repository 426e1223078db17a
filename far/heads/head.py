"""What every head is: a generative model of one token given its condition ``z``.

The registry of heads is in ``far.heads``; the network that they share in ``far.heads.network``.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from far.errors import InputError
from far.heads.config import HeadConfig


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """``value [n]`` to be minimised, a token each; the rest is for the log.

    ``rows`` and ``t`` are the losses and the times (0 noise … 1 data) of every noise sample;
    ``parts`` holds named losses, a 1-D tensor each.
    """

    value: Tensor
    rows: Tensor
    t: Tensor
    parts: dict[str, Tensor]


class Head(nn.Module, abc.ABC):
    """Base of all heads: ``loss(x, z)`` and ``sample(z)``."""

    default_steps: int
    max_steps: int
    config: HeadConfig

    @property
    def max_guidance(self) -> float:
        """The largest guidance scale that :meth:`sample` knows without ``z_uncond``; 1 if it has learnt none."""
        return self.config.max_guidance or 1.0

    @abc.abstractmethod
    def loss(
        self,
        x: Tensor,
        z: Tensor,
        generator: torch.Generator,
        teacher: "Head",
        *,
        step: int = 0,
        z_uncond: Tensor | None = None,
    ) -> TokenLoss:
        """The training loss of tokens ``x [n, channels]`` given ``z [n, condition]``.

        Args:
            teacher: this head with EMA weights; it gives targets to heads that bootstrap.
            step: of the training, for heads that change their loss on the way.
            z_uncond: unconditional conditions ``[m, condition]`` of the first ``m ≤ n`` tokens, for heads that learn guidance.
        """

    @abc.abstractmethod
    def sample(
        self,
        z: Tensor,
        normal: Callable[[], Tensor],
        *,
        steps: int,
        temperature: float = 1.0,
        z_uncond: Tensor | None = None,
        guidance: float = 1.0,
        times: Tensor | None = None,
    ) -> Tensor:
        """Draw tokens ``[…, channels]`` for conditions ``z […, condition]``.

        Args:
            normal: returns a fresh standard normal ``[…, channels]`` at each call.
            steps: how often the network is applied (1 … ``max_steps``).
            temperature: multiplies the noise (for the diffusion head: of each denoising step).
            z_uncond: unconditional conditions, shaped as ``z``; without them guidance is what the head has learnt, or off.
            guidance: 1 is off; the prediction is ``uncond + guidance · (cond − uncond)``.
            times: of :meth:`embed_times` for as many steps, to spare the embedding; computed where not given.

        Raises:
            InputError: ``steps`` is out of range.
        """

    @abc.abstractmethod
    def embed_times(self, steps: int, like: Tensor) -> Tensor:
        """The network's embedding ``[steps, …]`` of each step's time, the same for all tokens; ``like`` is a token, or noise."""

    def velocity(
        self, x: Tensor, t: Tensor, z: Tensor, z_uncond: Tensor | None = None, guidance: Tensor | float = 1.0
    ) -> Tensor:
        """The velocity ``E[x − ε | x_t]`` of the flow from noise (0) to token (1), ``[…, channels]``.

        Args:
            x: points of the flow ``[…, channels]``.
            t: times, shaped as the leading axes, or broadcastable to them.
            z_uncond: shaped as ``z``; without it there is no guidance.
            guidance: one scale, or ``[…, 1]`` of them.

        Raises:
            InputError: the head knows none; such a head cannot be distilled from.
        """
        raise InputError(
            f"a head of kind {self.config.kind} has no velocity field to learn from; take a teacher with a diffusion or flow head"
        )

    def check_steps(self, steps: int) -> None:
        """Raise an :class:`InputError` unless ``steps`` is within 1 … ``max_steps``."""
        if not 1 <= steps <= self.max_steps:
            raise InputError(
                f"head_steps {steps}: the {type(self).__name__} takes 1 to {self.max_steps} steps"
            )


def guided(
    network: Callable[[Tensor], Tensor], z: Tensor, z_uncond: Tensor | None, guidance: Tensor | float
) -> Tensor:
    """The guided prediction; both halves go through ``network`` (a function of ``z``) in one pass.

    ``network`` may return ``[…]`` of any shape whose leading axes are those of ``z``.
    """
    if z_uncond is None or (not isinstance(guidance, Tensor) and guidance == 1.0):
        return network(z)
    cond, uncond = network(torch.stack([z, z_uncond]))
    return uncond + guidance * (cond - uncond)


def take_steps(
    mean_velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    sizes: Iterable[float],
    times: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance: Tensor | float,
) -> Tensor:
    """``x […, channels]`` after steps of ``sizes`` with guided mean velocities: ``x ← x + size · mean_velocity(x, condition, time)``.

    Args:
        mean_velocity: a network's outputs ``[…, channels]`` for points, embedded conditions, and one of ``times``.
        times: embedded, ``[steps, …]``.
        cond: embedded conditions ``[…, width]``; ``uncond`` those without the class, or None.
    """
    for size, time in zip(sizes, times):
        x = x + size * guided(lambda c: mean_velocity(x, c, time).to(x.dtype), cond, uncond, guidance)
    return x
