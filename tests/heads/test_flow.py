"""Solvers on closed-form fields, and the flow head with the exact velocity of Gaussian data."""

import math
from collections.abc import Callable

import pytest
import torch
from drawing import draw
from exact import ExactNetwork
from torch import Tensor

from far.heads import Condition, FlowConfig
from far.heads.flow import FlowHead, Velocity, draw_noise_and_time, euler, heun, interpolate

DEVIATION = 0.5


def exact_velocity(x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
    """Return ``E[data − noise | x_t = x]`` for data ``N(mean, DEVIATION²)``, by regression of Gaussians."""
    variance = (1 - t) ** 2 + (t * DEVIATION) ** 2
    covariance = t * DEVIATION**2 - (1 - t)
    return mean + covariance / variance * (x - t * mean)


class ExactVelocity(ExactNetwork):
    """Exact network for data with mean ``z``."""

    def forward(self, x: Tensor, z: Tensor, time: Tensor) -> Tensor:
        return exact_velocity(x, time.unsqueeze(-1) / 1000, z)


def exact_head(solver: str = "euler", samples: int = 4) -> FlowHead:
    head = FlowHead(FlowConfig(8, 1, samples, solver=solver), 1, 1)  # type: ignore[arg-type]
    head.network = ExactVelocity()  # type: ignore[assignment]
    return head


def error(
    solve: Callable[[Velocity, Tensor, int], Tensor], steps: int, velocity: Velocity, start: float, end: float
) -> float:
    return abs(float(solve(velocity, torch.tensor([start], dtype=torch.float64), steps)) - end)


@pytest.mark.parametrize(("solve", "order"), [(euler, 1), (heun, 2)])
@pytest.mark.parametrize(
    ("velocity", "start", "end"),
    [(lambda x, t: 3 * t**2 + 0 * x, 0.0, 1.0), (lambda x, t: -x, 1.0, math.exp(-1))],
    ids=["3t²", "−x"],
)
def test_solvers_converge_with_their_order(
    solve: Callable, order: int, velocity: Velocity, start: float, end: float
) -> None:
    coarse, fine = (error(solve, steps, velocity, start, end) for steps in (64, 128))
    assert 0 < fine < 0.05
    assert coarse / fine == pytest.approx(2**order, rel=0.05)


def test_heun_is_exact_for_a_field_linear_in_time() -> None:
    assert error(heun, 3, lambda x, t: 2 * t + 0 * x, 0.0, 1.0) < 1e-12


def test_solvers_do_not_change_their_input() -> None:
    x = torch.ones(3)
    for solve in (euler, heun):
        solve(lambda x, t: -x, x, 4)
        assert torch.equal(x, torch.ones(3))


def test_guidance_extrapolates_from_the_unconditional_prediction() -> None:
    z, uncond = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 5.0])
    seen = []

    def network(condition: Tensor) -> Tensor:
        seen.append(condition)
        return 10 * condition

    # uncond + 3 · (cond − uncond)
    assert torch.equal(Condition(z, uncond, 3.0).guide(network), torch.tensor([30.0, -40.0]))
    assert torch.equal(Condition(z, uncond, 0.0).guide(network), 10 * uncond)
    assert [tuple(condition.shape) for condition in seen] == [(2, 2), (2, 2)]
    for condition in (Condition(z, uncond, 1.0), Condition(z, None, 3.0)):
        seen.clear()
        assert torch.equal(condition.guide(network), 10 * z)
        assert len(seen) == 1
        assert seen[0] is z


def test_interpolate_runs_from_noise_to_data() -> None:
    noise, x = torch.zeros(2, 3), torch.ones(2, 3)
    assert torch.equal(
        interpolate(noise, x, torch.tensor([0.0, 0.25])), torch.tensor([[0.0] * 3, [0.25] * 3])
    )


def test_noise_is_normal_and_times_are_uniform() -> None:
    noise, t = draw_noise_and_time(torch.zeros(2000, 2), 5, torch.Generator().manual_seed(0))
    assert noise.shape == (5, 2000, 2)
    assert t.shape == (5, 2000)
    assert abs(float(noise.mean())) < 0.03
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    assert 0 <= float(t.min()) < 0.001
    assert 0.999 < float(t.max()) < 1
    assert float(t.mean()) == pytest.approx(0.5, abs=0.01)


@torch.no_grad()
def test_exact_velocity_has_the_irreducible_loss() -> None:
    """``E[Var(data − noise | x_t)]``: no other velocity has a lower loss."""
    generator = torch.Generator().manual_seed(0)
    head = exact_head()
    z = 2 * torch.rand(20_000, 1, generator=generator) - 1
    x = z + DEVIATION * torch.randn(20_000, 1, generator=generator)
    loss = head.loss(x, Condition(z), generator, head)
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    variance = (1 - t) ** 2 + (t * DEVIATION) ** 2
    expected = DEVIATION**2 + 1 - (t * DEVIATION**2 - (1 - t)) ** 2 / variance
    assert float(loss.value.mean()) == pytest.approx(float(torch.trapezoid(expected, t)), rel=0.02)
    assert loss.value.shape == (20_000,)
    assert loss.samples.shape == loss.t.shape == loss.terms["flow"].shape == (80_000,)
    torch.testing.assert_close(loss.samples.view(4, -1).mean(dim=0), loss.value)
    late = loss.t > 0.9
    assert float(loss.samples[late].mean()) == pytest.approx(float(expected[t > 0.9].mean()), rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize(("solver", "steps"), [("euler", 400), ("heun", 40)])
@pytest.mark.parametrize(("guidance", "temperature"), [(1.0, 1.0), (2.5, 0.8)])
def test_exact_velocity_gives_the_data(solver: str, steps: int, guidance: float, temperature: float) -> None:
    """The flow scales the noise. Guidance moves the mean and temperature the standard deviation."""
    noise = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    z, z_uncond = torch.full((500, 1), 0.7), torch.full((500, 1), -0.2)
    mean = -0.2 + guidance * 0.9
    drawn = draw(
        exact_head(solver),
        z,
        lambda: noise,
        steps=steps,
        temperature=temperature,
        uncond=z_uncond,
        scale=guidance,
    )
    torch.testing.assert_close(drawn, mean + DEVIATION * temperature * noise, rtol=0, atol=0.01)


@torch.no_grad()
@pytest.mark.parametrize(("solver", "calls_a_step"), [("euler", 1), ("heun", 2)])
def test_network_is_called_once_per_evaluation(solver: str, calls_a_step: int) -> None:
    head = FlowHead(FlowConfig(8, 1, 4, solver=solver), 2, 3)  # type: ignore[arg-type]
    calls = []
    head.network.output.register_forward_hook(lambda *arguments: calls.append(1))
    for steps in (1, 3, 8):
        calls.clear()
        assert draw(head, torch.zeros(5, 3), lambda: torch.randn(5, 2), steps=steps).shape == (5, 2)
        assert len(calls) == steps * calls_a_step
