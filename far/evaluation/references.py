"""What generated images are compared with: statistics and features of real ones, computed once and kept.

A statistics file is an ``.npz`` with ``mu`` and ``sigma``, as ADM publishes for FID's Inception network;
those written here also hold the name of their network, the number of images, and the features.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from far.errors import InputError
from far.evaluation.extraction import extract_parts, read_parts
from far.evaluation.features import FID_NETWORK, Extractor
from far.evaluation.images import NPZ_IMAGES, ImageSource, map_npz_array, open_images
from far.evaluation.metrics import FeatureStatistics
from far.files import atomic_path, sha256

# Files without a count come from ADM; its ImageNet statistics are of the whole training set.
_UNKNOWN_COUNT = 1_281_167


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics, and the features ``[n, d]`` they come from where these are at hand.

    ``source`` says where from, ``digest`` identifies the content.
    """

    source: str
    digest: str
    statistics: FeatureStatistics
    features: Tensor | None


def default_cache() -> Path:
    """``far`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "far"


def open_reference(path: Path, extractor: Extractor, cache: Path) -> Reference:
    """A statistics file, or images whose features are computed, or found in ``cache``.

    An ``.npz`` with both images and statistics, like ADM's reference batches, gives the statistics from
    the file where they are Inception's and that is ``extractor``, the features from its images.

    Raises:
        InputError: statistics of another network, damaged files, or features that are not finite.
    """
    is_npz = path.suffix.lower() == ".npz"
    if is_npz and map_npz_array(path, NPZ_IMAGES) is None:
        return _read_statistics(path, extractor)
    source = open_images(path)
    features = features_of(source, extractor, cache)
    if is_npz and extractor.name == FID_NETWORK and map_npz_array(path, "mu") is not None:
        return dataclasses.replace(_read_statistics(path, extractor), features=features)
    return Reference(source.name, source.digest, FeatureStatistics.of(features), features)


def features_of(source: ImageSource, extractor: Extractor, cache: Path, *, count: int | None = None) -> Tensor:
    """Features of the first ``count`` images (default all), from ``cache`` where they are there."""
    count = source.count if count is None else count
    folder = cache / "features" / f"{source.digest}-{''.join(filter(str.isalnum, extractor.name))}"
    extract_parts(folder, count, source.tensor, extractor, description=f"features of {source.name}")
    return read_parts(folder, count)


def _read_statistics(path: Path, extractor: Extractor) -> Reference:
    arrays = {name: map_npz_array(path, name) for name in ("mu", "sigma", "extractor", "count", "features")}
    mean, covariance = arrays["mu"], arrays["sigma"]
    if mean is None or covariance is None:
        raise InputError(f"{path} holds neither images ({NPZ_IMAGES}) nor statistics (mu and sigma)")
    recorded = FID_NETWORK if arrays["extractor"] is None else str(arrays["extractor"])
    if recorded != extractor.name:
        raise InputError(f"{path} holds statistics of {recorded}, not of {extractor.name}; compare with images, or use that network")
    dimensions = extractor.dimensions
    if mean.shape != (dimensions,) or covariance.shape != (dimensions, dimensions):
        raise InputError(f"{path}: mu {list(mean.shape)} and sigma {list(covariance.shape)} do not fit {dimensions} features")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{path}: mu or sigma hold values that are not finite; make the file again")
    count = _UNKNOWN_COUNT if arrays["count"] is None else int(arrays["count"])
    statistics = FeatureStatistics.known(count, torch.tensor(np.array(mean)), torch.tensor(np.array(covariance)))
    features = None if arrays["features"] is None else torch.tensor(np.array(arrays["features"]))
    return Reference(str(path), f"npz-{sha256(path)}", statistics, features)


def write_statistics(path: Path, extractor: Extractor, features: Tensor) -> None:
    """Write a statistics file that :func:`open_reference` reads."""
    statistics = FeatureStatistics.of(features)
    with atomic_path(path) as temporary:
        np.savez(
            temporary,
            mu=statistics.mean.numpy(),
            sigma=statistics.covariance.numpy(),
            extractor=np.array(extractor.name),
            count=np.array(len(features)),
            features=features.numpy(),
        )
