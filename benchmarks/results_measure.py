"""Measurements of the comparison: floors, sweeps of guidance and temperature, and rows."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.classifier import LinearClassifier
from benchmarks.comparison import (
    BATCH,
    DTYPE,
    LEARNED_GUIDANCE,
    MODELS,
    SWEEP_SEED,
    TEACHER,
    WORK,
    ImageSet,
    Row,
    all_rows,
)
from benchmarks.recorded import TRAIN, WEIGHTS, Measurements, checksums, made
from far.config import from_dict
from far.data.shards import ShardReader
from far.evaluation.extraction import read_parts
from far.evaluation.features import FeatureNetwork, load_feature_network
from far.evaluation.generated import Generation, extract_generated, parts_folder
from far.evaluation.images import ImageSource, open_images
from far.evaluation.metrics import FeatureStatistics, Neighborhoods, frechet_distance, kernel_distance
from far.evaluation.reconstructions import reconstruction_features, reconstructions_folder
from far.evaluation.references import Reference, features_of
from far.evaluation.report import distance_name, report
from far.folder import ModelFolder
from far.heads import DiffusionConfig
from far.pipeline import Pipeline
from far.recipe import load_recipe
from far.sampling import SamplingConfig
from far.seeds import seeded_generator

GUIDANCES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0)
START = (3.0, 0.8)
UNLIMITED = "diffusion without limit"
# What all trainings of an image set have in common.
TRAINING = ("steps", "batch_size", "learning_rate", "ema_decay")
Point: TypeAlias = tuple[float, float]


def descend(distance: Callable[[float, float], float], guidances: tuple[float, ...] = GUIDANCES) -> Point:
    """Return the guidance and temperature of the lowest distance, by coordinate descent over the grid.

    From ``START`` on, guidance and then temperature move to lower distances, one value of the grid at a time,
    until neither does. So the result's neighbors in both directions are evaluated, and none is better.
    """
    guidance, temperature = START
    while True:
        before = guidance, temperature
        guidance = _walk(guidances, guidance, lambda value: distance(value, temperature))
        temperature = _walk(TEMPERATURES, temperature, lambda value: distance(guidance, value))
        if (guidance, temperature) == before:
            return before


def _walk(values: tuple[float, ...], start: float, distance: Callable[[float], float]) -> float:
    """Return the value that is reached from ``start`` by moving to the better neighbor while there is one."""
    index = values.index(start)
    while True:
        near = values[max(0, index - 1) : index + 2]
        best = min(near, key=lambda value: (distance(value), value != values[index]))
        if best == values[index]:
            return best
        index = values.index(best)


def guidances_of(row: Row) -> tuple[float, ...]:
    """Return the guidance scales of a row's sweep: a head that learns guidance knows those up to 4."""
    learned = MODELS[row.model].passes == 1
    return tuple(scale for scale in GUIDANCES if not learned or scale <= LEARNED_GUIDANCE)


def sweep_key(row: Row, guidance: float, temperature: float) -> str:
    return f"{row.name} guidance {guidance:g} temperature {temperature:g}"


def recorded_choice(store: Measurements, row: Row) -> Point:
    """Return the best guidance and temperature of a row's model and steps from the recorded sweep.

    Raises:
        SystemExit: the sweep is not complete.
    """

    def distance(*point: float) -> float:
        if (key := sweep_key(row, *point)) not in store.values["sweeps"]:
            raise SystemExit(
                f"{store.path} has no complete sweep of {row.name}."
                f" After {TRAIN}, python -m benchmarks.results measures it."
            )
        return float(store.values["sweeps"][key]["distance"])

    return descend(distance, guidances_of(row))


def current_rows(images: ImageSet) -> Measurements:
    """Return the recorded rows of an image set, without those that may not stand beside present models.

    If models are present, these are rows of other weights, of another autoencoder, training or dtype.

    Raises:
        SystemExit: the present models have different autoencoders or trainings.
    """
    store = Measurements(images.results)
    if (shared := shared_by_present(images)) is not None:
        autoencoder, training = shared
        store.drop_other_weights(autoencoder, {"training": training, "dtype": DTYPE})
    return store


def shared_by_present(images: ImageSet) -> tuple[str, dict[str, Any]] | None:
    """Return the SHA-256 of the autoencoder and the training of the present models; ``None`` without any.

    Raises:
        SystemExit: they have different ones.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    for row in all_rows():
        if images.trained(row.model, row.seed):
            files = checksums(images.weights(row.model, row.seed))
            found.append((files["autoencoder.safetensors"], training_of(images, row)))
    if any(other != found[0] for other in found):
        raise SystemExit(
            f"{WEIGHTS / images.name}: the models have different autoencoders or trainings. Remove it, then:"
            f" {TRAIN}"
        )
    return found[0] if found else None


def training_of(images: ImageSet, row: Row) -> dict[str, Any]:
    """Return the values ``TRAINING`` of a present model; of a distilled one, its teacher's."""
    return folder_training(images.weights(TEACHER if row.model == "distilled" else row.model, row.seed))


def folder_training(folder: Path) -> dict[str, Any]:
    """Return the values ``TRAINING`` of a model's folder."""
    training = ModelFolder.open(folder).config.training["recipe"]["training"]
    return {name: training[name] for name in TRAINING}


def recipe_training(images: ImageSet, row: Row) -> dict[str, Any]:
    """Return the values ``TRAINING`` of a model's recipe; of a distilled one, its teacher's."""
    model = MODELS[TEACHER if row.model == "distilled" else row.model]
    training = load_recipe(images.recipe(model)).generator.training
    return {name: getattr(training, name) for name in TRAINING}


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

    def sweep_figures(self, features: Tensor) -> dict[str, float]:
        """Return the distance of a point of a sweep, and KID and recall beside it."""
        assert self.reference.features is not None
        kernel = kernel_distance(features, self.reference.features, seeded_generator(0))
        return {
            "distance": frechet_distance(FeatureStatistics.of(features), self.reference.statistics),
            "KID": kernel.value,
            "recall": self._neighborhoods.overlap(features).recall,
        }

    @functools.cached_property
    def _neighborhoods(self) -> Neighborhoods:
        assert self.reference.features is not None
        return Neighborhoods(self.reference.features)


def measure_floors(images: ImageSet, store: Measurements) -> Evaluator:
    """Measure training images and reconstructions against the held-out images, and return the evaluator."""
    network = load_feature_network()
    held_out = open_images(images.data / "held-out")
    real = features_of(held_out, network, WORK)
    source = open_images(images.data / "train")
    count = min(images.count, source.count)
    training = features_of(source, network, WORK, count=count)
    labels = ShardReader(images.data / "train", "images").all("labels")[:count]
    statistics = FeatureStatistics.of(real)
    reference = Reference(held_out.name, held_out.digest, statistics, real, held_out.count, held_out.size)
    evaluator = Evaluator(network, reference, LinearClassifier(training, labels))
    setting = {"count": images.count, "reference": held_out.count, "batch size": BATCH}
    for key, value in {**setting, "distance": distance_name(network)}.items():
        store.keep("setting", key, value)
    present = [row for row in all_rows() if images.trained(row.model, row.seed)]
    if "reconstructions" in store.values["rows"] or not present:
        return evaluator
    # Classes are recognized in held-out images, because the classifier was fitted to the training images.
    labels_held_out = ShardReader(images.data / "held-out", "images").all("labels")
    accuracy = evaluator.classifier.accuracy(real, labels_held_out)
    found = evaluator.figures(training, labels)
    store.keep("rows", "real", {"name": "real images", **found, "class accuracy": accuracy, **made()})
    weights = images.weights(present[0].model, present[0].seed)
    found = evaluator.figures(reconstructed_features(weights, source, count, network), labels)
    reconstructed = reconstructed_features(weights, held_out, held_out.count, network)
    found["class accuracy"] = evaluator.classifier.accuracy(reconstructed, labels_held_out)
    checksum = {"autoencoder.safetensors": checksums(weights)["autoencoder.safetensors"]}
    described = {"weights": str(weights), "sha256": checksum, **made()}
    store.keep("rows", "reconstructions", {"name": "reconstructions", **found, **described})
    return evaluator


def reconstructed_features(weights: Path, source: ImageSource, count: int, network: FeatureNetwork) -> Tensor:
    """Return features ``[count, d]`` of the reconstructions of a source's first images."""
    autoencoder = Pipeline.from_pretrained(weights, device="cpu").autoencoder
    assert autoencoder is not None
    folder = reconstructions_folder(WORK, source, autoencoder, network)
    return reconstruction_features(folder, source, count, autoencoder, network)


def is_recorded(images: ImageSet, store: Measurements, row: Row) -> bool:
    """Return whether a row is recorded with the best sampling values of a complete sweep.

    If its weights are present, it must be theirs. Otherwise its backbone, training and dtype must be those of
    today's recipe.
    """
    recorded = store.values["rows"].get(row.key)
    if recorded is None or not is_swept(store, row):
        return False
    if images.trained(row.model, row.seed):
        return current(recorded, planned(images, store, row))
    sampling = recorded["sampling"]
    today = (MODELS[row.model].backbone, recipe_training(images, row), DTYPE)
    return recorded_choice(store, row) == (sampling["guidance"], sampling["temperature"]) and (
        tuple(recorded[name] for name in ("backbone", "training", "dtype")) == today
    )


def is_swept(store: Measurements, row: Row) -> bool:
    """Return whether the sweep of a row's model and steps is recorded."""
    try:
        recorded_choice(store, row)
    except SystemExit:
        return False
    return True


def planned(images: ImageSet, store: Measurements, row: Row) -> Generation:
    """Return a row's generation with the best guidance and temperature of its recorded sweep."""
    guidance, temperature = recorded_choice(store, row)
    return generation_of_row(images, row, guidance, temperature, row.seed * images.count)


def generation_of_row(
    images: ImageSet, row: Row, guidance: float, temperature: float, seed: int
) -> Generation:
    return generation_of(
        images.weights(row.model, row.seed),
        seed=seed,
        head_steps=row.steps,
        guidance=guidance,
        temperature=temperature,
        guidance_passes=MODELS[row.model].passes,
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


def sweep(images: ImageSet, store: Measurements, evaluator: Evaluator, row: Row) -> None:
    """Measure what a row's sweep lacks. The first training of a model is swept, for all its trainings.

    Raises:
        SystemExit: the first training's weights are missing, and its sweep is not complete.
    """
    row = dataclasses.replace(row, seed=0)
    if not images.trained(row.model):
        recorded_choice(store, row)
        return

    def distance(guidance: float, temperature: float) -> float:
        key = sweep_key(row, guidance, temperature)
        generation = generation_of_row(images, row, guidance, temperature, SWEEP_SEED)
        if not current(store.values["sweeps"].get(key), generation):
            found = measure_point(images, evaluator, generation)
            store.keep("sweeps", key, {**found, **described(generation, training_of(images, row))})
            print(
                f"{images.name}, {key}: FD {found['distance']:.1f}, recall {found['recall']:.3f}", flush=True
            )
        return float(store.values["sweeps"][key]["distance"])

    descend(distance, guidances_of(row))


def measure_point(images: ImageSet, evaluator: Evaluator, generation: Generation) -> dict[str, Any]:
    """Return the figures of one point of a sweep, over fewer images than a row has."""
    features, _ = generate(generation, evaluator.network, images.sweep_count)
    return {**evaluator.sweep_figures(features), "count": images.sweep_count}


def described(generation: Generation, training: dict[str, Any]) -> dict[str, Any]:
    """Return what a recorded row says about its model, training, weights, sampling and machine."""
    network = network_of(Path(generation.weights))
    return {**network, "training": training, **made(), **generation.describe()}


def network_of(folder: Path) -> dict[str, Any]:
    """Return the backbone of a model's folder, as recipes are named after it, and its latent channels."""
    config = ModelFolder.open(folder).config.model
    assert config is not None
    backbone = config.network.backbone.kind.replace("_", "-")
    return {"backbone": backbone, "latent channels": config.latent_channels}


def measure_row(images: ImageSet, store: Measurements, evaluator: Evaluator, row: Row) -> None:
    """Sweep guidance and temperature, then measure the row with the best of them, from other seeds."""
    sweep(images, store, evaluator, row)
    generation = planned(images, store, row)
    if current(store.values["rows"].get(row.key), generation):
        return
    features, labels = generate(generation, evaluator.network, images.count)
    found = {"name": row.model, "steps": row.steps, **evaluator.figures(features, labels)}
    print(json.dumps({row.key: found}), flush=True)
    store.keep("rows", row.key, {**found, **described(generation, training_of(images, row))})
    if row == Row("diffusion", 100):
        measure_unlimited(images, store, evaluator, generation)


def measure_unlimited(
    images: ImageSet, store: Measurements, evaluator: Evaluator, generation: Generation
) -> None:
    """Measure the diffusion head as published, without a limit on the predicted token."""
    pipeline = Pipeline.from_pretrained(generation.weights)
    network = pipeline.model.config.network
    assert isinstance(network.head, DiffusionConfig)
    network = dataclasses.replace(network, head=dataclasses.replace(network.head, token_limit=None))
    pipeline.model.config = dataclasses.replace(pipeline.model.config, network=network)
    folder = WORK / f"{images.name}-unlimited"
    pipeline.save_pretrained(folder, torch.float16)
    unlimited = dataclasses.replace(generation, weights=str(folder), seed=SWEEP_SEED)
    found = measure_point(images, evaluator, unlimited)
    training = folder_training(Path(generation.weights))
    store.keep("sweeps", UNLIMITED, {**found, **described(unlimited, training)})
