"""Convert a folder of images, one subfolder per class, to an image set: training and held-out part."""

import hashlib
import itertools
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from far.data.image_sets import PARTS, Summary
from far.data.images import OtherFormat, few_images, find_images, prepare_image
from far.data.listing import describe
from far.data.shards import ShardWriter
from far.errors import InputError
from far.files import printable, sha256

_SHARD_BYTES = 64 * 2**20
_HASHED_TOGETHER = 4096
# Names of parts of data sets, which are rarely classes.
_PART_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval", *PARTS}

File = tuple[Path, int]  # a path and its label
Found = tuple[np.ndarray, bool] | InputError  # pixels, and whether a color profile was ignored
Read = Callable[[Path], Found]


def write_folder(
    source: Path,
    folder: Path,
    size: int,
    held_out_share: float = 0.05,
    strict: bool = False,
    keep_colors: bool = False,
) -> Summary:
    """Pack ``source`` into ``folder/train`` and ``folder/held-out``, or continue an interrupted packing.

    Held-out images are spread evenly over each class's sorted files. Unreadable files are reported on
    standard error and skipped. The next readable file of the class replaces an unreadable held-out one. A
    copy of ``source`` can continue an image set, a changed ``source`` cannot.

    Args:
        source: folder with one subfolder of images per class. ``folder`` is outside.
        size: side of the square images in pixels, a multiple of 4 from 8 to 1024.
        held_out_share: fraction of each class to hold out, above 0 and at most 0.5. Each part gets at least
            one image.
        strict: raise on the first unreadable file.
        keep_colors: ignore embedded color profiles instead of converting to sRGB, as ADM prepares ImageNet.

    Raises:
        InputError: a value is out of range, ``source`` has no classes, a class has fewer than two readable
            images, ``folder`` has a set of other images, or a file is unreadable and ``strict`` is set.
    """
    _check(source, folder, size, held_out_share)
    left_out: Counter[str] = Counter()
    classes, files = find_images(source, left_out)
    held_out, train = _split(files, held_out_share)
    meta = {
        "kind": "images", "size": size, "classes": classes, "source": str(source),
        "image files": _content(files, source), "held-out share": held_out_share,
        "colors": "as stored" if keep_colors else "sRGB",
    }  # fmt: skip
    writers = {part: ShardWriter(folder / part, meta) for part in PARTS}
    complete = all(writer.found_complete for writer in writers.values())
    if not complete:
        read = partial(_try_read, size=size, keep_colors=keep_colors)
        held_out, train, needed = _with_both_parts(source, held_out, train, classes, read, strict)
        spare = _Spare(source, train, needed, writers["held-out"])
        _fill(writers["held-out"], source, held_out, read, strict, spare)
        _fill(writers["train"], source, spare.left(), read, strict, None)
    for writer in writers.values():
        left_out.update(writer.report.get("left out", {}))
    ignored = sum(writer.report.get("profiles ignored", 0) for writer in writers.values())
    hints = _hints(source, classes, files)
    if ignored:
        hints.append(f"{ignored} color profiles cannot be used. Their colors are read as sRGB.")
    counts = (writers["train"].count, writers["held-out"].count)
    return Summary(*counts, classes, dict(left_out), hints, complete)


def _check(source: Path, folder: Path, size: int, held_out_share: float) -> None:
    if not 8 <= size <= 1024 or size % 4:
        raise InputError(f"size {size} is not valid. Use a multiple of 4 from 8 to 1024")
    if not 0 < held_out_share <= 0.5:
        raise InputError(f"held-out-share {held_out_share} is not valid. Use a number above 0, at most 0.5")
    if folder.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{folder} is inside the folder of images {source}. Choose a folder outside")


def _split(files: list[File], share: float) -> tuple[list[File], list[File]]:
    """Return held-out and training files, spaced evenly in each class; a share is rounded to whole files."""
    held_out: list[File] = []
    train: list[File] = []
    for members in _by_class(files):
        count = min(len(members) - 1, max(1, int(len(members) * share + 0.5)))
        chosen = {index * len(members) // count for index in range(count)}
        for index, file in enumerate(members):
            (held_out if index in chosen else train).append(file)
    return held_out, train


def _content(files: list[File], source: Path) -> str:
    """Return a SHA-256 of the names and contents of all files."""
    digest = hashlib.sha256()
    bar = tqdm(total=len(files), desc="comparing files", unit="file", mininterval=1, delay=1)
    with ThreadPoolExecutor() as pool, bar:
        for start in range(0, len(files), _HASHED_TOGETHER):
            paths = [path for path, _ in files[start : start + _HASHED_TOGETHER]]
            for path, content in zip(paths, pool.map(_hash, paths)):
                digest.update(os.fsencode(path.relative_to(source)) + b"\0" + content.encode() + b"\n")
            bar.update(len(paths))
    return digest.hexdigest()


def _hash(path: Path) -> str:
    try:
        return sha256(path)
    except OSError:
        return "unreadable"  # decoding will report it


def _with_both_parts(
    source: Path, held_out: list[File], train: list[File], classes: list[str], read: Read, strict: bool
) -> tuple[list[File], list[File], set[File]]:
    """Ensure that both parts of each class will have an image, before anything is written.

    Return held-out files; training files, with a held-out one if the class has no other readable file; and
    one training file per class that must not replace a broken held-out file.
    """

    def readable(files: Iterable[File]) -> Iterator[File]:
        for file in files:
            found = read(file[0])
            if not isinstance(found, InputError):
                yield file
            elif strict:
                raise found
            else:
                reasons[file] = _reason(found)

    reasons: dict[File, str] = {}
    needed: set[File] = set()
    too_few = []
    names = tqdm(classes, desc="checking classes", unit="class", mininterval=1, delay=1)
    for name, held, trained in zip(names, _by_class(held_out), _by_class(train)):
        trains = next(readable(itertools.chain(reversed(trained), reversed(held))), None)
        stays = next((file for file in readable(itertools.chain(held, trained)) if file != trains), None)
        if trains is None or stays is None:
            unread = Counter(reasons[file] for file in held + trained if file in reasons)
            too_few.append(f"{name!r} ({describe(unread)})")
        else:
            needed.add(trains)
    if too_few:
        raise InputError(few_images(source, too_few))
    stay = [file for file in held_out if file not in needed]
    moved = needed.intersection(held_out)
    return stay, sorted([*train, *moved], key=lambda file: (file[1], file[0])), needed


def _by_class(files: list[File]) -> Iterator[list[File]]:
    return (list(group) for _, group in itertools.groupby(files, key=lambda file: file[1]))


class _Spare:
    """Training files that can replace broken held-out ones; the held-out part's report lists those used."""

    def __init__(self, source: Path, train: list[File], needed: set[File], held_out: ShardWriter) -> None:
        self.source, self.train, self.needed = source, train, needed
        self.report = held_out.report

    def __call__(self, broken: File) -> Iterator[File]:
        """Yield training files of the class of ``broken``, those after it first."""
        same = [file for file in self.left(broken[1]) if file not in self.needed]
        yield from [file for file in same if file > broken] + [file for file in same if file < broken]

    def left(self, label: int | None = None) -> list[File]:
        """Return the unbroken training files of all classes, or one, that replaced no held-out file."""
        files = self.train if label is None else [file for file in self.train if file[1] == label]
        gone = {*self.report.get("taken instead", ()), *self.report.get("skipped", ())}
        return [file for file in files if _name(file[0], self.source) not in gone] if gone else files


def _name(path: Path, source: Path) -> str:
    return str(path.relative_to(source))


def _fill(
    writer: ShardWriter, source: Path, files: list[File], read: Read, strict: bool, spare: _Spare | None
) -> None:
    """Write the missing images of ``files``, replace unreadable ones by those of ``spare``, and finish."""
    if writer.complete:
        return
    # Mix the classes, so that the beginning of a set is a fair sample. A fixed order lets packing resume.
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    files = [files[index] for index in order]
    size, report = writer.index["meta"]["size"], writer.report
    rows = max(1, _SHARD_BYTES // (3 * size * size))

    def skip(path: Path, error: InputError) -> None:
        if strict:
            raise error
        tqdm.write(f"skipped: {printable(str(error))}", file=sys.stderr)
        report.setdefault("skipped", []).append(_name(path, source))
        reasons = report.setdefault("left out", {})
        reasons[_reason(error)] = reasons.get(_reason(error), 0) + 1

    bar = tqdm(files, f"packing {writer.folder.name}", initial=writer.cursor, unit="img", mininterval=1)
    with ThreadPoolExecutor() as pool, bar:
        while writer.cursor < len(files):
            chunk = files[writer.cursor : writer.cursor + rows]
            images, labels = [], []
            for file, found in zip(chunk, pool.map(read, [path for path, _ in chunk])):
                bar.update()
                others = ((other, read(other)) for other, _ in (spare(file) if spare else ()))
                for path, result in itertools.chain([(file[0], found)], others):
                    if isinstance(result, InputError):
                        skip(path, result)
                        continue
                    if path != file[0]:
                        report.setdefault("taken instead", []).append(_name(path, source))
                    report["profiles ignored"] = report.get("profiles ignored", 0) + result[1]
                    images.append(result[0])
                    labels.append(file[1])
                    break
            stacked = np.array(images, np.uint8).reshape(-1, size, size, 3)
            tensors = {"images": torch.from_numpy(stacked), "labels": torch.tensor(labels, dtype=torch.int64)}
            writer.write(tensors, cursor=writer.cursor + len(chunk))
    writer.finish()


def _reason(error: InputError) -> str:
    return "in other formats under names of images" if isinstance(error, OtherFormat) else "broken"


def _try_read(path: Path, size: int, keep_colors: bool) -> Found:
    try:
        return prepare_image(path, size, keep_colors=keep_colors)
    except InputError as error:
        return error


def _hints(source: Path, classes: list[str], files: list[File]) -> list[str]:
    """Return warnings about classes that may be parts of a data set, or folders of classes."""
    within = [path.relative_to(source).parts for path, _ in files]
    parts = all(name.casefold().rstrip("0123456789-_ ") in _PART_NAMES for name in classes)
    if not parts and any(len(names) < 3 for names in within):
        return []
    nested = f"are folders of folders, such as {printable('/'.join(within[0][:2]))}"
    what = "have names of parts of a data set" if parts else nested
    command = f"far data folder {shlex.quote(str(source / classes[0]))} OUT"
    return [f"the classes {what}. If the folders in them are the classes, run: {command}"]
