"""From a folder of images, one subfolder a class, to an image set with a training and a held-out part."""

import hashlib
import itertools
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from far.data.images import find_images, read_image
from far.data.shards import ShardWriter
from far.errors import InputError
from far.files import printable

_SHARD_BYTES = 64 * 2**20


def write_folder(source: Path, folder: Path, size: int, held_out_share: float = 0.05, strict: bool = False) -> dict[str, int]:
    """Pack ``source`` into ``folder/train`` and ``folder/held-out``; continues where it stopped.

    Every k-th image of each class is held out, at least one. Broken files are named on the standard
    error and skipped, or end the work under ``strict``.

    Args:
        size: side of the square images in pixels, a multiple of 4 from 8 to 1024.
        held_out_share: share of each class that is held out, above 0 and at most 0.5.

    Returns:
        ``{"train": …, "held-out": …, "broken files skipped": …}``, counts of images.

    Raises:
        InputError: a value out of range, no classes, a class with fewer than two images that can be read,
            or, under ``strict``, a broken file.
    """
    if not 8 <= size <= 1024 or size % 4:
        raise InputError(f"size {size}: give a multiple of 4 from 8 to 1024")
    if not 0 < held_out_share <= 0.5:
        raise InputError(f"held-out-share {held_out_share}: give a number above 0 and at most 0.5")
    classes, files = find_images(source)
    every = round(1 / held_out_share)
    parts: dict[str, list[tuple[Path, int]]] = {"train": [], "held-out": []}
    for _, group in itertools.groupby(files, key=lambda file: file[1]):
        for index, file in enumerate(group):
            parts["held-out" if index % every == 0 else "train"].append(file)
    counts: dict[str, int] = {}
    skipped = 0
    for name, chosen in parts.items():
        writer = _write_part(folder / name, source, classes, _shuffled(chosen), size, strict)
        counts[name] = sum(shard["count"] for shard in writer.index["shards"])
        skipped += len(writer.report.get("skipped", []))
        _check_classes(writer, folder / name, classes)
    return {**counts, "broken files skipped": skipped}


def _check_classes(writer: ShardWriter, folder: Path, classes: list[str]) -> None:
    for label, name in enumerate(classes):
        if not writer.report["counts"].get(str(label)):
            raise InputError(f"class {name!r} has no readable image for {folder}; add images to it, remove {folder.parent} and start again")


def _shuffled(files: list[tuple[Path, int]]) -> list[tuple[Path, int]]:
    # Mixed classes, so that any leading part of a set is a fair sample; fixed, so that work can go on.
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    return [files[index] for index in order]


def _write_part(folder: Path, source: Path, classes: list[str], files: list[tuple[Path, int]], size: int, strict: bool) -> ShardWriter:
    listing = hashlib.sha256(b"\n".join(os.fsencode(path.relative_to(source)) for path, _ in files)).hexdigest()[:16]
    writer = ShardWriter(folder, {"kind": "images", "size": size, "classes": classes, "source": str(source), "listing": listing})
    if writer.complete:
        return writer
    rows = max(1, _SHARD_BYTES // (3 * size * size))
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=len(files), initial=writer.cursor, desc=f"packing {folder.name}", unit="img", mininterval=1) as bar,
    ):
        while writer.cursor < len(files):
            chunk = files[writer.cursor : writer.cursor + rows]
            images, labels = [], []
            for (path, label), image in zip(chunk, _read(pool, chunk, size)):
                bar.update()
                if isinstance(image, InputError):
                    if strict:
                        raise image
                    tqdm.write(f"skipped: {printable(str(image))}", file=sys.stderr)
                    writer.report.setdefault("skipped", []).append(str(path))
                    continue
                images.append(image)
                labels.append(label)
                counts = writer.report.setdefault("counts", {})
                counts[str(label)] = counts.get(str(label), 0) + 1
            stacked = np.stack(images) if images else np.empty((0, size, size, 3), np.uint8)
            tensors = {"images": torch.from_numpy(stacked), "labels": torch.tensor(labels, dtype=torch.int64)}
            writer.write(tensors, cursor=writer.cursor + len(chunk))
    writer.report.setdefault("counts", {})
    writer.finish()
    return writer


def _read(pool: ThreadPoolExecutor, files: list[tuple[Path, int]], size: int) -> Iterator[np.ndarray | InputError]:
    """Decoded images in order, and the error of each that cannot be decoded; threads, as Pillow frees the lock."""
    return pool.map(partial(_try_read, size=size), [path for path, _ in files])


def _try_read(path: Path, size: int) -> np.ndarray | InputError:
    try:
        return read_image(path, size)
    except InputError as error:
        return error
