"""Training checks of ``benchmarks.gpu``: losses, gradients, optimizer steps and checkpoints."""

import dataclasses
import functools
import itertools
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.gpu_checks import (
    BACKBONES,
    CHANNELS,
    CPU,
    FLOAT32,
    GRID,
    HEAD_CASES,
    Calls,
    check,
    tiny,
    title,
    worst,
)
from far.model import FAR
from far.training.config import LoopConfig
from far.training.log import Meter
from far.training.loop import Trainer


class RandomLatents:
    """Task with random latents from the host and, if ``poison`` is set, NaN losses."""

    discriminator = None

    def __init__(self, model: FAR, device: torch.device, batch: int = 4) -> None:
        self.module, self.device, self.batch_size, self.poison = model, device, batch, False
        self.identity: dict[str, Any] = {}

    def parameter_groups(self, config: LoopConfig) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters()), "lr": config.learning_rate, "weight_decay": 0.0}]

    def batch(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        config = self.module.config
        latents = torch.randn(self.batch_size, config.latent_channels, *config.grid, generator=generator)
        labels = torch.randint(0, config.classes, (self.batch_size,), generator=generator)
        return latents.to(self.device), labels.to(self.device)

    def loss(
        self, step: int, batch: tuple[Tensor, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        found = self.module.loss(*batch, generator, label_drop=0.1, step=step)
        return found.value.mean() * (torch.nan if self.poison else 1.0), {}

    def evaluate(self, ema: nn.Module, folder: Path, step: int) -> dict[str, float]:
        return {}

    def publish(self, ema: nn.Module, folder: Path, step: int, results: dict[str, Any]) -> None:
        pass


def trainer(
    folder: Path,
    device: torch.device,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    kind: str = "shortcut",
    backbone: str = "masked",
) -> Trainer:
    loop = LoopConfig(
        steps=100, batch_size=4, dtype=dtype, device=str(device), warmup_steps=1, learning_rate=1e-3
    )
    return Trainer(RandomLatents(tiny(backbone, kind=kind), device), loop, folder)


def gradient_case(
    device: torch.device, backbone: str, head: dict[str, Any], all_masked: bool
) -> dict[str, Any]:
    """Compare loss and gradients of the same batch."""
    found = []
    for place in (CPU, device):
        model = tiny(backbone, **head)
        if all_masked:
            model.backbone.config = dataclasses.replace(model.backbone.config, mask_ratio_min=0.999)
        model = model.to(place)
        latents = torch.randn(4, CHANNELS, *GRID, generator=torch.Generator().manual_seed(1)).to(place)
        labels, generator = torch.arange(4, device=place), torch.Generator().manual_seed(2)
        loss = model.loss(latents, labels, generator, label_drop=0.1, step=1).value.mean()
        loss.backward()
        gradients = [
            parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None
        ]
        found.append((loss, torch.cat(gradients)))
    return {
        "loss": check(worst(found[1][0], found[0][0]), FLOAT32),
        "gradients": check(worst(found[1][1], found[0][1]), 1e-3),
    }


def steps_case(device: torch.device, steps: int) -> dict[str, Any]:
    """Compare the losses of many optimizer steps, not weights: Adam's first steps are signs of gradients."""
    found: list[Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        for place in (CPU, device):
            run, losses = trainer(Path(folder) / str(len(found)), place), []
            for _ in range(steps):
                meter = Meter()
                run.train_step(meter)
                losses.append(float(meter.values["loss"][0]))
            found.append(torch.tensor(losses))
    return {"losses": check(worst(found[1], found[0]), 1e-2)}


def checkpoint_case(device: torch.device) -> dict[str, Any]:
    """Check that a checkpoint of one device restores the same state on the other, bit for bit."""
    found = {}
    for source, target in ((CPU, device), (device, CPU)):
        with tempfile.TemporaryDirectory() as folder:
            saved, loaded = trainer(Path(folder), source), trainer(Path(folder), target)
            saved.train_step(Meter())
            saved.save()
            loaded.restore(resume=True)
            ours, theirs = loaded._tensors(), saved._tensors()
            differing = [
                name
                for name in theirs
                if name not in ours or not torch.equal(ours[name].cpu(), theirs[name].cpu())
            ]
            found[f"{source.type} to {target.type}, differing tensors"] = check(len(differing), 0)
    return found


def nan_case(device: torch.device) -> dict[str, Any]:
    """Check that a NaN loss changes no weight, halves float16's scale, and lets later steps continue."""
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(Path(folder), device, "float16")
        run.train_step(Meter())
        before, scale = (
            {name: tensor.clone() for name, tensor in run.module.state_dict().items()},
            run.scaler.get_scale(),
        )
        run.task.poison = True  # type: ignore[attr-defined]
        run.train_step(Meter())
        changed = [
            name for name, tensor in run.module.state_dict().items() if not torch.equal(tensor, before[name])
        ]
        halved = run.scaler.get_scale() / scale
        run.task.poison = False  # type: ignore[attr-defined]
        for _ in range(20):  # the initial scale may still be too large
            run.train_step(Meter())
        moved = [
            name for name, tensor in run.module.state_dict().items() if not torch.equal(tensor, before[name])
        ]
    return {
        "changed tensors": check(len(changed), 0), "factor of the scale": check(halved, 0.5),
        "tensors that stay as they were later": check(len(before) - len(moved), len(before) / 2),
    }  # fmt: skip


def training(device: torch.device, small: bool) -> Calls:
    calls: Calls = {}
    for backbone, head in itertools.product(BACKBONES, HEAD_CASES[:5] if small else HEAD_CASES):
        calls[f"{backbone} {title(head)}"] = functools.partial(gradient_case, device, backbone, head, False)
    calls["everything masked"] = functools.partial(
        gradient_case, device, "masked", {"kind": "shortcut"}, True
    )
    calls["steps"] = functools.partial(steps_case, device, 5 if small else 20)
    calls["checkpoints"] = functools.partial(checkpoint_case, device)
    calls["a NaN"] = functools.partial(nan_case, device)
    return calls
