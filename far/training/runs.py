"""Checkpoints in a training run's folder. Imports no torch, so that used folders are rejected without it."""

import re
from pathlib import Path

from far.errors import InputError
from far.files import check_folder


def checkpoints_folder(folder: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return folder / "checkpoints"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of every checkpoint in ``folder``, oldest first."""
    matches = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def check_unused(folder: Path, resume: bool) -> None:
    """Raise an :class:`InputError` if ``folder`` holds a run without ``resume``, or cannot be written to.

    A model without checkpoints cannot be resumed, and checkpoints of version 0.1 cannot: they raise it too.
    """
    check_folder(folder)
    existing = list_checkpoints(checkpoints_folder(folder))
    if existing and not resume:
        raise InputError(f"{folder} holds a run at step {existing[-1][0]}. Add --resume or take a new folder")
    old = sorted(checkpoints_folder(folder).glob("step-*.pt"))
    if old and not existing:
        raise InputError(f"{old[-1]} is of far 0.1. Choose another folder, or continue the run with far 0.1")
    # A run that was killed while it first saved has an empty folder of checkpoints.
    begun = resume and checkpoints_folder(folder).exists()
    if (folder / "config.json").exists() and not (existing or begun):
        kept = f"{folder} holds a model without checkpoints, which would be overwritten"
        raise InputError(f"{kept}. Choose another folder, or remove that one")
