"""Sharded safetensors with an index: the storage format of image sets, latent caches and trajectories.

A folder has ``index.json`` and ``shard-00000.safetensors``, ``shard-00001.safetensors`` …; the first axis of
every tensor is the row. A complete shard is written, then listed in the index with its SHA-256, so writing
can stop at any time and resume. Several processes can write one folder together. Reading uses memory maps.
"""

import contextlib
import errno
import functools
import json
import reprlib
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from far.errors import InputError
from far.files import (
    atomic_path,
    check_folder,
    json_digest,
    read_json,
    remove_leftovers,
    sha256,
    sole_use,
    write_json,
)
from far.processes import Processes, started_by_torchrun

INDEX = "index.json"
_MADE_BY = {"images": "far data", "moments": "far cache RECIPE", "trajectories": "far distill"}
_NUMPY_TYPES = {"U8": np.uint8, "I64": np.int64, "F16": np.float16, "F32": np.float32}


class Piece(NamedTuple):
    """Some items of a source: their number, their rows by tensor name, and unusable items by reason.

    If no item is usable, there are no tensors.
    """

    items: int
    rows: Mapping[str, torch.Tensor]
    left_out: Mapping[str, int] = {}


Pieces = Iterable[Piece]


class ShardWriter:
    """Writer of shards, one by one. For an existing folder it continues after the last complete shard.

    Attributes:
        found_complete: whether nothing was left to write when the folder was opened.

    Args:
        meta: describes the rows (kind, classes, size …). To continue a folder, it must be equal except for
            ``"source"``, the place of the data: equal content is equal data, and the new place is stored.
        processes: ranks that open the folder together and then :meth:`fill` it. Rank 0 owns the index.

    Raises:
        InputError: the folder has shards written with other ``meta``, lacks one of its shards, is not
            writable, is being filled by another command, or is not the same for all processes.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any], processes: Processes = Processes()) -> None:
        self.folder, self.processes = folder, processes
        processes.check_shared(folder)
        # All ranks wait until rank 0 has removed the leftovers of an earlier start.
        self.index: dict[str, Any] = processes.first(self._open, dict(meta))
        self.found_complete = self.complete

    def _open(self, meta: dict[str, Any]) -> dict[str, Any]:
        with sole_use(self.folder) if self.folder.is_dir() else contextlib.nullcontext():
            remove_leftovers(self.folder, idle_seconds=0)
        if not (self.folder / INDEX).exists():
            check_folder(self.folder)
            return {"meta": meta, "complete": False, "cursor": 0, "shards": [], "report": {}}
        index = _read_index(self.folder / INDEX)
        theirs, ours = index["meta"], json.loads(json.dumps(meta))
        for name in {**theirs, **ours}:
            if name != "source" and theirs.get(name) != ours.get(name):
                there, here = reprlib.repr(theirs.get(name)), reprlib.repr(ours.get(name))
                raise InputError(
                    f"{self.folder} has data made with other settings ({name} was {there}, is now {here})."
                    " Remove it or choose another folder"
                )
        for shard in index["shards"]:
            if not (path := self.folder / shard["file"]).exists():
                raise InputError(f"{path} is missing. Remove {self.folder} and make it again")
        return {**index, "meta": ours}

    @property
    def complete(self) -> bool:
        return bool(self.index["complete"])

    @property
    def cursor(self) -> int:
        """Number of items of its source that the caller had consumed when the last shard was written."""
        return int(self.index["cursor"])

    @property
    def count(self) -> int:
        """Number of rows written."""
        return sum(shard["count"] for shard in self.index["shards"])

    @property
    def report(self) -> dict[str, Any]:
        """Findings about the source (skipped files, removed duplicates), stored with the next shard."""
        return self.index["report"]

    def write(self, tensors: Mapping[str, torch.Tensor], cursor: int) -> None:
        """Append one shard with the same number of rows in each tensor; without rows only move the cursor."""
        empty = not len(next(iter(tensors.values())))
        self._list([] if empty else [self._save(len(self.index["shards"]), tensors)], cursor)

    def fill(self, total: int, step: int, make: Callable[[range], Pieces], bar: tqdm) -> None:
        """Write the missing shards of a source of ``total`` items, ``step`` items per shard, and finish.

        In each round every process makes one shard from its own items, and then rank 0 lists them. So the
        files are the same at any number of processes, and a kill loses one round. Ctrl-C with one process
        loses only the current piece: the finished pieces become a shorter shard. The report counts the
        items that are left out.

        Args:
            make: items → pieces of their rows. It may move ``bar``.
            bar: moved to the cursor after each round.
        """
        with self.processes.alone_in(self.folder):
            while self.cursor < total:
                starts = range(self.cursor, total, step)[: self.processes.count]
                parts = [range(start, min(start + step, total)) for start in starts]
                made = self.processes.collect(self._save_own, parts, make)[: len(parts)]
                # A part without rows has no shard. Those after it have wrong numbers, and are made again.
                empty = (number for number, (shard, _) in enumerate(made) if shard is None)
                end = next(empty, len(made) - 1) + 1
                self._add_left_out(counts for _, counts in made[:end])
                self._list([shard for shard, _ in made[:end] if shard], parts[end - 1].stop)
                bar.update(self.cursor - bar.n)
            self.finish()
        self.processes.wait()  # then all ranks can read the folder

    def _save_own(
        self, parts: list[range], make: Callable[[range], Pieces]
    ) -> tuple[dict[str, Any] | None, Counter[str]]:
        """Write this process's shard of a round. Return its index entry, if any, and what is left out."""
        rank, number = self.processes.rank, len(self.index["shards"]) + self.processes.rank
        pieces: list[Mapping[str, torch.Tensor]] = []
        left_out: Counter[str] = Counter()
        done = 0
        try:
            for piece in make(parts[rank]) if rank < len(parts) else ():
                pieces += [piece.rows] * bool(piece.rows)
                left_out.update(piece.left_out)
                done += piece.items
        except KeyboardInterrupt:
            if pieces and self.processes.count == 1:
                self._add_left_out([left_out])
                self._list([self._save(number, _joined(pieces))], parts[0].start + done)
            raise
        return self._save(number, _joined(pieces)) if pieces else None, left_out

    def _add_left_out(self, counts: Iterable[Mapping[str, int]]) -> None:
        """Add counts by reason to the report, which stays empty if there are none."""
        total = Counter(self.report.get("left out", {}))
        for each in counts:
            total.update(each)
        if total:
            self.report["left out"] = dict(sorted(total.items()))

    def _save(self, number: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Write a shard and return its index entry."""
        counts = {name: len(tensor) for name, tensor in tensors.items()}
        assert len(set(counts.values())) == 1, counts
        name = _shard_name(number)
        with atomic_path(self.folder / name) as temporary:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
            digest = sha256(temporary)
        return {"file": name, "count": next(iter(counts.values())), "sha256": digest}

    def _list(self, shards: list[dict[str, Any]], cursor: int) -> None:
        self.index["shards"] += shards
        self.index["cursor"] = cursor
        self._write_index()

    def finish(self) -> None:
        """Mark the folder as complete, so that it can be read."""
        self.index["complete"] = True
        self._write_index()

    def _write_index(self) -> None:
        index = {**self.index, "sha256": json_digest(self.index)}
        self.processes.first(write_json, self.folder / INDEX, index)


class ShardReader:
    """Random access to the rows of a finished folder.

    Args:
        kinds: expected values of ``meta["kind"]``.
        verify: compare every shard's checksum first.
        index_only: read the index alone. Shards need not exist until a row is read.

    Raises:
        InputError: the folder does not exist, is unfinished or of another kind, or a shard is damaged.
    """

    def __init__(self, folder: Path, *kinds: str, verify: bool = False, index_only: bool = False) -> None:
        self.folder, kind = folder, kinds[0]
        command = _MADE_BY.get(kind, "the command that writes it")
        if not (folder / INDEX).exists():
            raise InputError(f"{folder} has no {kind}: {INDEX} does not exist. Make it first with {command}")
        index = _read_index(folder / INDEX)
        self.meta: dict[str, Any] = index["meta"]
        found = self.meta.get("kind", "no data")
        if found not in kinds:
            raise InputError(f"{folder} has {found!r}, not {kind!r}. Give a folder of {kind}")
        if not index["complete"]:
            raise InputError(f"{folder} is unfinished. Run {command} again with the same arguments")
        # Identifies the rows, independent of the folder's place.
        self.digest = json_digest([[shard["count"], shard["sha256"]] for shard in index["shards"]])
        self._shards = index["shards"]
        self._starts = np.cumsum([0] + [shard["count"] for shard in self._shards])
        if verify:
            _check_digests(folder, self._shards)
        if not index_only:
            _ = self._maps

    @functools.cached_property
    def _maps(self) -> list[dict[str, np.ndarray]]:
        """Tensors of each shard, mapped on first use."""
        paths = [self.folder / shard["file"] for shard in self._shards]
        _allow_open_files(len(paths))
        maps = list(map(map_safetensors, paths))
        for path, shard, rows in zip(paths, self._shards, maps):
            if {len(row) for row in rows.values()} - {shard["count"]} or _form(rows) != _form(maps[0]):
                raise InputError(f"{path} and {INDEX} differ. Remove {self.folder} and make it again")
        return maps

    def require(self, forms: Mapping[str, tuple[type, tuple[int, ...]]]) -> None:
        """Raise an :class:`InputError` unless each tensor of ``forms`` exists with rows of (dtype, shape)."""
        found = _form(self._maps[0]) if self._maps else {}
        for name, (dtype, shape) in forms.items():
            if found.get(name) != (np.dtype(dtype), shape):
                missing = f"{name} of {np.dtype(dtype)} {list(shape)}"
                raise InputError(f"{self.folder} has no {missing}. Remove it and make it again")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        """Return the rows ``indices [n]`` of tensor ``name``, in that order: ``[n, …]``."""
        order = indices.numpy()
        shards = np.searchsorted(self._starts, order, side="right") - 1
        first = self._maps[0][name]
        result = np.empty((len(order), *first.shape[1:]), first.dtype)
        for shard in np.unique(shards):
            chosen = shards == shard
            result[chosen] = self._maps[shard][name][order[chosen] - self._starts[shard]]
        return torch.from_numpy(result)

    def all(self, name: str) -> torch.Tensor:
        """Return tensor ``name`` over all shards, copied into memory."""
        return torch.cat([torch.from_numpy(np.array(tensors[name])) for tensors in self._maps])


def _joined(pieces: list[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _check_digests(folder: Path, shards: list[dict[str, Any]]) -> None:
    """Raise an :class:`InputError` if a checksum differs; a progress bar appears after two seconds."""
    hidden = started_by_torchrun().rank > 0
    for shard in tqdm(shards, f"checking {folder}", unit="shard", delay=2, leave=False, disable=hidden):
        path = folder / shard["file"]
        if not path.exists() or sha256(path) != shard["sha256"]:
            raise InputError(f"{path} is missing or damaged. Remove {folder} and make it again")


def _read_index(path: Path) -> dict[str, Any]:
    index = read_json(path)
    kinds = {"meta": dict, "complete": bool, "cursor": int, "shards": list, "report": dict}
    digest = index.pop("sha256", None) if isinstance(index, dict) else None
    if (
        not isinstance(index, dict)
        or index.keys() != kinds.keys()
        or any(not isinstance(index[key], kind) for key, kind in kinds.items())
        or digest != json_digest(index)
        or not all(_is_shard(shard, number) for number, shard in enumerate(index["shards"]))
    ):
        raise InputError(f"{path} is damaged. Remove its folder and make it again")
    return index


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _is_shard(shard: Any, number: int) -> bool:
    """Return whether an index entry is one of :class:`ShardWriter`, and names no other file or folder."""
    return (
        isinstance(shard, dict)
        and shard.get("file") == _shard_name(number)
        and isinstance(shard.get("sha256"), str)
        and isinstance(shard.get("count"), int)
        and shard["count"] > 0
    )


def _allow_open_files(count: int) -> None:
    """Raise this process's limit of open files, often 256 or 1024, so that ``count`` more fit if possible."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 1024
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(ValueError, OSError):  # a system's own maximum
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _form(tensors: dict[str, np.ndarray]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    return {name: (rows.dtype, rows.shape[1:]) for name, rows in tensors.items()}


def map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Memory-map every tensor of a safetensors file, read-only. The file stays open once, as numpy does it.

    Raises:
        InputError: the file is missing, truncated, not safetensors, or cannot be opened.
    """
    try:
        with path.open("rb") as file:
            with safe_open(path, "numpy"):  # checks the header; an error of opening has no number there
                pass
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        content = np.memmap(path, np.uint8, "r", offset=8 + length)
        return {
            name: content[slice(*entry["data_offsets"])]
            .view(_NUMPY_TYPES[entry["dtype"]])
            .reshape(entry["shape"])
            for name, entry in header.items()
        }
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise InputError(f"{path} is missing. Remove its folder and make it again") from error
        remedy = (
            "ulimit -n raises the limit" if error.errno == errno.EMFILE else "Check its permissions and disk"
        )
        raise InputError(f"{path} cannot be opened ({error.strerror}). {remedy}") from error
    except (ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read ({reason}). Remove its folder and make it again") from error
