"""Tables, plots and sample grids of docs/results.md, made from the recorded measurements."""

import re
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.recorded import TRAIN, WEIGHTS, checksums
from far.files import atomic_path, read_json
from far.pictures import grid, save_png
from far.pipeline import Pipeline

TITLES = {
    "diffusion": "diffusion (MAR)",
    "flow": "flow",
    "shortcut": "shortcut (FAR)",
    "causal": "shortcut (FAR-Causal)",
    "frozen-shortcut": "shortcut (FAR), on the frozen backbone",
    "frozen-flow": "flow, on the frozen backbone",
    "flow-map": "flow map, Lagrangian",
    "flow-map-1": "flow map, Lagrangian, guided in one pass",
    "mean-flow": "flow map, MeanFlow",
    "mean-flow-1": "flow map, MeanFlow, guided in one pass",
    "energy": "energy",
    "distilled": "flow map, distilled from MAR, guided in one pass",
}
COLORS = {
    "diffusion": "#c44e52", "flow": "#dd8452", "shortcut": "#4c72b0", "causal": "#55a868",
    "flow-map-1": "#8172b3",
    "mean-flow-1": "#da8bc3", "energy": "#937860", "distilled": "#64b5cd",
}  # fmt: skip
# Rows of the summary: a model and its head steps.
SUMMARY = [
    ("diffusion", 100), ("diffusion", 10), ("flow", 8), ("shortcut", 8), ("shortcut", 4), ("shortcut", 1),
    ("mean-flow-1", 2), ("mean-flow-1", 1), ("distilled", 2), ("energy", 1), ("causal", 8), ("causal", 4),
    ("causal", 1),
]  # fmt: skip
# Rows of the sample grids: a model and its head steps.
GRID_ROWS = [
    ("diffusion", 100), ("diffusion", 10), ("flow", 8), ("shortcut", 8), ("shortcut", 1), ("causal", 4),
    ("mean-flow-1", 2), ("mean-flow-1", 1), ("distilled", 2),
]  # fmt: skip
# Models guided in two passes of the backbone, and the same weights guided in one.
GUIDED_TWICE = {"flow-map": "flow-map-1", "mean-flow": "mean-flow-1"}


def write_report(files: list[Path], report: Path) -> None:
    """Replace the generated blocks of ``report`` and draw its images, for the measured image sets."""
    text = report.read_text(encoding="utf-8")
    measured = {path.stem: read_json(path) for path in files if path.exists()}
    text = replace_block(text, "summary", _summary_table(measured))
    for name, values in measured.items():
        text = replace_block(text, name, _table(values))
        text = replace_block(text, f"{name}-guidance", _guidance_table(values))
        text = replace_block(text, f"{name}-passes", _passes_table(values))
        sample_grid(name, values, report.parent / "images" / f"comparison-{name}.png")
    measured = {name: values for name, values in measured.items() if "times" in values}
    if measured:
        plot(measured, report.parent / "images" / "distance-against-seconds.png")
        plot_guidance(measured, report.parent / "images" / "guidance-passes.png")
    with atomic_path(report) as temporary:
        temporary.write_text(text, encoding="utf-8")


def replace_block(text: str, name: str, block: str) -> str:
    """Return ``text`` with the lines between the marks of ``name`` replaced by ``block``."""
    pattern = rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)"
    assert re.search(pattern, text, re.DOTALL), f"no block {name}"
    return re.sub(pattern, lambda match: match[1] + block + match[2], text, flags=re.DOTALL)


def _steps(row: dict[str, Any]) -> str:
    steps = row["steps"]
    return str(steps) if isinstance(steps, int) else " → ".join(map(str, steps))


def _summary_table(measured: dict[str, Any]) -> str:
    """Return FD, its ratio to diffusion at 100 steps, and the speed-up of the most important rows."""
    columns = ("FD", "ratio", "times faster, batch 1", "times faster, batch 64")
    heads = [f"{name}, {column}" if column == "FD" else column for name in measured for column in columns]
    lines = ["| head | head steps | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for model, steps in SUMMARY:
        cells = [TITLES[model], str(steps)]
        for values in measured.values():
            rows, times = values["rows"], values.get("times", {})
            row, base = rows.get(f"{model} {steps} seed 0"), rows.get("diffusion 100 seed 0")
            if row is None or base is None:
                cells += [""] * len(columns)
                continue
            distance, baseline = (statistics.mean(_distances(values, each)) for each in (row, base))
            cells += [f"{distance:.1f}", f"{distance / baseline:.3f}"]
            timed, timed_base = times.get(f"{model} {steps}", {}), times.get("diffusion 100", {})
            for key in ("batch 1", "batch 64"):
                cells.append(
                    f"{timed_base[key] / timed[key]:.1f}" if key in timed and key in timed_base else ""
                )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _table(values: dict[str, Any]) -> str:
    """Return every row of an image set: figures, seconds and the head's fraction of them."""
    distance = values["setting"]["distance"]
    suffix = distance.removeprefix("FD ")
    lines = [
        f"| head | head steps | guidance | {distance} | ratio to diffusion, 100 steps | KID × 1000 |"
        f" IS {suffix} | class accuracy | ms per image, batch 1 | ms per image, batch 64 |"
        " head's fraction of seconds, batch 1 | head's fraction, batch 64 |",
        "|---" * 12 + "|",
    ]
    rows = values["rows"]
    base = _distances(values, rows["diffusion 100 seed 0"]) if "diffusion 100 seed 0" in rows else []
    for row in rows.values():
        if row.get("seed", 0) != 0:
            continue
        found = _distances(values, row)
        spread = f" ± {statistics.stdev(found):.1f} ({len(found)} seeds)" if len(found) > 1 else ""
        name = row["name"]
        title = TITLES.get(name, name)
        ratio = f"{statistics.mean(found) / statistics.mean(base):.3f}" if base and "steps" in row else ""
        times = values.get("times", {}).get(f"{name} {_steps(row)}" if "steps" in row else "", {})
        cells = [
            title, _steps(row) if "steps" in row else "", f"{row['guidance']:g}" if "guidance" in row else "",
            f"{statistics.mean(found):.1f}{spread}", ratio, f"{1000 * row[f'KID {suffix}']:.2f}",
            f"{row[f'IS {suffix}']:.2f}", f"{row['class accuracy']:.3f}",
            *(f"{1000 * times[key]:.1f}" if key in times else "" for key in ("batch 1", "batch 64")),
            *(f"{times[key]:.0%}" if key in times else "" for key in ("head share 1", "head share 64")),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _distances(values: dict[str, Any], row: dict[str, Any]) -> list[float]:
    """Return the distances of a row's model and steps at every sampling seed, for the same weights."""
    same = ("name", "steps", "sha256")
    alike = [
        other for other in values["rows"].values() if all(other.get(key) == row.get(key) for key in same)
    ]
    return [other[values["setting"]["distance"]] for other in alike]


def _guidance_table(values: dict[str, Any]) -> str:
    """Return the distance of each model by guidance scale."""
    sweeps: dict[str, dict[str, float]] = {}
    for key, found in values["sweeps"].items():
        if key == "diffusion without limit":
            continue
        name, _, guidance = key.rpartition(" ")
        sweeps.setdefault(name, {})[guidance] = found["distance"]
    scales = list(dict.fromkeys(scale for found in sweeps.values() for scale in found))
    lines = [
        "| head | " + " | ".join(f"guidance {scale}" for scale in scales) + " |",
        "|---" * (len(scales) + 1) + "|",
    ]
    lines += [
        f"| {TITLES[name]} | "
        + " | ".join(f"{found[scale]:.1f}" if scale in found else "" for scale in scales)
        + " |"
        for name, found in sweeps.items()
    ]
    unlimited = values["sweeps"].get("diffusion without limit")
    if unlimited:
        lines += [
            "",
            "The diffusion head at 100 steps without a limit on the predicted token:"
            f" {unlimited['distance']:.1f}.",
        ]
    return "\n".join(lines) + "\n"


def _passes_table(values: dict[str, Any]) -> str:
    """Return the ratios of distance and seconds of guidance in one pass of the backbone to two passes."""
    distance = values["setting"]["distance"]
    lines = [
        f"| head | head steps | best scale, two passes | best scale, one pass | {distance}, two passes |"
        " FD, one pass | ratio of FDs | ratio of the backbone's seconds, batch 1 | backbone, batch 64 |"
        " ratio of all seconds, batch 1 | all, batch 64 |",
        "|---" * 11 + "|",
    ]
    for two, one in GUIDED_TWICE.items():
        for steps in (1, 2, 4):
            rows = [values["rows"].get(f"{model} {steps} seed 0") for model in (two, one)]
            if not all(rows):
                continue
            times = [values.get("times", {}).get(f"{model} {steps}", {}) for model in (two, one)]
            shares = [
                f"{times[1][key] / times[0][key]:.2f}" if all(key in found for found in times) else ""
                for key in ("backbone 1", "backbone 64", "batch 1", "batch 64")
            ]
            found = [row[distance] for row in rows]
            scales = [f"{row['guidance']:g}" for row in rows]
            cells = [
                TITLES[two],
                str(steps),
                *scales,
                *(f"{d:.1f}" for d in found),
                f"{found[1] / found[0]:.3f}",
                *shares,
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(measured: dict[str, Any], path: Path) -> None:
    """Plot distance against seconds per image at batch 1, one panel per image set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(measured), figsize=(6 * len(measured), 4.2), squeeze=False)
    for panel, (name, values) in zip(panels[0], measured.items()):
        distance = values["setting"]["distance"]
        for model, color in COLORS.items():
            title = TITLES[model]
            found = [
                (values["times"][f"{model} {_steps(row)}"]["batch 1"], row[distance], _steps(row))
                for row in values["rows"].values()
                if row["name"] == model
                and row.get("seed") == 0
                and f"{model} {_steps(row)}" in values.get("times", {})
            ]
            if not found:
                continue
            points = sorted(point for point in found if "→" not in point[2])
            panel.plot([p[0] for p in points], [p[1] for p in points], "o-", color=color, label=title)
            for seconds, value, steps in found:
                if "→" in steps:
                    panel.plot([seconds], [value], "s", color=color, label=f"{title}, {steps} (DiSA)")
                else:
                    panel.annotate(
                        steps, (seconds, value), textcoords="offset points", xytext=(4, 4), fontsize=8
                    )
        if "reconstructions" in values["rows"]:
            panel.axhline(
                values["rows"]["reconstructions"][distance],
                color="gray",
                linestyle="--",
                label="reconstructions",
            )
        panel.set(
            xscale="log", title=name, xlabel="seconds per image, batch 1", ylabel=distance, ylim=(0, None)
        )
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="lower center", ncol=4)
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def plot_guidance(measured: dict[str, Any], path: Path) -> None:
    """Plot distance against guidance scale in two passes and in one, one panel per image set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(measured), figsize=(6 * len(measured), 3.6), squeeze=False)
    for panel, (name, values) in zip(panels[0], measured.items()):
        for pair, color in zip(GUIDED_TWICE.items(), ("#8172b3", "#da8bc3")):
            for model, style in zip(pair, ("o--", "o-")):
                found = sorted(
                    (float(key.split()[1]), row["distance"])
                    for key, row in values["sweeps"].items()
                    if key.split()[0] == model
                )
                if not found:
                    continue
                panel.plot(
                    [scale for scale, _ in found],
                    [distance for _, distance in found],
                    style,
                    color=color,
                    label=_passes(model),
                )
        panel.set(
            title=name, xlabel="guidance scale", ylabel=f"{values['setting']['distance']}, 2,000 images"
        )
        panel.legend(fontsize=8)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def _passes(model: str) -> str:
    return TITLES[model] if model in GUIDED_TWICE.values() else f"{TITLES[model]}, in two passes"


def sample_grid(name: str, values: dict[str, Any], path: Path) -> None:
    """Draw the same seeds with each head, one row per head.

    The existing image is kept unless all weights of the recorded rows are present.
    """
    found = [(model, steps, values["rows"].get(f"{model} {steps} seed 0")) for model, steps in GRID_ROWS]
    shown = [(model, steps, row) for model, steps, row in found if row is not None]
    if any(checksums(Path(row["weights"])) != row["sha256"] for _, _, row in shown):
        print(f"{path} is kept: weights of its rows are missing in {WEIGHTS / name}. {TRAIN} trains them.")
        return
    rows = []
    for _, steps, row in shown:
        pipeline = Pipeline.from_pretrained(row["weights"], dtype=values["setting"]["dtype"])
        labels = [index % len(pipeline.classes) for index in range(16)]
        passes = row["sampling"].get("guidance_passes")
        config = pipeline.sampling_config(head_steps=steps, guidance=row["guidance"], guidance_passes=passes)
        rows.append(pipeline.draw(labels, list(range(16)), config))
    settings = {"rows": ", ".join(f"{model} {steps}" for model, steps, _ in shown), "seeds": "0 to 15"}
    sheet = grid(torch.cat(rows), columns=16)
    save_png(
        sheet.resize((sheet.width * 1024 // sheet.width, sheet.height * 1024 // sheet.width)), path, settings
    )
