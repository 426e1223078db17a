"""Train the generator of a recipe on its latent cache; --resume goes on where a run stopped.

torchrun --nproc-per-node N -m far train … shares every step's micro-batches among processes.
Ctrl-C saves a checkpoint and exits. The run folder's model/ can be given to far generate --weights at
any time; it holds the EMA weights of the last checkpoint.
"""

import argparse
from pathlib import Path

from far.cli.machine_arguments import add_machine_arguments, with_machine
from far.cli.recipe_arguments import add_recipe_arguments, check_made, read_recipe
from far.devices import TRAINING_DTYPES
from far.processes import joined
from far.training.runs import check_unused


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_machine_arguments(parser, TRAINING_DTYPES, recipe=True)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")


def run(arguments: argparse.Namespace) -> None:
    recipe = read_recipe(arguments)
    config = recipe.generator
    check_made(recipe, arguments, autoencoder=True, latents=True)
    check_unused(recipe.model_folder, arguments.resume)

    from far.folder import load_autoencoder
    from far.training.generator import GeneratorTask
    from far.training.loop import resolve_loop, train

    with joined() as processes:
        training = resolve_loop(with_machine(config.training, arguments), recipe.model_folder, processes)
        task = GeneratorTask(
            config.network,
            config.sampling,
            config.evaluation,
            training,
            label_drop=config.label_drop,
            images=Path(recipe.data),
            latents=recipe.latents_folder,
            autoencoder=load_autoencoder(recipe.autoencoder_folder, device="cpu"),
            frozen_backbone=config.frozen_backbone,
        )
        train(task, training, recipe.model_folder, resume=arguments.resume, processes=processes)
        if processes.rank == 0:
            print(f"{recipe.model_folder}: draw from it with far generate --weights {recipe.model_folder}")
