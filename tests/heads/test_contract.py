"""The rules that every head keeps, checked as a head from outside would be: by ``far.testing``."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from far.backbone import CausalConfig
from far.config import from_dict, to_dict
from far.errors import InputError
from far.heads import (
    HEADS,
    Condition,
    DiffusionConfig,
    Draw,
    FlowConfig,
    FlowMapConfig,
    Head,
    HeadConfig,
    Normal,
    TokenLoss,
    build_head,
    register,
)
from far.model import FAR
from far.model_config import ModelConfig, NetworkConfig
from far.pipeline import Pipeline
from far.recipe import load_recipe
from far.recipe_keys import sections
from far.sampling_config import SamplingConfig
from far.testing import HEAD_CHECKS, check_head, check_temperature

CONFIGS = {
    **{kind: HeadConfig.kinds[kind](16, 1) for kind in HEADS},
    "flow, heun": FlowConfig(16, 1, solver="heun"),
    "diffusion, limited": DiffusionConfig(16, 1, token_limit=2.0),
    "flow_map, lagrangian": FlowMapConfig(16, 1, objective="lagrangian"),
    "flow_map, learned guidance": FlowMapConfig(16, 1, max_guidance=3.0),
}


@pytest.mark.parametrize("check", HEAD_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_heads_keep_the_contract(config: HeadConfig, check: Callable[[HeadConfig], None]) -> None:
    if check is check_temperature and isinstance(config, DiffusionConfig):
        # Untrained, its errors near pure noise are multiplied by up to 20,000 and would hide the temperature.
        config = dataclasses.replace(config, token_limit=2.0)
    check(config)


# --- Configurations


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", ["width", "depth", "samples_per_token"])
def test_impossible_sizes_are_refused(config: HeadConfig, name: str) -> None:
    for value in (0, -1, 2**20):
        with pytest.raises(InputError, match=f"{name} {value}"):
            dataclasses.replace(config, **{name: value})


@pytest.mark.parametrize("kind", HEADS)
def test_one_sample_per_token_is_refused_only_if_the_loss_compares_samples(kind: str) -> None:
    if kind in ("energy", "flow_map"):
        with pytest.raises(InputError, match="samples_per_token 1"):
            HeadConfig.kinds[kind](samples_per_token=1)
    else:
        assert HeadConfig.kinds[kind](samples_per_token=1).samples_per_token == 1


def test_keys_of_another_kind_are_refused_with_the_keys_of_this_one() -> None:
    values = {"head": {"kind": "flow", "solver": "heun", "token_limit": 5.0}}
    with pytest.raises(InputError) as caught:
        from_dict(NetworkConfig, values, "a recipe")
    assert "'token_limit'" in str(caught.value)
    for key in ("width", "depth", "samples_per_token", "kind", "solver"):
        assert key in str(caught.value)


def test_shortcut_is_the_default_kind() -> None:
    assert from_dict(NetworkConfig, {"head": {"width": 64}}, "a recipe").head.kind == "shortcut"
    assert NetworkConfig().head.kind == "shortcut"


# --- A head from outside


@dataclasses.dataclass(frozen=True)
class GaussianConfig(HeadConfig):
    """Configuration of a head from outside the library.

    Attributes:
        deviation: standard deviation of its draws.
    """

    kind: str = "gaussian"
    deviation: float = 0.5


class GaussianHead(Head):
    """A Gaussian whose mean is linear in the condition."""

    config_class = GaussianConfig
    default_steps = max_steps = 1

    def __init__(self, config: GaussianConfig, channels: int, condition: int) -> None:
        super().__init__(config, channels, condition)
        self.mean = nn.Linear(condition, channels)

    def loss(
        self, x: Tensor, condition: Condition, generator: torch.Generator, teacher: Head, step: int = 0
    ) -> TokenLoss:
        value = (self.mean(condition.z) - x).square().mean(dim=-1)
        return TokenLoss(value, value.detach(), torch.zeros_like(value), {})

    def sampler(self, steps: int, like: Tensor) -> Draw:
        def draw(condition: Condition, normal: Normal, temperature: float) -> Tensor:
            return condition.guide(self.mean) + self.config.deviation * temperature * normal()

        return draw


@pytest.fixture
def gaussian() -> Iterator[type[GaussianHead]]:
    heads, kinds = dict(HEADS), dict(HeadConfig.kinds)
    yield register(GaussianHead)
    for registry, before in ((HEADS, heads), (HeadConfig.kinds, kinds)):
        registry.clear()
        registry.update(before)  # type: ignore[arg-type]


@pytest.mark.usefixtures("gaussian")
def test_a_registered_head_keeps_the_contract_and_its_own_keys(tmp_path: Path) -> None:
    check_head(GaussianConfig(deviation=0.3))
    overrides = ["generator.network.head={kind: gaussian, deviation: 0.3}", "generator.network.head.depth=2"]
    network = load_recipe("avatars-64", overrides).generator.network
    assert network.head == GaussianConfig(depth=2, deviation=0.3)
    with pytest.raises(InputError, match="deviation"):
        load_recipe("avatars-64", ["generator.network.head={kind: gaussian, solver: heun}"])
    [section] = [section for section in sections() if section.kind == "gaussian"]
    meanings = {key.name.rpartition(".")[2]: key.meaning for key in section.keys}
    assert meanings["deviation"] == "standard deviation of its draws."
    assert meanings["width"] == "channels of its blocks."


@pytest.mark.usefixtures("gaussian")
def test_a_registered_head_is_saved_loaded_and_sampled(tmp_path: Path) -> None:
    backbone = CausalConfig(width=16, depth=1, heads=2)
    network = NetworkConfig(backbone, GaussianConfig(deviation=0.25))
    model = FAR(ModelConfig(network, 2, 3, (2, 2)))
    Pipeline(model, None, ["a", "b"], SamplingConfig(4, 1, 2.0)).save_pretrained(tmp_path / "model")
    loaded = Pipeline.from_pretrained(tmp_path / "model")
    assert loaded.model.head.config == network.head
    [*_, ours] = Pipeline(model, None, ["a", "b"], loaded.defaults).stream([0, 1], [1, 2])
    [*_, theirs] = loaded.stream([0, 1], [1, 2])
    assert torch.equal(ours.latents, theirs.latents)


def test_a_kind_without_a_registered_head_is_refused() -> None:
    with pytest.raises(InputError, match="'gaussian'"):
        build_head(GaussianConfig(), 3, 5)
    with pytest.raises(InputError, match="'gaussian'"):
        from_dict(NetworkConfig, to_dict(NetworkConfig(head=GaussianConfig())), "config.json")


# --- The checks themselves: each finds heads that break its rule


class GlobalNoise(GaussianHead):
    def sampler(self, steps: int, like: Tensor) -> Draw:
        plain = super().sampler(steps, like)
        return lambda condition, normal, temperature: (
            plain(condition, normal, temperature) + 1e-3 * torch.randn(())
        )


class BatchDependent(GaussianHead):
    def sampler(self, steps: int, like: Tensor) -> Draw:
        plain = super().sampler(steps, like)

        def draw(condition: Condition, normal: Normal, temperature: float) -> Tensor:
            drawn = plain(condition, normal, temperature)
            return drawn - drawn.mean(dim=0)

        return draw


class OneDrawOnly(GaussianHead):
    def sampler(self, steps: int, like: Tensor) -> Draw:
        plain, calls = super().sampler(steps, like), iter(range(10**6))
        return lambda condition, normal, temperature: plain(condition, normal, temperature) + next(calls)


class AnySteps(GaussianHead):
    def check_steps(self, steps: int) -> None:
        pass


class AlwaysWarm(GaussianHead):
    def sampler(self, steps: int, like: Tensor) -> Draw:
        plain = super().sampler(steps, like)
        return lambda condition, normal, temperature: plain(condition, normal, 1.0)


class Unguided(GaussianHead):
    def sampler(self, steps: int, like: Tensor) -> Draw:
        plain = super().sampler(steps, like)
        return lambda condition, *rest: plain(Condition(condition.z), *rest)


class GlobalLoss(GaussianHead):
    def loss(self, x: Tensor, condition: Condition, *rest: Any) -> TokenLoss:
        return super().loss(x + torch.randn_like(x), condition, *rest)


class Detached(GaussianHead):
    def loss(self, x: Tensor, condition: Condition, *rest: Any) -> TokenLoss:
        return super().loss(x, Condition(condition.z.detach()), *rest)


class SixteenBits(GaussianHead):
    def sampler(self, steps: int, like: Tensor) -> Draw:
        plain = super().sampler(steps, like)
        return lambda *values: plain(*values).to(self.mean.weight.dtype)


class Unsaved(GaussianHead):
    def __init__(self, *values: Any) -> None:
        super().__init__(*values)
        self.offset = torch.randn(3)

    def sampler(self, steps: int, like: Tensor) -> Draw:
        plain = super().sampler(steps, like)
        return lambda *values: plain(*values) + self.offset


class TwoDraws(GaussianHead):
    def sampler(self, steps: int, like: Tensor) -> Draw:
        plain = super().sampler(steps, like)
        return lambda condition, normal, temperature: normal() + plain(condition, normal, temperature)


@pytest.mark.parametrize(
    ("broken", "finds"),
    [
        (GlobalNoise, "check_draws"), (BatchDependent, "check_draws"), (OneDrawOnly, "check_draws"),
        (AnySteps, "check_steps"), (AlwaysWarm, "check_temperature"), (Unguided, "check_guidance"),
        (GlobalLoss, "check_loss"), (Detached, "check_gradients"), (SixteenBits, "check_dtypes"),
        (Unsaved, "check_weights"), (TwoDraws, "check_draws"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("gaussian")
def test_a_broken_head_fails_the_check_of_its_rule(broken: type[Head], finds: str) -> None:
    register(broken)
    [check] = [check for check in HEAD_CHECKS if check.__name__ == finds]
    with pytest.raises(AssertionError):
        check(GaussianConfig())
