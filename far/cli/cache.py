"""Encode a recipe's image set once into a latent cache; goes on where it stopped."""

import argparse
from pathlib import Path

from far.cli.recipe_arguments import add_recipe_arguments, read_recipe
from far.data.latents import write_latents
from far.weights import load_autoencoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    recipe = read_recipe(arguments)
    autoencoder = load_autoencoder(recipe.autoencoder_folder)
    device = recipe.generator.training.device
    write_latents(Path(recipe.data), autoencoder.to(device), recipe.latents_folder, device=device)
    print(f"{recipe.latents_folder}: moments of {recipe.autoencoder_folder}, both flips")
