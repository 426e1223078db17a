"""Distill a trained model, such as a converted MAR, into a head that draws a token in one or two steps.

Computes the teacher's conditions and trajectories into OUT/trajectories, then trains a flow-map head on them.
--resume continues an interrupted run. Ctrl-C saves a checkpoint and exits with status 130, SIGTERM with 143.
far generate --weights can load OUT at any time. torchrun --nproc-per-node N -m far distill … shares
trajectories and the micro-batches of each step among processes.
"""

import argparse
import dataclasses
from pathlib import Path

from far.cli.machine_arguments import with_machine
from far.cli.recipe_arguments import add_training_arguments
from far.errors import InputError
from far.names import find_folder
from far.notices import noticed
from far.processes import joined
from far.recipe import from_overrides
from far.training.config import DistillationConfig
from far.training.runs import check_unused


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    teacher = "folder, bundled name or OWNER/NAME[@REVISION] of a model with a diffusion or flow head"
    add("teacher", help=teacher)
    add("out", type=Path, help="folder of the distilled model, created if missing")
    example = "settings, such as training.steps=2000 or trajectories.images=50000"
    add("overrides", nargs="*", metavar="KEY=VALUE", help=example)
    latents = "latent cache of the teacher's data (default: the teacher generates the images)"
    add("--latents", type=Path, help=latents)
    add_training_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    config = from_overrides(DistillationConfig(), arguments.overrides)
    folder = find_folder(arguments.teacher)
    out, latents = arguments.out, arguments.latents
    # Check before the trajectories, which take long.
    if out.resolve() == folder.resolve():
        raise InputError(f"{out} is the teacher and would be overwritten. Choose another folder")
    if (out / "config.json").exists() and not (out / "trajectories").exists():
        raise InputError(f"{out} holds another model, which would be overwritten. Choose another folder")
    check_unused(out, arguments.resume)
    if latents is not None and not (latents / "index.json").exists():
        raise InputError(f"{latents} holds no latents. Give the folder of far cache, or omit --latents")

    from far.training.distillation import DistillationTask
    from far.training.loop import resolve_loop, train
    from far.training.trajectories import load_teacher, write_trajectories

    with joined() as processes:
        processes.check_parts("training.micro_batches", config.training.micro_batches)
        training = resolve_loop(with_machine(config.training, arguments), out, processes)
        config = dataclasses.replace(config, training=training)
        with noticed(f"loading {arguments.teacher}"):
            teacher = load_teacher(folder, config.trajectories, training.device)
        trajectories = out / "trajectories"
        write_trajectories(teacher, folder, config.trajectories, trajectories, latents, processes)
        task = DistillationTask(teacher, config, trajectories)
        train(task, training, out, resume=arguments.resume, processes=processes)
        if processes.rank == 0:
            print(f"{out}: generate images with far generate --weights {out}")
