"""Flow-matching head: a velocity field from noise to token, integrated by Euler or Heun steps."""

from collections.abc import Callable

import torch
from torch import Tensor

from far.devices import to_device
from far.heads.config import FlowConfig
from far.heads.head import Condition, Draw, Head, Normal, TokenLoss
from far.heads.network import HeadNetwork

# The network's time embedding is designed for 0 … 1000.
TIME_UNIT = 1000.0
Velocity = Callable[[Tensor, float], Tensor]


class FlowHead(Head):
    """Velocity ``v(x_t, t | z)``, trained by regression on ``x − ε`` with ``x_t = (1 − t) ε + t x``."""

    config_class = FlowConfig
    default_steps = 32
    max_steps = 1000
    config: FlowConfig

    def __init__(self, config: FlowConfig, channels: int, condition: int) -> None:
        super().__init__(config, channels, condition)
        self.network = HeadNetwork(channels, channels, condition, config.width, config.depth)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return condition.guide(lambda z: self.network(x, z, t * TIME_UNIT).to(x.dtype))

    def loss(
        self, x: Tensor, condition: Condition, generator: torch.Generator, teacher: Head, step: int = 0
    ) -> TokenLoss:
        noise, t = draw_noise_and_time(x, self.config.samples_per_token, generator)
        velocity = self.velocity(interpolate(noise, x, t), t, Condition(condition.z))
        losses = (velocity - (x - noise)).square().mean(dim=-1)
        return TokenLoss.mean_of(losses, t, flow=losses)

    def sampler(self, steps: int, like: Tensor) -> Draw:
        is_heun = self.config.solver == "heun"
        ends = torch.arange(steps + 1, device=like.device, dtype=like.dtype) / steps
        times = self.network.embed_times(ends * TIME_UNIT)
        # One per evaluation, in the solver's order. Heun evaluates both ends of each step.
        times = torch.stack([times, times], dim=1).flatten(0, 1)[1:-1] if is_heun else times[:-1]

        def draw(condition: Condition, normal: Normal, temperature: float) -> Tensor:
            embedded = condition.map(self.network.embed_condition)
            networks = self.network.at_times(embedded.stacked(), times)

            def velocity(x: Tensor, t: float) -> Tensor:
                return embedded.combine(next(networks)(x).to(x.dtype))

            return (heun if is_heun else euler)(velocity, normal() * temperature, steps)

        return draw


def interpolate(noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Return ``x_t = (1 − t) ε + t x`` for ``t`` shaped as the leading axes."""
    t = t.unsqueeze(-1)
    return (1 - t) * noise + t * x


def draw_noise_and_time(x: Tensor, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw normal noise ``[samples, n, channels]`` and uniform times ``[samples, n]`` for tokens ``x``."""
    noise = torch.randn(samples, *x.shape, generator=generator)
    t = torch.rand(samples, len(x), generator=generator)
    return to_device(noise, x.device), to_device(t, x.device)


def euler(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """Integrate ``dx/dt = velocity(x, t)`` from 0 to 1 by ``steps`` Euler steps."""
    for step in range(steps):
        x = x + velocity(x, step / steps) / steps
    return x


def heun(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """Integrate ``dx/dt = velocity(x, t)`` from 0 to 1 by ``steps`` Heun steps of two evaluations each."""
    for step in range(steps):
        start = velocity(x, step / steps)
        end = velocity(x + start / steps, (step + 1) / steps)
        x = x + (start + end) / (2 * steps)
    return x
