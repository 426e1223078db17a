"""Comparison of heads on two image sets: measure missing rows, write the tables and plots of docs/results.md.

    python -m benchmarks.results [SET …] [--train] [--seeds 0 1 2]

Every measured row is kept in docs/results/SET.json with the SHA-256 of its weights. So an interrupted
measurement resumes, and a row is measured again only if its weights changed. Rows keep their recorded figures
while their weights are missing. ``--train`` first trains every model by the recipes of recipes/comparison
(hours) and writes the weights to runs/results/weights/.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.classifier import LinearClassifier
from benchmarks.comparison import (
    BATCH,
    COUNT,
    DTYPE,
    MODELS,
    RESULTS,
    SETS,
    SPREAD,
    SWEEP_COUNT,
    UNLIMITED,
    WORK,
    ImageSet,
)
from benchmarks.distillation import distill
from benchmarks.recorded import TRAIN, WEIGHTS, Measurements, checksums, made, tell_missing
from benchmarks.results_report import write_report
from far.cli.main import main as far_command
from far.config import from_dict
from far.data.shards import ShardReader
from far.evaluation.extraction import extract_parts, read_parts
from far.evaluation.features import FeatureNetwork, load_feature_network
from far.evaluation.generated import Generation, extract_generated, parts_folder
from far.evaluation.images import open_images
from far.evaluation.metrics import FeatureStatistics, frechet_distance
from far.evaluation.references import Reference, features_of
from far.evaluation.report import distance_name, report
from far.folder import ModelFolder
from far.pipeline import Pipeline
from far.sampling import SamplingConfig


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="*", default=list(SETS), help=f"of {', '.join(SETS)} (default: all)")
    parser.add_argument("--train", action="store_true", help="train what is not trained yet")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="of sampling; all but the first for the row of comparison only",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=list(MODELS),
        default=list(MODELS),
        help="only these; processes can share the work",
    )
    arguments = parser.parse_args()
    for name in arguments.sets:
        if arguments.train:
            train(SETS[name], arguments.models)
        with torch.no_grad():
            measure(SETS[name], arguments.models, arguments.seeds)
    write_report([RESULTS / f"{name}.json" for name in SETS], Path("docs/results.md"))


def train(images: ImageSet, models: list[str]) -> None:
    """Make data, autoencoder and latents, then train the models, first the one whose backbone others use."""
    for command in images.preparation:
        run(*command)
    for name in models:
        model = MODELS[name]
        if model.weights_of:
            continue
        if name == "distilled":
            distill(images.name)
            continue
        overrides = [
            f"generator.network.head.{override}" for override in (f"kind={model.head}", *model.overrides)
        ] + [f"model={name}"]
        if model.head == "energy":  # a quarter of the others' rate, as in EAR
            overrides += ["generator.training.head_learning_rate=2.5e-4", "generator.sampling.head_steps=1"]
        if model.frozen:
            overrides += [
                f"generator.frozen_backbone={images.weights('diffusion')}",
                "generator.training.steps=800",
            ]
        run("train", images.recipe(model), *overrides, "--resume")
        publish(images, name)


def publish(images: ImageSet, name: str) -> None:
    """Save the trained folder in float16. The figures are measured with these weights."""
    Pipeline.from_pretrained(images.runs / name).save_pretrained(images.weights(name), torch.float16)


def run(*command: str) -> None:
    print("far", *command, flush=True)
    if far_command(command) != 0:
        raise SystemExit(2)


@dataclasses.dataclass(frozen=True)
class Row:
    """A model and its sampling."""

    name: str
    steps: int | tuple[int, ...]
    seed: int

    @property
    def key(self) -> str:
        steps = self.steps if isinstance(self.steps, int) else "-".join(map(str, self.steps))
        return f"{self.name} {steps} seed {self.seed}"


def planned_rows(models: list[str], seeds: list[int]) -> list[Row]:
    """Return all rows in order of importance."""
    rows = [Row(name, steps, seeds[0]) for name in models for steps in MODELS[name].steps]
    return rows + [Row(name, steps, seed) for seed in seeds[1:] for name, steps in SPREAD if name in models]


def measure(images: ImageSet, models: list[str], seeds: list[int]) -> None:
    """Measure the missing floors, guidance sweeps and rows of one image set."""
    store = current_rows(images)
    tell_missing(images.name, [images.weights(name) for name in models])
    swept_models = list(
        dict.fromkeys([*models, *(other for name in models if (other := MODELS[name].guidance_of))])
    )
    if complete(images, store, models, swept_models, seeds):
        return
    evaluator = measure_floors(images, store)
    for name in swept_models:
        sweep(images, store, evaluator, name)
    if "diffusion" in models:
        measure_unlimited(images, store, evaluator)
    for row in planned_rows(models, seeds):
        measure_row(images, store, evaluator, row)


def current_rows(images: ImageSet) -> Measurements:
    """Return the recorded rows of an image set, without those of other weights."""
    store = Measurements(RESULTS / f"{images.name}.json")
    autoencoders = {checksums(images.weights(name)).get("autoencoder.safetensors") for name in MODELS} - {
        None
    }
    if len(autoencoders) > 1:
        raise SystemExit(
            f"{WEIGHTS / images.name}: the models have different autoencoders; remove it, then: {TRAIN}"
        )
    store.drop_other_weights(*autoencoders)
    return store


def complete(
    images: ImageSet, store: Measurements, models: list[str], swept_models: list[str], seeds: list[int]
) -> bool:
    """Return whether all figures of the present weights are recorded, so that no image is needed."""
    at_hand = [name for name in models if images.weights(name).is_dir()]
    sweeps = [
        current(store.values["sweeps"].get(f"{name} {scale}"), swept(images, name, scale))
        for name in swept_models
        if MODELS[name].sweep_steps and images.weights(name).is_dir()
        for scale in MODELS[name].guidances
    ]
    if "reconstructions" not in store.values["rows"] or not all(sweeps):
        return False
    rows = [row for row in planned_rows(models, seeds) if row.name in at_hand]
    return all(current(store.values["rows"].get(row.key), planned(images, store, row)) for row in rows)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Feature network, reference and classifier that evaluate images."""

    network: FeatureNetwork
    reference: Reference
    classifier: LinearClassifier

    def figures(self, features: Tensor, labels: Tensor) -> dict[str, Any]:
        return {
            **report(features, self.reference, self.network).figures,
            "class accuracy": self.classifier.accuracy(features, labels),
        }


def measure_floors(images: ImageSet, store: Measurements) -> Evaluator:
    """Measure training images and reconstructions against the held-out images, and return the evaluator."""
    network = load_feature_network()
    held_out = open_images(images.data / "held-out")
    real = features_of(held_out, network, WORK)
    source = open_images(images.data / "train")
    training = features_of(source, network, WORK, count=COUNT)
    labels = ShardReader(images.data / "train", "images").all("labels")[:COUNT]
    statistics = FeatureStatistics.of(real)
    reference = Reference(held_out.name, held_out.digest, statistics, real, held_out.count, held_out.size)
    evaluator = Evaluator(network, reference, LinearClassifier(training, labels))
    setting = {"count": COUNT, "reference": held_out.count, "dtype": DTYPE, "batch size": BATCH}
    for key, value in {**setting, "distance": distance_name(network)}.items():
        store.keep("setting", key, value)
    if "reconstructions" in store.values["rows"] or not images.weights("diffusion").is_dir():
        return evaluator
    accuracy = evaluator.classifier.accuracy(
        real, ShardReader(images.data / "held-out", "images").all("labels")
    )
    found = evaluator.figures(training, labels)
    store.keep("rows", "real", {"name": "real images", **found, "class accuracy": accuracy, **made()})
    autoencoder = Pipeline.from_pretrained(images.weights("diffusion"), device="cpu").autoencoder
    assert autoencoder is not None

    def reconstruct(rows: range, _: object) -> Tensor:
        latents = autoencoder.encode(source.tensor(rows) * 2 - 1).mean
        return (autoencoder.decode(latents) / 2 + 0.5).clamp(0, 1)

    folder = WORK / "features" / f"{source.digest}-reconstructions-{autoencoder.fingerprint()}"
    extract_parts(folder, COUNT, reconstruct, network, description="reconstructions")
    found = evaluator.figures(read_parts(folder, COUNT), labels)
    checksum = {"autoencoder.safetensors": checksums(images.weights("diffusion"))["autoencoder.safetensors"]}
    described = {"weights": str(images.weights("diffusion")), "sha256": checksum, **made()}
    store.keep("rows", "reconstructions", {"name": "reconstructions", **found, **described})
    return evaluator


def sweep(images: ImageSet, store: Measurements, evaluator: Evaluator, name: str) -> None:
    """Measure the distance at each guidance scale over fewer images."""
    if not images.weights(name).is_dir() or not MODELS[name].sweep_steps:
        return
    for guidance in MODELS[name].guidances:
        generation = swept(images, name, guidance)
        if current(store.values["sweeps"].get(f"{name} {guidance}"), generation):
            continue
        features, _ = generate(generation, evaluator.network, SWEEP_COUNT)
        distance = frechet_distance(FeatureStatistics.of(features), evaluator.reference.statistics)
        store.keep(
            "sweeps",
            f"{name} {guidance}",
            {"distance": distance, "count": SWEEP_COUNT, **made(), **generation.describe()},
        )


def swept(images: ImageSet, name: str, guidance: float) -> Generation:
    model = MODELS[name]
    return generation_of(
        images.weights(name),
        head_steps=model.sweep_steps,
        guidance=guidance,
        guidance_passes=model.passes,
        seed=1_000_000,
    )


def measure_unlimited(images: ImageSet, store: Measurements, evaluator: Evaluator) -> None:
    """Measure the diffusion head as published, without a limit on the predicted token."""
    if not images.weights("diffusion").is_dir():
        return
    folder = WORK / f"{images.name}-unlimited"
    pipeline = Pipeline.from_pretrained(images.weights("diffusion"))
    head = pipeline.model.config.network.head
    network = dataclasses.replace(
        pipeline.model.config.network, head=dataclasses.replace(head, token_limit=None)
    )
    pipeline.model.config = dataclasses.replace(pipeline.model.config, network=network)
    pipeline.save_pretrained(folder, torch.float16)
    generation = generation_of(
        folder, head_steps=100, guidance=best_guidance(store, "diffusion"), seed=1_000_000
    )
    if not current(store.values["sweeps"].get(UNLIMITED), generation):
        features, _ = generate(generation, evaluator.network, SWEEP_COUNT)
        distance = frechet_distance(FeatureStatistics.of(features), evaluator.reference.statistics)
        store.keep(
            "sweeps",
            UNLIMITED,
            {"distance": distance, "count": SWEEP_COUNT, **made(), **generation.describe()},
        )


def best_guidance(store: Measurements, name: str) -> float:
    name = MODELS[name].guidance_of or name
    if any(f"{name} {guidance}" not in store.values["sweeps"] for guidance in MODELS[name].guidances):
        raise SystemExit(
            f"{store.path} has no guidance sweep of {name}."
            f" After {TRAIN}, python -m benchmarks.results measures it."
        )
    return min(
        MODELS[name].guidances, key=lambda guidance: store.values["sweeps"][f"{name} {guidance}"]["distance"]
    )


def measure_row(images: ImageSet, store: Measurements, evaluator: Evaluator, row: Row) -> None:
    if not images.weights(row.name).is_dir():
        return
    generation = planned(images, store, row)
    if current(store.values["rows"].get(row.key), generation):
        return
    features, labels = generate(generation, evaluator.network, COUNT)
    figures = {
        "name": row.name,
        "steps": row.steps,
        "guidance": generation.sampling.guidance,
        **evaluator.figures(features, labels),
    }
    print(json.dumps({row.key: figures}), flush=True)
    store.keep("rows", row.key, {**figures, **made(), **generation.describe()})


def planned(images: ImageSet, store: Measurements, row: Row) -> Generation:
    guidance = best_guidance(store, row.name)
    passes = MODELS[row.name].passes
    return generation_of(
        images.weights(row.name),
        head_steps=row.steps,
        guidance=guidance,
        guidance_passes=passes,
        seed=row.seed * COUNT,
    )


def generation_of(weights: Path, *, seed: int, **sampling: Any) -> Generation:
    defaults = ModelFolder.open(weights).config.defaults
    return Generation(str(weights), dataclasses.replace(defaults, **sampling), seed, DTYPE)


def current(row: dict[str, Any] | None, generation: Generation) -> bool:
    """Return whether a recorded row has these weights and settings; missing settings have their defaults."""
    described = generation.describe()
    if row is None or any(row.get(key) != described[key] for key in ("sha256", "seed", "dtype")):
        return False
    return from_dict(SamplingConfig, row["sampling"], "a recorded row") == generation.sampling


def generate(generation: Generation, network: FeatureNetwork, count: int) -> tuple[Tensor, Tensor]:
    """Return features and labels of ``count`` images."""
    pipeline = Pipeline.from_pretrained(generation.weights, dtype=generation.dtype)
    folder = parts_folder(WORK, generation, network)
    extract_generated(folder, count, pipeline, generation, network, batch_size=BATCH)
    return read_parts(folder, count), torch.arange(count) % len(pipeline.classes)


if __name__ == "__main__":
    main()
