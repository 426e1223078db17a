"""Convert Fashion-MNIST's four IDX files to an image set: gray photographs of 10 classes, MIT license."""

import gzip
import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from far.data.image_sets import Summary
from far.data.shards import ShardWriter
from far.errors import InputError
from far.files import sole_use

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SIZE = 32
_SHARD_ROWS = 10_000
_PARTS = {"train": "train", "held-out": "t10k"}
_UNSIGNED_BYTE = 0x08
# Unpacked size of the largest file. Without a limit, a few bytes of gzip could expand to any size.
_MOST_BYTES = 16 + 60_000 * 28 * 28


def write_fashion_mnist(source: Path, folder: Path) -> Summary:
    """Write ``folder/train`` and ``folder/held-out``: 32×32 (28 padded with black), gray as RGB.

    ``source`` has the four files under their published names, gzipped or not.

    Raises:
        InputError: a file is missing, truncated, or does not match its name.
    """
    read = {part: _read_part(source, prefix) for part, prefix in _PARTS.items()}
    meta = {"kind": "images", "size": SIZE, "classes": list(CLASSES), "source": "Fashion-MNIST, MIT license"}
    with sole_use(folder):
        writers = {}
        for part, (images, labels) in read.items():
            content = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
            writers[part] = ShardWriter(folder / part, {**meta, "image files": content})
        for part, writer in writers.items():
            images, labels = read[part]
            for start in range(writer.cursor, len(images), _SHARD_ROWS):
                rows = slice(start, start + _SHARD_ROWS)
                padded = np.pad(images[rows], ((0, 0), (2, 2), (2, 2)))
                rgb = torch.from_numpy(np.repeat(padded[..., None], 3, axis=-1))
                tensors = {"images": rgb, "labels": torch.from_numpy(labels[rows].astype(np.int64))}
                writer.write(tensors, cursor=start + len(padded))
            if not writer.complete:
                writer.finish()
    complete = all(writer.found_complete for writer in writers.values())
    return Summary(writers["train"].count, writers["held-out"].count, CLASSES, already_complete=complete)


def _read_part(source: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    images = read_idx(_find(source, f"{prefix}-images-idx3-ubyte"))
    labels = read_idx(_find(source, f"{prefix}-labels-idx1-ubyte"))
    if labels.ndim != 1 or images.shape != (len(labels), 28, 28):
        shapes = f"images {list(images.shape)} and labels {list(labels.shape)}, not [n, 28, 28] and [n]"
        raise InputError(f"{source}: {prefix} has {shapes}. Download the files again")
    if labels.max(initial=0) >= len(CLASSES):
        raise InputError(f"{source}: {prefix} has the label {labels.max()}, not 0 to 9. Download it again")
    return images, labels


def _find(source: Path, name: str) -> Path:
    for path in (source / f"{name}.gz", source / name):
        if path.is_file():
            return path
    raise InputError(f"{source / name}.gz does not exist. Get it, or install Debian's dataset-fashion-mnist")


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or not, as an array of the shape in its header.

    Raises:
        InputError: the file is truncated, damaged, or of another type.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        zero, kind, dimensions = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
        if zero != 0 or kind != _UNSIGNED_BYTE:
            raise ValueError("its header is not that of an IDX file of unsigned bytes")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise InputError(f"{path} is damaged or not an IDX file ({error}). Download it again") from error
