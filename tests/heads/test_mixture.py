"""Every head learns the fractions of a mixture's two modes, which a loss with a biased optimum misses.

The modes are far apart, so the fraction of draws near each is known, and a head that regresses to the more
frequent mode, or to the mean between them, is off by more than the tolerance.
"""

import math

import pytest
import torch
from torch import Tensor

from far.heads import Condition, Head, HeadConfig, build_head
from far.seeds import seeded
from far.training.ema import Ema

# Distance from each mode to the origin per channel, and the modes' standard deviation.
OFFSET, DEVIATION = 0.9, 0.35
# Fraction of the first mode under each of two conditions.
FRACTIONS = torch.tensor([0.8, 0.6])
CONDITIONS = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
TOLERANCE = 0.03


def modes(channels: int) -> Tensor:
    """Return the centers ``[2, channels]`` of the modes, which are opposite."""
    signs = torch.randint(0, 2, (channels,), generator=torch.Generator().manual_seed(channels)) * 2.0 - 1
    return OFFSET * torch.stack([signs, -signs])


def train(head: Head, channels: int, steps: int, rate: float) -> Head:
    """Train on batches of 256 tokens with a cosine learning rate, and return the average weights."""
    ema, draws, centers = Ema(head, 0.99), torch.Generator().manual_seed(1), modes(channels)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    condition = torch.arange(256) % 2
    for step in range(steps):
        decay = (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate * min(1, step / 50) * decay
        second = (torch.rand(256, generator=draws) > FRACTIONS[condition]).long()
        x = centers[second] + DEVIATION * torch.randn(256, channels, generator=draws)
        optimizer.zero_grad()
        loss = head.loss(x, Condition(CONDITIONS[condition]), draws, head, step).value.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        ema.update(head, step)
    return ema.module  # type: ignore[return-value]


@torch.no_grad()
def fractions(head: Head, channels: int, steps: int) -> Tensor:
    """Return the fraction ``[2]`` of draws near the first mode, by condition."""
    draws, z = torch.Generator().manual_seed(2), CONDITIONS.repeat_interleave(4000, dim=0)

    def normal() -> Tensor:
        return torch.randn(len(z), channels, generator=draws)

    drawn = head.sampler(steps, z)(Condition(z), normal, 1.0)
    return (torch.cdist(drawn, modes(channels)).argmin(dim=1) == 0).float().view(2, -1).mean(dim=1)


# Options of each head, its training steps, and the numbers of steps per token at which it promises the data's
# distribution. Without its limit, a diffusion head needs a far longer training.
CASES: dict[str, tuple[dict, int, tuple[int, ...]]] = {
    "shortcut": ({"samples_per_token": 4}, 1200, (8, 1)),
    "flow": ({}, 600, (32,)),
    "diffusion": ({"token_limit": 3.0}, 600, (100,)),
    "flow_map": ({}, 600, (2, 1)),
    "energy": ({}, 600, (1,)),
}


@pytest.mark.parametrize("channels", [16, 32])
@pytest.mark.parametrize("kind", CASES)
def test_trained_head_draws_both_modes_as_often_as_the_data(kind: str, channels: int) -> None:
    options, train_steps, head_steps = CASES[kind]
    config = HeadConfig.kinds[kind](width=64, depth=1, **{"samples_per_token": 2, **options})
    with seeded(0):
        head = build_head(config, channels, CONDITIONS.shape[1])
    head = train(head, channels, train_steps, 1e-3 if kind == "energy" else 3e-3)
    assert head_steps[0] == head.default_steps
    for steps in head_steps:
        error = fractions(head, channels, steps) - FRACTIONS
        assert error.abs().max() < TOLERANCE, f"{error.tolist()} in {steps} steps"
