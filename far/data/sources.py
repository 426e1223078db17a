"""Sources of images: what a reader finds, before anything is decoded. Imports neither numpy nor Pillow.

Each reader is a module: ``image_folders``, ``tars``, ``tables`` and ``arrow``. ``detection`` chooses it.
"""

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

from far.data.listing import describe, natural_order
from far.errors import InputError
from far.files import is_plain, printable, sha256_of

# The class of images without labels.
UNLABELED = "images"


class Record(NamedTuple):
    """One image of a source. Records compare by their number.

    Attributes:
        number: position in the source.
        label: number of its class.
        key: its name within the source, which is unique.
        place: where its reader finds it. Places are sorted as they lie on disk.
        held_out: whether the source itself holds it out from training.
    """

    number: int
    label: int
    key: str
    place: Any = ()
    held_out: bool = False


class Item(NamedTuple):
    """One image that a reader has found: its label, and the fields of :class:`Record`."""

    label: str | int | None
    key: str
    place: Any = ()
    held_out: bool = False


class File(NamedTuple):
    """A file that holds images or lists them, and whether its images are held out from training."""

    path: Path
    held_out: bool


@dataclasses.dataclass(frozen=True)
class Found:
    """Everything that a reader has found.

    Attributes:
        kind: describes the source, such as "class folders".
        items: images in the reader's order.
        open: returns the content of a record's image. An ``OSError`` means that this image cannot be read.
        left_out: number of skipped files by reason.
        names: names of integer labels.
        sequential: reading in the order of places is much faster than in any other.
        walked: the root was searched for files: keys begin with the labels, and new files would be found.
    """

    kind: str
    items: Sequence[Item]
    open: Callable[[Record], IO[bytes]]
    left_out: Counter[str]
    names: Sequence[str] | None = None
    sequential: bool = False
    walked: bool = False


@dataclasses.dataclass(frozen=True)
class Source:
    """Images of one place, found but not read.

    Attributes:
        name: what the user gave.
        root: the folder that keys are relative to.
        classes: names in the order of their numbers.
        records: sorted by label, and within a class in the reader's order.
        label: column or JSON key of the labels that the user chose.

    The others are those of :class:`Found`.
    """

    name: str
    root: Path
    classes: Sequence[str]
    records: Sequence[Record]
    kind: str
    open: Callable[[Record], IO[bytes]]
    left_out: Counter[str]
    sequential: bool = False
    walked: bool = False
    label: str | None = None

    @cached_property
    def has_parts(self) -> bool:
        """True if the source itself divides its images into a training and a held-out part."""
        return any(record.held_out for record in self.records)

    def in_order(self, records: Sequence[Record]) -> Sequence[Record]:
        """Return records in the order in which they are read fastest."""
        return sorted(records, key=lambda record: record.place) if self.sequential else records

    def digest(self, record: Record) -> bytes:
        """Return the SHA-256 of a record's content; zeros if it cannot be read."""
        try:
            with self.open(record) as file:
                return bytes.fromhex(sha256_of(file))
        except OSError:
            return bytes(32)  # decoding will report it

    def title(self, record: Record) -> str:
        """Return a record's name for messages."""
        return str(self.root / record.key)


def make_source(name: str, root: Path, found: Found) -> Source:
    """Return a source with numbers for the images of ``found`` and for their classes.

    Classes are in natural order of their names, or in the order of ``found.names``. Without any labels all
    images are of one class.

    Raises:
        InputError: two images have the same key, only some have a label, labels are of different types, an
            integer has no name, a class has a name that cannot be printed or differs from another only in
            case or spaces, or a class has too few images for two parts.
    """
    items, names = found.items, found.names
    _check_keys(items, root)
    _check_types(items, root)
    named = names is not None and any(isinstance(item.label, int) for item in items)
    texts = [_class_name(item, names if named else None, root) for item in items]
    positions = {text: number for number, text in enumerate(names or ())}
    classes = sorted(set(texts), key=positions.__getitem__ if named else natural_order)
    _check_class_names(classes, name)
    numbers = {text: number for number, text in enumerate(classes)}
    ordered = sorted(zip(texts, items), key=lambda pair: numbers[pair[0]])
    records = [Record(number, numbers[text], *item[1:]) for number, (text, item) in enumerate(ordered)]
    rest = (found.kind, found.open, found.left_out, found.sequential, found.walked)
    source = Source(name, root, classes, records, *rest)
    _check_class_sizes(source)
    return source


def checked_label(value: object, title: object) -> str | int | None:
    """Return a label that a file gives for the image ``title``; an empty text and null are no label.

    Raises:
        InputError: the label is neither a text nor an integer.
    """
    if isinstance(value, str):
        return value.strip() or None
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    shown = printable(f"{title} has the label {str(value)[:80]!r}")
    raise InputError(f"{shown}. Give a text or an integer")


def _check_keys(items: Sequence[Item], root: Path) -> None:
    if len(keys := {item.key for item in items}) < len(items):
        count = Counter(item.key for item in items)
        key = next(key for key in keys if count[key] > 1)
        raise InputError(f"{printable(str(root / key))} occurs {count[key]} times. Give every image one name")


def _check_types(items: Sequence[Item], root: Path) -> None:
    for item in items:
        if type(item.label) is not type((first := items[0]).label):
            titles = (f"{printable(str(root / each.key))} has {_form(each)}" for each in (first, item))
            raise InputError(f"{' and '.join(titles)}. Give all images labels of one type")


def _form(item: Item) -> str:
    return "no label" if item.label is None else f"the label {item.label!r}"


def _class_name(item: Item, names: Sequence[str] | None, root: Path) -> str:
    """Return the name of an item's class."""
    if names is None or not isinstance(item.label, int):
        return UNLABELED if item.label is None else str(item.label)
    if not 0 <= item.label < len(names):
        wrong = f"{printable(str(root / item.key))} has the label {item.label}"
        raise InputError(f"{wrong}, but there are {len(names)} class names. Correct the labels")
    return names[item.label]


def _check_class_names(classes: Sequence[str], source: str) -> None:
    """Raise an :class:`InputError` for names that cannot be printed or differ only in case or spaces."""
    seen: dict[str, str] = {}
    for name in classes:
        if not is_plain(name):
            raise InputError(f"{source}: the class name {name!r} cannot be printed. Rename the class")
        other = seen.setdefault(unicodedata.normalize("NFC", name).strip().casefold(), name)
        if other != name:
            problem = f"the classes {other!r} and {name!r} differ only in case or spaces"
            raise InputError(f"{source}: {problem}. Rename or merge them")


def _check_class_sizes(source: Source) -> None:
    """Raise an :class:`InputError` unless every class can have an image in both parts."""
    if not source.records:
        left_out = f" ({describe(source.left_out)})" if source.left_out else ""
        raise InputError(f"{source.name} has no images{left_out}. Give PNG, JPEG or WebP files")
    count = Counter((record.label, record.held_out) for record in source.records)
    for label, name in enumerate(source.classes):
        train, held_out = count[label, False], count[label, True]
        if source.has_parts and not (train and held_out):
            missing = "training" if held_out else "held-out"
            wrong = f"the class {name!r} has no {missing} images"
            raise InputError(f"{source.name}: {wrong}. Add some, or give the training images alone")
        if not source.has_parts and train < 2:
            raise InputError(f"{source.name}: the class {name!r} has only one image. Add some or remove it")
