"""Read an image set (``train/`` and ``held-out/`` shards of uint8 images) as tensors for the networks."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from far.classes import check_same_classes, shown_names
from far.data.images import sides
from far.data.listing import describe
from far.data.shards import INDEX, ShardReader
from far.errors import InputError
from far.files import is_plain, json_digest

PARTS = ("held-out", "train")  # in the order of writing


@dataclasses.dataclass(frozen=True)
class Summary:
    """Contents of an image set and the skipped files of its source.

    Attributes:
        left_out: number of files or images of the source that are in neither part, by reason.
        hints: sentences about what may be a mistake.
        already_complete: whether nothing was left to do.
    """

    train: int
    held_out: int
    classes: Sequence[str]
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    hints: Sequence[str] = ()
    already_complete: bool = False

    def __str__(self) -> str:
        """Return everything except the hints in one line."""
        kinds = "class" if len(self.classes) == 1 else "classes"
        classes = f"{len(self.classes)} {kinds} ({shown_names(self.classes)})"
        start = "already complete: " if self.already_complete else ""
        end = f"; left out: {describe(self.left_out)}" if self.left_out else ""
        return f"{start}{self.train} train, {self.held_out} held-out, {classes}{end}"


def open_image_set(folder: Path) -> ShardReader:
    """Open one part of an image set and verify its checksums.

    Raises:
        InputError: the part is missing, unfinished or damaged, or was made without its pixels.
    """
    if open_training_index(folder).meta["kind"] == "records":
        wrong = f"{folder} has no pixels, because it was made with --no-copy"
        raise InputError(f"{wrong}. Make the image set again without it")
    reader = ShardReader(folder, "images", verify=True)
    check_meta(reader, source=str)
    reader.require({"images": (np.uint8, (*sides(reader.meta["size"]), 3)), "labels": (np.int64, ())})
    check_labels(reader)
    return reader


def fingerprint(images: ShardReader) -> str:
    """Return a digest of the classes, size and pixels of one part of an image set.

    Without pixels, it is one of the source's files and of how to decode them.
    """
    linked = images.meta["kind"] == "records"
    decoding = [images.meta.get("colors"), images.meta.get("crop", True)] if linked else []
    return json_digest([images.meta["classes"], images.meta["size"], images.digest, *decoding])[:16]


def open_training_index(folder: Path) -> ShardReader:
    """Open the index of training images alone, of kind "images", or of "records" of a source without pixels.

    Raises:
        InputError: the index is missing, unfinished or damaged.
    """
    return ShardReader(folder, "images", "records", index_only=True)


def open_held_out(data: Path, train: ShardReader) -> ShardReader:
    """Open the held-out part of the image set ``data`` and verify its checksums.

    Raises:
        InputError: it is missing, unfinished or damaged, has one image only, or its classes or size are not
            those of ``train``.
    """
    held_out = open_image_set(data / "held-out")
    if len(held_out) < 2:
        few = f"{held_out.folder} has {len(held_out)} image, but distances need two or more"
        raise InputError(f"{few}. Make the image set again with more held-out images")
    compared = (train.meta["classes"], str(train.folder), held_out.meta["classes"], str(held_out.folder))
    check_same_classes(*compared, "Make the image set again")
    if train.meta["size"] != held_out.meta["size"]:
        sizes = f"{train.meta['size']} in {train.folder} and {held_out.meta['size']} in {held_out.folder}"
        raise InputError(f"Images have sizes of {sizes}. Make the image set again")
    return held_out


def check_meta(reader: ShardReader, **kinds: type) -> None:
    """Raise an :class:`InputError` unless the index has size, classes and the entries ``kinds``, by type."""
    meta = reader.meta
    kinds = {"classes": list, **kinds}
    wrong = [name for name, kind in kinds.items() if not isinstance(meta.get(name), kind)]
    size = meta.get("size")
    if not isinstance(size, int) and not (isinstance(size, list) and list(map(type, size)) == [int, int]):
        wrong = ["size"]
    if not wrong and not all(isinstance(name, str) and is_plain(name) for name in meta["classes"]):
        wrong = ["classes"]
    if wrong:
        value = f"the {wrong[0]} {meta.get(wrong[0])!r}"
        raise InputError(f"{reader.folder / INDEX} has {value}. Remove its folder and make it again")


def check_labels(reader: ShardReader) -> None:
    """Raise an :class:`InputError` unless the label of every row is a class."""
    labels, count = reader.all("labels"), len(reader.meta["classes"])
    if not 0 <= labels.min() <= labels.max() < count:
        found = f"labels from {labels.min()} to {labels.max()} for {count} classes"
        raise InputError(f"{reader.folder} has {found}. Remove it and make it again")


def read_images(reader: ShardReader, rows: Tensor) -> Tensor:
    """Return rows ``[n]`` of an image set as ``[n, 3, h, w]`` float32 in [−1, 1]."""
    return scaled(reader.rows("images", rows))


def scaled(images: Tensor) -> Tensor:
    """Return images ``[n, h, w, 3]`` uint8 as ``[n, 3, h, w]`` float32 in [−1, 1], in the same memory layout.

    Convolutions are faster in this layout, channels last.
    """
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1)
