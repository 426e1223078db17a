"""FAR's shortcut head (arXiv 2504.18391; shortcut models: Frans et al., arXiv 2410.12557).

``s(x_t, t, d | z)`` is the mean velocity over the next step of size ``d``: ``x_{t+d} = x_t + d · s``.
The network gets the smallest size, 1/128, as ``d = 0``, where ``s`` is the flow-matching velocity.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from far.devices import to_device
from far.heads.config import ShortcutConfig
from far.heads.flow import TIME_UNIT, draw_noise_and_time, interpolate
from far.heads.head import Condition, Draw, Head, Normal, TokenLoss, without_gradient
from far.heads.network import HeadNetwork

FINEST = 128
# One noise sample in this many carries the self-consistency target (the released shortcut models' choice).
CONSISTENCY_EVERY = 8
TARGET_LIMIT = 4.0


class ShortcutHead(Head):
    """Mean velocity over steps of any size 1, 1/2, … 1/128, from one network."""

    config_class = ShortcutConfig
    default_steps = 8
    max_steps = FINEST
    config: ShortcutConfig

    def __init__(self, config: ShortcutConfig, channels: int, condition: int) -> None:
        super().__init__(config, channels, condition)
        self.network = HeadNetwork(channels, channels, condition, config.width, config.depth, times=2)

    def mean_velocity(self, x: Tensor, t: Tensor, d: Tensor, z: Tensor) -> Tensor:
        """Return ``s(x_t, t, d | z)``, ``[…, channels]``. ``t`` and ``d`` broadcast to the leading axes."""
        return self.network(x, z, *_times(t, d)).to(x.dtype)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return condition.guide(lambda z: self.mean_velocity(x, t, torch.zeros_like(t), z))

    def loss(
        self, x: Tensor, condition: Condition, generator: torch.Generator, teacher: Head, step: int = 0
    ) -> TokenLoss:
        """Return the flow-matching loss, or for one noise sample in eight that of self-consistency."""
        assert isinstance(teacher, ShortcutHead)
        noise, t = draw_noise_and_time(x, self.config.samples_per_token, generator)
        target = x - noise
        # Random, because tokens lie in the order of the sequence: every eighth would be the same positions.
        shuffled = to_device(torch.randperm(t.numel(), generator=generator), x.device)
        chosen, others = shuffled.tensor_split([-(-t.numel() // CONSISTENCY_EVERY)])
        whole, start = draw_steps(len(chosen), generator)
        t.view(-1)[chosen] = to_device(start, x.device)
        d = torch.zeros_like(t)
        d.view(-1)[chosen] = to_device(whole, x.device)
        x_t = interpolate(noise, x, t)
        with without_gradient():
            field = functools.partial(teacher.mean_velocity, z=condition.z.detach()[chosen % len(x)])
            points = x_t.view(-1, x.shape[-1])[chosen], t.view(-1)[chosen], d.view(-1)[chosen]
            target.view(-1, x.shape[-1])[chosen] = consistency_target(field, *points)
        losses = (self.mean_velocity(x_t, t, d, condition.z) - target).square().mean(dim=-1)
        # By positions: the size of losses[d > 0] is on the device, and a GPU would be waited for.
        flow, consistency = losses.flatten()[others], losses.flatten()[chosen]
        return TokenLoss.mean_of(losses, t, flow=flow, consistency=consistency)

    def sampler(self, steps: int, like: Tensor) -> Draw:
        sizes = step_sizes(steps)
        # Fill on the device: values of the host would be copied. Sums of powers of two are exact.
        d = torch.cat([like.new_full((sizes.count(size),), size) for size in dict.fromkeys(sizes)])
        # Starts of the steps. Not by cumsum, whose sums have no fixed order on CUDA.
        index = torch.arange(steps, device=like.device, dtype=like.dtype)
        t = (index + index.clamp(max=sizes.count(sizes[0]))) * (sizes[0] / 2)
        times = self.network.embed_times(*_times(t, d))

        def draw(condition: Condition, normal: Normal, temperature: float) -> Tensor:
            embedded = condition.map(self.network.embed_condition)
            x = normal() * temperature
            for size, network in zip(sizes, self.network.at_times(embedded.stacked(), times)):
                x = x + size * embedded.combine(network(x).to(x.dtype))
            return x

        return draw


def _times(t: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Return time and step size in the network's unit."""
    return t * TIME_UNIT, torch.where(d <= 1 / FINEST, torch.zeros_like(d), d) * TIME_UNIT


def step_sizes(steps: int) -> list[float]:
    """Return ``steps`` powers of two that sum to 1, each of which divides the time at which it starts.

    If ``steps`` is not a power of two, the last ones are smaller, because the field bends most near the data.
    """
    coarse = 2 ** (steps.bit_length() - 1)
    halved = steps - coarse
    return [1 / coarse] * (coarse - halved) + [0.5 / coarse] * (2 * halved)


def draw_steps(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw sizes ``[count]`` of 1, 1/2 … 1/64, and starts that are multiples of them."""
    divisions = 2 ** torch.randint(0, FINEST.bit_length() - 1, (count,), generator=generator)
    start = (torch.rand(count, generator=generator) * divisions).floor() / divisions
    return 1.0 / divisions, start


def consistency_target(
    mean_velocity: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, t: Tensor, whole: Tensor
) -> Tensor:
    """Return the clipped mean velocity of two half steps over ``whole [n]``, from ``x`` at ``t [n]``."""
    d = whole / 2
    first = mean_velocity(x, t, d)
    second = mean_velocity(x + d.unsqueeze(-1) * first, t + d, d)
    return ((first + second) / 2).clamp(-TARGET_LIMIT, TARGET_LIMIT)
