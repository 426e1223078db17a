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
_READ_AGAIN = "Run the same command again, with --resume"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with verified checksums: step, plain values, and the shapes of whole tensors by name."""

    path: Path
    step: int
    values: dict[str, Any]
    shapes: dict[str, list[int]]

    def check_identity(self, ours: Mapping[str, Any]) -> None:
        """Raise an :class:`InputError` that names the first value in which a run's identity differs."""
        theirs = self.values["identity"]
        remedy = "Resume with the original, or choose another folder"
        if "classes" in ours and "classes" in theirs:
            check_same_classes(theirs["classes"], str(self.path), ours["classes"], "this run's data", remedy)
        for name in {**theirs, **ours}:
            if (there := theirs.get(name)) != (here := ours.get(name)):
                raise InputError(f"{self.path} has {name}={there}, but this run has {here}. {remedy}")

    def fill(self, targets: dict[str, Tensor], processes: Processes = Processes()) -> None:
        """Copy the tensors into ``targets``, whole or each rank its shards. All ranks take part.

        Raises:
            InputError: the targets have other names or shapes.
        """
        ours = {name: list(target.shape) for name, target in targets.items()}
        for name in sorted(ours.keys() | self.shapes):
            here, there = ours.get(name, "missing"), self.shapes.get(name, "missing")
            if here != there:
                raise InputError(f"{self.path}: {name} is {there}, not {here}. Resume with its own recipe")
        # torch may raise anything for damaged files.
        with _in_one_line(f"cannot read {self.path}", _READ_AGAIN, Exception, CheckpointException):
            reader = dcp.HuggingFaceStorageReader(str(self.path))
            dcp.load(targets, storage_reader=reader, no_dist=processes.count == 1)


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
        tensors: whole or as shards; every rank has the same names.
        values: JSON values: the task's ``identity``, ``dtype``, ``scaler``, the newest ``results``, and the
            numbers of ``skipped`` steps in all and in a row.
        processes: ranks that train.
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
    numbers = _file_numbers(tensors, processes)
    writer = dcp.HuggingFaceStorageWriter(str(temporary), fqn_to_index_mapping=numbers, save_distributed=True)
    dense = {name: t if isinstance(t, DTensor) else t.contiguous() for name, t in tensors.items()}
    remedy = "Check the free space, then add --resume"
    with _in_one_line(f"cannot write {path}", remedy, OSError, CheckpointException):
        dcp.save(dense, storage_writer=writer, no_dist=processes.count == 1)
    return _digests(temporary, processes)


def _file_numbers(tensors: dict[str, Tensor], processes: Processes) -> dict[str, int]:
    """Return each tensor's file number. Files are limited in size, since torch builds them in memory."""
    sizes = (tensor.numel() * tensor.element_size() // processes.count for tensor in tensors.values())
    starts = itertools.accumulate(sizes, initial=0)
    return {name: 1 + start // _FILE_BYTES for name, start in zip(tensors, starts)}


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
    remedy = "Remove it, then --resume continues from the one before it"
    damage = (InputError, LookupError, TypeError, ValueError, AttributeError, OverflowError)
    with (
        noticed(f"reading {path}"),
        _in_one_line(f"cannot read {path}", _READ_AGAIN, OSError, dist.DistError),
        _in_one_line(f"checkpoint {path} is incomplete or damaged", remedy, *damage),
    ):
        return _open(path, processes)


def _open(path: Path, processes: Processes) -> Checkpoint:
    index = read_json(path / _INDEX)
    if not isinstance(index, dict) or index.pop("sha256", None) != json_digest(index):
        raise ValueError(f"the checksum of {_INDEX} differs")
    listed, actual = index["files"], _digests(path, processes)
    for name in listed.keys() | actual:
        if listed.get(name) != actual.get(name):
            raise ValueError(f"{name} is missing, or its checksum differs")
    step, values, shapes = index["step"], index["values"], index["shapes"]
    if path.name != f"step-{step:08d}":
        raise ValueError(f"its step is {step}")
    if not all(isinstance(value, dict) for value in (values, shapes, values["identity"])):
        raise ValueError(f"{_INDEX} has an unknown form")
    if not isinstance(values["identity"].get("classes", []), list):
        raise ValueError("its classes are not a list")
    if values["dtype"] not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"its dtype is {values['dtype']!r}")
    skipped = values["skipped"]
    numbers = (*skipped, *(int(value) for value in values["scaler"].values()))
    if len(skipped) != 2 or not all(isinstance(number, int) for number in numbers):
        raise ValueError("its numbers of skipped steps, or of the loss's scale, are not numbers")
    return Checkpoint(path, step, values, shapes)


@contextlib.contextmanager
def _in_one_line(failure: str, remedy: str, *kinds: type[BaseException]) -> Iterator[None]:
    """Turn errors of ``kinds`` into an :class:`InputError`; suppress torch's warning of a single process."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except kinds as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException):  # failures by rank
            cause = next(iter(error.failures.values()))[0]
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise InputError(f"{failure}: {reason}. {remedy}") from error
