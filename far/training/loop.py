"""The training loop that autoencoder, generator and distilled head share.

The loop owns optimizer, learning rate, EMA and checkpoints. A :class:`Task` provides module, batches, loss
and evaluation. A step consists of micro-batches. Every random draw of micro-batch p comes from a generator
seeded by (seed, p), so a resumed run repeats an uninterrupted one, and several processes repeat a single one.
"""

import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from far.compiling import compile_blocks
from far.config import to_dict
from far.devices import device_title, has_fast_bfloat16, resolve_training_dtype
from far.errors import InputError, NotFiniteError
from far.files import remove_leftovers
from far.interrupt import DeferredInterrupt, Interrupted
from far.processes import Processes
from far.seeds import seed_all
from far.training.activations import checkpoint_activations
from far.training.checkpoint import named_tensors, newest_values, open_checkpoint, save_checkpoint
from far.training.config import LoopConfig
from far.training.determinism import deterministic_algorithms
from far.training.ema import Ema
from far.training.estimate import size_line
from far.training.log import Meter, TrainingLog
from far.training.parallel import gradients_together, replicate, shard, whole, whole_copy
from far.training.prefetch import MicroBatch, micro_batches
from far.training.runs import check_unused, checkpoints_folder, list_checkpoints
from far.training.schedule import learning_rate_scale


class Task(Protocol):
    """A module to train, with its data, loss and evaluation."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Values that a resumed checkpoint must share: fingerprints, and class names under ``classes``."""

    @property
    def module(self) -> nn.Module:
        """The module whose parameters are trained."""

    @property
    def discriminator(self) -> nn.Module | None:
        """A second network that the loss trains, without EMA and gone from the published model, or None."""

    def parameter_groups(self, config: LoopConfig) -> list[dict[str, Any]]:
        """Return groups for AdamW, each with ``lr`` and ``weight_decay``."""

    def batch(self, number: int, generator: torch.Generator) -> Any:
        """Read micro-batch ``number``, counted from the run's start, possibly in a thread of its own.

        The time that the training waits for it is logged as the loader's.
        """

    def loss(self, step: int, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss, and named scalars to log; a NaN is not logged."""

    def evaluate(self, ema: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Return figures of the EMA weights on held-out data. May write sample sheets into ``folder``.

        After a :class:`NotFiniteError`, which early weights can cause, training continues.
        """

    def publish(self, ema: nn.Module, folder: Path, step: int, results: dict[str, Any]) -> None:
        """Write the EMA weights after ``step`` steps in the form that other commands load.

        ``results`` are the newest evaluation's figures and ``step``; empty before the first one.
        """


def train(
    task: Task, config: LoopConfig, folder: Path, *, resume: bool = False, processes: Processes = Processes()
) -> dict[str, Any]:
    """Train until ``config.steps``, and return the figures of the last evaluation with its ``step``.

    ``folder`` receives ``checkpoints/``, ``log.jsonl``, the published model, and the task's sample sheets.
    With several ``processes``, each has a task of its own, and rank 0 writes.

    Raises:
        InputError: the folder holds a run and ``resume`` is false, another command is writing to it, too many
            losses in a row are not finite, the processes cannot share the micro-batches evenly, they do not
            see the same folder, or an operation is not ``deterministic``.
        Interrupted: Ctrl-C or SIGTERM arrived. A checkpoint of the finished steps is saved.
    """
    trainer = Trainer(task, config, folder, processes)
    with processes.alone_in(folder), deterministic_algorithms(trainer.config.deterministic):
        trainer.restore(resume)
        trainer.run()
    return trainer.results


def resolve_loop(
    config: LoopConfig, folder: Path | None = None, processes: Processes = Processes()
) -> LoopConfig:
    """Replace ``auto`` by this machine's device and the dtype that suits it. All ranks take rank 0's dtype.

    In the ``folder`` of a run to resume, ``auto`` keeps the dtype of its newest checkpoint.

    Raises:
        InputError: the device cannot be used here.
    """
    device, dtype = processes.device(config.device), config.dtype
    if dtype == "auto" and folder is not None:
        dtype = newest_values(checkpoints_folder(folder)).get("dtype", "auto")
    dtype = processes.first(resolve_training_dtype, dtype, device)
    return dataclasses.replace(config, device=str(device), dtype=dtype)


def published(config: Any) -> dict[str, Any]:
    """Return all values of a task's config as a model stores them: the device's kind without its number."""
    values = to_dict(config)
    values["training"]["device"] = torch.device(config.training.device).type
    return values


class Losses(nn.Module):
    """A task's losses as a module, the form that DistributedDataParallel wraps."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task, self.module, self.discriminator = task, task.module, task.discriminator

    def forward(self, step: int, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return self.task.loss(step, batch, generator)


class Trainer:
    """State of a run: module, EMA, optimizer, float16's loss scale, step counts and the newest results."""

    def __init__(
        self, task: Task, config: LoopConfig, folder: Path, processes: Processes = Processes()
    ) -> None:
        processes.check_parts("micro_batches", config.micro_batches)
        config = resolve_loop(config, folder, processes)
        self.task, self.config, self.folder, self.processes = task, config, folder, processes
        self.checkpoints = checkpoints_folder(folder)
        self.module, self.discriminator = task.module.to(config.device).train(), task.discriminator
        self.ema = Ema(self.module, config.ema_decay)
        if config.compile:  # neither in the average, which is evaluated
            compile_blocks(self.module, checkpointed=config.checkpoint_activations)
        if config.checkpoint_activations:
            checkpoint_activations(self.module)
        self.losses: nn.Module = Losses(task)
        if processes.count > 1 and config.parallel == "fsdp":
            self.losses = shard(self.losses, self.module, self.ema.module)
        elif processes.count > 1:
            self.losses = replicate(self.losses)
        self.optimizer = torch.optim.AdamW(task.parameter_groups(config), betas=(0.9, 0.95), fused=True)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        # Small gradients underflow in float16, those of a scaled loss do not.
        self.device = torch.device(config.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.dtype == "float16")
        self.step, self.skipped_steps, self.skipped_in_a_row = 0, 0, 0
        self.results: dict[str, Any] = {}
        self.resumed_dtype: str | None = None

    def restore(self, resume: bool) -> None:
        """Load the newest checkpoint, or check that no checkpoint would be overwritten."""
        self.processes.collect(check_unused, self.folder, resume)
        self.processes.check_shared(self.folder)
        existing = self.processes.first(self._clean_up)
        if existing:
            saved = open_checkpoint(existing[-1][1], self.processes)
            saved.check_identity(self.task.identity)
            self._allocate_moments(saved.shapes)
            saved.fill(self._tensors(), self.processes)
            if saved.values["scaler"]:  # empty unless that run was in float16
                self.scaler.load_state_dict({**self.scaler.state_dict(), **saved.values["scaler"]})
            self.step, self.resumed_dtype = saved.step, saved.values["dtype"]
            self.skipped_steps, self.skipped_in_a_row = saved.values["skipped"]
            self.results = saved.values.get("results", {})

    def _clean_up(self) -> list[tuple[int, Path]]:
        """Remove files that a killed run left half-written, and return the checkpoints."""
        remove_leftovers(self.folder, self.checkpoints, self.folder / "samples", idle_seconds=0)
        return list_checkpoints(self.checkpoints)

    def _tensors(self) -> dict[str, Tensor]:
        """Return all tensors that training changes, by name. Writing into them changes the run."""
        modules = {"module": self.module, "ema": self.ema.module}
        if self.discriminator is not None:
            modules["discriminator"] = self.discriminator
        states = {name: module.state_dict() for name, module in modules.items()}
        return named_tensors({**states, "optimizer": self.optimizer.state_dict()["state"]})

    def _allocate_moments(self, shapes: dict[str, list[int]]) -> None:
        """Create the optimizer state that a checkpoint holds. AdamW creates it when first used."""
        parameters = itertools.chain(*(group["params"] for group in self.optimizer.param_groups))
        for number, parameter in enumerate(parameters):
            if f"optimizer.{number}.step" in shapes:
                state = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                state["step"] = torch.zeros((), device=parameter.device)
                self.optimizer.state[parameter] = state

    def save(self) -> None:
        """Publish the EMA weights, then write a checkpoint of the finished steps. All ranks take part."""
        self.processes.first(lambda: self.checkpoints.mkdir(parents=True, exist_ok=True))  # see check_unused
        ema = whole_copy(self.ema.module, kept=self.processes.rank == 0)
        self.processes.first(self.task.publish, ema, self.folder, self.step, self.results)
        values = {
            "scaler": self.scaler.state_dict(),
            "skipped": (self.skipped_steps, self.skipped_in_a_row),
            "dtype": self.config.dtype,
            "identity": dict(self.task.identity),
            "results": self.results,
        }
        save_checkpoint(self.checkpoints, self.step, self._tensors(), values, self.processes)

    def evaluate(self, log: TrainingLog) -> None:
        """Evaluate the EMA weights on rank 0, and log the figures. All ranks take part."""
        ema = whole_copy(self.ema.module, kept=self.processes.rank == 0)

        def figures() -> dict[str, float] | None:
            try:
                return self.task.evaluate(ema, self.folder, self.step)
            except NotFiniteError as error:  # early weights can do that, and recover
                tqdm.write(f"far: warning: no evaluation at step {self.step}: {error}", file=sys.stderr)
                return None

        if (found := self.processes.first(figures)) is not None:
            self.results = {"step": self.step, **found}
            log.write(self.results)

    def run(self) -> None:
        """Train until ``config.steps``. Log, evaluate and save at the intervals of the config and at the end.

        Raises:
            Interrupted: a signal arrived. The finished steps are saved.
            InputError: ``max_skipped_steps`` in a row were not finite.
        """
        config, meter = self.config, Meter()
        if self.step >= config.steps:
            self._print(f"{self.folder} is already trained to step {self.step}. Raise the recipe's steps")
            return
        self._print(f"{self._machine()}\n{self._size()}")
        log = TrainingLog(self.folder, config, self.step, self.processes)
        finishing = "finishing this step, and evaluating if that is due, then saving"
        interruption = DeferredInterrupt(finishing, rank=self.processes.rank, count=self.processes.count)
        with log, interruption as interrupt:
            evaluated = saved = self.step
            while self.step < config.steps and not self._stopped(interrupt):
                self.train_step(meter)
                log.advance()
                if self._due(config.log_every, self.step - 1):
                    self._report(meter, log)
                # Skipped steps may mean divergence: keep the last good checkpoint until a step succeeds.
                settled = self.skipped_in_a_row == 0 or self.step == config.steps
                if settled and self._due(config.evaluate_every, evaluated):
                    with log.doing("evaluating"):
                        self.evaluate(log)
                    evaluated = self.step
                # Save last: a resumed run starts after this step, so logging and evaluation must be finished.
                if settled and self._due(config.checkpoint_every, saved):
                    with log.doing("saving"):
                        self.save()
                    saved = self.step
            if saved < self.step:
                with log.doing("saving"):
                    self.save()
            # Wait for all ranks before signals end processes again.
            signum = max(self.processes.gather(interrupt.signum or 0))
        if self.step < config.steps:
            self._print(f"interrupted at step {self.step}, saved in {self.checkpoints}. Resume with --resume")
            raise Interrupted(signum)

    def _stopped(self, interrupt: DeferredInterrupt) -> bool:
        """Return whether a rank was interrupted. After a skipped step, a later step must succeed first."""
        return self.skipped_in_a_row == 0 and self.processes.any(interrupt.requested)

    def _due(self, every: int, done: int) -> bool:
        """Return whether a multiple of ``every``, or the last step, was reached after step ``done``."""
        return self.step // every > done // every or self.step == self.config.steps

    def _report(self, meter: Meter, log: TrainingLog) -> None:
        entry = {
            "step": self.step,
            **meter.read(self.processes),
            "learning_rate": self.config.learning_rate * learning_rate_scale(self.config, self.step - 1),
            "skipped_steps": self.skipped_steps,
            "device": self.device.type,
            "dtype": self.config.dtype,
        }
        skipped = f", skipped {self.skipped_steps}" if self.skipped_steps else ""
        log.show(f"loss {entry.get('loss', math.nan):.4f}, {entry['images_per_second']:.0f} img/s{skipped}")
        log.write(entry)

    def _print(self, line: str) -> None:
        if self.processes.rank == 0:
            print(line)

    def _machine(self) -> str:
        config, device = self.config, self.device
        line = f"{self.folder}: training on {device_title(device)} in {config.dtype}"
        if self.resumed_dtype not in (None, config.dtype):
            line += f", up to step {self.step} in {self.resumed_dtype}"
        if config.dtype == "bfloat16" and not has_fast_bfloat16(device):
            line += ", which may be slow on this device: float32 may take a fraction of the time"
        return line

    def _size(self) -> str:
        modules = [self.module, *([] if self.discriminator is None else [self.discriminator])]
        trained = itertools.chain(*(group["params"] for group in self.optimizer.param_groups))
        return f"{self.folder}: {size_line(modules, self.ema.module, trained)}"

    def train_step(self, meter: Meter) -> None:
        """Take one optimizer step and one EMA step, or skip both if the loss or its gradient is not finite.

        Raises:
            InputError: ``max_skipped_steps`` in a row were skipped.
        """
        config = self.config
        self.optimizer.zero_grad()
        numbers = self._numbers(self.step)
        logged = [
            self._accumulate(number, len(numbers), meter, together=number == numbers[-1])
            for number in numbers
        ]
        start = time.perf_counter()
        scale = learning_rate_scale(config, self.step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"] = peak * scale
        self.scaler.unscale_(self.optimizer)
        networks = [self.module] if self.discriminator is None else [self.module, self.discriminator]
        norms = [
            whole(nn.utils.clip_grad_norm_(each.parameters(), config.gradient_clip)).to(self.device)
            for each in networks  # without gradients yet, a discriminator's norm is a zero on the CPU
        ]
        # The only value that a step reads from a GPU.
        finite = bool(torch.stack([*norms, *(values["loss"] for values in logged)]).isfinite().all())
        # Gradients are averaged over ranks but losses are local, so ranks must agree before skipping.
        if self.processes.any(not finite):
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
        else:
            self.optimizer.step()
            self.ema.update(self.module, self.step)
            self.skipped_in_a_row = 0
            for values in logged:
                meter.add_values({**values, "gradient_norm": norms[0]})
        self.scaler.update()
        self.step += 1
        meter.add_time(config.batch_size, 0.0, time.perf_counter() - start)
        if self.skipped_in_a_row >= config.max_skipped_steps:
            raise InputError(self._diverged(scale))

    def _numbers(self, step: int) -> range:
        """Return the numbers of this rank's micro-batches of a step."""
        parts = self.config.micro_batches // self.processes.count
        first = step * self.config.micro_batches + self.processes.rank * parts
        return range(first, first + parts)

    @functools.cached_property
    def _batches(self) -> Iterator[MicroBatch]:
        """This rank's micro-batches from the step at which this is first read."""
        numbers = itertools.chain.from_iterable(map(self._numbers, itertools.count(self.step)))
        # A CPU has no time to spare for a thread.
        ahead = self.device.type == "cuda"
        return micro_batches(self.task.batch, numbers, self.config.seed, self.device, ahead=ahead)

    def _accumulate(self, number: int, parts: int, meter: Meter, *, together: bool) -> dict[str, Tensor]:
        """Add the gradient of micro-batch ``number``, one of this rank's ``parts``; return the values to log.

        With the last one, ``together``, gradients are averaged over ranks.
        """
        config = self.config
        # Dropout draws from the device's default generator. Seed it, so a step depends on its number only.
        seed_all(number, config.seed)
        start = time.perf_counter()
        batch, generator = next(self._batches)
        loaded = time.perf_counter()
        with gradients_together(self.losses, together):
            dtype = getattr(torch, config.dtype)
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                loss, values = self.losses(self.step, batch, generator)
            self.scaler.scale(loss / parts).backward()
        meter.add_time(0, loaded - start, time.perf_counter() - start)
        return {"loss": loss.detach(), **values}

    def _diverged(self, scale: float) -> str:
        existing = list_checkpoints(self.checkpoints)
        checkpoint = existing[-1][1] if existing else "none"
        remedy = " or take dtype bfloat16" if self.config.dtype == "float16" else ""
        return (
            f"the loss or its gradient was not finite in {self.skipped_in_a_row} steps in a row, up to step "
            f"{self.step} (learning rate {self.peaks[0] * scale:.3g}, last good checkpoint: {checkpoint}). "
            f"Lower the learning rate{remedy}, then add --resume"
        )
