"""The avatar set: sixteen CC0 drawing styles of DiceBear as classes, one image per seed.

An image depends on its style and seed only. Seeds below ``HELD_OUT_SEED`` are for training, all others for
the held-out reference. Training images that equal one of the reference are removed.
"""

import functools
import hashlib
import itertools
import multiprocessing
import os
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
from far.files import json_digest, sole_use

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
        raise InputError(f"size {size} is not available for avatars. Use 8, 16, 32, 64 or 128 pixels")
    if not 1 <= per_class <= HELD_OUT_SEED:
        raise InputError(f"per-class {per_class} is out of range. Use 1 to {HELD_OUT_SEED}")
    if held_out_per_class < 1:
        raise InputError(f"held-out-per-class {held_out_per_class} is too small. Use 1 or more")
    check_packages()
    with sole_use(folder):
        held_out = _render(folder / "held-out", size, HELD_OUT_SEED, held_out_per_class, exclude=None)
        train = _render(folder / "train", size, 0, per_class, exclude=set(held_out.report["digests"]))
    duplicates = train.report.get("duplicates removed", 0)
    left_out = {"that are also held out": duplicates} if duplicates else {}
    complete = train.found_complete and held_out.found_complete
    return Summary(train.count, held_out.count, STYLES, left_out, already_complete=complete)


def _render(folder: Path, size: int, first_seed: int, seeds: int, exclude: set[str] | None) -> ShardWriter:
    """Render one part. Without ``exclude`` it is the reference, whose report lists its images' digests."""
    meta = {
        "kind": "images", "size": size, "classes": list(STYLES), "source": "DiceBear styles, CC0 1.0",
        "first_seed": first_seed, "seeds": seeds, "styles or their renderer": renderer_digest(),
        "held-out images": json_digest(sorted(exclude)) if exclude is not None else None,
    }  # fmt: skip
    writer = ShardWriter(folder, meta)
    if writer.complete:
        return writer
    # Classes alternate from row to row, so that a set of any length is balanced.
    done, total = writer.cursor, seeds * len(STYLES)
    jobs = [(row % len(STYLES), first_seed + row // len(STYLES)) for row in range(done, total)]
    processes = min(os.cpu_count() or 1, len(jobs) // _CHUNK + 1)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        rendered = pool.imap(functools.partial(render_avatar, size=size), jobs, chunksize=_CHUNK)
        bar = tqdm(rendered, f"rendering {folder.name}", total, initial=done, unit="img", mininterval=1)
        rows = zip(bar, jobs)
        while batch := list(itertools.islice(rows, SHARD_ROWS)):
            digests = [hashlib.sha256(picture.tobytes()).hexdigest()[:16] for picture, _ in batch]
            if exclude is None:
                writer.report.setdefault("digests", []).extend(digests)
            kept = [row for row, digest in zip(batch, digests) if exclude is None or digest not in exclude]
            removed = writer.report.get("duplicates removed", 0) + len(batch) - len(kept)
            writer.report["duplicates removed"] = removed
            images = np.array([picture for picture, _ in kept], np.uint8).reshape(-1, size, size, 3)
            labels = torch.tensor([label for _, (label, _) in kept], dtype=torch.int64)
            tensors = {"images": torch.from_numpy(images), "labels": labels}
            writer.write(tensors, cursor=writer.cursor + len(batch))
    writer.finish()
    return writer
