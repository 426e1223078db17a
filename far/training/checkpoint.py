"""Training checkpoints: everything that resuming needs, written atomically, the newest two kept.

A checkpoint is a folder. Each process writes the parts of tensors that it holds, as safetensors, by torch's own distributed
checkpoints; ``index.json`` has what else there is to know, and the files' checksums. So a run goes on at any number of
processes. What is published is another folder of safetensors (``far.weights``).
"""

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from far.errors import InputError
from far.files import atomic_folder, json_digest, read_json, remove_folder, sha256, write_json
from far.notices import noticed
from far.pickles import is_held, read_pickle
from far.processes import Processes
from far.training.parallel import shards_like
from far.training.runs import checkpoint_step, list_checkpoints

KEPT = 2
_FILE_BYTES = 2**28
_INDEX = "index.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose checksums are right: the step, plain values, and the whole tensors' shapes by name.

    ``tensors`` are those of a single file, as version 0.1 wrote it.
    """

    path: Path
    step: int
    values: dict[str, Any]
    shapes: dict[str, list[int]]
    tensors: dict[str, Tensor] | None = None

    def fill(self, targets: dict[str, Tensor], processes: Processes = Processes()) -> None:
        """Copy the tensors into ``targets``, whole or each process its shards; all processes take part.

        Raises:
            InputError: the targets have other names or shapes.
        """
        ours = {name: list(target.shape) for name, target in targets.items()}
        differing = sorted(
            name for name in ours.keys() | self.shapes if ours.get(name) != self.shapes.get(name)
        )
        if differing:
            name = differing[0]
            found = f"{name} is {self.shapes.get(name, 'missing')} there and {ours.get(name, 'missing')} here"
            raise InputError(
                f"{self.path} is of another model ({found}); resume with the recipe it was made with"
            )
        if self.tensors is not None:
            for name, target in targets.items():
                target.copy_(shards_like(target, self.tensors[name]))
            return
        try:
            with _alone(processes):
                dcp.load(
                    targets,
                    storage_reader=dcp.HuggingFaceStorageReader(str(self.path)),
                    no_dist=processes.count == 1,
                )
        except (Exception, CheckpointException) as error:
            raise InputError(
                f"cannot read {self.path}: {_reason(error)}; run the same command again, with --resume"
            ) from error


def named_tensors(state: dict[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested dictionaries, by the keys that lead to them with dots between."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= named_tensors(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            found[f"{prefix}{key}"] = value
    return found


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    values: dict[str, Any],
    processes: Processes = Processes(),
) -> Path:
    """Write ``step-00001234`` and remove all but the newest two; all processes take part. Returns the path.

    Args:
        folder: of the run's checkpoints, on a disk that all processes see.
        step: how many are finished.
        tensors: the same names in every process, whole or as shards.
        values: what JSON can hold.
        processes: those that train.
    """
    path = folder / f"step-{step:08d}"
    with contextlib.ExitStack() as stack:
        temporary = processes.collect(
            lambda: stack.enter_context(atomic_folder(path)) if processes.rank == 0 else None
        )[0]
        assert temporary is not None
        files = _write(path, temporary, tensors, processes)
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        index = {"step": step, "values": values, "shapes": shapes, "files": files}

        def finish() -> None:
            if processes.rank == 0:
                write_json(temporary / _INDEX, {**index, "sha256": json_digest(index)})
                stack.close()
                for _, old in list_checkpoints(folder)[:-KEPT]:
                    remove_folder(old) if old.is_dir() else old.unlink()

        processes.collect(finish)
    return path


def _write(path: Path, temporary: Path, tensors: dict[str, Tensor], processes: Processes) -> dict[str, str]:
    """The SHA-256 of each file that is written into ``temporary``, by name; ``path`` names it in errors."""
    try:
        with _alone(processes):
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
            f"cannot write {path}: {_reason(error)}; check the free space, then --resume"
        ) from error
    return _digests(temporary, processes)


def _file_numbers(tensors: dict[str, Tensor], processes: Processes) -> dict[str, int]:
    """Into which of a process's files each tensor goes: a file is put together in memory, twice, so it should not be large."""
    sizes = (tensor.numel() * tensor.element_size() // processes.count for tensor in tensors.values())
    return {
        name: 1 + before // _FILE_BYTES
        for name, before in zip(tensors, itertools.accumulate(sizes, initial=0))
    }


def _digests(folder: Path, processes: Processes) -> dict[str, str]:
    """The same of what is in ``folder``, each file read by one of the processes."""
    names = processes.gather(sorted(path.name for path in folder.glob("*.safetensors")))[0]
    mine = names[processes.rank :: processes.count]
    found = processes.collect(lambda: {name: sha256(folder / name) for name in mine})
    return {name: digest for part in found for name, digest in part.items()}


def newest_values(folder: Path) -> dict[str, Any]:
    """Return the plain values of the newest checkpoint in ``folder``, unverified; none of a damaged one, nor of version 0.1."""
    try:
        values = read_json(list_checkpoints(folder)[-1][1] / _INDEX)["values"]
        return values if isinstance(values, dict) else {}
    except (InputError, OSError, LookupError, TypeError, ValueError):
        return {}


def open_checkpoint(path: Path, processes: Processes = Processes()) -> Checkpoint:
    """Read a checkpoint against its checksums, all processes together; a file of version 0.1 onto the CPU.

    Raises:
        InputError: it is cut off, damaged, or holds anything but tensors and plain values.
    """
    try:
        with noticed(f"reading {path}"):
            found = _open_file(path) if path.is_file() else _open_folder(path, processes)
        _check_values(found)
        return found
    except (OSError, dist.DistError) as error:
        raise InputError(
            f"cannot read {path}: {_reason(error)}; run the same command again, with --resume"
        ) from error
    except Exception as error:  # there is no telling how a damaged pickle fails
        reason = f"{_reason(error)}); remove it and --resume goes on from the one before it"
        raise InputError(f"checkpoint {path} is cut off or damaged ({reason}") from error


def _open_folder(path: Path, processes: Processes) -> Checkpoint:
    index = read_json(path / _INDEX)
    if not isinstance(index, dict) or index.pop("sha256", None) != json_digest(index):
        raise ValueError(f"the checksum of {_INDEX} differs")
    listed, found = index["files"], _digests(path, processes)
    for name in listed.keys() | found:
        if listed.get(name) != found.get(name):
            raise ValueError(f"{name} is missing, or its checksum differs")
    if not isinstance(index["values"], dict) or not isinstance(index["shapes"], dict):
        raise ValueError(f"{_INDEX} is of another form")
    return Checkpoint(path, index["step"], index["values"], index["shapes"])


def _open_file(path: Path) -> Checkpoint:
    state = read_pickle(path)
    parts = {"module": state["module"], "ema": state["ema"]}
    parts |= {f"optimizer.{number}": of_one for number, of_one in state["optimizer"]["state"].items()}
    tensors = {
        f"{part}.{name}": tensor
        for part, found in parts.items()
        for name, tensor in found.items()
        if is_held(tensor)
    }
    values = {name: state[name] for name in ("scaler", "skipped") if name in state}
    return Checkpoint(
        path, state["step"], values, {name: list(tensor.shape) for name, tensor in tensors.items()}, tensors
    )


def _check_values(checkpoint: Checkpoint) -> None:
    if checkpoint.step != checkpoint_step(checkpoint.path):
        raise ValueError(f"it is of step {checkpoint.step}")
    identity = checkpoint.values.get("identity", {})
    if not isinstance(identity, dict) or not isinstance(identity.get("classes", []), list):
        raise ValueError("what it was trained on is of another form")
    if checkpoint.values.get("dtype", "float32") not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"its dtype is {checkpoint.values['dtype']!r}")
    skipped, scaler = checkpoint.values.get("skipped", (0, 0)), checkpoint.values.get("scaler", {})
    if len(skipped) != 2 or not all(
        isinstance(number, int) for number in (*skipped, *(int(value) for value in scaler.values()))
    ):
        raise ValueError("its numbers of skipped steps, or of the loss's scale, are none")


@contextlib.contextmanager
def _alone(processes: Processes) -> Iterator[None]:
    """Without torch's warning that there is one process, where there is."""
    with warnings.catch_warnings():
        if processes.count == 1:
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _reason(error: BaseException) -> str:
    """What went wrong, in one line; of several processes' failures the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:200] or type(error).__name__
