"""Dataclasses from dictionaries and back, strictly."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from far.autoencoder import AutoencoderConfig
from far.backbone import BlockCausalConfig, CausalConfig, MaskedConfig
from far.config import from_dict, to_dict
from far.errors import InputError
from far.heads import FlowConfig, ShortcutConfig
from far.model import PRESETS, ModelConfig, NetworkConfig
from far.recipe import load_recipe
from far.sampling import SamplingConfig
from tests.refusals import refused


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 3
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    path: str
    rate: float = 0.5
    inner: Inner = Inner()
    maybe: float | None = None
    steps: int | tuple[int, ...] = 8
    kind: Literal["linear", "constant"] = "linear"
    flag: bool = False
    weights: dict[str, float] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(
    "config",
    [
        AutoencoderConfig(),
        AutoencoderConfig(width=32, width_multipliers=(1, 2, 4), latent_channels=2, shift=(0.5, -1.0)),
        ModelConfig(NetworkConfig(MaskedConfig(buffer=3), FlowConfig(solver="heun"), patch=2), 5, 3, (4, 6)),
        SamplingConfig(head_steps=(50, 5), guidance_interval=(0.1, 0.9)),
        *(ModelConfig(network) for network in PRESETS.values()),
    ],
)
def test_round_trip_through_json(config: Any) -> None:
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config))), "test") == config


@settings(max_examples=200, deadline=None)
@given(
    st.builds(
        Outer,
        path=st.text(),
        rate=st.floats(allow_nan=False, allow_infinity=False),
        inner=st.builds(Inner, size=st.integers(), names=st.lists(st.text()).map(tuple)),
        maybe=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        steps=st.integers() | st.lists(st.integers()).map(tuple),
        kind=st.sampled_from(["linear", "constant"]),
        flag=st.booleans(),
        weights=st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)),
    )
)
def test_any_round_trip(config: Outer) -> None:
    plain = json.loads(json.dumps(to_dict(config)))
    assert from_dict(Outer, plain, "test") == config


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 10**400])
def test_numbers_that_no_float_can_hold_are_refused(number: float) -> None:
    with refused("test: rate"):
        from_dict(Outer, {"path": "x", "rate": number, "inner": {"size": 4}}, "test")


def test_a_value_that_repeats_itself_is_shown_in_part() -> None:
    value: list = ["x"] * 9
    for _ in range(20):
        value = [value] * 9
    with pytest.raises(InputError) as caught:
        from_dict(Outer, {"path": value}, "test")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "make",
    [
        lambda number: AutoencoderConfig(width=number),
        lambda number: AutoencoderConfig(blocks=number),
        lambda number: AutoencoderConfig(latent_channels=number),
        lambda number: AutoencoderConfig(width_multipliers=(1, 1, number)),
        lambda number: MaskedConfig(encoder_width=number),
        lambda number: MaskedConfig(decoder_depth=number),
        lambda number: MaskedConfig(buffer=number),
        lambda number: CausalConfig(width=number),
        lambda number: CausalConfig(depth=number),
        lambda number: CausalConfig(buffer=number),
        lambda number: ShortcutConfig(width=number),
        lambda number: ShortcutConfig(depth=number),
        lambda number: ShortcutConfig(samples_per_token=number),
        lambda number: ModelConfig(classes=number),
        lambda number: ModelConfig(latent_channels=number),
        lambda number: ModelConfig(grid=(16, number)),
    ],
)
def test_sizes_that_no_model_has_are_refused(make: Any) -> None:
    with refused():
        make(2**60)


def test_defaults_and_whole_numbers_for_floats() -> None:
    config = from_dict(Outer, {"path": "x", "rate": 2, "inner": {"size": 4}}, "test")
    assert config == Outer("x", rate=2.0, inner=Inner(4))
    assert isinstance(config.rate, float)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"path": "x", "rat": 1.0}, ["'rat'", "'rate'"]),
        ({"path": "x", "inner": {"sise": 1}}, ["inner", "'sise'", "'size'"]),
        ({"path": "x", "zzz": 1}, ["'zzz'"]),
        ({"path": "x", 7: 1}, ["7"]),
        ({}, ["'path'"]),
        ({"path": 3}, ["path", "3", "str"]),
        ({"path": None}, ["path", "None", "str"]),
        ({"path": "x", "rate": "1e-4"}, ["rate", "'1e-4'", "1.0e-4"]),
        ({"path": "x", "rate": True}, ["rate", "True"]),
        ({"path": "x", "inner": 5}, ["inner", "int 5"]),
        ({"path": "x", "inner": {"size": 1.5}}, ["inner: size", "1.5", "int"]),
        ({"path": "x", "inner": {"size": True}}, ["inner: size", "True", "int"]),
        ({"path": "x", "inner": {"names": "abc"}}, ["inner: names", "'abc'"]),
        ({"path": "x", "inner": {"names": ["a", 1]}}, ["inner: names", "1", "str"]),
        ({"path": "x", "maybe": "no"}, ["maybe", "'no'"]),
        ({"path": "x", "steps": 1.5}, ["steps", "1.5"]),
        ({"path": "x", "steps": [1, "2"]}, ["steps", "[1, '2']"]),
        ({"path": "x", "kind": "cosine"}, ["kind", "'cosine'", "'linear'", "'constant'"]),
        ({"path": "x", "kind": ["linear"]}, ["kind", "['linear']", "'linear'", "'constant'"]),
        ({"path": "x", "flag": 1}, ["flag", "1", "bool"]),
        ({"path": "x", "weights": {"a": "b"}}, ["weights", "'b'"]),
        (["path"], ["list ['path']"]),
        (None, ["NoneType"]),
    ],
)
def test_errors_name_source_key_and_value(values: Any, named: list[str]) -> None:
    with refused("test: ", *named):
        from_dict(Outer, values, "test")


def test_errors_of_the_dataclass_name_the_source() -> None:
    with refused("test: ", "norm_groups 32", "width 20"):
        from_dict(AutoencoderConfig, {"width": 20}, "test")


def test_kind_selects_the_backbone_and_the_default_is_masked() -> None:
    def backbone(**values: Any) -> Any:
        return from_dict(NetworkConfig, {"backbone": values}, "x").backbone

    assert backbone(encoder_depth=3) == MaskedConfig(encoder_depth=3)
    assert backbone(kind="masked") == MaskedConfig()
    assert backbone(kind="causal", depth=3) == CausalConfig(depth=3)
    assert backbone(kind="block_causal", decoder_depth=3) == BlockCausalConfig(decoder_depth=3)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"kind": "casual"}, ["kind", "'casual'", "'masked'", "'causal'"]),
        ({"kind": ["causal"]}, ["kind", "['causal']", "'masked'", "'causal'"]),
        ({"kind": "causal", "encoder_depth": 3}, ["'encoder_depth'"]),
        ({"kind": "causal", "heads": 5}, ["width 768", "heads 5"]),
        (5, ["5"]),
    ],
)
def test_errors_of_backbones_name_key_and_value(values: Any, named: list[str]) -> None:
    with refused("test: backbone", *named):
        from_dict(NetworkConfig, {"backbone": values}, "test")


def test_to_dict_is_plain() -> None:
    assert to_dict(Outer("x", steps=(1, 2), inner=Inner(names=("a",)))) == {
        "path": "x",
        "rate": 0.5,
        "inner": {"size": 3, "names": ["a"]},
        "maybe": None,
        "steps": [1, 2],
        "kind": "linear",
        "flag": False,
        "weights": {},
    }
    assert math.isclose(to_dict(AutoencoderConfig())["scale"], 0.2325)


def test_recipe_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "twice.yaml"
    recipe.write_text(
        "data: a\nrun: b\ngenerator:\n  training: {steps: 5}\n  label_drop: 0.2\n  training: {steps: 7}\n"
    )
    with refused("training", recipe):
        load_recipe(recipe)


@pytest.mark.parametrize(
    "overrides",
    [["generator.sampling.guidance=2"],
     ["generator.network.head.kind=flow_map", "generator.network.head.max_guidance=4"]],
)  # fmt: skip
def test_guidance_without_dropped_labels_is_refused_unless_a_model_has_learned_it(
    overrides: list[str],
) -> None:
    base = ["generator.label_drop=0", "generator.sampling.guidance=1"]
    load_recipe("avatars-64", base)
    with refused("label_drop"):
        load_recipe("avatars-64", [*base, *overrides])
    with refused("label_drop"):  # the head is new
        load_recipe("avatars-64", [*base, *overrides, "generator.frozen_backbone=avatars-64"])
    load_recipe("avatars-64", [*base, *overrides, "generator.start_from=avatars-64"])
