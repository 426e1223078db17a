"""MAR's diffusion head (arXiv 2406.11838): a DDPM of one token that predicts ε and a variance.

As in the published code, time runs from 0 (data) to 999 (noise), but only inside this file. The loss of
Nichol & Dhariwal (arXiv 2102.09672) is the MSE of ε plus the variational bound of the variance.
"""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from far.devices import to_device
from far.heads.config import DiffusionConfig
from far.heads.head import Condition, Draw, Head, Normal, TokenLoss
from far.heads.network import HeadNetwork

TRAINING_STEPS = 1000


class DiffusionHead(Head):
    """Diffusion head: predicts ε and each channel's log-variance, as a fraction between its bounds."""

    config_class = DiffusionConfig
    default_steps = 100
    max_steps = TRAINING_STEPS
    config: DiffusionConfig

    def __init__(self, config: DiffusionConfig, channels: int, condition: int) -> None:
        super().__init__(config, channels, condition)
        self.network = HeadNetwork(channels, 2 * channels, condition, config.width, config.depth)

    def loss(
        self, x: Tensor, condition: Condition, generator: torch.Generator, teacher: Head, step: int = 0
    ) -> TokenLoss:
        samples = self.config.samples_per_token
        t = torch.randint(0, TRAINING_STEPS, (samples, len(x)), generator=generator)
        noise = torch.randn(samples, *x.shape, generator=generator)
        t, noise = to_device(t, x.device), to_device(noise, x.device)
        mse, bound = self.loss_terms(x, condition.z, t, noise)
        return TokenLoss.mean_of(mse + bound, 1 - t / TRAINING_STEPS, mse=mse, bound=bound)

    def loss_terms(self, x: Tensor, z: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the MSE of ε and the variational bound in bits per channel, each shaped as ``t``.

        Args:
            x: tokens, broadcastable to ``noise``.
            z: conditions ``[…, width]``.
            t: diffusion times, integers 0 … 999, shaped as the leading axes.
            noise: standard normal noise ``[…, channels]``.
        """
        schedule = Schedule.respaced(TRAINING_STEPS)
        x_t = schedule.noisy(x, noise, t)
        epsilon, fraction = self.network(x_t, z, t).float().chunk(2, dim=-1)
        # The bound trains only the variance: its gradient through ε would disturb the MSE.
        mean, logvar = schedule.model_posterior(x_t, epsilon.detach(), fraction, t)
        true_mean, true_logvar = schedule.true_posterior(x, x_t, t)
        kl = normal_kl(true_mean, true_logvar, mean, logvar).mean(dim=-1)
        likelihood = -discretized_gaussian_log_likelihood(x, mean, 0.5 * logvar).mean(dim=-1)
        bound = torch.where(t == 0, likelihood, kl) / math.log(2)
        return (epsilon - noise).square().mean(dim=-1), bound

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the velocity of the deterministic (DDIM) trajectories; see :meth:`Head.velocity`.

        The network sees the noisy token of the diffusion time with the same fraction of noise, which is
        ``x_t`` rescaled. Times are clamped to the schedule's ends.
        """
        bounds = flow_times()
        t = t.clamp(float(bounds[-1]), float(bounds[0]))
        time = diffusion_times(t, flow_times(t.device, t.dtype))
        t = t.unsqueeze(-1)
        noisy = x / (t.square() + (1 - t).square()).sqrt()
        epsilon = condition.guide(lambda z: self.network(noisy, z, time).to(x.dtype).chunk(2, dim=-1)[0])
        token = _clipped((x - (1 - t) * epsilon) / t, self.config.token_limit)
        return (token - x) / (1 - t)

    def sampler(self, steps: int, like: Tensor) -> Draw:
        schedule = Schedule.respaced(steps)
        times = self.network.embed_times(schedule.tables(like.device, like.dtype)["time"].flip(0))

        def draw(condition: Condition, normal: Normal, temperature: float) -> Tensor:
            embedded = condition.map(self.network.embed_condition)
            x = normal()
            networks = self.network.at_times(embedded.stacked(), times)
            for index, network in zip(reversed(range(steps)), networks):
                epsilons, fractions = network(x).to(x.dtype).chunk(2, dim=-1)
                # Only ε is guided. The variance is that with the class.
                epsilon = embedded.combine(epsilons)
                fraction = fractions if fractions.shape == x.shape else fractions[0]
                mean, logvar = schedule.model_posterior(x, epsilon, fraction, index, self.config.token_limit)
                noise = normal()
                x = mean + (0.5 * logvar).exp() * noise * temperature if index else mean
            return x

        return draw

    def noise_draws(self, steps: int) -> int:
        return 1 + steps

    def limited(self, token_limit: float | None) -> "DiffusionHead":
        """Return a head with the same network and another ``token_limit``."""
        head = copy.copy(self)
        head.config = dataclasses.replace(self.config, token_limit=token_limit)
        return head


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Noise schedule with one step per entry of ``timesteps``.

    Its tables ``[steps]`` are float64 on the CPU. A step ``t`` is an index into them: integers shaped as the
    leading axes of a tensor, or one ``int`` for the whole tensor.
    """

    timesteps: list[int]
    betas: Tensor
    # Tables by device and dtype, kept here so that a sampler never moves them again.
    _moved: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def respaced(steps: int) -> "Schedule":
        """Return ``steps`` evenly spaced steps of the cosine schedule of 1000 steps, with both ends."""
        stride = (TRAINING_STEPS - 1) / (steps - 1) if steps > 1 else 1
        # Add up the strides, as the published code does: a product rounds differently.
        timesteps = [round(time) for time in itertools.accumulate([stride] * (steps - 1), initial=0.0)]
        kept = train_alphas_cumprod()[timesteps]
        previous = torch.cat([kept.new_ones(1), kept[:-1]])
        return Schedule(timesteps, 1 - kept / previous)

    @functools.cached_property
    def alphas_cumprod(self) -> Tensor:
        return (1 - self.betas).cumprod(dim=0)

    @functools.cached_property
    def _previous(self) -> Tensor:
        return torch.cat([self.betas.new_ones(1), self.alphas_cumprod[:-1]])

    @functools.cached_property
    def posterior_logvar(self) -> Tensor:
        """Log-variance of ``q(x_{t−1} | x_t, x_0)``. Its second entry replaces the first, which is −∞."""
        variance = self.betas * (1 - self._previous) / (1 - self.alphas_cumprod)
        return torch.cat([variance[1:2], variance[1:]]).log() if len(variance) > 1 else self.betas.log()

    def tables(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return all coefficients by name, on a device and in a dtype.

        They are computed in float64 on the CPU, because some devices have no float64, and moved once in one
        piece, because a copy per step would stall a GPU.
        """
        if (device, dtype) not in self._moved:
            signal, previous = self.alphas_cumprod, self._previous
            tables = {
                "time": signal.new_tensor(self.timesteps),
                "signal": signal.sqrt(),
                "noise": (1 - signal).sqrt(),
                "x_of_x_t": (1 / signal).sqrt(),
                "x_of_epsilon": (1 / signal - 1).sqrt(),
                "mean_of_x": self.betas * previous.sqrt() / (1 - signal),
                "mean_of_x_t": (1 - previous) * (1 - self.betas).sqrt() / (1 - signal),
                "low": self.posterior_logvar,
                "high": self.betas.log(),
            }
            moved = torch.stack(list(tables.values())).to(dtype).to(device)
            self._moved[device, dtype] = dict(zip(tables, moved))
        return self._moved[device, dtype]

    def _at(self, t: Tensor | int, like: Tensor, *names: str) -> Iterator[Tensor]:
        """Return the named coefficients at the steps ``t``, broadcastable over the channels of ``like``."""
        tables = self.tables(like.device, like.dtype)
        return (tables[name][t].unsqueeze(-1) for name in names)

    def noisy(self, x: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """Return draws of ``q(x_t | x_0 = x)`` at the steps ``t``, made from ``noise``."""
        of_x, of_noise = self._at(t, noise, "signal", "noise")
        return of_x * x + of_noise * noise

    def true_posterior(self, x: Tensor, x_t: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """Return the mean and log-variance of ``q(x_{t−1} | x_t, x_0 = x)``."""
        of_x, of_x_t, logvar = self._at(t, x_t, "mean_of_x", "mean_of_x_t", "low")
        return of_x * x + of_x_t * x_t, logvar

    def model_posterior(
        self, x_t: Tensor, epsilon: Tensor, fraction: Tensor, t: Tensor | int, limit: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the mean and log-variance of ``p(x_{t−1} | x_t)`` from the network's two outputs.

        ``limit`` clips the predicted token: near pure noise, errors of ε are multiplied by up to 20,000.
        """
        of_x_t, of_epsilon, high = self._at(t, x_t, "x_of_x_t", "x_of_epsilon", "high")
        x = _clipped(of_x_t * x_t - of_epsilon * epsilon, limit)
        mean, low = self.true_posterior(x, x_t, t)
        weight = (fraction + 1) / 2  # −1 … 1 spans the bounds
        return mean, weight * high + (1 - weight) * low


@functools.lru_cache(maxsize=1)
def train_alphas_cumprod() -> Tensor:
    """Return the signal levels ``[1000]`` of the cosine schedule, with betas of at most 0.999."""
    times = (step / TRAINING_STEPS for step in range(TRAINING_STEPS + 1))
    levels = [math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2 for time in times]
    betas = [min(1 - after / before, 0.999) for before, after in itertools.pairwise(levels)]
    return (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(dim=0)


@functools.lru_cache(maxsize=8)
def flow_times(device: torch.device = torch.device("cpu"), dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the flow-matching times ``[1000]``, from 1 (data) to 0, with the diffusion times' noise."""
    signal, noise = train_alphas_cumprod().sqrt(), (1 - train_alphas_cumprod()).sqrt()
    return (signal / (signal + noise)).to(dtype).to(device)


def _clipped(token: Tensor, limit: float | None) -> Tensor:
    return token if limit is None else token.clamp(-limit, limit)


def diffusion_times(t: Tensor, times: Tensor) -> Tensor:
    """Convert flow-matching times ``t`` to fractional diffusion times, by the table of :func:`flow_times`."""
    rising = times.flip(0).to(t.dtype)
    upper = torch.searchsorted(rising, t.contiguous()).clamp(1, len(rising) - 1)
    fraction = (t - rising[upper - 1]) / (rising[upper] - rising[upper - 1])
    return len(rising) - 1 - (upper - 1 + fraction)


def normal_kl(mean: Tensor, logvar: Tensor, other_mean: Tensor, other_logvar: Tensor) -> Tensor:
    """Return the elementwise KL divergence of diagonal Gaussians, in nats."""
    ratio = (logvar - other_logvar).exp() + (mean - other_mean).square() * (-other_logvar).exp()
    return 0.5 * (other_logvar - logvar - 1 + ratio)


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log-probability of ``x`` in nats under a Gaussian in bins of 1/255, open beyond ±0.999.

    The bins are those of 8-bit pixels, but the published code uses them for latents too.
    """
    centered, inverse = x - mean, (-log_scale).exp()
    upper = approximate_normal_cdf(inverse * (centered + 1 / 255))
    lower = approximate_normal_cdf(inverse * (centered - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def approximate_normal_cdf(x: Tensor) -> Tensor:
    """Return the tanh approximation of the standard normal distribution function that MAR's training used."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
