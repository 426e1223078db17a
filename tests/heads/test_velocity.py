"""``Head.velocity`` of every kind of head, compared with the known velocity of Gaussian data."""

import numpy as np
import pytest
import torch
from exact import ExactNetwork
from torch import Tensor

from far.heads import HEADS, Condition, DiffusionConfig, Head, HeadConfig, build_head
from far.heads.diffusion import DiffusionHead, diffusion_times, flow_times, train_alphas_cumprod
from far.heads.flow import FlowHead
from far.heads.flow_map import TIME_UNIT, FlowMapHead
from far.heads.shortcut import ShortcutHead

DEVIATION = 0.5
KINDS = ["diffusion", "flow", "flow_map", "shortcut"]
MEANS = torch.linspace(-1, 1, 50, dtype=torch.float64).unsqueeze(-1)
# First and last times of a diffusion head.
FIRST, LAST = float(flow_times()[-1]), float(flow_times()[0])


def exact_velocity(x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
    """Return ``E[data − noise | x_t = x]`` for data ``N(mean, DEVIATION²)``, by regression of Gaussians."""
    return mean + (t * DEVIATION**2 - (1 - t)) / ((1 - t) ** 2 + (t * DEVIATION) ** 2) * (x - t * mean)


class ExactNoise(ExactNetwork):
    """Exact network ``E[ε | noisy token]`` at a fractional diffusion time, for data with mean ``z``."""

    def forward(self, x: Tensor, z: Tensor, step: Tensor) -> Tensor:
        t = torch.as_tensor(np.interp(step.numpy(), np.arange(1000), flow_times().numpy()))
        signal, noise = (
            part.unsqueeze(-1) / (t**2 + (1 - t) ** 2).sqrt().unsqueeze(-1) for part in (t, 1 - t)
        )
        epsilon = noise / (signal**2 * DEVIATION**2 + noise**2) * (x - signal * z)
        return torch.cat([epsilon, torch.full_like(epsilon, 9.0)], dim=-1)


class ExactVelocity(ExactNetwork):
    """Exact velocity in the time unit of its head. A step size, if there is one, must be 0."""

    def __init__(self, unit: float) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor, z: Tensor, time: Tensor, size: Tensor | None = None) -> Tensor:
        assert size is None or not size.any()
        return exact_velocity(x, time.unsqueeze(-1) / self.unit, z)


def exact_head(kind: str) -> Head:
    head = build_head(HeadConfig.kinds[kind](8, 1), 1, 1)  # type: ignore[arg-type]
    networks = {
        "diffusion": ExactNoise(),
        "flow": ExactVelocity(1000),
        "flow_map": ExactVelocity(TIME_UNIT),
        "shortcut": ExactVelocity(1000),
    }
    head.network = networks[kind]
    return head


def random_head(kind: str) -> Head:
    torch.manual_seed(0)
    head = build_head(HeadConfig.kinds[kind](16, 1), 3, 5).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head


def test_every_head_with_a_velocity_is_tested() -> None:
    assert {*KINDS, "energy"} == set(HEADS), (
        "a head has a velocity, which is tested here, or is known to have none"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("time", [0.0, FIRST, 1e-3, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9, LAST, 1.0])
def test_velocity_of_gaussian_data_is_the_closed_form(kind: str, time: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 1, generator=generator, dtype=torch.float64)
    t = torch.full((50,), time, dtype=torch.float64)
    # A diffusion head has no times beyond its schedule's ends, and takes the nearest.
    known = t.clamp(FIRST, LAST) if kind == "diffusion" else t
    expected = exact_velocity(x, known.unsqueeze(-1), MEANS)
    torch.testing.assert_close(
        exact_head(kind).velocity(x, t, Condition(MEANS)), expected, rtol=1e-7, atol=1e-7
    )
    torch.testing.assert_close(
        exact_head(kind).velocity(x, t[0], Condition(MEANS)), expected, rtol=1e-7, atol=1e-7
    )  # one time for all
    assert float((expected - exact_velocity(x, t.unsqueeze(-1), MEANS)).abs().max()) < 0.1


def test_diffusion_network_sees_the_tokens_and_times_of_its_training() -> None:
    """The network sees ``√ᾱ x + √(1 − ᾱ) ε``, whatever the scale of the point of the flow."""
    head, seen = DiffusionHead(DiffusionConfig(8, 1), 1, 1), []
    head.network = ExactNoise()  # type: ignore[assignment]
    head.network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    steps = torch.tensor([0, 1, 10, 500, 900, 998, 999])
    signal = train_alphas_cumprod()[steps]
    token, noise = torch.randn(2, 7, 1, dtype=torch.float64)
    t = signal.sqrt() / (signal.sqrt() + (1 - signal).sqrt())
    head.velocity((1 - t).unsqueeze(-1) * noise + t.unsqueeze(-1) * token, t, Condition(MEANS[:7]))
    noisy, _, asked = seen[0]
    torch.testing.assert_close(
        noisy, signal.sqrt().unsqueeze(-1) * token + (1 - signal).sqrt().unsqueeze(-1) * noise
    )
    torch.testing.assert_close(asked, steps.double(), rtol=0, atol=1e-6)


def test_flow_times_fall_and_convert_back_to_diffusion_times() -> None:
    times = flow_times()
    assert times.shape == (1000,)
    assert bool((times.diff() < 0).all()), "training steps run from data to noise"
    assert 0.98 < float(times[0]) < 1
    assert 0 < float(times[-1]) < 1e-3
    steps = torch.cat([torch.arange(1000.0, dtype=torch.float64), 999 * torch.rand(500, dtype=torch.float64)])
    low = steps.floor().long().clamp(max=998)
    between = times[low] + (steps - low) * (times[low + 1] - times[low])
    torch.testing.assert_close(diffusion_times(between, times), steps, rtol=0, atol=1e-8)
    torch.testing.assert_close(diffusion_times(between.float(), times).double(), steps, rtol=0, atol=0.05)
    assert diffusion_times(between.view(3, 500), times).shape == (3, 500)


@torch.no_grad()
def test_token_limit_clips_the_guided_token() -> None:
    head = random_head("diffusion")
    x, t = 2 * torch.randn(400, 3, dtype=torch.float64), 0.02 + 0.96 * torch.rand(400, 1, dtype=torch.float64)
    z, z_uncond = torch.randn(2, 400, 5, dtype=torch.float64)
    scale = 1 + 3 * torch.rand(400, 1, dtype=torch.float64)

    def token(limit: float | None) -> Tensor:
        return x + (1 - t) * head.limited(limit).velocity(x, t.squeeze(-1), Condition(z, z_uncond, scale))

    free = token(None)
    assert float(free.abs().max()) > 3
    torch.testing.assert_close(token(1.5), free.clamp(-1.5, 1.5))


@torch.no_grad()
def test_velocity_is_the_mean_velocity_of_an_empty_step() -> None:
    flow, flow_map, shortcut = random_head("flow"), random_head("flow_map"), random_head("shortcut")
    assert isinstance(flow, FlowHead)
    assert isinstance(flow_map, FlowMapHead)
    assert isinstance(shortcut, ShortcutHead)
    x, z = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    t, none = torch.rand(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(flow.velocity(x, t, Condition(z)), flow.network(x, z, 1000 * t))
    torch.testing.assert_close(shortcut.velocity(x, t, Condition(z)), shortcut.mean_velocity(x, t, none, z))
    torch.testing.assert_close(flow_map.velocity(x, t, Condition(z)), flow_map.mean_velocity(x, t, t, z))
