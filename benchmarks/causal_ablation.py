"""Ablation of remedies against drift in causal models, on Fashion-MNIST; writes the table of docs/results.md.

    python -m benchmarks.causal_ablation [--train]

Figures are kept in docs/results/causal-ablation.json and measured again if their weights changed. ``--train``
trains the models into runs/ (half an hour each on one core, and 10 minutes for an autoencoder). Until all are
trained, recorded figures are kept.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison import DTYPE, RESULTS, SETS, SWEEP_SEED, WORK
from benchmarks.recorded import TRAIN, Measurements
from benchmarks.results import run
from benchmarks.results_measure import (
    Evaluator,
    current,
    current_rows,
    described,
    folder_training,
    generate,
    generation_of,
    measure_floors,
    reconstructed_features,
)
from benchmarks.results_report import replace_block
from benchmarks.results_rows import training_text
from far.evaluation.generated import Generation
from far.evaluation.images import open_images
from far.evaluation.metrics import FeatureStatistics, frechet_distance
from far.files import atomic_path
from far.pipeline import Pipeline
from far.sampling import SeededNoise, sample

IMAGES = SETS["fashion-mnist"]
RECIPE = "recipes/comparison/fashion-mnist-causal.yaml"
HEAD_STEPS = 8
GUIDANCES = (2.0, 4.0, 8.0)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A trained model and its sampling; ``spherical`` overrides the value of its training."""

    folder: Path
    overrides: tuple[str, ...] = ()
    sampling: tuple[tuple[str, Any], ...] = ()
    spherical: bool | None = None


PLAIN = Path("runs/comparison/fashion-mnist/causal-plain")
NOISY = Path("runs/comparison/fashion-mnist/causal")
SPHERE = Path("runs/comparison/fashion-mnist-spherical/causal-plain")
WITHOUT_NOISE = ("generator.network.backbone.input_noise=0",)
SPHERICAL = (
    "run=runs/comparison/fashion-mnist-spherical",
    "autoencoder.model.spherical=true",
    "generator.network.spherical=true",
    *WITHOUT_NOISE,
)
VARIANTS = {
    "plain": Variant(PLAIN, WITHOUT_NOISE),
    "guidance constant": Variant(PLAIN, WITHOUT_NOISE, sampling=(("guidance_schedule", "constant"),)),
    "guidance off for the first half": Variant(
        PLAIN, WITHOUT_NOISE, sampling=(("guidance_interval", (0.5, 1.0)),)
    ),
    "tokens renormalized in sampling only": Variant(PLAIN, WITHOUT_NOISE, spherical=True),
    "input noise 0.1 (the default)": Variant(NOISY),
    "spherical latents": Variant(SPHERE, SPHERICAL),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", action="store_true", help="train what is not trained yet")
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="only these"
    )
    arguments = parser.parse_args()
    if arguments.train:
        for command in IMAGES.preparation:
            run(*command)
        for variant in dict.fromkeys(
            (VARIANTS[name].folder, VARIANTS[name].overrides) for name in arguments.variants
        ):
            train(*variant)
    store = Measurements(RESULTS / "causal-ablation.json")
    missing = [name for name in arguments.variants if not (VARIANTS[name].folder / "config.json").exists()]
    if missing:
        print(
            f"{store.path}: no weights of {', '.join(missing)} in runs/. Recorded rows are kept."
            f" {TRAIN} trains them."
        )
    else:
        training = folder_training(VARIANTS[arguments.variants[0]].folder)
        store.drop_other_weights(common={"training": training, "dtype": DTYPE})
        with torch.no_grad():
            for name in arguments.variants:
                measure(name, store)
    report = Path("docs/results.md")
    text = replace_block(report.read_text(encoding="utf-8"), "causal-ablation", table(store.values))
    with atomic_path(report) as temporary:
        temporary.write_text(text, encoding="utf-8")


def train(folder: Path, overrides: tuple[str, ...]) -> None:
    if overrides == SPHERICAL:
        run("train-autoencoder", RECIPE, *overrides, "--resume")
        run("cache", RECIPE, *overrides)
    run("train", RECIPE, f"model={folder.name}", *overrides, "--resume")


def measure(name: str, store: Measurements) -> None:
    """Measure the distance and the drift of the latents at each guidance scale."""
    variant = VARIANTS[name]
    folder = as_sampled(variant)
    evaluator: Evaluator | None = None
    for guidance in GUIDANCES:
        generation = generation_of(
            folder, head_steps=HEAD_STEPS, guidance=guidance, seed=SWEEP_SEED, **dict(variant.sampling)
        )
        key = f"{name}, guidance {guidance:g}"
        if current(store.values["rows"].get(key), generation):
            continue
        evaluator = evaluator or measure_floors(IMAGES, current_rows(IMAGES))
        features, labels = generate(generation, evaluator.network, IMAGES.sweep_count)
        found = {
            "distance": frechet_distance(FeatureStatistics.of(features), evaluator.reference.statistics),
            "class accuracy": evaluator.classifier.accuracy(features, labels),
            "reconstructions": reconstruction_distance(folder, evaluator),
            "deviations": deviations(folder, generation),
            "data deviations": data_deviations(folder),
            "count": IMAGES.sweep_count,
        }
        store.keep("rows", key, {**found, **described(generation, folder_training(variant.folder))})


def as_sampled(variant: Variant) -> Path:
    """Return the model's folder, or a copy whose sampling differs from its training."""
    if variant.spherical is None:
        return variant.folder
    pipeline = Pipeline.from_pretrained(variant.folder)
    network = dataclasses.replace(pipeline.model.config.network, spherical=variant.spherical)
    pipeline.model.config = dataclasses.replace(pipeline.model.config, network=network)
    folder = WORK / f"{variant.folder.parent.name}-spherical-{variant.spherical}"
    pipeline.save_pretrained(folder)
    return folder


def deviations(folder: Path, generation: Generation) -> list[float]:
    """Return the root mean square of the first and of the last row of latents, over 500 generated images."""
    pipeline = Pipeline.from_pretrained(folder, dtype=generation.dtype, device="cpu")
    labels = torch.arange(500) % len(pipeline.classes)
    latents = sample(
        pipeline.model, labels, SeededNoise(range(500), torch.device("cpu")), generation.sampling
    )
    return [float(latents[:, :, row].square().mean().sqrt()) for row in (0, -1)]


def data_deviations(folder: Path) -> list[float]:
    """Return the root mean square of the first and of the last row of latents, over 2,000 training images."""
    autoencoder = Pipeline.from_pretrained(folder, device="cpu").autoencoder
    assert autoencoder is not None
    images = open_images(IMAGES.data / "train").tensor(range(2000)) * 2 - 1
    latents = torch.cat([autoencoder.normalize(autoencoder.encode(part).mean) for part in images.split(100)])
    return [float(latents[:, :, row].square().mean().sqrt()) for row in (0, -1)]


def reconstruction_distance(folder: Path, evaluator: Evaluator) -> float:
    """Return the distance of the autoencoder's reconstructions of training images, a model's floor."""
    source = open_images(IMAGES.data / "train")
    features = reconstructed_features(folder, source, IMAGES.sweep_count, evaluator.network)
    return frechet_distance(FeatureStatistics.of(features), evaluator.reference.statistics)


def table(values: dict[str, Any]) -> str:
    lines = [
        "| causal model | "
        + " | ".join(f"guidance {scale:g}" for scale in GUIDANCES)
        + " | class accuracy at the best scale | FD of its reconstructions |"
        " first → last row's RMS / the data's, at the best scale |"
        f" RMS ratio at guidance {GUIDANCES[-1]:g} |",
        "|---" * (len(GUIDANCES) + 5) + "|",
    ]
    for name in VARIANTS:
        found = [values["rows"].get(f"{name}, guidance {scale:g}") for scale in GUIDANCES]
        rows = [row for row in found if row]
        if not rows:
            continue
        best = min(rows, key=lambda row: row["distance"])
        cells = [
            name,
            *(
                ""
                if row is None
                else f"**{row['distance']:.1f}**"
                if row is best
                else f"{row['distance']:.1f}"
                for row in found
            ),
            f"{best['class accuracy']:.3f}",
            f"{best['reconstructions']:.1f}",
            _drift(best),
            _drift(found[-1]) if found[-1] else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if values["rows"]:
        lines += ["", f"Training: {training_text(next(iter(values['rows'].values())))}."]
    return "\n".join(lines) + "\n"


def _drift(row: dict[str, Any]) -> str:
    ratios = [value / of_data for value, of_data in zip(row["deviations"], row["data deviations"])]
    return " → ".join(f"{ratio:.2f}" for ratio in ratios)


if __name__ == "__main__":
    main()
