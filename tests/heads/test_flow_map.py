"""Flow-map head against maps that are known in closed form, with exact and with trained networks.

The data are Gaussian, where the flow preserves a point's distance from the mean in standard deviations, or a
mixture of two Gaussians on the line, where it preserves the order of points, so the map connects equal
quantiles.
"""

import copy
import math
from typing import Any

import pytest
import scipy.special
import scipy.stats
import torch
from drawing import draw
from exact import ExactNetwork
from torch import Tensor, nn

from far.errors import InputError
from far.heads import Condition, FlowMapConfig, Head
from far.heads.flow_map import (
    TIME_UNIT,
    FlowMapHead,
    GuidedField,
    draw_noise_and_times,
    draw_scales,
    lagrangian_residual,
    logistic_normal,
    mean_flow_residual,
    time_weights,
)
from far.training.ema import Ema

OBJECTIVES = ["lagrangian", "mean_flow"]
DEVIATION = 0.5
WEIGHTS, CENTERS, DEVIATIONS = (
    torch.tensor([0.3, 0.7]).double(),
    torch.tensor([-1.0, 1.0]).double(),
    torch.tensor([0.3, 0.5]).double(),
)
UNCONDITIONAL = -0.3  # the mean of the data without a condition
# Channels of the tokens of trained heads.
CHANNELS = 8


class Gaussian:
    """Data ``N(mean, DEVIATION²)``; times are ``[…, 1]``."""

    @staticmethod
    def spread(t: Tensor) -> Tensor:
        return ((1 - t) ** 2 + (t * DEVIATION) ** 2).sqrt()

    def flow_map(self, x: Tensor, s: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        return t * mean + self.spread(t) / self.spread(s) * (x - s * mean)

    def velocity(self, x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        return mean + (t * DEVIATION**2 - (1 - t)) / self.spread(t) ** 2 * (x - t * mean)

    def points(self, noise: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        """Draws of ``x_t``."""
        return t * mean + self.spread(t) * noise


class Mixture:
    """A mixture of two Gaussians, moved by ``mean`` at the time of the data."""

    @staticmethod
    def components(x: Tensor, t: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return each component's center, std, and distance to ``x`` in stds at time ``t``."""
        centers = mean + CENTERS
        spread = ((1 - t) ** 2 + (t * DEVIATIONS) ** 2).sqrt()
        return centers, spread, (x - t * centers) / spread

    def below(self, x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        """Return the fraction of points below ``x`` at time ``t``."""
        return (WEIGHTS * torch.special.ndtr(self.components(x, t, mean)[2])).sum(dim=-1, keepdim=True)

    def density(self, x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        _, spread, off = self.components(x, t, mean)
        return (WEIGHTS * (-off.square() / 2).exp() / spread).sum(dim=-1, keepdim=True) / math.sqrt(
            2 * math.pi
        )

    def velocity(self, x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        centers, spread, off = self.components(x, t, mean)
        each = centers + (t * DEVIATIONS**2 - (1 - t)) / spread * off
        posterior = torch.softmax(WEIGHTS.log() - spread.log() - off.square() / 2, dim=-1)
        return (posterior * each).sum(dim=-1, keepdim=True)

    def flow_map(self, x: Tensor, s: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        share = self.below(x, s, mean)
        low, high = torch.full_like(share, -20.0), torch.full_like(share, 20.0)
        for _ in range(60):
            middle = (low + high) / 2
            less = self.below(middle, t, mean) < share
            low, high = torch.where(less, middle, low), torch.where(less, high, middle)
        found = (low + high) / 2
        # Bisection has no derivative. A Newton step does not move the point and has the map's derivative.
        return found - (self.below(found, t, mean) - share) / self.density(found, t, mean)

    def points(self, noise: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        return self.flow_map(noise, torch.zeros_like(t), t, mean)


DATA = {"gaussian": Gaussian(), "mixture": Mixture()}


class ExactMap(ExactNetwork):
    """Exact network for data with mean ``z``. At length 0 it returns the velocity.

    ``wrong`` multiplies the map's mean velocities, and ``euler`` replaces them by the velocity.
    """

    dtype = torch.float64

    def __init__(self, data: Gaussian | Mixture, wrong: float = 1.0, euler: bool = False) -> None:
        super().__init__()
        self.data, self.wrong, self.euler = data, wrong, euler

    def forward(self, x: Tensor, z: Tensor, start: Tensor, length: Tensor) -> Tensor:
        s, length = start.unsqueeze(-1) / TIME_UNIT, length.unsqueeze(-1) / TIME_UNIT
        velocity = self.data.velocity(x, s, z)
        if self.euler:
            return velocity
        far = length.where(length > 1e-12, 0.5 * torch.ones_like(length))
        return torch.where(
            length > 1e-12, self.wrong * (self.data.flow_map(x, s, s + far, z) - x) / far, velocity
        )


class ExactGuidedMap(ExactMap):
    """Exact network for Gaussian data of mean ``z``, or UNCONDITIONAL without a class."""

    def embed_condition(self, z: Tensor) -> Tensor:
        return torch.cat([z, torch.zeros_like(z)], dim=-1)

    def forward(self, x: Tensor, z: Tensor, start: Tensor, length: Tensor) -> Tensor:
        mean, more = z.split(1, dim=-1)
        return super().forward(x, mean + more * (mean - UNCONDITIONAL), start, length)


class ExactScale(nn.Module):
    """Adds the scale less 1 to the embedding of :class:`ExactGuidedMap`."""

    def forward(self, more: Tensor, dtype: torch.dtype) -> Tensor:
        more = more.unsqueeze(-1) / TIME_UNIT
        return torch.cat([torch.zeros_like(more), more], dim=-1).to(dtype)


def exact_head(data: str, objective: str = "lagrangian", samples: int = 4, **options: float) -> FlowMapHead:
    head = FlowMapHead(FlowMapConfig(8, 1, samples, objective=objective), 1, 1)  # type: ignore[arg-type]
    head.network = ExactMap(DATA[data], **options)  # type: ignore[assignment, arg-type]
    return head


def exact_guided_head(objective: str = "lagrangian", max_guidance: float = 4.0) -> FlowMapHead:
    config = FlowMapConfig(8, 1, objective=objective, max_guidance=max_guidance)  # type: ignore[arg-type]
    head = FlowMapHead(config, 1, 1)
    head.network = ExactGuidedMap(DATA["gaussian"])  # type: ignore[assignment]
    head.guidance_embedding = ExactScale()  # type: ignore[assignment]
    return head


def random_head(
    objective: str = "lagrangian", samples: int = 4, max_guidance: float | None = None, flow_steps: int = 0
) -> FlowMapHead:
    torch.manual_seed(0)
    config = FlowMapConfig(
        16, 1, samples, objective=objective, flow_steps=flow_steps, max_guidance=max_guidance
    )  # type: ignore[arg-type]
    head = FlowMapHead(config, 3, 5)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def triples(data: Gaussian | Mixture, count: int = 400) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return points of the flow ``[1, n, 1]``, times ``s < t [1, n]``, and means ``[n, 1]``."""
    mean = torch.linspace(-1, 1, count, dtype=torch.float64).unsqueeze(-1)
    s, t = torch.rand(2, 1, count, generator=generator(1), dtype=torch.float64).sort(dim=0).values
    return data.points(normal(1, count, 1), s.unsqueeze(-1), mean), s, t, mean


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


# --- The closed forms themselves


@pytest.mark.parametrize("name", DATA)
def test_integrated_velocity_gives_the_closed_form_map(name: str) -> None:
    """The integration takes fine Runge-Kutta steps. It validates the reference of this file."""
    data = DATA[name]
    x, s, t, mean = triples(data)
    x, s, t = x[0], s[0].unsqueeze(-1), t[0].unsqueeze(-1)
    expected, steps = data.flow_map(x, s, t, mean), 200
    h = (t - s) / steps
    for step in range(steps):
        now = s + step * h
        a = data.velocity(x, now, mean)
        b = data.velocity(x + h / 2 * a, now + h / 2, mean)
        c = data.velocity(x + h / 2 * b, now + h / 2, mean)
        x = x + h / 6 * (a + 2 * b + 2 * c + data.velocity(x + h * c, now + h, mean))
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-7)


def test_mixture_flows_to_its_data() -> None:
    noise, mean = normal(20_000, 1), torch.full((20_000, 1), 0.5).double()
    drawn = DATA["mixture"].flow_map(noise, torch.zeros_like(noise), torch.ones_like(noise), mean).squeeze(-1)

    def below(x: Tensor) -> Tensor:
        return sum(
            w * scipy.stats.norm.cdf(x, 0.5 + c, d)
            for w, c, d in zip(WEIGHTS.tolist(), CENTERS.tolist(), DEVIATIONS.tolist())
        )

    assert scipy.stats.kstest(drawn.numpy(), below).pvalue > 0.01


# --- Sampling


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize("name", DATA)
def test_sampling_with_the_exact_map_is_exact(name: str, steps: int) -> None:
    noise, z = normal(500, 1), torch.linspace(-1, 1, 500, dtype=torch.float64).unsqueeze(-1)
    expected = DATA[name].flow_map(0.8 * noise, torch.zeros_like(noise), torch.ones_like(noise), z)
    drawn = draw(exact_head(name), z, lambda: noise, steps=steps, temperature=0.8)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_learned_guidance_equals_guidance_by_two_passes(steps: int) -> None:
    """Between Gaussians of equal std, guidance moves only the mean, here by 0.9 · scale."""
    noise, z = normal(200, 1), torch.full((200, 1), 0.6).double()
    z_uncond = torch.full_like(z, UNCONDITIONAL)
    for scale in (1.0, 2.5):
        expected = UNCONDITIONAL + scale * 0.9 + DEVIATION * noise
        one = draw(exact_guided_head(), z, lambda: noise, steps=steps, scale=scale)
        two = draw(exact_guided_head(), z, lambda: noise, steps=steps, uncond=z_uncond, scale=scale)
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-6)
        # The scale must not count twice if both halves are given.
        torch.testing.assert_close(two, expected, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("max_guidance", [None, 3.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_sampling_takes_the_steps_of_the_mean_velocity(steps: int, max_guidance: float | None) -> None:
    """The network embeds times and conditions before the first step."""
    head = random_head(max_guidance=max_guidance).double()
    z, z_uncond, noise = normal(4, 5), normal(4, 5, seed=1), normal(4, 3, seed=2)
    two = one = noise
    for step in range(steps):
        s, t = torch.tensor(step / steps).double(), torch.tensor((step + 1) / steps).double()
        cond, uncond = (head.mean_velocity(two, s, t, c) for c in (z, z_uncond))
        two = two + (uncond + 2.5 * (cond - uncond)) / steps
        one = one + head.mean_velocity(one, s, t, z, 2.5) / steps
    for scale in (2.5, torch.full((4, 1), 2.5).double()):
        found = draw(head, z, lambda: noise, steps=steps, scale=scale)
        torch.testing.assert_close(found, one, rtol=0, atol=1e-6)
    drawn = draw(head, z, lambda: noise, steps=steps, uncond=z_uncond, scale=2.5)
    torch.testing.assert_close(drawn, two, rtol=0, atol=1e-6)
    same = torch.equal(head.mean_velocity(noise, s, t, z, 2.5), head.mean_velocity(noise, s, t, z))
    assert same == (max_guidance is None), "the scale counts only if it is learned"


def test_velocity_is_the_mean_velocity_on_the_diagonal() -> None:
    head, (x, z, t) = random_head(max_guidance=3.0), (torch.randn(6, 3), torch.randn(6, 5), torch.rand(6))
    torch.testing.assert_close(head.velocity(x, t, Condition(z)), head.mean_velocity(x, t, t, z, 1.0))
    assert (head.velocity(x, t, Condition(z)) - head.mean_velocity(x, t, t + 0.1, z)).abs().max() > 1e-3
    uncond = head.velocity(x, t, Condition(-z))
    torch.testing.assert_close(
        head.velocity(x, t, Condition(z, -z, 2.5)),
        uncond + 2.5 * (head.velocity(x, t, Condition(z)) - uncond),
    )


# --- Residuals


def residual_of(
    head: FlowMapHead, objective: str, field: GuidedField, velocity: Tensor, *points: Tensor
) -> Tensor:
    """Return the residual of an objective at a point, a start and an end, for a conditional velocity."""

    def mean_velocity(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return head.mean_velocity(x, s, t, field.z, field.scale)

    if objective == "mean_flow":
        return mean_flow_residual(mean_velocity, velocity, *points)
    return lagrangian_residual(mean_velocity, field.velocity, *points)


def residual(head: FlowMapHead, data: Gaussian | Mixture, objective: str) -> Tensor:
    """Return the residual for the marginal velocity, of which the flow's targets are noisy draws."""
    point, s, t, mean = triples(data)
    field = GuidedField(head, mean, None, torch.ones_like(s))
    return residual_of(head, objective, field, data.velocity(point, s.unsqueeze(-1), mean), point, s, t)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", DATA)
def test_residual_of_the_exact_map_is_zero(name: str, objective: str) -> None:
    found = residual(exact_head(name), DATA[name], objective)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-7)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("wrong", [{"wrong": 1.05}, {"euler": True}])
def test_wrong_map_has_a_residual(name: str, objective: str, wrong: dict) -> None:
    assert rms(residual(exact_head(name, **wrong), DATA[name], objective)) > 0.03


def irreducible(s: Tensor, t: Tensor) -> Tensor:
    """Return the loss that no network avoids for Gaussian data.

    On the diagonal it is ``Var(data − noise | x_s)``. MeanFlow's target has the same noise, stretched by the
    map.
    """
    data = DATA["gaussian"]
    assert isinstance(data, Gaussian)
    variance = DEVIATION**2 + 1 - (s * DEVIATION**2 - (1 - s)) ** 2 / data.spread(s) ** 2
    return variance * (data.spread(t) / data.spread(s)) ** 2


@torch.no_grad()
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("learns_guidance", [False, True])
def test_exact_map_has_the_irreducible_loss(objective: str, learns_guidance: bool) -> None:
    """This holds with guidance too, since the exact network contains the guided map."""
    head = exact_guided_head(objective) if learns_guidance else exact_head("gaussian", objective)
    count = 20_000
    z = 2 * torch.rand(count, 1, generator=generator(3), dtype=torch.float64) - 1
    x = z + DEVIATION * normal(count, 1, seed=4)
    z_uncond = torch.full((count // 2, 1), UNCONDITIONAL).double() if learns_guidance else None
    loss = head.loss(x, Condition(z, z_uncond), generator(), head)
    _, s, t = draw_noise_and_times(x, 4, 1, generator())
    torch.testing.assert_close(loss.t, s.flatten())
    flow, jumps = loss.terms["flow"], loss.terms[objective]
    assert flow.shape == (3 * count,)
    assert jumps.shape == (count,)
    torch.testing.assert_close(loss.samples, torch.cat([jumps, flow]))
    for half in (slice(0, count // 2), slice(count // 2, count)):  # with guidance and without
        expected = float(irreducible(s[1:, half], s[1:, half]).mean())
        assert float(flow.view(3, count)[:, half].mean()) == pytest.approx(expected, rel=0.03)
        if objective == "lagrangian":
            assert float(jumps[half].max()) < 1e-8  # times and scales are of float32
        else:
            assert float(jumps[half].mean()) == pytest.approx(
                float(irreducible(s[0, half], t[0, half]).mean()), rel=0.05
            )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_residuals_agree_with_finite_differences(objective: str) -> None:
    """The network embeds times in float32, so these times are exact in float32."""
    head = random_head(objective, max_guidance=3.0).double()
    grid = torch.randint(8, 248, (2, 1, 30), generator=generator()).double().sort(dim=0).values / 256
    (s, t), h = grid, 2.0**-9
    z, scale = normal(30, 5), 1 + 2 * torch.rand(1, 30, generator=generator(2), dtype=torch.float64)
    point, velocity = normal(1, 30, 3, seed=3), normal(1, 30, 3, seed=4)
    length = (t - s).unsqueeze(-1)
    field = GuidedField(head, z, z[:20].flip(0), scale)
    residual = residual_of(head, objective, field, velocity, point, s, t)
    with torch.no_grad():
        mean = head.mean_velocity(point, s, t, z, scale)
        if objective == "lagrangian":
            after, before = (
                point + (t + e - s).unsqueeze(-1) * head.mean_velocity(point, s, t + e, z, scale)
                for e in (h, -h)
            )
            end = point + length * mean
            guided = head.velocity(end, t, Condition(z))
            uncond = head.velocity(end[:, :20], t[:, :20], Condition(z[:20].flip(0)))
            guided[:, :20] = uncond + scale[:, :20].unsqueeze(-1) * (guided[:, :20] - uncond)
            expected = (after - before) / (2 * h) - guided
        else:
            after, before = (head.mean_velocity(point + e * velocity, s + e, t, z, scale) for e in (h, -h))
            expected = mean - velocity - length * (after - before) / (2 * h)
    torch.testing.assert_close(residual, expected, rtol=0, atol=2e-3)
    assert residual.std() > 0.1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bfloat16_autocast_gives_nearly_the_same_loss_and_gradient(objective: str) -> None:
    """Forward and backward derivatives exist under the autocast of training."""
    head = random_head(objective, max_guidance=3.0)
    x, z, z_uncond = (normal(64, width, seed=width).float() for width in (3, 5, 5))
    losses, gradients = [], []
    for enabled in (False, True):
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = head.loss(x, Condition(z, z_uncond), generator(), head)
        loss.value.mean().backward()
        losses.append(loss)
        gradients.append(
            torch.cat(
                [parameter.grad.flatten() for parameter in head.parameters() if parameter.grad is not None]
            )
        )
    exact, low = losses
    for name in ("flow", objective):
        assert low.terms[name].dtype == torch.float32
        torch.testing.assert_close(low.terms[name].mean(), exact.terms[name].mean(), rtol=0.03, atol=0.0)
    assert rms(gradients[1] - gradients[0]) < 0.1 * rms(gradients[0])


# --- Gradients


def gradients(head: FlowMapHead, teacher: FlowMapHead, z: Tensor) -> list[Tensor]:
    head.zero_grad()
    z_uncond = normal(8, 5, seed=5).float() if head.max_guidance > 1 else None
    loss = head.loss(normal(16, 3, seed=1).float(), Condition(z, z_uncond), generator(2), teacher)
    loss.value.mean().backward()
    return [parameter.grad.clone() for parameter in head.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("max_guidance", [None, 3.0])
def test_targets_of_the_teacher_have_no_gradient(objective: str, max_guidance: float | None) -> None:
    """The head as its own teacher gives the same gradients as a frozen copy."""
    head = random_head(objective, max_guidance=max_guidance)
    frozen = copy.deepcopy(head).requires_grad_(False)
    z = [normal(16, 5).float().requires_grad_() for _ in range(2)]
    own, other = gradients(head, head, z[0]), gradients(head, frozen, z[1])
    assert len(own) == len(list(head.parameters()))
    for one, two in zip(own, other, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, two)
    assert z[0].grad is not None
    assert z[1].grad is not None
    assert (z[0].grad != 0).any(dim=-1).all()
    torch.testing.assert_close(z[0].grad, z[1].grad)
    teacher = copy.deepcopy(head)
    teacher.zero_grad()
    gradients(head, teacher, normal(16, 5).float())
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in teacher.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_jumps_train_the_backbone(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``z`` has a gradient even if that of the flow-matching velocities is removed."""
    head, z = random_head(objective), torch.randn(6, 5, requires_grad=True)
    mean_velocity = head.mean_velocity

    def without_diagonal(x: Tensor, s: Tensor, t: Tensor, *rest: Any, **named: Any) -> Tensor:
        found = mean_velocity(x, s, t, *rest, **named)
        return found.detach() if len(x) == 3 else found  # three of four samples are on the diagonal

    monkeypatch.setattr(head, "mean_velocity", without_diagonal)
    value = head.loss(torch.randn(6, 3), Condition(z), generator(), head).value
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert (gradient != 0).any(dim=-1).all()


def test_gradient_of_mean_flow_is_that_of_its_mean_velocity() -> None:
    head = random_head("mean_flow")
    point, s, t, z = torch.randn(1, 6, 3), torch.full((1, 6), 0.2), torch.full((1, 6), 0.9), torch.randn(6, 5)
    field = GuidedField(head, z, None, torch.ones_like(s))
    found = residual_of(head, "mean_flow", field, torch.randn(1, 6, 3), point, s, t)
    expected = torch.autograd.grad(head.mean_velocity(point, s, t, z).sum(), list(head.parameters()))
    for one, two in zip(torch.autograd.grad(found.sum(), list(head.parameters())), expected, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_teacher_changes_lagrangian_jumps_and_guided_tokens_only(objective: str) -> None:
    """Flow matching and MeanFlow of unguided tokens do not use the teacher."""
    head, other = random_head(objective, max_guidance=3.0), random_head(objective, max_guidance=3.0)
    with torch.no_grad():
        other.network.output.linear.weight.mul_(1.5)
    x, z, z_uncond = torch.randn(16, 3), torch.randn(16, 5), torch.randn(8, 5)
    own, taught = (
        head.loss(x, Condition(z, z_uncond), generator(), teacher).terms for teacher in (head, other)
    )
    guided = torch.arange(16) < 8
    moved = ~torch.isclose(own["flow"].view(3, 16), taught["flow"].view(3, 16))
    assert torch.equal(moved, guided.expand(3, -1))
    assert torch.equal(
        ~torch.isclose(own[objective], taught[objective]), guided | (objective == "lagrangian")
    )


# --- The parts of the loss


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("samples", "off"), [(2, 1), (3, 1), (4, 1), (8, 2), (16, 4)])
def test_a_quarter_of_samples_is_off_the_diagonal_from_flow_steps_on(
    objective: str, samples: int, off: int
) -> None:
    head, x, z = random_head(objective, samples, flow_steps=10), torch.randn(7, 3), torch.randn(7, 5)
    for step, expected in ((0, 0), (9, 0), (10, off), (11, off)):
        loss = head.loss(x, Condition(z), generator(), head, step=step)
        assert loss.value.shape == (7,)
        assert loss.samples.shape == loss.t.shape == (7 * samples,)
        assert not loss.samples.requires_grad
        assert loss.value.requires_grad
        assert len(loss.terms["flow"]) == 7 * (samples - expected)
        assert len(loss.terms.get(objective, [])) == 7 * expected
        assert set(loss.terms) == ({"flow", objective} if expected else {"flow"})


def test_loss_before_flow_steps_is_flow_matching() -> None:
    """With the exact velocity and a wrong map, only the velocity counts, at every time."""
    head = exact_head("gaussian", wrong=3.0)
    head.config = FlowMapConfig(objective="lagrangian", flow_steps=1)
    x, z = normal(100, 1), normal(100, 1, seed=1)
    loss = head.loss(x, Condition(z), generator(), head)
    noise, s, t = draw_noise_and_times(x, 4, 0, generator())
    assert torch.equal(s, t)
    s = s.unsqueeze(-1)
    off = DATA["gaussian"].velocity((1 - s) * noise + s * x, s, z) - (x - noise)
    torch.testing.assert_close(loss.samples.view(4, 100), off.square().squeeze(-1), rtol=1e-5, atol=1e-5)


def test_times_are_the_smaller_of_two_draws_on_the_diagonal_and_both_off_it() -> None:
    noise, s, t = draw_noise_and_times(torch.zeros(5000, 3), 4, 1, generator())
    assert noise.shape == (4, 5000, 3)
    assert s.shape == t.shape == (4, 5000)
    assert torch.equal(s[1:], t[1:])
    assert (s[0] < t[0]).all()
    assert s.min() >= 0
    assert t.max() <= 1

    def below(value: Any) -> Any:  # MeanFlow's logistic normal
        return scipy.stats.norm.cdf(scipy.special.logit(value), 0.4, 1.0)

    for found, expected in (
        (s[0][s[0] > 0], lambda value: 1 - (1 - below(value)) ** 2),
        (t[0][t[0] < 1], lambda value: below(value) ** 2),
        (s[1:].flatten(), lambda value: 1 - (1 - below(value)) ** 2),
    ):
        assert scipy.stats.kstest(found.double().numpy(), expected).pvalue > 0.01


def test_a_quarter_of_jumps_starts_at_noise_and_another_ends_at_data() -> None:
    _, s, t = draw_noise_and_times(torch.zeros(10_000, 1), 4, 1, generator(1))
    start, end = (s[0] == 0).double(), (t[0] == 1).double()
    for found, expected in ((start, 1 / 4), (end, 1 / 4), (start * end, 1 / 16)):
        assert scipy.stats.binomtest(int(found.sum()), 10_000, expected).pvalue > 0.01
    assert (s[1:] > 0).all()
    assert (t[1:] < 1).all()


def test_extreme_times_are_within_zero_and_one() -> None:
    assert ((t := logistic_normal(torch.tensor([0.0, 1.0]))) > 0).all()
    assert (t < 1).all()


# --- Weights


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_is_the_plain_mean_squared_error_without_balance(objective: str) -> None:
    head = random_head(objective)
    loss = head.loss(torch.randn(7, 3), Condition(torch.randn(7, 5)), generator(), head)
    torch.testing.assert_close(loss.value.detach(), loss.samples.view(4, 7).mean(dim=0))


def test_weights_are_the_mean_of_others_by_their_mean_at_like_times() -> None:
    """Times are alike if starts and ends are within the same quarters. A row of loss 1 joins each mean."""
    losses = torch.rand(3, 20, generator=generator(), dtype=torch.float64)
    s, t = torch.rand(2, 3, 20, generator=generator(1)).sort(dim=0).values
    t[0, 0] = 1.0
    for power in (0.0, 0.5, 1.0):
        found = time_weights(losses, s, t, power)
        for row in range(3):
            for token in range(20):
                alike = [
                    float(losses[i, j])
                    for i in range(3)
                    for j in range(20)
                    if (i, j) != (row, token)
                    and min(int(4 * s[i, j]), 3) == min(int(4 * s[row, token]), 3)
                    and min(int(4 * t[i, j]), 3) == min(int(4 * t[row, token]), 3)
                ]
                mean = (sum(alike) + 1) / (len(alike) + 1)
                overall = (float(losses.sum() - losses[row, token]) + 1) / 60
                assert float(found[row, token]) == pytest.approx((overall / mean) ** power, rel=1e-6)


def test_weights_do_not_move_the_optimum() -> None:
    """Nine of ten targets are 1 and the others −5. Their mean minimizes the squared error.

    MeanFlow's weights, which divide each loss by itself, move the optimum to the more frequent target.
    """
    targets = torch.where(torch.rand(2000, 1, 10, generator=generator()) < 0.9, 1.0, -5.0).double()
    best = torch.tensor(0.9 - 0.5, requires_grad=True, dtype=torch.float64)
    losses, times = (best - targets).square(), torch.full((1, 10), 0.5)
    weights = torch.stack([time_weights(rows, times, times, 1.0) for rows in losses])
    (slope,) = torch.autograd.grad((weights * losses).mean(), best, retain_graph=True)
    (biased,) = torch.autograd.grad((losses / losses.detach()).mean(), best)
    spread = (2 * weights * (best - targets)).std() / math.sqrt(targets.numel())
    assert abs(slope) < 4 * spread
    assert abs(biased) > 10 * spread


def test_weights_have_no_gradient() -> None:
    losses, times = torch.rand(2, 5, requires_grad=True), torch.rand(2, 5)
    assert not time_weights(losses, times, times, 1.0).requires_grad


# --- Guidance


def test_scales_are_uniform_for_guided_tokens_and_one_for_others() -> None:
    like = torch.zeros(4, 3000)
    scale = draw_scales(like, 1000, 5.0, generator())
    assert scale.shape == (4, 3000)
    assert torch.equal(scale[:, 1000:], torch.ones(4, 2000))
    assert scipy.stats.kstest(scale[:, :1000].flatten().numpy(), scipy.stats.uniform(1, 4).cdf).pvalue > 0.01
    assert torch.equal(draw_scales(like, 0, 5.0, generator()), torch.ones(4, 3000))


@torch.no_grad()
def test_field_is_guided_token_by_token() -> None:
    head = random_head(max_guidance=3.0)
    x, z, z_uncond, t = torch.randn(2, 6, 3), torch.randn(6, 5), torch.randn(4, 5), torch.rand(2, 6)
    scale = torch.rand(2, 6) * 2 + 1
    field = GuidedField(head, z, z_uncond, scale)
    shift, velocity = field.shift(x, t), field.velocity(x, t)
    for sample in range(2):
        for token in range(6):
            at, time = x[sample, token], t[sample, token]
            cond = expected = head.velocity(at, time, Condition(z[token]))
            if token < 4:
                uncond = head.velocity(at, time, Condition(z_uncond[token]))
                expected = uncond + scale[sample, token] * (cond - uncond)
            torch.testing.assert_close(velocity[sample, token], expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(shift[sample, token], expected - cond, rtol=0, atol=1e-5)
    assert torch.equal(GuidedField(head, z, None, scale).shift(x, t), torch.zeros_like(x))


# --- Trained heads


def train(head: Head, steps: int, batch: int, z_uncond: Tensor | None = None) -> Head:
    """Train a head with its own loss and an averaged teacher, on data with mean ``z``."""
    ema = Ema(head, 0.98)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / steps)
    )
    draws = generator()
    for step in range(steps):
        z = 2 * torch.rand(batch, 1, generator=draws) - 1
        x = z + DEVIATION * torch.randn(batch, CHANNELS, generator=draws)
        optimizer.zero_grad()
        loss = head.loss(x, Condition(z, z_uncond), draws, ema.module, step=step)
        loss.value.mean().backward()
        optimizer.step()
        schedule.step()
        ema.update(head, step)
    return ema.module  # type: ignore[return-value]


MEANS, NOISE = torch.linspace(-1, 1, 1000).unsqueeze(-1), normal(1000, CHANNELS, seed=9).float()


@torch.no_grad()
def one_step_error(head: Head) -> float:
    return rms(draw(head, MEANS, lambda: NOISE, steps=1) - (MEANS + DEVIATION * NOISE))


def test_trained_lagrangian_head_draws_in_one_step_and_flow_matching_alone_does_not() -> None:
    """With the velocity alone, one step ends near the mean of the data, DEVIATION off."""
    torch.manual_seed(0)
    head = train(FlowMapHead(FlowMapConfig(32, 1, objective="lagrangian"), CHANNELS, 1), 300, 64)
    assert one_step_error(head) < 0.15
    torch.manual_seed(0)
    never = train(
        FlowMapHead(FlowMapConfig(32, 1, objective="lagrangian", flow_steps=10**9), CHANNELS, 1),
        100,
        64,
    )
    assert one_step_error(never) > 0.3
    with torch.no_grad():
        euler = NOISE + head.velocity(NOISE, torch.tensor(0.0), Condition(MEANS))  # type: ignore[operator]
        one, two = (draw(head, MEANS, lambda: NOISE, steps=steps) for steps in (1, 2))
    assert rms(euler - (MEANS + DEVIATION * NOISE)) > 0.3
    assert rms(one - two) < 0.1


@torch.no_grad()
def test_trained_mean_flow_head_approximates_the_map() -> None:
    """It approximates steps within the flow and, since jumps reach both ends, the whole flow in one."""
    torch.manual_seed(0)
    with torch.enable_grad():
        head = train(FlowMapHead(FlowMapConfig(32, 1), CHANNELS, 1), 300, 64)
    assert isinstance(head, FlowMapHead)
    data = DATA["gaussian"]
    s, t = torch.tensor(0.3), torch.tensor(0.8)
    x = data.points(NOISE, s, MEANS)
    exact = (data.flow_map(x, s, t, MEANS) - x) / (t - s)
    assert rms(head.mean_velocity(x, s, t, MEANS) - exact) < 0.1
    assert rms(data.velocity(x, s, MEANS) - exact) > 0.3
    assert one_step_error(head) < 0.2
    euler = NOISE + head.velocity(NOISE, torch.tensor(0.0), Condition(MEANS))
    assert rms(euler - (MEANS + DEVIATION * NOISE)) > 0.5


@torch.no_grad()
def test_trained_head_guides_in_one_pass() -> None:
    """One pass agrees with two passes in many steps, and with the closed form."""
    torch.manual_seed(0)
    with torch.enable_grad():
        network = FlowMapHead(FlowMapConfig(32, 1, objective="lagrangian", max_guidance=3.0), CHANNELS, 1)
        head = train(network, 400, 64, torch.full((32, 1), UNCONDITIONAL))
    z_uncond = torch.full_like(MEANS, UNCONDITIONAL)
    plain = draw(head, MEANS, lambda: NOISE, steps=1)
    for scale in (1.0, 2.0, 2.8):
        exact = UNCONDITIONAL + scale * (MEANS - UNCONDITIONAL) + DEVIATION * NOISE
        two = draw(head, MEANS, lambda: NOISE, steps=32, uncond=z_uncond, scale=scale)
        for steps in (1, 2, 8):
            one = draw(head, MEANS, lambda: NOISE, steps=steps, scale=scale)
            assert rms(one - exact) < 0.07 * (1 + scale)
            assert rms(one - two) < 0.07 * (1 + scale)
        assert scale == 1.0 or rms(plain - exact) > 0.5


# --- Bad values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_guidance": 1.0}, "head max_guidance 1.0"),
        ({"max_guidance": 0.0}, "head max_guidance 0.0"),
        ({"max_guidance": math.nan}, "head max_guidance nan"),
        ({"max_guidance": math.inf}, "head max_guidance inf"),
        ({"time_balance": -0.5}, "head time_balance -0.5"),
        ({"time_balance": 1.5}, "head time_balance 1.5"),
        ({"time_balance": math.nan}, "head time_balance nan"),
        ({"flow_steps": -1}, "head flow_steps -1"),
        ({"samples_per_token": 1}, "head samples_per_token 1"),
    ],
)
def test_bad_values_are_refused(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        FlowMapConfig(**{"width": 8, "depth": 1, **values})
    assert "\n" not in str(caught.value)
