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
    return sorted(
        (step, path) for path in folder.glob("step-*") if (step := checkpoint_step(path)) is not None
    )


def checkpoint_step(path: Path) -> int | None:
    """Return the number of steps in a checkpoint's name; ``None`` if it is not a checkpoint's name."""
    match = re.fullmatch(r"step-(\d+)", path.name)
    return int(match[1]) if match else None


def check_unused(folder: Path, resume: bool) -> None:
    """Raise an :class:`InputError` if ``folder`` holds a run without ``resume``, or cannot be written to."""
    check_folder(folder)
    existing = list_checkpoints(checkpoints_folder(folder))
    if existing and not resume:
        raise InputError(
            f"{folder} already holds a run at step {existing[-1][0]}. Add --resume, or choose another folder"
        )
