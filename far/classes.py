"""Class labels and class names: the class that a label means, comparison of two lists of names, ImageNet."""

import difflib
import functools
import re
from collections.abc import Sequence
from pathlib import Path

from far.config import whole_number
from far.errors import InputError

# Prefix of a class number whose plain digits could mean another class's name.
_NUMBER = "number="
_SHOWN = 20


def class_number(classes: Sequence[str], label: object) -> int:
    """Return the number of the class that a label means.

    Integers are numbers. A text is a class's name, or a number in digits, if these do not mean different
    classes. ``"number=3"`` is always class 3.

    Raises:
        InputError: the class does not exist, or the text could mean several.
    """
    if not isinstance(label, str):
        return _within(classes, whole_number("label", label))
    match = re.fullmatch(rf"({_NUMBER})?(-?(?:0|[1-9][0-9]{{0,17}}))", label)
    if match is None:
        if label in classes:
            return _named(classes, label)
        names = shown_names(classes) if len(classes) <= _SHOWN else ", ".join(_nearest(classes, label[:80]))
        choices = f"a number 0 to {len(classes) - 1} or one of: {names}"
        raise InputError(f"class {label[:80]!r} does not exist. Give {choices}")
    number = int(match[2])
    if match[1] is None and label in classes:
        named = _named(classes, label)
        if named == number or not 0 <= number < len(classes):
            return named
        meanings = f"the name of class {named} and the number of {classes[number]!r}"
        raise InputError(f"label {label!r} is {meanings}. Give {_NUMBER}{named} or {_NUMBER}{number}")
    name = classes[_within(classes, number)]
    if match[1] is None and re.fullmatch("[0-9]{1,18}", name) and int(name) != number:
        problem = f"is not the name of a class, and class {number} is named {name!r}"
        raise InputError(f"label {label!r} {problem}. Give that name, or {_NUMBER}{number}")
    return number


def label_text(classes: Sequence[str], number: int) -> str:
    """Return a text that means this class: the digits of its number, unless they could mean another class."""
    try:
        class_number(classes, str(number))
        return str(number)
    except InputError:
        return f"{_NUMBER}{number}"


def check_same_classes(
    first: Sequence[str], first_place: str, second: Sequence[str], second_place: str, remedy: str
) -> None:
    """Raise an :class:`InputError` that names the first difference unless names are equal and in order.

    WordNet IDs of ImageNet's classes equal their words. The message names the places that the names come
    from, and ends with the ``remedy``, a sentence without its full stop.
    """
    first_words, second_words = _in_words(first), _in_words(second)
    if first_words == second_words:
        return
    if len(first) == len(second):
        number = next(index for index, (a, b) in enumerate(zip(first_words, second_words)) if a != b)
        named = f"{first[number]!r} in {first_place} and {second[number]!r} in {second_place}"
        difference = f"class {number} is {named}"
    else:
        first_listed, second_listed = (
            f"{len(names)} classes ({shown_names(names)})" for names in (first, second)
        )
        difference = f"{first_place} has {first_listed} and {second_place} {second_listed}"
    raise InputError(f"{difference}. {remedy}")


def unmatched_classes(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Return the class names that only one side has; none if a side has no classes or only numbers."""
    if any(list(names) == [str(number) for number in range(len(names))] for names in (first, second)):
        return []
    return sorted({*_in_words(first)} ^ {*_in_words(second)})


def _named(classes: Sequence[str], name: str) -> int:
    """Return the number of the one class of a name, of which there is at least one."""
    numbers = [number for number, other in enumerate(classes) if other == name]
    if len(numbers) > 1:
        choices = " or ".join(f"{_NUMBER}{number}" for number in numbers[:_SHOWN])
        raise InputError(f"label {name!r} is the name of {len(numbers)} classes. Give {choices}")
    return numbers[0]


def _within(classes: Sequence[str], number: int) -> int:
    if not 0 <= number < len(classes):
        raise InputError(
            f"label {number} is out of range. Give 0 to {len(classes) - 1} ({shown_names(classes)})"
        )
    return number


def _nearest(classes: Sequence[str], label: str) -> list[str]:
    """Return up to five names that resemble or contain a label; the first five if there are none."""
    names = {name.lower(): name for name in classes}
    alike = [names[name] for name in difflib.get_close_matches(label.lower(), names, n=5)]
    alike += [name for name in classes if label.lower() in name.lower()]
    return [*dict.fromkeys(alike or classes)][:5]


def shown_names(classes: Sequence[str]) -> str:
    """Return the first 20 names for a message."""
    return ", ".join(classes[:_SHOWN]) + (" …" if len(classes) > _SHOWN else "")


@functools.cache
def imagenet_classes() -> dict[str, str]:
    """Return the names of ImageNet's 1,000 classes by WordNet ID, in the order of their numbers.

    Two of the names, crane and maillot, occur twice.
    """
    lines = (Path(__file__).parent / "imagenet-classes.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines if not line.startswith("#"))


def matched_classes(trained: Sequence[str], classes: Sequence[str]) -> list[int | None]:
    """Return the number of the class of the same name in ``trained`` for each of ``classes``; None if new.

    WordNet IDs, as ImageNet's folders are named, and their words are the same names, if ``trained`` are such
    IDs or all of ImageNet's words.

    Raises:
        InputError: one of ``classes`` is the name of several of ``trained``, or the other way round.
    """
    if list(classes) == list(trained):  # names may occur twice
        return list(range(len(classes)))
    imagenet, words = imagenet_classes(), _in_words(trained)
    numbers = {name: number for names in (words, trained) for number, name in enumerate(names)}
    if words == list(imagenet.values()):
        numbers |= {identifier: number for number, identifier in enumerate(imagenet)}
    for name in classes:
        if (count := words.count(name)) > 1:
            choices = " or ".join(key for key, word in imagenet.items() if word == name and key in numbers)
            remedy = f"Rename it {choices}" if choices else "Rename it"
            raise InputError(f"class {name!r} is the name of {count} classes of the trained model. {remedy}")
    found: dict[int, str] = {}
    for name in classes:
        if name in numbers and (other := found.setdefault(numbers[name], name)) != name:
            wrong = f"classes {other!r} and {name!r} are one class of the trained model"
            raise InputError(f"{wrong}. Merge them or rename one")
    return [numbers.get(name) for name in classes]


def _in_words(classes: Sequence[str]) -> list[str]:
    """Return names with WordNet IDs of ImageNet's classes replaced by their words."""
    words = imagenet_classes()
    return [words.get(name, name) if isinstance(name, str) else name for name in classes]
