"""Estimate of the time that the comparison still takes, from the recorded speeds."""

import json
import statistics
from pathlib import Path

from benchmarks.comparison import ImageSet, Row
from benchmarks.recorded import Measurements, made
from benchmarks.results_measure import current_rows, is_recorded, is_swept, recipe_images

# Until a model has recorded speeds: images per second of training on one core, seconds per drawn image.
TRAINING_RATE, DRAWING_SECONDS = 150.0, 0.025
FEATURE_SECONDS = 0.01
DISTILLATION_SECONDS = 750.0
# Coordinate descent takes 6 to 12 points: 6 if the temperature that it starts from is the best.
SWEEP_POINTS = 9


def estimate(images: ImageSet, rows: list[Row], train: bool) -> str:
    """Return one line: an image set's missing trainings, sweeps and rows, and about how long they take."""
    store = current_rows(images)
    lacking = [row for row in rows if not is_recorded(images, store, row)]
    missing = [row for row in lacking if train or images.trained(row.model, row.seed)]
    swept = [row for row in missing if row.seed == 0 and not is_swept(store, row)]
    # Models that share weights are trained once.
    untrained = [row for row in missing if not images.trained(row.model, row.seed)]
    trainings = {images.weights(row.model, row.seed): row.model for row in untrained}.values()
    seconds = [
        sum(training_seconds(images, store, name) for name in trainings),
        sum(SWEEP_POINTS * images.sweep_count * image_seconds(store, row) for row in swept),
        sum(images.count * image_seconds(store, row) for row in missing),
    ]
    hours = [f"{value / 3600:.1f} h" for value in (*seconds, sum(seconds))]
    return (
        f"{images.name}: {len(trainings)} trainings (about {hours[0]}), {len(swept)} sweeps ({hours[1]}) and"
        f" {len(missing)} of {len(rows)} rows ({hours[2]}) to do, about {hours[3]} on one core"
    )


def training_seconds(images: ImageSet, store: Measurements, name: str) -> float:
    if name == "distilled":
        return DISTILLATION_SECONDS
    recorded = store.values.get("trainings", {}).get(name, {"images per second": TRAINING_RATE})
    return float(recipe_images(images, Row(name, 1)) / recorded["images per second"])


def image_seconds(store: Measurements, row: Row) -> float:
    """Return the seconds to draw and evaluate one image of a row."""
    drawing = store.values.get("times", {}).get(row.name, {}).get("batch 64", DRAWING_SECONDS)
    return float(drawing) + FEATURE_SECONDS


def keep_rate(store: Measurements, name: str, run: Path) -> None:
    """Keep the training speed of a finished run, from its log."""
    lines = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    store.keep("trainings", name, {"images per second": statistics.median(rates), **made()})
