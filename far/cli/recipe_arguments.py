"""Arguments of commands that take a recipe, and of commands that train."""

import argparse
import shlex
from pathlib import Path

from far.cli.machine_arguments import add_machine_arguments
from far.devices import TRAINING_DTYPES
from far.errors import InputError
from far.recipe import Recipe, load_recipe


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``recipe`` and ``overrides``."""
    add = parser.add_argument
    add("recipe", type=Path, help="YAML file, or name of a packaged recipe such as avatars-64")
    example = "values to change, such as generator.training.steps=1000"
    add("overrides", nargs="*", metavar="KEY=VALUE", help=example)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the machine and ``--resume``."""
    add_machine_arguments(parser, TRAINING_DTYPES, recipe=True)
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")


def read_recipe(arguments: argparse.Namespace) -> Recipe:
    return load_recipe(arguments.recipe, arguments.overrides)


def check_inputs(
    recipe: Recipe, arguments: argparse.Namespace, *, autoencoder: bool = False, latents: bool = False
) -> None:
    """Raise an :class:`InputError` that names the command to run first if an input of training is missing.

    Only existence is checked: of the image set, and on request of the autoencoder and the latent cache.
    """
    same = shlex.join([str(arguments.recipe), *arguments.overrides])
    tokenizer = recipe.autoencoder_folder if autoencoder else None
    check_image_set(recipe.data)
    if isinstance(tokenizer, Path) and not (tokenizer / "config.json").exists():
        raise InputError(f"{tokenizer} holds no autoencoder. Train it first: far train-autoencoder {same}")
    if latents and not (recipe.latents_folder / "index.json").exists():
        raise InputError(f"{recipe.latents_folder} holds no latents. Make them first: far cache {same}")


def check_image_set(data: str) -> None:
    """Raise an :class:`InputError` that names the command to run first unless ``data`` holds an image set."""
    for part in ("train", "held-out"):
        if not (Path(data) / part / "index.json").exists():
            command = f"far data IMAGES {shlex.quote(data)}"
            others = "or far data avatars, far data fashion-mnist"
            raise InputError(f"{data} holds no image set. Write it first: {command} ({others})")
