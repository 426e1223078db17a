"""Estimate of the time that the comparison still takes, from the recorded speeds."""

import json
import statistics
from pathlib import Path

from benchmarks.comparison import MODELS, ImageSet, Row
from benchmarks.recorded import Measurements, made
from benchmarks.results_measure import current_rows, is_recorded, recorded_choice
from far.recipe import load_recipe

# Until a model has recorded speeds: images per second of training on one core, seconds per drawn image.
TRAINING_RATE, DRAWING_SECONDS = 150.0, 0.025
FEATURE_SECONDS = 0.01
DISTILLATION_SECONDS = 750.0
# Coordinate descent takes 6 to 12 points: 6 if the temperature that it starts from is the best.
SWEEP_POINTS = 9


def estimate(images: ImageSet, rows: list[Row], train: bool) -> str:
    """Return one line: an image set's missing trainings, sweeps and rows, and about how long they take."""
    store = current_rows(images)
    present = {(row.model, row.seed): images.trained(row.model, row.seed) for row in rows}
    # Models that share weights are trained once.
    lacking = {images.weights(*key): key for key, trained in present.items() if not trained}
    trainings = list(lacking.values()) if train else []
    measured = [row for row in rows if train or present[row.model, row.seed]]
    missing = [
        row for row in measured if not present[row.model, row.seed] or not is_recorded(images, store, row)
    ]
    swept = [row for row in missing if row.seed == 0 and not is_swept(images, store, row)]
    seconds = [
        sum(training_seconds(images, store, name) for name, _ in trainings),
        sum(SWEEP_POINTS * images.sweep_count * image_seconds(store, row) for row in swept),
        sum(images.count * image_seconds(store, row) for row in missing),
    ]
    hours = [f"{value / 3600:.1f} h" for value in (*seconds, sum(seconds))]
    return (
        f"{images.name}: {len(trainings)} trainings (about {hours[0]}), {len(swept)} sweeps ({hours[1]}) and"
        f" {len(missing)} of {len(rows)} rows ({hours[2]}) to do, about {hours[3]} on one core"
    )


def is_swept(images: ImageSet, store: Measurements, row: Row) -> bool:
    """Return whether the sweep of a row's present weights is recorded."""
    try:
        recorded_choice(store, row)
    except SystemExit:
        return False
    return images.trained(row.model)


def training_seconds(images: ImageSet, store: Measurements, name: str) -> float:
    if name == "distilled":
        return DISTILLATION_SECONDS
    training = load_recipe(images.recipe(MODELS[name])).generator.training
    recorded = store.values.get("trainings", {}).get(name, {"images per second": TRAINING_RATE})
    return float(training.steps * training.batch_size / recorded["images per second"])


def image_seconds(store: Measurements, row: Row) -> float:
    """Return the seconds to draw and evaluate one image of a row."""
    drawing = store.values.get("times", {}).get(row.name, {}).get("batch 64", DRAWING_SECONDS)
    return float(drawing) + FEATURE_SECONDS


def keep_rate(store: Measurements, name: str, run: Path) -> None:
    """Keep the training speed of a finished run, from its log."""
    lines = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    store.keep("trainings", name, {"images per second": statistics.median(rates), **made()})
