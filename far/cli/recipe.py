"""List the packaged recipes, print one, write one that fits your images, or explain all keys.

far recipe NAME > mine.yaml writes a copy to edit. far train-autoencoder, cache and train also take the name.
far recipe new --data SET --minutes N --out mine.yaml measures this machine for about a minute, and chooses
sizes and steps so that autoencoder, cache and generator take N minutes together.
"""

import argparse
import shutil
import sys
from pathlib import Path

from far.cli.machine_arguments import add_machine_arguments
from far.cli.recipe_arguments import check_image_set
from far.devices import set_threads
from far.errors import InputError
from far.files import atomic_path, check_writable
from far.recipe import RECIPES, recipe_names
from far.recipe_keys import as_text

_NEW = "new"
_MOST_MINUTES = 10**6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", nargs="?", help="recipe to print, or the word new (default: list all)")
    add("--keys", action="store_true", help="print all keys with type, default and meaning")
    add("--data", metavar="SET", help="new: folder of the image set that far data wrote")
    add("--minutes", type=float, metavar="N", help="new: time for autoencoder, cache and generator together")
    add("--out", type=Path, metavar="FILE", help="new: file to write (default: print the recipe)")
    add_machine_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    if arguments.name == _NEW and not arguments.keys:
        _new(arguments)
        return
    for option in ("data", "minutes", "out", "device", "threads"):
        if getattr(arguments, option) not in (None, "auto"):
            raise InputError(f"--{option} belongs to far recipe new. Write the word new, or omit the option")
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
        raise InputError(f"recipe {arguments.name!r} does not exist. Choose one of: new, {', '.join(texts)}")


def _new(arguments: argparse.Namespace) -> None:
    """Measure this machine, write or print a recipe, and print its duration."""
    data, minutes, out = arguments.data, arguments.minutes, arguments.out
    if data is None or minutes is None:
        raise InputError("far recipe new needs an image set and a time. Give --data SET --minutes N")
    if not 0 < minutes <= _MOST_MINUTES:
        raise InputError(f"--minutes {minutes:g} is out of range. Give more than 0, up to {_MOST_MINUTES:,}")
    check_image_set(data)
    if out is not None:
        if out.exists():
            raise InputError(f"{out} exists. Remove it, or give another --out")
        check_writable(out)
    if arguments.threads is not None:
        set_threads(arguments.threads)

    from far.recipe_new import new_recipe

    text, lines = new_recipe(Path(data), minutes, arguments.device, out or Path("mine.yaml"))
    if out is None:
        print(text, end="")
    else:
        with atomic_path(out) as temporary:
            temporary.write_text(text, encoding="utf-8")
    for line in lines:
        print(f"{out or 'far'}: {line}", file=sys.stderr if out is None else sys.stdout)
