"""Training checkpoints: all state that resuming needs, written atomically. The newest two are kept.

A checkpoint is a folder. Each rank writes its parts of the tensors as safetensors, through torch's
distributed checkpoints; ``index.json`` holds the remaining values and the files' checksums. So a run can
resume with any number of processes. Published models are separate folders (``far.weights``).
"""

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from far.classes import check_same_classes
from far.errors import InputError
from far.files import atomic_folder, json_digest, read_json, remove_folder, sha256, write_json
from far.notices import noticed
from far.processes import Processes
from far.training.runs import list_checkpoints

KEPT = 2
_FILE_BYTES = 2**28
_INDEX = "index.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with verified checksums: step, plain values, and the shapes of whole tensors by name."""

    path: Path
    step: int
    values: dict[str, Any]
    shapes: dict[str, list[int]]

    def check_identity(self, ours: Mapping[str, Any]) -> None:
        """Raise an :class:`InputError` that names the first value in which a run's identity differs."""
        theirs, remedy = self.values["identity"], "Resume with the original, or choose another folder"
        if "classes" in ours and "classes" in theirs:
            check_same_classes(theirs["classes"], str(self.path), ours["classes"], "this run's data", remedy)
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise InputError(
                    f"{self.path} was trained with other {name} ({theirs.get(name)}) than this run has "
                    f"({value}). {remedy}"
                )

    def fill(self, targets: dict[str, Tensor], processes: Processes = Processes()) -> None:
        """Copy the tensors into ``targets``, whole or each rank its shards. All ranks take part.

        Raises:
            InputError: the targets have other names or shapes.
        """
        ours = {name: list(target.shape) for name, target in targets.items()}
        differing = sorted(
            name for name in ours.keys() | self.shapes if ours.get(name) != self.shapes.get(name)
        )
        if differing:
            name = differing[0]
            shapes = (
                f"{name} is {self.shapes.get(name, 'missing')} there and {ours.get(name, 'missing')} here"
            )
            raise InputError(
                f"{self.path} is of another model ({shapes}). Resume with the recipe that it was trained with"
            )
        try:
            with _quiet(processes):
                dcp.load(
                    targets,
                    storage_reader=dcp.HuggingFaceStorageReader(str(self.path)),
                    no_dist=processes.count == 1,
                )
        except (Exception, CheckpointException) as error:
            raise InputError(
                f"cannot read {self.path}: {_reason(error)}. Run the same command again, with --resume"
            ) from error


def named_tensors(state: dict[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of nested dictionaries by their keys, joined with dots."""
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            tensors |= named_tensors(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            tensors[f"{prefix}{key}"] = value
    return tensors


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    values: dict[str, Any],
    processes: Processes = Processes(),
) -> Path:
    """Write ``step-00001234``, remove all but the newest two, and return the path. All ranks take part.

    Args:
        folder: of the run's checkpoints, on a disk that all ranks see.
        step: number of finished steps.
        tensors: the same names on every rank, whole or as shards.
        values: JSON values: the task's ``identity``, ``dtype``, ``scaler``, and the numbers of ``skipped``
            steps in all and in a row.
        processes: those that train.
    """
    path = folder / f"step-{step:08d}"
    with contextlib.ExitStack() as stack:
        temporary = processes.first(lambda: stack.enter_context(atomic_folder(path)))
        files = _write(path, temporary, tensors, processes)
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        index = {"step": step, "values": values, "shapes": shapes, "files": files}

        def finish() -> None:
            write_json(temporary / _INDEX, {**index, "sha256": json_digest(index)})
            stack.close()
            for _, old in list_checkpoints(folder)[:-KEPT]:
                remove_folder(old)

        processes.first(finish)
    return path


def _write(path: Path, temporary: Path, tensors: dict[str, Tensor], processes: Processes) -> dict[str, str]:
    """Write the tensors into ``temporary``, and return the SHA-256 of each file. Errors name ``path``."""
    try:
        with _quiet(processes):
            numbers = _file_numbers(tensors, processes)
            writer = dcp.HuggingFaceStorageWriter(
                str(temporary), fqn_to_index_mapping=numbers, save_distributed=True
            )
            dense = {
                name: tensor if isinstance(tensor, DTensor) else tensor.contiguous()
                for name, tensor in tensors.items()
            }
            dcp.save(dense, storage_writer=writer, no_dist=processes.count == 1)
    except (OSError, CheckpointException) as error:
        raise InputError(
            f"cannot write {path}: {_reason(error)}. Check the free space, then add --resume"
        ) from error
    return _digests(temporary, processes)


def _file_numbers(tensors: dict[str, Tensor], processes: Processes) -> dict[str, int]:
    """Return each tensor's file number. Files are limited in size, since torch builds them in memory."""
    sizes = (tensor.numel() * tensor.element_size() // processes.count for tensor in tensors.values())
    return {
        name: 1 + before // _FILE_BYTES
        for name, before in zip(tensors, itertools.accumulate(sizes, initial=0))
    }


def _digests(folder: Path, processes: Processes) -> dict[str, str]:
    """Return the SHA-256 of each tensor file in ``folder``, each read by one of the ranks."""
    names = processes.first(lambda: sorted(path.name for path in folder.glob("*.safetensors")))
    mine = names[processes.rank :: processes.count]
    by_rank = processes.collect(lambda: {name: sha256(folder / name) for name in mine})
    return {name: digest for digests in by_rank for name, digest in digests.items()}


def newest_values(folder: Path) -> dict[str, Any]:
    """Return the newest checkpoint's plain values, unverified; empty if they cannot be read."""
    try:
        values = read_json(list_checkpoints(folder)[-1][1] / _INDEX)["values"]
        return values if isinstance(values, dict) else {}
    except (InputError, OSError, LookupError, TypeError, ValueError):
        return {}


def open_checkpoint(path: Path, processes: Processes = Processes()) -> Checkpoint:
    """Open a checkpoint and verify its checksums. All ranks take part.

    Raises:
        InputError: it is incomplete or damaged, or the disk cannot be read.
    """
    try:
        with noticed(f"reading {path}"):
            checkpoint = _open(path, processes)
        _check_values(checkpoint)
        return checkpoint
    except (OSError, dist.DistError) as error:
        raise InputError(
            f"cannot read {path}: {_reason(error)}. Run the same command again, with --resume"
        ) from error
    except (InputError, LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"checkpoint {path} is incomplete or damaged ({_reason(error)}). Remove it, then --resume "
            "continues from the one before it"
        ) from error


def _open(path: Path, processes: Processes) -> Checkpoint:
    index = read_json(path / _INDEX)
    if not isinstance(index, dict) or index.pop("sha256", None) != json_digest(index):
        raise ValueError(f"the checksum of {_INDEX} differs")
    listed, actual = index["files"], _digests(path, processes)
    for name in listed.keys() | actual:
        if listed.get(name) != actual.get(name):
            raise ValueError(f"{name} is missing, or its checksum differs")
    if not isinstance(index["values"], dict) or not isinstance(index["shapes"], dict):
        raise ValueError(f"{_INDEX} has an unknown form")
    return Checkpoint(path, index["step"], index["values"], index["shapes"])


def _check_values(checkpoint: Checkpoint) -> None:
    if checkpoint.path.name != f"step-{checkpoint.step:08d}":
        raise ValueError(f"its step is {checkpoint.step}")
    identity, dtype, skipped, scaler = (
        checkpoint.values[name] for name in ("identity", "dtype", "skipped", "scaler")
    )
    if not isinstance(identity, dict) or not isinstance(identity.get("classes", []), list):
        raise ValueError("its identity has an unknown form")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"its dtype is {dtype!r}")
    numbers = (*skipped, *(int(value) for value in scaler.values()))
    if len(skipped) != 2 or not all(isinstance(number, int) for number in numbers):
        raise ValueError("its numbers of skipped steps, or of the loss's scale, are not numbers")


@contextlib.contextmanager
def _quiet(processes: Processes) -> Iterator[None]:
    """Suppress torch's warning that there is a single process, if there is."""
    with warnings.catch_warnings():
        if processes.count == 1:
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _reason(error: BaseException) -> str:
    """Return an error's message in one line; the first failure if several ranks failed."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:200] or type(error).__name__
