"""The arguments that every command with a recipe shares."""

import argparse
import shlex
from pathlib import Path

from far.errors import InputError
from far.recipe import Recipe, load_recipe


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", type=Path, help="YAML file, or the name of a packaged recipe, such as avatars-64"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="overrides, such as generator.training.steps=1000"
    )


def read_recipe(arguments: argparse.Namespace) -> Recipe:
    return load_recipe(arguments.recipe, arguments.overrides)


def check_made(
    recipe: Recipe, arguments: argparse.Namespace, *, autoencoder: bool = False, latents: bool = False
) -> None:
    """Raise an :class:`InputError` that names the command to run first if what a training reads is missing.

    The image set is always needed, ``autoencoder`` and ``latents`` on request. Their content is checked when it is read.
    """
    same = shlex.join([str(arguments.recipe), *arguments.overrides])
    tokenizer = recipe.autoencoder_folder if autoencoder else None  # one of another run must be there
    for part in ("train", "held-out"):
        if not (Path(recipe.data) / part / "index.json").exists():
            raise InputError(
                f"{recipe.data} holds no image set. Make it first: far data folder IMAGES {shlex.quote(recipe.data)} "
                "(or far data avatars, far data fashion-mnist)"
            )
    if tokenizer is not None and not (tokenizer / "config.json").exists():
        raise InputError(f"{tokenizer} holds no autoencoder. Train it first: far train-autoencoder {same}")
    if latents and not (recipe.latents_folder / "index.json").exists():
        raise InputError(f"{recipe.latents_folder} holds no latents. Make them first: far cache {same}")
