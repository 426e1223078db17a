"""Encode a recipe's image set once into a latent cache. The same command continues an interrupted one.

torchrun --nproc-per-node N -m far cache … shares the images among processes, and writes the same files.
"""

import argparse
from pathlib import Path

from far.cli.machine_arguments import add_machine_arguments, print_chosen, with_machine
from far.cli.recipe_arguments import add_recipe_arguments, check_inputs, read_recipe
from far.data.listing import describe
from far.devices import device_title
from far.processes import joined


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_machine_arguments(parser, recipe=True)


def run(arguments: argparse.Namespace) -> None:
    recipe = read_recipe(arguments)
    check_inputs(recipe, arguments, autoencoder=True)
    loop = with_machine(recipe.generator.training, arguments)

    from far.data.latents import write_latents
    from far.folder import load_autoencoder

    folder = recipe.autoencoder_folder
    autoencoder = load_autoencoder(folder, device="cpu")
    with joined() as processes:
        device = processes.device(loop.device)
        if processes.rank == 0:
            print_chosen(device=(loop.device, device_title(device)))
        images, latents = Path(recipe.data), recipe.latents_folder
        flip = recipe.generator.flip
        left_out = write_latents(images, autoencoder, latents, device=device, processes=processes, flip=flip)
        if processes.rank == 0:
            variants = "both flips" if flip else "not flipped"
            end = f"; left out: {describe(left_out)}" if left_out else ""
            print(f"{latents}: moments of {folder}, {variants}{end}")
