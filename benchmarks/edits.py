"""Grid of edits for the documents, and the seconds of an edit.

    python -m benchmarks.edits

Uses the bundled avatars-64, held-out images (far data avatars data/avatars-64), seeds 0 to 2, and the model's
default sampling. Measures ``Pipeline.edit`` with one version, median and range over the rows, and the whole
``far edit``.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import far
from far.data.image_sets import read_images
from far.data.shards import ShardReader
from far.editing import box_mask
from far.pictures import grid, save_png, to_pictures

SIZE = (64, 64)
MIDDLE, LOWER_HALF = box_mask(SIZE, (16, 16, 48, 48)), box_mask(SIZE, (0, 32, 64, 64))
# Redrawn region, class and number of the held-out image, and the class to draw.
ROWS = [
    (MIDDLE, "planets", 5, "planets"),
    (LOWER_HALF, "critters", 5, "critters"),
    (~MIDDLE, "moods", 8, "moods"),
    (~MIDDLE, "voxel-bot", 7, "voxel-bot"),
    (MIDDLE, "planets", 9, "moods"),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--picture", type=Path, default=Path("docs/images/edits.png"))
    arguments = parser.parse_args()
    pipeline = far.load("avatars-64", dtype="auto")
    reader = ShardReader(Path("data/avatars-64/held-out"), "images")
    labels = reader.rows("labels", torch.arange(len(reader)))
    cells, seconds = [], []
    for mask, shown, number, label in ROWS:
        row = (labels == pipeline.label(shown)).nonzero()[number]
        image = read_images(reader, row)[0] / 2 + 0.5
        versions = pipeline.edit(image, mask, label, seed=range(3), output="tensor")
        cells += [image, torch.where(mask, 0.5, image), *versions]
        start = time.perf_counter()
        pipeline.edit(image, mask, label)
        seconds.append(time.perf_counter() - start)
    sheet = grid(torch.stack(cells), columns=5)
    save_png(sheet.resize((2 * sheet.width, 2 * sheet.height), 0), arguments.picture)
    print(f"Pipeline.edit: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"
        to_pictures(image.unsqueeze(0))[0].save(path)
        command = [
            sys.executable,
            "-m",
            "far",
            "edit",
            path,
            "--label",
            "moods",
            "--redraw",
            "16",
            "16",
            "48",
            "48",
        ]
        start = time.perf_counter()
        subprocess.run(
            [*map(str, command), "--out", str(path.with_name("edited.png"))], check=True, capture_output=True
        )
        print(f"far edit, the whole command: {time.perf_counter() - start:.2f} s")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
