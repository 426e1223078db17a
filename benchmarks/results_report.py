"""Tables, plot and sample grids of docs/results.md and of the README, made from the recorded measurements."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison import Row, all_rows
from benchmarks.recorded import TRAIN, WEIGHTS, Measurements, checksums
from benchmarks.results_measure import GUIDANCES, TEMPERATURES, UNLIMITED, sweep_key
from benchmarks.results_plot import plot
from benchmarks.results_rows import (
    HEADS,
    Rows,
    distance_of,
    distance_ratio,
    figure_of,
    mean,
    model_rows,
    rows_of,
    seconds_of,
    title,
    training_text,
    with_spread,
)
from far.config import from_dict
from far.files import atomic_path
from far.pictures import grid, save_png
from far.pipeline import Pipeline
from far.sampling import SamplingConfig

BASE = ("diffusion", 100)
# The shortcut head against the diffusion head, in head steps, on one backbone.
CLAIM = [
    (("shortcut", 8), BASE),
    (("shortcut", 4), BASE),
    (("masked", 8), ("mar", 100)),
    (("masked", 4), ("mar", 100)),
]
README_ROWS = [
    BASE, ("diffusion", 10), ("shortcut", 8), ("shortcut", 4), ("shortcut", 2), ("causal", 4), ("mar", 100),
    ("masked", 4), ("flow", 8), ("flow-map", 2), ("distilled", 2),
]  # fmt: skip
GRID_ROWS = [
    BASE, ("diffusion", 10), ("flow", 8), ("shortcut", 8), ("shortcut", 1), ("causal", 4), ("masked", 4),
    ("flow-map", 2), ("flow-map", 1), ("distilled", 2),
]  # fmt: skip
TEMPERATURE_ROWS = [BASE, ("flow", 8), ("shortcut", 8), ("causal", 8), ("masked", 8), ("flow-map", 2)]
# FDs over 2,000 images that differ by less than 1 % are called equal.
NEAR = 1.01


def write_report(files: list[Path], page: Path, readme: Path) -> None:
    """Replace the generated blocks of ``page`` and ``readme`` and draw the page's images.

    Blocks of image sets without any recorded model stay as they are.
    """
    stores = {path.stem: Measurements(path) for path in files if path.exists()}
    stores = {name: store for name, store in stores.items() if model_rows(store.values)}
    images = page.parent / "images"
    for name, store in stores.items():
        sample_grid(store, images / f"comparison-{name}.png")
    measured = {name: store.values for name, store in stores.items()}
    text = replace_block(page.read_text(encoding="utf-8"), "claim", claim_table(measured))
    text = replace_block(text, "sweeps", sweep_table(measured))
    for name, values in measured.items():
        text = replace_block(text, name, main_table(values))
        if "samples" in values["setting"]:
            text = replace_block(text, f"{name}-samples", f"{values['setting']['samples']}\n")
    timed = {name: values for name, values in measured.items() if is_timed(values)}
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
        for (model, steps), compared in CLAIM:
            rows, base = (rows_of(values, key[0]).get(key[1]) for key in ((model, steps), compared))
            if not rows or not base:
                continue
            sides = (rows, base)
            score = [figure_of(values, side, "IS") for side in sides]
            lines.append(
                [
                    name,
                    rows[0]["backbone"],
                    str(steps),
                    pair(str(len(side)) for side in sides),
                    distance_ratio(values, rows, base),
                    f"{score[0] / score[1]:.3f}",
                    pair(f"{1000 * figure_of(values, side, 'KID'):.1f}" for side in sides),
                    pair(f"{figure_of(values, side, 'recall'):.3f}" for side in sides),
                    pair(f"{mean([row['class accuracy'] for row in side]):.3f}" for side in sides),
                    *(times_faster(values, rows[0], base[0], batch) for batch in (1, 64)),
                ]
            )
    heads = ["image set", "backbone", "shortcut steps", "trainings, both", "FD / diffusion's"]
    heads += ["IS / diffusion's", "KID × 1000, both", "recall, both", "class accuracy, both"]
    heads += ["times faster, batch 1", "batch 64"]
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
    heads = ["backbone", "head", "head steps", "trainings", distance, "ratio to diffusion, 100 steps"]
    heads += ["KID × 1000", "IS", "recall", "class accuracy", "guidance", "temperature"]
    heads += ["ms per image, batch 1", "batch 64"]
    base = rows_of(values, BASE[0]).get(BASE[1], [])
    lines = []
    for key in ("real", "reconstructions"):
        if key in values["rows"]:
            row = values["rows"][key]
            lines.append(["", row["name"], "", "", *quality(values, [row], []), "", "", "", ""])
    for model in HEADS:
        for steps, rows in rows_of(values, model).items():
            sampling, backbone = rows[0]["sampling"], rows[0]["backbone"]
            seconds = [seconds_of(values, rows[0], batch) for batch in (1, 64)]
            lines.append(
                [
                    backbone, title(model, backbone), str(steps), str(len(rows)),
                    *quality(values, rows, base),
                    f"{sampling['guidance']:g}", f"{sampling['temperature']:g}",
                    *("" if value is None else f"{1000 * value:.1f}" for value in seconds),
                ]
            )  # fmt: skip
    return table(heads, lines) + "\n" + conditions(values) + "\n"


def quality(values: dict[str, Any], rows: Rows, base: Rows) -> list[str]:
    """Return the cells of FD, its ratio to ``base`` (if any), KID, IS, recall and class accuracy."""
    return [
        with_spread(distance_of(values, rows)),
        distance_ratio(values, rows, base) if base else "",
        f"{1000 * figure_of(values, rows, 'KID'):.1f}",
        f"{figure_of(values, rows, 'IS'):.2f}",
        f"{figure_of(values, rows, 'recall'):.3f}",
        f"{mean([row['class accuracy'] for row in rows]):.3f}",
    ]


def conditions(values: dict[str, Any]) -> str:
    """Return how an image set was measured, and the diffusion head's distance without a token limit."""
    setting = values["setting"]
    dtypes = {row["dtype"] for row in model_rows(values)}
    lines = [
        f"{setting['count']:,} images per row against {setting['reference']:,} held-out ones, weights in"
        f" {' and '.join(sorted(dtypes))}, batch {setting['batch size']}.",
        f"Training: {training_text(model_rows(values)[0])}.",
        *timing(values),
    ]
    if UNLIMITED in values["sweeps"]:
        found = values["sweeps"][UNLIMITED]
        lines.append(
            f"Without a limit on the predicted token, the diffusion head at 100 steps has an FD of"
            f" {found['distance']:.1f} ({found['count']:,} images)."
        )
    return " ".join(lines)


def is_timed(values: dict[str, Any]) -> bool:
    """Return whether seconds of any recorded row were measured."""
    return any(seconds_of(values, row, 1) is not None for row in model_rows(values))


def timing(values: dict[str, Any]) -> list[str]:
    """Return on what and how times were measured, a sentence if any were."""
    if not is_timed(values):
        return []
    times = values["setting"]["times"]
    return [
        f"Times: {times['machine']}, {times['dtype']}, {times['rounds']} rounds in turn, pixels included."
    ]


def sweep_table(measured: dict[str, Any]) -> str:
    """Return FD and recall of the main rows by temperature, each at its best guidance."""
    lines = []
    for name, values in measured.items():
        for model, steps in TEMPERATURE_ROWS:
            if not (rows := rows_of(values, model).get(steps)):
                continue
            guidance = rows[0]["sampling"]["guidance"]
            keys = [sweep_key(Row(model, steps), guidance, temperature) for temperature in TEMPERATURES]
            found = [values["sweeps"].get(key) for key in keys]
            if any(found):
                cells = [point_text(point) for point in found]
                backbone = rows[0]["backbone"]
                lines.append([name, backbone, title(model, backbone), str(steps), f"{guidance:g}", *cells])
    if not lines:
        return (
            "No sweep of temperature is recorded yet: all rows were measured at temperature 1 and at the best"
            " guidance over 2,000 images.\n"
        )
    heads = ["image set", "backbone", "head", "head steps", "guidance"]
    heads += [f"FD (recall), temperature {temperature:g}" for temperature in TEMPERATURES]
    return table(heads, lines) + "\n" + near_ties(measured) + "\n"


def point_text(point: dict[str, Any] | None) -> str:
    """Return the cell of a point of a sweep, empty if the search did not come to it."""
    return "" if point is None else f"{point['distance']:.1f} ({point['recall']:.3f})"


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
    """Return distance and milliseconds of the main rows on every image set, one line per backbone."""
    heads = ["backbone", "head", "steps"]
    heads += [cell for name in measured for cell in (f"{name}: FD", "ms per image")]
    lines = []
    for model, steps in README_ROWS:
        found = [(values, rows_of(values, model).get(steps, [])) for values in measured.values()]
        for backbone in dict.fromkeys(rows[0]["backbone"] for _, rows in found if rows):
            cells = [backbone, title(model, backbone), str(steps)]
            for values, rows in found:
                shown = rows if rows and rows[0]["backbone"] == backbone else []
                seconds = seconds_of(values, shown[0], 1) if shown else None
                cells.append(with_spread(distance_of(values, shown)) if shown else "")
                cells.append("" if seconds is None else f"{1000 * seconds:.0f}")
            lines.append(cells)
    floors = [values["rows"].get("reconstructions") for values in measured.values()]
    cells = ["", "reconstructions", ""]
    for values, floor in zip(measured.values(), floors):
        cells += [with_spread(distance_of(values, [floor])) if floor else "", ""]
    trainings = [f"{name}: {training_text(model_rows(values)[0])}" for name, values in measured.items()]
    timed = [
        line.replace("Times", f"Times on {name}") for name in measured for line in timing(measured[name])
    ]
    notes = "".join(f"\n{line}\n" for line in (f"Training on {'; on '.join(trainings)}.", *timed))
    return table(heads, [*lines, cells]) + notes


def sample_grid(store: Measurements, path: Path) -> None:
    """Draw the same seeds with each head, one row per head, and keep the caption.

    The existing image is kept unless all weights of the recorded rows are present.
    """
    found = {key: rows_of(store.values, key[0]).get(key[1], []) for key in GRID_ROWS}
    shown = {key: rows[0] for key, rows in found.items() if rows}
    if not shown:
        return
    if any(checksums(Path(row["weights"])) != row["sha256"] for row in shown.values()):
        print(f"{path} is kept: weights of its rows are missing in {WEIGHTS}. {TRAIN} trains them.")
        return
    drawn, names = [], []
    for (model, steps), row in shown.items():
        pipeline = Pipeline.from_pretrained(row["weights"], dtype=row["dtype"])
        labels = [index % len(pipeline.classes) for index in range(16)]
        sampling = from_dict(SamplingConfig, row["sampling"], "a recorded row")
        drawn.append(pipeline.draw(labels, list(range(16)), sampling))
        names.append(f"{row['backbone']}, {title(model, row['backbone'])}, {steps}")
    sheet = grid(torch.cat(drawn), columns=16)
    save_png(sheet.resize((1024, sheet.height * 1024 // sheet.width)), path)
    caption = (
        f"Rows (backbone, head, head steps): {'; '.join(names)}. Columns: the classes in turn. Seeds 0 to 15."
        f" Training: {training_text(next(iter(shown.values())))}."
    )
    store.keep("setting", "samples", caption)
