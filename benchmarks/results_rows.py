"""Recorded rows of the comparison, grouped by model and head steps: means, spreads and ratios."""

import math
import statistics
from typing import Any

from benchmarks.comparison import MODELS

# Heads by model, in the order of the tables.
HEADS = {
    "diffusion": "diffusion",
    "shortcut": "shortcut",
    "flow": "flow",
    "flow-map": "flow map",
    "flow-map-2-passes": "flow map, guided in two passes",
    "energy": "energy",
    "causal": "shortcut",
    "masked": "shortcut",
    "mar": "diffusion",
    "distilled": "flow map, distilled from MAR",
}
# Combinations that are a published method.
METHODS = {
    ("masked", "diffusion"): "MAR",
    ("masked", "shortcut"): "FAR",
    ("causal", "shortcut"): "FAR-Causal",
}
Rows = list[dict[str, Any]]


def title(model: str, backbone: str | None = None) -> str:
    """Return a model's head and, if head and backbone together are a published method, its name.

    ``backbone`` is that of the recorded rows; the default is today's.
    """
    head = HEADS[model]
    method = METHODS.get((backbone or MODELS[model].backbone, head))
    return head if method is None else f"{head} ({method})"


def model_rows(values: dict[str, Any]) -> Rows:
    """Return the recorded rows of models, without the floors."""
    return [row for row in values["rows"].values() if "steps" in row]


def training_text(row: dict[str, Any]) -> str:
    """Return how the model of a recorded row was trained."""
    training, channels = row["training"], row["latent channels"]
    return (
        f"{training['steps']:,} steps of {training['batch_size']} images, learning rate"
        f" {training['learning_rate']:g}, EMA {training['ema_decay']:g}, latents of {channels} channels"
    )


def rows_of(values: dict[str, Any], model: str) -> dict[int, Rows]:
    """Return the recorded rows of a model by head steps, the most first, one row per training."""
    found: dict[int, Rows] = {}
    for row in values["rows"].values():
        if row["name"] == model:
            found.setdefault(row["steps"], []).append(row)
    return dict(sorted(found.items(), reverse=True))


def distance_of(values: dict[str, Any], rows: Rows) -> list[float]:
    """Return the distance of each training."""
    return [row[values["setting"]["distance"]] for row in rows]


def figure_of(values: dict[str, Any], rows: Rows, name: str) -> float:
    """Return the mean over trainings of a figure that depends on the feature network, such as ``KID``."""
    return mean([row[f"{name} {values['setting']['distance'].removeprefix('FD ')}"] for row in rows])


def seconds_of(values: dict[str, Any], row: dict[str, Any], batch: int) -> float | None:
    """Return the seconds per image, if they were measured with the same network, dtype and guidance.

    Only whether guidance is on matters, not its scale.
    """
    times = values.get("times", {}).get(f"{row['name']} {row['steps']}")
    same = ("backbone", "latent channels", "dtype")
    if times is None or any(times[name] != row[name] for name in same):
        return None
    if times["guided"] != (row["sampling"]["guidance"] != 1):
        return None
    return float(times[f"batch {batch}"])


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def with_spread(values: list[float], digits: int = 1) -> str:
    """Return the mean, and with two or more values the standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def ratio(values: list[float], base: list[float]) -> tuple[float, float | None]:
    """Return the ratio of two means and its standard error, if both have two or more values.

    First-order propagation of the standard errors of independent means: for r = a / b,
    (σ_r / r)² = (σ_a / a)² + (σ_b / b)².
    """
    found = mean(values) / mean(base)
    if min(len(values), len(base)) < 2:
        return found, None
    parts = [statistics.variance(side) / len(side) / mean(side) ** 2 for side in (values, base)]
    return found, found * math.sqrt(sum(parts))


def paired_ratio(values: list[float], base: list[float]) -> tuple[float, float | None]:
    """Return the mean ratio of two figures of the same trainings and its standard error, if there are two."""
    ratios = [value / other for value, other in zip(values, base, strict=True)]
    error = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else None
    return mean(ratios), error


def distance_ratio(values: dict[str, Any], rows: Rows, base: Rows) -> str:
    """Return the ratio of the distances of two groups of rows, with its standard error."""
    sides = [distance_of(values, side) for side in (rows, base)]
    if rows == base:
        return with_error(1.0, None)
    same = [row["weights"] for row in rows] == [row["weights"] for row in base]
    return with_error(*(paired_ratio if same else ratio)(*sides))


def with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
