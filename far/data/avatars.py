"""The avatar set: sixteen CC0 drawing styles of DiceBear as classes, one image per seed.

An image depends on its style and seed only. Seeds below ``HELD_OUT_SEED`` are for training, all others for
the held-out reference. Training images that equal one of the reference are removed.
"""

import functools
import hashlib
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from far.data.avatar_styles import (
    HELD_OUT_SEED,
    RENDER_SIZE,
    STYLES,
    check_packages,
    render_avatar,
    renderer_digest,
)
from far.data.image_sets import Summary
from far.data.shards import ShardWriter
from far.errors import InputError
from far.files import json_digest

SHARD_ROWS = 2000
# Images per task of a rendering process.
_CHUNK = 50


def write_avatars(folder: Path, size: int, per_class: int, held_out_per_class: int) -> Summary:
    """Render the set into ``folder/train`` and ``folder/held-out``, or resume an interrupted rendering.

    Args:
        size: side of the square images in pixels; must divide 128.
        per_class: training images per style, at most ``HELD_OUT_SEED``.
        held_out_per_class: held-out images per style.

    Raises:
        InputError: a size or count is out of range, or a package of the ``data`` extra is missing.
    """
    if size < 8 or RENDER_SIZE % size:
        raise InputError(f"size {size} is not available for avatars. Use 8, 16, 32, 64 or 128 pixels.")
    if not 1 <= per_class <= HELD_OUT_SEED:
        raise InputError(
            f"per-class {per_class} is out of range, because the seeds from {HELD_OUT_SEED} on are held out."
            f" Use 1 to {HELD_OUT_SEED}."
        )
    if held_out_per_class < 1:
        raise InputError(f"held-out-per-class {held_out_per_class} is too small. Use 1 or more.")
    check_packages()
    held_out = _render_split(folder / "held-out", size, HELD_OUT_SEED, held_out_per_class, exclude=None)
    train = _render_split(folder / "train", size, 0, per_class, exclude=frozenset(held_out.report["digests"]))
    duplicates = train.report.get("duplicates removed", 0)
    return Summary(
        train.count, held_out.count, STYLES, {"that are also held out": duplicates} if duplicates else {},
        already_complete=train.found_complete and held_out.found_complete,
    )  # fmt: skip


def _render_split(
    folder: Path, size: int, first_seed: int, seeds: int, exclude: frozenset[str] | None
) -> ShardWriter:
    """Render one part. Without ``exclude`` it is the reference, whose report lists its images' digests."""
    meta = {
        "kind": "images", "size": size, "classes": list(STYLES), "source": "DiceBear styles, CC0 1.0",
        "first_seed": first_seed, "seeds": seeds, "styles or their renderer": renderer_digest(),
        "held-out images": json_digest(sorted(exclude)) if exclude is not None else None,
    }  # fmt: skip
    writer = ShardWriter(folder, meta)
    total = seeds * len(STYLES)
    if writer.complete:
        return writer
    # Classes alternate from row to row, so that a set of any length is balanced.
    processes = min(os.cpu_count() or 1, (total - writer.cursor) // _CHUNK + 1)
    jobs = ((row % len(STYLES), first_seed + row // len(STYLES)) for row in range(writer.cursor, total))
    with (
        multiprocessing.get_context("spawn").Pool(processes) as pool,
        tqdm(
            total=total, initial=writer.cursor, desc=f"rendering {folder.name}", unit="img", mininterval=1
        ) as bar,
    ):
        rendered = pool.imap(functools.partial(render_avatar, size=size), jobs, chunksize=_CHUNK)
        for batch in _batches(_counted(zip(_classes_from(writer.cursor), rendered), bar), SHARD_ROWS):
            digests = [hashlib.sha256(picture.tobytes()).hexdigest()[:16] for _, picture in batch]
            if exclude is None:
                writer.report.setdefault("digests", []).extend(digests)
            kept = [row for row, digest in zip(batch, digests) if exclude is None or digest not in exclude]
            removed = writer.report.get("duplicates removed", 0) + len(batch) - len(kept)
            writer.report["duplicates removed"] = removed
            images = np.array([picture for _, picture in kept], np.uint8).reshape(-1, size, size, 3)
            labels = torch.tensor([label for label, _ in kept], dtype=torch.int64)
            writer.write(
                {"images": torch.from_numpy(images), "labels": labels}, cursor=writer.cursor + len(batch)
            )
    writer.finish()
    return writer


def _classes_from(row: int) -> Iterator[int]:
    return (index % len(STYLES) for index in itertools.count(row))


def _counted(rows: Iterator, bar: tqdm) -> Iterator:
    for row in rows:
        bar.update()
        yield row


def _batches(rows: Iterator, size: int) -> Iterator[list]:
    while batch := list(itertools.islice(rows, size)):
        yield batch
