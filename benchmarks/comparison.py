"""The models and image sets of the comparison in docs/results.md."""

import dataclasses
from pathlib import Path

from benchmarks.recorded import WEIGHTS

RESULTS = Path("docs/results")
WORK = Path("runs/results")
COUNT = 10_000
SWEEP_COUNT = 2_000
BATCH = 100
UNLIMITED = "diffusion without limit"
BATCH_SIZES = (1, 64)
DTYPE = "bfloat16"
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.0)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of the comparison: its training and the head steps of its rows.

    Attributes:
        head: kind of head.
        steps: head steps of each row.
        sweep_steps: head steps of the guidance sweep. Without them, the guidance of ``guidance_of`` is used.
        guidances: scales of the guidance sweep.
        guidance_of: model whose best guidance is used.
        recipe: suffix of the recipe's name.
        frozen: whether the head is trained on the diffusion model's backbone, without changing it.
        overrides: of the recipe's head.
        timed: whether seconds are measured.
        weights_of: model with the same weights, sampled with other ``passes``.
        passes: passes of the backbone with guidance.
    """

    head: str
    steps: tuple[int | tuple[int, ...], ...]
    sweep_steps: int | None = None
    guidances: tuple[float, ...] = GUIDANCES
    guidance_of: str | None = None
    recipe: str = ""
    frozen: bool = False
    overrides: tuple[str, ...] = ()
    timed: bool = True
    weights_of: str | None = None
    passes: int | None = None


# Heads that learn guidance up to 4 train a quarter of their steps with plain flow matching.
LEARNED = (1.0, 2.0, 3.0, 4.0)
FLOW_MAP = ("flow_steps=400", "max_guidance=4.0")
MODELS = {
    # Without the limit, a diffusion head trained this briefly draws tokens of hundreds of standard
    # deviations.
    "diffusion": Model("diffusion", (100, 50, 25, 10, 5, (50, 5)), 25, overrides=("token_limit=5.0",)),
    "flow": Model("flow", (32, 8, 4, 2, 1), 8),
    "shortcut": Model("shortcut", (32, 8, 4, 2, 1), 8),
    "causal": Model("shortcut", (8, 4, 2, 1), 8, guidances=(1.0, 2.0, 4.0, 6.0, 8.0), recipe="-causal"),
    # Heads trained on the frozen backbone of the diffusion model.
    "frozen-shortcut": Model("shortcut", (8, 4), guidance_of="shortcut", frozen=True, timed=False),
    "frozen-flow": Model("flow", (8,), guidance_of="flow", frozen=True, timed=False),
    # Heads for one or two steps, guided in two passes of the backbone and in one.
    "mean-flow": Model("flow_map", (4, 2, 1), 2, LEARNED, passes=2, overrides=FLOW_MAP),
    "mean-flow-1": Model("flow_map", (4, 2, 1), 2, LEARNED, passes=1, weights_of="mean-flow"),
    "flow-map": Model(
        "flow_map",
        (4, 2, 1),
        guidance_of="mean-flow",
        passes=2,
        overrides=("objective=lagrangian", *FLOW_MAP),
    ),
    "flow-map-1": Model("flow_map", (4, 2, 1), guidance_of="mean-flow-1", passes=1, weights_of="flow-map"),
    "energy": Model("energy", (1,), 1, LEARNED, overrides=("samples_per_token=4",)),
    # The diffusion model, saved as a MAR checkpoint, converted and distilled.
    "distilled": Model("distilled", (4, 2, 1), 2, LEARNED, passes=1),
}
# The baseline row is also drawn from further sampling seeds.
SPREAD = [("diffusion", 100)]


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Files of an image set; ``preparation`` has the commands that make data, autoencoder and latents."""

    name: str
    data: Path
    preparation: tuple[tuple[str, ...], ...]

    def recipe(self, model: Model) -> str:
        return f"recipes/comparison/{self.name}{model.recipe}.yaml"

    def weights(self, name: str) -> Path:
        return WEIGHTS / self.name / (MODELS[name].weights_of or name)

    @property
    def runs(self) -> Path:
        return Path("runs/comparison") / self.name


SETS = {
    "avatars-64": ImageSet(
        "avatars-64",
        Path("data/avatars-64"),
        (
            ("data", "avatars", "data/avatars-64"),
            ("cache", "recipes/comparison/avatars-64.yaml"),
        ),
    ),
    "fashion-mnist": ImageSet(
        "fashion-mnist",
        Path("data/fashion-mnist"),
        (
            ("data", "fashion-mnist", "data/fashion-mnist", "--from", "/usr/share/datasets/fashion-mnist"),
            ("train-autoencoder", "recipes/comparison/fashion-mnist.yaml", "--resume"),
            ("cache", "recipes/comparison/fashion-mnist.yaml"),
        ),
    ),
}
