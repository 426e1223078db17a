"""How to sample: the values, and which of them a model allows. Needs no torch: a recipe is checked without it."""

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Literal

from far.config import check_types
from far.errors import InputError

if TYPE_CHECKING:
    from far.model import FAR


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How to sample; MAR's names in brackets.

    Attributes:
        ar_steps: autoregressive steps (``num_iter``), 1 … number of tokens.
        head_steps: steps of the head; or (first, last), changing linearly over the AR steps (DiSA).
        guidance: guidance scale (``cfg``); 1 is off.
        guidance_schedule: ``linear`` grows with the share of known tokens up to ``guidance``
            (``cfg_schedule``), ``constant`` is the same at every step.
        guidance_interval: fractions of known tokens (start, end) outside which guidance is off.
        temperature: multiplies the head's noise.
        order: masked models: the order in which positions become known: ``random``, or ``halton``, which spreads
            those of a step evenly over the image.
        refresh_every: masked models: recompute all positions only every so many AR steps. Between them, only positions that
            became known and those that are drawn; the rest keep their keys and values. 1 is exact.
        guidance_every: masked models: compute the unconditional half only every so many AR steps. Between them, its
            difference from the conditional half is kept. 1 is exact.
        guidance_passes: 2 computes the backbone with and without the class; 1 gives the scale to a head that has learned the
            guided field. None is 1 if the head knows the scale, else 2.
    """

    ar_steps: int = 16
    head_steps: int | tuple[int, ...] = 8
    guidance: float = 1.0
    guidance_schedule: Literal["linear", "constant"] = "linear"
    guidance_interval: tuple[float, ...] = (0.0, 1.0)
    temperature: float = 1.0
    order: Literal["random", "halton"] = "random"
    refresh_every: int = 1
    guidance_every: int = 1
    guidance_passes: int | None = None

    def check(self, model: "FAR", kept: int = 0) -> None:
        """Raise an :class:`InputError` that names the first value that ``model`` cannot be sampled with.

        Args:
            kept: how many tokens are not drawn, but given.
        """
        check_types(self)
        tokens = model.config.tokens - kept
        if not model.backbone.any_order and self.ar_steps != tokens:
            raise InputError(
                f"ar_steps {self.ar_steps}: a causal backbone draws its {tokens} tokens one by one, so give {tokens}; "
                "for fewer AR steps take a masked model, for less time fewer head_steps"
            )
        if not 1 <= self.ar_steps <= tokens:
            raise InputError(f"ar_steps {self.ar_steps}: give 1 to {tokens}, the number of tokens to draw")
        if not 1 <= len(self._head_ends) <= 2:
            raise InputError(
                f"head_steps {list(self._head_ends)}: give one number, or the first and the last"
            )
        for steps in self._head_ends:
            model.head.check_steps(steps)
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise InputError(f"guidance {self.guidance} must be a number of at least 0; 1 turns it off")
        if self.guidance_schedule not in ("linear", "constant"):
            raise InputError(f"guidance_schedule {self.guidance_schedule!r}: choose linear or constant")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"temperature {self.temperature} must be a positive number")
        if (
            len(self.guidance_interval) != 2
            or not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1
        ):
            raise InputError(
                f"guidance_interval {list(self.guidance_interval)}: give a start and an end within 0 … 1"
            )
        self._check_masked_only(model)
        if self.guidance_passes not in (None, 1, 2):
            raise InputError(f"guidance_passes {self.guidance_passes}: give 1 or 2, or leave it out")
        if self.guidance_passes == 1 and not self._head_knows_guidance(model):
            learnt = f"up to {model.head.max_guidance:g}" if model.head.max_guidance > 1 else "none"
            raise InputError(
                f"guidance_passes 1: this model's head has learnt no guidance of {self.guidance:g} ({learnt}); give 2"
            )

    def _head_knows_guidance(self, model: "FAR") -> bool:
        return self.guidance == 1.0 or 1 < self.guidance <= model.head.max_guidance

    def guided_in_head(self, model: "FAR") -> bool:
        """Whether guidance is the head's, so that the backbone is computed with the class only."""
        return self.guidance_passes != 2 and self._head_knows_guidance(model)

    def _check_masked_only(self, model: "FAR") -> None:
        usual = SamplingConfig()
        for name in ("order", "refresh_every", "guidance_every"):
            value = getattr(self, name)
            if not model.backbone.any_order and value != getattr(usual, name):
                raise InputError(
                    f"{name} {value} is for masked models; a causal backbone draws row by row and keeps all exactly"
                )
        if self.order not in ("random", "halton"):
            raise InputError(f"order {self.order!r}: choose random or halton")
        for name in ("refresh_every", "guidance_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} must be positive; 1 is exact")

    @property
    def _head_ends(self) -> tuple[int, ...]:
        return (self.head_steps,) if isinstance(self.head_steps, int) else self.head_steps

    def head_steps_at(self, step: int) -> int:
        """Head steps of AR step ``step`` (0 …)."""
        first, last = self._head_ends[0], self._head_ends[-1]
        share = step / (self.ar_steps - 1) if self.ar_steps > 1 else 0.0
        return round(first + (last - first) * share)

    def guidance_at(self, known_before: int, known_after: int, tokens: int) -> float:
        """The guidance scale of an AR step that raises the known tokens from ``known_before`` to ``known_after``."""
        start, end = self.guidance_interval
        if not start <= known_before / tokens <= end:
            return 1.0
        if self.guidance_schedule == "constant":
            return self.guidance
        # MAR counts one token as unknown even in the last step, and its published figures include that.
        return 1.0 + (self.guidance - 1.0) * min(known_after, tokens - 1) / tokens

    def guidance_scales(self, counts: list[int], kept: int = 0) -> list[float]:
        """The guidance scale of every AR step, given how many tokens each draws, and how many are known before the first."""
        known = list(itertools.accumulate(counts, initial=kept))
        return [self.guidance_at(before, after, known[-1]) for before, after in itertools.pairwise(known)]


# Approximations of masked models that go well together. What they cost is measured in docs/results.md.
FAST: dict[str, int] = {"refresh_every": 4, "guidance_every": 4}
