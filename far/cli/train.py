"""Train the generator of a recipe on its latent cache. --resume continues an interrupted run.

torchrun --nproc-per-node N -m far train … shares the micro-batches of each step among processes. Ctrl-C saves
a checkpoint and exits with status 130, SIGTERM with 143. The model folder in the run folder holds the EMA
weights of the last checkpoint; far generate --weights can load it at any time.
"""

import argparse
import dataclasses
from pathlib import Path

from far.cli.machine_arguments import with_machine
from far.cli.recipe_arguments import add_recipe_arguments, add_training_arguments, check_inputs, read_recipe
from far.processes import joined
from far.training.runs import check_unused


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_training_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    recipe = read_recipe(arguments)
    folder = recipe.model_folder
    check_inputs(recipe, arguments, autoencoder=True, latents=True)
    check_unused(folder, arguments.resume)

    from far.folder import load_autoencoder
    from far.training.generator import GeneratorTask
    from far.training.loop import resolve_loop, train

    with joined() as processes:
        training = resolve_loop(with_machine(recipe.generator.training, arguments), folder, processes)
        config = dataclasses.replace(recipe.generator, training=training)
        autoencoder = load_autoencoder(recipe.autoencoder_folder, device="cpu")
        task = GeneratorTask(config, Path(recipe.data), recipe.latents_folder, autoencoder, folder)
        if processes.rank == 0 and "started from" in task.training:
            print(f"{folder}: started from {task.training['started from']}")
        train(task, training, folder, resume=arguments.resume, processes=processes)
        if processes.rank == 0:
            print(f"{folder}: generate images with far generate --weights {folder}")
