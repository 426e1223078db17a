"""All keys of a recipe with type, default and meaning, from the dataclasses. Needs no torch."""

import dataclasses
import json
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from far.config import described, kinds_of
from far.recipe import Recipe
from far.training.config import DistillationConfig


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a recipe: dotted name, type in words, and default in YAML or None if it is required."""

    name: str
    type: str
    default: str | None
    meaning: str


@dataclasses.dataclass(frozen=True)
class Section:
    """Keys of one dataclass and the first part of its docstring.

    ``command`` is "a recipe" or a command. The dotted name is empty at the top level, and ``kind`` if there
    is only one.
    """

    command: str
    name: str
    kind: str
    summary: str
    keys: list[Key]


def sections() -> list[Section]:
    """Return the sections of a recipe, then those of ``far distill``."""
    return [*_sections("a recipe", Recipe("", "")), *_sections("far distill", DistillationConfig())]


def _sections(command: str, default: Any, prefix: str = "") -> Iterator[Section]:
    kind = type(default)
    summary, meanings = described(kind)
    hints = typing.get_type_hints(kind)
    keys: list[Key] = []
    inner: list[tuple[Any, str]] = []
    for field in dataclasses.fields(kind):
        hint, value = hints[field.name], getattr(default, field.name)
        options = [*kinds_of(hint).values()] or ([hint] if dataclasses.is_dataclass(hint) else [])
        if options:
            defaults = [value if type(value) is option else option() for option in options]
            inner += [(value, f"{prefix}{field.name}.") for value in defaults]
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        shown = None if required else value if isinstance(value, str) else json.dumps(value)
        keys.append(Key(f"{prefix}{field.name}", _type(hint), shown, meanings.get(field.name, "")))
    yield Section(command, prefix.rstrip("."), getattr(kind, "kind", ""), summary, keys)
    for value, name in inner:
        yield from _sections(command, value, name)


def _type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(arguments)
    if origin is tuple:
        of_words = typing.get_origin(arguments[0]) is typing.Literal
        return f"list of {_type(arguments[0])}{'' if of_words else 's'}"
    if arguments:
        return " or ".join(_type(option) for option in arguments if option is not type(None))
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true, false"}[hint.__name__]


def _title(section: Section) -> str:
    kind = f" of kind {section.kind}" if section.kind else ""
    return f"{section.name}{kind}" if section.name else f"Keys of {section.command}"


def as_text(width: int) -> str:
    """Return all keys for a terminal of ``width`` columns."""
    lines: list[str] = []
    for section in sections():
        lines += [_title(section), *textwrap.wrap(section.summary, width), ""]
        for key in section.keys:
            default = "required" if key.default is None else f"default {key.default}"
            meaning = f"{key.type}; {default}. {key.meaning[:1].upper()}{key.meaning[1:]}"
            lines += [f"  {key.name}", textwrap.indent(textwrap.fill(meaning, width - 6), " " * 6)]
        lines += [""] if section.keys else []
    return "\n".join(lines).replace("`", "")


def as_markdown() -> str:
    """Return all keys as headings and tables."""
    lines: list[str] = []
    for section in sections():
        title = f"`{section.name}`" + (f", kind {section.kind}" if section.kind else "")
        lines += [f"### {title}" if section.name else f"## {_title(section)}", "", section.summary, ""]
        if section.keys:
            lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key in section.keys:
            default = "required" if key.default is None else f"`{key.default}`"
            lines.append(f"| `{key.name}` | {key.type} | {default} | {key.meaning} |")
        lines += [""] if section.keys else []
    return "\n".join(lines)
