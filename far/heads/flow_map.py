"""Flow-map head: one network for the map between any two times of the flow, and tokens in one or two steps.

``X_{s,t}(x) = x + (t − s) · v_{s,t}(x | z)`` moves a point of the flow from time ``s`` to ``t``. On the
diagonal, ``v_{t,t}`` is the flow-matching velocity. Lagrangian self-distillation (Boffi et al., arXiv
2505.18825) or MeanFlow (Geng et al., arXiv 2505.13447) trains the rest, by forward-mode derivatives of this
head. With the guidance scale as an input, the head also learns the guided field.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from far.compiling import plain_blocks
from far.devices import to_device
from far.heads.config import FlowMapConfig
from far.heads.flow import interpolate
from far.heads.head import Condition, Draw, Head, Normal, TokenLoss, without_gradient
from far.heads.network import HeadNetwork, TimeEmbedding

# Derivatives in time enter the loss, so times are embedded in a unit in which the fastest wave is slow.
TIME_UNIT = 10.0
# Fraction of a token's noise samples off the diagonal, of which there is at least one.
OFF_DIAGONAL = 0.25
# MeanFlow's times are logistic-normal with their mean on the data's side.
LOGIT_MEAN, LOGIT_DEVIATION = 0.4, 1.0
# Fraction of the jumps that start at noise, and that end at data.
AT_THE_ENDS = 0.25
# Losses are balanced over the cells of a grid of times (s, t) with this many bins per axis.
TIME_BINS = 4
Velocity = Callable[[Tensor, Tensor], Tensor]
MeanVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]


class FlowMapHead(Head):
    """Mean velocity ``v_{s,t}`` between any two times, also guided if ``max_guidance`` is set."""

    config_class = FlowMapConfig
    default_steps = 2
    max_steps = 128
    config: FlowMapConfig

    def __init__(self, config: FlowMapConfig, channels: int, condition: int) -> None:
        super().__init__(config, channels, condition)
        self.max_guidance = config.max_guidance or 1.0
        self.network = HeadNetwork(channels, channels, condition, config.width, config.depth, times=2)
        self.guidance_embedding = None if config.max_guidance is None else TimeEmbedding(config.width)

    def embed_condition(self, z: Tensor, guidance: Tensor | float = 1.0) -> Tensor:
        """Embed conditions ``z […, condition]`` and broadcastable guidance scales as ``[…, width]``."""
        embedded = self.network.embed_condition(z)
        if self.guidance_embedding is None:
            return embedded
        if isinstance(guidance, Tensor):
            scale = guidance.to(z.device, torch.float32)
        else:  # fill on the device: a copy from the host would stall a GPU at every AR step
            scale = torch.full((), guidance, dtype=torch.float32, device=z.device)
        return embedded + self.guidance_embedding((scale - 1) * TIME_UNIT, self.network.dtype)

    def mean_velocity(
        self, x: Tensor, s: Tensor, t: Tensor, z: Tensor, guidance: Tensor | float = 1.0
    ) -> Tensor:
        """Return ``v_{s,t}(x | z)``, ``[…, channels]``. Times and scales broadcast to the leading axes."""
        time = self.network.embed_times(*_times(s, t))
        return self.network.conditioned(x, self.embed_condition(z, guidance), time).to(x.dtype)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return condition.guide(lambda z: self.mean_velocity(x, t, t, z))

    def loss(
        self, x: Tensor, condition: Condition, generator: torch.Generator, teacher: Head, step: int = 0
    ) -> TokenLoss:
        """Return the flow-matching loss on the diagonal and, from ``flow_steps``, the objective's off it.

        The tokens in ``condition.uncond`` learn the guided field at random scales, 1 to ``max_guidance``.
        """
        assert isinstance(teacher, FlowMapHead)
        mean_flow = self.config.objective == "mean_flow"
        samples = self.config.samples_per_token
        # The first samples of each token jump from s to a later t, the others stay on the diagonal, s = t.
        jumps = max(1, round(OFF_DIAGONAL * samples)) if step >= self.config.flow_steps else 0
        noise, s, t = draw_noise_and_times(x, samples, jumps, generator)
        z, uncond = condition.z, condition.uncond
        scale = draw_scales(s, 0 if uncond is None else len(uncond), self.max_guidance, generator)
        field = GuidedField(teacher, z.detach(), uncond, scale)
        point = interpolate(noise, x, s)
        velocity = x - noise + field.shift(point, s)
        predicted = self.mean_velocity(point[jumps:], s[jumps:], s[jumps:], z, scale[jumps:])
        flow = (predicted - velocity[jumps:]).square().mean(dim=-1)
        losses, terms = flow, {"flow": flow.detach().flatten()}
        weighted = flow * time_weights(flow, s[jumps:], s[jumps:], self.config.time_balance)
        if jumps:
            field = dataclasses.replace(field, scale=scale[:jumps])
            mean_velocity = functools.partial(self.mean_velocity, z=z, guidance=field.scale)
            point_and_times = (point[:jumps], s[:jumps], t[:jumps])
            if mean_flow:
                error = mean_flow_residual(mean_velocity, velocity[:jumps], *point_and_times)
            else:
                error = lagrangian_residual(mean_velocity, field.velocity, *point_and_times)
            jump_loss = error.square().mean(dim=-1)
            losses = torch.cat([jump_loss, losses])
            balanced = jump_loss * time_weights(jump_loss, s[:jumps], t[:jumps], self.config.time_balance)
            weighted = torch.cat([balanced, weighted])
            terms[self.config.objective] = jump_loss.detach().flatten()
        return TokenLoss(weighted.mean(dim=0), losses.detach().flatten(), s.flatten(), terms)

    def sampler(self, steps: int, like: Tensor) -> Draw:
        """Return a function that draws tokens; see :meth:`Head.sampler`.

        Without ``condition.uncond``, ``condition.scale`` is the learned guidance, a number or ``[…, 1]``.
        """
        starts = torch.arange(steps, device=like.device, dtype=like.dtype) / steps
        times = self.network.embed_times(*_times(starts, starts + 1 / steps))

        def draw(condition: Condition, normal: Normal, temperature: float) -> Tensor:
            learned = condition.scale if condition.uncond is None else 1.0
            learned = learned.squeeze(-1) if isinstance(learned, Tensor) else learned
            embedded = condition.map(lambda z: self.embed_condition(z, learned))
            x = normal() * temperature
            for network in self.network.at_times(embedded.stacked(), times):
                x = x + 1 / steps * embedded.combine(network(x).to(x.dtype))
            return x

        return draw


def lagrangian_residual(
    mean_velocity: MeanVelocity, velocity: Velocity, point: Tensor, s: Tensor, t: Tensor
) -> Tensor:
    """Return ``∂_t X_{s,t} − v_{t,t}(X_{s,t})``: the motion of the map's end less the field there.

    Args:
        mean_velocity: ``v_{s,t}(x)``, a function of ``x``, ``s`` and ``t``.
        velocity: the field, a function of points and times, without gradient.
        point: points ``[samples, n, channels]`` of the flow at the times ``s``.
        s: starts ``[samples, n]``.
        t: ends ``[samples, n]``.
    """
    with plain_blocks():
        mean, change = torch.func.jvp(  # type: ignore[misc]
            lambda end: mean_velocity(point, s, end), (t,), (torch.ones_like(t),)
        )
    length = (t - s).unsqueeze(-1)
    return mean + length * change - velocity((point + length * mean).detach(), t)


def mean_flow_residual(
    mean_velocity: MeanVelocity, velocity: Tensor, point: Tensor, s: Tensor, t: Tensor
) -> Tensor:
    """Return ``v_{s,t} − (v + (t − s) · dv_{s,t}/ds)``, differentiated along ``velocity`` (equation 6).

    See :func:`lagrangian_residual` for the other arguments. Only ``v_{s,t}`` itself has a gradient.
    """
    with plain_blocks():
        mean, change = torch.func.jvp(  # type: ignore[misc]
            lambda x, start: mean_velocity(x, start, t), (point, s), (velocity, torch.ones_like(s))
        )
    return mean - (velocity + (t - s).unsqueeze(-1) * change).detach()


def draw_noise_and_times(
    x: Tensor, samples: int, jumps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw noise ``[samples, n, channels]`` and times ``s ≤ t [samples, n]`` for tokens ``x [n, channels]``.

    The times differ in the first ``jumps`` samples, which are off the diagonal. Each is the smaller and the
    larger of two draws, as in MeanFlow, which keeps the smaller one on the diagonal too. Some jumps start at
    0 and some end at 1, as a single step does, where draws never lie.
    """
    noise = torch.randn(samples, *x.shape, generator=generator)
    # On the CPU: MPS has no kernel for the inverse normal distribution function.
    s, t = logistic_normal(torch.rand(2, samples, len(x), generator=generator)).sort(dim=0).values
    ends = torch.rand(2, jumps, len(x), generator=generator) < AT_THE_ENDS
    s[:jumps].masked_fill_(ends[0], 0.0)
    t[:jumps].masked_fill_(ends[1], 1.0)
    t[jumps:] = s[jumps:]
    return to_device(noise, x.device), to_device(s, x.device), to_device(t, x.device)


def draw_scales(like: Tensor, count: int, max_guidance: float, generator: torch.Generator) -> Tensor:
    """Draw scales ``[samples, n]`` shaped as ``like``: uniform for the first ``count`` tokens, else 1."""
    scale = torch.ones_like(like)
    if count:
        drawn = to_device(torch.rand(len(like), count, generator=generator), like.device)
        scale[:, :count] += drawn * (max_guidance - 1)
    return scale


@dataclasses.dataclass(frozen=True)
class GuidedField:
    """Velocity field of a head, without gradient, with one guidance scale per token.

    Attributes:
        head: head whose velocity is guided.
        z: conditions ``[n, width]``.
        uncond: conditions without the class ``[m, width]`` of the first ``m ≤ n`` tokens, which are guided.
        scale: guidance scales ``[samples, n]``.
    """

    head: FlowMapHead
    z: Tensor
    uncond: Tensor | None
    scale: Tensor

    @without_gradient()
    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the guided velocity at points ``x [samples, n, channels]`` and times ``t [samples, n]``."""
        return self.head.velocity(x, t, Condition(self.z)) + self.shift(x, t)

    @without_gradient()
    def shift(self, x: Tensor, t: Tensor) -> Tensor:
        """Return what guidance adds to the velocity: ``(scale − 1) · (cond − uncond)``, or 0."""
        shift = torch.zeros_like(x)
        if self.uncond is not None:
            count = len(self.uncond)
            x, t = x[:, :count], t[:, :count]
            cond = self.head.velocity(x, t, Condition(self.z[:count]))
            uncond = self.head.velocity(x, t, Condition(self.uncond))
            shift[:, :count] = (self.scale[:, :count] - 1).unsqueeze(-1) * (cond - uncond)
        return shift


def _times(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the start and the length of a step in the network's unit."""
    return s * TIME_UNIT, (t - s) * TIME_UNIT


def logistic_normal(uniform: Tensor) -> Tensor:
    """Map uniform numbers in (0, 1) to MeanFlow's times."""
    normal = torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))
    return (LOGIT_MEAN + LOGIT_DEVIATION * normal).sigmoid()


def time_weights(losses: Tensor, s: Tensor, t: Tensor, power: float) -> Tensor:
    """Return weights ``(m / m̄) ** -power``: ``m`` is the mean loss at like times, ``m̄`` that at all times.

    The means are over losses ``[samples, n]``, ``m`` over those in the same cell of times ``s ≤ t [samples,
    n]``, and include one row of loss 1. They leave out the row that is weighted, because a weight that
    depends on a row's own noise moves the optimum.
    """
    losses = losses.detach()
    first, last = ((TIME_BINS * time).long().clamp(max=TIME_BINS - 1) for time in (s, t))
    cell = TIME_BINS * first + last
    members = F.one_hot(cell, TIME_BINS**2).to(losses.dtype)
    total, count = (members * losses.unsqueeze(-1)).sum(dim=(0, 1)), members.sum(dim=(0, 1))
    others, all_others = total[cell] - losses + 1, total.sum() - losses + 1
    return (others / count[cell] / all_others * losses.numel()) ** -power
