"""Sampling options and their checks. Needs no torch, so recipes and command lines are checked without it."""

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any, Literal

from far.config import check_types
from far.errors import InputError

if TYPE_CHECKING:
    from far.model import FAR


# Options that only masked models take: every how many AR steps keys and values, and guidance, are recomputed.
_REUSE = ("refresh_every", "guidance_every")


def _option(default: Any, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata=metadata)


# Commands and recipes derive their options from these fields: the type gives the form of an option, and the
# entry in the docstring its help text.
@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Sampling options, with MAR's names in parentheses.

    Attributes:
        ar_steps: autoregressive steps, 1 to the number of tokens (``num_iter``).
        head_steps: steps of the head per token. Two values change linearly from the first to the last AR
            step.
        guidance: guidance scale (``cfg``). 1 turns guidance off.
        guidance_schedule: ``linear`` raises guidance with the fraction of known tokens, as MAR does
            (``cfg_schedule``): toward ``guidance``, which n tokens miss by 1/n of its distance from 1.
            ``constant`` uses the same scale at every AR step.
        guidance_interval: fractions of known tokens between which guidance is on.
        temperature: multiplies the head's noise.
        order: not for causal models: the order in which positions become known. ``halton`` spreads the
            positions of an AR step evenly over the image. ``raster`` is left to right, top to bottom, for one
            token per AR step.
        refresh_every: masked models: recompute all positions only every N AR steps. In between, only new
            tokens and query positions are computed, and the rest keep their keys and values. 1 is exact.
        guidance_every: masked models: recompute the unconditional half only every N AR steps. In between, its
            difference to the conditional half is reused. 1 is exact.
        guidance_passes: 2 runs the backbone with and without the class. 1 passes the scale to a head that has
            learned guidance. The default is 1 if the head has learned the scale, else 2.
    """

    ar_steps: int = 16
    head_steps: int | tuple[int, ...] = 8
    guidance: float = 1.0
    guidance_schedule: Literal["linear", "constant"] = "linear"
    guidance_interval: tuple[float, ...] = _option((0.0, 1.0), names=("START", "END"))
    temperature: float = 1.0
    order: Literal["random", "halton", "raster"] = "random"
    refresh_every: int = 1
    guidance_every: int = 1
    guidance_passes: int | None = _option(None, choices=(1, 2))

    def __post_init__(self) -> None:
        for name in ("head_steps", "guidance_interval"):  # recordings need a config that can be hashed
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))

    def check(self, model: "FAR", kept: int = 0) -> None:
        """Raise an :class:`InputError` that names the first value that ``model`` cannot be sampled with.

        ``kept`` is the number of tokens that are given, not drawn.
        """
        check_types(self)
        tokens = model.config.tokens - kept
        if not model.backbone.any_order and self.ar_steps != tokens:
            draws = f"a causal backbone draws its {tokens} tokens one by one"
            raise InputError(f"ar_steps {self.ar_steps}: {draws}. Give {tokens}, or choose another model")
        if not 1 <= self.ar_steps <= tokens:
            raise InputError(f"ar_steps {self.ar_steps} is out of range. Give 1 to {tokens}: tokens to draw")
        if not 1 <= len(self._head_ends) <= 2:
            raise InputError(f"head_steps {list(self._head_ends)} has the wrong length. Give 1 or 2 values")
        for steps in self._head_ends:
            model.head.check_steps(steps)
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise InputError(f"guidance {self.guidance} must be a number of at least 0. 1 turns it off")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"temperature {self.temperature} must be a positive number")
        interval = self.guidance_interval
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise InputError(f"guidance_interval {list(interval)}: give a start and an end within 0 … 1")
        for name in unused_options(model):
            if (value := getattr(self, name)) != getattr(type(self), name):
                kind = model.config.network.backbone.kind
                raise InputError(f"{name} {value} does not apply to a model of kind {kind}. Omit {name}")
        for name in _REUSE:
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} must be positive. 1 is exact")
        if self.guidance_passes not in (None, 1, 2):
            raise InputError(f"guidance_passes {self.guidance_passes} is not valid. Give 1 or 2, or omit it")
        if self.guidance_passes == 1 and not self._head_knows_guidance(model):
            most = model.head.max_guidance
            learned = f"guidance up to {most:g} only" if most > 1 else "no guidance"
            needs = f"guidance_passes 1 needs a head that learned guidance {self.guidance:g}"
            raise InputError(f"{needs}. This one learned {learned}: give 2")

    def _head_knows_guidance(self, model: "FAR") -> bool:
        return self.guidance == 1.0 or 1 < self.guidance <= model.head.max_guidance

    def guided_in_head(self, model: "FAR") -> bool:
        """Return whether the head applies guidance, so that the backbone runs with the class only."""
        return self.guidance_passes != 2 and self._head_knows_guidance(model)

    @property
    def _head_ends(self) -> tuple[int, ...]:
        return (self.head_steps,) if isinstance(self.head_steps, int) else self.head_steps

    def head_steps_at(self, step: int) -> int:
        """Return the number of head steps at AR step ``step``, counted from 0."""
        first, last = self._head_ends[0], self._head_ends[-1]
        fraction = step / (self.ar_steps - 1) if self.ar_steps > 1 else 0.0
        return round(first + (last - first) * fraction)

    def guidance_at(self, known_before: int, known_after: int, tokens: int) -> float:
        """Return the guidance scale of an AR step from the numbers of known and of all tokens."""
        start, end = self.guidance_interval
        if not start <= known_before / tokens <= end:
            return 1.0
        if self.guidance_schedule == "constant":
            return self.guidance
        # MAR's published results count one token as unknown even in the last step.
        return 1.0 + (self.guidance - 1.0) * min(known_after, tokens - 1) / tokens

    def guidance_scales(self, counts: list[int], kept: int = 0) -> list[float]:
        """Return the guidance scale of each AR step. ``counts`` are the numbers of tokens that they draw."""
        known = list(itertools.accumulate(counts, initial=kept))
        return [self.guidance_at(before, after, known[-1]) for before, after in itertools.pairwise(known)]


def unused_options(model: "FAR") -> tuple[str, ...]:
    """Return the names of the options that ``model`` does not take."""
    order = () if model.backbone.any_order else ("order",)
    return (*order, *_REUSE) if model.backbone.exact_cache else order


def fast_options(model: "FAR") -> dict[str, int]:
    """Return the options of :data:`FAST` that ``model`` takes."""
    unused = unused_options(model)
    return {name: value for name, value in FAST.items() if name not in unused}


# Approximations of masked models that work well together. docs/results.md has their effect on quality.
# Beside an exact cache they would cost more than they save, because a refresh computes all positions.
FAST: dict[str, int] = {"refresh_every": 4, "guidance_every": 4}
