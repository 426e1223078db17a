"""Data order: rows of each training batch, by its number and the seed, and images in chunks."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from far.seeds import seeded_generator

CHUNK = 100


def epoch_rows(number: int, batch_size: int, rows: int, seed: int) -> Tensor:
    """Return the rows ``[batch_size]`` of batch ``number`` from a stream of permutations of ``range(rows)``.

    Each epoch has a permutation of its own. A batch may end one epoch and begin the next.
    """
    first = number * batch_size
    parts = []
    while batch_size > 0:
        epoch, offset = divmod(first, rows)
        part = _permutation(rows, seed, epoch)[offset : offset + batch_size]
        parts.append(part)
        first += len(part)
        batch_size -= len(part)
    return torch.cat(parts)


@functools.lru_cache(maxsize=2)
def _permutation(rows: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(rows, generator=seeded_generator(epoch, seed))


def image_chunks(read: Callable[[Tensor], Tensor], rows: Tensor, description: str) -> Iterator[Tensor]:
    """Yield the images ``[n, 3, h, w]`` of ``rows`` that ``read`` returns, at most 100 at a time."""
    with tqdm(total=len(rows), desc=description, unit="img", leave=False) as bar:
        for chunk in rows.split(CHUNK):
            yield read(chunk)
            bar.update(len(chunk))
