"""A process that ``benchmarks.cluster --measure`` starts: measures training steps of random latents.

    python -m benchmarks.cluster_process far-b IMAGES PARALLEL MICRO_BATCHES STEPS [checkpointed]

A step has MICRO_BATCHES of IMAGES per process. Everything is masked, so that all steps are equal. Prints as
JSON the largest rise of the first process's memory in bytes, and the seconds of the steps.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, Literal, cast
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cluster import TINY
from benchmarks.cluster_measured import models
from far.model import FAR, ModelConfig
from far.processes import joined, leave
from far.training.config import LoopConfig
from far.training.generator import GeneratorTask
from far.training.log import Meter
from far.training.loop import Trainer


class RandomLatents:
    """Task that trains a generator on noise. See :class:`far.training.loop.Task`."""

    discriminator = None
    parameter_groups = GeneratorTask.parameter_groups

    def __init__(self, config: ModelConfig, images: int) -> None:
        self.module, self.images = FAR(config), images

    def batch(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        config = self.module.config
        latents = torch.randn(self.images, config.latent_channels, *config.grid, generator=generator)
        return latents, torch.zeros(self.images, dtype=torch.long)

    def loss(
        self, step: int, batch: tuple[Tensor, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.module.loss(*batch, generator, label_drop=0.1, step=step).value.mean(), {}


def memory_of_this_process(field: str) -> int:
    """Return ``VmRSS`` (resident memory) or ``VmHWM`` (its peak) in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    name, parallel = sys.argv[1], cast(Literal["ddp", "fsdp"], sys.argv[3])
    images, micro_batches, steps = (int(sys.argv[place]) for place in (2, 4, 5))
    with joined() as processes, mock.patch("far.backbone.masked.sample_mask_ratio", return_value=1.0):
        parts = processes.count * micro_batches
        config = LoopConfig(
            steps=steps,
            batch_size=parts * images,
            micro_batches=parts,
            parallel=parallel,
            checkpoint_activations="checkpointed" in sys.argv,
        )

        def trainer_of(model: ModelConfig) -> Trainer:
            # The task is never saved or evaluated.
            return Trainer(cast(Any, RandomLatents(model, images)), config, Path("nowhere"), processes)

        # The first step of a process loads libraries, which are not the model's memory.
        trainer_of(TINY).train_step(Meter())
        before = memory_of_this_process("VmRSS")
        trainer = trainer_of(models()[name][0])
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            trainer.train_step(Meter())
            seconds.append(time.perf_counter() - start)
        if processes.rank == 0:
            print(json.dumps({"bytes": memory_of_this_process("VmHWM") - before, "seconds": seconds}))


if __name__ == "__main__":
    main()
    leave()
