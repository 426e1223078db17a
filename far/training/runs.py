"""The folder of a training run: which checkpoints it holds. Needs no torch: a folder in use is refused without it."""

import re
from pathlib import Path

from far.errors import InputError
from far.files import check_folder


def checkpoints_folder(folder: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return folder / "checkpoints"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint in ``folder``, oldest first."""
    return sorted(
        (step, path) for path in folder.glob("step-*") if (step := checkpoint_step(path)) is not None
    )


def checkpoint_step(path: Path) -> int | None:
    """Return the number of steps in a checkpoint's name; None if it is another name."""
    match = re.fullmatch(r"step-(\d+)(\.pt)?", path.name)
    return int(match[1]) if match else None


def check_unused(folder: Path, resume: bool) -> None:
    """Raise an :class:`InputError` if ``folder`` holds a run that is not to be resumed, or cannot be written to."""
    check_folder(folder)
    existing = list_checkpoints(checkpoints_folder(folder))
    if existing and not resume:
        raise InputError(
            f"{folder} already holds a run at step {existing[-1][0]}; add --resume, or choose another folder"
        )
