"""Shortcut head against closed forms for Gaussian data, with exact and with trained networks.

For data ``N(mean, DEVIATION²)`` the marginal at time t is Gaussian with mean ``t · mean`` and standard
deviation ``spread(t)``. The flow preserves a point's distance from the mean in standard deviations, so the
flow map and the mean velocity over any step are known.
"""

import copy
from collections.abc import Callable

import pytest
import scipy.stats
import torch
from drawing import draw
from exact import ExactNetwork
from torch import Tensor

from far.heads import Condition, ShortcutConfig
from far.heads.shortcut import (
    CONSISTENCY_EVERY,
    FINEST,
    TARGET_LIMIT,
    ShortcutHead,
    consistency_target,
    draw_steps,
    step_sizes,
)
from far.training.ema import Ema

DEVIATION = 0.5
SIZES = [2.0**-exponent for exponent in range(8)]


def spread(t: Tensor) -> Tensor:
    return ((1 - t) ** 2 + (t * DEVIATION) ** 2).sqrt()


def flow_map(x: Tensor, t: Tensor, d: Tensor, mean: Tensor) -> Tensor:
    return (t + d) * mean + spread(t + d) / spread(t) * (x - t * mean)


def exact_velocity(x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
    """Return the derivative of the flow map, which is also ``E[data − noise | x_t = x]``."""
    return mean + (t * DEVIATION**2 - (1 - t)) / spread(t) ** 2 * (x - t * mean)


def exact_mean_velocity(x: Tensor, t: Tensor, d: Tensor, mean: Tensor) -> Tensor:
    return (flow_map(x, t, d, mean) - x) / d


class ExactMeanVelocity(ExactNetwork):
    """Exact network for data with mean ``z``. At ``d = 0`` it returns the velocity."""

    def forward(self, x: Tensor, z: Tensor, time: Tensor, size: Tensor) -> Tensor:
        t, d = time.unsqueeze(-1) / 1000, size.unsqueeze(-1) / 1000
        return torch.where(d == 0, exact_velocity(x, t, z), exact_mean_velocity(x, t, d.clamp(min=1e-9), z))


def exact_head(samples: int = 4) -> ShortcutHead:
    head = ShortcutHead(ShortcutConfig(8, 1, samples), 1, 1)
    head.network = ExactMeanVelocity()  # type: ignore[assignment]
    return head


def random_head(channels: int = 3, condition: int = 5) -> ShortcutHead:
    torch.manual_seed(0)
    head = ShortcutHead(ShortcutConfig(16, 1), channels, condition)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head


def points(t: Tensor, mean: Tensor, seed: int) -> Tensor:
    """Draw ``x_t``."""
    return t * mean + spread(t) * torch.randn(
        mean.shape, generator=torch.Generator().manual_seed(seed), dtype=mean.dtype
    )


# --- The closed forms themselves, and the target ---------------------------------------------------


def test_closed_forms_of_velocity_and_map_agree() -> None:
    """Mean velocities of small steps become the velocity, and maps compose. This validates the reference."""
    mean = torch.full((100, 1), 0.7, dtype=torch.float64)
    for start in (0.0, 0.3, 0.9):
        t = torch.tensor(start, dtype=torch.float64)
        x, d = points(t, mean, 0), torch.tensor(1e-6, dtype=torch.float64)
        torch.testing.assert_close(
            exact_mean_velocity(x, t, d, mean), exact_velocity(x, t, mean), rtol=1e-4, atol=1e-4
        )
    zero, half = torch.tensor(0.0), torch.tensor(0.5)
    x = points(zero, mean, 1)
    torch.testing.assert_close(
        flow_map(flow_map(x, zero, half, mean), half, half, mean), mean + DEVIATION * x
    )


@pytest.mark.parametrize("whole", SIZES[:-1])
def test_target_of_exact_mean_velocities_is_exact(whole: float) -> None:
    count = int(1 / whole)
    t = torch.arange(count, dtype=torch.float64).repeat(64) * whole
    mean = torch.linspace(-1, 1, len(t), dtype=torch.float64).unsqueeze(-1)
    x = points(t.unsqueeze(-1), mean, 0)
    target = consistency_target(
        lambda a, time, size: exact_mean_velocity(a, time.unsqueeze(-1), size.unsqueeze(-1), mean),
        x,
        t,
        torch.full_like(t, whole),
    )
    expected = exact_mean_velocity(x, t.unsqueeze(-1), torch.tensor(whole, dtype=torch.float64), mean)
    torch.testing.assert_close(target, expected.clamp(-TARGET_LIMIT, TARGET_LIMIT), rtol=1e-9, atol=1e-9)
    assert expected.abs().max() < TARGET_LIMIT, "the clip should not act here"


def test_target_is_clipped() -> None:
    x, t, whole = torch.zeros(2, 1), torch.zeros(2), torch.ones(2)
    target = consistency_target(lambda *_: torch.tensor([[9.0], [-9.0]]), x, t, whole)
    assert torch.equal(target, torch.tensor([[4.0], [-4.0]]))


def test_drawn_steps_are_uniform_multiples_of_their_size() -> None:
    whole, start = draw_steps(70_000, torch.Generator().manual_seed(0))
    sizes, counts = whole.unique(return_counts=True)
    assert sizes.flip(0).tolist() == SIZES[:-1]  # 1 … 1/64, so that half of it is 1 … 1/128
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 0.01
    multiples = start / whole
    assert torch.equal(multiples, multiples.round())
    assert start.min() == 0
    assert (start + whole).max() == 1
    for size in (1 / 8, 1 / 64):
        places, counts = start[whole == size].unique(return_counts=True)
        assert len(places) == 1 / size
        assert scipy.stats.chisquare(counts.numpy()).pvalue > 0.01


# --- Steps of sampling ---------------------------------------------------------------------------


def test_step_sizes_sum_to_one_and_divide_their_starts() -> None:
    for steps in range(1, FINEST + 1):
        sizes = step_sizes(steps)
        assert len(sizes) == steps
        assert sum(sizes) == 1  # exact: they are powers of two
        start = 0.0
        for size in sizes:
            assert size in SIZES
            assert start % size == 0, (steps, start, size)
            start += size
    assert step_sizes(4) == [0.25] * 4
    assert step_sizes(3) == [0.5, 0.25, 0.25]


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 13, 127, 128])
def test_exact_mean_velocity_gives_the_data_in_any_number_of_steps(steps: int) -> None:
    """Only the finest size is an approximation, because it is the velocity itself."""
    noise = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    z = torch.linspace(-1, 1, 500).unsqueeze(-1)
    drawn = draw(exact_head(), z, lambda: noise, steps=steps)
    tolerance = 1e-5 if 1 / FINEST not in step_sizes(steps) else 0.03
    torch.testing.assert_close(drawn, z + DEVIATION * noise, rtol=0, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 6])
def test_guidance_moves_the_mean_and_temperature_the_std(steps: int) -> None:
    noise = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    z, z_uncond = torch.full((500, 1), 0.7), torch.full((500, 1), -0.2)
    drawn = draw(exact_head(), z, lambda: noise, steps=steps, temperature=0.8, uncond=z_uncond, scale=2.5)
    torch.testing.assert_close(drawn, -0.2 + 2.5 * 0.9 + DEVIATION * 0.8 * noise, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 3, 8, 128])
def test_sampling_steps_with_the_mean_velocity(steps: int) -> None:
    """The network embeds times and conditions before the first step."""
    head = random_head().double()
    z, z_uncond, noise = torch.randn(4, 5).double(), torch.randn(4, 5).double(), torch.randn(4, 3).double()
    x, t = noise, torch.tensor(0.0).double()
    for d in torch.tensor(step_sizes(steps)).double():
        cond, uncond = (head.mean_velocity(x, t, d, c) for c in (z, z_uncond))
        x, t = x + d * (uncond + 2.5 * (cond - uncond)), t + d
    drawn = draw(head, z, lambda: noise, steps=steps, uncond=z_uncond, scale=2.5)
    torch.testing.assert_close(drawn, x, rtol=0, atol=1e-9)


@torch.no_grad()
def test_network_is_called_once_per_step() -> None:
    head = random_head()
    rows: list[int] = []
    head.network.output.register_forward_hook(
        lambda module, arguments, output: rows.append(output.shape[:-1].numel())
    )
    for steps in (1, 3, 8, 128):
        rows.clear()
        draw(head, torch.zeros(4, 5), lambda: torch.randn(4, 3), steps=steps)
        assert rows == [4] * steps
    rows.clear()
    draw(head, torch.zeros(4, 5), lambda: torch.randn(4, 3), steps=2, uncond=torch.ones(4, 5), scale=2.0)
    assert rows == [8, 8]


@torch.no_grad()
def test_mean_velocity_of_the_finest_size_is_the_velocity() -> None:
    head = random_head()
    x, z, t = torch.randn(6, 3), torch.randn(6, 5), torch.rand(6)
    finest, zero, coarser = (head.mean_velocity(x, t, torch.tensor(d), z) for d in (1 / 128, 0.0, 1 / 64))
    assert torch.equal(finest, zero)
    assert not torch.equal(coarser, zero)


# --- The loss --------------------------------------------------------------------------------------


@torch.no_grad()
def test_exact_mean_velocity_has_the_irreducible_loss() -> None:
    """It has no consistency loss, and a flow-matching loss of ``E[Var(data − noise | x_t)]``."""
    generator, head = torch.Generator().manual_seed(0), exact_head()
    z = 2 * torch.rand(20_000, 1, generator=generator) - 1
    x = z + DEVIATION * torch.randn(20_000, 1, generator=generator)
    loss = head.loss(x, Condition(z), generator, head)
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    variance = DEVIATION**2 + 1 - (t * DEVIATION**2 - (1 - t)) ** 2 / spread(t) ** 2
    assert float(loss.terms["flow"].mean()) == pytest.approx(float(torch.trapezoid(variance, t)), rel=0.02)
    assert float(loss.terms["consistency"].mean()) < 1e-4  # its finest half steps are velocities
    assert len(loss.terms["consistency"]) == 80_000 // CONSISTENCY_EVERY
    assert len(loss.terms["flow"]) == 80_000 - 80_000 // CONSISTENCY_EVERY
    starts = loss.t * FINEST / 2
    assert int((starts == starts.round()).sum()) >= 10_000, "whole steps start at multiples of their size"
    assert loss.value.shape == (20_000,)
    torch.testing.assert_close(loss.samples.view(4, -1).mean(dim=0), loss.value)


def test_every_position_learns_flow_matching() -> None:
    """In sequences of a multiple of eight tokens, consistency must not always fall on the same positions."""
    generator, head, chosen = torch.Generator().manual_seed(0), random_head(), torch.zeros(64)
    for _ in range(400):
        starts = head.loss(torch.zeros(16, 3), Condition(torch.zeros(16, 5)), generator, head).t * FINEST / 2
        whole = starts == starts.round()  # only these start at multiples of a step
        assert int(whole.sum()) >= 8
        chosen += whole
    assert chosen.min() > 25
    assert chosen.max() < 80


@pytest.mark.parametrize("tokens", [1, 3, 7, 8])
def test_few_tokens_have_a_consistency_loss(tokens: int) -> None:
    head = random_head()
    loss = head.loss(
        torch.randn(tokens, 3), Condition(torch.randn(tokens, 5)), torch.Generator().manual_seed(0), head
    )
    assert loss.value.shape == (tokens,)
    assert len(loss.terms["consistency"]) == -(-4 * tokens // CONSISTENCY_EVERY)
    assert loss.samples.isfinite().all()


def gradients(head: ShortcutHead, teacher: ShortcutHead, z: Tensor) -> list[Tensor]:
    head.zero_grad()
    loss = head.loss(
        torch.randn(16, 3, generator=torch.Generator().manual_seed(1)),
        Condition(z),
        torch.Generator().manual_seed(2),
        teacher,
    )
    loss.value.mean().backward()
    return [parameter.grad.clone() for parameter in head.parameters() if parameter.grad is not None]


def test_targets_have_no_gradient() -> None:
    """The head as its own teacher gives the same gradients as a frozen copy."""
    head = random_head()
    frozen = copy.deepcopy(head).requires_grad_(False)
    z = [torch.randn(16, 5, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2)]
    for own, other in zip(gradients(head, head, z[0]), gradients(head, frozen, z[1]), strict=True):
        torch.testing.assert_close(own, other)
    assert z[0].grad is not None
    assert z[1].grad is not None
    torch.testing.assert_close(z[0].grad, z[1].grad)


def test_teacher_changes_only_the_consistency_loss() -> None:
    head, other = random_head(), random_head()
    with torch.no_grad():
        other.network.output.linear.bias.add_(1)
    x, z = torch.randn(16, 3), torch.randn(16, 5)
    own, taught = (
        head.loss(x, Condition(z), torch.Generator().manual_seed(0), teacher).terms
        for teacher in (head, other)
    )
    assert torch.equal(own["flow"], taught["flow"])
    assert not torch.isclose(own["consistency"], taught["consistency"]).any()


# --- A trained head ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> ShortcutHead:
    """Train a tiny head with its own loss and an averaged teacher, on data with mean ``z``."""
    torch.manual_seed(0)
    head = ShortcutHead(ShortcutConfig(64, 2), 1, 1)
    ema = Ema(head, 0.99)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / 1000)
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(1000):
        z = 2 * torch.rand(128, 1, generator=generator) - 1
        x = z + DEVIATION * torch.randn(128, 1, generator=generator)
        optimizer.zero_grad()
        head.loss(x, Condition(z), generator, ema.module).value.mean().backward()
        optimizer.step()
        schedule.step()
        ema.update(head, step)
    return ema.module


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


MEANS = torch.linspace(-1, 1, 4000).unsqueeze(-1)


@torch.no_grad()
def errors(
    head: ShortcutHead, d: float, exact: Callable[[Tensor, Tensor], Tensor], starts: list[float]
) -> float:
    """Return the RMS error of the head's mean velocities over the marginals at ``starts``."""
    found = []
    for start in starts:
        t = torch.tensor(start)
        x = points(t, MEANS, seed=round(1000 * start))
        found.append(head.mean_velocity(x, t, torch.tensor(d), MEANS) - exact(x, t))
    return rms(torch.stack(found))


def test_trained_velocity_approximates_the_closed_form(trained: ShortcutHead) -> None:
    assert (
        errors(trained, 0.0, lambda x, t: exact_velocity(x, t, MEANS), [0.0, 0.2, 0.4, 0.6, 0.8, 0.95]) < 0.12
    )


@pytest.mark.parametrize("d", [1.0, 0.5, 0.25, 0.125])
def test_trained_mean_velocity_approximates_the_closed_form(trained: ShortcutHead, d: float) -> None:
    starts = [step * d for step in range(int(1 / d))]
    assert errors(trained, d, lambda x, t: exact_mean_velocity(x, t, torch.tensor(d), MEANS), starts) < 0.12
    if d >= 0.25:  # the velocity at the start of so large a step is something else
        assert errors(trained, d, lambda x, t: exact_velocity(x, t, MEANS), starts) > 0.18


@torch.no_grad()
def test_trained_head_draws_the_data_in_one_step(trained: ShortcutHead) -> None:
    """Two half steps give the same tokens."""
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(9))
    one, two, many = (draw(trained, MEANS, lambda: noise, steps=steps) for steps in (1, 2, 128))
    for drawn in (one, two, many):
        assert float((drawn - MEANS).mean()) == pytest.approx(0, abs=0.05)
        assert float((drawn - MEANS).std()) == pytest.approx(DEVIATION, abs=0.06)
    assert rms(one - two) < 0.06
    assert rms(one - (MEANS + DEVIATION * noise)) < 0.1
    # Against one Euler step of the velocity: every sample at its mean.
    euler = noise + trained.mean_velocity(noise, torch.tensor(0.0), torch.tensor(0.0), MEANS)
    assert float((euler - MEANS).std()) < 0.15
