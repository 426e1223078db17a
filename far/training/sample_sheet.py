"""Sample sheets of a run: images of its model after a step, drawn from the same seeds each time."""

from pathlib import Path

from far.pictures import contact_sheet, save_png
from far.pipeline import Pipeline
from far.progress import ImageBar


def write_sample_sheet(pipeline: Pipeline, labels: list[int], folder: Path, step: int) -> None:
    """Draw an image per label with seeds 0, 1 …, and write ``samples/step-00001234.png``."""
    with ImageBar(len(labels), "sample sheet", leave=False) as bar:
        images = pipeline.draw(labels, range(len(labels)), callback=bar.ar_step)
    save_png(contact_sheet(images, labels), folder / "samples" / f"step-{step:08d}.png", {"step": step})
