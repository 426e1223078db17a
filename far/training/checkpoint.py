"""Training checkpoints: everything that resuming needs, written atomically, the newest two kept.

They are for going on with a run; what is published is a folder of safetensors (``far.weights``).
"""

import re
from pathlib import Path
from typing import Any

import torch

from far.errors import InputError
from far.files import atomic_path, check_zip

KEPT = 2


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write ``state`` as ``step-00001234.pt`` and remove all but the newest two; returns the path."""
    path = folder / f"step-{step:08d}.pt"
    with atomic_path(path) as temporary:
        try:
            torch.save({"step": step, **state}, temporary)
        except RuntimeError as error:  # torch reports a full disk so
            raise InputError(f"cannot write {path}: {error}; free some space, then --resume") from error
    for _, old in list_checkpoints(folder)[:-KEPT]:
        old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint in ``folder``, oldest first."""
    found = []
    for path in folder.glob("step-*.pt"):
        if match := re.fullmatch(r"step-(\d+)\.pt", path.name):
            found.append((int(match[1]), path))
    return sorted(found)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; tensors and plain values only.

    Raises:
        InputError: the file is cut off, damaged, or holds anything but tensors and plain values.
    """
    try:
        check_zip(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise ValueError("it is no training checkpoint")
        return state
    except Exception as error:  # there is no telling how a damaged pickle fails
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"checkpoint {path} is cut off or damaged ({reason}); remove it and --resume goes on from the one before it"
        ) from error
