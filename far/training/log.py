"""Reports of a training: ``log.jsonl``, TensorBoard, progress bar, and the means between two log lines."""

import contextlib
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from far.errors import InputError
from far.files import atomic_path
from far.processes import Processes
from far.training.config import LoopConfig


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

    def __enter__(self) -> "TrainingLog":
        self.processes.first(self._open)
        self.bar = tqdm(
            total=self.config.steps, initial=self.first_step, desc=self.path.parent.name, unit="step",
            mininterval=1, disable=self.processes.rank > 0,
        )  # fmt: skip
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
            self.board = SummaryWriter(str(self.path.with_name("tensorboard")))

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.board is not None:
            self.board.close()

    def show(self, figures: str) -> None:
        """Show the newest figures behind the bar."""
        self.figures = figures
        self.bar.set_postfix_str(figures)

    @contextlib.contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Show what happens between two steps in place of the figures."""
        self.bar.set_postfix_str(activity)
        yield
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


def _step(line: str) -> float:
    """Return the step of a line of ``log.jsonl``; infinity if the line is incomplete or damaged."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf
