"""Sampling options of all commands that draw images, derived from the fields of ``SamplingConfig``."""

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from far.config import described
from far.sampling_config import SamplingConfig

# An upper limit per command: a larger count exhausts memory before the first image is drawn.
MOST_IMAGES = 10_000_000


def add_sampling_arguments(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """Add one option per field except those in ``without``. Defaults are None: each model has its own."""
    hints, texts = typing.get_type_hints(SamplingConfig), described(SamplingConfig)[1]
    group = parser.add_argument_group("sampling options", "The model's own values are the defaults.")
    for field in dataclasses.fields(SamplingConfig):
        if field.name not in without:
            text = texts[field.name].replace("`", "").rstrip(".").replace("%", "%%")
            option = f"--{field.name.replace('_', '-')}"
            group.add_argument(option, help=text, **_form(field, hints[field.name]))


def _form(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """Return argparse's arguments for the values that a field takes."""
    kinds = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": list(kinds)}
    number = float if float in kinds else int
    if choices := field.metadata.get("choices"):
        return {"type": number, "choices": list(choices)}
    if names := field.metadata.get("names"):
        return {"type": number, "nargs": len(names), "metavar": names}
    several = any(typing.get_origin(kind) is tuple for kind in kinds)
    return {"type": number, "nargs": "+" if several else None, "metavar": "N" if number is int else "X"}


def sampling_options(arguments: argparse.Namespace, without: Sequence[str] = ()) -> dict[str, Any]:
    """Return the given values, except those in ``without``, by their names in :class:`SamplingConfig`."""
    names = [field.name for field in dataclasses.fields(SamplingConfig) if field.name not in without]
    values = {name: getattr(arguments, name) for name in names}
    return {name: _value(value) for name, value in values.items() if value is not None}


def _value(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return value[0] if len(value) == 1 else tuple(value)
