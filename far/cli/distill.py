"""Give a trained model, such as a converted MAR, a head that draws a token in one or two steps; --resume goes on.

First the teacher's conditions and trajectories are computed and kept in OUT/trajectories, then a flow-map head learns
them. Ctrl-C saves a checkpoint and exits. OUT can be given to far generate --weights at any time.
torchrun --nproc-per-node N -m far distill … shares trajectories and every step's micro-batches among processes.
"""

import argparse
import dataclasses
from pathlib import Path

from far.cli.machine_arguments import add_machine_arguments, with_machine
from far.devices import TRAINING_DTYPES
from far.errors import InputError
from far.names import find_folder
from far.notices import noticed
from far.processes import joined
from far.recipe import from_overrides
from far.training.config import DistillationConfig
from far.training.runs import check_unused


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "teacher",
        help="folder, bundled name or OWNER/NAME[@REVISION] of a model with a diffusion or flow head",
    )
    parser.add_argument("out", type=Path, help="folder of the distilled model, made where missing")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="such as training.steps=2000 or trajectories.images=50000",
    )
    parser.add_argument(
        "--latents",
        type=Path,
        help="a latent cache of the teacher's data (default: the teacher draws images itself)",
    )
    add_machine_arguments(parser, TRAINING_DTYPES, recipe=True)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")


def run(arguments: argparse.Namespace) -> None:
    config = from_overrides(DistillationConfig(), arguments.overrides)
    folder = find_folder(arguments.teacher)
    # Before the trajectories, which take long.
    if arguments.out.resolve() == folder.resolve():
        raise InputError(f"{arguments.out} is the teacher, which would be overwritten; choose another folder")
    if (arguments.out / "config.json").exists() and not (arguments.out / "trajectories").exists():
        raise InputError(
            f"{arguments.out} holds another model, which would be overwritten; choose another folder"
        )
    check_unused(arguments.out, arguments.resume)
    if arguments.latents is not None and not (arguments.latents / "index.json").exists():
        raise InputError(
            f"{arguments.latents} holds no latents. Give the folder that far cache RECIPE wrote, or leave --latents out"
        )

    from far.training.distillation import DistillationTask
    from far.training.loop import resolve_loop, train
    from far.training.trajectories import load_teacher, write_trajectories

    with joined() as processes:
        processes.check_parts("training.micro_batches", config.training.micro_batches)
        training = resolve_loop(with_machine(config.training, arguments), arguments.out, processes)
        config = dataclasses.replace(config, training=training)
        with noticed(f"loading {arguments.teacher}"):
            teacher = load_teacher(folder, config.trajectories, training.device)
        write_trajectories(
            teacher, folder, config.trajectories, arguments.out / "trajectories", arguments.latents, processes
        )
        task = DistillationTask(teacher, config, arguments.out / "trajectories")
        train(task, training, arguments.out, resume=arguments.resume, processes=processes)
        if processes.rank == 0:
            print(f"{arguments.out}: draw from it with far generate --weights {arguments.out}")
