"""Token orders and schedules against plain restatements of their definitions."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from far.tokens import (
    cosine_token_counts,
    halton_orders,
    on_sphere,
    patchify,
    random_orders,
    raster_orders,
    sample_mask_ratio,
    unpatchify,
)
from tests.refusals import refused


@pytest.mark.parametrize(("patch", "rows", "columns"), [(1, 4, 4), (2, 3, 5), (3, 2, 1), (4, 1, 2)])
def test_patchify_is_channel_major_and_reversible(patch: int, rows: int, columns: int) -> None:
    latents = torch.randn(2, 3, rows * patch, columns * patch)
    tokens = patchify(latents, patch)
    assert tokens.shape == (2, rows * columns, 3 * patch**2)
    for row in range(rows):
        for column in range(columns):
            token = [
                latents[1, channel, row * patch + y, column * patch + x]
                for channel in range(3)
                for y in range(patch)
                for x in range(patch)
            ]
            assert torch.equal(tokens[1, row * columns + column], torch.stack(token))
    assert torch.equal(unpatchify(tokens, patch, rows, columns), latents)


def test_patchify_refuses_partial_patches() -> None:
    with refused("6×5", "patches of 2", error=ValueError):
        patchify(torch.zeros(1, 3, 6, 5), 2)


def mar_counts(tokens: int, steps: int) -> list[int]:
    """Return the counts of MAR's sampler: each step reduces the masked tokens, the last step to none."""
    masked, counts = tokens, []
    for step in range(steps):
        remaining = int(np.floor(tokens * np.cos(np.pi / 2 * (step + 1) / steps)))
        keep = max(1, min(masked - 1, remaining))
        if step == steps - 1:
            keep = 0
        counts.append(masked - keep)
        masked = keep
    return counts


def test_token_counts_equal_mars() -> None:
    for tokens in range(1, 65):
        for steps in range(1, tokens + 1):
            counts = cosine_token_counts(tokens, steps)
            assert counts == mar_counts(tokens, steps), (tokens, steps)
            assert (len(counts), sum(counts), min(counts) >= 1) == (steps, tokens, True), (tokens, steps)
    assert cosine_token_counts(256, 64) == mar_counts(256, 64)
    assert cosine_token_counts(256, 256) == [1] * 256


@pytest.mark.parametrize("steps", [0, -1, 17])
def test_token_counts_refuse_impossible_steps(steps: int) -> None:
    with refused(f"ar_steps {steps}", "16", error=ValueError):
        cosine_token_counts(16, steps)


@pytest.mark.parametrize(("minimum", "std"), [(0.7, 0.25), (0.0, 0.5)])
def test_mask_ratio_is_the_truncated_normal(minimum: float, std: float) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = np.array([sample_mask_ratio(generator, minimum, std) for _ in range(4000)])
    expected = scipy.stats.truncnorm((minimum - 1) / std, 0, loc=1, scale=std)
    assert scipy.stats.kstest(draws, expected.cdf).pvalue > 0.01
    assert minimum <= draws.min() < minimum + 0.01
    assert 0.995 < draws.max() <= 1


def test_orders_are_uniform_permutations_of_their_own_generator() -> None:
    orders = random_orders(16, [torch.Generator().manual_seed(seed) for seed in (3, 4, 3)])
    assert torch.equal(orders.sort(dim=1).values, torch.arange(16).expand(3, 16))
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])
    many = random_orders(4, [torch.Generator().manual_seed(seed) for seed in range(2400)])
    codes = (many * torch.tensor([64, 16, 4, 1])).sum(dim=1)
    counts = codes.unique(return_counts=True)[1]
    assert len(counts) == math.factorial(4)
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 0.01


@pytest.mark.parametrize("dim", [1, -2])
def test_on_sphere_sets_the_norm_and_keeps_the_direction(dim: int) -> None:
    latents = torch.randn(3, 8, 5, 2, generator=torch.Generator().manual_seed(0)) * 7
    scaled = on_sphere(latents, dim)
    norms = scaled.norm(dim=dim)
    torch.testing.assert_close(norms, torch.full_like(norms, latents.shape[dim] ** 0.5))
    cosine = (scaled * latents).sum(dim) / (norms * latents.norm(dim=dim))
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    torch.testing.assert_close(on_sphere(scaled, dim), scaled)
    for values in (torch.zeros_like(latents), 2000 * latents):  # up to near 65504, float16's largest
        assert on_sphere(values.half(), dim).isfinite().all()
    assert float(on_sphere(30_000 * torch.ones(16, 1, dtype=torch.float16), 0)[0, 0]) == 1


def test_raster_orders_count_up() -> None:
    assert raster_orders(4, 2).tolist() == [[0, 1, 2, 3]] * 2


# --- Halton order -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 4), (3, 7), (16, 16)])
def test_halton_order_visits_every_position_once_from_its_first(rows: int, columns: int) -> None:
    first = torch.arange(rows * columns)
    orders = halton_orders(rows, columns, first)
    assert torch.equal(orders[:, 0], first)
    assert torch.equal(orders.sort(dim=1).values, first.expand(len(first), -1))


def test_halton_order_follows_the_sequence() -> None:
    """Bases 2 and 3: (0, 0), (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9), (5/8, 7/9), …"""
    (order,) = halton_orders(8, 9, torch.tensor([0])).tolist()
    assert order[:6] == [0, 4 * 9 + 3, 2 * 9 + 6, 6 * 9 + 1, 1 * 9 + 4, 5 * 9 + 7]
    (shifted,) = halton_orders(8, 9, torch.tensor([7 * 9 + 8])).tolist()
    assert shifted[:3] == [7 * 9 + 8, 3 * 9 + 2, 1 * 9 + 5]


def test_halton_order_spreads_each_step_over_the_image() -> None:
    """Any 16 consecutive positions reach more of the 16 blocks of 4 × 4 positions than chance does (10.3)."""
    (order,) = halton_orders(16, 16, torch.tensor([37])).tolist()
    met = [
        len({(place // 64, place % 16 // 4) for place in order[start : start + 16]}) for start in range(160)
    ]
    assert sum(met) / len(met) > 12
