"""The avatar set: sixteen CC0 drawing styles of DiceBear as classes, one picture a seed.

Every picture is determined by its style and seed string. Seeds below ``HELD_OUT_SEED`` train, those
from it on are the held-out reference; training pictures that also stand in the reference are removed.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import io
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from far.data.avatar_styles import HELD_OUT_SEED, STYLES
from far.data.image_sets import Summary
from far.data.shards import ShardWriter
from far.errors import InputError
from far.files import json_digest, sha256

SHARD_ROWS = 2000
_RENDER_SIZE = 128


def write_avatars(folder: Path, size: int, per_class: int, held_out_per_class: int) -> Summary:
    """Render the set into ``folder/train`` and ``folder/held-out``; continues where it stopped.

    Args:
        size: side of the square images in pixels; must divide 128.
        per_class: training pictures a style, at most ``HELD_OUT_SEED``.
        held_out_per_class: held-out pictures a style.

    Raises:
        InputError: a size or count out of range, or the packages of the ``data`` extra are missing.
    """
    if size < 8 or _RENDER_SIZE % size:
        raise InputError(f"size {size}: avatars are rendered at 8, 16, 32, 64 or 128 pixels")
    if not 1 <= per_class <= HELD_OUT_SEED:
        raise InputError(
            f"per-class {per_class}: give 1 to {HELD_OUT_SEED}; the seeds from {HELD_OUT_SEED} on are held out"
        )
    if held_out_per_class < 1:
        raise InputError(f"held-out-per-class {held_out_per_class}: give at least 1")
    _styles()
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
    """Without ``exclude`` this is the reference, and its report remembers what it holds."""
    meta = {
        "kind": "images", "size": size, "classes": list(STYLES), "source": "DiceBear styles, CC0 1.0",
        "first_seed": first_seed, "seeds": seeds, "styles or their renderer": _renderer(),
        "held-out images": json_digest(sorted(exclude)) if exclude is not None else None,
    }  # fmt: skip
    writer = ShardWriter(folder, meta)
    total = seeds * len(STYLES)
    if writer.complete:
        return writer
    # A row's class turns fastest, so that a set of any length is balanced.
    jobs = ((row % len(STYLES), first_seed + row // len(STYLES)) for row in range(writer.cursor, total))
    with (
        multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool,
        tqdm(
            total=total, initial=writer.cursor, desc=f"rendering {folder.name}", unit="img", mininterval=1
        ) as bar,
    ):
        rendered = pool.imap(functools.partial(render_avatar, size=size), jobs, chunksize=50)
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


def render_avatar(job: tuple[int, int], size: int) -> np.ndarray:
    """One picture ``[size, size, 3]`` uint8 on white; ``job`` is (class, seed)."""
    import resvg_py
    from dicebear import Avatar

    label, seed = job
    name = STYLES[label]
    svg = Avatar(_styles()[name], {"seed": f"{name}-{seed}", "size": _RENDER_SIZE}).to_string()
    with Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg))), formats=("PNG",)) as picture:
        rgba = picture.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return np.asarray(
        Image.alpha_composite(white, rgba).convert("RGB").resize((size, size), Image.Resampling.BOX)
    )


def _renderer() -> str:
    """Return a SHA-256 of the styles and of the versions of what renders them."""
    folder = Path(next(iter(importlib.import_module("dicebear_styles").__path__)))
    versions = [importlib.metadata.version(name) for name in ("dicebear-core", "resvg_py")]
    return json_digest([versions, [sha256(folder / f"{name}.json") for name in STYLES]])


@functools.cache
def _styles() -> dict:
    try:
        import dicebear_styles
        import resvg_py  # noqa: F401
        from dicebear import Style
    except ImportError as error:
        raise InputError(
            f"rendering avatars needs the package {error.name}; pip install 'far-image[data]'"
        ) from error
    folder = Path(next(iter(dicebear_styles.__path__)))
    styles = {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in STYLES}
    return {name: Style(style) for name, style in styles.items()}
