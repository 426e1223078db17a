"""Images of a source as compact lists: some 80 bytes per image. Imports neither numpy nor Pillow."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple


class Item(NamedTuple):
    """One image that a reader has found.

    Attributes:
        label: its class; ``None`` without labels.
        key: its name within the source, which is unique.
        place: integers by which its reader finds it, equally many for all images of a reader.
        held_out: whether the source itself holds it out from training.
    """

    label: str | int | None
    key: str
    place: tuple[int, ...] = ()
    held_out: bool = False


class Record(NamedTuple):
    """One image of a source.

    Attributes:
        number: position in the source.
        label: number of its class.

    The others are those of :class:`Item`.
    """

    number: int
    label: int
    key: str
    place: tuple[int, ...] = ()
    held_out: bool = False


class Items:
    """Images in the order in which their reader finds them.

    Attributes:
        labels: the different labels, in the order of their first image.
        codes: position in ``labels`` of the label of each image.
        held_out: 1 for images that the source holds out, else 0.
    """

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self.labels: list[str | int | None] = []
        self.codes = array("i")
        self.held_out = bytearray()
        self._code_of: dict[str | int | None, int] = {}
        self._keys = bytearray()
        self._ends = array("Q")
        self._places = array("q")
        self.extend(items)

    def append(self, item: Item) -> None:
        if (code := self._code_of.setdefault(item.label, len(self.labels))) == len(self.labels):
            self.labels.append(item.label)
        self.codes.append(code)
        self.held_out.append(item.held_out)
        self._keys += item.key.encode("utf-8", "surrogatepass")  # names of files may be no UTF-8
        self._ends.append(len(self._keys))
        self._places.extend(item.place)

    def extend(self, items: Iterable[Item]) -> None:
        for item in items:
            self.append(item)

    def __len__(self) -> int:
        return len(self.codes)

    def __iter__(self) -> Iterator[Item]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, position: int) -> Item:
        if not 0 <= position < len(self):
            raise IndexError(position)
        start = self._ends[position - 1] if position else 0
        key = self._keys[start : self._ends[position]].decode("utf-8", "surrogatepass")
        length = len(self._places) // len(self)
        place = tuple(self._places[position * length : (position + 1) * length])
        return Item(self.labels[self.codes[position]], key, place, bool(self.held_out[position]))


class Records:
    """Images sorted by class, and within a class in the reader's order.

    Args:
        items: all images that the reader has found.
        numbers: class number of each of ``items.labels``; images of the others are left out.

    Attributes:
        labels: class number of each image.
        positions: position of each image in ``items``.
    """

    def __init__(self, items: Items, numbers: Sequence[int | None]) -> None:
        classes: dict[int, array[int]] = {number: array("L") for number in numbers if number is not None}
        for position, code in enumerate(items.codes):
            if (number := numbers[code]) is not None:
                classes[number].append(position)
        self.labels, self.positions = array("i"), array("L")
        for number in sorted(classes):
            self.positions.extend(classes[number])
            self.labels.extend(array("i", [number]) * len(classes[number]))
        self._items = items

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, number: int) -> Record:
        item = self._items[self.positions[number]]
        return Record(number, self.labels[number], *item[1:])

    def __iter__(self) -> Iterator[Record]:
        return map(self.__getitem__, range(len(self)))

    @property
    def held_out(self) -> bytes:
        """1 for each image that the source holds out, else 0."""
        return bytes(map(self._items.held_out.__getitem__, self.positions))
