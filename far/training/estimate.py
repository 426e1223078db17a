"""Time that a training will still take, and memory that its weights and optimizer need."""

import collections
from collections.abc import Iterable, Sequence

from torch import nn

from far.training.config import LoopConfig

# Steps whose mean duration counts; the first step of a run, which allocates memory, does not.
_RECENT = 50
# Steps and seconds to measure before the first estimate.
_STEPS, _SECONDS = 3, 5.0


class TimeLeft:
    """Estimate of the remaining seconds from the durations of recent steps, evaluations and checkpoints.

    Evaluations and checkpoints count once the first of them has been measured.
    """

    def __init__(self, config: LoopConfig) -> None:
        self.config, self.steps = config, 0
        self.recent: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self.pauses: dict[str, float] = {}

    def add_step(self, seconds: float) -> None:
        self.steps += 1
        if self.steps > 1:
            self.recent.append(seconds)

    def add_pause(self, activity: str, seconds: float) -> None:
        """Add the duration of ``evaluating`` or ``saving``; the newest one counts."""
        self.pauses[activity] = seconds

    @property
    def measured(self) -> bool:
        """Return whether enough steps have been measured for an estimate."""
        return len(self.recent) >= _STEPS and (sum(self.recent) >= _SECONDS or len(self.recent) == _RECENT)

    @property
    def steps_per_second(self) -> float:
        """Return the speed of recent steps, of which there must be some."""
        return len(self.recent) / max(sum(self.recent), 1e-9)

    def seconds(self, step: int) -> float | None:
        """Return the estimate after ``step`` finished steps; None before any step was measured."""
        if not self.recent:
            return None
        config = self.config
        seconds = (config.steps - step) / self.steps_per_second
        for activity, every in (("evaluating", config.evaluate_every), ("saving", config.checkpoint_every)):
            seconds += self.pauses.get(activity, 0.0) * times_left(step, config.steps, every)
        return seconds


def times_left(step: int, steps: int, every: int) -> int:
    """Return how often a multiple of ``every``, or the last step, is reached after ``step``."""
    return 0 if step >= steps else -(-steps // every) - step // every


def duration(seconds: float) -> str:
    """Return a duration as ``40 seconds``, ``31 minutes``, ``2.3 hours`` or ``3.1 days``."""
    for unit, size, digits in (("seconds", 1, 0), ("minutes", 60, 0), ("hours", 3600, 1)):
        if seconds < (120 if unit == "seconds" else 120 * 60 if unit == "minutes" else 48 * 3600):
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds / 86400:.1f} days"


def size_line(modules: Sequence[nn.Module], average: nn.Module, trained: Iterable[nn.Parameter]) -> str:
    """Return parameters and bytes of a training in words.

    Args:
        modules: those that are trained, at least in part.
        average: with the averaged weights.
        trained: parameters of the optimizer, each with a gradient and two moments.
    """
    every = sum(parameter.numel() for module in modules for parameter in module.parameters())
    held = [tensor for module in (*modules, average) for tensor in (*module.parameters(), *module.buffers())]
    parameters = list(trained)
    count = sum(parameter.numel() for parameter in parameters)
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*held, *parameters * 3))
    return (
        f"{count / 1e6:.3g} of {every / 1e6:.3g} M parameters are trained. Weights, their average, gradients "
        f"and AdamW take {size / 2**20:,.0f} MiB, activations come on top"
    )
