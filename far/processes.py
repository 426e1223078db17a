"""The processes that torchrun started together: rank, device, and collective operations.

Modules with work to share divide it among ranks themselves. torch is imported only when several processes
communicate.
"""

import contextlib
import dataclasses
import datetime
import os
import sys
import tempfile
import traceback
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
    """Process ``rank`` of ``count``. Several communicate within :func:`joined`, a single one needs nothing.

    Every rank must call a collective method: all but :meth:`device`, :meth:`local_rank`, :meth:`check_parts`.
    """

    rank: int = 0
    count: int = 1

    def device(self, name: "str | torch.device") -> "torch.device":
        """Return this process's device. With several, ``cuda`` and ``auto`` give each its own CUDA device.

        Raises:
            InputError: the name is unknown, the device cannot be used on this machine, or torchrun did not
                start this process.
        """
        import torch

        if self.count == 1 or str(name) not in ("auto", "cuda"):
            return resolve_device(name)
        if str(name) == "auto" and not torch.cuda.is_available():
            return torch.device("cpu")  # processes cannot share an MPS device
        local, devices = self.local_rank(), torch.cuda.device_count()
        if 0 < devices <= local:
            raise InputError(f"LOCAL_RANK {local} has no CUDA device. Start at most {devices} per machine")
        return resolve_device(f"cuda:{local}")

    def local_rank(self) -> int:
        """Return the number of this process on its machine.

        Raises:
            InputError: torchrun did not start this process.
        """
        local = os.environ.get("LOCAL_RANK", "missing")
        if not local.isdecimal():
            raise InputError(f"WORLD_SIZE is {self.count} but LOCAL_RANK {local}. Start far with torchrun")
        return int(local)

    def check_parts(self, name: str, parts: int) -> None:
        """Raise an :class:`InputError` unless the ranks can share ``parts``, the setting ``name``, evenly."""
        if parts % self.count:
            raise InputError(f"{name} {parts} must be a multiple of the {self.count} processes")

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order, on every rank."""
        values = [value] * self.count
        if self.count > 1:
            import torch.distributed as dist

            dist.all_gather_object(values, value)
        return values

    def collect(self, call: Callable[..., T], *arguments: Any) -> list[T]:
        """Call on every rank, and return all results, in order, on every rank.

        Raises:
            InputError: the call failed on some rank with an ``InputError``, or, with several processes, with
                an ``OSError``. All ranks raise it.
        """
        if self.count == 1:
            return [call(*arguments)]
        try:
            outcome: tuple[T | None, InputError | None] = call(*arguments), None
        except (InputError, OSError) as error:
            outcome = None, error if isinstance(error, InputError) else InputError(str(error))
        results, errors = zip(*self.gather(outcome))
        if any(errors):
            raise next(filter(None, errors))
        return list(results)

    def first(self, call: Callable[..., T], *arguments: Any) -> T:
        """Call on rank 0 only, and return its result on every rank.

        Raises:
            InputError: the call failed, as in :meth:`collect`. All ranks raise it.
        """
        results = self.collect(lambda: call(*arguments) if self.rank == 0 else None)
        return results[0]  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """Return on every rank whether the flag is true on some rank."""
        if self.count == 1:
            return flag
        import torch
        import torch.distributed as dist

        flags = torch.tensor(flag, dtype=torch.int8)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def check_shared(self, folder: Path) -> None:
        """Raise an :class:`InputError` unless all ranks see the same ``folder``. Creates it if missing."""
        if self.count == 1:
            return
        with contextlib.ExitStack() as stack:

            def probe() -> str:
                folder.mkdir(parents=True, exist_ok=True)
                temporary = tempfile.TemporaryDirectory(dir=folder, prefix=".shared.", suffix=".far")
                return stack.enter_context(temporary)

            if not all(self.gather(os.path.exists(self.first(probe)))):
                raise InputError(f"{folder} differs between processes. Put it on a disk that they share")

    @contextlib.contextmanager
    def alone_in(self, folder: Path) -> Iterator[None]:
        """Keep other commands out of ``folder`` within the block; see :func:`far.files.sole_use`."""
        with contextlib.ExitStack() as stack:
            self.first(lambda: stack.enter_context(sole_use(folder)))
            yield

    def wait(self) -> None:
        """Return when all ranks have called this."""
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier()


def started_by_torchrun() -> Processes:
    """Return the rank and count that torchrun set in the environment; without torchrun, a single process.

    Raises:
        InputError: the environment has other values than torchrun sets.
    """
    rank, count = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise InputError(f"RANK {rank!r} and WORLD_SIZE {count!r} are not torchrun's. Unset them")
    return Processes(int(rank), int(count))


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Connect the processes that torchrun started, so that they can communicate within the block.

    Raises:
        InputError: a variable of torchrun is missing in the environment, or has another value.
    """
    processes = started_by_torchrun()
    if processes.count == 1:
        yield processes
        return
    local = processes.local_rank()
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise InputError(f"WORLD_SIZE is {processes.count}, but {missing[0]} is missing. Start with torchrun")
    import torch
    import torch.distributed as dist

    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)  # torch's engines gather tensors there
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # The other ranks wait while rank 0 evaluates, which may take long.
    dist.init_process_group(backend, timeout=datetime.timedelta(days=2))
    try:
        yield processes
    except BaseException as error:
        # The frames of the error hold DDP's reducers. Freed after the group, they would wait for ended ranks.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        dist.destroy_process_group()


def leave(status: int = 0) -> NoReturn:
    """End the program. One of several processes ends without Python's cleanup.

    FSDP2's threads outlive the process group, and now and then one of them aborts a process that cleans up.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
