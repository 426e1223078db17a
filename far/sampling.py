"""The autoregressive loop: from labels and noise to latents, some tokens at a time.

A pure function of a model: it knows orders, guidance, temperature and step counts, but no file and
no picture. Arithmetic as in MAR (arXiv 2406.11838, section 3.3); fewer head steps as more tokens are
known as in DiSA.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from far.errors import InputError
from far.layers import KeyValueCache
from far.model import FAR
from far.tokens import cosine_token_counts, random_orders, raster_orders


class Noise(Protocol):
    """Where every random number of a generation comes from; one row an image."""

    def orders(self, tokens: int) -> Tensor:
        """Generation orders, permutations ``[b, tokens]``."""

    def normal(self, count: int, channels: int) -> Tensor:
        """Standard normal numbers ``[b, count, channels]``."""


class SeededNoise:
    """One generator a seed, so that an image depends on its seed and not on the batch around it.

    Numbers are drawn on the CPU and then moved: the same seed gives the same noise on every device.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device

    def orders(self, tokens: int) -> Tensor:
        return random_orders(tokens, self.generators).to(self.device)

    def normal(self, count: int, channels: int) -> Tensor:
        draws = [torch.randn(count, channels, generator=generator) for generator in self.generators]
        return torch.stack(draws).to(self.device)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How to sample; MAR's names in brackets.

    Attributes:
        ar_steps: autoregressive steps (``num_iter``), 1 … number of tokens.
        head_steps: steps of the head; or (first, last), changing linearly over the AR steps (DiSA).
        guidance: scale (``cfg``); 1 is off.
        guidance_schedule: ``linear`` grows with the share of known tokens up to ``guidance``
            (``cfg_schedule``), ``constant`` is the same at every step.
        guidance_interval: shares of known tokens (start, end) outside which guidance is off.
        temperature: multiplies the head's noise.
    """

    ar_steps: int = 16
    head_steps: int | tuple[int, ...] = 8
    guidance: float = 1.0
    guidance_schedule: Literal["linear", "constant"] = "linear"
    guidance_interval: tuple[float, ...] = (0.0, 1.0)
    temperature: float = 1.0

    def check(self, model: FAR) -> None:
        """Raise an :class:`InputError` that names the first value that ``model`` cannot be sampled with."""
        tokens = model.config.tokens
        if not model.backbone.any_order and self.ar_steps != tokens:
            raise InputError(
                f"ar_steps {self.ar_steps}: a causal backbone draws its {tokens} tokens one by one, so give {tokens}; "
                "for fewer AR steps take a masked model, for less time fewer head_steps"
            )
        if not 1 <= self.ar_steps <= tokens:
            raise InputError(f"ar_steps {self.ar_steps}: give 1 to {tokens}, the model's number of tokens")
        if not 1 <= len(self._head_ends) <= 2:
            raise InputError(f"head_steps {list(self._head_ends)}: give one number, or the first and the last")
        for steps in self._head_ends:
            model.head.check_steps(steps)
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise InputError(f"guidance {self.guidance} must be a number of at least 0; 1 turns it off")
        if self.guidance_schedule not in ("linear", "constant"):
            raise InputError(f"guidance_schedule {self.guidance_schedule!r}: choose linear or constant")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"temperature {self.temperature} must be a positive number")
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1:
            raise InputError(f"guidance_interval {list(self.guidance_interval)}: give a start and an end within 0 … 1")

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

    def guidance_scales(self, counts: list[int]) -> list[float]:
        """The guidance scale of every AR step, given how many tokens each draws."""
        known = list(itertools.accumulate(counts, initial=0))
        return [self.guidance_at(before, after, known[-1]) for before, after in itertools.pairwise(known)]


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a callback sees after each AR step: ``latents [b, c, h, w]``, zero where not ``known [b, tokens]``."""

    step: int
    steps: int
    latents: Tensor
    known: Tensor


@torch.no_grad()
def sample(
    model: FAR,
    labels: Tensor,
    noise: Noise,
    config: SamplingConfig,
    *,
    callback: Callable[[Progress], None] | None = None,
) -> Tensor:
    """Latents ``[b, c, h, w]`` of deviation 1 for ``labels [b]``.

    Raises:
        InputError: a value of ``config`` is out of the model's range.
    """
    config.check(model)
    batch, tokens, channels = len(labels), model.config.tokens, model.config.token_channels
    # Step 0. Nothing is known; the order in which positions become known is drawn once.
    sequence = torch.zeros(batch, tokens, channels, device=labels.device)
    orders = noise.orders(tokens) if model.backbone.any_order else raster_orders(tokens, batch).to(labels.device)
    counts = cosine_token_counts(tokens, config.ar_steps)
    scales = config.guidance_scales(counts)
    cache = model.backbone.new_cache(2 * batch if any(scale != 1.0 for scale in scales) else batch)
    known_count = 0
    for step, (count, guidance) in enumerate(zip(counts, scales)):
        # Step 1. The next positions in each image's order.
        known = orders[:, :known_count]
        wanted = orders[:, known_count : known_count + count].sort(dim=1).values
        # Step 2. Their conditions, with and without the class, in one pass of the backbone.
        # A cache wants the unconditional rows of all steps up to the last guided one.
        with_uncond = guidance != 1.0 or (cache is not None and any(scale != 1.0 for scale in scales[step:]))
        z, z_uncond = _conditions(model, sequence, known, wanted, labels, cache, with_uncond=with_uncond)
        # Step 3. The head draws the tokens.
        drawn = model.head.sample(
            z,
            lambda: noise.normal(count, channels),
            steps=config.head_steps_at(step),
            temperature=config.temperature,
            z_uncond=z_uncond,
            guidance=guidance,
        )
        sequence = sequence.scatter(1, wanted.unsqueeze(-1).expand(-1, -1, channels), model.constrain(drawn))
        known_count += count
        if callback is not None:
            mask = torch.zeros(batch, tokens, dtype=torch.bool, device=labels.device)
            callback(Progress(step, config.ar_steps, model.latents(sequence), mask.scatter(1, orders[:, :known_count], True)))
    return model.latents(sequence)


def _conditions(
    model: FAR, sequence: Tensor, known: Tensor, wanted: Tensor, labels: Tensor, cache: KeyValueCache | None, *, with_uncond: bool
) -> tuple[Tensor, Tensor | None]:
    if not with_uncond:
        return model.backbone.condition(sequence, known, wanted, labels, cache), None
    both = torch.cat([labels, torch.full_like(labels, model.null_label)])
    z = model.backbone.condition(sequence.repeat(2, 1, 1), known.repeat(2, 1), wanted.repeat(2, 1), both, cache)
    cond, uncond = z.chunk(2)
    return cond, uncond
