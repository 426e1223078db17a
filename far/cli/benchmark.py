"""Tell where the time of generation goes on this machine, against MAR as released, in one table.

Without --models, MAR's base model at 64 × 100 steps in float32 is compared with it in bfloat16, with the shortcut head,
with approximations, and with the causal backbone, in less than ten minutes. Rows in a dtype that the device has no
instructions for are left out, and so is a second round that would end later. With --models, every combination of the given
values is a row, and the first is the base. Presets have random weights: this is about time, not quality.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import platform
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import far
from far.cli.machine_arguments import add_machine_arguments, prepare_machine, tell_chosen
from far.cli.sampling_arguments import add_sampling_arguments, sampling_options
from far.devices import device_title
from far.errors import InputError
from far.files import atomic_path, check_writable, write_json
from far.precision import DTYPES

if TYPE_CHECKING:
    import torch

    from far.benchmark import Finding, Report, Row

# Options whose values are rows of their own, and those that do not change how long a generation takes.
_ROWS = ("ar_steps", "head_steps")
_SAME_TIME = ("guidance_schedule", "guidance_interval", "temperature")
_COLOURS = ("#4c72b0", "#55a868", "#dd8452", "#8172b3", "#8c8c8c")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help="presets (far-b …), bundled names, folders (./far-b), hub names",
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1], metavar="N", help="images drawn together (default 1)"
    )
    parser.add_argument(
        "--ar-steps",
        type=int,
        nargs="+",
        metavar="N",
        help="values for masked models, one row each (default: the model's)",
    )
    parser.add_argument(
        "--head-steps", type=int, nargs="+", metavar="N", help="values, one row each (default: the model's)"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES[1:], help="of the weights (default float32)")
    add_sampling_arguments(parser, without=(*_ROWS, *_SAME_TIME))
    parser.add_argument(
        "--rounds",
        type=int,
        help="times that each row is timed, in turn (default 2, or 1 if 2 take over 10 minutes)",
    )
    parser.add_argument(
        "--full", action="store_true", help="time whole images; otherwise some AR steps stand for all"
    )
    add_machine_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures and settings")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw the seconds of each row by part, as PNG"
    )


def run(arguments: argparse.Namespace) -> None:
    _check(arguments)

    from far.benchmark import measure

    device = prepare_machine(arguments)
    rows, left_out = _rows(arguments, device)
    tell_chosen(device=(arguments.device, device_title(device)))
    report = measure(rows, rounds=arguments.rounds, full=arguments.full, device=device)
    print(_heading(report, arguments, device))
    print(_table(report))
    print(_notes(report, arguments, left_out))
    if arguments.json is not None:
        write_json(arguments.json, _record(report, arguments, device, left_out))
        print(f"wrote {arguments.json}")
    if arguments.plot is not None:
        _plot(report, arguments.plot)
        print(f"wrote {arguments.plot}")


def _check(arguments: argparse.Namespace) -> None:
    if arguments.rounds is not None and arguments.rounds < 1:
        raise InputError(f"--rounds {arguments.rounds} must be positive")
    if arguments.plot is not None and arguments.plot.suffix.lower() != ".png":
        raise InputError(f"--plot {arguments.plot}: give a name that ends in .png")
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    if arguments.models is None:
        given = [name for name in ("dtypes", *_ROWS) if getattr(arguments, name) is not None]
        given += [name for name in _options(arguments) if name != "guidance"]
        if given:
            raise InputError(
                f"--{given[0].replace('_', '-')} needs --models. Name the models, or omit it for the default rows"
            )
    for path in (arguments.json, arguments.plot):
        if path is not None:
            check_writable(path)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return sampling_options(arguments, without=(*_ROWS, *_SAME_TIME))


def _rows(arguments: argparse.Namespace, device: torch.device) -> tuple[list[Row], dict[str, str]]:
    """Return the rows to run, and why the usual ones of a dtype are left out."""
    from far.benchmark import default_rows, rows_of, usable_rows
    from far.precision import resolve_dtype

    if arguments.models is None:
        return usable_rows(default_rows(batches=arguments.batch, guidance=arguments.guidance), device)
    rows = rows_of(
        arguments.models,
        batches=arguments.batch,
        ar_steps=arguments.ar_steps,
        head_steps=arguments.head_steps,
        dtypes=arguments.dtypes or ["float32"],
        **_options(arguments),
    )
    for row in rows:
        resolve_dtype(row.dtype, device)  # refused before anything is loaded
    return rows, {}


def _heading(report: Report, arguments: argparse.Namespace, device: torch.device) -> str:
    from far.benchmark import SEED, machine

    scales = " or ".join(dict.fromkeys(f"{finding.row.sampling.guidance:g}" for finding in report.findings))
    count = len(report.findings[0].rounds)
    rounds = f"{count} round{'s' if count > 1 else ''}"
    peaks = ", ".join(f"{peak / 1e12:.3g} TFLOP/s in {name}" for name, peak in report.peaks.items())
    where = "" if device.type == "cpu" else f"device {device_title(device)}, "
    return (
        f"Guidance {scales}, seed {SEED}, {rounds} in turn, {where}{machine()}; "
        f"measured: {report.bandwidth / 1e9:.3g} GB/s of reading, {peaks}.\n"
    )


def _table(report: Report) -> str:
    """Markdown, padded so that it can be read as it is."""
    from far.benchmark import PARTS

    columns = (
        "model", "steps", "dtype", "batch", "seconds per image", *PARTS,
        "weights", "memory", "TFLOP", "of peak", "of reading", "times faster",
    )  # fmt: skip
    lines = [columns, *(_cells(finding, report) for finding in report.findings)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines
    ]
    return "\n".join([padded[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *padded[1:]])


def _cells(finding: Finding, report: Report) -> tuple[str, ...]:
    row, seconds = finding.row, finding.image_seconds
    shares = [f"{share:.0%}" if share else "–" for share in finding.shares.values()]
    return (
        row.model, _steps(finding), row.dtype, str(row.batch),
        f"{statistics.median(seconds):.4g} ({min(seconds):.4g} to {max(seconds):.4g})",
        *shares,
        _gigabytes(finding.weights), _gigabytes(finding.peak),
        f"{sum(finding.flop.values()) / row.batch / 1e12:.3g}",
        f"{finding.share_of_time(finding.fastest):.0%}", f"{finding.share_of_time(finding.reading):.0%}",
        f"{report.times_faster(finding):.2f}",
    )  # fmt: skip


def _steps(finding: Finding) -> str:
    """AR steps × head steps, and what else of the sampling is not as usual."""
    config = finding.row.sampling
    usual = dataclasses.asdict(type(config)())
    named = ("ar_steps", "head_steps", "guidance")
    unusual = [
        f", {name} {value}"
        for name, value in dataclasses.asdict(config).items()
        if name not in named and value != usual[name]
    ]
    head = (
        config.head_steps if isinstance(config.head_steps, int) else " to ".join(map(str, config.head_steps))
    )
    return f"{config.ar_steps} × {head}{''.join(unusual)}"


def _gigabytes(count: int | None) -> str:
    return (
        "–"
        if count is None
        else f"{count / 2**30:.3g} GB"
        if count >= 2**30 / 10
        else f"{count / 2**20:.3g} MB"
    )


def _notes(report: Report, arguments: argparse.Namespace, left_out: dict[str, str]) -> str:
    estimated = [finding for finding in report.findings if finding.estimated]
    steps = ", ".join(
        dict.fromkeys(f"{finding.timed_steps} of {finding.row.sampling.ar_steps}" for finding in estimated)
    )
    how = (
        f"Times are estimated: {steps} AR steps were timed, spread evenly, and stand for all; --full times whole images."
        if estimated
        else "Times are of whole images."
    )
    if arguments.rounds is None and len(report.findings[0].rounds) == 1:
        how += "\nA second round is left out, since it would have ended after more than 10 minutes; --rounds 2 runs it."
    if left_out:
        reasons = "; ".join(f"{dtype} ({reason})" for dtype, reason in left_out.items())
        how += f"\nLeft out are the usual rows in {reasons}; --models and --dtypes choose others."
    return f"""
{how}
Seconds: median (lowest to highest round); encoder … sampler: shares of them. A causal backbone decodes only.
Memory: the most that drawing and decoding a batch took beyond what was resident before, once torch's own kernels were made.
TFLOP: multiplications and additions an image; of peak: the share of time they would take at the speed of a large matrix product.
Of reading: the share of time that reading each network's weights once a pass would take."""


def _record(
    report: Report, arguments: argparse.Namespace, device: torch.device, left_out: dict[str, str]
) -> dict[str, Any]:
    import torch

    from far.benchmark import SEED, processor

    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name != "run"
    }
    return {
        "settings": {**options, "seed": SEED},
        "machine": {
            "processor": processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "platform": platform.platform(),
            "device": device_title(device),
            "threads": torch.get_num_threads(),
            "bytes read a second": report.bandwidth,
            "peak flop a second": report.peaks,
        },
        "versions": {"far": far.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "command": ["far", *sys.argv[1:]],
        "left out": left_out,
        "rows": [_row_record(finding, report) for finding in report.findings],
    }


def _row_record(finding: Finding, report: Report) -> dict[str, Any]:
    from far.benchmark import PARTS

    row, seconds = finding.row, finding.image_seconds
    return {
        **dataclasses.asdict(row),
        "estimated": finding.estimated,
        "timed ar steps": finding.timed_steps,
        "seconds per image": {
            "median": statistics.median(seconds),
            "minimum": min(seconds),
            "maximum": max(seconds),
        },
        "rounds": [{part: value / row.batch for part, value in parts.items()} for parts in finding.rounds],
        "shares": finding.shares,
        "weights bytes": finding.weights,
        "memory bytes": finding.peak,
        "first run's memory bytes": finding.first_peak,
        "flop per image": {part: finding.flop[part] / row.batch for part in PARTS},
        "share of peak": finding.share_of_time(finding.fastest),
        "share of reading": finding.share_of_time(finding.reading),
        "times faster": report.times_faster(finding),
    }


def _plot(report: Report, path: Path) -> None:
    """Seconds per image, a bar a row, stacked by part."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from far.benchmark import PARTS

    names = [f"{f.row.model}, {_steps(f)}\n{f.row.dtype}, batch {f.row.batch}" for f in report.findings]
    totals = [statistics.median(finding.image_seconds) for finding in report.findings]
    figure, panel = plt.subplots(figsize=(9, 1 + 0.6 * len(names)))
    places, left = range(len(names)), [0.0] * len(names)
    for part, colour in zip(PARTS, _COLOURS):
        widths = [total * finding.shares[part] for total, finding in zip(totals, report.findings)]
        panel.barh(places, widths, left=left, color=colour, label=part)
        left = [start + width for start, width in zip(left, widths)]
    for place, total, finding in zip(places, totals, report.findings):
        panel.text(
            total, place, f" {total:.3g} s, {report.times_faster(finding):.1f}×", va="center", fontsize=8
        )
    panel.set_yticks(places, names, fontsize=8)
    panel.invert_yaxis()
    panel.set(xlabel="seconds per image", xlim=(0, 1.2 * max(totals)))
    panel.legend(fontsize=8)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
