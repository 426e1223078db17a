"""A training by two processes of which one is told to end in a step, and the other, which publishes, only while they save."""

import signal
import sys
from pathlib import Path

from slope import Slope, loop
from torch import nn

from far.processes import joined, leave
from far.training.loop import train


class Late(Slope):
    def publish(self, ema: nn.Module, folder: Path, step: int) -> None:
        signal.raise_signal(signal.SIGTERM)


def told(loss):  # type: ignore[no-untyped-def]
    signal.raise_signal(signal.SIGTERM)
    return loss


with joined() as processes:
    train(
        Late({4: told} if processes.rank == 1 else {}),
        loop(micro_batches=2),
        Path(sys.argv[1]),
        processes=processes,
    )
leave()
