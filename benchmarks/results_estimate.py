"""Estimate of the time that the comparison still takes, from the recorded speeds."""

import json
import statistics
from pathlib import Path

from benchmarks.comparison import ImageSet, Row
from benchmarks.recorded import Measurements, made
from benchmarks.results_measure import current_rows, is_recorded, is_swept, recipe_training

# Images per second of training on one core, until a model has a recorded speed.
TRAINING_RATE = 120.0
# Seconds on one core: per drawn image and per head step of it, and per image whose features are extracted.
DRAWING_SECONDS, STEP_SECONDS, FEATURE_SECONDS = 0.008, 0.0004, 0.01
DISTILLATION_SECONDS = 750.0
# Coordinate descent takes 5 points if it starts at the best, and about two more for each move.
SWEEP_POINTS = 9


def estimate(sets: list[ImageSet], rows: list[Row], train: bool) -> list[str]:
    """Return one line per image set and one for all: what is missing, and about how long it takes."""
    lines, total = [], 0.0
    for images in sets:
        store = current_rows(images)
        lacking = [row for row in rows if not is_recorded(images, store, row)]
        missing = [row for row in lacking if train or images.trained(row.model, row.seed)]
        swept = [row for row in missing if row.seed == 0 and not is_swept(store, row)]
        # Models that share weights are trained once.
        untrained = [row for row in missing if not images.trained(row.model, row.seed)]
        trainings = {images.weights(row.model, row.seed): row.model for row in untrained}.values()
        seconds = [
            sum(training_seconds(images, store, name) for name in trainings),
            sum(SWEEP_POINTS * images.sweep_count * image_seconds(row) for row in swept),
            sum(images.count * image_seconds(row) for row in missing),
        ]
        total += sum(seconds)
        hours = [f"{value / 3600:.1f} h" for value in (*seconds, sum(seconds))]
        lines.append(
            f"{images.name}: {len(trainings)} trainings (about {hours[0]}), {len(swept)} sweeps ({hours[1]})"
            f" and {len(missing)} of {len(rows)} rows ({hours[2]}) to do, about {hours[3]} on one core"
        )
    return [*lines, f"All together: about {total / 3600:.1f} h on one core"]


def training_seconds(images: ImageSet, store: Measurements, name: str) -> float:
    """Return the seconds to train a model, without autoencoder and latents."""
    if name == "distilled":
        return DISTILLATION_SECONDS
    recorded = store.values.get("trainings", {}).get(name, {"images per second": TRAINING_RATE})
    training = recipe_training(images, Row(name, 1))
    return float(training["steps"] * training["batch_size"] / recorded["images per second"])


def image_seconds(row: Row) -> float:
    """Return the seconds to draw and evaluate one image of a row."""
    return DRAWING_SECONDS + STEP_SECONDS * row.steps + FEATURE_SECONDS


def keep_rate(store: Measurements, name: str, run: Path) -> None:
    """Keep the training speed of a finished run, from its log."""
    lines = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    store.keep("trainings", name, {"images per second": statistics.median(rates), **made()})
