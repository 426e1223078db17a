"""The smallest task. Its losses can be made invalid at chosen steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from far.training.config import LoopConfig
from far.training.log import Meter
from far.training.loop import Trainer


class Slope:
    """Task that lowers the outputs of a linear map, whose bias always has the gradient ``factor``.

    ``faults`` change the loss at their steps.
    """

    def __init__(
        self, faults: dict[int, Callable[[Tensor], Tensor]] | None = None, factor: float = 0.5
    ) -> None:
        torch.manual_seed(0)
        self.module, self.discriminator = nn.Linear(4, 2), None
        self.identity: dict[str, Any] = {}
        self.faults, self.factor = faults or {}, factor
        self.evaluated: list[int] = []

    def parameter_groups(self, config: LoopConfig) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters()), "lr": config.learning_rate, "weight_decay": 0.1}]

    def batch(self, step: int, generator: torch.Generator) -> Tensor:
        return torch.randn(8, 4, generator=generator)

    def loss(self, step: int, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.factor * self.module(batch).float().mean(dim=0).sum()
        if step in self.faults:
            loss = self.faults[step](loss)
        return loss, {"copy": loss.detach()}

    def evaluate(self, ema: nn.Module, folder: Path, step: int) -> dict[str, float]:
        self.evaluated.append(step)
        return {}

    def publish(self, ema: nn.Module, folder: Path, step: int, results: dict[str, Any]) -> None:
        pass


def nan_loss(loss: Tensor) -> Tensor:
    return loss * torch.nan


def infinite_loss(loss: Tensor) -> Tensor:
    return loss + torch.inf


def infinite_gradient(loss: Tensor) -> Tensor:
    """Return the value itself, by a square root whose slope at zero is infinite."""
    return loss.detach() + (loss - loss.detach()).sqrt()


def loop(**values: Any) -> LoopConfig:
    usual = {
        "steps": 12,
        "batch_size": 8,
        "learning_rate": 0.01,
        "warmup_steps": 1,
        "dtype": "float32",
        "log_every": 5,
    }
    return LoopConfig(**{**usual, **values})


def run_steps(trainer: Trainer, count: int) -> Meter:
    meter = Meter()
    for _ in range(count):
        trainer.train_step(meter)
    return meter
