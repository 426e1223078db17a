"""Diffusion head against Bayes' rule and torch.distributions; tests/reference compares it with MAR's."""

import math
from typing import Any

import pytest
import torch
from drawing import draw
from exact import ExactNetwork
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from far.errors import InputError
from far.heads import Condition, DiffusionConfig
from far.heads.diffusion import (
    DiffusionHead,
    Schedule,
    approximate_normal_cdf,
    discretized_gaussian_log_likelihood,
    normal_kl,
    train_alphas_cumprod,
)


def test_training_schedule_is_a_squared_cosine() -> None:
    """It falls from signal to noise, and no step loses more than 99.9 % of the signal."""
    levels = [math.cos((step / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(1001)]
    expected = torch.tensor([level / levels[0] for level in levels[1:]], dtype=torch.float64)
    # The limit touches the last step only, where it multiplies the level before by 0.001.
    expected[-1] = 0.001 * expected[-2]
    torch.testing.assert_close(train_alphas_cumprod(), expected, rtol=1e-9, atol=0)


def published_timesteps(steps: int) -> list[int]:
    """Return the timesteps of the published code, whose sum of strides rounds differently than a product."""
    if steps == 1:
        return [0]
    found, time = [], 0.0
    for _ in range(steps):
        found.append(round(time))
        time += 999 / (steps - 1)
    return found


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 21, 23, 100, 250, 999, 1000])
def test_respaced_schedule_keeps_the_signal_levels_of_its_timesteps(steps: int) -> None:
    schedule = Schedule.respaced(steps)
    assert schedule.timesteps == published_timesteps(steps)
    torch.testing.assert_close(
        schedule.alphas_cumprod, train_alphas_cumprod()[schedule.timesteps], rtol=1e-7, atol=0
    )
    assert schedule.betas.dtype == torch.float64
    assert float(schedule.betas.min()) > 0
    assert float(schedule.betas.max()) < 1
    assert schedule.posterior_logvar.shape == (steps,)
    assert schedule.posterior_logvar.isfinite().all()


def test_one_two_and_all_steps_are_respaced() -> None:
    assert Schedule.respaced(1).timesteps == [0]
    assert Schedule.respaced(2).timesteps == [0, 999]
    assert Schedule.respaced(1000).timesteps == list(range(1000))


def test_schedule_keeps_its_tables_when_many_others_are_used() -> None:
    """Otherwise a sampler would copy them again between AR steps, which stalls a GPU."""
    cpu, schedule = torch.device("cpu"), Schedule.respaced(2)
    tables = schedule.tables(cpu, torch.float32)
    for steps in range(3, 200):
        Schedule.respaced(steps).tables(cpu, torch.float32)
    assert schedule.tables(cpu, torch.float32) is tables


def test_true_posterior_is_bayes_rule() -> None:
    """``q(x_{t−1} | x_t, x_0)`` is a product of two Gaussians in ``x_{t−1}``, whose precisions add up."""
    schedule = Schedule.respaced(20)
    signal = schedule.alphas_cumprod
    for t in range(1, 20):
        x, x_t = torch.randn(2, 3, dtype=torch.float64)
        prior_variance = 1 - signal[t - 1]
        step_signal = 1 - schedule.betas[t]
        precision = 1 / prior_variance + step_signal / schedule.betas[t]
        mean = (
            signal[t - 1].sqrt() * x / prior_variance + step_signal.sqrt() * x_t / schedule.betas[t]
        ) / precision
        found_mean, found_logvar = schedule.true_posterior(x, x_t, torch.tensor(t))
        torch.testing.assert_close(found_mean, mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found_logvar.squeeze(), -precision.log(), rtol=1e-9, atol=1e-9)


def test_model_posterior_recovers_the_true_one_from_the_true_noise() -> None:
    schedule = Schedule.respaced(50)
    x, noise = torch.randn(2, 7, 3, dtype=torch.float64)
    t = torch.tensor([1, 5, 10, 20, 30, 40, 49])
    x_t = schedule.noisy(x, noise, t)
    mean, logvar = schedule.true_posterior(x, x_t, t)
    low_mean, low = schedule.model_posterior(x_t, noise, torch.full_like(x, -1), t)
    torch.testing.assert_close(low_mean, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(low, logvar.expand_as(low), rtol=1e-9, atol=1e-9)
    high = schedule.model_posterior(x_t, noise, torch.ones_like(x), t)[1]
    torch.testing.assert_close(
        high, schedule.betas[t].log().unsqueeze(-1).expand_as(high), rtol=1e-9, atol=1e-9
    )


def test_kl_of_gaussians_agrees_with_torch() -> None:
    mean, other_mean, logvar, other_logvar = torch.randn(4, 1000, dtype=torch.float64)
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(other_mean, (other_logvar / 2).exp()))
    torch.testing.assert_close(normal_kl(mean, logvar, other_mean, other_logvar), expected)


def test_likelihood_of_a_bin_agrees_with_the_normal_distribution() -> None:
    x = torch.tensor([-1.5, -0.9, -0.3, 0.0, 0.4, 0.998, 1.2], dtype=torch.float64)
    mean, scale = torch.full_like(x, 0.1), torch.full_like(x, 0.2)
    normal = Normal(mean, scale)
    upper, lower = normal.cdf(x + 1 / 255), normal.cdf(x - 1 / 255)
    expected = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    found = discretized_gaussian_log_likelihood(x, mean, scale.log()).exp()
    torch.testing.assert_close(
        found, expected, rtol=0.03, atol=3e-4
    )  # its normal distribution function is approximate
    points = torch.linspace(-6, 6, 500, dtype=torch.float64)
    torch.testing.assert_close(
        approximate_normal_cdf(points), Normal(0.0, 1.0).cdf(points), rtol=0, atol=3e-4
    )


class ExactNoise(ExactNetwork):
    """``E[noise | x_t]`` for data ``N(z, deviation²)``, with the variance of exact reverse steps."""

    def __init__(self, deviation: float, steps: int) -> None:
        super().__init__()
        self.deviation, self.schedule = deviation, Schedule.respaced(steps)

    def forward(self, x: Tensor, z: Tensor, time: Tensor) -> Tensor:
        index = self.schedule.timesteps.index(int(time))
        signal = self.schedule.alphas_cumprod[index]
        marginal = signal * self.deviation**2 + 1 - signal
        noise = (1 - signal).sqrt() / marginal * (x - signal.sqrt() * z)
        if not index:
            return torch.cat([noise, torch.zeros_like(noise)], dim=-1)
        beta, previous = self.schedule.betas[index], self.schedule.alphas_cumprod[index - 1]
        of_x = beta * previous.sqrt() / (1 - signal)
        low = beta * (1 - previous) / (1 - signal)
        unknown = self.deviation**2 * (1 - signal) / marginal  # Var(x_0 | x_t)
        wanted = low + of_x**2 * unknown
        fraction = 2 * (wanted.log() - low.log()) / (beta.log() - low.log()) - 1
        return torch.cat([noise, torch.full_like(noise, float(fraction))], dim=-1)


def exact_head(deviation: float, steps: int) -> DiffusionHead:
    head = DiffusionHead(DiffusionConfig(8, 1), 1, 1)
    head.network = ExactNoise(deviation, steps)  # type: ignore[assignment]
    return head


@torch.no_grad()
@pytest.mark.parametrize("steps", [3, 20, 1000])
@pytest.mark.parametrize("deviation", [0.3, 1.5])
def test_exact_noise_gives_the_mean_and_std_of_the_data(steps: int, deviation: float) -> None:
    """Each reverse step is then the true one, in any number of steps."""
    count = 20_000 if steps < 1000 else 4000
    generator = torch.Generator().manual_seed(steps)
    z = torch.full((count, 1), 0.7, dtype=torch.float64)
    drawn = draw(
        exact_head(deviation, steps),
        z,
        lambda: torch.randn(count, 1, generator=generator, dtype=torch.float64),
        steps=steps,
    )
    assert float(drawn.mean()) == pytest.approx(0.7, abs=4 * deviation / count**0.5)
    assert float(drawn.std()) == pytest.approx(deviation, rel=4 / (2 * count) ** 0.5)


@torch.no_grad()
def test_guidance_moves_the_mean_and_temperature_the_std() -> None:
    noises = [
        torch.randn(4000, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in range(21)
    ]

    def drawn(mean: float, **options: Any) -> Tensor:
        draws = iter(noises)
        z = torch.full((4000, 1), mean, dtype=torch.float64)
        return draw(exact_head(0.5, 20), z, lambda: next(draws), steps=20, **options)

    uncond = torch.full((4000, 1), -0.2, dtype=torch.float64)
    # The exact noise is linear in the mean, so guiding it is guiding the mean.
    torch.testing.assert_close(
        drawn(0.7, uncond=uncond, scale=2.5), drawn(-0.2 + 2.5 * 0.9), rtol=0, atol=1e-9
    )
    assert float(drawn(0.7, temperature=0.5).std()) < 0.8 * float(drawn(0.7).std())


def random_head(samples: int = 4) -> DiffusionHead:
    torch.manual_seed(0)
    head = DiffusionHead(DiffusionConfig(16, 1, samples), 3, 5)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head


@torch.no_grad()
def test_guidance_leaves_the_variance_conditional() -> None:
    """Two steps, recomputed plainly with guided ε and the variance of the conditional half."""
    head, steps = random_head(), 2
    z, z_uncond, start, noise = torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 3), torch.randn(4, 3)
    draws = iter([start, noise, torch.full((4, 3), 1e9)])  # the last step adds no noise
    drawn = draw(head, z, lambda: next(draws), steps=steps, uncond=z_uncond, scale=3.0)
    schedule, x = Schedule.respaced(steps), start
    for index in (1, 0):
        time = torch.tensor(float(schedule.timesteps[index]))
        (cond, fraction), (uncond, _) = (head.network(x, c, time).chunk(2, dim=-1) for c in (z, z_uncond))
        mean, logvar = schedule.model_posterior(
            x, uncond + 3 * (cond - uncond), fraction, torch.tensor(index)
        )
        x = mean + (0.5 * logvar).exp() * noise if index else mean
    torch.testing.assert_close(drawn, x)


def test_loss_is_the_mean_of_its_terms_and_repeats_with_the_generator() -> None:
    head = random_head()
    x, z = torch.randn(6, 3), torch.randn(6, 5)
    loss = head.loss(x, Condition(z), torch.Generator().manual_seed(0), head)
    assert loss.value.shape == (6,)
    assert loss.samples.shape == loss.t.shape == (24,)
    torch.testing.assert_close(loss.terms["mse"] + loss.terms["bound"], loss.samples)
    torch.testing.assert_close(loss.samples.view(4, 6).mean(dim=0), loss.value)
    assert float(loss.t.min()) > 0
    assert float(loss.t.max()) <= 1  # 1 is data
    repeated = head.loss(x, Condition(z), torch.Generator().manual_seed(0), head)
    assert torch.equal(repeated.value, loss.value)


def test_bound_trains_only_the_variance() -> None:
    head = random_head()
    bound = head.loss_terms(
        torch.randn(6, 3), torch.randn(6, 5), torch.arange(0, 1000, 167), torch.randn(6, 3)
    )[1]
    bound.sum().backward()
    gradient = head.network.output.linear.weight.grad
    assert gradient is not None
    assert torch.equal(gradient[:3], torch.zeros(3, 16))
    assert gradient[3:].abs().min() > 0


@torch.no_grad()
def test_bound_at_time_zero_is_the_likelihood() -> None:
    """It falls as the token moves away from the prediction."""
    head = random_head()
    z, t, noise = torch.randn(2, 5), torch.zeros(2, dtype=torch.long), torch.zeros(2, 3)
    schedule = Schedule.respaced(1000)
    x = torch.tensor([[0.1, 0.2, 0.3], [2.0, -3.0, 0.0]])
    epsilon, fraction = head.network(schedule.noisy(x, noise, t), z, t).chunk(2, dim=-1)
    mean, logvar = schedule.model_posterior(schedule.noisy(x, noise, t), epsilon, fraction, t)
    expected = -discretized_gaussian_log_likelihood(x, mean, logvar / 2).mean(dim=-1) / math.log(2)
    torch.testing.assert_close(head.loss_terms(x, z, t, noise)[1], expected)


@torch.no_grad()
def test_network_is_called_once_per_step() -> None:
    head, calls = random_head(), []
    head.network.output.register_forward_hook(lambda *arguments: calls.append(1))
    for steps in (1, 2, 7):
        calls.clear()
        assert draw(head, torch.zeros(2, 5), lambda: torch.randn(2, 3), steps=steps).isfinite().all()
        assert len(calls) == steps


class NearlyRight(ExactNetwork):
    """ε of data that are all zero, with a small error, and right only for inputs like those of training."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        signal = train_alphas_cumprod()[int(t)]
        return torch.cat(
            [(x / float((1 - signal).sqrt())).clamp(-4, 4) + self.error, torch.full_like(x, -1.0)], dim=-1
        )


def spread(error: float, limit: float | None) -> float:
    head = DiffusionHead(DiffusionConfig(8, 1, 1, token_limit=limit), 4, 4)
    head.network = NearlyRight(error)  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    drawn = draw(head, torch.zeros(50, 4), lambda: torch.randn(50, 4, generator=generator), steps=100)
    return float(drawn.abs().max())


def test_token_limit_bounds_the_effect_of_a_small_error() -> None:
    """Near pure noise, errors of ε are multiplied by up to 20,000. An exact ε needs no limit."""
    assert spread(0.0, None) < 0.1
    assert spread(0.03, None) > 3
    assert spread(0.03, 1.0) < 0.5 * spread(0.03, None)


def test_token_limit_clips_only_the_predicted_token() -> None:
    schedule = Schedule.respaced(100)
    generator = torch.Generator().manual_seed(0)
    x_t, epsilon, fraction = torch.randn(3, 6, 4, generator=generator)
    for index in (0, 50, 99):
        t = torch.full((6,), index)
        signal = schedule.alphas_cumprod[index]
        token = (x_t - epsilon * (1 - signal).sqrt()) / signal.sqrt()
        expected, _ = schedule.true_posterior(token.clamp(-1.5, 1.5).float(), x_t, t)
        mean, logvar = schedule.model_posterior(x_t, epsilon, fraction, t, 1.5)
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(logvar, schedule.model_posterior(x_t, epsilon, fraction, t)[1])
    with pytest.raises(InputError, match="token_limit 0"):
        DiffusionConfig(token_limit=0)
