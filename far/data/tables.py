"""Read tables of image files and labels: CSV, and JSON lines such as the ``metadata.jsonl`` of the hub."""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from far.data.listing import images_within
from far.data.sources import File, Found, Item, Record, Source, checked_label, make_source
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
        InputError: a table is not readable, has no column of paths, or a row names no file, or one that does
            not exist, or an unusable label, or as :func:`far.data.sources.make_source`.
    """
    label = label or "label"
    items: list[Item] = []
    left_out: Counter[str] = Counter()
    for file in files:
        listed = list(_items(file, root, label))
        items += listed
        if file.path.name in NAMES:
            known = {item.key for item in listed}
            found = images_within(file.path.parent, Counter())
            if others := sum(str(path.relative_to(root)) not in known for path in found):
                left_out[f"not in {file.path.name}"] += others

    def open_file(record: Record) -> IO[bytes]:
        return (root / record.key).open("rb")

    labeled = f"labels from {label!r}" if any(item.label is not None for item in items) else "without labels"
    kind = f"{' and '.join(dict.fromkeys(file.path.name for file in files))}, {labeled}"
    return make_source(name, root, Found(kind, items, open_file, left_out))


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
            raise InputError(f"{wrong}. Rename a column")
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
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        reason = printable(" ".join(str(error).split()))
        raise InputError(f"{path} is not readable near line {line} ({reason}). Correct it") from error
