"""Data order: the rows of each batch, as a function of its number and the seed."""

import functools

import torch
from torch import Tensor

from far.seeds import seeded_generator


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
