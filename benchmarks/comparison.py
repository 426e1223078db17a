"""The models, image sets and rows of the comparison in docs/results.md."""

import argparse
import dataclasses
from pathlib import Path

from benchmarks.recorded import WEIGHTS

RESULTS = Path("docs/results")
WORK = Path("runs/results")
BATCH = 100
BATCH_SIZES = (1, 64)
# As in far evaluate. On processors without bfloat16 instructions it is three times as fast as bfloat16.
DTYPE = "float32"
# Sampling seeds of the sweeps. Rows take seeds from 0 on, so that no row is chosen by its own images.
SWEEP_SEED = 1_000_000


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of the comparison: its training and the head steps of its rows.

    Attributes:
        backbone: suffix of the recipe's name.
        head: kind of head, or ``distilled``.
        steps: head steps of each row.
        trainings: number of training seeds, from 0 on.
        overrides: of the recipe, besides the kind of head.
        passes: passes of the backbone with guidance; the default depends on the head.
        weights_of: model with the same weights, sampled with other ``passes``.
    """

    backbone: str
    head: str
    steps: tuple[int, ...]
    trainings: int = 1
    overrides: tuple[str, ...] = ()
    passes: int | None = None
    weights_of: str | None = None


# Without the limit, a diffusion head trained this briefly draws tokens of hundreds of standard deviations.
LIMITED = ("generator.network.head.token_limit=5.0",)
# The largest scale that heads with learned guidance are trained for.
LEARNED_GUIDANCE = 4.0
# In order of importance. Heads share the block-causal backbone, which learns from every token of a pass, and
# backbones the shortcut head. ``mar`` is MAR's recipe as published, ``masked`` is FAR's.
MODELS = {
    "diffusion": Model("block-causal", "diffusion", (100, 25, 10), trainings=3, overrides=LIMITED),
    "shortcut": Model("block-causal", "shortcut", (8, 4, 2, 1), trainings=3),
    "causal": Model("causal", "shortcut", (8, 4, 2, 1), trainings=3),
    "mar": Model("masked", "diffusion", (100,), overrides=LIMITED),
    "masked": Model("masked", "shortcut", (8, 4)),
    "flow": Model("block-causal", "flow", (8, 4, 2)),
    "flow-map": Model(
        "block-causal",
        "flow_map",
        (4, 2, 1),
        trainings=2,
        overrides=(f"generator.network.head.max_guidance={LEARNED_GUIDANCE}",),
        passes=1,
    ),
    "flow-map-2-passes": Model("block-causal", "flow_map", (2,), passes=2, weights_of="flow-map"),
    "energy": Model(
        "block-causal",
        "energy",
        (1,),
        # A quarter of the other heads' rate, as in EAR.
        overrides=("generator.training.head_learning_rate=5.0e-4", "generator.sampling.head_steps=1"),
    ),
    # The model TEACHER, saved as a MAR checkpoint, converted and distilled.
    "distilled": Model("masked", "distilled", (4, 2, 1), passes=1),
}
TEACHER = "mar"


@dataclasses.dataclass(frozen=True)
class Row:
    """A model and its head steps. Seed s is the training seed; it also selects the sampling seeds."""

    model: str
    steps: int
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.model} {self.steps}"

    @property
    def key(self) -> str:
        return f"{self.name} seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Files of an image set, and the numbers of images drawn from each model.

    Attributes:
        name: also the name of its recipes, of its folder of runs and of its file of results.
        data: folder of the images.
        preparation: commands that make data, autoencoder and latents.
        count: images per row.
        sweep_count: images per point of a sweep.
    """

    name: str
    data: Path
    preparation: tuple[tuple[str, ...], ...]
    count: int = 10_000
    sweep_count: int = 2_000

    def recipe(self, model: Model) -> Path:
        return Path(f"recipes/comparison/{self.name}-{model.backbone}.yaml")

    def weights(self, name: str, seed: int = 0) -> Path:
        name = MODELS[name].weights_of or name
        return WEIGHTS / self.name / (f"{name}-seed-{seed}" if seed else name)

    def trained(self, name: str, seed: int = 0) -> bool:
        """Return whether the weights are present. ``config.json`` is written last."""
        return (self.weights(name, seed) / "config.json").exists()

    @property
    def runs(self) -> Path:
        return Path("runs/comparison") / self.name

    @property
    def results(self) -> Path:
        return RESULTS / f"{self.name}.json"


SETS = {
    "avatars-64": ImageSet(
        "avatars-64",
        Path("data/avatars-64"),
        (
            ("data", "avatars", "data/avatars-64"),
            ("cache", "recipes/comparison/avatars-64-block-causal.yaml"),
        ),
    ),
    "fashion-mnist": ImageSet(
        "fashion-mnist",
        Path("data/fashion-mnist"),
        (
            ("data", "fashion-mnist", "data/fashion-mnist", "--from", "/usr/share/datasets/fashion-mnist"),
            ("train-autoencoder", "recipes/comparison/fashion-mnist-block-causal.yaml", "--resume"),
            ("cache", "recipes/comparison/fashion-mnist-block-causal.yaml"),
        ),
    ),
}


def all_rows() -> list[Row]:
    """Return every row in order of importance: the first training of each model, then the others."""
    most = max(model.trainings for model in MODELS.values())
    return [
        Row(name, steps, seed)
        for seed in range(most)
        for name, model in MODELS.items()
        if seed < model.trainings
        for steps in model.steps
    ]


def add_sets(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--set``."""
    names = list(SETS)
    parser.add_argument("--set", nargs="+", choices=names, default=names, dest="sets", help="default: all")


def add_rows(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--only``."""
    parser.add_argument(
        "--only",
        nargs="+",
        type=_selected,
        metavar="ROW",
        help=f"MODEL or MODEL-STEPS, such as shortcut-8; models: {', '.join(MODELS)}",
    )


def selected_rows(only: list[set[str]] | None) -> list[Row]:
    """Return the rows that ``--only`` selects, in order of importance."""
    return [row for row in all_rows() if only is None or any(row.name in names for names in only)]


def _selected(text: str) -> set[str]:
    """Return the names of the rows of ``MODEL`` or ``MODEL-STEPS``."""
    names = {row.name for row in all_rows() if text in (row.model, f"{row.model}-{row.steps}")}
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} is not a row. Give MODEL or MODEL-STEPS")
    return names
