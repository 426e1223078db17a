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
from far.backbone import CausalConfig, MaskedConfig
from far.config import from_dict, to_dict
from far.errors import InputError
from far.heads import HeadConfig
from far.model import PRESETS, ModelConfig, NetworkConfig
from far.recipe import load_recipe
from far.sampling import SamplingConfig


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
        ModelConfig(
            NetworkConfig(MaskedConfig(buffer=3), HeadConfig("flow", solver="heun"), patch=2), 5, 3, (4, 6)
        ),
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
    with pytest.raises(InputError, match=r"rate is .*, expected a finite number"):
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
        lambda number: HeadConfig(width=number),
        lambda number: HeadConfig(depth=number),
        lambda number: HeadConfig(samples_per_token=number),
        lambda number: ModelConfig(classes=number),
        lambda number: ModelConfig(latent_channels=number),
        lambda number: ModelConfig(grid=(16, number)),
    ],
)
def test_sizes_that_no_model_has_are_refused(make: Any) -> None:
    with pytest.raises(InputError, match=r"1152921504606846976|at most"):
        make(2**60)


def test_defaults_and_whole_numbers_for_floats() -> None:
    config = from_dict(Outer, {"path": "x", "rate": 2, "inner": {"size": 4}}, "test")
    assert config == Outer("x", rate=2.0, inner=Inner(4))
    assert isinstance(config.rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "x", "rat": 1.0}, "test: unknown key 'rat'; did you mean 'rate'?"),
        ({"path": "x", "inner": {"sise": 1}}, "test: inner: unknown key 'sise'; did you mean 'size'?"),
        ({"path": "x", "zzz": 1}, "test: unknown key 'zzz'; did you mean"),
        ({"path": "x", 7: 1}, "test: unknown key 7; did you mean"),
        ({}, "test: the key 'path' is missing"),
        ({"path": 3}, "test: path is 3, expected str"),
        ({"path": None}, "test: path is None, expected str"),
        (
            {"path": "x", "rate": "1e-4"},
            "test: rate is '1e-4', expected a finite number; write 1.0e-4, not 1e-4, in YAML",
        ),
        ({"path": "x", "rate": True}, "test: rate is True, expected a finite number"),
        ({"path": "x", "inner": 5}, "test: inner: expected keys and values, got int 5"),
        ({"path": "x", "inner": {"size": 1.5}}, "test: inner: size is 1.5, expected int"),
        ({"path": "x", "inner": {"size": True}}, "test: inner: size is True, expected int"),
        ({"path": "x", "inner": {"names": "abc"}}, "test: inner: names is 'abc', expected"),
        ({"path": "x", "inner": {"names": ["a", 1]}}, "test: inner: names is 1, expected str"),
        ({"path": "x", "maybe": "no"}, "test: maybe is 'no', expected"),
        ({"path": "x", "steps": 1.5}, "test: steps is 1.5, expected"),
        ({"path": "x", "steps": [1, "2"]}, "test: steps is [1, '2'], expected"),
        ({"path": "x", "kind": "cosine"}, "test: kind is 'cosine', expected 'linear' or 'constant'"),
        ({"path": "x", "kind": ["linear"]}, "test: kind is ['linear'], expected 'linear' or 'constant'"),
        ({"path": "x", "flag": 1}, "test: flag is 1, expected bool"),
        ({"path": "x", "weights": {"a": "b"}}, "test: weights is 'b', expected a finite number"),
        (["path"], "test: expected keys and values, got list ['path']"),
        (None, "test: expected keys and values, got NoneType None"),
    ],
)
def test_errors_name_the_place_and_the_remedy(values: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        from_dict(Outer, values, "test")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_values_that_the_dataclass_refuses() -> None:
    with pytest.raises(InputError, match="norm_groups 32 must divide the width 20"):
        from_dict(AutoencoderConfig, {"width": 20}, "test")


def test_the_kind_chooses_the_backbone() -> None:
    """A backbone that names no kind is a masked one: files written before there was a choice."""
    assert from_dict(NetworkConfig, {"backbone": {"encoder_depth": 3}}, "x").backbone == MaskedConfig(
        encoder_depth=3
    )
    assert from_dict(NetworkConfig, {"backbone": {"kind": "masked"}}, "x").backbone == MaskedConfig()
    assert from_dict(
        NetworkConfig, {"backbone": {"kind": "causal", "depth": 3}}, "x"
    ).backbone == CausalConfig(depth=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "casual"}, "test: backbone: kind is 'casual', expected 'masked' or 'causal'"),
        ({"kind": ["causal"]}, "test: backbone: kind is ['causal'], expected 'masked' or 'causal'"),
        ({"kind": "causal", "encoder_depth": 3}, "test: backbone: unknown key 'encoder_depth'"),
        ({"kind": "causal", "heads": 5}, "test: backbone: width 768 must be a positive multiple of heads 5"),
        (5, "test: backbone is 5, expected"),
    ],
)
def test_wrong_backbones(values: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        from_dict(NetworkConfig, {"backbone": values}, "test")
    assert str(caught.value).startswith(message)


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
    with pytest.raises(InputError, match="training") as refused:
        load_recipe(recipe)
    assert str(recipe) in str(refused.value)
    assert "\n" not in str(refused.value)
