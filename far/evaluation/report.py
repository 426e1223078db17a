"""The figures of one evaluation, from features to a dictionary whose keys name the network behind each.

Only over FID's own Inception network may a distance be called FID.
"""

from typing import Any

import torch
from torch import Tensor

from far.errors import InputError
from far.evaluation.features import FID_NETWORK, Extractor
from far.evaluation.metrics import (
    FeatureStatistics,
    frechet_bias,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)  # fmt: skip
from far.evaluation.references import Reference
from far.seeds import seeded_generator

NEIGHBOURS = 3
_SUBSETS = 100
_SPLITS = 10


def distance_name(extractor: Extractor) -> str:
    """``FID`` for FID's network, ``FD (…)`` for any other."""
    return "FID" if extractor.name == FID_NETWORK else f"FD ({extractor.name})"


def figures(features: Tensor, reference: Reference, extractor: Extractor, *, seed: int = 0) -> tuple[dict[str, Any], list[str]]:
    """All figures of ``features [n, d]``, and warnings in words.

    Subsets and splits are drawn from ``seed``. Without the reference's features there is no KID,
    precision and recall.

    Raises:
        InputError: too few images on a side.
    """
    generator = seeded_generator(seed)
    check_counts(len(features), reference)
    name = distance_name(extractor)
    suffix = "" if name == "FID" else f" ({extractor.name})"
    warnings: list[str] = []
    distance = frechet_distance(FeatureStatistics.of(features), reference.statistics)
    found: dict[str, Any] = {name: distance, **_biases(name, distance, features, reference, generator, warnings)}
    score = inception_score(extractor.logits(features), generator, splits=min(_SPLITS, len(features)))
    found[f"IS{suffix}"], found[f"IS deviation{suffix}"] = score.value, score.deviation
    if reference.features is None:
        warnings.append(f"{reference.source} holds no features, so there is no KID, precision and recall")
        return found, warnings
    kernel = kernel_distance(features, reference.features, generator, subsets=_SUBSETS)
    found[f"KID{suffix}"], found[f"KID deviation{suffix}"] = kernel.value, kernel.deviation
    precision, recall = precision_recall(features, reference.features, neighbours=NEIGHBOURS)
    found[f"precision{suffix}"], found[f"recall{suffix}"] = precision, recall
    return found, warnings


def check_counts(count: int, reference: Reference) -> None:
    """Raise an :class:`InputError` if ``count`` images cannot be compared with the reference at all."""
    if reference.features is None:
        if count < 2:
            raise InputError(f"a Fréchet distance needs two images or more, got {count}; give more images")
    elif min(count, len(reference.features)) <= NEIGHBOURS:
        raise InputError(
            f"precision and recall with {NEIGHBOURS} neighbours need more than {NEIGHBOURS} images a side, "
            f"got {count} and {len(reference.features)}; give more images"
        )


def _biases(
    name: str, distance: float, features: Tensor, reference: Reference, generator: torch.Generator, warnings: list[str]
) -> dict[str, float]:
    """How much of the distance comes from too few images on a side alone, each side's drawn from what is known of the other."""
    dimensions, found = features.shape[1], {}
    few_judged = len(features) < dimensions
    few_reference = reference.count is not None and reference.count < dimensions
    # A side that is too small itself knows too few directions, and the other's bias comes out too low.
    about = "at least" if few_judged and few_reference else "about"
    if few_judged:
        bias = found[f"bias of {name}"] = frechet_bias(reference.statistics, len(features), generator)
        warnings.append(
            f"{len(features)} images are fewer than the {dimensions} features: of the distance {distance:.1f}, {about} "
            f"{bias:.1f} come from that alone; generate more, and compare equal numbers only"
        )
    if few_reference:
        assert reference.count is not None
        bias = found[f"bias of {name} by the reference"] = frechet_bias(FeatureStatistics.of(features), reference.count, generator)
        warnings.append(
            f"the reference's {reference.count} images are fewer than the {dimensions} features: of the distance {distance:.1f}, {about} "
            f"{bias:.1f} come from that alone; take a larger reference"
        )
    return found
