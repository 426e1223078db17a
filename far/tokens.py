"""Latent grid ↔ token sequence, generation orders, and the schedules of masks and tokens per step.

Pure functions of tensors and numbers; no parameter and no network lives here.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor


def patchify(latents: Tensor, patch: int) -> Tensor:
    """Latents ``[b, c, h, w]`` → tokens ``[b, (h/p)·(w/p), c·p²]``, channel-major within a patch.

    Raises:
        ValueError: h or w is no multiple of ``patch``.
    """
    batch, channels, height, width = latents.shape
    if height % patch or width % patch:
        raise ValueError(f"latents of {height}×{width} cannot be cut into patches of {patch}")
    grid = latents.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(
        batch, (height // patch) * (width // patch), channels * patch**2
    )


def unpatchify(tokens: Tensor, patch: int, rows: int, columns: int) -> Tensor:
    """The inverse of :func:`patchify` for a grid of ``rows × columns`` tokens."""
    batch, _, channels = tokens.shape
    grid = tokens.reshape(batch, rows, columns, channels // patch**2, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // patch**2, rows * patch, columns * patch)


def random_orders(count: int, generators: list[torch.Generator]) -> Tensor:
    """A random permutation of ``count`` positions from each generator: ``[b, count]``."""
    return torch.stack([torch.randperm(count, generator=generator) for generator in generators])


def raster_orders(count: int, batch: int) -> Tensor:
    """The order from left to right and top to bottom, for each of ``batch`` images: ``[b, count]``."""
    return torch.arange(count).expand(batch, -1)


def halton_orders(rows: int, columns: int, first: Tensor) -> Tensor:
    """Low-discrepancy orders of the positions of a grid, one for each position ``first [b]`` that they begin with: ``[b, rows·columns]``.

    The Halton sequence of bases 2 and 3 visits the cells of the grid, each at its first point, so that the cells of any stretch
    lie spread over it (arXiv 2503.17076). An order is shifted over the edges until it begins where it is asked to.
    """
    cells: dict[tuple[int, int], None] = {}
    index = 0
    while len(cells) < rows * columns:
        cells.setdefault((int(_radical_inverse(index, 2) * rows), int(_radical_inverse(index, 3) * columns)))
        index += 1
    y, x = torch.tensor(list(cells), device=first.device).unbind(-1)
    first = first.unsqueeze(-1)
    return (y + first // columns) % rows * columns + (x + first % columns) % columns


def _radical_inverse(number: int, base: int) -> Fraction:
    """The digits of ``number`` mirrored at the point, within [0, 1): the Halton sequence of one base, exactly."""
    result, scale = Fraction(0), Fraction(1)
    while number:
        number, digit = divmod(number, base)
        scale /= base
        result += digit * scale
    return result


def on_sphere(latents: Tensor, dim: int) -> Tensor:
    """Scale every latent vector along ``dim`` to the norm √channels, which a deviation of 1 gives it on average."""
    norm = latents.float().norm(dim=dim, keepdim=True).clamp(min=1e-6)  # squares leave the range of float16
    return (latents / norm * latents.shape[dim] ** 0.5).to(latents.dtype)


def cosine_token_counts(count: int, steps: int) -> list[int]:
    """How many of ``count`` tokens each of ``steps`` AR steps predicts (MAR's cosine schedule).

    After step k of K (k = 0 …), ``floor(count · cos(π/2 · (k+1)/K))`` stay masked, at least one fewer
    each step; the last step predicts all that remain.

    Raises:
        ValueError: ``steps`` is not within 1 … ``count``.
    """
    if not 1 <= steps <= count:
        raise ValueError(f"ar_steps {steps}: give 1 to {count}, the number of tokens")
    counts, masked = [], count
    for step in range(steps):
        # The cosine lies above its chord, so every later step still finds a token to predict.
        # In the last one its argument can round to above π/2, and the cosine to below 0.
        remaining = max(0, min(masked - 1, math.floor(count * math.cos(math.pi / 2 * (step + 1) / steps))))
        counts.append(masked - remaining)
        masked = remaining
    return counts


def sample_mask_ratio(generator: torch.Generator, minimum: float, deviation: float) -> float:
    """One draw of the masking ratio: a normal of mean 1, truncated to [``minimum``, 1].

    MAR's own values are 0.7 and 0.25.
    """
    low = torch.special.ndtr(torch.tensor((minimum - 1.0) / deviation, dtype=torch.float64))
    uniform = low + (0.5 - low) * torch.rand((), generator=generator, dtype=torch.float64)
    return float((1.0 + deviation * torch.special.ndtri(uniform)).clamp(minimum, 1.0))
