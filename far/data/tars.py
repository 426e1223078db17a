"""Read WebDataset tars in place, with the standard library's tarfile. Nothing is unpacked to disk.

Files of one name up to the first dot are a sample: ``0001.jpg`` and its label ``0001.cls``, ``0001.json`` or
``0001.txt``. If no image has such a label, or if most texts in .txt files differ, as captions do, images are
labeled by their outermost folder, as those of a folder are. Folders around all images are skipped, and train/
and val/ are parts.
"""

import io
import itertools
import json
import posixpath
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

from far.data.listing import SUFFIXES, is_hidden
from far.data.records import Item, Items, Record
from far.data.sources import TRAIN, File, Found, Source, checked_label, held_out_name, make_source
from far.errors import InputError
from far.files import printable

# Endings of label files, in order of preference.
_LABELS = ("cls", "json", "txt")
_LABEL_BYTES = 1 << 20
_BLOCK = 512
# Parts of the extended keys that change how a member is read. Others, such as mtime, do not matter here.
_EXTENSIONS = (b"path", b"size", b"sparse", b"charset")
# Some tars are padded with zeros, to 10 KiB as a rule.
_REST_BYTES = 1 << 20


class _Member(NamedTuple):
    """A file in a tar: its place, and its content if it may be a label."""

    name: str
    offset: int
    size: int
    content: bytes | None


class _Header(NamedTuple):
    """Name, size and kind of a member: ``0`` or a zero byte for a file, ``x`` for keys of the next one."""

    name: str
    size: int
    kind: bytes


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
    items, folders = Items(), _Folders()
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
                    folders.append(member.name, file.held_out)
                elif not images or each not in _LABELS:
                    left_out["." + each.rpartition(".")[2] if each else "without a suffix"] += 1
    hints = []
    if endings == {"txt"} and len(items.labels) > len(items) / 2:  # else some class would have one image
        hints.append(f"the texts of the .txt files in {name} differ, so they are no labels but captions")
        items, endings = Items(item._replace(label=None) for item in items), set()
    items, labels = _placed(items, folders, left_out, by_folder=not endings and label is None)
    if endings:
        labels = labels.replace("without labels", f"labels from .{' and .'.join(sorted(endings))}")

    def open_member(record: Record) -> IO[bytes]:
        number, offset, size = record.place
        with files[number].path.open("rb") as tar:
            tar.seek(offset)
            return io.BytesIO(tar.read(size))

    kind = f"{len(files)} tar{'s' * (len(files) > 1)}, {labels}"
    return make_source(name, root, Found(kind, items, open_member, left_out, sequential=True, hints=hints))


class _Folders:
    """Folders of images within their tars, as tuples of names.

    Attributes:
        distinct: the different ones, each with whether its file is held out.
        codes: position in ``distinct`` of each image's.
    """

    def __init__(self) -> None:
        self.distinct: dict[tuple[tuple[str, ...], bool], int] = {}
        self.codes = array("i")

    def append(self, name: str, held_out: bool) -> None:
        folder = tuple(name.split("/")[:-1])
        self.codes.append(self.distinct.setdefault((folder, held_out), len(self.distinct)))

    def within(self) -> list[tuple[str, ...]]:
        """Return the distinct folders without those around all images of their part.

        Images beside the outermost folder, such as a preview, do not count. If all others are in one
        folder, its name stays.
        """
        if len({folder for folder, _ in self.distinct if folder}) == 1:
            return [folder[-1:] for folder, _ in self.distinct]
        around = {
            part: _shared([folder for folder, held_out in self.distinct if folder and held_out == part])
            for part in {held_out for _, held_out in self.distinct}
        }
        return [folder[around[held_out] :] for folder, held_out in self.distinct]


def _shared(folders: Sequence[tuple[str, ...]]) -> int:
    """Return how many names all folders begin with."""
    first, last = min(folders, default=()), max(folders, default=())
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last)))


def _placed(items: Items, folders: _Folders, left_out: Counter[str], *, by_folder: bool) -> tuple[Items, str]:
    """Return the images with the parts and, if ``by_folder``, the labels that their folders give.

    Also return a description. ``left_out`` counts images of further parts and outside of class folders.
    """
    within = folders.within()
    part = None if any(items.held_out) else held_out_name(path[0] for path in within if path)
    depth = 0 if part is None else 1
    labeled = by_folder and any(len(path) > depth for path in within)
    kind = "labels from folders" if labeled else "without labels"
    chosen = Items()
    for item, code in zip(items, folders.codes):
        path, held_out = within[code], item.held_out
        if len(path) < depth + labeled:
            left_out["outside the class folders"] += 1
            continue
        if part is not None:
            held_out = path[0] == part
            if not held_out and path[0] not in TRAIN:
                left_out[f"in {path[0]}/"] += 1
                continue
        chosen.append(item._replace(label=path[depth] if labeled else item.label, held_out=held_out))
    return chosen, kind if part is None else f"{kind}, {part}/ held out"


def _samples(path: Path, left_out: Counter[str]) -> _Samples:
    """Return the files of a tar by sample; ``left_out`` counts members that are hidden or not plain files."""
    samples: _Samples = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = 0
            while (member := _next(tar, file, start=not end)) is not None:
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


def _next(tar: tarfile.TarFile, file: IO[bytes], *, start: bool) -> tarfile.TarInfo | None:
    """Return the next member, as ``tar.next`` does, but plain files several times as fast."""
    if not start and not tar.pax_headers:  # opening a tar reads its first member
        file.seek(place := tar.offset)
        found = _header(file.read(_BLOCK))
        if found is not None and found.kind == b"x" and found.size <= _LABEL_BYTES:
            extended = file.read(_padded(found.size))
            place += _BLOCK + len(extended)
            found = None if any(key in extended for key in _EXTENSIONS) else _header(file.read(_BLOCK))
        if found is not None and found.kind in (b"0", b"\0") and not found.name.endswith("/"):
            member = tarfile.TarInfo(found.name)
            member.size, member.offset_data = found.size, place + _BLOCK
            tar.offset = member.offset_data + _padded(member.size)
            return member
    return tar.next()


def _header(block: bytes) -> _Header | None:
    """Read a header; ``None`` if it is damaged or of a rare form, which tarfile has to read."""
    fields = block[124:136].strip(b" \0"), block[148:156].strip(b" \0")
    try:
        size, checksum = (int(field, 8) for field in fields)
    except ValueError:
        return None
    if len(block) < _BLOCK or size < 0 or sum(block) - sum(block[148:156]) + 8 * ord(" ") != checksum:
        return None
    prefix, name = (text.partition(b"\0")[0] for text in (block[345:500], block[:100]))
    title = (prefix + b"/" if prefix else b"") + name
    return _Header(title.decode("utf-8", "surrogateescape"), size, block[156:157])


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


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
        elif re.fullmatch("-?[0-9]{1,18}", text):
            value = int(text)
        if (label := checked_label(value, title)) is not None:
            return label, ending
    return None
