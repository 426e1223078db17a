"""Distances of models fine-tuned to four new avatar styles, and of models trained on these from nothing.

    OMP_NUM_THREADS=1 nice python -m benchmarks.fine_tuning [--only ROW …]

Splits the image set (``far data avatars data/avatars-64``) into twelve styles and four others, trains a model
on the twelve, and from it, or from nothing, models of the four. Each training is that of the recipe
avatars-64-causal with another number of steps: those of the recipe, a quarter, or an eighth. The distance is
that of ``far evaluate`` to the held-out images of the four styles. An interrupted run continues. Rows go to
docs/results/fine-tuning.json, and a Markdown table is printed. By the time of the recipe, the trainings take
2.4 hours on one core.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.recorded import Measurements, checksums, made
from far.cli.main import main as far
from far.data.image_sets import PARTS, open_image_set
from far.data.shards import ShardWriter
from far.errors import InputError
from far.files import read_json
from far.recipe import load_recipe

RECIPE = "avatars-64-causal"
NEW_CLASSES = 4
COUNT = 2_500  # as many as held-out images of the four styles
WORK = Path("runs/fine-tuning")
RESULTS = Path("docs/results/fine-tuning.json")
_SHARD_ROWS = 2000


@dataclasses.dataclass(frozen=True)
class Training:
    """A training on the four new styles.

    Attributes:
        part: fraction of the recipe's steps.
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
    "head-quarter": Training(1 / 4, overrides=("generator.freeze=[backbone]",)),
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
        measure(name, RECIPE, WORK, COUNT, recorded)
    print(table(recorded.values["rows"]))


def split(data: Path, work: Path) -> None:
    """Write the image sets ``work/old-images``, without the last four classes, and ``work/new-images``."""
    for part in PARTS:
        images = open_image_set(data / part)
        classes, labels = images.meta["classes"], images.all("labels")
        first = len(classes) - NEW_CLASSES
        for name, numbers in (("old", range(first)), ("new", range(first, len(classes)))):
            meta = {**images.meta, "classes": [classes[number] for number in numbers]}
            writer = ShardWriter(work / f"{name}-images" / part, meta)
            if writer.complete:
                continue
            rows = ((labels >= numbers.start) & (labels < numbers.stop)).nonzero().flatten()
            for chosen in rows[writer.count :].split(_SHARD_ROWS):
                tensors = {"images": images.rows("images", chosen), "labels": labels[chosen] - numbers.start}
                writer.write(tensors, cursor=writer.count + len(chosen))
            writer.finish()


def measure(name: str, recipe: str, work: Path, count: int, recorded: Measurements) -> None:
    """Train and evaluate one row, unless the same weights are recorded already."""
    row = ROWS[name]
    steps = load_recipe(recipe).generator.training.steps
    options = list(row.overrides)
    if row.tuned:
        base = train(recipe, work, "old", "base", steps)
        options.append(f"generator.start_from={base}")
    folder = train(recipe, work, "new", name, round(steps * row.part), *options)
    weights = checksums(folder)
    if recorded.values["rows"].get(name, {}).get("sha256") == weights:
        return
    out = work / "evaluations" / name
    reference = ["--reference", work / "new-images", "--count", count]
    _far("evaluate", "--weights", folder, *reference, "--out", out)
    figures = read_json(out / "result.json")["figures"]
    found = {"steps": round(steps * row.part), "count": count, "figures": figures, "sha256": weights}
    recorded.keep("rows", name, {**found, "weights": str(folder), **made()})


def train(recipe: str, work: Path, images: str, name: str, steps: int, *options: str) -> Path:
    """Train or continue a model on one of the image sets, and return its folder."""
    where = [f"data={work / f'{images}-images'}", f"run={work / images}"]
    _far("cache", recipe, *where)
    training = [f"generator.training.steps={steps}", f"generator.training.warmup_steps={max(1, steps // 20)}"]
    training += [f"generator.training.evaluate_every={steps}"]
    _far("train", recipe, *where, f"model={name}", *training, *options, "--resume")
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
