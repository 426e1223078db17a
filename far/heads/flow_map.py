"""The flow-map head: one network for the map between any two times of the flow, and with it tokens in one or two steps.

``X_{s,t}(x) = x + (t − s) · v_{s,t}(x | z)`` takes a point of the flow at time ``s`` to where it is at ``t``; on the
diagonal, ``v_{t,t}`` is the flow-matching velocity. Two objectives teach the rest: Lagrangian self-distillation (Boffi et al.,
arXiv 2505.18825) and MeanFlow (Geng et al., arXiv 2505.13447). Both differentiate this head alone, forwards. The head can
learn the guided field as well, with the guidance scale as an input: guidance then needs no second pass of the backbone.
"""

import dataclasses

import torch
from torch import Tensor

from far.heads.config import FlowMapConfig
from far.heads.flow import interpolate
from far.heads.head import Condition, Draw, Head, Normal, TokenLoss
from far.heads.network import HeadNetwork, TimeEmbedding

# Derivatives in time enter the loss: times are embedded in a unit in which the fastest wave is slow.
TIME_UNIT = 10.0
# The share of a token's noise samples that is off the diagonal.
OFF_DIAGONAL = 0.25
# MeanFlow's times, a logistic normal with its mean on the side of the data, and the small number in its weights.
LOGIT_MEAN, LOGIT_DEVIATION = 0.4, 1.0
ADAPTIVE_EPSILON = 1e-3
# Of Lagrangian rows; about what a row of flow matching has by its adaptive weight.
LAGRANGIAN_WEIGHT = 1.5


class FlowMapHead(Head):
    """The mean velocity ``v_{s,t}`` between any two times; guided too, if ``max_guidance`` is set."""

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
        """``z […, condition]`` and scales that broadcast to its leading axes → ``[…, width]``."""
        embedded = self.network.embed_condition(z)
        if self.guidance_embedding is None:
            return embedded
        if isinstance(guidance, Tensor):
            scale = guidance.to(z.device, torch.float32)
        else:  # filled in on the device: a copy from the host would stall a GPU at every AR step
            scale = torch.full((), guidance, dtype=torch.float32, device=z.device)
        return embedded + self.guidance_embedding((scale - 1) * TIME_UNIT, self.network.dtype)

    def mean_velocity(
        self, x: Tensor, s: Tensor, t: Tensor, z: Tensor, guidance: Tensor | float = 1.0
    ) -> Tensor:
        """``v_{s,t}(x | z)``, ``[…, channels]``; ``s``, ``t`` and ``guidance`` broadcast to the leading axes."""
        time = self.network.embed_times(*_times(s, t))
        return self.network.conditioned(x, self.embed_condition(z, guidance), time).to(x.dtype)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See :class:`Head`: ``v_{t,t}(x | z)``, guided from both conditions."""
        return condition.guide(lambda z: self.mean_velocity(x, t, t, z))

    def loss(
        self, x: Tensor, condition: Condition, generator: torch.Generator, teacher: Head, step: int = 0
    ) -> TokenLoss:
        """Flow matching on the diagonal; from step ``flow_steps`` on, a quarter of a token's noise samples is off it.

        The first tokens, those that ``uncond`` has, learn the guided field at scales drawn between 1 and ``max_guidance``.
        """
        assert isinstance(teacher, FlowMapHead)
        off = (
            max(1, round(OFF_DIAGONAL * self.config.samples_per_token))
            if step >= self.config.flow_steps
            else 0
        )
        noise, s, t = self._draw(x, off, generator)
        z, uncond = condition.z, condition.uncond
        field = _Field(teacher, z.detach(), uncond, self._draw_scales(s, uncond, generator))
        point = interpolate(noise, x, s)
        velocity = x - noise + field.shift(point, s)
        predicted = self.mean_velocity(point[off:], s[off:], s[off:], z, field.scale[off:])
        flow = (predicted - velocity[off:]).square().mean(dim=-1)
        rows, value, parts = flow, adaptive(flow), {"flow": flow.detach().flatten()}
        if off:
            residual = self._mean_flow if self.config.objective == "mean_flow" else self._lagrangian
            jump = (
                residual(point[:off], velocity[:off], s[:off], t[:off], z, field.first(off))
                .square()
                .mean(dim=-1)
            )
            weighted = adaptive(jump) if self.config.objective == "mean_flow" else LAGRANGIAN_WEIGHT * jump
            rows, value = torch.cat([jump, rows]), torch.cat([weighted, value])
            parts[self.config.objective] = jump.detach().flatten()
        return TokenLoss(value.mean(dim=0), rows.detach().flatten(), s.flatten(), parts)

    def _draw(self, x: Tensor, off: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Noise ``[samples, n, channels]`` and times ``s ≤ t [samples, n]``, which differ in the first ``off`` samples."""
        samples = self.config.samples_per_token
        noise = torch.randn(samples, *x.shape, generator=generator)
        s, other = (
            torch.rand(samples, len(x), generator=generator),
            torch.rand(off, len(x), generator=generator),
        )
        s, other = logistic_normal(s), logistic_normal(other)  # on the CPU: MPS has no kernel for it
        first, last = torch.minimum(s[:off], other), torch.maximum(s[:off], other)
        return (
            noise.to(x.device),
            torch.cat([first, s[off:]]).to(x.device),
            torch.cat([last, s[off:]]).to(x.device),
        )

    def _draw_scales(self, like: Tensor, uncond: Tensor | None, generator: torch.Generator) -> Tensor:
        """Guidance scales ``[samples, n]``: uniform for the tokens that learn guidance, 1 for the others."""
        scale = torch.ones_like(like)
        if uncond is not None:
            drawn = torch.rand(len(like), len(uncond), generator=generator).to(like.device)
            scale[:, : len(uncond)] += drawn * (self.max_guidance - 1)
        return scale

    def _lagrangian(
        self, point: Tensor, velocity: Tensor, s: Tensor, t: Tensor, z: Tensor, field: "_Field"
    ) -> Tensor:
        """How far the map's end moves otherwise than the field there: ``∂_t X_{s,t} − v_{t,t}(X_{s,t})``."""
        mean, change = torch.func.jvp(  # type: ignore[misc]
            lambda end: self.mean_velocity(point, s, end, z, field.scale), (t,), (torch.ones_like(t),)
        )
        length = (t - s).unsqueeze(-1)
        return mean + length * change - field.velocity((point + length * mean).detach(), t)

    def _mean_flow(
        self, point: Tensor, velocity: Tensor, s: Tensor, t: Tensor, z: Tensor, field: "_Field"
    ) -> Tensor:
        """How far the mean velocity is from ``v + (t − s) · dv_{s,t}/ds``, differentiated along the flow (the paper's equation 6)."""
        mean, change = torch.func.jvp(  # type: ignore[misc]
            lambda x, start: self.mean_velocity(x, start, t, z, field.scale),
            (point, s),
            (velocity, torch.ones_like(s)),
        )
        return mean - (velocity + (t - s).unsqueeze(-1) * change).detach()

    def sampler(self, steps: int, like: Tensor) -> Draw:
        """See :class:`Head`. Without ``uncond``, a head that has learned guidance applies ``condition.scale`` itself.

        That scale is a number, or one per token ``[…]``.
        """
        self.check_steps(steps)
        starts = torch.arange(steps, device=like.device, dtype=like.dtype) / steps
        times = self.network.embed_times(*_times(starts, starts + 1 / steps))

        def draw(condition: Condition, normal: Normal, temperature: float) -> Tensor:
            learned = condition.scale if condition.uncond is None else 1.0
            embedded = condition.map(lambda z: self.embed_condition(z, learned))
            x = normal() * temperature
            for time in times:
                x = x + 1 / steps * embedded.guide(lambda c: self.network.conditioned(x, c, time).to(x.dtype))
            return x

        return draw


@dataclasses.dataclass(frozen=True)
class _Field:
    """The velocity field that the map belongs to, from the teacher and without gradient: guided at each token's ``scale [samples, n]``."""

    teacher: FlowMapHead
    z: Tensor
    uncond: Tensor | None
    scale: Tensor

    def first(self, samples: int) -> "_Field":
        return dataclasses.replace(self, scale=self.scale[:samples])

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """At points ``x [samples, n, channels]`` and times ``t [samples, n]``."""
        return self.teacher.velocity(x, t, Condition(self.z)) + self.shift(x, t)

    @torch.no_grad()
    def shift(self, x: Tensor, t: Tensor) -> Tensor:
        """What guidance adds to the velocity: ``(scale − 1) · (cond − uncond)``, zero where there is no unconditional ``z``."""
        shift = torch.zeros_like(x)
        if self.uncond is not None:
            count = len(self.uncond)
            x, t = x[:, :count], t[:, :count]
            cond = self.teacher.velocity(x, t, Condition(self.z[:count]))
            uncond = self.teacher.velocity(x, t, Condition(self.uncond))
            shift[:, :count] = (self.scale[:, :count] - 1).unsqueeze(-1) * (cond - uncond)
        return shift


def _times(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Beginning and length of a step as the network is given them."""
    return s * TIME_UNIT, (t - s) * TIME_UNIT


def logistic_normal(uniform: Tensor) -> Tensor:
    """Uniform numbers in (0, 1) → MeanFlow's times."""
    normal = torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))
    return (LOGIT_MEAN + LOGIT_DEVIATION * normal).sigmoid()


def adaptive(rows: Tensor) -> Tensor:
    """MeanFlow's weights: losses divided by their own size, which is not differentiated.

    Large losses do not drown the small; and as the gradient is that of a logarithm, what is learnt leans from the mean to the mode.
    """
    return rows / (rows.detach() + ADAPTIVE_EPSILON)
