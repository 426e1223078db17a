"""Autoregressive loop: labels, noise and optional kept tokens → latents, some tokens per AR step.

The arithmetic is that of MAR (arXiv 2406.11838, section 3.3). Head steps can decrease as more tokens are
known, as in DiSA. Keys, values and guidance can be reused over AR steps, as in LazyMAR (arXiv 2503.12450).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from far.devices import to_device
from far.errors import InputError
from far.heads import Condition, Normal
from far.layers import take
from far.model import FAR
from far.sampling_config import FAST as FAST
from far.sampling_config import SamplingConfig
from far.seeds import seeded_generator
from far.tokens import cosine_token_counts, halton_orders, random_orders, raster_orders

# Normal values that torch's CPU generator draws together.
_BLOCK = 16


class Noise(Protocol):
    """Source of all random numbers of a generation, with one row per image."""

    def orders(self, tokens: int) -> Tensor:
        """Return generation orders, permutations ``[b, tokens]`` on any device."""

    def normals(self, counts: Sequence[int], channels: int) -> list[Tensor]:
        """Return standard normal values ``[b, count, channels]`` for each of ``counts``."""


class SeededNoise:
    """Noise from one generator per seed, independent of the batch and of the device.

    Args:
        seeds: one per image.
        device: of the normal values. Orders stay on the CPU.
        run: seed of a run that numbers its images; see :func:`far.seeds.seeded_generator`.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device, run: int = 0) -> None:
        self.generators = [seeded_generator(seed, run) for seed in seeds]
        self.device = device

    def orders(self, tokens: int) -> Tensor:
        return random_orders(tokens, self.generators)

    def normals(self, counts: Sequence[int], channels: int) -> list[Tensor]:
        # torch draws normal values in blocks of 16, so draws of whole blocks can be one.
        whole = all(count * channels % _BLOCK == 0 for count in counts)
        sizes = [sum(counts)] if whole else counts
        rows = [
            torch.cat([torch.randn(size, channels, generator=generator) for size in sizes])
            for generator in self.generators
        ]
        # One contiguous part per count, so that all are moved in one copy.
        parts = torch.cat([part.flatten() for part in torch.stack(rows).split(list(counts), dim=1)])
        shapes = [(len(rows), count, channels) for count in counts]
        split = to_device(parts, self.device).split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(split, shapes)]


@dataclasses.dataclass(frozen=True)
class Kept:
    """Tokens to keep instead of drawing them: those of ``latents`` at ``positions``, in every image.

    Attributes:
        latents: ``[b, c, h, w]``.
        positions: ``[k]``, distinct, within 0 … tokens − 1, fewer than the tokens. A causal backbone keeps
            only the first ones in raster order.
    """

    latents: Tensor
    positions: Tensor


@dataclasses.dataclass(frozen=True)
class Progress:
    """State after an AR step.

    Attributes:
        step: the finished AR step, 0 … ``steps`` − 1.
        steps: number of AR steps.
        latents: ``[b, c, h, w]``, zero except at known tokens.
        known: bool ``[b, tokens]``, true at known tokens.
    """

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
    """Return unit-variance latents ``[b, c, h, w]`` for ``labels [b]``; ``callback`` sees every AR step.

    Raises:
        InputError: see :func:`sampling_steps`.
    """
    for progress in sampling_steps(model, labels, noise, config, kept=kept):
        if callback is not None:
            callback(progress)
    return progress.latents


def sampling_steps(
    model: FAR, labels: Tensor, noise: Noise, config: SamplingConfig, *, kept: Kept | None = None
) -> Iterator[Progress]:
    """Return an iterator over the AR steps of :func:`sample`. The latents of the last step are the result.

    Raises:
        InputError: see :func:`prepare_start`. The call itself raises this, before any step.
    """
    return ar_steps(model, prepare_start(model, labels, noise, config, kept=kept), config)


@dataclasses.dataclass(frozen=True)
class Start:
    """Inputs of a generation, all on the device of the model. Nothing else comes from the host.

    Attributes:
        labels: ``[b]``.
        sequence: tokens ``[b, n, d]``, zero unless kept.
        orders: positions ``[b, n]``: the kept ones, then the others as they become known.
        queries: ``orders``, sorted within each AR step.
        ranks: place of each position in ``orders``, ``[b, n]``.
        normals: noise of all AR steps, 1-D: ``[draws, b, count, d]`` of each step.
        kept: number of kept positions.
    """

    labels: Tensor
    sequence: Tensor
    orders: Tensor
    queries: Tensor
    ranks: Tensor
    normals: Tensor
    kept: int


@torch.no_grad()
def prepare_start(
    model: FAR, labels: Tensor, noise: Noise, config: SamplingConfig, *, kept: Kept | None = None
) -> Start:
    """Draw the orders and the noise of a generation, and move them to the device of ``labels [b]``.

    Raises:
        InputError: a value of ``config`` is out of the model's range, or the kept tokens of a causal backbone
            are not the first ones.
    """
    positions = [] if kept is None else kept.positions.tolist()
    config.check(model, len(positions))
    if not model.backbone.any_order and sorted(positions) != list(range(len(positions))):
        raise InputError("a causal model redraws from one token to the end only. Use another model")
    tokens, channels, device = model.config.tokens, model.config.token_channels, labels.device
    orders = generation_orders(model, config.order, len(labels), lambda: noise.orders(tokens))
    sequence = torch.zeros(len(labels), tokens, channels, device=device)
    if kept is not None:
        known = torch.zeros(tokens, dtype=torch.bool)
        known[positions] = True
        # Kept positions first. A stable sort preserves the order within both groups.
        first = known.to(orders.device)[orders].sort(dim=1, descending=True, stable=True).indices
        orders = orders.gather(1, first)
        given = model.constrain(model.tokens(kept.latents.to(sequence)))
        sequence = torch.where(to_device(known, device).unsqueeze(-1), given, sequence)
    counts = cosine_token_counts(tokens - len(positions), config.ar_steps)
    parts = orders.split([len(positions), *counts], dim=1)
    queries = torch.cat([part.sort(dim=1).values for part in parts], dim=1)
    orders, queries, ranks = to_device(torch.stack([orders, queries, orders.argsort(dim=1)]), device)
    each = [count for count, draws in zip(counts, _noise_draws(model, config)) for _ in range(draws)]
    normals = torch.cat([drawn.flatten() for drawn in noise.normals(each, channels)])
    return Start(labels, sequence, orders, queries, ranks, normals, len(positions))


def generation_orders(model: FAR, order: str, batch: int, random: Callable[[], Tensor]) -> Tensor:
    """Return permutations ``[batch, tokens]`` of the positions, of the kind ``order``; raster if causal.

    ``random`` draws random permutations ``[batch, tokens]``. It is not called for raster orders.
    """
    if order == "raster" or not model.backbone.any_order:
        return raster_orders(model.config.tokens, batch)
    orders = random()
    return halton_orders(*model.config.token_grid, orders[:, 0]) if order == "halton" else orders


def _noise_draws(model: FAR, config: SamplingConfig) -> list[int]:
    """Return how often the head draws noise in each AR step."""
    return [model.head.noise_draws(config.head_steps_at(step)) for step in range(config.ar_steps)]


@torch.no_grad()
def ar_steps(model: FAR, start: Start, config: SamplingConfig) -> Iterator[Progress]:
    """Return an iterator over the AR steps of a generation, as :func:`sampling_steps` does.

    The steps copy nothing from the host and read nothing there, and shapes do not depend on values, so that
    they can be recorded. The exception are tables that a head keeps on the device for good: the first
    generation copies them.
    """
    (batch, tokens, channels), known_count = start.sequence.shape, start.kept
    counts = cosine_token_counts(tokens - known_count, config.ar_steps)
    scales = config.guidance_scales(counts, known_count)
    # If the head has learned guidance, the backbone needs no unconditional pass.
    backbone_scales = [1.0] * len(scales) if config.guided_in_head(model) else scales
    conditions = _Conditions(model, start.labels, config, backbone_scales)
    sequence = start.sequence
    head_steps = [config.head_steps_at(step) for step in range(config.ar_steps)]
    draw = {steps: model.head.sampler(steps, sequence) for steps in dict.fromkeys(head_steps)}
    noise_counts = [
        draws * batch * count * channels for draws, count in zip(_noise_draws(model, config), counts)
    ]
    normals = start.normals.split(noise_counts)
    for step, (count, guidance) in enumerate(zip(counts, scales)):
        # Step 1. The next positions in each image's order.
        known = start.orders[:, :known_count]
        query = start.queries[:, known_count : known_count + count]
        # Step 2. Their conditions, with and without the class.
        z, *uncond = conditions.at_step(step, sequence, known, query)
        condition = Condition(z, uncond[0] if uncond else None, guidance)
        # Step 3. The head draws their tokens.
        normal = _in_turn(normals[step].view(-1, batch, count, channels))
        drawn = draw[head_steps[step]](condition, normal, config.temperature)
        sequence = sequence.scatter(1, query.unsqueeze(-1).expand(-1, -1, channels), model.constrain(drawn))
        known_count += count
        yield Progress(step, config.ar_steps, model.latents(sequence), start.ranks < known_count)


def _in_turn(draws: Tensor) -> Normal:
    """Return a function that returns one of ``draws [draws, b, count, d]`` after the other."""
    left = iter(draws)

    def normal() -> Tensor:
        for drawn in left:
            return drawn
        raise InputError(
            f"the head draws noise more often than its noise_draws says ({len(draws)}). Return the number"
        )

    return normal


class _Conditions:
    """Passes of the backbone in one generation, with the state that later steps reuse."""

    def __init__(self, model: FAR, labels: Tensor, config: SamplingConfig, scales: list[float]) -> None:
        self.backbone, self.config, self.scales = model.backbone, config, scales
        self.labels = torch.cat([labels, torch.full_like(labels, model.null_label)])
        # An exact cache is always used, that of a masked model only to skip work.
        self.exact = model.backbone.exact_cache
        rows = 2 * len(labels) if any(scale != 1.0 for scale in scales) else len(labels)
        self.cache = model.backbone.new_cache(rows) if self.exact or config.refresh_every > 1 else None
        self.difference: Tensor | None = None

    def at_step(self, step: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return ``z [b, m, width]`` of sequence, known and query positions, if guided also without class."""
        if self.cache is not None and not self.exact and step % self.config.refresh_every == 0:
            self.cache.clear()
        if self.config.guidance_every == 1:
            return self._pass(*inputs, halves=2 if self._needs_uncond(step) else 1)
        if step % self.config.guidance_every == 0:
            self.difference = None
        sequence, known, query = inputs
        if self.scales[step] == 1.0:
            return self._pass(*inputs, halves=1)
        if self.difference is not None:
            (z,) = self._pass(*inputs, halves=1)
            return z, z + take(self.difference, query)
        everywhere = torch.arange(sequence.shape[1], device=sequence.device).expand(len(sequence), -1)
        if self.cache is not None:  # all positions are computed, and the unconditional half may have gaps
            self.cache.clear()
        z, z_uncond = self._pass(sequence, known, everywhere, halves=2)
        self.difference = z_uncond - z
        return take(z, query), take(z_uncond, query)

    def _needs_uncond(self, step: int) -> bool:
        """Return whether this step, or a later one through the cache, needs the unconditional half."""
        every = self.config.refresh_every
        until = len(self.scales) if self.exact else step - step % every + every
        return any(scale != 1.0 for scale in self.scales[step:until])

    def _pass(self, *inputs: Tensor, halves: int) -> tuple[Tensor, ...]:
        """Return ``z`` with the class and, for two ``halves``, also without it, from one pass."""
        if halves > 1:
            inputs = tuple(torch.cat([tensor] * halves) for tensor in inputs)
        z = self.backbone(*inputs, self.labels[: len(inputs[0])], self.cache)
        return z.chunk(halves)  # type: ignore[no-any-return]
