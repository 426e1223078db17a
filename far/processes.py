"""Processes that torchrun started together: which one this is, and what they tell each other.

How work is shared among them is for those who share it: ``far.evaluation.extraction``, ``far.training.loop``.
"""

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Processes:
    """Process ``rank`` of ``count``. What they tell each other needs :func:`joined`; one alone needs nothing."""

    rank: int = 0
    count: int = 1

    def device(self, name: str) -> str:
        """The device of this process: of several, ``cuda`` is each one's own."""
        return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and self.count > 1 else name

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, in every one."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process, in every one."""
        if self.count == 1:
            return flag
        found = torch.tensor(flag, dtype=torch.int8)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


def started_by_torchrun() -> Processes:
    """What torchrun says of this process; without it, one alone."""
    return Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """The processes that torchrun started, able to talk to each other within the block."""
    processes = started_by_torchrun()
    if processes.count == 1:
        yield processes
        return
    if (local := int(os.environ["LOCAL_RANK"])) < torch.cuda.device_count():
        torch.cuda.set_device(local)  # where torch's engines keep what they put together
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # Some wait while one judges images, which may take long.
    dist.init_process_group(backend, timeout=datetime.timedelta(days=2))
    try:
        yield processes
    finally:
        dist.destroy_process_group()
