"""Distillation: a few-step head learns the trajectories of a trained model's head (``trajectories.py``).

The backbone stays frozen, and its conditions are read from disk, unless low-rank adapters tune it.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from far.data.shards import ShardReader
from far.devices import to_device
from far.heads import Condition, FlowMapConfig
from far.heads.flow_map import FlowMapHead
from far.model import FAR
from far.pipeline import Pipeline
from far.seeds import seeded
from far.training.adapters import adapters, add_adapters, merged
from far.training.config import GROUP, DistillationConfig, LoopConfig
from far.training.epochs import epoch_rows
from far.training.loop import published, resolve_loop
from far.training.sample_sheet import write_sample_sheet
from far.training.trajectories import POINTS

# The inputs of an adapted backbone. Without adapters its z is read instead.
_BACKBONE_INPUTS = ("tokens", "order", "known", "query", "labels")


class DistillationTask:
    """Task of ``far distill``; see :class:`far.training.loop.Task`.

    Args:
        teacher: the model to distill.
        config: trajectories and training.
        trajectories: folder that :func:`far.training.trajectories.write_trajectories` filled.

    Raises:
        InputError: the trajectories are missing, incomplete or damaged.
    """

    discriminator = None

    def __init__(self, teacher: Pipeline, config: DistillationConfig, trajectories: Path) -> None:
        config = dataclasses.replace(config, training=resolve_loop(config.training))
        self.teacher, self.config = teacher, config
        self.rows = ShardReader(trajectories, "trajectories", verify=True)
        self.identity = {
            "teacher": self.rows.meta.get("teacher"),
            "classes": teacher.classes,
            "trajectories": self.rows.digest[:16],
        }
        self.groups = len(self.rows) // GROUP - 1  # the last one is held out
        self.module = _student(teacher.model, config)
        if config.adapter_rank:
            with seeded(config.training.seed):
                add_adapters(self.module.backbone, config.adapter_rank)

    def parameter_groups(self, config: LoopConfig) -> list[dict[str, Any]]:
        """Return groups of the head, which may have its own learning rate, and of the adapters, if any."""
        rate, head_rate = config.learning_rate, config.head_learning_rate or config.learning_rate
        groups = [
            {"params": list(self.module.head.parameters()), "lr": head_rate},
            {"params": adapters(self.module.backbone), "lr": rate},
        ]
        return [{**group, "weight_decay": config.weight_decay} for group in groups if group["params"]]

    def batch(self, number: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the rows of whole groups; see :func:`far.training.trajectories.write_trajectories`."""
        loop = self.config.training
        return self._read(epoch_rows(number, loop.micro_batch_size // GROUP, self.groups, loop.seed))

    def _read(self, groups: Tensor) -> dict[str, Tensor]:
        rows = (groups.unsqueeze(1) * GROUP + torch.arange(GROUP)).flatten()
        names = ["paths", "scale", *(_BACKBONE_INPUTS if self.config.adapter_rank else ("z",))]
        tensors = {name: self.rows.rows(name, rows) for name in names}
        tensors = {name: each.float() if each.is_floating_point() else each for name, each in tensors.items()}
        # The counts of known tokens become shapes, so they stay on the CPU.
        return {
            name: each if name == "known" else to_device(each, self.teacher.device)
            for name, each in tensors.items()
        }

    def loss(
        self, step: int, batch: dict[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the squared error of the mean velocity between two random points of each trajectory."""
        head = self.module.head
        assert isinstance(head, FlowMapHead)
        paths, scale = batch["paths"].flatten(0, 1), batch["scale"].flatten()
        z = self._conditions(self.module, batch).flatten(0, 1)
        spans = draw_spans((self.config.samples_per_token, len(paths)), generator)
        start, end = (to_device(points, paths.device) for points in spans)
        s, t = start / (POINTS - 1), end / (POINTS - 1)
        token = torch.arange(len(paths), device=paths.device)
        x, goal = paths[token, start], paths[token, end]
        target = (goal - x) / (t - s).unsqueeze(-1)
        return (head.mean_velocity(x, s, t, z, scale) - target).square().mean(), {}

    def _conditions(self, module: FAR, batch: dict[str, Tensor]) -> Tensor:
        """Return ``z [b, m, width]``: as read, or from the adapted backbone, one group at a time."""
        if not self.config.adapter_rank:
            return batch["z"]
        module.backbone.eval()  # no dropout: the trajectories were computed without
        groups = zip(*(batch[name].split(GROUP) for name in _BACKBONE_INPUTS))
        z = [
            module.backbone(tokens, order[:, : int(known[0])], query, labels)
            for tokens, order, known, query, labels in groups
        ]
        return torch.cat(z)

    @torch.no_grad()
    def evaluate(self, ema: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Return RMS errors of 1, 2 and 4 steps on held-out trajectories, and write a sample sheet."""
        assert isinstance(ema, FAR)
        assert isinstance(ema.head, FlowMapHead)
        batch = self._read(torch.tensor([self.groups]))
        z, noise, end = self._conditions(ema, batch), batch["paths"][..., 0, :], batch["paths"][..., -1, :]
        figures: dict[str, float] = {}
        for steps in (1, 2, 4):
            drawn = ema.head.sampler(steps, noise)(
                Condition(z, scale=batch["scale"].unsqueeze(-1)), lambda: noise, 1.0
            )
            figures[f"error of {steps} steps"] = math.sqrt(float((drawn - end).square().mean()))
        pipeline = self._pipeline(ema)
        if pipeline.autoencoder is not None:
            labels = sorted(number % len(pipeline.classes) for number in range(64))
            write_sample_sheet(pipeline, labels, folder, step)
        return figures

    def publish(self, ema: nn.Module, folder: Path, step: int, results: dict[str, Any]) -> None:
        """Write the EMA weights as a pipeline folder, with merged adapters."""
        pipeline = self._pipeline(ema)
        pipeline.results = results
        pipeline.training = {
            "command": "far distill",
            "finished steps": step,
            "recipe": published(self.config),
            "teacher": self.teacher.training,
        }
        pipeline.save_pretrained(folder)

    def _pipeline(self, ema: nn.Module) -> Pipeline:
        assert isinstance(ema, FAR)
        teacher, defaults = self.teacher, self.teacher.defaults
        # The student's head has learned guidance, so one pass of the backbone suffices.
        guidance = min(defaults.guidance, self.config.trajectories.max_guidance)
        defaults = dataclasses.replace(defaults, head_steps=2, guidance=guidance, guidance_passes=None)
        return Pipeline(merged(ema), teacher.autoencoder, teacher.classes, defaults)


def _student(teacher: FAR, config: DistillationConfig) -> FAR:
    """Return the teacher's backbone, frozen, with an untrained flow-map head of the teacher's size."""
    size, guidance = teacher.config.network.head, config.trajectories.max_guidance
    head = FlowMapConfig(size.width, size.depth, max(2, config.samples_per_token), max_guidance=guidance)
    network = dataclasses.replace(teacher.config.network, head=head)
    with seeded(config.training.seed):
        student = FAR(dataclasses.replace(teacher.config, network=network))
    student.backbone.load_state_dict(teacher.backbone.state_dict())
    student.backbone.requires_grad_(False)
    return student


def draw_spans(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return first and last points of steps along trajectories: a uniform length, then a uniform start."""
    length = torch.randint(1, POINTS, shape, generator=generator)
    start = (torch.rand(shape, generator=generator) * (POINTS - length)).long()
    return start, start + length
