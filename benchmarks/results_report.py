"""Tables, plot and sample grids of docs/results.md and of the README, made from the recorded measurements."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison import MODELS, Row, all_rows
from benchmarks.recorded import TRAIN, WEIGHTS, Measurements, checksums
from benchmarks.results_measure import GUIDANCES, TEMPERATURES, UNLIMITED, sweep_key
from benchmarks.results_plot import plot
from benchmarks.results_rows import (
    TITLES,
    Rows,
    distance_of,
    figure_of,
    mean,
    ratio,
    rows_of,
    seconds_of,
    with_error,
    with_spread,
)
from far.config import from_dict
from far.files import atomic_path
from far.pictures import grid, save_png
from far.pipeline import Pipeline
from far.sampling import SamplingConfig

# The shortcut head against the diffusion head, in head steps.
CLAIM = [("shortcut", 8), ("shortcut", 4)]
BASE = ("diffusion", 100)
README_ROWS = [
    BASE, ("diffusion", 10), ("flow", 8), ("shortcut", 8), ("shortcut", 4), ("flow-map", 2),
    ("distilled", 2), ("causal", 4),
]  # fmt: skip
GRID_ROWS = [
    BASE, ("diffusion", 10), ("flow", 8), ("shortcut", 8), ("shortcut", 1), ("causal", 4), ("flow-map", 2),
    ("flow-map", 1), ("distilled", 2),
]  # fmt: skip
TEMPERATURE_ROWS = [BASE, ("flow", 8), ("shortcut", 8), ("causal", 8), ("flow-map", 2)]
# FDs over 2,000 images that differ by less than 1 % are called equal.
NEAR = 1.01


def write_report(files: list[Path], page: Path, readme: Path) -> None:
    """Replace the generated blocks of ``page`` and ``readme`` and draw the page's images."""
    stores = {path.stem: Measurements(path) for path in files if path.exists()}
    images = page.parent / "images"
    for name, store in stores.items():
        sample_grid(store, images / f"comparison-{name}.png")
    measured = {name: store.values for name, store in stores.items()}
    text = replace_block(page.read_text(encoding="utf-8"), "claim", claim_table(measured))
    text = replace_block(text, "sweeps", sweep_table(measured))
    for name, values in measured.items():
        text = replace_block(text, name, main_table(values))
        text = replace_block(text, f"{name}-samples", sample_caption(values))
    timed = {name: values for name, values in measured.items() if "times" in values}
    if timed:
        plot(timed, images / "distance-against-seconds.png")
    write_text(page, text)
    write_text(readme, replace_block(readme.read_text(encoding="utf-8"), "results", readme_table(measured)))


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def replace_block(text: str, name: str, block: str) -> str:
    """Return ``text`` with the lines between the marks of ``name`` replaced by ``block``."""
    pattern = rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)"
    assert re.search(pattern, text, re.DOTALL), f"no block {name}"
    return re.sub(pattern, lambda match: match[1] + block + match[2], text, flags=re.DOTALL)


def table(heads: list[str], lines: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [heads, ["---"] * len(heads), *lines])


def claim_table(measured: dict[str, Any]) -> str:
    """Return what the shortcut head costs and saves relative to the diffusion head, per image set."""
    lines = []
    for name, values in measured.items():
        base = rows_of(values, BASE[0]).get(BASE[1])
        for model, steps in CLAIM:
            rows = rows_of(values, model).get(steps)
            if not rows or not base:
                continue
            sides = (rows, base)
            score = [figure_of(values, side, "IS") for side in sides]
            lines.append(
                [
                    name,
                    str(steps),
                    pair(str(len(side)) for side in sides),
                    with_error(*ratio(*(distance_of(values, side) for side in sides))),
                    f"{score[0] / score[1]:.3f}",
                    pair(f"{1000 * figure_of(values, side, 'KID'):.1f}" for side in sides),
                    pair(f"{figure_of(values, side, 'recall'):.3f}" for side in sides),
                    pair(f"{mean([row['class accuracy'] for row in side]):.3f}" for side in sides),
                    *(times_faster(values, rows[0], base[0], batch) for batch in (1, 64)),
                ]
            )
    heads = ["image set", "shortcut steps", "trainings, both", "FD / diffusion's", "IS / diffusion's"]
    heads += ["KID × 1000, both", "recall, both", "class accuracy, both", "times faster, batch 1", "batch 64"]
    return table(heads, lines)


def pair(cells: Iterable[str]) -> str:
    """Return the cell of both sides of a comparison."""
    return " / ".join(cells)


def times_faster(values: dict[str, Any], row: dict[str, Any], base: dict[str, Any], batch: int) -> str:
    seconds = [seconds_of(values, each, batch) for each in (base, row)]
    return "" if None in seconds else f"{seconds[0] / seconds[1]:.1f}"  # type: ignore[operator]


def main_table(values: dict[str, Any]) -> str:
    """Return the figures of all rows of an image set, and how they were measured."""
    distance = values["setting"]["distance"]
    heads = ["head", "head steps", "trainings", distance, "ratio to diffusion, 100 steps", "KID × 1000", "IS"]
    heads += ["recall", "class accuracy", "guidance", "temperature", "ms per image, batch 1", "batch 64"]
    base = rows_of(values, BASE[0]).get(BASE[1], [])
    lines = []
    for key, title in (("real", "real images"), ("reconstructions", "reconstructions")):
        if key in values["rows"]:
            rows = [values["rows"][key]]
            lines.append([title, "", "", *quality(values, rows, []), "", "", "", ""])
    for model, title in TITLES.items():
        for steps, rows in rows_of(values, model).items():
            sampling = rows[0]["sampling"]
            seconds = [seconds_of(values, rows[0], batch) for batch in (1, 64)]
            lines.append(
                [
                    title, str(steps), str(len(rows)), *quality(values, rows, base),
                    f"{sampling['guidance']:g}", f"{sampling['temperature']:g}",
                    *("" if value is None else f"{1000 * value:.1f}" for value in seconds),
                ]
            )  # fmt: skip
    return table(heads, lines) + "\n" + conditions(values) + "\n"


def quality(values: dict[str, Any], rows: Rows, base: Rows) -> list[str]:
    """Return the cells of FD, its ratio to ``base`` (if any), KID, IS, recall and class accuracy."""
    distances = distance_of(values, rows)
    return [
        with_spread(distances),
        with_error(*ratio(distances, distance_of(values, base))) if base else "",
        f"{1000 * figure_of(values, rows, 'KID'):.1f}",
        f"{figure_of(values, rows, 'IS'):.2f}",
        f"{figure_of(values, rows, 'recall'):.3f}",
        f"{mean([row['class accuracy'] for row in rows]):.3f}",
    ]


def conditions(values: dict[str, Any]) -> str:
    """Return how an image set was measured, and the diffusion head's distance without a token limit."""
    setting = values["setting"]
    lines = [
        f"{setting['count']:,} images per row against {setting['reference']:,} held-out ones, weights in"
        f" {setting['dtype']}, batch {setting['batch size']}."
    ]
    if "times" in setting:
        lines.append(timing(setting))
    if UNLIMITED in values["sweeps"]:
        found = values["sweeps"][UNLIMITED]
        lines.append(
            f"Without a limit on the predicted token, the diffusion head at 100 steps has an FD of"
            f" {found['distance']:.1f} ({found['count']:,} images)."
        )
    return " ".join(lines)


def timing(setting: dict[str, Any]) -> str:
    """Return on what and how times were measured."""
    times = setting["times"]
    return f"Times: {times['machine']}, {times['dtype']}, {times['rounds']} rounds in turn, pixels included."


def sweep_table(measured: dict[str, Any]) -> str:
    """Return FD and recall of the main rows by temperature, each at its best guidance."""
    lines = []
    for name, values in measured.items():
        for model, steps in TEMPERATURE_ROWS:
            rows = rows_of(values, model).get(steps)
            guidance = rows[0]["sampling"]["guidance"] if rows else 0
            keys = [sweep_key(Row(model, steps), guidance, temperature) for temperature in TEMPERATURES]
            found = [values["sweeps"].get(key) for key in keys]
            if None not in found:
                cells = [f"{point['distance']:.1f} ({point['recall']:.3f})" for point in found]
                lines.append([name, TITLES[model], str(steps), f"{guidance:g}", *cells])
    if not lines:
        return (
            "No sweep of temperature is recorded yet: all rows were measured at temperature 1 and at the best"
            " guidance over 2,000 images.\n"
        )
    heads = ["image set", "head", "head steps", "guidance"]
    heads += [f"FD (recall), temperature {temperature:g}" for temperature in TEMPERATURES]
    return table(heads, lines) + "\n" + near_ties(measured) + "\n"


def near_ties(measured: dict[str, Any]) -> str:
    """Return how many sweeps have other points within 1 % of the lowest distance."""
    swept = tied = 0
    for values in measured.values():
        for row in (row for row in all_rows() if row.seed == 0):
            keys = [sweep_key(row, guidance, value) for guidance in GUIDANCES for value in TEMPERATURES]
            found = sorted(values["sweeps"][key]["distance"] for key in keys if key in values["sweeps"])
            swept += bool(found)
            tied += len(found) > 1 and found[1] < NEAR * found[0]
    return f"In {tied} of {swept} sweeps another point lies within 1 % of the lowest FD."


def readme_table(measured: dict[str, Any]) -> str:
    """Return distance and milliseconds of the main rows on every image set."""
    heads = ["backbone", "head", "steps"]
    heads += [cell for name in measured for cell in (f"{name}: FD", "ms per image")]
    lines = []
    for model, steps in README_ROWS:
        cells = ["causal" if MODELS[model].recipe == "-causal" else "masked", TITLES[model], str(steps)]
        for values in measured.values():
            rows = rows_of(values, model).get(steps, [])
            seconds = seconds_of(values, rows[0], 1) if rows else None
            cells.append(with_spread(distance_of(values, rows)) if rows else "")
            cells.append("" if seconds is None else f"{1000 * seconds:.0f}")
        if any(cells[3:]):
            lines.append(cells)
    floors = [values["rows"].get("reconstructions") for values in measured.values()]
    found = [
        [with_spread(distance_of(values, [floor])) if floor else "", ""]
        for values, floor in zip(measured.values(), floors)
    ]
    lines.append(["", "reconstructions", "", *(cell for cells in found for cell in cells)])
    timed = [timing(values["setting"]) for values in measured.values() if "times" in values["setting"]]
    return table(heads, lines) + "".join(f"\n{line}\n" for line in dict.fromkeys(timed))


def sample_grid(store: Measurements, path: Path) -> None:
    """Draw the same seeds with each head, one row per head, and keep which rows are shown.

    The existing image is kept unless all weights of the recorded rows are present.
    """
    found = {key: rows_of(store.values, key[0]).get(key[1], []) for key in GRID_ROWS}
    shown = {key: rows[0] for key, rows in found.items() if rows}
    if any(checksums(Path(row["weights"])) != row["sha256"] for row in shown.values()):
        print(f"{path} is kept: weights of its rows are missing in {WEIGHTS}. {TRAIN} trains them.")
        return
    drawn = []
    for row in shown.values():
        pipeline = Pipeline.from_pretrained(row["weights"], dtype=row["dtype"])
        labels = [index % len(pipeline.classes) for index in range(16)]
        sampling = from_dict(SamplingConfig, row["sampling"], "a recorded row")
        drawn.append(pipeline.draw(labels, list(range(16)), sampling))
    sheet = grid(torch.cat(drawn), columns=16)
    save_png(sheet.resize((1024, sheet.height * 1024 // sheet.width)), path)
    store.keep("setting", "samples", list(shown))


def sample_caption(values: dict[str, Any]) -> str:
    """Return the caption of a sample grid."""
    rows = "; ".join(f"{TITLES[model]}, {steps}" for model, steps in values["setting"].get("samples", []))
    return f"Rows (head, head steps): {rows}. Columns: the classes in turn. Seeds 0 to 15.\n"
