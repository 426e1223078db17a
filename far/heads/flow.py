"""The flow-matching head: a velocity field from noise to token, integrated by Euler or Heun steps."""

from collections.abc import Callable

import torch
from torch import Tensor

from far.heads.head import Head, HeadConfig, TokenLoss, guided
from far.heads.network import HeadNetwork

# The network's time embedding was designed for 0 … 1000.
TIME_UNIT = 1000.0
Velocity = Callable[[Tensor, float], Tensor]


class FlowHead(Head):
    """Regresses ``v(x_t, t | z)`` on ``x − ε``, with ``x_t = (1 − t) ε + t x``."""

    default_steps = 32
    max_steps = 1000

    def __init__(self, config: HeadConfig, channels: int, condition: int) -> None:
        super().__init__()
        self.config = config
        self.network = HeadNetwork(channels, channels, condition, config.width, config.depth)

    def velocity(
        self, x: Tensor, t: Tensor, z: Tensor, z_uncond: Tensor | None = None, guidance: Tensor | float = 1.0
    ) -> Tensor:
        return guided(lambda c: self.network(x, c, t * TIME_UNIT).to(x.dtype), z, z_uncond, guidance)

    def loss(
        self,
        x: Tensor,
        z: Tensor,
        generator: torch.Generator,
        teacher: Head,
        *,
        step: int = 0,
        z_uncond: Tensor | None = None,
    ) -> TokenLoss:
        noise, t = draw_noise_and_time(x, self.config.samples_per_token, generator)
        rows = (self.velocity(interpolate(noise, x, t), t, z) - (x - noise)).square().mean(dim=-1)
        return TokenLoss(
            rows.mean(dim=0), rows.detach().flatten(), t.flatten(), {"flow": rows.detach().flatten()}
        )

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
        self.check_steps(steps)
        solve = heun if self.config.solver == "heun" else euler
        x = normal() * temperature
        # What does not change from step to step, or does not depend on the token, goes through its layers once.
        times = self.embed_times(steps, x) if times is None else times
        cond = self.network.embed_condition(z)
        uncond = None if z_uncond is None else self.network.embed_condition(z_uncond)

        def velocity(x: Tensor, t: float) -> Tensor:
            time = times[round(t * steps)]
            return guided(lambda c: self.network.conditioned(x, c, time).to(x.dtype), cond, uncond, guidance)

        return solve(velocity, x, steps)

    def embed_times(self, steps: int, like: Tensor) -> Tensor:
        """Of the steps' beginnings and of the last one's end."""
        return self.network.embed_times(
            torch.arange(steps + 1, device=like.device, dtype=like.dtype) / steps * TIME_UNIT
        )


def interpolate(noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """``x_t = (1 − t) ε + t x`` for ``t`` shaped as the leading axes."""
    t = t.unsqueeze(-1)
    return (1 - t) * noise + t * x


def draw_noise_and_time(x: Tensor, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Standard normal noise ``[samples, n, channels]`` and uniform times ``[samples, n]`` for ``x [n, channels]``."""
    noise = torch.randn(samples, *x.shape, generator=generator)
    t = torch.rand(samples, len(x), generator=generator)
    return noise.to(x.device), t.to(x.device)


def euler(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """Integrate ``dx/dt = velocity(x, t)`` from 0 to 1 by ``steps`` Euler steps."""
    for step in range(steps):
        x = x + velocity(x, step / steps) / steps
    return x


def heun(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """The same by Heun's second-order steps: two evaluations a step."""
    for step in range(steps):
        start = velocity(x, step / steps)
        end = velocity(x + start / steps, (step + 1) / steps)
        x = x + (start + end) / (2 * steps)
    return x
