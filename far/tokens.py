"""Pure functions of token sequences: latents ↔ tokens, generation orders, schedules of masks and AR steps."""

import functools
import math
from fractions import Fraction

import torch
from torch import Tensor


def patchify(latents: Tensor, patch: int) -> Tensor:
    """Cut latents ``[b, c, h, w]`` into tokens ``[b, (h/p)·(w/p), c·p²]``, channel-major within a patch.

    Raises:
        ValueError: h or w is not a multiple of ``patch``.
    """
    batch, channels, height, width = latents.shape
    if height % patch or width % patch:
        raise ValueError(f"latents of {height}×{width} cannot be cut into patches of {patch}")
    grid = latents.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, patch: int, rows: int, columns: int) -> Tensor:
    """Join a grid of ``rows × columns`` tokens to latents; the inverse of :func:`patchify`."""
    batch, _, channels = tokens.shape
    grid = tokens.reshape(batch, rows, columns, channels // patch**2, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // patch**2, rows * patch, columns * patch)


def random_orders(count: int, generators: list[torch.Generator]) -> Tensor:
    """Draw a random permutation of ``count`` positions from each generator: ``[b, count]``."""
    return torch.stack([torch.randperm(count, generator=generator) for generator in generators])


def raster_orders(count: int, batch: int) -> Tensor:
    """Return the order left to right, top to bottom, for each of ``batch`` images: ``[b, count]``."""
    return torch.arange(count).expand(batch, -1)


def halton_orders(rows: int, columns: int, first: Tensor) -> Tensor:
    """Return low-discrepancy orders ``[b, rows·columns]`` of a grid's positions that begin at ``first [b]``.

    Cells are in the order of the Halton sequence of bases 2 and 3, which spreads any run of consecutive ones
    over the grid (arXiv 2503.17076). Each order is shifted, wrapping at the edges, to begin at its first.
    """
    y, x = torch.tensor(_halton_cells(rows, columns), device=first.device).unbind(-1)
    first = first.unsqueeze(-1)
    return (y + first // columns) % rows * columns + (x + first % columns) % columns


@functools.cache
def _halton_cells(rows: int, columns: int) -> list[tuple[int, int]]:
    """Return the cells (row, column) of a grid in the order in which the Halton sequence meets them."""
    cells: dict[tuple[int, int], None] = {}
    index = 0
    while len(cells) < rows * columns:
        cells.setdefault((int(_radical_inverse(index, 2) * rows), int(_radical_inverse(index, 3) * columns)))
        index += 1
    return list(cells)


def _radical_inverse(number: int, base: int) -> Fraction:
    """Return ``number`` with its digits mirrored at the point, in [0, 1): the Halton sequence of one base."""
    result, scale = Fraction(0), Fraction(1)
    while number:
        number, digit = divmod(number, base)
        scale /= base
        result += digit * scale
    return result


def on_sphere(latents: Tensor, dim: int) -> Tensor:
    """Scale vectors along ``dim`` to the norm √channels, the rms norm of unit-variance latents."""
    norm = latents.float().norm(dim=dim, keepdim=True).clamp(min=1e-6)  # squares overflow in float16
    return (latents / norm * latents.shape[dim] ** 0.5).to(latents.dtype)


def cosine_token_counts(count: int, steps: int) -> list[int]:
    """Return the number of tokens that each of ``steps`` AR steps predicts (MAR's cosine schedule).

    After step k of K (k = 0 …), ``floor(count · cos(π/2 · (k+1)/K))`` tokens stay masked. Each step predicts
    at least one token, and the last step predicts all that remain.

    Raises:
        ValueError: ``steps`` is not within 1 … ``count``.
    """
    if not 1 <= steps <= count:
        raise ValueError(f"ar_steps {steps} is out of range. Give 1 to {count}, the number of tokens")
    counts, masked = [], count
    for step in range(steps):
        # The cosine is above its chord, so tokens remain for every later step.
        # In the last step, rounding can put its argument above π/2 and the cosine below 0.
        remaining = max(0, min(masked - 1, math.floor(count * math.cos(math.pi / 2 * (step + 1) / steps))))
        counts.append(masked - remaining)
        masked = remaining
    return counts


def sample_mask_ratio(generator: torch.Generator, minimum: float, std: float) -> float:
    """Draw a masking ratio from a normal distribution of mean 1, truncated to [``minimum``, 1]."""
    low = torch.special.ndtr(torch.tensor((minimum - 1.0) / std, dtype=torch.float64))
    uniform = low + (0.5 - low) * torch.rand((), generator=generator, dtype=torch.float64)
    return float((1.0 + std * torch.special.ndtri(uniform)).clamp(minimum, 1.0))
