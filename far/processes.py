"""Processes that torchrun started together: which one this is, and what they tell each other.

How work is shared among them is for those who share it: ``far.data.shards``, ``far.evaluation.extraction``,
``far.training.loop``. torch is imported by what needs it: one process alone does not.
"""

import contextlib
import dataclasses
import datetime
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from far.devices import resolve_device
from far.errors import InputError
from far.files import sole_use

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Processes:
    """Process ``rank`` of ``count``. What they tell each other needs :func:`joined`; one alone needs nothing."""

    rank: int = 0
    count: int = 1

    def device(self, name: "str | torch.device") -> "torch.device":
        """Return the device of this process: of several, ``cuda`` and ``auto`` give each its own CUDA device.

        Raises:
            InputError: the name is unknown, the device cannot be used on this machine, or torchrun did not start this process.
        """
        import torch

        if self.count == 1 or str(name) not in ("auto", "cuda"):
            return resolve_device(name)
        if str(name) == "auto" and not torch.cuda.is_available():
            return torch.device("cpu")  # processes cannot share an MPS device
        local, devices = self.local_rank(), torch.cuda.device_count()
        if 0 < devices <= local:
            raise InputError(
                f"LOCAL_RANK {local} has no CUDA device; start at most {devices} processes per machine, or give device cpu"
            )
        return resolve_device(f"cuda:{local}")

    def local_rank(self) -> int:
        """Return this process's number on its machine.

        Raises:
            InputError: torchrun did not start this process.
        """
        local = os.environ.get("LOCAL_RANK", "missing")
        if not local.isdecimal():
            raise InputError(
                f"WORLD_SIZE is {self.count}, but LOCAL_RANK is {local} in the environment; start the command by torchrun"
            )
        return int(local)

    def check_parts(self, name: str, parts: int) -> None:
        """Raise an :class:`InputError` unless so many parts of a step, set by ``name``, are as many for each process."""
        if parts % self.count:
            raise InputError(
                f"{name} {parts}: give a multiple of the {self.count} processes, which share them"
            )

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, in every one."""
        values = [value] * self.count
        if self.count > 1:
            import torch.distributed as dist

            dist.all_gather_object(values, value)
        return values

    def collect(self, make: Callable[..., T], *arguments: Any) -> list[T]:
        """What ``make`` returns in all processes, by rank, in every one.

        An :class:`InputError` in one is raised in all, and what the system refuses to one becomes such an error.
        """
        result: T | InputError
        try:
            result = make(*arguments)
        except InputError as error:
            result = error
        except OSError as error:
            if self.count == 1:
                raise
            result = InputError(str(error))
        results = self.gather(result)
        for found in results:
            if isinstance(found, InputError):
                raise found
        return [value for value in results if not isinstance(value, InputError)]

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process, in every one."""
        if self.count == 1:
            return flag
        import torch
        import torch.distributed as dist

        found = torch.tensor(flag, dtype=torch.int8)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def check_shared(self, folder: Path) -> None:
        """Raise an :class:`InputError` unless all processes see the same ``folder``, which is made where missing."""
        if self.count == 1:
            return
        with contextlib.ExitStack() as stack:
            probe = self.collect(lambda: stack.enter_context(_probe(folder)) if self.rank == 0 else None)[0]
            if not all(self.gather(probe is not None and probe.exists())):
                raise InputError(
                    f"{folder} is not the same for all processes; put it on a disk that they share"
                )

    @contextlib.contextmanager
    def alone_in(self, folder: Path) -> Iterator[None]:
        """Keep other commands out of ``folder`` within the block; see :func:`far.files.sole_use`."""
        with contextlib.ExitStack() as stack:
            self.collect(lambda: stack.enter_context(sole_use(folder)) if self.rank == 0 else None)
            yield

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier()


def started_by_torchrun() -> Processes:
    """What torchrun says of this process; without it, one alone."""
    rank, count = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise InputError(
            f"RANK {rank!r} and WORLD_SIZE {count!r} in the environment are not torchrun's; unset them"
        )
    return Processes(int(rank), int(count))


@contextlib.contextmanager
def _probe(folder: Path) -> Iterator[Path]:
    """Something in ``folder`` to look for."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".shared.", suffix=".far") as probe:
        yield Path(probe)


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """The processes that torchrun started, able to talk to each other within the block."""
    processes = started_by_torchrun()
    if processes.count == 1:
        yield processes
        return
    local = processes.local_rank()
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise InputError(
            f"WORLD_SIZE is {processes.count}, but {missing[0]} is missing in the environment; start the command by torchrun"
        )
    import torch
    import torch.distributed as dist

    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)  # where torch's engines keep what they put together
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # Some wait while one judges images, which may take long.
    dist.init_process_group(backend, timeout=datetime.timedelta(days=2))
    try:
        yield processes
    finally:
        dist.destroy_process_group()


def leave(status: int = 0) -> NoReturn:
    """End the program; one of several processes at once, without Python's cleaning up.

    FSDP2 keeps threads of the group beyond the group itself, and now and then one of them aborts a process that cleans up.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
