"""Energy head against the closed-form score of Gaussian draws, a double loop, and the data it was trained on.

Differences of draws ``N(a, s²)`` and data ``N(b, d²)`` are Gaussian, so their mean size is known.
"""

import math

import pytest
import torch
from drawing import draw
from exact import ExactNetwork
from torch import Tensor

from far.heads import Condition, EnergyConfig
from far.heads.energy import EnergyHead, distance_and_spread

DEVIATION = 0.5


class ExactDraw(ExactNetwork):
    """Exact network for data with mean ``z``, or one that is wrong by a shift and a factor."""

    def __init__(self, shift: float = 0.0, factor: float = 1.0) -> None:
        super().__init__()
        self.shift, self.factor = shift, factor
        self.calls = 0

    def forward(self, z: Tensor, noise: Tensor) -> Tensor:
        self.calls += 1
        return z + self.shift + self.factor * DEVIATION * self.embed_condition(noise)


def exact_head(samples: int = 2, shift: float = 0.0, factor: float = 1.0) -> EnergyHead:
    head = EnergyHead(EnergyConfig(8, 1, samples), 1, 1)
    head.network = ExactDraw(shift, factor)  # type: ignore[assignment]
    return head


def fresh_head(samples: int = 2, channels: int = 3, condition: int = 5) -> EnergyHead:
    torch.manual_seed(0)
    return EnergyHead(EnergyConfig(16, 1, samples), channels, condition)


def random_head(samples: int = 2, channels: int = 3) -> EnergyHead:
    head = fresh_head(samples, channels)
    with torch.no_grad():  # freshly initialized heads give zeros
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return head


# --- The closed form --------------------------------------------------------------------------------


def mean_size(mean: float, deviation: float) -> float:
    """Return ``E|N(mean, deviation²)|``, the mean of a folded normal distribution."""
    scaled = mean / (deviation * math.sqrt(2))
    return deviation * math.sqrt(2 / math.pi) * math.exp(-(scaled**2)) + mean * math.erf(scaled)


def expected_parts(shift: float, factor: float) -> tuple[float, float]:
    """Return the mean distance of draws to data ``N(0, DEVIATION²)``, and to each other."""
    return mean_size(shift, DEVIATION * math.hypot(1, factor)), mean_size(
        0.0, DEVIATION * factor * math.sqrt(2)
    )


def expected_score(shift: float, factor: float) -> float:
    distance, spread = expected_parts(shift, factor)
    return distance - spread / 2


def test_closed_form_score_is_lowest_for_the_distribution_of_the_data() -> None:
    """The reference of this file is a strictly proper score."""
    others = [
        (shift / 10, factor / 10)
        for shift in range(-10, 11)
        for factor in range(1, 31)
        if (shift, factor) != (0, 10)
    ]
    assert min(expected_score(*other) for other in others) > expected_score(0.0, 1.0) + 1e-4
    for step in (-0.01, 0.01):
        assert expected_score(step, 1.0) > expected_score(0.0, 1.0)
        assert expected_score(0.0, 1.0 + step) > expected_score(0.0, 1.0)


@torch.no_grad()
@pytest.mark.parametrize("samples", [2, 5])
@pytest.mark.parametrize(("shift", "factor"), [(0.0, 1.0), (0.4, 1.0), (0.0, 2.0), (0.0, 0.2)])
def test_loss_of_gaussian_draws_is_the_closed_form(samples: int, shift: float, factor: float) -> None:
    generator, head = torch.Generator().manual_seed(0), exact_head(samples, shift, factor)
    z = 2 * torch.rand(100_000, 1, generator=generator) - 1
    x = z + DEVIATION * torch.randn(100_000, 1, generator=generator)
    loss = head.loss(x, Condition(z), generator, head)
    distance, spread = expected_parts(shift, factor)
    assert float(loss.value.mean()) == pytest.approx(distance - spread / 2, abs=0.004)
    assert float(loss.terms["distance"].mean()) == pytest.approx(distance, abs=0.005)
    assert float(loss.terms["spread"].mean()) == pytest.approx(spread, abs=0.005)
    if (shift, factor) != (0.0, 1.0):
        assert float(loss.value.mean()) > expected_score(0.0, 1.0) + 0.02


# --- The loss -----------------------------------------------------------------------------------------


def double_loop(drawn: Tensor, x: Tensor) -> float:
    """Return the score of one token's draws ``[samples, channels]``."""
    samples = len(drawn)
    total = 0.0
    for i in range(samples):
        total += math.dist(drawn[i].tolist(), x.tolist()) / samples
        for j in range(samples):
            if i != j:
                total -= math.dist(drawn[i].tolist(), drawn[j].tolist()) / (2 * samples * (samples - 1))
    return total


@torch.no_grad()
@pytest.mark.parametrize("samples", [2, 3, 6])
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_equals_a_plain_double_loop(samples: int, autocast: bool) -> None:
    """Distances are in float32, also of draws in bfloat16."""
    head, x, z = random_head(samples), torch.randn(7, 3), torch.randn(7, 5)
    drawn: list[Tensor] = []
    head.network.register_forward_hook(lambda module, arguments, output: drawn.append(output.float()))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = head.loss(x, Condition(z), torch.Generator().manual_seed(0), head)
    assert drawn[0].shape == (samples, 7, 3)
    expected = [double_loop(drawn[0][:, token], x[token]) for token in range(7)]
    torch.testing.assert_close(loss.value, torch.tensor(expected), rtol=0, atol=1e-5)
    assert (
        loss.samples.shape
        == loss.t.shape
        == loss.terms["distance"].shape
        == loss.terms["spread"].shape
        == (samples * 7,)
    )
    torch.testing.assert_close(loss.samples.view(samples, 7).mean(dim=0), loss.value)
    torch.testing.assert_close(loss.samples, loss.terms["distance"] - loss.terms["spread"] / 2)
    torch.testing.assert_close(loss.terms["distance"].view(samples, 7)[1, 4], (drawn[0][1, 4] - x[4]).norm())
    assert torch.equal(loss.t, torch.zeros(samples * 7))


def test_order_of_draws_does_not_change_the_loss() -> None:
    drawn, x, order = torch.randn(5, 7, 3), torch.randn(7, 3), torch.tensor([3, 0, 4, 1, 2])
    for found, other in zip(distance_and_spread(drawn, x), distance_and_spread(drawn[order], x), strict=True):
        torch.testing.assert_close(other, found[order])


def test_draws_of_a_token_have_different_noise() -> None:
    head = random_head(3)
    loss = head.loss(torch.zeros(4, 3), Condition(torch.zeros(4, 5)), torch.Generator().manual_seed(0), head)
    assert float(loss.terms["spread"].min()) > 1e-2
    assert len(loss.terms["distance"].unique()) == 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_an_untrained_head_are_finite(dtype: str) -> None:
    """All its draws are zero, as are all distances between them, and one token is zero too."""
    head, x = fresh_head(), torch.cat([torch.zeros(1, 3), torch.randn(7, 3)])
    z = torch.randn(8, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = head.loss(x, Condition(z), torch.Generator().manual_seed(0), head)
    assert loss.value.dtype == loss.samples.dtype == torch.float32
    torch.testing.assert_close(loss.value, x.norm(dim=-1))
    loss.value.mean().backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["network.output.linear.weight"].abs().min() > 0  # type: ignore[union-attr]
    assert z.grad is not None
    assert z.grad.isfinite().all()


# --- Sampling -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_guidance_moves_the_mean_and_temperature_the_std() -> None:
    noise = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    z, z_uncond = torch.full((500, 1), 0.7), torch.full((500, 1), -0.2)
    head = exact_head()
    for guidance in (0.0, 0.4, 1.0, 2.5):
        drawn = draw(head, z, lambda: noise, steps=1, temperature=0.8, uncond=z_uncond, scale=guidance)
        torch.testing.assert_close(drawn, -0.2 + guidance * 0.9 + DEVIATION * 0.8 * noise, rtol=0, atol=1e-5)
    assert head.network.calls == 4
    plain = draw(head, z, lambda: noise, steps=1, scale=2.5)
    torch.testing.assert_close(plain, 0.7 + DEVIATION * noise, rtol=0, atol=1e-6)


@torch.no_grad()
def test_guidance_mixes_the_conditions_in_one_pass() -> None:
    """This holds for any network. A scale of 1 is exactly no guidance."""
    head = random_head()
    z, z_uncond, noise = torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 3)
    rows: list[int] = []
    head.network.output.register_forward_hook(
        lambda module, arguments, output: rows.append(output.shape[:-1].numel())
    )
    guided = draw(head, z, lambda: noise, steps=1, uncond=z_uncond, scale=2.5)
    mixed = draw(head, z_uncond + 2.5 * (z - z_uncond), lambda: noise, steps=1)
    torch.testing.assert_close(guided, mixed, rtol=0, atol=1e-5)
    cond, uncond = draw(head, z, lambda: noise, steps=1), draw(head, z_uncond, lambda: noise, steps=1)
    assert (guided - (uncond + 2.5 * (cond - uncond))).abs().max() > 1e-2
    assert torch.equal(draw(head, z, lambda: noise, steps=1, uncond=z_uncond, scale=1.0), cond)
    assert rows == [4] * 5


@torch.no_grad()
def test_norms_do_not_cancel_the_temperature() -> None:
    """With many channels, noise has nearly constant length, so a layer norm would cancel a factor."""
    head, noise = random_head(channels=32), torch.randn(2000, 32, generator=torch.Generator().manual_seed(0))
    deviations = [
        float(draw(head, torch.ones(2000, 5), lambda: noise, steps=1, temperature=t).std(dim=0).mean())
        for t in (1.0, 0.5, 0.1)
    ]
    assert deviations[1] < 0.7 * deviations[0]
    assert deviations[2] < 0.2 * deviations[0]


# --- A trained head -------------------------------------------------------------------------------------


def two_modes(share: Tensor, generator: torch.Generator) -> Tensor:
    """Draw two channels: ±1 (+1 with probability ``share``) plus noise of 0.2, and ``N(share, 0.5²)``."""
    mode = torch.where(torch.rand(share.shape, generator=generator) < share, 1.0, -1.0)
    noise = torch.randn(len(share), 2, generator=generator)
    return torch.cat([mode + 0.2 * noise[:, :1], share + 0.5 * noise[:, 1:]], dim=-1)


@pytest.fixture(scope="module")
def trained() -> EnergyHead:
    torch.manual_seed(0)
    head = EnergyHead(EnergyConfig(64, 2, 4), 2, 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=4e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / 600)
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        share = 0.2 + 0.6 * torch.rand(256, 1, generator=generator)
        optimizer.zero_grad()
        head.loss(two_modes(share, generator), Condition(share), generator, head).value.mean().backward()
        optimizer.step()
        schedule.step()
    return head


@torch.no_grad()
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_trained_head_draws_the_data(trained: EnergyHead, share: float) -> None:
    noise = torch.randn(8000, 2, generator=torch.Generator().manual_seed(9))
    drawn = draw(trained, torch.full((8000, 1), share), lambda: noise, steps=1)
    data = two_modes(torch.full((8000, 1), share), torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn.mean(dim=0), data.mean(dim=0), rtol=0, atol=0.1)
    torch.testing.assert_close(drawn.std(dim=0), data.std(dim=0), rtol=0, atol=0.08)
    right = drawn[:, 0] > 0
    assert float(right.float().mean()) == pytest.approx(share, abs=0.06)
    assert float(drawn[right, 0].mean()) == pytest.approx(1, abs=0.12)
    assert float(drawn[~right, 0].mean()) == pytest.approx(-1, abs=0.12)
    assert float((drawn[:, 0].abs() < 0.4).float().mean()) < 0.08  # few fall between the modes
