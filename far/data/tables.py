"""Read tables of image files and labels: CSV, and JSON lines such as the ``metadata.jsonl`` of the hub."""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from far.data.listing import images_within
from far.data.records import Item, Items, Record
from far.data.sources import File, Found, Source, checked_label, make_source
from far.errors import InputError
from far.files import printable

SUFFIXES = (".csv", ".jsonl")
# Files that list the images of their folder, in the order of preference.
NAMES = ("metadata.jsonl", "metadata.csv")
_FILE_COLUMNS = ("file_name", "path", "filename", "file", "image")


def table_source(name: str, root: Path, files: Sequence[File], label: str | None = None) -> Source:
    """Return the images that tables list, with paths relative to the folder of the table.

    The path is in the column ``file_name``, ``path``, ``filename``, ``file`` or ``image``. Without a column
    ``label`` all images are of one class.

    Args:
        name: what the user gave.
        root: a folder above all tables.
        label: column of the labels, by default ``label``.

    Raises:
        InputError: a table is not readable, has no column of paths, or a row names no file, one that does not
            exist or was named before, or an unusable label, or as :func:`far.data.sources.make_source`.
    """
    label = label or "label"
    items, keys = Items(), set[str]()
    left_out: Counter[str] = Counter()
    for file in files:
        for item in _items(file, root, label):
            if item.key in keys:
                twice = printable(f"{file.path} names the file {root / item.key}, which is named before")
                raise InputError(f"{twice}. Remove a line")
            keys.add(item.key)
            items.append(item)
        if file.path.name in NAMES:
            found = images_within(file.path.parent, Counter())
            if others := sum(str(path.relative_to(root)) not in keys for path in found):
                left_out[f"not in {file.path.name}"] += others

    def open_file(record: Record) -> IO[bytes]:
        return (root / record.key).open("rb")

    labeled = any(each is not None for each in items.labels)
    labels = f"labels from {label!r}" if labeled else "without labels"
    kind = f"{' and '.join(dict.fromkeys(file.path.name for file in files))}, {labels}"
    hints = [] if labeled or not files else [_unlabeled(files[0].path, label)]
    return make_source(name, root, Found(kind, items, open_file, left_out, hints=hints))


def _unlabeled(path: Path, label: str) -> str:
    """Return a sentence about a table without labels, which names its columns."""
    columns = ", ".join(repr(name) for name in next((list(row) for _, row in _rows(path)), [])[:20])
    found = f"{path} has no labels in {label!r} (columns: {columns})"
    return printable(f"{found}, so all images are of one class")


def _items(file: File, root: Path, label: str) -> Iterator[Item]:
    """Yield the images that a table lists."""
    folder = file.path.parent.relative_to(root)
    column = None
    for line, row in _rows(file.path):
        title = f"{file.path} line {line}"
        column = column or next((name for name in _FILE_COLUMNS if name in row), None)
        if column is None:
            found = ", ".join(map(repr, list(row)[:20]))
            wrong = printable(f"{file.path} has no column {_FILE_COLUMNS[0]!r} of paths, only {found}")
            raise InputError(f"{wrong}. Rename a column, or remove the table")
        path = row.get(column)
        if not isinstance(path, str) or not path or "\0" in path:
            raise InputError(f"{title} has no {column}. Add the path of the image, or remove the line")
        key = os.path.normpath(folder / path)
        if not (root / key).is_file():
            wrong = printable(f"{title} names the file {path!r}, which does not exist")
            raise InputError(f"{wrong}. Add the file or remove the line")
        yield Item(checked_label(row.get(label), title), key, (), file.held_out)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the values of every row."""
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                reader = csv.DictReader(file, strict=True)
                for row in reader:
                    line = reader.line_num
                    if None in row or None in row.values():
                        raise ValueError(f"line {line} has more or fewer values than the header")
                    yield line, row
                return
            for line, text in enumerate(file, 1):
                if text.strip():
                    row = json.loads(text)
                    if not isinstance(row, dict):
                        raise ValueError(f"line {line} is not a JSON object")
                    yield line, row
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 near line {line + 1}. Save it as UTF-8") from error
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        reason = printable(" ".join(str(error).split()))
        raise InputError(f"{path} is not readable near line {line} ({reason}). Correct it") from error
