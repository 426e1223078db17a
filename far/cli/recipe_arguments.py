"""The arguments that every command with a recipe shares."""

import argparse
from pathlib import Path

from far.recipe import Recipe, load_recipe


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML file, or the name of a packaged recipe, such as avatars-64")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides, such as generator.training.steps=1000")


def read_recipe(arguments: argparse.Namespace) -> Recipe:
    return load_recipe(arguments.recipe, arguments.overrides)
