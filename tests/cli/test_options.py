"""Options of the command line, which change only on purpose, and recipes."""

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch

from far.autoencoder_config import AutoencoderConfig
from far.cli import sampling_arguments
from far.cli.main import build_parser, parse
from far.errors import InputError
from far.folder import load_autoencoder
from far.model import FAR, ModelConfig, preset
from far.recipe import load_recipe, recipe_names
from far.sampling_config import SamplingConfig

ROOT = Path(__file__).parents[2]
# Values that far benchmark does not take.
LEFT_OUT = ("guidance_schedule", "guidance_interval", "temperature")
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


def test_options_equal_the_frozen_list() -> None:
    assert options(build_parser(), "far") == FROZEN.read_text().splitlines()


@pytest.mark.parametrize(
    "command",
    [
        ["generate"],
        ["evaluate", "--weights", "a"],
        ["edit", "a", "--label", "0", "--mask", "a"],
        ["benchmark"],
    ],
    ids=lambda command: command[0],
)
def test_a_new_field_of_sampling_becomes_an_option_of_every_command_that_draws(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    @dataclasses.dataclass(frozen=True)
    class Extended(SamplingConfig):
        """Sampling options and one more.

        Attributes:
            swirl: turns the image by N %.
        """

        swirl: float = 0.0

    monkeypatch.setattr(sampling_arguments, "SamplingConfig", Extended)
    arguments = parse([*command, "--swirl", "0.5"])
    assert sampling_arguments.sampling_options(arguments, without=LEFT_OUT) == {"swirl": 0.5}
    with pytest.raises(SystemExit):
        parse([command[0], "--help"])
    assert "turns the image by N %" in capsys.readouterr().out


# Autoencoders that a clone does not have. Stable Diffusion's has our networks in other sizes.
ABSENT = {
    "kl16": AutoencoderConfig(),
    "diffusers:stabilityai/sd-vae-ft-mse": AutoencoderConfig(
        width_multipliers=(1, 2, 4, 4), latent_channels=4
    ),
}


@pytest.mark.parametrize("path", [*recipe_names(), *sorted((ROOT / "recipes").rglob("*.yaml"))], ids=str)
def test_recipes_load_and_build_and_their_sampling_options_are_valid(path: Path | str) -> None:
    recipe = load_recipe(path)
    autoencoder = ABSENT.get(recipe.autoencoder_from or "", recipe.autoencoder.model)
    if recipe.autoencoder_from not in (None, *ABSENT):
        autoencoder = load_autoencoder(recipe.autoencoder_folder).config
    name = Path(recipe.data).name
    side = (32 if name == "fashion-mnist" else int(name.rpartition("-")[2])) // autoencoder.stride
    config = ModelConfig(recipe.generator.network, 16, autoencoder.latent_channels, (side, side))
    with torch.device("meta"):
        recipe.generator.sampling.check(FAR(config))


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("autoencoder", ["kl16", "sd"])
def test_recipes_for_photographs_have_the_sizes_of_their_preset(size: int, autoencoder: str) -> None:
    recipe = load_recipe(f"photos-{size}-{autoencoder}")
    network = dataclasses.replace(preset("far-bc-b"), patch=recipe.generator.network.patch)
    assert recipe.generator.network == network
    config = ModelConfig(
        network, 16, *((16, (size // 16,) * 2) if autoencoder == "kl16" else (4, (size // 8,) * 2))
    )
    assert (config.tokens, config.token_channels) == ((size // 16) ** 2, 16)


@pytest.mark.parametrize("words", ["--size 8 --strict photos out", "photos --size 8 out --strict"])
def test_options_of_far_data_may_come_before_the_source(words: str) -> None:
    arguments = parse(["data", *words.split()])
    assert (arguments.source, arguments.images, arguments.out) == ("from", "photos", Path("out"))
    assert (arguments.size, arguments.strict) == (8, True)


@pytest.mark.parametrize("command", [["train", "recipe.yaml"], ["distill", "teacher", "out"]])
def test_overrides_are_read_before_and_after_options(command: list[str]) -> None:
    arguments = parse([*command, "a=1", "--resume", "b=2", "c=3"])
    assert arguments.resume
    assert arguments.overrides == ["a=1", "b=2", "c=3"]
    assert parse([*command, "--resume", "b=2"]).overrides == ["b=2"]
    with pytest.raises(InputError, match="--resme"):
        parse([*command, "--resme", "b=2"])
