"""Strict conversion between dataclasses and dictionaries: unknown keys and wrong types are errors.

The dataclasses are defined beside what they configure.
"""

import contextlib
import dataclasses
import difflib
import inspect
import math
import operator
import re
import reprlib
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from far.errors import InputError, prefix_errors

T = TypeVar("T")


def from_dict(cls: type[T], values: Mapping[str, Any], source: str) -> T:
    """Build the dataclass ``cls``, and nested ones, from ``values``; ``source`` names the file in errors.

    Raises:
        InputError: a key is unknown (the message names the nearest one) or missing, or a value has the wrong
            type.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{source}: expected keys and values, got {type(values).__name__} {_shown(values)}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near, keys = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)[0], ", ".join(fields)
            raise InputError(f"{source}: unknown key {key!r}. Did you mean {near!r}? (keys: {keys})")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise InputError(f"{source}: the key {name!r} is missing. Add it")
    converted = {key: _convert(hints[key], value, f"{source}: {key}") for key, value in values.items()}
    with prefix_errors(f"{source}: "):  # errors of __post_init__
        return cls(**converted)


def _convert(hint: Any, value: Any, source: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    is_bool = isinstance(value, bool)
    if hint is Any:
        return value
    if isinstance(value, Mapping) and (kinds := kinds_of(hint)):
        return _by_kind(kinds, value, source, extensible=dataclasses.is_dataclass(hint))
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, source)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _convert(option, value, source)
            except InputError:
                continue
    elif origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], item, source) for item in value)
    elif origin is dict and isinstance(value, Mapping):
        pairs = value.items()
        return {_convert(arguments[0], k, source): _convert(arguments[1], v, source) for k, v in pairs}
    elif origin is typing.Literal and value in arguments:
        return value
    elif hint is float and isinstance(value, int | float) and not is_bool:
        with contextlib.suppress(OverflowError):
            if math.isfinite(number := float(value)):
                return number
    # In Python 3.10, a generic hint such as list[int] is an instance of type.
    elif origin is None and isinstance(hint, type) and isinstance(value, hint) and is_bool == (hint is bool):
        return value
    if origin is typing.Literal:
        expected = " or ".join(map(repr, arguments))
    else:
        expected = "a finite number" if hint is float else getattr(hint, "__name__", str(hint))
    exponents = ". In YAML, write 1.0e-4, not 1e-4" if hint is float and isinstance(value, str) else ""
    raise InputError(f"{source} is {_shown(value)}, expected {expected}{exponents}")


def _shown(value: Any) -> str:
    """Return ``repr(value)``, with a few items of collections only: YAML aliases can expand to any length."""
    return reprlib.repr(value)[:200] if isinstance(value, list | tuple | dict | set) else repr(value)


def check_count(name: str, value: int, most: int = 2**16) -> None:
    """Raise an :class:`InputError` unless a size is within 1 … ``most``.

    Loaded files may come from anyone, and one absurd size could use up all memory or time.
    """
    if value < 1:
        raise InputError(f"{name} {value} must be positive")
    if value > most:
        raise InputError(f"{name} {value} is too large. Give at most {most}")


def whole_number(name: str, value: Any) -> int:
    """Return a Python, numpy or zero-dimensional tensor integer as an ``int``.

    Raises:
        InputError: the value is anything else, such as a float or a bool.
    """
    # operator.index also accepts tensors of one element and of bools.
    is_bool = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
    if not is_bool and not getattr(value, "ndim", 0):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise InputError(f"{name} {_shown(value)[:80]} is not a whole number")


def plain_value(value: Any) -> Any:
    """Return a number or sequence of numpy or torch as Python's own; other values as they are."""
    return value.tolist() if getattr(value, "ndim", None) in (0, 1) and hasattr(value, "tolist") else value


def counted_seeds(seed: Any, count: int = 1) -> list[int]:
    """Return the given seeds; or, from a single seed, ``count`` of them that count up.

    Raises:
        InputError: a seed is not a whole number within 0 … 2⁶³ − 1.
    """
    if isinstance(seed, Iterable) and not isinstance(seed, str | bytes) and getattr(seed, "ndim", None) != 0:
        seeds = [whole_number("seed", one) for one in seed]
    else:
        seeds = [whole_number("seed", seed) + index for index in range(count)]
    for limit in (min(seeds), max(seeds)) if seeds else ():
        check_seed("seed", limit)
    return seeds


def listed(name: str, values: Any) -> list[Any]:
    """Return the items of a list, tuple, range, array or tensor.

    Raises:
        InputError: the value is not a collection, or is a string.
    """
    if not isinstance(values, str | bytes):
        with contextlib.suppress(TypeError):
            return list(values)
    text = _shown(values)[:80]
    raise InputError(f"{name} {text} is not a list. Give a list, such as [{text}]")


def check_seed(name: str, seed: int) -> None:
    """Raise an :class:`InputError` that starts with ``name`` unless ``seed`` is within 0 … 2⁶³ − 1."""
    if not 0 <= seed < 2**63:
        raise InputError(f"{name} {seed} is out of range. Give a whole number within 0 … 2⁶³ − 1")


def check_types(config: Any) -> None:
    """Raise an :class:`InputError` that names the first value of another type than its field."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        _convert(hints[field.name], getattr(config, field.name), f"{type(config).__name__}: {field.name}")


def kinds_of(hint: Any) -> dict[str, Any]:
    """Return the dataclasses that a field may hold, by their ``kind``; the default comes first.

    They are the dataclasses in a union, or those registered in ``kinds`` of a base class.
    """
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if dataclasses.is_dataclass(option)]
        return {getattr(option, "kind", ""): option for option in options}
    return dict(vars(hint).get("kinds", {})) if dataclasses.is_dataclass(hint) else {}


def _by_kind(kinds: dict[str, Any], values: Mapping[str, Any], source: str, *, extensible: bool) -> Any:
    """Build the dataclass that ``kind`` in ``values`` selects, by default the first one.

    ``extensible`` kinds may be registered by other modules, as errors explain.
    """
    if len(kinds) == 1:
        return from_dict(next(iter(kinds.values())), values, source)
    kind = values.get("kind", next(iter(kinds)))
    if kind not in list(kinds):  # a list, because the value may not be hashable
        hint = ". If it is your own, import the module that registers it first" if extensible else ""
        raise InputError(f"{source}: kind is {_shown(kind)}, expected {' or '.join(map(repr, kinds))}{hint}")
    return from_dict(kinds[kind], values, source)


def to_dict(config: Any) -> dict[str, Any]:
    """Return the dataclass as nested dictionaries and lists, ready for JSON."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def described(cls: type) -> tuple[str, dict[str, str]]:
    """Return the summary of a dataclass's docstring, and the text of each field, inherited ones included."""
    summary = ""
    entries: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = re.sub(r":\w+:`([^`]+)`", r"`\1`", inspect.cleandoc(base.__doc__ or "")).replace("``", "`")
        summary, _, attributes = text.partition("Attributes:\n")
        entries |= dict(re.findall(r"^(\w+): (.*(?:\n .*)*)", textwrap.dedent(attributes), re.MULTILINE))
    return " ".join(summary.split()), {name: " ".join(entry.split()) for name, entry in entries.items()}
