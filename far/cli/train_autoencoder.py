"""Train the autoencoder of a recipe; --resume goes on where a run stopped.

Writes the recipe's run folder: autoencoder/config.json and autoencoder.safetensors with measured scale
and shift, PSNR and reconstruction distance on held-out images, reconstructions.png and log.jsonl.
"""

import argparse
from pathlib import Path

from far.cli.machine_arguments import add_machine_arguments, with_machine
from far.cli.recipe_arguments import add_recipe_arguments, check_made, read_recipe
from far.devices import TRAINING_DTYPES
from far.errors import InputError
from far.processes import joined
from far.training.runs import check_unused


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_machine_arguments(parser, TRAINING_DTYPES, recipe=True)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")


def run(arguments: argparse.Namespace) -> None:
    recipe = read_recipe(arguments)
    if recipe.autoencoder_from is not None:
        raise InputError(
            f"{arguments.recipe} takes its autoencoder from {recipe.autoencoder_from}; to train one: autoencoder_from=null"
        )
    config = recipe.autoencoder
    check_made(recipe, arguments)
    check_unused(recipe.autoencoder_folder, arguments.resume)

    from far.training.autoencoder import AutoencoderTask
    from far.training.loop import resolve_loop, train

    with joined() as processes:
        training = resolve_loop(
            with_machine(config.training, arguments), recipe.autoencoder_folder, processes
        )
        task = AutoencoderTask(config.model, config.loss, Path(recipe.data), training)
        train(task, training, recipe.autoencoder_folder, resume=arguments.resume, processes=processes)
        if (
            processes.rank == 0 and task.results
        ):  # none if it was interrupted before its first evaluation, or was trained already
            print(
                f"{recipe.autoencoder_folder}: "
                + ", ".join(f"{name} {value:.4g}" for name, value in task.results.items())
            )
