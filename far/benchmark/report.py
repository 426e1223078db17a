"""Presentation of a benchmark: a table with heading and notes, a record for JSON, a bar chart."""

import dataclasses
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from far.benchmark.hardware import cuda_settings, machine, processor
from far.benchmark.results import Report, RowResult
from far.benchmark.rows import SEED, Row
from far.benchmark.watch import PARTS
from far.devices import device_title
from far.files import atomic_path

_COLORS = ("#4c72b0", "#55a868", "#dd8452", "#8172b3", "#8c8c8c")


def heading(report: Report, device: torch.device) -> str:
    """Return one line with the settings that all rows share, the machine and its measured limits."""
    scales = " or ".join(dict.fromkeys(f"{result.row.sampling.guidance:g}" for result in report.results))
    count = len(report.results[0].rounds)
    where = "" if device.type == "cpu" else f"device {device_title(device)}, "
    if device.type == "cuda":
        where += _tf32(**cuda_settings())
    settings = f"Guidance {scales}, seed {SEED}, {count} round{'s' * (count > 1)} in turn, {where}{machine()}"
    peaks = "".join(f", {peak / 1e12:.3g} TFLOP/s in {name}" for name, peak in report.peaks.items())
    return f"{settings}. Measured: {report.bandwidth / 1e9:.3g} GB/s of reading{peaks}.\n"


def _tf32(**settings: Any) -> str:
    where = [name for name in ("products", "convolutions") if settings[f"tf32 {name}"]]
    return f"CUDA {settings['cuda']}, TF32 {'in ' + ' and '.join(where) if where else 'off'}, "


def table(report: Report) -> str:
    """Return a Markdown table, padded so that it is readable as text."""
    memory = ("memory", "GPU memory") if report.device.type == "cuda" else ("memory",)
    columns = (
        "model", "steps", "dtype", "batch", "seconds per image", *PARTS,
        "weights", *memory, "TFLOP", "of peak", "of reading", "times faster",
    )  # fmt: skip
    lines = [columns, *(_cells(result, report) for result in report.results)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]
    return "\n".join([padded[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *padded[1:]])


def _cells(result: RowResult, report: Report) -> tuple[str, ...]:
    row, seconds = result.row, result.image_seconds
    return (
        _model(row),
        _steps(result),
        "float16 autocast" if row.plain else row.dtype,
        str(row.batch),
        f"{statistics.median(seconds):.4g} ({min(seconds):.4g} to {max(seconds):.4g})",
        *(f"{share:.0%}" if share else "–" for share in result.shares.values()),
        _gigabytes(result.weights),
        _gigabytes(result.peak),
        *([_gigabytes(result.device_peak)] if report.device.type == "cuda" else []),
        f"{sum(result.flop.values()) / row.batch / 1e12:.3g}",
        f"{result.share_of_time(result.fastest):.0%}",
        f"{result.share_of_time(result.reading):.0%}",
        f"{report.times_faster(result):.2f}",
    )


def _model(row: Row) -> str:
    name = f"{row.model} as MAR computes it" if row.plain else row.model
    return name if row.decoder == "full" else f"{name}, {row.decoder} decoder"


def _steps(result: RowResult) -> str:
    """Return AR steps × head steps, and the other sampling options that differ from their defaults."""
    config = result.row.sampling
    head = dict.fromkeys((config.head_steps_at(0), config.head_steps_at(config.ar_steps - 1)))
    text = f"{config.ar_steps} × {' to '.join(map(str, head))}"
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in ("ar_steps", "head_steps", "guidance") and value != field.default:
            text += f", {field.name} {value}"
    return text


def _gigabytes(count: int | None) -> str:
    if count is None:
        return "–"
    return f"{count / 2**30:.3g} GB" if count >= 2**30 / 10 else f"{count / 2**20:.3g} MB"


def notes(report: Report, left_out: dict[str, str], rounds: int | None) -> str:
    """Return the text below the table: how its values were measured and what they mean.

    ``left_out`` has the reasons for the dtypes of default rows that do not run here.
    """
    estimated = [result for result in report.results if result.estimated]
    steps = dict.fromkeys(f"{result.timed_steps} of {result.row.sampling.ar_steps}" for result in estimated)
    how = "Times are of whole images."
    if estimated:
        how = f"Times are estimated from {', '.join(steps)} AR steps. --full times whole images."
    if report.device.type != "cpu":
        how += " The parts are those of a generation that waits for the device after each network."
    if rounds is None and len(report.results[0].rounds) == 1:
        how += "\nThe second round is left out: it would end after 10 minutes. --rounds 2 runs it."
    gpu = (
        ". GPU memory: peak of the tensors on the device, beyond those before it"
        if report.device.type == "cuda"
        else ""
    )
    if left_out:
        reasons = ", ".join(f"{dtype} ({reason})" for dtype, reason in left_out.items())
        how += f"\nDefault rows in {reasons} are left out. --models and --dtypes choose others."
    return f"""
{how}
Seconds: median (lowest to highest round).
Encoder … sampler: fractions of the time. A causal backbone only decodes.
Memory: peak while a batch is drawn and decoded, beyond what was resident before it{gpu}.
TFLOP: additions and multiplications per image.
Of peak: fraction of the time that these operations take at the speed of a large matrix product.
Of reading: fraction of the time that it takes to read each network's weights once per pass."""


def record(report: Report, device: torch.device) -> dict[str, Any]:
    """Return all results and the machine, ready for JSON."""
    return {
        "machine": {
            "processor": processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "platform": platform.platform(),
            "device": device_title(device),
            **(cuda_settings() if device.type == "cuda" else {}),
            "threads": torch.get_num_threads(),
            "bytes read per second": report.bandwidth,
            "peak flop per second": report.peaks,
        },
        "rows": [_row_record(result, report) for result in report.results],
    }


def _row_record(result: RowResult, report: Report) -> dict[str, Any]:
    row, seconds = result.row, result.image_seconds
    median, minimum, maximum = statistics.median(seconds), min(seconds), max(seconds)
    return {
        **dataclasses.asdict(row),
        "estimated": result.estimated,
        "timed ar steps": result.timed_steps,
        "seconds per image": {"median": median, "minimum": minimum, "maximum": maximum},
        "rounds": [{part: value / row.batch for part, value in parts.items()} for parts in result.rounds],
        "shares": result.shares,
        "weights bytes": result.weights,
        "memory bytes": result.peak,
        "first run's memory bytes": result.first_peak,
        "GPU memory bytes": result.device_peak,
        "flop per image": {part: result.flop[part] / row.batch for part in PARTS},
        "share of peak": result.share_of_time(result.fastest),
        "share of reading": result.share_of_time(result.reading),
        "times faster": report.times_faster(result),
    }


def plot(report: Report, path: Path) -> None:
    """Write a PNG of each row's seconds per image as a bar, stacked by part. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.6 * len(report.results)))
    panel = figure.subplots()
    for place, result in enumerate(report.results):
        total, end = statistics.median(result.image_seconds), 0.0
        for part, color in zip(PARTS, _COLORS):
            width = total * result.shares[part]
            panel.barh(place, width, left=end, color=color)
            end += width
        text = f" {total:.3g} s, {report.times_faster(result):.1f}×"
        panel.text(total, place, text, va="center", fontsize=8)
    rows = [(result.row, _steps(result)) for result in report.results]
    names = [f"{_model(row)}, {steps}\n{row.dtype}, batch {row.batch}" for row, steps in rows]
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.2)  # for the texts
    panel.set_xlabel("seconds per image")
    panel.legend(PARTS, fontsize=8)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
