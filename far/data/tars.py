"""Read WebDataset tars in place, with the standard library's tarfile. Nothing is unpacked to disk.

Files of one name up to the first dot are a sample: ``0001.jpg`` and its label ``0001.cls``, ``0001.json`` or
``0001.txt``. If no image has such a label, images are labeled by the folder that they are in.
"""

import io
import json
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

from far.data.listing import SUFFIXES, is_hidden
from far.data.sources import File, Found, Item, Record, Source, checked_label, make_source
from far.errors import InputError
from far.files import printable

# Endings of label files, in order of preference.
_LABELS = ("cls", "json", "txt")
_LABEL_BYTES = 1 << 20
_BLOCK = 512
# Some tars are padded with zeros, to 10 KiB as a rule.
_REST_BYTES = 1 << 20


class _Member(NamedTuple):
    """A file in a tar: its place, and its content if it may be a label."""

    name: str
    offset: int
    size: int
    content: bytes | None


# Members by their lower-case ending, which begins after the first dot, by sample.
_Samples = dict[str, dict[str, _Member]]


def tar_source(name: str, root: Path, files: Sequence[File], label: str | None = None) -> Source:
    """Return the images of tars, with the labels beside them.

    Args:
        name: what the user gave.
        root: a folder above all tars.
        label: key of the label in JSON files, which then count alone. By default ``label``.

    Raises:
        InputError: a tar is compressed, cut off or damaged, has two files of one name or an unusable label,
            or as :func:`far.data.sources.make_source`.
    """
    items: list[Item] = []
    folders: list[str] = []
    left_out: Counter[str] = Counter()
    endings: set[str] = set()
    bar = tqdm(files, "listing tars", unit="file", mininterval=1, delay=1)
    for number, file in enumerate(bar):
        title = file.path.relative_to(root)
        for sample in _samples(file.path, left_out).values():
            images = _images(sample)
            value = None
            if images and (found := _label(sample, file.path, label)):
                value, ending = found
                endings.add(ending)
            for each, member in sample.items():
                if each in images:
                    place = number, member.offset, member.size
                    items.append(Item(value, f"{title}/{member.name}", place, file.held_out))
                    folders.append(posixpath.basename(posixpath.dirname(member.name)))
                elif not images or each not in _LABELS:
                    left_out["." + each.rpartition(".")[2] if each else "without a suffix"] += 1
    labels = "without labels"
    if endings:
        labels = f"labels from .{' and .'.join(sorted(endings))}"
    elif any(folders):
        labels = "labels from folders"
        items = [item._replace(label=folder or None) for item, folder in zip(items, folders)]

    def open_member(record: Record) -> IO[bytes]:
        number, offset, size = record.place
        with files[number].path.open("rb") as tar:
            tar.seek(offset)
            return io.BytesIO(tar.read(size))

    kind = f"{len(files)} tar{'s' * (len(files) > 1)}, {labels}"
    return make_source(name, root, Found(kind, items, open_member, left_out, sequential=True))


def _samples(path: Path, left_out: Counter[str]) -> _Samples:
    """Return the files of a tar by sample; ``left_out`` counts members that are hidden or not plain files."""
    samples: _Samples = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = 0
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps them all
                if member.size < 0 or tar.offset <= end:
                    raise tarfile.ReadError("a size is negative")  # some versions of tarfile would not end
                end = tar.offset
                name = posixpath.normpath(member.name)
                if member.isdir():
                    continue
                if any(map(is_hidden, name.split("/"))):
                    left_out["hidden"] += 1
                elif member.isreg() and not member.issparse():
                    _add(samples, name, member, file)
                else:
                    left_out["links or special files"] += 1
            # tarfile ends silently at a damaged header, or before a second tar. A whole tar ends in zeros.
            file.seek(tar.offset)
            rest = file.read(_REST_BYTES)
            if len(rest) < _BLOCK or rest.strip(b"\0"):
                raise tarfile.ReadError(f"it has no end mark at byte {tar.offset}, or content after it")
    except InputError:
        raise
    except Exception as error:  # tarfile raises almost anything on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "Copy or download it again; decompress a compressed one first"
        raise InputError(f"{path} is cut off, damaged or not a tar ({reason}). {remedy}") from error
    return samples


def _add(samples: _Samples, name: str, member: tarfile.TarInfo, file: IO[bytes]) -> None:
    folder, base = posixpath.split(name)
    stem, _, ending = base.partition(".")
    content = None
    if (ending := ending.lower()) in _LABELS and member.size <= _LABEL_BYTES:
        file.seek(member.offset_data)
        content = file.read(member.size)
    entry = _Member(name, member.offset_data, member.size, content)
    sample = samples.setdefault(posixpath.join(folder, stem), {})
    if ending in sample:
        pair = f"{sample[ending].name!r} and {name!r}"
        raise InputError(f"{file.name} has two files of one name, {pair}. Remove or rename one")
    sample[ending] = entry


def _images(sample: Mapping[str, _Member]) -> set[str]:
    """Return the endings of a sample's images.

    ``0001.seg.png`` is an image unless ``0001.jpg`` is one.
    """
    plain = {ending for ending in sample if f".{ending}" in SUFFIXES}
    return plain or {ending for ending in sample if Path(ending).suffix in SUFFIXES}


def _label(sample: Mapping[str, _Member], path: Path, key: str | None) -> tuple[str | int, str] | None:
    """Return a sample's label and the ending of the file that has it, if one has."""
    for ending in _LABELS if key is None else ("json",):
        if ending not in sample or (content := sample[ending].content) is None:
            continue
        title = f"{path}/{sample[ending].name}"
        try:
            text = content.decode().strip()
            value = json.loads(text) if ending == "json" else text
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{printable(title)} is not readable ({reason}). Correct it") from error
        if ending == "json":
            value = value.get(key or "label") if isinstance(value, dict) else None
        elif re.fullmatch("[0-9]{1,18}", text):
            value = int(text)
        if (label := checked_label(value, title)) is not None:
            return label, ending
    return None
