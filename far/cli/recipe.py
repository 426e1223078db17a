"""List the packaged recipes, print one, or explain all keys.

far recipe NAME > mine.yaml writes a copy to edit. far train-autoencoder, cache and train also take the name.
"""

import argparse
import shutil

from far.errors import InputError
from far.recipe import RECIPES, recipe_names
from far.recipe_keys import as_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="recipe to print (default: list all)")
    parser.add_argument("--keys", action="store_true", help="print all keys with type, default and meaning")


def run(arguments: argparse.Namespace) -> None:
    if arguments.keys and arguments.name is not None:
        raise InputError(f"--keys explains the keys of all recipes. Omit {arguments.name!r}")
    if arguments.keys:
        print(as_text(min(shutil.get_terminal_size().columns, 110)), end="")
        return
    texts = {name: (RECIPES / f"{name}.yaml").read_text(encoding="utf-8") for name in recipe_names()}
    if arguments.name is None:
        for name, text in texts.items():
            print(f"{name:{max(map(len, texts))}}  {text.splitlines()[0].removeprefix('# ')}")
    elif arguments.name in texts:
        print(texts[arguments.name], end="")
    else:
        raise InputError(f"recipe {arguments.name!r} does not exist. Choose one of: {', '.join(texts)}")
