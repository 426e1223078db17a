"""Options for device, dtype and threads, shared by all commands that compute."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from far.devices import check_device_name, check_threads, set_threads
from far.errors import InputError
from far.processes import Processes
from far.training.config import LoopConfig

if TYPE_CHECKING:
    import torch

DEVICE_HELP = "auto, cpu, cuda, cuda:1 …, mps or xpu"


def add_machine_arguments(
    parser: argparse.ArgumentParser,
    dtypes: Sequence[str] = (),
    dtype: str | None = "auto",
    *,
    recipe: bool = False,
) -> None:
    """Add ``--device`` and ``--threads``, and ``--dtype`` if there are ``dtypes`` to choose from.

    Args:
        parser: receives the options.
        dtypes: names to choose from.
        dtype: the default.
        recipe: take the defaults of device and dtype from the recipe.
    """
    device, default = (None, "the recipe's") if recipe else ("auto", "auto: a GPU if there is one")
    parser.add_argument(
        "--device", type=_device, metavar="NAME", default=device, help=f"{DEVICE_HELP} (default {default})"
    )
    if dtypes:
        if recipe:
            dtype, meaning = None, "dtype of training (default the recipe's)"
        else:
            auto = ": bfloat16 if the device supports it natively, else float32" if dtype == "auto" else ""
            meaning = f"dtype of the weights (default {dtype}{auto})"
        parser.add_argument("--dtype", choices=dtypes, default=dtype, help=meaning)
    parser.add_argument(
        "--threads",
        type=_threads,
        metavar="N",
        help="CPU threads (default: OMP_NUM_THREADS, or one per core)",
    )


def prepare_machine(arguments: argparse.Namespace, processes: Processes = Processes()) -> torch.device:
    """Set the number of threads and return the device of this process.

    Raises:
        InputError: the device does not work on this machine.
    """
    if arguments.threads is not None:
        set_threads(arguments.threads)
    return processes.device(arguments.device)


def print_chosen(**values: tuple[str, str]) -> None:
    """Print one line on stderr with what ``auto`` stands for: ``name=(given, chosen)``."""
    if chosen := [f"{name} {value}" for name, (given, value) in values.items() if given == "auto"]:
        print(f"far: {', '.join(chosen)} (chosen automatically)", file=sys.stderr)


def with_machine(config: LoopConfig, arguments: argparse.Namespace) -> LoopConfig:
    """Set the number of threads, and return training settings with the given device and dtype."""
    if arguments.threads is not None:
        set_threads(arguments.threads)
    given = {name: getattr(arguments, name, None) for name in ("device", "dtype")}
    return dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})


def _device(text: str) -> str:
    try:
        check_device_name(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _threads(text: str) -> int:
    if not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"threads {text!r} is not a whole number")
    try:
        check_threads(int(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return int(text)
