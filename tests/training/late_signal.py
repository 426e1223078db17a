"""Train in two processes. One receives SIGTERM in a step, the other one, which publishes, while they save."""

import signal
import sys
from pathlib import Path

from slope import Slope, loop
from torch import nn

from far.interrupt import Interrupted
from far.processes import joined, leave
from far.training.loop import train


class Late(Slope):
    def publish(self, ema: nn.Module, folder: Path, step: int, results: dict) -> None:
        signal.raise_signal(signal.SIGTERM)


def terminated(loss):  # type: ignore[no-untyped-def]
    signal.raise_signal(signal.SIGTERM)
    return loss


with joined() as processes:
    task = Late({4: terminated} if processes.rank == 1 else {})
    try:
        train(task, loop(micro_batches=2), Path(sys.argv[1]), processes=processes)
    except Interrupted as interruption:
        print(f"status {interruption.status}", flush=True)
leave()
