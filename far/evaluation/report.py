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
    generator = torch.Generator().manual_seed(seed)
    name = distance_name(extractor)
    suffix = "" if name == "FID" else f" ({extractor.name})"
    warnings = []
    try:
        distance = frechet_distance(FeatureStatistics.of(features), reference.statistics)
        found: dict[str, Any] = {name: distance}
        if len(features) < extractor.dimensions:
            bias = frechet_bias(reference.statistics, len(features), generator)
            found[f"bias of {name}"] = bias
            warnings.append(
                f"{len(features)} images are fewer than the {extractor.dimensions} features: of the distance {distance:.1f}, about "
                f"{bias:.1f} come from that alone; generate more, and compare equal numbers only"
            )
        score = inception_score(extractor.logits(features), generator, splits=min(_SPLITS, len(features)))
        found[f"IS{suffix}"], found[f"IS deviation{suffix}"] = score.value, score.deviation
        if reference.features is None:
            warnings.append(f"{reference.source} holds no features, so there is no KID, precision and recall")
            return found, warnings
        kernel = kernel_distance(features, reference.features, generator, subsets=_SUBSETS)
        found[f"KID{suffix}"], found[f"KID deviation{suffix}"] = kernel.value, kernel.deviation
        precision, recall = precision_recall(features, reference.features, neighbours=NEIGHBOURS)
        found[f"precision{suffix}"], found[f"recall{suffix}"] = precision, recall
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{error}; give more images") from error
    return found, warnings
