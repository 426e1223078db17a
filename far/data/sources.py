"""Sources of images: what a reader finds, before anything is decoded. Imports neither numpy nor Pillow.

Each reader is a module: ``image_folders``, ``tars``, ``tables`` and ``arrow``. ``detection`` chooses it.
"""

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, NamedTuple

from far.data.listing import describe, natural_order
from far.data.records import Items, Record, Records
from far.errors import InputError
from far.files import is_plain, printable, sha256_of

# The class of images without labels.
UNLABELED = "images"
# Names of the parts of data sets. Of those to hold out, the first one that exists is used.
TRAIN = ("train", "training")
HELD_OUT = ("val", "valid", "validation", "dev", "test", "testing", "eval")
# The library datasets gives this label to images without one, as in test parts.
_NO_LABEL = (-1, "-1")


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
        sequential: reading in the reader's order is much faster than in any other.
        walked: the root was searched for files: keys begin with the labels, and new files would be found.
        hints: sentences about what may be a mistake.
    """

    kind: str
    items: Items
    open: Callable[[Record], IO[bytes]]
    left_out: Counter[str]
    names: Sequence[str] | None = None
    sequential: bool = False
    walked: bool = False
    hints: Sequence[str] = ()


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
    records: Records
    kind: str
    open: Callable[[Record], IO[bytes]]
    left_out: Counter[str]
    sequential: bool = False
    walked: bool = False
    hints: Sequence[str] = ()
    label: str | None = None

    @cached_property
    def has_parts(self) -> bool:
        """True if the source itself divides its images into a training and a held-out part."""
        return any(self.records.held_out)

    def in_order(self, numbers: Iterable[int]) -> Iterable[int]:
        """Return numbers of records in the order in which they are read fastest."""
        return sorted(numbers, key=self.records.positions.__getitem__) if self.sequential else numbers

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


def held_out_name(names: Iterable[str | None]) -> str | None:
    """Return the name of the part to hold out, if all names are those of parts and one is for training."""
    found = {*names}
    if not found <= {*TRAIN, *HELD_OUT} or not found & {*TRAIN}:
        return None
    return next((name for name in HELD_OUT if name in found), None)


def make_source(name: str, root: Path, found: Found) -> Source:
    """Return a source with numbers for the images of ``found`` and for their classes.

    Classes are in natural order of their names, or in the order of ``found.names``. Without any labels all
    images are of one class. Images with the label −1 are left out, unless it is the name of a folder.

    Raises:
        InputError: only some images have a label, labels are of different types, an integer has no name, a
            class has a name that cannot be printed or differs from another only in case or spaces, or a class
            has too few images for two parts.
    """
    items, names, left_out = found.items, found.names, found.left_out.copy()
    labels = _given_labels(found)
    _check_types(items, labels, root)
    named = names is not None and any(isinstance(label, int) for label in labels)
    texts = {label: _class_name(items, label, names if named else None, root) for label in labels}
    positions = {text: number for number, text in enumerate(names or ())}
    classes = sorted({*texts.values()}, key=positions.__getitem__ if named else natural_order)
    _check_class_names(classes, name)
    numbers = {text: number for number, text in enumerate(classes)}
    records = Records(items, [numbers[texts[each]] if each in texts else None for each in items.labels])
    if len(records) < len(items):
        left_out["labeled -1 (no label)"] += len(items) - len(records)
    rest = (found.kind, found.open, left_out, found.sequential, found.walked, found.hints)
    source = Source(name, root, classes, records, *rest)
    _check_class_sizes(source)
    return source


def _given_labels(found: Found) -> list[str | int | None]:
    """Return the different labels without −1, which means no label, unless −1 is a class."""
    labels = found.items.labels
    rest = [label for label in labels if label not in _NO_LABEL]
    signs = found.names is None and {*map(str, rest)} == {"1"}
    return labels if found.walked or signs else rest


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


def _check_types(items: Items, labels: Sequence[str | int | None], root: Path) -> None:
    for label in labels:
        if type(label) is not type(labels[0]):
            titles = (f"{_title(items, each, root)} has {_form(each)}" for each in (labels[0], label))
            raise InputError(f"{' and '.join(titles)}. Give all images labels of one type")


def _title(items: Items, label: str | int | None, root: Path) -> str:
    """Return the name of the first image with a label."""
    position = items.codes.index(items.labels.index(label))
    return printable(str(root / items[position].key))


def _form(label: str | int | None) -> str:
    return "no label" if label is None else f"the label {label!r}"


def _class_name(items: Items, label: str | int | None, names: Sequence[str] | None, root: Path) -> str:
    """Return the name of the class with a label."""
    if names is None or not isinstance(label, int):
        return UNLABELED if label is None else str(label)
    if not 0 <= label < len(names):
        wrong = f"{_title(items, label, root)} has the label {label}"
        raise InputError(f"{wrong}, but there are {len(names)} class names. Correct the labels")
    return names[label]


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
    if not len(source.records):
        left_out = f" ({describe(source.left_out)})" if source.left_out else ""
        raise InputError(f"{source.name} has no images{left_out}. Give PNG, JPEG or WebP files")
    count = Counter(zip(source.records.labels, source.records.held_out))
    for label, name in enumerate(source.classes):
        train, held_out = count[label, 0], count[label, 1]
        if source.has_parts and not (train and held_out):
            missing = "training" if held_out else "held-out"
            wrong = f"the class {name!r} has no {missing} images"
            raise InputError(f"{source.name}: {wrong}. Add some, or give the training images alone")
        if not source.has_parts and train < 2:
            raise InputError(f"{source.name}: the class {name!r} has only one image. Add some or remove it")
