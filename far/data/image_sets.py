"""Reading an image set (``train/`` and ``held-out/`` shards of uint8 images) as tensors for the networks."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from far.classes import check_same_classes
from far.data.listing import describe
from far.data.shards import INDEX, ShardReader
from far.errors import InputError
from far.files import is_plain, json_digest

PARTS = ("held-out", "train")  # in the order in which they are written
_MOST_NAMES = 20


@dataclasses.dataclass(frozen=True)
class Summary:
    """What an image set holds and how it came about.

    Attributes:
        train: number of training images.
        held_out: number of held-out images.
        classes: names of the classes.
        left_out: numbers of files or images of the source that are in neither part, by reason.
        hints: sentences on what may be unintended.
        already_complete: whether there was nothing left to do.
    """

    train: int
    held_out: int
    classes: Sequence[str]
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    hints: Sequence[str] = ()
    already_complete: bool = False

    def __str__(self) -> str:
        """Return all but the hints in one line."""
        names = ", ".join(self.classes[:_MOST_NAMES]) + (", …" if len(self.classes) > _MOST_NAMES else "")
        classes = f"{len(self.classes)} {'class' if len(self.classes) == 1 else 'classes'} ({names})"
        line = f"{self.train} train, {self.held_out} held-out, {classes}"
        left_out = describe(Counter(self.left_out))
        return (
            ("already complete: " if self.already_complete else "")
            + line
            + (f"; left out: {left_out}" if left_out else "")
        )


def open_image_set(folder: Path) -> ShardReader:
    """One part of an image set, its checksums verified.

    Raises:
        InputError: it is missing, unfinished or damaged.
    """
    reader = ShardReader(folder, "images", verify=True)
    check_meta(reader, source=str)
    size = reader.meta["size"]
    reader.require({"images": (np.uint8, (size, size, 3)), "labels": (np.int64, ())})
    check_labels(reader)
    return reader


def fingerprint(images: ShardReader) -> str:
    """Return a digest of the classes, size and pixels of one part of an image set, wherever it lies and came from."""
    return json_digest([images.meta["classes"], images.meta["size"], images.digest])[:16]


def open_held_out(data: Path, train: ShardReader) -> ShardReader:
    """Return the held-out part of the image set ``data``, its checksums verified.

    Raises:
        InputError: it is missing, unfinished or damaged, or has other classes or another size than ``train``.
    """
    held_out = open_image_set(data / "held-out")
    sides = (train.meta["classes"], str(train.folder), held_out.meta["classes"], str(held_out.folder))
    check_same_classes(*sides, "Make the image set again")
    if train.meta["size"] != held_out.meta["size"]:
        sizes = (
            f"{train.meta['size']} pixels in {train.folder} and {held_out.meta['size']} in {held_out.folder}"
        )
        raise InputError(f"images have {sizes}; make the image set again")
    return held_out


def check_meta(reader: ShardReader, **kinds: type) -> None:
    """Raise an :class:`InputError` unless the index tells size, classes and the ``kinds`` besides."""
    meta = reader.meta
    for name, kind in {"size": int, "classes": list, **kinds}.items():
        if not isinstance(meta.get(name), kind):
            raise InputError(
                f"{reader.folder / INDEX} has the {name} {meta.get(name)!r}; remove its folder and make it again"
            )
    if not all(isinstance(name, str) and is_plain(name) for name in meta["classes"]):
        raise InputError(
            f"{reader.folder / INDEX}: the classes are {meta['classes']!r}, not names without control characters"
        )


def check_labels(reader: ShardReader) -> None:
    """Raise an :class:`InputError` unless the label of every row is a class."""
    labels = reader.all("labels")
    if not 0 <= labels.min() <= labels.max() < len(reader.meta["classes"]):
        raise InputError(
            f"{reader.folder}: labels {labels.min()} to {labels.max()} are not all classes; remove it and make it again"
        )


def read_images(reader: ShardReader, rows: Tensor) -> Tensor:
    """Rows ``[n]`` of an image set as ``[n, 3, h, w]`` float32 in [−1, 1]."""
    return reader.rows("images", rows).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
