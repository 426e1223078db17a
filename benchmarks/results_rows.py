"""Recorded rows of the comparison, grouped by model and head steps: means, spreads and ratios."""

import math
import statistics
from typing import Any

TITLES = {
    "diffusion": "diffusion (MAR)",
    "shortcut": "shortcut (FAR)",
    "causal": "shortcut (FAR-Causal)",
    "flow": "flow",
    "flow-map": "flow map",
    "flow-map-2-passes": "flow map, guided in two passes",
    "energy": "energy",
    "distilled": "flow map, distilled from MAR",
}
Rows = list[dict[str, Any]]


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
    """Return the seconds per image, if they were measured with guidance as this row has it, on or off."""
    times = values.get("times", {}).get(f"{row['name']} {row['steps']}")
    if times is None or times["guided"] != (row["sampling"]["guidance"] != 1):
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


def with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
