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
    """Statistics of real images, with their features if available.

    Attributes:
        source: path of the images or statistics.
        digest: identifies the content.
        statistics: mean and covariance of the features.
        features: ``[n, d]``, or ``None`` if a file has none.
        count: number of images, or ``None`` if a file has none.
        size: (height, width) of the images, or ``None`` if unknown.
        left_out: number of a folder's other files by reason.
        classes: names of the images' classes, empty if they have none.
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
        return dataclasses.replace(
            _read_statistics(path, extractor), features=features, size=source.size, classes=source.classes
        )
    return Reference(
        source.name,
        source.digest,
        FeatureStatistics.of(features),
        features,
        source.count,
        source.size,
        source.left_out,
        source.classes,
    )


def features_of(
    source: ImageSource, extractor: Extractor, cache: Path, *, count: int | None = None
) -> Tensor:
    """Return features of the first ``count`` images (default all), from ``cache`` if available."""
    count = source.count if count is None else count
    folder = (
        cache
        / "features"
        / f"{source.digest}-{''.join(filter(str.isalnum, extractor.name))}-{extractor.digest[:16]}"
    )
    extract_parts(
        folder,
        count,
        lambda rows, _: source.tensor(rows),
        extractor,
        description=f"features of {source.name}",
    )
    return read_parts(folder, count)


def _read_statistics(path: Path, extractor: Extractor) -> Reference:
    check_npz(path)
    arrays = {
        name: map_npz_array(path, name)
        for name in ("mu", "sigma", "extractor", "extractor_digest", "count", "features")
    }
    mean, covariance, features = arrays["mu"], arrays["sigma"], arrays["features"]
    if mean is None or covariance is None:
        raise InputError(
            f"{path} has neither images ({NPZ_IMAGES}) nor statistics (mu and sigma). Give a file that has."
        )
    recorded = FID_NETWORK if arrays["extractor"] is None else _read_name(path, arrays["extractor"])
    if recorded != extractor.name:
        raise InputError(
            f"{path} has statistics of {recorded}, not of {extractor.name}."
            " Give images as the reference, or use that network."
        )
    if (
        arrays["extractor_digest"] is not None
        and _read_name(path, arrays["extractor_digest"]) != extractor.digest
    ):
        raise InputError(
            f"{path} has statistics of {recorded} with other weights."
            " Give images as the reference, or use those weights."
        )
    _check_moments(path, mean, covariance, extractor.dimensions)
    count = None if arrays["count"] is None else _read_count(path, arrays["count"])
    if features is not None:
        _check_features(path, features, count, extractor.dimensions)
    statistics = FeatureStatistics.known(
        count or _UNKNOWN_COUNT, torch.tensor(np.array(mean)), torch.tensor(np.array(covariance))
    )
    kept = None if features is None else torch.tensor(np.array(features))
    return Reference(str(path), f"npz-{sha256(path)}", statistics, kept, count, None)


def _read_name(path: Path, array: np.ndarray) -> str:
    if array.shape == () and array.dtype.kind == "U" and array.dtype.itemsize:
        # numpy turns numbers that are no character into text that breaks Python.
        points = array.reshape(1).view(f"{array.dtype.str[0]}u4")
        if points.max() <= sys.maxunicode and is_plain(name := str(array)):
            return name
    raise InputError(f"{path}: the name of its network is damaged. Make the file again.")


def _check_moments(path: Path, mean: np.ndarray, covariance: np.ndarray, dimensions: int) -> None:
    if mean.shape != (dimensions,) or covariance.shape != (dimensions, dimensions):
        raise InputError(
            f"{path}: mu {list(mean.shape)} and sigma {list(covariance.shape)} do not fit {dimensions}"
            " features. Make the file again."
        )
    for name, array in (("mu", mean), ("sigma", covariance)):
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise InputError(f"{path}: {name} has values that are not finite numbers. Make the file again.")
    scale = np.abs(covariance).max()
    if not np.allclose(covariance, covariance.T, rtol=0, atol=1e-5 * scale):
        raise InputError(f"{path}: sigma is not symmetric, so not a covariance. Make the file again.")
    lowest = float(torch.linalg.eigvalsh(torch.tensor(np.array(covariance)).double())[0])
    if lowest < -1e-3 * scale:
        raise InputError(
            f"{path}: sigma has the negative eigenvalue {lowest:.3g}, so it is not a covariance."
            " Make the file again."
        )


def _read_count(path: Path, array: np.ndarray) -> int:
    if array.shape != () or array.dtype.kind not in "iu" or array < 2:
        raise InputError(
            f"{path}: count is {array.tolist()!r}, not the number of images (2 or more). Make the file again."
        )
    return int(array)


def _check_features(path: Path, features: np.ndarray, count: int | None, dimensions: int) -> None:
    if (
        features.ndim != 2
        or features.shape[1] != dimensions
        or (count is not None and len(features) != count)
    ):
        raise InputError(
            f"{path}: features {list(features.shape)} are not [{count or 'count'}, {dimensions}]."
            " Make the file again."
        )
    if features.dtype.kind != "f" or not np.isfinite(features).all():
        raise InputError(f"{path}: features has values that are not finite numbers. Make the file again.")


def write_statistics(path: Path, extractor: Extractor, features: Tensor) -> None:
    """Write a statistics file that :func:`open_reference` reads."""
    statistics = FeatureStatistics.of(features)
    # Pass an open file, because numpy adds a suffix to a name.
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            mu=statistics.mean.numpy(),
            sigma=statistics.covariance.numpy(),
            extractor=np.array(extractor.name),
            extractor_digest=np.array(extractor.digest),
            count=np.array(len(features)),
            features=features.numpy(),
        )
