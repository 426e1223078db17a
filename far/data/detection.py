"""Detect what a source of images is, and open it with its reader. Decodes no image."""

import dataclasses
import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from far.data import arrow, tables, tars
from far.data.image_folders import class_folder_source, has_class_folders, image_folder_source, parts_source
from far.data.listing import class_folders, images_within, is_hidden
from far.data.sources import HELD_OUT, TRAIN, UNLABELED, File, Source, held_out_name
from far.errors import InputError

_READERS: dict[str, Callable[..., Source]] = {
    ".tar": tars.tar_source,
    ".parquet": arrow.parquet_source,
    ".csv": tables.table_source,
    ".jsonl": tables.table_source,
}
_KINDS = "a folder of images, or .tar (uncompressed), .parquet, .csv or .jsonl files"
# Number of names that one range of braces may stand for.
_MOST_NAMES = 100_000


def open_source(place: str, label: str | None = None) -> Source:
    """Find the images of a folder or of files, and decide which reader reads them.

    Args:
        place: a folder or file, or a pattern of files with ``*`` and ``{000..123}``.
        label: column or JSON key of the labels.

    Raises:
        InputError: ``place`` does not exist or is not a source of images, has no such label, or its reader
            refuses it.
    """
    folder = Path(place)
    if folder.is_dir():
        source = _open_folder(place, folder, label)
    else:
        paths = [path.absolute() for path in _matches(place)]
        source = _open_files(place, Path(os.path.commonpath([path.parent for path in paths])), paths, label)
    if label is not None and (source.walked or source.classes == [UNLABELED]):
        raise InputError(f"{place} has no labels named {label!r}. Leave out --label, or give another name")
    return dataclasses.replace(source, label=label)


def _open_folder(place: str, folder: Path, label: str | None) -> Source:
    if (folder / "train" / "index.json").exists():
        raise InputError(f"{place} is already an image set. Give {_KINDS}")
    subfolders = class_folders(folder, Counter())
    if found := _described(folder, subfolders):
        name, holders = found
        files, others = _divided(holders, _folder_words)
        if name == "state.json":
            source = arrow.saved_source(place, folder, files, label)
        else:
            listed = [File(file.path / name, file.held_out) for file in files]
            source = tables.table_source(place, folder, listed, label)
            _check_table(source, listed[0].path, subfolders)
        _check_others(source, name, holders, subfolders)
        return _noted(source, others)
    files, others = _divided(subfolders, _folder_words)
    if any(file.held_out for file in files):
        return _with_unread(parts_source(folder, files, others), folder)
    if has_class_folders(folder):
        return _with_unread(class_folder_source(folder), folder)
    for suffix in (".tar", ".parquet"):
        if paths := [path for parent in (folder, folder / "data") for path in _with_suffix(parent, suffix)]:
            return _open_files(place, folder, paths, label)
    return _with_unread(image_folder_source(folder), folder)


def _described(folder: Path, subfolders: Sequence[Path]) -> tuple[str, list[Path]] | None:
    """Return the name of the file that lists images, and what has one: ``folder``, or some subfolders."""
    for places in ([folder], subfolders):
        for name in (*tables.NAMES, "state.json"):
            if found := [place for place in places if (place / name).exists()]:
                return name, found
    return None


def _check_others(source: Source, name: str, holders: Sequence[Path], subfolders: Sequence[Path]) -> None:
    """Raise an :class:`InputError` if only some subfolders list their images, and others have images too."""
    rest = [path for path in subfolders if path not in holders]
    if holders[0] in subfolders and rest:
        tops = {record.key.partition("/")[0] for record in source.records}
        unused = (path for path in rest if path.name not in tops)
        if ignored := [path for path in unused if images_within(path, Counter())]:
            wrong = (
                f"{holders[0]} has a {name}, and none is in {', '.join(map(str, ignored[:5]))} with images"
            )
            raise InputError(f"{wrong}. Give every folder one of this name, or {holders[0]} alone")


def _check_table(source: Source, table: Path, subfolders: Sequence[Path]) -> None:
    """Raise an :class:`InputError` if a table without labels hides class folders beside it."""
    beside = [path for path in subfolders if path.parent == table.parent]
    if source.classes == [UNLABELED] and sum(bool(images_within(path, Counter())) for path in beside) > 1:
        wrong = f"{table} has no labels, but {table.parent} has class folders"
        raise InputError(f"{wrong}. Choose a column by --label, or remove the table")


def _with_unread(source: Source, folder: Path) -> Source:
    """Return a source with a hint about tables in its folder that are not read."""
    unread = [path for suffix in tables.SUFFIXES for path in _with_suffix(folder, suffix)]
    remedy = "If it has the labels, give it in place of the folder"
    return dataclasses.replace(source, hints=[f"{path} is not read. {remedy}" for path in unread[:5]])


def _open_files(place: str, root: Path, paths: Sequence[Path], label: str | None) -> Source:
    suffixes = sorted({path.suffix.lower() for path in paths})
    if len(suffixes) > 1 or suffixes[0] not in _READERS:
        raise InputError(f"{place} is {' and '.join(suffixes) or 'a file'}. Give {_KINDS}")
    files, others = _divided(paths, _file_words)
    return _noted(_READERS[suffixes[0]](place, root, files, label), others)


def _noted(source: Source, others: Sequence[Path]) -> Source:
    """Return a source whose description names the parts that are not used."""
    if not others:
        return source
    kind = f"{source.kind}; not used: {', '.join(path.name for path in others[:5])}"
    return dataclasses.replace(source, kind=kind)


def _divided(paths: Sequence[Path], words: Callable[[Path], Sequence[str]]) -> tuple[list[File], list[Path]]:
    """Return the files of the training and the held-out part, and those of further parts.

    All are for training unless each path has the name of a part among its words, and both parts exist.
    """
    names = {*TRAIN, *HELD_OUT}
    parts = [next((word for word in words(path) if word in names), None) for path in paths]
    held_out = held_out_name(parts)
    if held_out is None:
        return [File(path, False) for path in paths], []
    used = (*TRAIN, held_out)
    files = [File(path, part == held_out) for path, part in zip(paths, parts) if part in used]
    return files, [path for path, part in zip(paths, parts) if part not in used]


def _folder_words(path: Path) -> list[str]:
    return [path.name]


def _file_words(path: Path) -> list[str]:
    """Return the words of a name such as ``train-00000-of-00002.parquet``."""
    return re.split("[^a-z]+", path.name.lower())


def _with_suffix(folder: Path, suffix: str) -> list[Path]:
    """Return the files of a folder with this suffix, sorted; none if there is no such folder."""
    paths = folder.iterdir() if folder.is_dir() else ()
    shown = [path for path in paths if path.is_file() and not is_hidden(path.name)]
    return sorted(path for path in shown if path.suffix.lower() == suffix)


def _matches(place: str) -> list[Path]:
    """Return the files that a pattern names: a path, ``*`` as in a shell, and ``{000..123}`` or ``{a,b}``.

    Raises:
        InputError: a name or pattern within it matches no file.
    """
    if os.path.exists(place):
        return [Path(place)]
    found: dict[Path, None] = {}
    for name in _expanded(place):
        pattern = name.replace("[", "[[]")  # brackets are part of a name
        matches = [name] if os.path.exists(name) else sorted(glob.glob(pattern, recursive=True))
        paths = [Path(match) for match in matches if os.path.isfile(match)]
        if not paths:
            raise InputError(f"{name} does not exist. Give {_KINDS}")
        found.update(dict.fromkeys(paths))
    return list(found)


def _expanded(pattern: str) -> Iterator[str]:
    """Yield the names of a pattern with braces, in the shell's order."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        yield pattern
        return
    first, last, words = match.groups()
    if words is None and not 0 <= int(last) - int(first) < _MOST_NAMES:
        raise InputError(f"the range {match[0]} of {pattern} is empty or too long. Correct it")
    width = len(first) if words is None else 0
    middles = words.split(",") if words else [f"{n:0{width}d}" for n in range(int(first), int(last) + 1)]
    for middle in middles:
        yield from _expanded(pattern[: match.start()] + middle + pattern[match.end() :])
