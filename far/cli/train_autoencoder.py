"""Train the autoencoder of a recipe. --resume continues an interrupted run.

Writes into autoencoder/ in the run folder: config.json with measured scale and shift of the latents, PSNR,
SSIM and reconstruction distances on held-out images; autoencoder.safetensors, reconstructions.png and
log.jsonl.
"""

import argparse
import dataclasses
from pathlib import Path

from far.cli.machine_arguments import with_machine
from far.cli.recipe_arguments import add_recipe_arguments, add_training_arguments, check_inputs, read_recipe
from far.errors import InputError
from far.processes import joined
from far.training.runs import check_unused


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_training_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    recipe = read_recipe(arguments)
    if recipe.autoencoder_from is not None:
        taken = f"{arguments.recipe} takes its autoencoder from {recipe.autoencoder_from}"
        raise InputError(f"{taken}. To train one, add autoencoder_from=null")
    folder = Path(recipe.run) / "autoencoder"
    check_inputs(recipe, arguments)
    check_unused(folder, arguments.resume)

    from far.training.autoencoder import AutoencoderTask
    from far.training.loop import resolve_loop, train

    with joined() as processes:
        training = resolve_loop(with_machine(recipe.autoencoder.training, arguments), folder, processes)
        config = dataclasses.replace(recipe.autoencoder, training=training)
        task = AutoencoderTask(config, Path(recipe.data), folder)
        results = train(task, training, folder, resume=arguments.resume, processes=processes)
        if processes.rank == 0 and results:  # empty if the run was already finished
            shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in results.items()}
            print(f"{folder}: {', '.join(f'{name} {value}' for name, value in shown.items())}")
