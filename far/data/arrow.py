"""Read data sets of Hugging Face: parquet files, and folders of ``save_to_disk``, through pyarrow."""

import contextlib
import functools
import importlib
import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from far.data.records import Item, Items, Record
from far.data.sources import File, Found, Source, checked_label, make_source
from far.errors import InputError
from far.files import printable, read_json

# Names of the column of images if several columns could be it.
_IMAGE_COLUMNS = ("image", "img")
# Images are read in the order of their groups, and two groups meet between two images.
_GROUPS_IN_MEMORY = 2
# A process may have few files open at a time, 256 on some systems.
_OPEN_FILES = 16


class _Table(NamedTuple):
    """An open file.

    Attributes:
        schema: its columns.
        groups: number of rows of each group of rows.
        read: (group, column) → the values. A column within another is named as in ``"image.bytes"``.
    """

    schema: Any
    groups: Sequence[int]
    read: Callable[[int, str], Any]


class _Columns(NamedTuple):
    """Columns of a table: of the images' bytes, of the labels, and names of integer labels."""

    image: str
    label: str | None
    names: list[str] | None


def parquet_source(name: str, root: Path, files: Sequence[File], label: str | None = None) -> Source:
    """Return the images of parquet files, with labels from a column and class names from their metadata.

    Args:
        name: what the user gave.
        root: a folder above all files.
        label: column of the labels, by default ``label`` or the only column of class labels.

    Raises:
        InputError: pyarrow is missing, a file is not readable, has no or several columns of images or of
            class labels, or an unusable label, or as :func:`far.data.sources.make_source`.
    """
    return _source(name, root, files, label, "parquet", _open_parquet)


def saved_source(name: str, root: Path, files: Sequence[File], label: str | None = None) -> Source:
    """Return the images of folders that ``save_to_disk`` wrote; otherwise as :func:`parquet_source`."""
    shards = [File(path, file.held_out) for file in files for path in _shards(file.path)]
    return _source(name, root, shards, label, "save_to_disk", _open_stream)


def _open_parquet(path: Path) -> _Table:
    file = _pyarrow(".parquet").ParquetFile(path)
    groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]

    def read(group: int, column: str) -> Any:
        return file.read_row_group(group, columns=[column], use_threads=False).column(0)

    return _Table(file.schema_arrow, groups, read)


def _open_stream(path: Path) -> _Table:
    reader = _pyarrow(".ipc").open_stream(_pyarrow().memory_map(str(path)))
    batches = list(reader)  # they stay on disk

    def read(group: int, column: str) -> Any:
        values = batches[group].column(column.partition(".")[0])
        values.validate(full=True)  # else damaged offsets would crash the process
        return values

    return _Table(reader.schema, list(map(len, batches)), read)


def _pyarrow(module: str = "") -> Any:
    try:
        return importlib.import_module(f"pyarrow{module}")
    except ImportError as error:
        raise InputError("pyarrow is not installed. Run pip install 'far-image[parquet]'") from error


def _shards(folder: Path) -> Iterator[Path]:
    """Yield the data files of a folder of ``save_to_disk``."""
    state = read_json(folder / "state.json")
    entries = state.get("_data_files") if isinstance(state, dict) else None
    for entry in entries if isinstance(entries, list) and entries else [None]:
        file = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(file, str) or Path(file).name != file or not (folder / file).is_file():
            raise InputError(f"{folder / 'state.json'} names no existing data file. Save the data set again")
        yield folder / file


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn errors of pyarrow into an :class:`InputError` that names ``path``."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # pyarrow raises many kinds of errors on damaged files
        reason = printable(" ".join(str(error).split())[:200]) or type(error).__name__
        raise InputError(f"{path} cannot be read ({reason}). Download or write it again") from error


def _source(
    name: str,
    root: Path,
    files: Sequence[File],
    label: str | None,
    kind: str,
    open_table: Callable[[Path], _Table],
) -> Source:
    items = Items()
    columns: _Columns | None = None
    bar = tqdm(files, f"listing {kind} files", unit="file", mininterval=1, delay=1)
    for number, file in enumerate(bar):
        with _readable(file.path):
            table = open_table(file.path)
            found = _columns(table.schema, file.path, label)
            columns = columns or found
            if found != columns:
                pair = f"{files[0].path} and {file.path}"
                raise InputError(f"{pair} have different columns or class names. Give files of one data set")
            path = file.path.relative_to(root)
            for row, (place, each) in enumerate(_labels(table, found.label, number, file.path)):
                items.append(Item(each, f"{path} row {row}", place, file.held_out))
    assert columns is not None
    title = f"{len(files)} {kind} file{'s' * (len(files) > 1)}, images from {columns.image.split('.')[0]!r}"
    labels = f"labels from {columns.label!r}" if columns.label else "without labels"
    open_row = _opener(open_table, [file.path for file in files], columns.image)
    found_all = Found(f"{title}, {labels}", items, open_row, Counter(), columns.names, sequential=True)
    return make_source(name, root, found_all)


def _labels(
    table: _Table, column: str | None, number: int, path: Path
) -> Iterator[tuple[tuple[int, int, int], str | int | None]]:
    """Yield the place (file, group, row within the group) and the label of every row."""
    row = 0
    for group, count in enumerate(table.groups):
        values = [None] * count if column is None else table.read(group, column).to_pylist()
        for index, value in enumerate(values):
            yield (number, group, index), checked_label(value, f"{path} row {row}")
            row += 1


def _opener(
    open_table: Callable[[Path], _Table], paths: Sequence[Path], column: str
) -> Callable[[Record], IO[bytes]]:
    """Return a function that opens the image of a record.

    It keeps the last files open, and the last groups of rows in memory.
    """
    lock = threading.Lock()

    @functools.lru_cache(_OPEN_FILES)
    def table(number: int) -> _Table:
        return open_table(paths[number])

    @functools.lru_cache(_GROUPS_IN_MEMORY)
    def values(number: int, group: int) -> Any:
        return table(number).read(group, column)

    def open_row(record: Record) -> IO[bytes]:
        number, group, index = record.place
        with lock, _readable(paths[number]):
            value = values(number, group)[index].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not content:
            raise OSError("it has no bytes")
        return io.BytesIO(content)

    return open_row


def _columns(schema: Any, path: Path, label: str | None) -> _Columns:
    """Find the columns of images and labels, by the metadata of the library ``datasets`` if present."""
    features, names = _features(schema), list(schema.names)
    fields = {name: field for name in names if (field := _bytes_field(schema.field(name).type, name))}
    chosen = [name for name in _IMAGE_COLUMNS if name in fields][:1] or list(fields)
    if len(chosen) != 1:
        listed = ", ".join(map(repr, fields or names))
        wrong = f"several columns of images ({listed})" if fields else f"no column of images, only {listed}"
        raise InputError(printable(f"{path} has {wrong}. Keep one column of images, named 'image'"))
    classes = [name for name in names if features.get(name, {}).get("_type") == "ClassLabel"]
    if label is None and "label" not in names and len(classes) > 1:
        listed = ", ".join(map(repr, classes))
        raise InputError(printable(f"{path} has several columns of labels ({listed}). Choose one by --label"))
    if label is None:
        label = "label" if "label" in names else next(iter(classes), None)
    elif label not in names:
        listed = ", ".join(map(repr, names))
        raise InputError(printable(f"{path} has no column {label!r}, only {listed}. Give another --label"))
    texts = features.get(label or "", {}).get("names")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return _Columns(fields[chosen[0]], label, None)
    if len({*texts}) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        wrong = f"{path} has the name {twice!r} for several classes of {label!r}"
        raise InputError(printable(f"{wrong}. Rename one"))
    return _Columns(fields[chosen[0]], label, texts)


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return the features by column that the library ``datasets`` describes in a schema."""
    try:
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = described["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _bytes_field(kind: Any, name: str) -> str | None:
    """Return the path to the bytes in a column of images; None for other columns."""
    types = _pyarrow().types
    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        nested = _bytes_field(kind.field(index).type, f"{name}.bytes") if index >= 0 else None
        return nested if nested == f"{name}.bytes" else None
    return name if types.is_binary(kind) or types.is_large_binary(kind) else None
