"""Convert a source of images to an image set: training and held-out part."""

import dataclasses
import hashlib
import itertools
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from far.data.image_folders import few_images
from far.data.image_sets import PARTS, Summary, sides
from far.data.images import Size, prepare_image, skip_reason
from far.data.listing import describe
from far.data.shards import ShardWriter
from far.data.sources import UNLABELED, Record, Source
from far.errors import InputError
from far.files import printable

_SHARD_BYTES = 64 * 2**20
_HASHED_TOGETHER = 4096
# Records per shard of an image set without pixels.
_LINKS = 1 << 20
_SHARE = 0.05
# Names of parts of data sets, which are rarely classes.
_PART_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval", *PARTS}

Found = tuple[np.ndarray, bool] | InputError  # pixels, and whether a color profile was ignored


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
        labels = np.array([record.label for record in source.records])
        meta["labels"] = hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()
    place = str(Path(source.name).absolute())  # far cache may run in another folder
    linked = {**meta, "kind": "records", "label": source.label, "source": place}
    return {"held-out": meta, "train": meta if preparation.copy else linked}


def _digests(source: Source) -> np.ndarray:
    """Return the SHA-256 of all images by number, ``[n, 32]`` uint8; zeros if one cannot be read."""
    digests = np.zeros((len(source.records), 32), np.uint8)
    records = source.in_order(source.records)
    bar = tqdm(total=len(records), desc="comparing files", unit="file", mininterval=1, delay=1)
    with ThreadPoolExecutor() as pool, bar:
        for start in range(0, len(records), _HASHED_TOGETHER):
            part = records[start : start + _HASHED_TOGETHER]
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


def _pack_held_out(source: Source, preparation: Preparation, writer: ShardWriter) -> list[Record]:
    """Write the missing held-out images, and return the training records."""
    held_out, train = _split(source, preparation.held_out_share or _SHARE)
    if source.has_parts:
        for name, records in (("held-out", held_out), ("training", train)):
            if all(isinstance(_try_read(source, preparation, record), InputError) for record in records):
                raise InputError(f"{source.name}: no {name} image can be read. Replace them")
        _fill(writer, source, held_out, preparation)
        return train
    held_out, train, needed = _with_both_parts(source, held_out, train, preparation)
    spare = _Spare(train, needed, writer)
    _fill(writer, source, held_out, preparation, spare)
    return spare.left()


def _link(writer: ShardWriter, source: Source, records: Sequence[Record], digests: np.ndarray) -> None:
    """Write labels, numbers and checksums of the training records, and finish."""
    records = source.in_order(records)
    while writer.cursor < len(records):
        part = records[writer.cursor : writer.cursor + _LINKS]
        numbers = torch.tensor([record.number for record in part])
        tensors = {
            "labels": torch.tensor([record.label for record in part]), "numbers": numbers,
            "digests": torch.from_numpy(digests)[numbers],
        }  # fmt: skip
        writer.write(tensors, cursor=writer.cursor + len(part))
    writer.finish()


def _split(source: Source, share: float) -> tuple[list[Record], list[Record]]:
    """Return held-out and training records: the source's own parts, or spaced evenly in each class.

    The share of a class is rounded to whole images.
    """
    if source.has_parts:
        return (
            [record for record in source.records if record.held_out],
            [record for record in source.records if not record.held_out],
        )
    held_out: list[Record] = []
    train: list[Record] = []
    for members in _by_class(source.records):
        count = min(len(members) - 1, max(1, int(len(members) * share + 0.5)))
        chosen = {index * len(members) // count for index in range(count)}
        for index, record in enumerate(members):
            (held_out if index in chosen else train).append(record)
    return held_out, train


def _with_both_parts(
    source: Source, held_out: list[Record], train: list[Record], preparation: Preparation
) -> tuple[list[Record], list[Record], set[Record]]:
    """Ensure that both parts of each class will have an image, before anything is written.

    Return held-out records; training records, with a held-out one if the class has no other readable image;
    and one training record per class that must not replace a broken held-out one.
    """

    def readable(records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            found = _try_read(source, preparation, record)
            if not isinstance(found, InputError):
                yield record
            elif preparation.strict:
                raise found
            else:
                reasons[record] = skip_reason(found)

    reasons: dict[Record, str] = {}
    needed: set[Record] = set()
    too_few = []
    names = tqdm(source.classes, desc="checking classes", unit="class", mininterval=1, delay=1)
    for name, held, trained in zip(names, _by_class(held_out), _by_class(train)):
        trains = next(readable(itertools.chain(reversed(trained), reversed(held))), None)
        stays = next((each for each in readable(itertools.chain(held, trained)) if each != trains), None)
        if trains is None or stays is None:
            unread = Counter(reasons[record] for record in held + trained if record in reasons)
            too_few.append(f"{name!r} ({describe(unread)})")
        else:
            needed.add(trains)
    if too_few:
        raise InputError(few_images(source.name, too_few))
    stay = [record for record in held_out if record not in needed]
    return stay, sorted([*train, *needed.intersection(held_out)]), needed


def _by_class(records: Iterable[Record]) -> Iterator[list[Record]]:
    return (list(group) for _, group in itertools.groupby(records, key=lambda record: record.label))


class _Spare:
    """Training records that can replace broken held-out ones; the held-out part's report lists those used."""

    def __init__(self, train: list[Record], needed: set[Record], held_out: ShardWriter) -> None:
        self.train, self.needed, self.report = train, needed, held_out.report

    def __call__(self, broken: Record) -> Iterator[Record]:
        """Yield training records of the class of ``broken``, those after it first."""
        same = [record for record in self.left(broken.label) if record not in self.needed]
        yield from [each for each in same if each > broken] + [each for each in same if each < broken]

    def left(self, label: int | None = None) -> list[Record]:
        """Return the unbroken training records of all classes, or one, that replaced no held-out one."""
        records = [record for record in self.train if label is None or record.label == label]
        gone = {*self.report.get("taken instead", ()), *self.report.get("skipped", ())}
        return [record for record in records if record.key not in gone] if gone else records


def _fill(
    writer: ShardWriter,
    source: Source,
    records: Sequence[Record],
    preparation: Preparation,
    spare: _Spare | None = None,
) -> None:
    """Write the missing images of ``records``, replace unreadable ones by those of ``spare``, and finish."""
    if writer.complete:
        return
    if source.sequential and writer.folder.name == "train":
        records = source.in_order(records)
    else:
        # Mix the classes, so that the beginning is a fair sample. A fixed order lets packing resume.
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
        records = [records[index] for index in order]
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

    bar = tqdm(records, f"packing {writer.folder.name}", initial=writer.cursor, unit="img", mininterval=1)
    with ThreadPoolExecutor() as pool, bar:
        while writer.cursor < len(records):
            chunk = records[writer.cursor : writer.cursor + rows]
            images, labels = [], []
            for record, found in zip(chunk, pool.map(read, chunk)):
                bar.update()
                others = ((other, read(other)) for other in (spare(record) if spare else ()))
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


def _try_read(source: Source, preparation: Preparation, record: Record) -> Found:
    try:
        return prepare_image(
            lambda: source.open(record), source.title(record), preparation.size,
            keep_colors=preparation.keep_colors, crop=preparation.crop,
        )  # fmt: skip
    except InputError as error:
        return error


def _hints(source: Source) -> list[str]:
    """Return warnings about class folders that may be parts of a data set, or folders of classes."""
    if not source.walked or source.has_parts or source.classes == [UNLABELED]:
        return []
    within = [Path(record.key).parts for record in source.records]
    parts = all(name.casefold().rstrip("0123456789-_ ") in _PART_NAMES for name in source.classes)
    if not parts and any(len(names) < 3 for names in within):
        return []
    nested = f"are folders of folders, such as {printable('/'.join(within[0][:2]))}"
    what = "have names of parts of a data set" if parts else nested
    command = f"far data {shlex.quote(str(source.root / source.classes[0]))} OUT"
    return [f"the classes {what}. If the folders in them are the classes, run: {command}"]
