"""The command line's options, frozen: a new one is a decision. And every recipe and README block is valid."""

import argparse
import re
from pathlib import Path

import pytest

from far.cli.main import build_parser
from far.model import FAR, ModelConfig
from far.recipe import load_recipe
from far.weights import load_autoencoder

ROOT = Path(__file__).parents[2]
FROZEN = Path(__file__).with_name("options.txt")


def options(parser: argparse.ArgumentParser, name: str) -> list[str]:
    lines = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, child in action.choices.items():
                lines += options(child, f"{name} {command}")
        elif not isinstance(action, argparse._HelpAction):
            lines.append(f"{name} {' '.join(action.option_strings) or action.dest}")
    return lines


def test_options_are_those_of_the_frozen_file() -> None:
    assert options(build_parser(), "far") == FROZEN.read_text().splitlines()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_recipes_load_and_their_samplers_fit(path: Path) -> None:
    recipe = load_recipe(path)
    autoencoder = recipe.autoencoder.model
    if recipe.autoencoder_from:
        autoencoder = load_autoencoder(ROOT / recipe.autoencoder_from).config
    side = {"avatars-64": 64, "avatars-32": 32, "fashion-mnist": 32}[Path(recipe.data).name] // autoencoder.stride
    config = ModelConfig(recipe.generator.network, 16, autoencoder.latent_channels, (side, side))
    recipe.generator.sampling.check(FAR(config))


@pytest.mark.parametrize("document", ["README.md", "docs/hub.md"])
def test_the_documents_commands_parse(document: str) -> None:
    text = (ROOT / document).read_text()
    commands = re.findall(r"^far (.+)$", "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)), re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        build_parser().parse_args(command.split("#")[0].split())


def test_readme_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
