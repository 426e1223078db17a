"""References for generated images: statistics and features of real images, computed once and kept.

A statistics file is an ``.npz`` with ``mu`` and ``sigma``, as ADM publishes them for FID's Inception network.
Files written here also have the name of their network, the number of images, and the features.
"""

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from far.errors import InputError
from far.evaluation.extraction import extract_parts, read_parts
from far.evaluation.features import FID_NETWORK, Extractor
from far.evaluation.images import NPZ_IMAGES, ImageSource, check_npz, map_npz_array, npz_names, open_images
from far.evaluation.metrics import FeatureStatistics
from far.files import atomic_path, is_plain, sha256

# Count for files that have none. Any large one works, because it affects rounding only.
_UNKNOWN_COUNT = 1_000_000


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of real images and their origin, as in :class:`~far.evaluation.images.ImageSource`.

    ``features [n, d]``, ``count`` and ``size`` are ``None`` if a statistics file lacks them.
    """

    source: str
    digest: str
    statistics: FeatureStatistics
    features: Tensor | None
    count: int | None
    size: tuple[int, int] | None
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    classes: Sequence[str] = ()


def default_cache() -> Path:
    """Return ``far`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "far"


def open_reference(path: Path, extractor: Extractor, cache: Path) -> Reference:
    """Open a statistics file, or images, whose features are computed or read from ``cache``.

    An ``.npz`` with both images and statistics, like ADM's reference batches, gives the file's statistics if
    ``extractor`` is FID's Inception, and the features of its images.

    Raises:
        InputError: the statistics are of another network, a file is damaged, or features are not finite.
    """
    names = npz_names(path) if path.suffix.lower() == ".npz" else set()
    if names and NPZ_IMAGES not in names:
        return _read_statistics(path, extractor)
    source = open_images(path)
    features = features_of(source, extractor, cache)
    if extractor.name == FID_NETWORK and {"mu", "sigma"} <= names:
        return dataclasses.replace(_read_statistics(path, extractor), features=features, size=source.size)
    statistics = FeatureStatistics.of(features)
    described = (source.count, source.size, source.left_out, source.classes)
    return Reference(source.name, source.digest, statistics, features, *described)


def features_of(
    source: ImageSource, extractor: Extractor, cache: Path, *, count: int | None = None
) -> Tensor:
    """Return features of the first ``count`` images (default all), from ``cache`` if available."""
    count = source.count if count is None else count
    network = "".join(filter(str.isalnum, extractor.name))
    folder = cache / "features" / f"{source.digest}-{network}-{extractor.digest[:16]}"

    def images(rows: range, step: object) -> Tensor:
        return source.tensor(rows)

    extract_parts(folder, count, images, extractor, description=f"features of {source.name}")
    return read_parts(folder, count)


def _read_statistics(path: Path, extractor: Extractor) -> Reference:
    check_npz(path)
    names = ("mu", "sigma", "extractor", "extractor_digest", "count", "features")
    mean, covariance, network, weights, count, features = (map_npz_array(path, name) for name in names)
    if mean is None or covariance is None:
        raise InputError(f"{path} has neither images ({NPZ_IMAGES}) nor mu and sigma. Give another file")
    made_by = FID_NETWORK if network is None else _read_name(path, network)
    if made_by != extractor.name:
        raise InputError(f"{path} is of {made_by}, not of {extractor.name}. Give images as the reference")
    if weights is not None and _read_name(path, weights) != extractor.digest:
        raise InputError(f"{path} is of other weights of {made_by}. Give images as the reference")
    if problem := _problem(mean, covariance, count, features, extractor.dimensions):
        raise InputError(f"{path} is damaged: {problem}. Make the file again")
    rows = None if count is None else int(count)
    moments = (torch.tensor(np.array(array)) for array in (mean, covariance))
    statistics = FeatureStatistics.known(rows or _UNKNOWN_COUNT, *moments)
    kept = None if features is None else torch.tensor(np.array(features))
    return Reference(str(path), f"npz-{sha256(path)}", statistics, kept, rows, None)


def _read_name(path: Path, array: np.ndarray) -> str:
    if array.shape == () and array.dtype.kind == "U" and array.dtype.itemsize:
        # numpy turns numbers that are not characters into invalid text.
        points = array.reshape(1).view(f"{array.dtype.str[0]}u4")
        if points.max() <= sys.maxunicode and is_plain(name := str(array)):
            return name
    raise InputError(f"{path}: the name of its network is damaged. Make the file again")


def _problem(
    mean: np.ndarray,
    covariance: np.ndarray,
    count: np.ndarray | None,
    features: np.ndarray | None,
    dimensions: int,
) -> str | None:
    """Return a description of the first damaged array of a statistics file."""
    if mean.shape != (dimensions,) or covariance.shape != (dimensions, dimensions):
        return f"mu {list(mean.shape)} and sigma {list(covariance.shape)} do not fit {dimensions} features"
    for name, array in (("mu", mean), ("sigma", covariance)):
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            return f"{name} has values that are not finite numbers"
    scale = np.abs(covariance).max()
    if not np.allclose(covariance, covariance.T, rtol=0, atol=1e-5 * scale):
        return "sigma is not symmetric"
    lowest = float(torch.linalg.eigvalsh(torch.tensor(np.array(covariance)).double())[0])
    if lowest < -1e-3 * scale:
        return f"sigma has the negative eigenvalue {lowest:.3g}"
    if count is not None and (count.shape or count.dtype.kind not in "iu" or count < 2):
        return f"count is {count.tolist()!r}, not a number of images"
    if features is None:
        return None
    if features.ndim != 2 or features.shape[1] != dimensions or count not in (None, len(features)):
        return f"features {list(features.shape)} are not [{count or 'count'}, {dimensions}]"
    finite = features.dtype.kind == "f" and np.isfinite(features).all()
    return None if finite else "features has values that are not finite numbers"


def write_statistics(path: Path, extractor: Extractor, features: Tensor) -> None:
    """Write a statistics file that :func:`open_reference` reads."""
    statistics = FeatureStatistics.of(features)
    # Pass an open file, because numpy adds a suffix to a name.
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file, mu=statistics.mean.numpy(), sigma=statistics.covariance.numpy(),
            extractor=np.array(extractor.name), extractor_digest=np.array(extractor.digest),
            count=np.array(len(features)), features=features.numpy(),
        )  # fmt: skip
