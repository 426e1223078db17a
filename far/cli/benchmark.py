"""Measure time, arithmetic and memory of generation by network, in a table that starts with MAR as released.

Without --models, the rows are MAR's base model at 64 × 100 steps in float32, the same in bfloat16, with the
shortcut head, with approximations, and with the block-causal and the causal backbone. They take less than ten
minutes: rows in a dtype that the device has no instructions for are left out, and so is a second round that
would end later.
On CUDA, the first row computes MAR's base model as MAR's code does, and rows in int8 are in bfloat16.
With --models, every combination of the given values is a row, and the first row is the base of ratios.
Presets have random weights, 64 AR steps and guidance 2.9: they show time, not quality.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import far
from far.autoencoder_config import DECODERS
from far.cli.machine_arguments import add_machine_arguments, prepare_machine, print_chosen
from far.cli.sampling_arguments import add_sampling_arguments, sampling_options
from far.devices import device_title
from far.errors import InputError
from far.files import check_suffix, check_writable, write_json
from far.precision import DTYPES

if TYPE_CHECKING:
    import torch

    from far.benchmark import Row

# Sampling options with one row per value, and those that do not change how long a generation takes.
_ROWS = ("ar_steps", "head_steps")
_NO_OPTIONS = (*_ROWS, "guidance_schedule", "guidance_interval", "temperature")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    several: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    add("--models", nargs="+", metavar="MODEL", help="presets (far-b …), bundled names, folders or hub names")
    add("--batch", **several, default=[1], help="images drawn together (default 1)")
    add("--ar-steps", **several, help="AR steps of masked and block-causal models (default: the model's)")
    add("--head-steps", **several, help="head steps (default: the model's)")
    add("--decoders", nargs="+", choices=DECODERS, help="decoders of the autoencoder (default full)")
    add("--dtypes", nargs="+", choices=DTYPES[1:], help="dtypes of the weights (default float32)")
    add_sampling_arguments(parser, without=_NO_OPTIONS)
    add("--rounds", type=int, metavar="N", help="timed rounds (default 2, or 1 if 2 take over 10 minutes)")
    add("--full", action="store_true", help="time all AR steps instead of a sample")
    add_machine_arguments(parser)
    add("--json", type=Path, metavar="FILE", help="also write all results and settings")
    add("--plot", type=Path, metavar="FILE", help="also write a PNG of the seconds by network")


def run(arguments: argparse.Namespace) -> None:
    _check(arguments)

    import torch

    from far.benchmark import SEED, measure, report

    device = prepare_machine(arguments)
    rows, left_out = _rows(arguments, device)
    print_chosen(device=(arguments.device, device_title(device)))
    results = measure(rows, rounds=arguments.rounds, full=arguments.full, device=device)
    print(report.heading(results, device))
    print(report.table(results))
    print(report.notes(results, left_out, arguments.rounds))
    if arguments.json is not None:
        options = {name: value for name, value in vars(arguments).items() if name != "run"}
        options |= {name: str(value) for name, value in options.items() if isinstance(value, Path)}
        versions = {"far": far.__version__, "torch": torch.__version__, "python": platform.python_version()}
        record: dict[str, Any] = {"settings": {**options, "seed": SEED}, "versions": versions}
        record |= {"command": ["far", *sys.argv[1:]], "left out": left_out, **report.record(results, device)}
        write_json(arguments.json, record)
        print(f"wrote {arguments.json}")
    if arguments.plot is not None:
        report.plot(results, arguments.plot)
        print(f"wrote {arguments.plot}")


def _check(arguments: argparse.Namespace) -> None:
    if arguments.rounds is not None and arguments.rounds < 1:
        raise InputError(f"--rounds {arguments.rounds} must be positive")
    check_suffix("--plot", arguments.plot, ".png")
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    if arguments.models is None:
        given = [name for name in ("dtypes", "decoders", *_ROWS) if getattr(arguments, name) is not None]
        given += sampling_options(arguments, without=(*_NO_OPTIONS, "guidance"))
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} needs --models. Name the models, or omit it")
    for path in filter(None, (arguments.json, arguments.plot)):
        check_writable(path)


def _rows(arguments: argparse.Namespace, device: torch.device) -> tuple[list[Row], dict[str, str]]:
    """Return the rows to run, and why the default rows of a dtype are left out."""
    from far.benchmark import rows
    from far.precision import resolve_dtype

    if arguments.models is None:
        cuda = device.type == "cuda"
        usual = rows.default_rows(batches=arguments.batch, guidance=arguments.guidance, cuda=cuda)
        return rows.usable_rows(usual, device)
    options = sampling_options(arguments, without=_NO_OPTIONS)
    options |= {"ar_steps": arguments.ar_steps, "head_steps": arguments.head_steps}
    options["decoders"] = arguments.decoders or ["full"]
    dtypes = arguments.dtypes or ["float32"]
    for dtype in dtypes:
        resolve_dtype(dtype, device)  # raises before anything is loaded
    return rows.rows_of(arguments.models, batches=arguments.batch, dtypes=dtypes, **options), {}
