"""Seconds per image of every row of the comparison and of its backbone, and the head's fraction.

    python -m benchmarks.results_times [--set SET …] [--rounds 5]

Run nothing else on the machine meanwhile. ``make results TRAIN=1`` trains the weights and sweeps guidance.
The rows of an image set are measured in turn. Times are of the whole pipeline, pixels included, in the dtype
of the quality figures. They replace those of earlier runs in docs/results/SET.json.
"""

import argparse
import functools
import statistics
import time
from typing import Any

import torch

from benchmarks.comparison import BATCH_SIZES, DTYPE, SETS, ImageSet, Row, add_sets, all_rows
from benchmarks.recorded import Measurements, made, tell_missing
from benchmarks.results_measure import generation_of_row, is_swept, network_of, recorded_choice
from far.benchmark import Row as BenchmarkRow
from far.benchmark import generate, segments, summary
from far.pipeline import Pipeline


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sets(parser)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(words)
    rows = [row for row in all_rows() if row.seed == 0]
    for name in arguments.sets:
        images = SETS[name]
        tell_missing(name, [images.weights(row.model) for row in rows])
        present = [row for row in rows if images.trained(row.model)]
        swept = [row for row in present if is_swept(Measurements(images.results), row)]
        if unswept := ", ".join(row.name for row in present if row not in swept):
            print(f"{name}: not timed, because guidance is not swept yet: {unswept}")
        if swept:
            measure_set(images, swept, arguments.rounds)


def measure_set(images: ImageSet, rows: list[Row], rounds: int) -> None:
    """Measure and keep the times of rows whose weights are present."""
    store = Measurements(images.results)
    choices = {row: recorded_choice(store, row) for row in rows}
    times: dict[Row, dict[str, Any]] = {
        row: {"guided": guidance != 1, "dtype": DTYPE, **network_of(images.weights(row.model))}
        for row, (guidance, _) in choices.items()
    }
    for batch in BATCH_SIZES:
        for row, found in measure(images, choices, batch, rounds).items():
            seconds = [sum(parts.values()) for parts in found]
            head = statistics.median(parts["head"] / sum(parts.values()) for parts in found)
            backbone = statistics.median(parts["encoder"] + parts["decoder"] for parts in found)
            times[row] |= {
                f"batch {batch}": statistics.median(seconds) / batch,
                f"backbone {batch}": backbone / batch,
                f"head share {batch}": head,
            }
            print(
                f"{images.name}, batch {batch}, {row.name}: {summary(seconds)}, head {head:.0%}", flush=True
            )
    store.keep("setting", "times", {**made(), "dtype": DTYPE, "rounds": rounds})
    store.replace("times", {row.name: values for row, values in times.items()})


def measure(
    images: ImageSet, choices: dict[Row, tuple[float, float]], batch: int, rounds: int
) -> dict[Row, list[dict[str, float]]]:
    """Return seconds by part for each round, one list per row, measured in turn after a warm-up round.

    ``choices`` has guidance and temperature of each row.
    """
    calls = {}
    models = {row.model for row in choices}
    loaded = {
        name: Pipeline.from_pretrained(images.weights(name), device="cpu", dtype=DTYPE) for name in models
    }
    for row, point in choices.items():
        generation = generation_of_row(images, row, *point, seed=0)
        timed = BenchmarkRow(generation.weights, generation.sampling, generation.dtype, batch)
        plan = segments(generation.sampling, full=True)
        calls[row] = functools.partial(generate, loaded[row.model], timed, plan, time.perf_counter)
    found: dict[Row, list[dict[str, float]]] = {row: [] for row in calls}
    for turn in range(1 + rounds):
        for row, call in calls.items():
            parts = call()
            if turn > 0:
                found[row].append(parts)
    return found


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
