"""Read the training images of an image set: stored pixels, or images that are decoded from their source."""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from far.data.detection import open_source
from far.data.image_sets import check_labels, check_meta, open_image_set, open_training_index, scaled
from far.data.images import prepare_image, sides, skip_reason
from far.data.packing import report_skipped
from far.data.shards import ShardReader
from far.data.sources import Source
from far.errors import InputError, prefix_errors


class Batch(NamedTuple):
    """Images ``[n, 3, h, w]`` float32 in [−1, 1], labels ``[n]``, and unreadable images by reason."""

    images: Tensor
    labels: Tensor
    left_out: Counter[str]


Read = Callable[[Tensor], Batch]


def open_training_images(folder: Path) -> tuple[ShardReader, Read]:
    """Return the index of the training images in ``folder`` and a function that reads rows.

    Raises:
        InputError: the folder is missing, unfinished or damaged, or its images are in a source that is
            missing or has other classes, labels or number of images than at the time of ``far data``.
    """
    if open_training_index(folder).meta["kind"] == "images":
        reader = open_image_set(folder)

        def stored(rows: Tensor) -> Batch:
            return Batch(scaled(reader.rows("images", rows)), reader.rows("labels", rows), Counter())

        return reader, stored
    reader = ShardReader(folder, "records", verify=True)
    check_meta(reader, source=str, colors=str)
    reader.require({"labels": (np.int64, ()), "numbers": (np.int64, ()), "digests": (np.uint8, (32,))})
    check_labels(reader)
    return reader, _reader_of(reader, _source_of(reader))


def read_full(read: Read, count: int, rows: Tensor) -> Tensor:
    """Return as many images ``[n, 3, h, w]`` as there are rows ``[n]`` of ``count``.

    The next readable rows replace unreadable ones, which depends on the images and rows only.

    Raises:
        InputError: no image can be read, or as ``read``.
    """
    images = read(rows).images
    for step in range(1, count):
        if not (missing := len(rows) - len(images)):
            break
        images = torch.cat([images, read((rows[-missing:] + step) % count).images])
    if len(images) < len(rows):
        raise InputError("No training image can be read. Replace them, and run far data again")
    return images


def _source_of(reader: ShardReader) -> Source:
    """Open the source of an image set without pixels, and compare its list of images."""
    with prefix_errors(f"the images of {reader.folder.parent} (run far data again if they have moved): "):
        source = open_source(reader.meta["source"], reader.meta.get("label"))
    numbers, labels = reader.all("numbers").numpy(), reader.all("labels").numpy()
    if (
        list(source.classes) != reader.meta["classes"]
        or numbers.max() >= len(source.records)
        or (np.array(source.records.labels)[numbers] != labels).any()
    ):
        raise InputError(_changed(source.name, reader))
    return source


def _changed(name: str, reader: ShardReader) -> str:
    parent = reader.folder.parent
    return (
        f"{name} has changed since {parent} was made. Restore it, or remove {parent} and run far data again"
    )


def _reader_of(reader: ShardReader, source: Source) -> Read:
    """Return a function that decodes rows in several threads. Its errors name what has changed."""
    meta, size = reader.meta, sides(reader.meta["size"])
    settings = {"keep_colors": meta["colors"] == "as stored", "crop": meta.get("crop", True)}
    pool = ThreadPoolExecutor(thread_name_prefix="decode")
    reported: set[str] = set()  # a training reads an image once per epoch

    def decode(number: int, digest: bytes) -> np.ndarray | InputError:
        record = source.records[number]
        title = source.title(record)
        content, found = b"", bytes(32)
        try:
            with source.open(record) as file:
                content = file.read()
            found = hashlib.sha256(content).digest()
        except OSError:
            pass  # as it was if the stored digest is zero
        if found != digest:
            raise InputError(_changed(title, reader))
        try:
            return prepare_image(lambda: io.BytesIO(content), title, size, **settings)[0]
        except InputError as error:
            return error

    def read(rows: Tensor) -> Batch:
        numbers, digests = reader.rows("numbers", rows).tolist(), reader.rows("digests", rows).numpy()
        found = list(pool.map(decode, numbers, map(bytes, digests)))
        images = [image for image in found if not isinstance(image, InputError)]
        left_out: Counter[str] = Counter()
        for error in found:
            if isinstance(error, InputError):
                if str(error) not in reported:
                    report_skipped(error)
                reported.add(str(error))
                left_out[skip_reason(error)] += 1
        stacked = np.array(images, np.uint8).reshape(-1, *size, 3)
        kept = torch.tensor([not isinstance(image, InputError) for image in found])
        return Batch(scaled(torch.from_numpy(stacked)), reader.rows("labels", rows[kept]), left_out)

    return read


def read_ahead(read: Read, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Batch]]:
    """Yield all batches of rows and what they hold, each read by a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        before: tuple[Tensor, Future[Batch]] | None = None
        for rows in batches:
            following = rows, pool.submit(read, rows)
            if before is not None:
                yield before[0], before[1].result()
            before = following
        if before is not None:
            yield before[0], before[1].result()
