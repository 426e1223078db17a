"""Distances of models fine-tuned to four new avatar styles, and of models trained on these from nothing.

    OMP_NUM_THREADS=1 nice python -m benchmarks.fine_tuning [--only ROW …]

Takes 1,000 training images of each style of the image set (``far data avatars data/avatars-64``), trains a
small model on twelve styles, and from it, or from nothing, models of the other four. The models are those of
the recipe avatars-64 with 2.6 M parameters in place of 7.4 M. The distance is that of ``far evaluate`` with
1,000 images to the held-out images of the four styles. An interrupted run continues. Rows go to
docs/results/fine-tuning.json, and a Markdown table is printed. Everything takes about 50 minutes on one core.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from benchmarks.recorded import Measurements, checksums, made
from far.cli.main import main as far
from far.data.image_sets import PARTS, open_image_set
from far.data.shards import ShardWriter
from far.errors import InputError
from far.files import read_json

RECIPE = "avatars-64"
SIZES = (
    "generator.network.backbone.width=192",
    "generator.network.backbone.encoder_depth=2",
    "generator.network.backbone.decoder_depth=2",
    "generator.network.head.width=192",
)
BASE_STEPS, STEPS = 2400, 1200  # of the model of twelve styles, and of four from nothing
NEW_CLASSES = 4
PER_CLASS = 1000
COUNT = 1000
WORK = Path("runs/fine-tuning")
RESULTS = Path("docs/results/fine-tuning.json")
_SHARD_ROWS = 2000


@dataclasses.dataclass(frozen=True)
class Training:
    """A training on the four new styles.

    Attributes:
        part: fraction of ``STEPS``.
        tuned: start from the model of the other styles.
        overrides: of the recipe.
    """

    part: float
    tuned: bool = True
    overrides: tuple[str, ...] = ()


ROWS = {
    "from-nothing": Training(1, tuned=False),
    "from-nothing-quarter": Training(1 / 4, tuned=False),
    "tuned-quarter": Training(1 / 4),
    "tuned-eighth": Training(1 / 8),
    "adapters-quarter": Training(1 / 4, overrides=("generator.adapter_rank=8",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data/avatars-64"), help="image set")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    arguments = parser.parse_args()
    recorded = Measurements(RESULTS)
    split(arguments.data, WORK)
    for name in arguments.only:
        measure(name, WORK, recorded)
    print(table(recorded.values["rows"]))


def split(data: Path, work: Path) -> None:
    """Write the image sets ``work/old-images``, without the last four classes, and ``work/new-images``.

    The training parts have the first ``PER_CLASS`` images of each class, the held-out parts have all.
    """
    for part in PARTS:
        images = open_image_set(data / part)
        classes, labels = images.meta["classes"], images.all("labels")
        most = PER_CLASS if part == "train" else len(images)
        first = len(classes) - NEW_CLASSES
        for name, numbers in (("old", range(first)), ("new", range(first, len(classes)))):
            meta = {**images.meta, "classes": [classes[number] for number in numbers], "most per class": most}
            writer = ShardWriter(work / f"{name}-images" / part, meta)
            if writer.complete:
                continue
            rows = torch.cat([(labels == number).nonzero()[:most, 0] for number in numbers]).sort().values
            for chosen in rows[writer.count :].split(_SHARD_ROWS):
                tensors = {"images": images.rows("images", chosen), "labels": labels[chosen] - numbers.start}
                writer.write(tensors, cursor=writer.count + len(chosen))
            writer.finish()


def measure(name: str, work: Path, recorded: Measurements) -> None:
    """Train and evaluate one row, unless the same weights are recorded already."""
    row = ROWS[name]
    steps, options = round(STEPS * row.part), list(row.overrides)
    if row.tuned:
        base = train(work, "old", "base", BASE_STEPS)
        options.append(f"generator.start_from={base}")
    folder = train(work, "new", name, steps, *options)
    weights = checksums(folder)
    if recorded.values["rows"].get(name, {}).get("sha256") == weights:
        return
    out = work / "evaluations" / name
    reference = ["--reference", work / "new-images", "--count", COUNT]
    _far("evaluate", "--weights", folder, *reference, "--out", out)
    figures = read_json(out / "result.json")["figures"]
    found = {"steps": steps, "count": COUNT, "figures": figures, "sha256": weights}
    recorded.keep("rows", name, {**found, "weights": str(folder), **made()})


def train(work: Path, images: str, name: str, steps: int, *options: str) -> Path:
    """Train or continue a model on one of the image sets, and return its folder."""
    where = [f"data={work / f'{images}-images'}", f"run={work / images}", f"autoencoder_from={RECIPE}"]
    _far("cache", RECIPE, *where)
    training = [f"generator.training.steps={steps}", f"generator.training.warmup_steps={max(1, steps // 20)}"]
    # The rows are evaluated with more images.
    training += [f"generator.training.evaluate_every={steps}", "generator.evaluation.images=64"]
    _far("train", RECIPE, *where, f"model={name}", *SIZES, *training, *options, "--resume")
    return work / images / name


def _far(*arguments: object) -> None:
    """Run a command of ``far`` in this process."""
    if status := far([str(argument) for argument in arguments]):
        raise InputError(f"far {arguments[0]} ended with status {status}. Run the same command again")


def table(rows: dict[str, Any]) -> str:
    """Return a Markdown table of the rows with their steps and figures."""
    shown = [name for name in ROWS if name in rows]
    every = rows[shown[0]]["figures"] if shown else {}
    figures = [figure for figure in every if figure.partition(" ")[0] in ("FD", "KID", "recall")]
    lines = ["| training | steps | " + " | ".join(figures) + " |", "|---" * (2 + len(figures)) + "|"]
    for name in shown:
        values = " | ".join(f"{rows[name]['figures'][figure]:.4g}" for figure in figures)
        lines.append(f"| {name} | {rows[name]['steps']:,} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
