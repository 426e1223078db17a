"""Options for device, dtype and threads, shared by all commands that compute."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from far.devices import check_device_name, check_threads, set_threads
from far.errors import InputError
from far.processes import Processes
from far.training.config import LoopConfig

if TYPE_CHECKING:
    import torch


def add_machine_arguments(
    parser: argparse.ArgumentParser, dtypes: Sequence[str] = (), dtype: str = "auto", *, recipe: bool = False
) -> None:
    """Add ``--device`` and ``--threads``, and ``--dtype`` if there are ``dtypes`` to choose from.

    With ``recipe``, the recipe has the defaults of device and dtype.
    """
    add = parser.add_argument
    device, default = (None, "the value in the recipe") if recipe else ("auto", "auto: a GPU if there is one")
    names = "auto, cpu, cuda, cuda:1 …, mps or xpu"
    add("--device", type=_device, metavar="NAME", default=device, help=f"{names} (default {default})")
    auto = ": bfloat16 if the device multiplies it faster, else float32" if dtype == "auto" else ""
    weights = f"dtype of the weights (default {dtype}{auto})"
    meaning = "dtype of training (default: the value in the recipe)" if recipe else weights
    if dtypes:
        add("--dtype", choices=dtypes, default=None if recipe else dtype, help=meaning)
    meaning = "CPU threads (default: OMP_NUM_THREADS, or one per core)"
    add("--threads", type=threads, metavar="N", help=meaning)


def prepare_machine(arguments: argparse.Namespace, processes: Processes = Processes()) -> torch.device:
    """Set the number of threads and return the device of this process, after a trial of it."""
    if arguments.threads is not None:
        set_threads(arguments.threads)
    return processes.device(arguments.device)


def print_chosen(**values: tuple[str, str]) -> None:
    """Print one line on stderr with the choices of ``auto``: ``name=(given, chosen)``."""
    if chosen := [f"{name} {value}" for name, (given, value) in values.items() if given == "auto"]:
        print(f"far: {', '.join(chosen)} (chosen automatically)", file=sys.stderr)


def with_machine(config: LoopConfig, arguments: argparse.Namespace) -> LoopConfig:
    """Set the number of threads, and return training settings with the given device and dtype."""
    if arguments.threads is not None:
        set_threads(arguments.threads)
    given = {name: getattr(arguments, name, None) for name in ("device", "dtype")}
    return dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})


@contextlib.contextmanager
def _as_argument_error() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _device(text: str) -> str:
    with _as_argument_error():
        check_device_name(text)
    return text


def threads(text: str) -> int:
    """Return a number of threads. Argparse shows this name in its message for a text that is not a number."""
    with _as_argument_error():
        check_threads(number := int(text))
    return number
