"""Plot of distance against seconds per image, one panel per image set, readable at 400 pixels of width."""

from pathlib import Path
from typing import Any

from benchmarks.results_rows import TITLES, distance_of, mean, rows_of, seconds_of
from far.files import atomic_path

COLORS = {
    "diffusion": "#c44e52", "flow": "#dd8452", "shortcut": "#4c72b0", "causal": "#55a868",
    "flow-map": "#8172b3", "energy": "#937860", "distilled": "#64b5cd",
}  # fmt: skip
# Places of a label around its point, in points, the preferred first.
OFFSETS = [(8, 8), (-8, 8), (8, -8), (-8, -8), (0, 12), (0, -12), (13, 0), (-13, 0)]
OFFSETS += [(2 * x, 2 * y) for x, y in OFFSETS] + [(3 * x, 3 * y) for x, y in OFFSETS]


def plot(measured: dict[str, Any], path: Path) -> None:
    """Write the plot of every timed row; its labels are the head steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = draw(measured)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png", pil_kwargs={"optimize": True})
    plt.close(figure)


def draw(measured: dict[str, Any]) -> Any:
    """Return the figure."""
    from matplotlib import pyplot as plt
    from matplotlib.patheffects import withStroke

    figure, panels = plt.subplots(len(measured), 1, figsize=(6.4, 4.4 * len(measured) + 0.9), squeeze=False)
    for panel, (name, values) in zip(panels[:, 0], measured.items()):
        for model, color in COLORS.items():
            points = [
                (seconds, mean(distance_of(values, rows)), steps)
                for steps, rows in rows_of(values, model).items()
                if (seconds := seconds_of(values, rows[0], 1)) is not None
            ]
            if points:
                x, y, _ = zip(*sorted(points))
                panel.plot(x, y, "o-", color=color, label=TITLES[model], markersize=7)
                for seconds, distance, steps in points:
                    panel.annotate(
                        str(steps), (seconds, distance), textcoords="offset points", xytext=(0, 0),
                        color=color, fontsize=12, fontweight="bold", ha="center", va="center",
                        path_effects=[withStroke(linewidth=3, foreground="white")],
                    )  # fmt: skip
        label = f"{values['setting']['distance']}, lower is better"
        panel.set(xscale="log", yscale="log", title=name, xlabel="seconds per image, batch 1", ylabel=label)
        panel.margins(0.1)
        write_out_ticks(panel)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=11, loc="lower center", ncol=2, title="labels are head steps")
    figure.tight_layout(rect=(0, 1.35 / figure.get_figheight(), 1, 1))
    for panel in panels[:, 0]:
        place_labels(figure, panel)
    return figure


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
    """Move each label to the first place around its point where it covers no marker and no other label."""
    from matplotlib.transforms import Bbox

    renderer = figure.canvas.get_renderer()
    centers = [panel.transData.transform(label.xy) for label in panel.texts]
    radius = 4 * figure.dpi / 72
    taken = [Bbox.from_bounds(x - radius, y - radius, 2 * radius, 2 * radius) for x, y in centers]
    for label in panel.texts:
        boxes = []
        for offset in OFFSETS:
            label.set_position(offset)
            boxes.append(label.get_window_extent(renderer))
        free = [index for index, box in enumerate(boxes) if not box.count_overlaps(taken)]
        best = free[0] if free else 0
        label.set_position(OFFSETS[best])
        taken.append(boxes[best])
