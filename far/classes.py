"""Class labels and class names: which class a label means, and whether two lists of names are the same."""

import re
from collections.abc import Sequence

from far.config import whole_number
from far.errors import InputError

# How the number of a class is written where its plain digits could be taken for another class's name.
_NUMBER = "number="
_SHOWN = 20


def class_number(classes: Sequence[str], label: object) -> int:
    """Return the number of the class that a label means.

    Integers are numbers. A text is the name of a class, or a number in digits, if these do not mean different classes;
    ``"number=3"`` is always class 3.

    Raises:
        InputError: no such class, a name that several classes have, or digits that a class of another number is named.
    """
    if not isinstance(label, str):
        return _within(classes, whole_number("label", label))
    match = re.fullmatch(rf"({_NUMBER})?(-?(?:0|[1-9][0-9]{{0,17}}))", label)
    if match is None:
        if label in classes:
            return _named(classes, label)
        raise InputError(
            f"unknown class {label[:80]!r}; give a number 0 to {len(classes) - 1} or one of: {_shown(classes)}"
        )
    number = int(match[2])
    if match[1] is None and label in classes:
        named = _named(classes, label)
        if named == number or not 0 <= number < len(classes):
            return named
        raise InputError(
            f"label {label!r} is the name of class {named} and the number of {classes[number]!r}; "
            f"give {_NUMBER}{named} or {_NUMBER}{number} (in Python, the integer)"
        )
    name = classes[_within(classes, number)]
    if match[1] is None and re.fullmatch("[0-9]{1,18}", name) and int(name) != number:
        raise InputError(
            f"label {label!r} is not the name of a class, and class {number} is named {name!r}; "
            f"give that name, or {_NUMBER}{number} (in Python, the integer)"
        )
    return number


def label_text(classes: Sequence[str], number: int) -> str:
    """Return the text that :func:`class_number` turns into this number: its digits, unless they could mean another class."""
    try:
        class_number(classes, str(number))
        return str(number)
    except InputError:
        return f"{_NUMBER}{number}"


def check_same_classes(
    ours: Sequence[str], source: str, theirs: Sequence[str], other: str, remedy: str
) -> None:
    """Raise an :class:`InputError` that names the first difference, both sides and the remedy, unless the names are equal.

    Args:
        ours: class names of ``source``, in order.
        source: what they come from, for the message.
        theirs: class names of ``other``, in order.
        other: what they come from, for the message.
        remedy: sentence without its full stop that ends the message.
    """
    if list(ours) == list(theirs):
        return
    if len(ours) != len(theirs):
        raise InputError(
            f"{source} has {len(ours)} classes ({_shown(ours)}) and {other} {len(theirs)} ({_shown(theirs)}). {remedy}"
        )
    number = next(index for index, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1])
    raise InputError(
        f"class {number} is {ours[number]!r} in {source} and {theirs[number]!r} in {other}. {remedy}"
    )


def unmatched_classes(ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """Return the class names that only one side has; none if a side has no classes, or only numbers for names."""
    if any(list(names) == [str(number) for number in range(len(names))] for names in (ours, theirs)):
        return []
    return sorted({*ours} ^ {*theirs})


def _named(classes: Sequence[str], name: str) -> int:
    """Return the number of the one class of a name, of which there is at least one."""
    numbers = [number for number, other in enumerate(classes) if other == name]
    if len(numbers) > 1:
        choices = " or ".join(f"{_NUMBER}{number}" for number in numbers[:_SHOWN])
        raise InputError(
            f"label {name!r} is the name of {len(numbers)} classes; give {choices} (in Python, the integer)"
        )
    return numbers[0]


def _within(classes: Sequence[str], number: int) -> int:
    if not 0 <= number < len(classes):
        raise InputError(f"label {number} is out of range; give 0 to {len(classes) - 1} ({_shown(classes)})")
    return number


def _shown(classes: Sequence[str]) -> str:
    return ", ".join(classes[:_SHOWN]) + (" …" if len(classes) > _SHOWN else "")
