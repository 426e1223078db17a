"""Reports of a training: ``log.jsonl``, TensorBoard, progress bar, and the means between two log lines."""

import contextlib
import json
import math
import statistics
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from far.errors import InputError
from far.files import atomic_path
from far.processes import Processes
from far.training.config import LoopConfig
from far.training.estimate import TimeLeft, duration, times_left

# Shorter times left, in seconds, are not announced.
_WORTH_SAYING = 10.0


class Meter:
    """Means of the logged values, throughput and the loader's fraction of the time since the last reading."""

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
        """Return the means over all ranks and restart. A value may be missing or NaN on some ranks."""
        joined: dict[str, list[float]] = {}
        own = {name: torch.stack(values).float().tolist() for name, values in self.values.items()}
        for values in processes.gather(own):
            for name, numbers in values.items():
                joined.setdefault(name, []).extend(number for number in numbers if not math.isnan(number))
        result = {name: statistics.fmean(numbers) for name, numbers in joined.items() if numbers}
        result["images_per_second"] = self.images / self.seconds
        result["loader_share"] = self.loading / self.seconds
        self.restart()
        return result


class TrainingLog:
    """Log file and progress bar of a run that starts or resumes after ``step``. Only rank 0 writes.

    Entering removes lines after ``step`` from ``log.jsonl``: those steps were not saved and will be repeated.
    """

    def __init__(self, folder: Path, config: LoopConfig, step: int, processes: Processes) -> None:
        self.path, self.processes = folder / "log.jsonl", processes
        self.config, self.first_step = config, step
        self.board: Any = None
        self.figures = ""
        self.time_left, self.announced = TimeLeft(config), False

    def __enter__(self) -> "TrainingLog":
        self.processes.first(self._open)
        self.bar = _Bar(
            self.time_left,
            total=self.config.steps, initial=self.first_step, desc=self.path.parent.name, unit="step",
            mininterval=1, disable=self.processes.rank > 0,
        )  # fmt: skip
        self.mark = time.perf_counter()
        return self

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = "".join(line for line in lines if _step(line) <= self.first_step)
            with atomic_path(self.path) as temporary:
                temporary.write_text(kept, encoding="utf-8")
        if self.config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise InputError("tensorboard is not installed. Run pip install 'far-image[log]'") from error
            self.board = SummaryWriter(
                str(self.path.with_name("tensorboard")), purge_step=self.first_step + 1
            )

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.board is not None:
            self.board.close()

    def advance(self) -> None:
        """Count a finished step. Print the estimated time once enough steps have been measured."""
        now = time.perf_counter()
        self.time_left.add_step(now - self.mark)
        self.mark = now
        self.bar.update()
        if not self.announced and self.time_left.measured:
            self.announced = True
            self._announce(self.first_step + self.time_left.steps)

    def _announce(self, step: int) -> None:
        config, seconds = self.config, self.time_left.seconds(step)
        if seconds is None or seconds < _WORTH_SAYING:
            return
        line = f"{self.path.parent}: about {duration(seconds)} to step {config.steps:,}"
        evaluations = times_left(step, config.steps, config.evaluate_every)
        if "evaluating" not in self.time_left.pauses:  # else the seconds count them
            line += f", plus {evaluations} evaluation{'s' if evaluations > 1 else ''}"
        if self.processes.rank == 0:
            self.bar.write(line)

    def show(self, figures: str) -> None:
        """Show the newest figures behind the bar."""
        self.figures = figures
        self.bar.set_postfix_str(figures)

    @contextlib.contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Show what happens between two steps in place of the figures."""
        self.bar.set_postfix_str(activity)
        start = time.perf_counter()
        yield
        self.mark = time.perf_counter()
        self.time_left.add_pause(activity, self.mark - start)
        self.bar.set_postfix_str(self.figures)

    def write(self, entry: dict[str, Any]) -> None:
        """Append a line to ``log.jsonl``, and its numbers to TensorBoard. ``entry`` has a ``step``.

        Raises:
            InputError: the file cannot be written, such as on a full disk.
        """
        self.processes.first(self._write, entry)

    def _write(self, entry: dict[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 1), **entry}) + "\n")
        except OSError as error:
            raise InputError(
                f"cannot write {self.path}: {error.strerror}. Free some space, then add --resume"
            ) from error
        if self.board is not None:
            for name, value in entry.items():
                if not isinstance(value, str):
                    self.board.add_scalar(name, value, entry["step"])


class _Bar(tqdm):  # type: ignore[type-arg]
    """Progress bar of steps. Its time left counts evaluations and checkpoints; tqdm's jumps after each."""

    def __init__(self, time_left: TimeLeft, **options: Any) -> None:
        self.time_left = time_left
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_fmt}{postfix}]"
        super().__init__(bar_format=form, **options)

    @property
    def format_dict(self) -> MutableMapping[str, Any]:
        values = super().format_dict
        values["left"] = "?"
        if not self.disable and (seconds := self.time_left.seconds(int(self.n))) is not None:
            values.update(left=tqdm.format_interval(seconds), rate=self.time_left.steps_per_second)
        return values


def _step(line: str) -> float:
    """Return the step of a line of ``log.jsonl``; infinity if the line is incomplete or damaged."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf
