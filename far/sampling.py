"""The autoregressive loop: from labels and noise, and tokens that are kept where there are any, to latents, some tokens at a time.

A pure function of a model: it knows orders, guidance, temperature and step counts, but no file and
no picture. Arithmetic as in MAR (arXiv 2406.11838, section 3.3); fewer head steps as more tokens are
known as in DiSA; keys, values and guidance kept over several AR steps as in LazyMAR (arXiv 2503.12450).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from far.errors import InputError
from far.layers import take
from far.model import FAR
from far.tokens import cosine_token_counts, halton_orders, random_orders, raster_orders


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
        order: in which positions become known, of masked models: ``random``, or ``halton``, which spreads those of a step
            evenly over the image.
        refresh_every: of masked models: the network runs over all positions at every so many AR steps only; between them, over
            what became known and what is wanted, with the keys and values of all the rest as they were. 1 is exact.
        guidance_every: of masked models: the unconditional half is computed at every so many AR steps only; between them, its
            difference from the conditional one is taken as it was. 1 is exact.
        guidance_passes: 2 computes the backbone with and without the class; 1 gives the scale to a head that has learnt the
            guided field. None is 1 where the head knows the scale, and else 2.
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

    def check(self, model: FAR, kept: int = 0) -> None:
        """Raise an :class:`InputError` that names the first value that ``model`` cannot be sampled with.

        Args:
            kept: how many tokens are not drawn, but given.
        """
        tokens = model.config.tokens - kept
        if not model.backbone.any_order and self.ar_steps != tokens:
            raise InputError(
                f"ar_steps {self.ar_steps}: a causal backbone draws its {tokens} tokens one by one, so give {tokens}; "
                "for fewer AR steps take a masked model, for less time fewer head_steps"
            )
        if not 1 <= self.ar_steps <= tokens:
            raise InputError(f"ar_steps {self.ar_steps}: give 1 to {tokens}, the number of tokens to draw")
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
        self._check_masked_only(model)
        if self.guidance_passes not in (None, 1, 2):
            raise InputError(f"guidance_passes {self.guidance_passes}: give 1 or 2, or leave it out")
        if self.guidance_passes == 1 and not self._head_knows_guidance(model):
            learnt = f"up to {model.head.max_guidance:g}" if model.head.max_guidance > 1 else "none"
            raise InputError(f"guidance_passes 1: this model's head has learnt no guidance of {self.guidance:g} ({learnt}); give 2")

    def _head_knows_guidance(self, model: FAR) -> bool:
        return self.guidance == 1.0 or 1 < self.guidance <= model.head.max_guidance

    def guided_in_head(self, model: FAR) -> bool:
        """Whether guidance is the head's, so that the backbone is computed with the class only."""
        return self.guidance_passes != 2 and self._head_knows_guidance(model)

    def _check_masked_only(self, model: FAR) -> None:
        usual = SamplingConfig()
        for name in ("order", "refresh_every", "guidance_every"):
            value = getattr(self, name)
            if not model.backbone.any_order and value != getattr(usual, name):
                raise InputError(f"{name} {value} is for masked models; a causal backbone draws row by row and keeps all exactly")
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


@dataclasses.dataclass(frozen=True)
class Kept:
    """Tokens that are given instead of drawn: those of ``latents [b, c, h, w]`` at ``positions [k]``, the same in every image.

    The positions are distinct, 0 … tokens − 1, and leave at least one token to be drawn. A causal backbone can keep the
    first tokens in raster order only.
    """

    latents: Tensor
    positions: Tensor


@dataclasses.dataclass(frozen=True)
class Progress:
    """What is there after an AR step: ``latents [b, c, h, w]``, zero where not ``known [b, tokens]``."""

    step: int
    steps: int
    latents: Tensor
    known: Tensor


def sample(
    model: FAR,
    labels: Tensor,
    noise: Noise,
    config: SamplingConfig,
    *,
    kept: Kept | None = None,
    callback: Callable[[Progress], None] | None = None,
) -> Tensor:
    """Latents ``[b, c, h, w]`` of deviation 1 for ``labels [b]``.

    Raises:
        InputError: see :func:`sampling_steps`.
    """
    for progress in sampling_steps(model, labels, noise, config, kept=kept):
        if callback is not None:
            callback(progress)
    return progress.latents


def sampling_steps(model: FAR, labels: Tensor, noise: Noise, config: SamplingConfig, *, kept: Kept | None = None) -> Iterator[Progress]:
    """The same, an AR step at a time; the last one's latents are the result.

    Raises:
        InputError: a value of ``config`` is out of the model's range, or a causal backbone is to keep tokens that come
            after ones to be drawn. Raised by the call itself, before any step.
    """
    config.check(model, 0 if kept is None else len(kept.positions))
    if kept is not None and not model.backbone.any_order and set(kept.positions.tolist()) != set(range(len(kept.positions))):
        raise InputError(
            "a causal backbone draws row by row and knows only what lies before a token, so it can redraw an image from one token "
            "to the end and nothing else; take a masked model"
        )
    return _sampling_steps(model, labels, noise, config, kept)


@torch.no_grad()
def _sampling_steps(model: FAR, labels: Tensor, noise: Noise, config: SamplingConfig, kept: Kept | None) -> Iterator[Progress]:
    batch, channels = len(labels), model.config.token_channels
    # Step 0. Only what is kept is known; the order in which the other positions become known is drawn once.
    sequence, orders, known_count = _start(model, noise, config, batch, kept, labels.device)
    counts = cosine_token_counts(model.config.tokens - known_count, config.ar_steps)
    scales = config.guidance_scales(counts, known_count)
    # Guidance that the head has learnt is no matter of the backbone.
    conditions = _Conditions(model, labels, config, [1.0] * len(scales) if config.guided_in_head(model) else scales)
    times: dict[int, Tensor] = {}
    for step, (count, guidance) in enumerate(zip(counts, scales)):
        # Step 1. The next positions in each image's order.
        known = orders[:, :known_count]
        wanted = orders[:, known_count : known_count + count].sort(dim=1).values
        # Step 2. Their conditions, with and without the class.
        z, z_uncond = conditions.of_step(step, sequence, known, wanted)
        # Step 3. The head draws the tokens.
        head_steps = config.head_steps_at(step)
        if head_steps not in times:
            times[head_steps] = model.head.embed_times(head_steps, sequence)
        drawn = model.head.sample(
            z,
            lambda: noise.normal(count, channels),
            steps=head_steps,
            temperature=config.temperature,
            z_uncond=z_uncond,
            guidance=guidance,
            times=times[head_steps],
        )
        sequence = sequence.scatter(1, wanted.unsqueeze(-1).expand(-1, -1, channels), model.constrain(drawn))
        known_count += count
        mask = torch.zeros(orders.shape, dtype=torch.bool, device=orders.device).scatter(1, orders[:, :known_count], True)
        yield Progress(step, config.ar_steps, model.latents(sequence), mask)


def _start(
    model: FAR, noise: Noise, config: SamplingConfig, batch: int, kept: Kept | None, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """Tokens ``[b, n, d]``, zero where not kept; orders ``[b, n]`` that begin with the kept positions; how many these are."""
    sequence = torch.zeros(batch, model.config.tokens, model.config.token_channels, device=device)
    orders = _orders(model, noise, config, batch).to(device)
    if kept is None:
        return sequence, orders, 0
    known = torch.zeros(model.config.tokens, dtype=torch.bool, device=device)
    known[kept.positions.to(device)] = True
    given = model.constrain(model.tokens(kept.latents.to(sequence)))
    sequence = torch.where(known.unsqueeze(-1), given, sequence)
    # Kept ones first; a stable sort leaves the order within both groups.
    first = known[orders].sort(dim=1, descending=True, stable=True).indices
    return sequence, orders.gather(1, first), len(kept.positions)


def _orders(model: FAR, noise: Noise, config: SamplingConfig, batch: int) -> Tensor:
    tokens = model.config.tokens
    if not model.backbone.any_order:
        return raster_orders(tokens, batch)
    random = noise.orders(tokens)
    return halton_orders(*model.config.token_grid, random[:, 0]) if config.order == "halton" else random


class _Conditions:
    """The backbone's part of one generation, and what is kept of it from step to step."""

    def __init__(self, model: FAR, labels: Tensor, config: SamplingConfig, scales: list[float]) -> None:
        self.model, self.config, self.scales = model, config, scales
        self.labels = torch.cat([labels, torch.full_like(labels, model.null_label)])
        # A causal model's cache is exact; a masked one is asked for where steps are to be skipped.
        self.exact = not model.backbone.any_order
        rows = 2 * len(labels) if any(scale != 1.0 for scale in scales) else len(labels)
        self.cache = model.backbone.new_cache(rows) if self.exact or config.refresh_every > 1 else None
        self.difference: Tensor | None = None

    def of_step(self, step: int, sequence: Tensor, known: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor | None]:
        """``z [b, m, width]`` at ``wanted [b, m]``, and the same without the class where the step is guided."""
        if self.cache is not None and not self.exact and step % self.config.refresh_every == 0:
            self.cache.clear()
        if self.config.guidance_every == 1:
            return self._halves(sequence, known, wanted, uncond=self._wants_uncond(step))
        return self._with_kept_difference(step, sequence, known, wanted)

    def _wants_uncond(self, step: int) -> bool:
        """Whether the unconditional half is needed at this step, or by one that finds it in the cache."""
        if self.cache is None:
            return self.scales[step] != 1.0
        every = self.config.refresh_every
        until = len(self.scales) if self.exact else step - step % every + every
        return any(scale != 1.0 for scale in self.scales[step:until])

    def _halves(self, sequence: Tensor, known: Tensor, wanted: Tensor, *, uncond: bool) -> tuple[Tensor, Tensor | None]:
        """The conditional half; with the unconditional one in the same pass of the backbone, or without it."""
        if not uncond:
            return self.model.backbone.condition(sequence, known, wanted, self.labels[: len(sequence)], self.cache), None
        z, z_uncond = self._both(sequence, known, wanted)
        return z, z_uncond

    def _both(self, sequence: Tensor, known: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        twice = sequence.repeat(2, 1, 1), known.repeat(2, 1), wanted.repeat(2, 1)
        z, z_uncond = self.model.backbone.condition(*twice, self.labels, self.cache).chunk(2)
        return z, z_uncond

    def _with_kept_difference(self, step: int, sequence: Tensor, known: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor | None]:
        """Between the steps that compute both halves everywhere, the difference of each position stays."""
        if step % self.config.guidance_every == 0:
            self.difference = None
        if self.scales[step] == 1.0:
            return self._halves(sequence, known, wanted, uncond=False)
        if self.difference is None:
            everywhere = torch.arange(sequence.shape[1], device=sequence.device).expand(len(sequence), -1)
            if self.cache is not None:  # all positions are computed, and the unconditional half may have gaps
                self.cache.clear()
            z, z_uncond = self._both(sequence, known, everywhere)
            self.difference = z_uncond - z
            return take(z, wanted), take(z_uncond, wanted)
        z, _ = self._halves(sequence, known, wanted, uncond=False)
        return z, z + take(self.difference, wanted)
