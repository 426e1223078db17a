"""Recipes: YAML files with the data and all settings of both trainings, and ``key=value`` overrides."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from far.config import from_dict, to_dict
from far.diffusers_config import PREFIX
from far.errors import InputError
from far.names import find_folder
from far.training.config import AutoencoderRecipe, GeneratorRecipe

RECIPES = Path(__file__).parent / "recipes"

# What yaml raises: for wrong syntax; for bytes that are not text and invalid dates; for unlimited nesting.
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Data, run folder, autoencoder and generator.

    Attributes:
        data: folder of an image set that ``far data`` wrote.
        run: folder that receives ``autoencoder/``, ``latents/`` and the model's folder.
        autoencoder: section of ``far train-autoencoder``.
        generator: section of ``far train``.
        autoencoder_from: a finished autoencoder to use instead of training one: a folder, bundled name or
            ``OWNER/NAME``, or one of diffusers, as ``diffusers:FOLDER`` or
            ``diffusers:OWNER/NAME[/SUBFOLDER][@REVISION]``.
        model: name of the model's folder within ``run``. Models of different names share a run's autoencoder
            and latents.
    """

    data: str
    run: str
    autoencoder: AutoencoderRecipe = AutoencoderRecipe()
    generator: GeneratorRecipe = GeneratorRecipe()
    autoencoder_from: str | None = None
    model: str = "model"

    def __post_init__(self) -> None:
        for name in (self.data, self.run, self.autoencoder_from or "", self.model):
            if "\0" in name:
                raise InputError(f"the path {name!r} contains a null character. Remove it")
        place = Path(self.model)
        taken = place.parts[:1] in ((), ("autoencoder",), ("latents",))
        if taken or place.is_absolute() or ".." in place.parts:
            raise InputError(f"model {self.model!r} is not a new folder in the run folder. Give a plain name")

    @property
    def autoencoder_folder(self) -> Path | str:
        """Folder of the autoencoder, or its name if it is one of diffusers.

        A model on the hub is downloaded unless it is cached.

        Raises:
            InputError: ``autoencoder_from`` does not name a folder or model.
        """
        own, other = Path(self.run) / "autoencoder", self.autoencoder_from
        if other is None:
            return own
        return other if other.startswith(PREFIX) else find_folder(other)

    @property
    def latents_folder(self) -> Path:
        return Path(self.run) / "latents"

    @property
    def model_folder(self) -> Path:
        return Path(self.run) / self.model


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the library, in alphabetical order."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name: Path | str) -> Path:
    """Return the file of the packaged recipe ``name``, or ``name`` as a path if it is a file or no recipe."""
    packaged = str(name) in recipe_names() and not Path(name).is_file()
    return RECIPES / f"{name}.yaml" if packaged else Path(name)


class _UniqueKeys(yaml.SafeLoader):
    """YAML loader of plain values that rejects a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(f"the key {key.value!r} is in lines {lines[key.value]} and {line}")
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def load_recipe(name: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: a YAML file, or one of :func:`recipe_names`.

    Args:
        name: the file or the name.
        overrides: ``dotted.key=value`` with the value in YAML, applied in order.

    Raises:
        InputError: the file is missing or not YAML, or a key or value is wrong.
    """
    path, names = find_recipe(name), ", ".join(recipe_names())
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise InputError(f"recipe {path}: {error.strerror}. Give a YAML file, or one of: {names}") from error
    except _NOT_YAML as error:
        raise InputError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"recipe {path} holds no keys. far recipe NAME prints an example ({names})")
    for override in overrides:
        _apply(values, override, str(path))
    return from_dict(Recipe, values, str(path))


def from_overrides(default: T, overrides: Sequence[str]) -> T:
    """Return a copy of the dataclass ``default`` with values replaced by ``dotted.key=value`` overrides.

    Raises:
        InputError: a key or value is wrong.
    """
    values = to_dict(default)
    for override in overrides:
        _apply(values, override, "the command line")
    return from_dict(type(default), values, "the command line")


def _apply(values: dict[str, Any], override: str, source: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        example = "Write generator.training.steps=1000, for example"
        raise InputError(f"override {override!r} is not dotted.key=value. {example}")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise InputError(f"override {override!r}: {parent!r} is a value in {source}. Give another key")
    try:
        values[last] = yaml.safe_load(text)
    except _NOT_YAML as error:
        raise InputError(f"override {override!r}: {text!r} is not valid YAML") from error
