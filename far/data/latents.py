"""The latent cache: posterior moments of an image set and, if wanted, of its mirror images, encoded once.

Moments are stored raw (unscaled, unsampled), so a new scale or shift needs no new cache, and every epoch
draws new latents. ``far.data.shards`` describes the files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from far.classes import check_same_classes
from far.data.image_sets import check_labels, check_meta, fingerprint
from far.data.images import sides
from far.data.shards import Piece, Pieces, ShardReader, ShardWriter
from far.data.training_images import open_training_images, read_ahead
from far.devices import resolve_device, to_device
from far.errors import InputError
from far.processes import Processes
from far.tokenizer import Tokenizer

SHARD_ROWS = 4096


@torch.no_grad()
def write_latents(
    images: Path,
    autoencoder: Tokenizer,
    folder: Path,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    processes: Processes = Processes(),
    *,
    flip: bool = True,
) -> Mapping[str, int]:
    """Encode ``images/train`` into ``folder``, shared among ``processes``. Resumes an interrupted call.

    Return the numbers of images that are left out, by reason. An image set made with ``--no-copy`` has its
    images in their source, where broken ones can still be found. The others are decoded while those before
    them are encoded. The ``autoencoder`` is moved to ``device``.

    Rows hold ``moments [2, 2c, h, w]`` float16 (of the image and its mirror image) and ``labels`` int64.
    Without ``flip`` they hold ``[1, 2c, h, w]``, in half of the time and space. A tokenizer without variance
    has ``c`` channels, not ``2c``.

    Raises:
        InputError: the images are missing, changed or of a size that the autoencoder cannot encode, the
            folder holds another autoencoder's moments, or a moment is not finite in float16.
    """
    source, read = open_training_images(images / "train")
    config = autoencoder.config
    meta = {
        "kind": "moments", "classes": source.meta["classes"], "size": source.meta["size"],
        "images_fingerprint": fingerprint(source),  # other images at the same path are not mixed with these
        "fingerprint": autoencoder.fingerprint(), "latent_channels": config.latent_channels,
        "stride": config.stride,
    }  # fmt: skip
    if not flip:
        meta["flip"] = False
    writer = ShardWriter(folder, meta, processes)
    if writer.complete:
        _check_source(folder, writer.index["meta"], source)
        return writer.report.get("left out", {})
    device = resolve_device(device)
    autoencoder.to(device)
    bar = tqdm(
        total=len(source), initial=writer.cursor, desc=f"encoding into {folder}", unit="img", mininterval=1,
        smoothing=0, disable=processes.rank > 0,
    )  # fmt: skip

    def pieces(numbers: range) -> Pieces:
        for rows, batch in read_ahead(read, torch.arange(numbers.start, numbers.stop).split(batch_size)):
            encoded = {}
            if len(batch.labels):
                moments = _moments(autoencoder, batch.images.to(device), source, flip)
                encoded = {"moments": moments, "labels": batch.labels}
            yield Piece(len(rows), encoded, batch.left_out)
            bar.update(len(rows))

    with bar:
        writer.fill(len(source), SHARD_ROWS, pieces, bar)
    return writer.report.get("left out", {})


def _moments(autoencoder: Tokenizer, images: Tensor, source: ShardReader, flip: bool) -> Tensor:
    variants = [images, images.flip(-1)] if flip else [images]
    stored = torch.stack([autoencoder.moments(each) for each in variants], dim=1).to(torch.float16).cpu()
    if not torch.isfinite(stored).all():
        remedy = "Train the autoencoder longer or with more KL weight"
        raise InputError(f"float16 cannot hold the moments of {source.folder}. {remedy}")
    return stored


def _check_source(folder: Path, meta: dict[str, Any], images: ShardReader) -> None:
    """Raise an :class:`InputError` unless the cache ``folder`` with ``meta`` was made from ``images``."""
    remedy = f"Remove {folder} and run far cache again"
    check_same_classes(meta["classes"], str(folder), images.meta["classes"], str(images.folder), remedy)
    made, given = meta.get("images_fingerprint"), fingerprint(images)
    if made != given:
        differing = f"their fingerprint is {made}, that of {images.folder} is {given}"
        raise InputError(f"{folder} was made from other images ({differing}). {remedy}")


def open_latents(folder: Path, autoencoder: Tokenizer, images: ShardReader | None = None) -> ShardReader:
    """Return the reader of a finished cache that ``autoencoder`` made, after verifying its checksums.

    ``images`` are the training images that the cache must come from; ``None`` accepts any.

    Raises:
        InputError: the cache is missing, unfinished, damaged, of another autoencoder or of other images.
    """
    reader = ShardReader(folder, "moments", verify=True)
    check_meta(reader, fingerprint=str)
    made, given = reader.meta["fingerprint"], autoencoder.fingerprint()
    if made != given:
        other = f"another autoencoder (its fingerprint is {made}, not {given})"
        raise InputError(f"{folder} was made by {other}. Remove it and run far cache again")
    if images is not None:
        _check_source(folder, reader.meta, images)
    config = autoencoder.config
    grid = (side // config.stride for side in sides(reader.meta["size"]))
    shape = (2 if has_flips(reader) else 1, config.moment_channels, *grid)
    reader.require({"moments": (np.float16, shape), "labels": (np.int64, ())})
    check_labels(reader)
    return reader


def has_flips(reader: ShardReader) -> bool:
    """Return whether a cache holds the moments of mirror images."""
    return reader.meta.get("flip") is not False


class LatentCache:
    """Latents of a finished cache, drawn with its ``autoencoder``. Arguments as for :func:`open_latents`.

    Attributes:
        labels: class numbers ``[rows]``.
        meta: entries of the index, such as ``classes`` and the images' ``size``.
        flip: whether it holds the mirror images too, so that half of the latents are theirs.
    """

    def __init__(self, folder: Path, autoencoder: Tokenizer, images: ShardReader | None = None) -> None:
        self.reader, self.autoencoder = open_latents(folder, autoencoder, images), autoencoder
        self.labels, self.meta = self.reader.all("labels"), self.reader.meta
        self.flip = has_flips(self.reader)

    def __len__(self) -> int:
        return len(self.reader)

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Return latents ``[rows, c, h, w]``, sampled from the posteriors of random flips and normalized.

        They are on the autoencoder's device. ``generator`` is on the CPU.
        """
        device = next(self.autoencoder.parameters()).device
        flips = torch.randint(0, 1 + self.flip, (len(rows),), generator=generator)
        moments = self.reader.rows("moments", rows)[torch.arange(len(rows)), flips].float()
        posterior = self.autoencoder.posterior(to_device(moments, device))
        noise = to_device(torch.randn(posterior.mean.shape, generator=generator), device)
        return self.autoencoder.normalize(posterior.sample(noise))
