"""Plot of distance against seconds per image, one panel per image set, readable at 400 pixels of width."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results_rows import distance_of, mean, model_rows, rows_of, seconds_of, title
from far.files import atomic_path

COLORS = {
    "diffusion": "#c44e52", "mar": "#555555", "shortcut": "#4c72b0", "masked": "#da8bc3", "causal": "#55a868",
    "flow": "#dd8452", "flow-map": "#8172b3", "energy": "#937860", "distilled": "#64b5cd",
}  # fmt: skip
# Places of a label around its point, in points, the preferred first.
CIRCLE = [(0, 1), (0.7, 0.7), (-0.7, 0.7), (0, -1), (0.7, -0.7), (-0.7, -0.7), (1, 0), (-1, 0)]
OFFSETS = [(radius * x, radius * y) for radius in (12, 18, 24, 32, 40, 50) for x, y in CIRCLE]


def plot(measured: dict[str, Any], path: Path) -> None:
    """Write the plot of every timed row; its labels are the head steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    figure, buffer = draw(measured), io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    plt.close(figure)
    with atomic_path(path) as temporary:
        Image.open(buffer).convert("RGB").quantize(64).save(temporary, format="png", optimize=True)


def draw(measured: dict[str, Any]) -> Any:
    """Return the figure."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(len(measured), 1, figsize=(6.4, 4.4 * len(measured) + 1.4), squeeze=False)
    legend: dict[str, Any] = {}
    for panel, (name, values) in zip(panels[:, 0], measured.items()):
        for model, color in COLORS.items():
            points = [
                (seconds, mean(distance_of(values, rows)), steps, rows[0]["backbone"])
                for steps, rows in rows_of(values, model).items()
                if (seconds := seconds_of(values, rows[0], 1)) is not None
            ]
            if points:
                x, y, steps, (backbone, *_) = zip(*sorted(points))
                [line] = panel.plot(x, y, "o-", color=color, markersize=7)
                legend.setdefault(f"{backbone}: {title(model, backbone)}", line)
                label_points(panel, x, y, steps, color)
        training = model_rows(values)[0]["training"]
        heading = f"{name}, trained for {training['steps']:,} steps of {training['batch_size']} images"
        label = f"{values['setting']['distance']}, lower is better"
        panel.set(
            xscale="log", yscale="log", title=heading, xlabel="seconds per image, batch 1", ylabel=label
        )
        panel.margins(0.1)
        write_out_ticks(panel)
    lines = -(-len(legend) // 2)
    figure.legend(
        legend.values(), legend.keys(), fontsize=10, loc="lower center", ncol=2, title="labels are head steps"
    )
    figure.tight_layout(rect=(0, (0.24 * lines + 0.35) / figure.get_figheight(), 1, 1))
    for panel in panels[:, 0]:
        place_labels(figure, panel)
    return figure


def label_points(
    panel: Any, x: Sequence[float], y: Sequence[float], names: Sequence[object], color: str
) -> None:
    """Write a name on each point, which :func:`place_labels` moves beside it."""
    from matplotlib.patheffects import withStroke

    for name, point in zip(names, zip(x, y)):
        panel.annotate(
            str(name), point, textcoords="offset points", xytext=(0, 0), color=color, fontsize=12,
            fontweight="bold", ha="center", va="center",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip


def write_out_ticks(panel: Any) -> None:
    """Give both logarithmic axes round values as ticks, written as plain numbers."""
    from matplotlib import ticker

    for axis, low, high in ((panel.xaxis, *panel.get_xlim()), (panel.yaxis, *panel.get_ylim())):
        places = [digit * 10.0**power for power in range(-4, 5) for digit in (1, 2, 3, 5)]
        if high < 3 * low:
            places = list(ticker.MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(low, high))
        axis.set_major_locator(ticker.FixedLocator([value for value in places if low <= value <= high]))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(ticker.NullLocator())
        axis.set_tick_params(labelsize=12)
    panel.xaxis.label.set_fontsize(12)
    panel.yaxis.label.set_fontsize(12)


def place_labels(figure: Any, panel: Any) -> None:
    """Move each label to the first place around its point where it covers no marker and no other label.

    Labels stay within the panel, and a thin line leads to the point of a distant one.
    """
    from matplotlib.transforms import Bbox

    renderer, frame = figure.canvas.get_renderer(), panel.get_window_extent()
    centers = [panel.transData.transform(label.xy) for label in panel.texts]
    radius = 4 * figure.dpi / 72
    taken = [Bbox.from_bounds(x - radius, y - radius, 2 * radius, 2 * radius) for x, y in centers]
    panel.autoscale(False)
    for label in panel.texts:
        boxes = []
        for offset in OFFSETS:
            label.set_position(offset)
            boxes.append(label.get_window_extent(renderer))
        free = [
            index
            for index, box in enumerate(boxes)
            if frame.containsx(box.x0) and frame.containsx(box.x1)
            if frame.containsy(box.y0) and frame.containsy(box.y1)
            if not box.count_overlaps(taken)
        ]
        best = free[0] if free else 0
        label.set_position(OFFSETS[best])
        taken.append(boxes[best])
        if best >= 2 * len(CIRCLE):
            end = panel.transData.inverted().transform(boxes[best].get_points().mean(axis=0))
            panel.plot(*zip(label.xy, end), "-", color=label.get_color(), linewidth=0.8, zorder=1)
