"""One training loop for the autoencoder and for the generator.

It owns the optimizer, the schedule, the EMA, checkpoints, the log and the progress bar. What is
trained, on which batches, with which loss and how it is judged is a :class:`Task`. A step is made of
micro-batches, and every random draw of the p-th of them comes from a generator seeded by (seed, p), so a
resumed run repeats an uninterrupted one, and processes that share the micro-batches repeat one alone.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from far.classes import check_same_classes
from far.config import to_dict
from far.devices import device_title, has_bfloat16_products, resolve_training_dtype
from far.errors import InputError, NotFiniteError
from far.files import atomic_path, remove_leftovers
from far.interrupt import DeferredInterrupt
from far.processes import Processes
from far.seeds import seed_all, seeded_generator
from far.training.checkpoint import named_tensors, newest_values, open_checkpoint, save_checkpoint
from far.training.config import LoopConfig
from far.training.ema import Ema
from far.training.parallel import gradients_together, replicate, shard, whole, whole_copy
from far.training.runs import check_unused, checkpoints_folder, list_checkpoints


class Task(Protocol):
    """What the loop trains."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a resumed run has to share with its checkpoint: fingerprints of data and networks, and ``classes``, the names."""

    @property
    def module(self) -> nn.Module:
        """The module whose parameters are trained."""

    def parameter_groups(self, config: LoopConfig) -> list[dict[str, Any]]:
        """Groups for AdamW, each with ``lr`` and ``weight_decay``."""

    def batch(self, number: int, generator: torch.Generator) -> Any:
        """Read a micro-batch, by its number since the beginning (its time is reported as the loader's share)."""

    def loss(
        self, step: int, batch: Any, ema: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss and named scalars to log."""

    def evaluate(self, ema: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Judge the EMA weights on held-out data; may write pictures into ``folder``."""

    def publish(self, ema: nn.Module, folder: Path, step: int) -> None:
        """Write the EMA weights in the form that the other commands load, after so many steps."""


def train(
    task: Task, config: LoopConfig, folder: Path, *, resume: bool = False, processes: Processes = Processes()
) -> None:
    """Train until ``config.steps``, or until Ctrl-C, which saves a checkpoint and returns.

    ``folder`` receives ``checkpoints/``, ``log.jsonl``, what the task publishes, and its pictures. Of several ``processes``,
    each with a task of its own, the first writes them.

    Raises:
        InputError: the folder holds a run and ``resume`` is false, another command is writing to it, too many losses in a row are not
            finite, the processes cannot share the micro-batches evenly, or they do not see the same folder.
    """
    trainer = Trainer(task, config, folder, processes)
    with processes.alone_in(folder):
        trainer.restore(resume)
        trainer.run()


def resolve_loop(
    config: LoopConfig, folder: Path | None = None, processes: Processes = Processes()
) -> LoopConfig:
    """Replace ``auto`` by this machine's device and the dtype that suits it; of several ``processes``, all take the first one's.

    Args:
        folder: of a run to resume. ``auto`` keeps the dtype of its newest checkpoint.

    Raises:
        InputError: the device cannot be used here.
    """
    device, dtype = processes.device(config.device), config.dtype
    if dtype == "auto" and folder is not None:
        dtype = newest_values(checkpoints_folder(folder)).get("dtype", "auto")
    dtype = processes.gather(resolve_training_dtype(dtype, device))[0]
    return dataclasses.replace(config, device=str(device), dtype=dtype)


def published(config: LoopConfig) -> dict[str, Any]:
    """Return the values that a model carries: the kind of the device, not its number in one of the processes."""
    return {**to_dict(config), "device": torch.device(config.device).type}


def _check_identity(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: Path) -> None:
    """Raise an :class:`InputError` that names the first difference, unless a checkpoint is of the same data and networks."""
    remedy = "resume with what it was trained on, or choose another folder"
    if "classes" in ours and "classes" in theirs:
        check_same_classes(theirs["classes"], str(path), ours["classes"], "this run's data", remedy)
    for name in ours:
        if name not in theirs:
            raise InputError(
                f"{path} does not say on which {name} it was trained, as an older version wrote it; choose another folder"
            )
        if ours[name] != theirs[name]:
            raise InputError(
                f"{path} was trained with other {name} ({theirs[name]}) than this run has ({ours[name]}); {remedy}"
            )


class Losses(nn.Module):
    """A task's losses as a module, since that is what DistributedDataParallel takes."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task, self.module = task, task.module

    def forward(
        self, step: int, batch: Any, ema: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.task.loss(step, batch, ema, generator)


class Trainer:
    """The state of a run: module, EMA, optimizer, the scale of float16's losses, and the numbers of finished and skipped steps."""

    def __init__(
        self, task: Task, config: LoopConfig, folder: Path, processes: Processes = Processes()
    ) -> None:
        processes.check_parts("micro_batches", config.micro_batches)
        config = resolve_loop(config, folder, processes)
        self.task, self.config, self.folder, self.processes = task, config, folder, processes
        self.module = task.module.to(config.device).train()
        self.ema = Ema(self.module, config.ema_decay)
        self.losses: nn.Module = Losses(task)
        if processes.count > 1:
            self.losses = (
                shard(self.losses, self.module, self.ema.module)
                if config.parallel == "fsdp"
                else replicate(self.losses)
            )
        self.optimizer = torch.optim.AdamW(task.parameter_groups(config), betas=(0.9, 0.95), fused=True)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        # Gradients of float16 fall below its smallest number; those of a scaled loss do not.
        self.scaler = torch.amp.GradScaler(
            torch.device(config.device).type, enabled=config.dtype == "float16"
        )
        self.step, self.skipped_steps, self.skipped_in_a_row = 0, 0, 0
        self.resumed_dtype: str | None = None

    @property
    def checkpoints(self) -> Path:
        return checkpoints_folder(self.folder)

    def restore(self, resume: bool) -> None:
        """Load the newest checkpoint, or make sure that there is none to overwrite."""
        self.processes.collect(check_unused, self.folder, resume)
        if self.first:
            remove_leftovers(self.folder, self.checkpoints, self.folder / "samples", idle_seconds=0)
        self.processes.check_shared(self.folder)
        existing = self.processes.gather(list_checkpoints(self.checkpoints))[0]
        if existing:
            saved = open_checkpoint(existing[-1][1], self.processes)
            _check_identity(self.task.identity, saved.values.get("identity", {}), existing[-1][1])
            self._make_optimizer_state(saved.shapes)
            saved.fill(self._tensors(), self.processes)
            if saved.values.get("scaler"):  # none in runs of another dtype, nor of version 0.1
                self.scaler.load_state_dict({**self.scaler.state_dict(), **saved.values["scaler"]})
            self.step = saved.step
            self.resumed_dtype = saved.values.get("dtype")  # none in runs before 0.2
            self.skipped_steps, self.skipped_in_a_row = saved.values.get("skipped", (0, 0))

    def _tensors(self) -> dict[str, Tensor]:
        """All that training changes, by name; changes in place are taken over."""
        state = self.optimizer.state
        optimizer = {
            number: state[parameter]
            for number, parameter in enumerate(self._parameters())
            if parameter in state
        }
        return named_tensors(
            {"module": self.module.state_dict(), "ema": self.ema.module.state_dict(), "optimizer": optimizer}
        )

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _make_optimizer_state(self, shapes: dict[str, list[int]]) -> None:
        """Room for what a checkpoint has of it: a fresh optimizer has none, and parameters that were not yet needed never had."""
        for number, parameter in enumerate(self._parameters()):
            if f"optimizer.{number}.step" in shapes:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    **moments,
                }

    def save(self) -> None:
        """Publish the EMA weights, and then write a checkpoint of the finished steps; all processes take part."""
        ema = whole_copy(self.ema.module, kept=self.first)
        self.processes.collect(lambda: self.task.publish(ema, self.folder, self.step) if self.first else None)
        values = {
            "scaler": self.scaler.state_dict(),
            "skipped": (self.skipped_steps, self.skipped_in_a_row),
            "dtype": self.config.dtype,
        }
        values["identity"] = dict(self.task.identity)
        save_checkpoint(self.checkpoints, self.step, self._tensors(), values, self.processes)

    def evaluate(self, log: "_Log | None") -> None:
        """Judge the EMA weights; all processes take part, the first one judges."""
        ema = whole_copy(self.ema.module, kept=self.first)

        def judge() -> None:
            if log is not None:
                try:
                    log.write({"step": self.step, **self.task.evaluate(ema, self.folder, self.step)})
                except NotFiniteError as error:  # it may pass, and ends nothing
                    tqdm.write(f"far: warning: no evaluation at step {self.step}: {error}", file=sys.stderr)

        self.processes.collect(judge)

    def run(self) -> None:
        config, saved_at = self.config, self.step
        if self.step >= config.steps:
            if self.first:
                print(
                    f"{self.folder} is already trained to step {self.step}; raise the recipe's steps to go on"
                )
            return
        log = _Log(self.folder, config.tensorboard) if self.first else None
        self.processes.collect(lambda: log.open(self.step) if log is not None else None)
        if self.first:
            print(self._machine())
        bar = _Bar(
            total=config.steps,
            initial=self.step,
            desc=self.folder.name,
            unit="step",
            mininterval=1,
            disable=not self.first,
        )
        finishing = "finishing this step, and evaluating if that is due, then saving"
        interruption = DeferredInterrupt(finishing, rank=self.processes.rank, count=self.processes.count)
        with log or contextlib.nullcontext(), bar, interruption as interrupt:
            meter, save_due, evaluate_due = Meter(), False, False
            # Skipped steps can be the first sign of a run that is lost. Until one is taken again, nothing is saved over what is good.
            while self.step < config.steps and (
                self.skipped_in_a_row or not self.processes.any(interrupt.requested)
            ):
                self.train_step(meter)
                bar.update()
                last = self.step == config.steps
                if self.step % config.log_every == 0 or last:
                    rate = self.optimizer.param_groups[0]["lr"]
                    entry = {
                        "step": self.step,
                        **meter.read(self.processes),
                        "learning_rate": rate,
                        "skipped_steps": self.skipped_steps,
                    }
                    entry |= {"device": torch.device(config.device).type, "dtype": config.dtype}
                    skipped = f", skipped {self.skipped_steps}" if self.skipped_steps else ""
                    bar.show(
                        f"loss {entry.get('loss', math.nan):.4f}, {entry['images_per_second']:.0f} img/s{skipped}"
                    )
                    self.processes.collect(lambda: log.write(entry) if log is not None else None)
                save_due |= self.step % config.checkpoint_every == 0 or last
                evaluate_due |= self.step % config.evaluate_every == 0 or last
                if self.skipped_in_a_row and not last:
                    continue
                if evaluate_due:
                    with bar.doing("evaluating"):
                        self.evaluate(log)
                    meter.restart()
                evaluate_due = False
                # At the end, since a run goes on after its checkpoint: all else of this step must be done by then.
                if save_due:
                    with bar.doing("saving"):
                        self.save()
                    saved_at, save_due = self.step, False
            if saved_at != self.step:
                with bar.doing("saving"):
                    self.save()
            # Until all are here, a signal that reaches some of them later must not end those.
            self.processes.wait()
        if self.step < config.steps and self.first:
            print(f"interrupted at step {self.step}; saved in {self.checkpoints}; --resume goes on")

    def _machine(self) -> str:
        """Return a line that says where and in which dtype this run computes."""
        config, device = self.config, torch.device(self.config.device)
        line = f"{self.folder}: training on {device_title(device)} in {config.dtype}"
        if self.resumed_dtype not in (None, config.dtype):
            line += f", up to step {self.step} in {self.resumed_dtype}"
        if config.dtype == "bfloat16" and not has_bfloat16_products(device):
            line += "; this device has no instructions for it: dtype float32 may be several times faster"
        return line

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.processes.rank == 0

    def learning_rate_scale(self) -> float:
        """The share of the peak learning rate at the current step."""
        config = self.config
        if self.step < config.warmup_steps:
            return (self.step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        progress = (self.step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def train_step(self, meter: "Meter") -> None:
        """One optimizer step and one EMA step; or neither, if the loss or its gradient is not finite.

        Raises:
            InputError: ``max_skipped_steps`` in a row were not.
        """
        config = self.config
        self.optimizer.zero_grad()
        share = config.micro_batches // self.processes.count
        first = self.step * config.micro_batches + self.processes.rank * share
        found = [
            self._accumulate(number, share, meter, together=number + 1 == first + share)
            for number in range(first, first + share)
        ]
        start = time.perf_counter()
        scale = self.learning_rate_scale()
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"] = peak * scale
        self.scaler.unscale_(self.optimizer)
        norm = whole(nn.utils.clip_grad_norm_(self.module.parameters(), config.gradient_clip))
        # The gradient is that of all processes, a loss one's own.
        if self.processes.any(
            not all(torch.isfinite(value) for value in (norm, *(values["loss"] for values in found)))
        ):
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            found = []  # one of them would make the logged means NaN
        else:
            self.optimizer.step()
            self.ema.update(self.module, self.step)
            self.skipped_in_a_row = 0
        self.scaler.update()
        self.step += 1
        for values in found:
            meter.add_values({**values, "gradient_norm": norm})
        meter.add_time(config.batch_size, 0.0, time.perf_counter() - start)
        if self.skipped_in_a_row >= config.max_skipped_steps:
            raise InputError(self._diverged(scale))

    def _accumulate(self, number: int, share: int, meter: "Meter", *, together: bool) -> dict[str, Tensor]:
        """Add the gradient of a micro-batch, one of ``share``; with the last, ``together``, all processes average theirs.

        Returns its loss and the other values to log.
        """
        config = self.config
        generator = seeded_generator(number, config.seed)
        # Dropout can only draw from the device's default generator; seeding all makes a step a function of its number.
        seed_all(number, config.seed)
        start = time.perf_counter()
        batch = self.task.batch(number, generator)
        loaded = time.perf_counter()
        with gradients_together(self.losses, together):
            with torch.autocast(
                torch.device(config.device).type,
                getattr(torch, config.dtype),
                enabled=config.dtype != "float32",
            ):
                loss, values = self.losses(self.step, batch, self.ema.module, generator)
            self.scaler.scale(loss / share).backward()
        meter.add_time(0, loaded - start, time.perf_counter() - start)
        return {"loss": loss.detach(), **values}

    def _diverged(self, scale: float) -> str:
        existing = list_checkpoints(self.checkpoints)
        last = str(existing[-1][1]) if existing else "none"
        remedy = "lower the learning rate" + (
            " or take dtype bfloat16" if self.config.dtype == "float16" else ""
        )
        return (
            f"the loss or its gradient was not finite in {self.skipped_in_a_row} steps in a row, "
            f"up to step {self.step} (learning rate {self.peaks[0] * scale:.3g}); "
            f"last good checkpoint: {last}; {remedy}, then --resume"
        )


class Meter:
    """Means of the logged values, throughput and the loader's share since the last reading."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.images, self.loading, self.seconds = 0, 0.0, 0.0
        self.values: dict[str, list[Tensor]] = {}

    def add_time(self, images: int, loading: float, seconds: float) -> None:
        self.images += images
        self.loading += loading
        self.seconds += seconds

    def add_values(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach())

    def read(self, processes: Processes) -> dict[str, float]:
        """The means over all processes; a value that some have not met is of the others alone."""
        found = processes.gather(
            {name: torch.stack(values).float().tolist() for name, values in self.values.items()}
        )
        names = dict.fromkeys(name for values in found for name in values)
        means = {
            name: statistics.fmean(itertools.chain(*(values.get(name, ()) for values in found)))
            for name in names
        }
        result = {
            **means,
            "images_per_second": self.images / self.seconds,
            "loader_share": self.loading / self.seconds,
        }
        self.restart()
        return result


class _Log:
    """Appends to ``log.jsonl``, and to TensorBoard where asked for."""

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self.path, self.tensorboard = folder / "log.jsonl", tensorboard
        self.board: Any = None

    def open(self, step: int) -> None:
        """Remove what the file says of steps after ``step``: they were not saved, and will be written again."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(line for line in lines if _step(line) <= step), encoding="utf-8")
        if self.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise InputError("tensorboard is not installed; pip install 'far-image[log]'") from error
            self.board = SummaryWriter(str(self.path.with_name("tensorboard")))

    def write(self, entry: dict[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 1), **entry}) + "\n")
        except OSError as error:
            raise InputError(
                f"cannot write {self.path}: {error.strerror}; free some space, then --resume"
            ) from error
        if self.board is not None:
            for name, value in entry.items():
                if isinstance(value, str):
                    continue
                self.board.add_scalar(name, value, entry["step"])

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self.board is not None:
            self.board.close()


def _step(line: str) -> float:
    """The step of a line of ``log.jsonl``; infinity if it is cut off, by a full disk or with the machine, or damaged."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf


class _Bar(tqdm):
    """The bar of a training. Behind it stand the newest figures, or what is done between two steps."""

    figures = ""

    def show(self, figures: str) -> None:
        """Show the newest figures."""
        self.figures = figures
        self.set_postfix_str(figures)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Show what the block does, in place of the figures."""
        self.set_postfix_str(what)
        yield
        self.set_postfix_str(self.figures)


def epoch_rows(number: int, batch_size: int, rows: int, seed: int) -> Tensor:
    """The rows ``[batch_size]`` of a batch, by its number: a stream of permutations of ``range(rows)``, one an epoch."""
    first = number * batch_size
    parts = []
    while batch_size > 0:
        epoch, offset = divmod(first, rows)
        part = _permutation(rows, seed, epoch)[offset : offset + batch_size]
        parts.append(part)
        first += len(part)
        batch_size -= len(part)
    return torch.cat(parts)


@functools.lru_cache(maxsize=2)
def _permutation(rows: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(rows, generator=seeded_generator(epoch, seed))
