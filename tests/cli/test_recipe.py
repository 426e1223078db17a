"""``far recipe``: the packaged recipes, and every key with type, default and meaning."""

import dataclasses
import importlib.util
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from far.cli.main import main
from far.config import kinds_of, to_dict
from far.errors import InputError
from far.model_config import NetworkConfig
from far.recipe import Recipe, find_recipe, from_overrides, load_recipe, recipe_names
from far.recipe_keys import Section, as_text, sections
from far.training.config import DistillationConfig

ROOT = Path(__file__).parents[2]
# Keys that users change: data, length, speed, size and sampling.
CHANGED = {
    "data", "run", "autoencoder_from", "frozen_backbone", "steps", "learning_rate", "checkpoint_every",
    "evaluate_every", "ema_decay",
    "patch", "label_drop", "model", "loss", "backbone", "head", "sampling", "evaluation",
}  # fmt: skip


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["recipe", *arguments]) == 0
    return capsys.readouterr().out


def test_every_packaged_recipe_is_listed_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys).splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert {"avatars-32", "avatars-64", "imagenet-256"} <= set(recipe_names())
    assert all(len(line.split()) > 5 for line in lines)


def test_files_of_the_same_name_are_not_printed_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [printed(capsys), printed(capsys, "avatars-64")]
    monkeypatch.chdir(tmp_path)
    Path("avatars-64").write_text("mine")
    assert [printed(capsys), printed(capsys, "avatars-64")] == before


@pytest.mark.parametrize("name", recipe_names())
def test_printed_recipe_is_the_packaged_one(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(printed(capsys, name), encoding="utf-8")
    assert load_recipe(tmp_path / "mine.yaml") == load_recipe(name)


@pytest.mark.parametrize("name", recipe_names())
def test_values_that_users_change_have_a_comment(name: str) -> None:
    lines = find_recipe(name).read_text(encoding="utf-8").splitlines()
    for before, line in zip(["", *lines], lines):
        if line.split(":")[0].strip() in CHANGED and not line.startswith("#"):
            assert "#" in line or before.strip().startswith("#"), line


def test_unknown_recipe_and_a_name_with_keys_are_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, named in (
        (["avatars"], "'avatars'"),
        ([""], "''"),
        (["avatars-64", "--keys"], "'avatars-64'"),
    ):
        assert main(["recipe", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert named in error


@pytest.mark.parametrize(
    "model", ["''", ".", "..", "../other", "a/../..", "/tmp/model", "latents", "autoencoder", "latents/a"]
)
def test_model_must_name_its_own_folder_within_the_run(model: str) -> None:
    with pytest.raises(InputError) as error:
        load_recipe("avatars-64", [f"model={model}"])
    assert repr(model.strip("'")) in str(error.value)
    assert "\n" not in str(error.value)
    for good in ("wide", "wide/2", "latents-2", "my..model"):
        assert load_recipe("avatars-64", [f"model={good}"]).model == good


# --- Keys ---------------------------------------------------------------------------------------------


def leaves(values: dict[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"}
    return found


def listed(command: str) -> list[Section]:
    return [section for section in sections() if section.command == command]


def test_all_keys_of_recipes_and_distillation_are_listed() -> None:
    names = {key.name for section in listed("a recipe") for key in section.keys}
    recipes = [
        of_kind(Recipe("", ""), section.name, section.kind) for section in listed("a recipe") if section.kind
    ]
    assert names == set().union(*(leaves(to_dict(recipe)) for recipe in recipes))
    names = {key.name for section in listed("far distill") for key in section.keys}
    assert names == leaves(to_dict(DistillationConfig()))


@pytest.mark.parametrize(
    "section", sections(), ids=lambda section: f"{section.command} {section.name} {section.kind}"
)
def test_listed_defaults_are_accepted_as_overrides_and_change_nothing(section: Section) -> None:
    default: Any = DistillationConfig() if section.command == "far distill" else Recipe("data", "run")
    if section.kind:
        default = of_kind(default, section.name, section.kind)
    for key in section.keys:
        if key.default is not None:
            assert from_overrides(default, [f"{key.name}={key.default}"]) == default, key.name


def of_kind(recipe: Recipe, section: str, kind: str) -> Recipe:
    """Return ``recipe`` with the default backbone or head of a kind."""
    part = section.rpartition(".")[2]
    config = kinds_of(typing.get_type_hints(NetworkConfig)[part])[kind]()
    network = dataclasses.replace(recipe.generator.network, **{part: config})
    return dataclasses.replace(recipe, generator=dataclasses.replace(recipe.generator, network=network))


@pytest.mark.parametrize(
    "section", sections(), ids=lambda section: f"{section.command} {section.name} {section.kind}"
)
def test_every_key_has_a_meaning_in_a_sentence(section: Section) -> None:
    assert section.summary
    for key in section.keys:
        assert len(key.meaning.split()) > 1, key.name
        assert key.meaning.endswith("."), key.name


def test_required_keys_have_no_default() -> None:
    required = {key.name for section in sections() for key in section.keys if key.default is None}
    assert required == {
        field.name for field in dataclasses.fields(Recipe) if field.default is dataclasses.MISSING
    }


def test_printed_keys_fit_the_terminal_and_name_types_and_choices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = printed(capsys, "--keys").splitlines()
    assert max(map(len, lines)) <= 100
    after = lines[lines.index("  generator.training.schedule") + 1]
    assert after.strip().startswith("constant, cosine, wsd; default constant.")
    assert "\n".join(lines) + "\n" == as_text(100)


def test_the_page_of_keys_is_up_to_date() -> None:
    """Written again by: python docs/recipe_keys.py."""
    spec = importlib.util.spec_from_file_location("recipe_keys_script", ROOT / "docs" / "recipe_keys.py")
    script = importlib.util.module_from_spec(typing.cast(Any, spec))
    typing.cast(Any, spec).loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page()


def test_recipes_are_yaml_with_short_lines() -> None:
    for name in recipe_names():
        text = find_recipe(name).read_text(encoding="utf-8")
        assert isinstance(yaml.safe_load(text), dict)
        assert max(map(len, text.splitlines())) <= 140
