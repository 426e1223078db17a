"""Convert a source of images to an image set: training and held-out part."""

import dataclasses
import hashlib
import itertools
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from far.data.image_folders import few_images
from far.data.image_sets import PARTS, Summary
from far.data.images import Size, prepare_image, sides, skip_reason
from far.data.listing import describe
from far.data.records import Record
from far.data.shards import ShardWriter
from far.data.sources import HELD_OUT, TRAIN, UNLABELED, Source
from far.errors import InputError
from far.files import printable, sole_use

_SHARD_BYTES = 64 * 2**20
_HASHED_TOGETHER = 4096
# Records per shard of an image set without pixels.
_LINKS = 1 << 20
_SHARE = 0.05
# Names of parts of data sets, which are rarely classes.
_PART_NAMES = {*TRAIN, *HELD_OUT, *PARTS}

Decoded = tuple[np.ndarray, bool] | InputError  # pixels, and whether a color profile was ignored


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Settings for turning images into rows of an image set.

    Attributes:
        size: side of square images, or (height, width), in pixels: multiples of 4 from 8 to 1024.
        held_out_share: fraction of each class to hold out, above 0 and at most 0.5. Each part gets at least
            one image. ``None`` means 0.05, or the source's own part.
        strict: raise on the first unreadable image.
        keep_colors: ignore embedded color profiles instead of converting to sRGB, as ADM prepares ImageNet.
        copy: store the pixels of the training images. Otherwise only their places and checksums are stored,
            for :func:`far.data.latents.write_latents`.
        crop: crop images to the proportions of the size. Otherwise they are stretched.
    """

    size: Size
    held_out_share: float | None = None
    strict: bool = False
    keep_colors: bool = False
    copy: bool = True
    crop: bool = True

    def __post_init__(self) -> None:
        for side in (self.size,) if isinstance(self.size, int) else self.size:
            if not 8 <= side <= 1024 or side % 4:
                raise InputError(f"size {side} is not valid. Use a multiple of 4 from 8 to 1024")
        share = self.held_out_share
        if share is not None and not 0 < share <= 0.5:
            raise InputError(f"held-out-share {share} is not valid. Use a number above 0, at most 0.5")


def write_images(source: Source, folder: Path, preparation: Preparation) -> Summary:
    """Pack ``source`` into ``folder/train`` and ``folder/held-out``, or continue an interrupted packing.

    Held-out images are spread evenly over each class's records, unless the source has a held-out part. Then
    unreadable images are reported on standard error and skipped. Otherwise the next readable image of the
    class also replaces an unreadable held-out one. A copy of ``source`` can continue an image set, a changed
    ``source`` cannot.

    Raises:
        InputError: a class has fewer than two readable images, ``folder`` is within the source or has a set
            of other images, the source has a held-out part but a share is given, or an image is unreadable
            and ``strict`` is set.
    """
    if source.walked and folder.resolve().is_relative_to(source.root.resolve()):
        raise InputError(f"{folder} is inside the folder of images {source.root}. Choose a folder outside")
    digests = _digests(source)
    meta = _meta(source, preparation, digests)
    with sole_use(folder):
        writers = {part: ShardWriter(folder / part, meta[part]) for part in PARTS}
        complete = all(writer.found_complete for writer in writers.values())
        if not complete:
            train = _pack_held_out(source, preparation, writers["held-out"])
            if preparation.copy:
                _fill(writers["train"], source, train, preparation)
            else:
                _link(writers["train"], source, train, digests)
        elif not preparation.copy:
            writers["train"].finish()  # the images may have moved
    left_out = Counter(source.left_out)
    for writer in writers.values():
        left_out.update(writer.report.get("left out", {}))
    ignored = sum(writer.report.get("profiles ignored", 0) for writer in writers.values())
    hints = _hints(source)
    if not preparation.copy:
        hints.append(f"the training images stay in {source.name}, where far cache reads them")
    if ignored:
        hints.append(f"{ignored} color profiles cannot be used. Their colors are read as sRGB.")
    counts = (writers["train"].count, writers["held-out"].count)
    return Summary(*counts, source.classes, dict(left_out), hints, complete)


def _meta(source: Source, preparation: Preparation, digests: np.ndarray) -> dict[str, dict[str, object]]:
    """Return the entries of each part's index, which identify the images and their preparation."""
    share: float | str | None = preparation.held_out_share
    if source.has_parts:
        if share is not None:
            raise InputError(f"{source.name} has a held-out part. Leave out --held-out-share")
        share = "the source's own part"
    meta: dict[str, object] = {
        "kind": "images", "size": preparation.size, "classes": source.classes, "source": source.name,
        "image files": _content(source, digests), "held-out share": _SHARE if share is None else share,
        "colors": "as stored" if preparation.keep_colors else "sRGB",
    }  # fmt: skip
    if not preparation.crop:
        meta["crop"] = False
    if not source.walked:
        labels = np.array(source.records.labels)
        meta["labels"] = hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()
    place = str(Path(source.name).absolute())  # far cache may run in another folder
    linked = {**meta, "kind": "records", "label": source.label, "source": place}
    return {"held-out": meta, "train": meta if preparation.copy else linked}


def _digests(source: Source) -> np.ndarray:
    """Return the SHA-256 of all images by number, ``[n, 32]`` uint8; zeros if one cannot be read."""
    digests = np.zeros((len(source.records), 32), np.uint8)
    numbers = np.fromiter(source.in_order(range(len(source.records))), np.int64)
    bar = tqdm(total=len(numbers), desc="comparing files", unit="file", mininterval=1, delay=1)
    with ThreadPoolExecutor() as pool, bar:
        for start in range(0, len(numbers), _HASHED_TOGETHER):
            part = [source.records[number] for number in numbers[start : start + _HASHED_TOGETHER]]
            for record, digest in zip(part, pool.map(source.digest, part)):
                digests[record.number] = np.frombuffer(digest, np.uint8)
            bar.update(len(part))
    return digests


def _content(source: Source, digests: np.ndarray) -> str:
    """Return a SHA-256 of the keys and contents of all images."""
    content = hashlib.sha256()
    for record, digest in zip(source.records, map(bytes, digests)):
        text = digest.hex() if any(digest) else "unreadable"
        content.update(os.fsencode(record.key) + b"\0" + text.encode() + b"\n")
    return content.hexdigest()


def _pack_held_out(source: Source, preparation: Preparation, writer: ShardWriter) -> np.ndarray:
    """Write the missing held-out images, and return the numbers of the training records."""
    held_out, train = _split(source, preparation.held_out_share or _SHARE)
    if source.has_parts:
        for name, numbers in (("held-out", held_out), ("training", train)):
            if all(isinstance(_try_read(source, preparation, number), InputError) for number in numbers):
                raise InputError(f"{source.name}: no {name} image can be read. Replace them")
        _fill(writer, source, held_out, preparation)
        return train
    held_out, train, needed = _with_both_parts(source, held_out, train, preparation)
    spare = _Spare(source, train, needed, writer)
    _fill(writer, source, held_out, preparation, spare)
    return spare.left(train)


def _link(writer: ShardWriter, source: Source, train: np.ndarray, digests: np.ndarray) -> None:
    """Write labels, numbers and checksums of the training records, and finish."""
    numbers, labels = np.fromiter(source.in_order(train), np.int64), np.array(source.records.labels)
    while writer.cursor < len(numbers):
        part = numbers[writer.cursor : writer.cursor + _LINKS]
        tensors = {
            "labels": torch.from_numpy(labels[part].astype(np.int64)), "numbers": torch.from_numpy(part),
            "digests": torch.from_numpy(digests[part]),
        }  # fmt: skip
        writer.write(tensors, cursor=writer.cursor + len(part))
    writer.finish()


def _split(source: Source, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers of held-out and training records: the source's parts, or spaced evenly in each class.

    The share of a class is rounded to whole images.
    """
    numbers = np.arange(len(source.records))
    if source.has_parts:
        held_out = np.frombuffer(source.records.held_out, bool)
    else:
        held_out = np.zeros(len(numbers), bool)
        for members in _by_class(source, numbers):
            count = min(len(members) - 1, max(1, int(len(members) * share + 0.5)))
            held_out[members[np.arange(count) * len(members) // count]] = True
    return numbers[held_out], numbers[~held_out]


def _with_both_parts(
    source: Source, held_out: np.ndarray, train: np.ndarray, preparation: Preparation
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Ensure that both parts of each class will have an image, before anything is written.

    Return held-out records; training records, with a held-out one if the class has no other readable image;
    and one training record per class that must not replace a broken held-out one. All are numbers.
    """

    def readable(numbers: Iterable[int]) -> Iterator[int]:
        for number in numbers:
            found = _try_read(source, preparation, number)
            if not isinstance(found, InputError):
                yield number
            elif preparation.strict:
                raise found
            else:
                reasons[number] = skip_reason(found)

    reasons: dict[int, str] = {}
    needed: list[int] = []
    too_few = []
    names = tqdm(source.classes, desc="checking classes", unit="class", mininterval=1, delay=1)
    for name, held, trained in zip(names, _by_class(source, held_out), _by_class(source, train)):
        trains = next(readable(itertools.chain(trained[::-1], held[::-1])), None)
        stays = next((each for each in readable(itertools.chain(held, trained)) if each != trains), None)
        if trains is None or stays is None:
            unread = Counter(reasons[number] for number in (*held, *trained) if number in reasons)
            too_few.append(f"{name!r} ({describe(unread)})")
        else:
            needed.append(trains)
    if too_few:
        raise InputError(few_images(source.name, too_few))
    moved = np.isin(held_out, needed)
    return held_out[~moved], np.sort(np.concatenate([train, held_out[moved]])), needed


def _by_class(source: Source, numbers: np.ndarray) -> list[np.ndarray]:
    """Return the numbers of records by class. They are sorted, and every class has some."""
    labels = np.array(source.records.labels)[numbers]
    return np.split(numbers, np.flatnonzero(np.diff(labels)) + 1)


class _Spare:
    """Training records that can replace broken held-out ones; the held-out part's report lists those used.

    All records are numbers. Those in ``needed`` replace none.
    """

    def __init__(self, source: Source, train: np.ndarray, needed: list[int], held_out: ShardWriter) -> None:
        self.source, self.needed, self.report = source, needed, held_out.report
        self.train, self.labels = train, np.array(source.records.labels)[train]

    def __call__(self, broken: Record) -> Iterator[Record]:
        """Yield training records of the class of ``broken``, those after it first."""
        same = self.train[self.labels == broken.label]
        same = same[~np.isin(same, self.needed)]
        gone = self._gone()
        for number in np.concatenate([same[same > broken.number], same[same < broken.number]]):
            if (record := self.source.records[number]).key not in gone:
                yield record

    def left(self, numbers: np.ndarray) -> np.ndarray:
        """Return those of some training records that are unbroken and replaced no held-out one."""
        gone = self._gone()
        if not gone:
            return numbers
        return numbers[[self.source.records[number].key not in gone for number in numbers]]

    def _gone(self) -> set[str]:
        return {*self.report.get("taken instead", ()), *self.report.get("skipped", ())}


def _fill(
    writer: ShardWriter,
    source: Source,
    numbers: np.ndarray,
    preparation: Preparation,
    spare: _Spare | None = None,
) -> None:
    """Write the missing images of records, replace unreadable ones by those of ``spare``, and finish."""
    if writer.complete:
        return
    if source.sequential and writer.folder.name == "train":
        numbers = np.fromiter(source.in_order(numbers), np.int64)
    else:
        # Mix the classes, so that the beginning is a fair sample. A fixed order lets packing resume.
        order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))
        numbers = numbers[order.numpy()]
    height, width = sides(preparation.size)
    report, read = writer.report, partial(_try_read, source, preparation)
    rows = max(1, _SHARD_BYTES // (3 * height * width))

    def skip(record: Record, error: InputError) -> None:
        if preparation.strict:
            raise error
        report_skipped(error)
        report.setdefault("skipped", []).append(record.key)
        reasons = report.setdefault("left out", {})
        reasons[skip_reason(error)] = reasons.get(skip_reason(error), 0) + 1

    bar = tqdm(numbers, f"packing {writer.folder.name}", initial=writer.cursor, unit="img", mininterval=1)
    with ThreadPoolExecutor() as pool, bar:
        while writer.cursor < len(numbers):
            chunk = numbers[writer.cursor : writer.cursor + rows]
            # Within a shard the order of reading is free.
            reading = np.fromiter(source.in_order(chunk), np.int64)
            results = {}
            for number, found in zip(reading, pool.map(read, reading)):
                results[number] = found
                bar.update()
            images, labels = [], []
            for record in map(source.records.__getitem__, chunk):
                found = results.pop(record.number)
                others = ((other, read(other.number)) for other in (spare(record) if spare else ()))
                for taken, result in itertools.chain([(record, found)], others):
                    if isinstance(result, InputError):
                        skip(taken, result)
                        continue
                    if taken != record:
                        report.setdefault("taken instead", []).append(taken.key)
                    report["profiles ignored"] = report.get("profiles ignored", 0) + result[1]
                    images.append(result[0])
                    labels.append(record.label)
                    break
            stacked = np.array(images, np.uint8).reshape(-1, height, width, 3)
            tensors = {"images": torch.from_numpy(stacked), "labels": torch.tensor(labels, dtype=torch.int64)}
            writer.write(tensors, cursor=writer.cursor + len(chunk))
    writer.finish()


def report_skipped(error: InputError) -> None:
    """Print on standard error which image is skipped, above the progress bar."""
    tqdm.write(f"skipped: {printable(str(error))}", file=sys.stderr)


def _try_read(source: Source, preparation: Preparation, number: int) -> Decoded:
    record = source.records[number]
    try:
        return prepare_image(
            lambda: source.open(record), source.title(record), preparation.size,
            keep_colors=preparation.keep_colors, crop=preparation.crop,
        )  # fmt: skip
    except InputError as error:
        return error


def _hints(source: Source) -> list[str]:
    """Return the source's hints, and one about class folders that may be parts, or folders of classes."""
    hints = list(source.hints)
    if not source.walked or source.has_parts or source.classes == [UNLABELED]:
        return hints
    parts = all(name.casefold().rstrip("0123456789-_ ") in _PART_NAMES for name in source.classes)
    if not parts and any(len(Path(record.key).parts) < 3 for record in source.records):
        return hints
    first = Path(source.records[0].key).parts
    nested = f"are folders of folders, such as {printable('/'.join(first[:2]))}"
    what = "have names of parts of a data set" if parts else nested
    command = f"far data {shlex.quote(str(source.root / source.classes[0]))} OUT"
    return [*hints, f"the classes {what}. If the folders in them are the classes, run: {command}"]
