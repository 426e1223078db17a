"""Packages whose names are imported on first use, so that importing the package needs no torch."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package that offers names of other modules.

    Args:
        package: the package's ``__name__``.
        homes: the module of each name. It is imported when the name is first used.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    def names() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *homes})

    return get, names
