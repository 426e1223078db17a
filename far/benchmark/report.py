"""Presentation of a benchmark: a table with heading and notes, a record for JSON, a bar chart."""

import dataclasses
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from far.benchmark.hardware import machine, processor
from far.benchmark.results import Report, RowResult
from far.benchmark.rows import SEED
from far.benchmark.watch import PARTS
from far.devices import device_title
from far.files import atomic_path

_COLORS = ("#4c72b0", "#55a868", "#dd8452", "#8172b3", "#8c8c8c")


def heading(report: Report, device: torch.device) -> str:
    """Return one line with the settings that all rows share, the machine and its measured limits."""
    scales = " or ".join(dict.fromkeys(f"{result.row.sampling.guidance:g}" for result in report.results))
    count = len(report.results[0].rounds)
    rounds = f"{count} round{'s' if count > 1 else ''}"
    peaks = ", ".join(f"{peak / 1e12:.3g} TFLOP/s in {name}" for name, peak in report.peaks.items())
    where = "" if device.type == "cpu" else f"device {device_title(device)}, "
    return (
        f"Guidance {scales}, seed {SEED}, {rounds} in turn, {where}{machine()}; "
        f"measured: {report.bandwidth / 1e9:.3g} GB/s of reading, {peaks}.\n"
    )


def table(report: Report) -> str:
    """Return a Markdown table, padded so that it is readable as text."""
    columns = (
        "model", "steps", "dtype", "batch", "seconds per image", *PARTS,
        "weights", "memory", "TFLOP", "of peak", "of reading", "times faster",
    )  # fmt: skip
    lines = [columns, *(_cells(result, report) for result in report.results)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines
    ]
    return "\n".join([padded[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *padded[1:]])


def _cells(result: RowResult, report: Report) -> tuple[str, ...]:
    row, seconds = result.row, result.image_seconds
    return (
        row.model,
        _steps(result),
        row.dtype,
        str(row.batch),
        f"{statistics.median(seconds):.4g} ({min(seconds):.4g} to {max(seconds):.4g})",
        *(f"{share:.0%}" if share else "–" for share in result.shares.values()),
        _gigabytes(result.weights),
        _gigabytes(result.peak),
        f"{sum(result.flop.values()) / row.batch / 1e12:.3g}",
        f"{result.share_of_time(result.fastest):.0%}",
        f"{result.share_of_time(result.reading):.0%}",
        f"{report.times_faster(result):.2f}",
    )


def _steps(result: RowResult) -> str:
    """Return AR steps × head steps, and the other sampling options that differ from their defaults."""
    config = result.row.sampling
    others = [
        f", {field.name} {value}"
        for field in dataclasses.fields(config)
        if field.name not in ("ar_steps", "head_steps", "guidance")
        and (value := getattr(config, field.name)) != field.default
    ]
    head = (
        config.head_steps if isinstance(config.head_steps, int) else " to ".join(map(str, config.head_steps))
    )
    return f"{config.ar_steps} × {head}{''.join(others)}"


def _gigabytes(count: int | None) -> str:
    if count is None:
        return "–"
    return f"{count / 2**30:.3g} GB" if count >= 2**30 / 10 else f"{count / 2**20:.3g} MB"


def notes(report: Report, left_out: dict[str, str], rounds: int | None) -> str:
    """Return the text below the table: how its values were measured and what they mean.

    Args:
        report: the results.
        left_out: reasons for the dtypes of default rows that do not run here.
        rounds: number of rounds that the user gave.
    """
    estimated = [result for result in report.results if result.estimated]
    steps = ", ".join(
        dict.fromkeys(f"{result.timed_steps} of {result.row.sampling.ar_steps}" for result in estimated)
    )
    how = "Times are of whole images."
    if estimated:
        how = f"Times are estimated from {steps} AR steps, spread evenly. --full times whole images."
    if rounds is None and len(report.results[0].rounds) == 1:
        how += "\nThe second round is left out: it would end after 10 minutes. --rounds 2 runs it."
    if left_out:
        reasons = ", ".join(f"{dtype} ({reason})" for dtype, reason in left_out.items())
        how += f"\nDefault rows in {reasons} are left out. --models and --dtypes choose others."
    return f"""
{how}
Seconds: median (lowest to highest round).
Encoder … sampler: fractions of the time. A causal backbone only decodes.
Memory: peak while a batch is drawn and decoded, beyond what was resident before it.
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
            "threads": torch.get_num_threads(),
            "bytes read per second": report.bandwidth,
            "peak flop per second": report.peaks,
        },
        "rows": [_row_record(result, report) for result in report.results],
    }


def _row_record(result: RowResult, report: Report) -> dict[str, Any]:
    row, seconds = result.row, result.image_seconds
    return {
        **dataclasses.asdict(row),
        "estimated": result.estimated,
        "timed ar steps": result.timed_steps,
        "seconds per image": {
            "median": statistics.median(seconds),
            "minimum": min(seconds),
            "maximum": max(seconds),
        },
        "rounds": [{part: value / row.batch for part, value in parts.items()} for parts in result.rounds],
        "shares": result.shares,
        "weights bytes": result.weights,
        "memory bytes": result.peak,
        "first run's memory bytes": result.first_peak,
        "flop per image": {part: result.flop[part] / row.batch for part in PARTS},
        "share of peak": result.share_of_time(result.fastest),
        "share of reading": result.share_of_time(result.reading),
        "times faster": report.times_faster(result),
    }


def plot(report: Report, path: Path) -> None:
    """Write a PNG of each row's seconds per image as a bar, stacked by part. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [
        f"{result.row.model}, {_steps(result)}\n{result.row.dtype}, batch {result.row.batch}"
        for result in report.results
    ]
    totals = [statistics.median(result.image_seconds) for result in report.results]
    figure, panel = plt.subplots(figsize=(9, 1 + 0.6 * len(names)))
    places, left = range(len(names)), [0.0] * len(names)
    for part, color in zip(PARTS, _COLORS):
        widths = [total * result.shares[part] for total, result in zip(totals, report.results)]
        panel.barh(places, widths, left=left, color=color, label=part)
        left = [start + width for start, width in zip(left, widths)]
    for place, total, result in zip(places, totals, report.results):
        text = f" {total:.3g} s, {report.times_faster(result):.1f}×"
        panel.text(total, place, text, va="center", fontsize=8)
    panel.set_yticks(places, names, fontsize=8)
    panel.invert_yaxis()
    panel.set(xlabel="seconds per image", xlim=(0, 1.2 * max(totals)))
    panel.legend(fontsize=8)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
