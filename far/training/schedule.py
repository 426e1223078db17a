"""Learning-rate schedules: the fraction of the peak rate at each step."""

import math

from far.training.config import LoopConfig


def learning_rate_scale(config: LoopConfig, step: int) -> float:
    """Return the fraction of the peak learning rate at ``step`` (0, 1, …) of a run of ``config.steps``."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, round((1 - config.decay_fraction) * config.steps))
    progress = min(1.0, max(0, step - start) / max(1, config.steps - start))
    if config.schedule == "wsd":
        return 1 - math.sqrt(progress)  # better than a straight line (arXiv 2405.18392)
    return 0.5 * (1 + math.cos(math.pi * progress))
