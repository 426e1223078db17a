"""Features of many images, computed in parts and kept in files: resumable, with any number of processes.

A part is a fixed range of image numbers in its own file, so several processes can work on one folder, and no
part is computed twice.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from far.errors import InputError
from far.evaluation.features import Extractor
from far.files import remove_leftovers
from far.progress import ImageBar
from far.sampling import Progress
from far.weights import read_tensors, save_tensors

PART = 100


def extract_parts(
    folder: Path,
    count: int,
    images: Callable[[range, Callable[[Progress], None]], Tensor],
    extractor: Extractor,
    *,
    keep_images: bool = False,
    share: tuple[int, int] = (0, 1),
    description: str = "features",
) -> None:
    """Write the missing parts of images 0 … ``count`` − 1 to ``folder``.

    Args:
        folder: another one for each set of images and extractor.
        images: image numbers → ``[n, 3, h, w]`` in [0, 1]. A function that draws them calls its second
            argument after each AR step.
        keep_images: also keep the images as uint8.
        share: (rank, processes): this process computes the missing ones of every ``processes``-th part.

    Raises:
        InputError: a feature is not finite.
    """
    remove_leftovers(folder)
    rank, processes = share
    own = part_ranges(count)[rank::processes]
    missing = [rows for rows in own if not part_path(folder, rows).exists()]
    total = sum(map(len, own))
    done = total - sum(map(len, missing))
    with ImageBar(total, description, initial=done, disable=rank > 0) as bar:
        for rows in missing:
            # Images are evaluated as they would be saved, with 8 bits.
            quantized = (images(rows, bar.ar_step) * 255).round().clamp(0, 255)
            tensors = {"features": _checked(extractor(quantized / 255).cpu(), rows)}
            if keep_images:
                tensors["images"] = quantized.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
            save_tensors(part_path(folder, rows), tensors)
            done += len(rows)
            bar.move_to(done)


def _checked(features: Tensor, rows: range) -> Tensor:
    for row, finite in zip(rows, features.isfinite().all(dim=1)):
        if not finite:
            raise InputError(f"features of image {row} are not finite. Check the image and the weights")
    return features


def part_ranges(count: int) -> list[range]:
    """Return the image numbers of each part."""
    return [range(start, min(start + PART, count)) for start in range(0, count, PART)]


def part_path(folder: Path, rows: range) -> Path:
    """Return the file of a part. The length in its name distinguishes a shorter last part."""
    return folder / f"part-{rows.start:08d}-{len(rows)}.safetensors"


def read_parts(folder: Path, count: int, name: str = "features") -> Tensor:
    """Return ``features [count, d]`` or ``images [count, h, w, 3]`` of all parts.

    Raises:
        InputError: a part is missing or damaged.
    """
    return torch.cat([read_part(folder, rows, name) for rows in part_ranges(count)])


def read_part(folder: Path, rows: range, name: str) -> Tensor:
    """Return ``features`` or ``images`` of one part, as :func:`read_parts` of all."""
    path = part_path(folder, rows)
    with contextlib.suppress(InputError):
        tensor = read_tensors(path).get(name)
        if tensor is not None and len(tensor) == len(rows):
            return tensor
    raise InputError(f"{path} is missing or damaged. Remove it and run the same command again")
