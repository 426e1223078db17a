"""Find the image files and class folders of a folder, and count everything else by reason."""

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from far.errors import InputError
from far.files import printable

# Names of image files. far.data.images decodes PNG, JPEG and WebP only, whatever the name.
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
# Files of systems and file managers. Names that begin with a dot, such as "._a.jpg", are hidden too.
_SYSTEM_NAMES = frozenset((
    "__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin",
    "recycler", "system volume information", "lost+found", "network trash folder", "temporary items",
    "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
))  # fmt: skip
# Number of reasons that one line shows.
_MOST_REASONS = 12


def is_hidden(name: str) -> bool:
    """Return whether files and folders of this name are always skipped."""
    return name.startswith(".") or name.casefold() in _SYSTEM_NAMES


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Return a sorting key that compares numbers within names by value: 2 before 11, n02 before n10."""
    parts: list[str | int] = list(re.split("([0-9]+)", name))
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def class_folders(folder: Path, left_out: Counter[str]) -> list[Path]:
    """Return the subfolders of ``folder`` in natural order, without hidden ones; a subfolder may be a link.

    ``left_out`` counts the hidden files, but no files directly in ``folder``.

    Raises:
        InputError: ``folder`` cannot be read, or a subfolder is a dead link or a link to a parent folder.
    """
    found = []
    for path in _entries(folder):
        if is_hidden(path.name):
            _count_hidden(path, left_out)
        elif os.path.isdir(path):
            if folder.resolve().is_relative_to(path.resolve()):
                raise InputError(f"The class {path} is a link to a folder above it. Remove the link")
            found.append(path)
        elif path.suffix.lower() not in SUFFIXES and not os.path.exists(path):
            target = os.readlink(path)
            raise InputError(f"The class {path} is a link to the missing {target}. Restore or remove it")
    return sorted(found, key=lambda path: natural_order(path.name))


def images_in(folder: Path, left_out: Counter[str]) -> list[Path]:
    """Return the image files directly in ``folder``, sorted; ``left_out`` counts others unless hidden.

    Raises:
        InputError: ``folder`` cannot be read.
    """
    found = []
    for path in _entries(folder):
        if is_hidden(path.name) or os.path.isdir(path):
            continue
        if reason := _reason(path):
            left_out[reason] += 1
        else:
            found.append(path)
    return sorted(found)


def images_within(folder: Path, left_out: Counter[str]) -> list[Path]:
    """Return the image files in ``folder`` and its subfolders, sorted; ``left_out`` counts all others.

    ``folder`` may be a link. Links to folders within it are not followed, because they may lead back.
    """
    try:
        found = images_in(folder, left_out)
        subfolders = [path for path in _entries(folder) if is_hidden(path.name) or os.path.isdir(path)]
    except InputError:
        left_out["folders that cannot be read"] += 1
        return []
    for path in subfolders:
        if is_hidden(path.name):
            _count_hidden(path, left_out)
        elif path.is_symlink():
            left_out["links to folders"] += 1
        else:
            found += images_within(path, left_out)
    return sorted(found)


def describe(left_out: Mapping[str, int]) -> str:
    """Return counts by reason in one line, largest first, rare ones combined: ``"20 .tif, 12 hidden"``."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    rare = sum(count for _, count in ordered[_MOST_REASONS:])
    shown = [f"{count} {printable(reason)}" for reason, count in ordered[:_MOST_REASONS]]
    return ", ".join(shown + [f"{rare} others"] * (rare > 0))


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}). Fix or remove it") from error


def _reason(path: Path) -> str | None:
    """Return the reason to skip a file, or ``None`` if it should be an image."""
    if path.is_symlink() and not os.path.exists(path):
        return "dead links"
    if not os.path.isfile(path):
        return "pipes or devices"
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        return suffix or "without a suffix"
    return None if os.access(path, os.R_OK) else "that cannot be read"


def _count_hidden(path: Path, left_out: Counter[str]) -> None:
    """Count a hidden file, or all files within a hidden folder."""
    inside = path.is_dir() and not path.is_symlink()
    count = sum(len(files) for _, _, files in os.walk(path)) if inside else 1
    if count:
        left_out["hidden"] += count
