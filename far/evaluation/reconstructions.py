"""Reconstructions of images by an autoencoder: their features in parts, and similarity to the originals."""

from pathlib import Path

import torch
from torch import Tensor

from far.config import to_dict
from far.evaluation.extraction import extract_parts, part_ranges, read_part, read_parts
from far.evaluation.features import Extractor
from far.evaluation.images import ImageSource
from far.evaluation.metrics import psnr, ssim
from far.files import json_digest
from far.tokenizer import Tokenizer
from far.weights import digest


def reconstructions_folder(
    base: Path, source: ImageSource, autoencoder: Tokenizer, extractor: Extractor
) -> Path:
    """Return the folder for the parts of reconstructions, unique to images, autoencoder and network."""
    weights = [to_dict(autoencoder.config), digest(autoencoder.state_dict()), autoencoder.active_decoder]
    identity = json_digest([weights, source.digest, extractor.name, extractor.digest])
    return base / f"parts-{identity[:16]}"


def reconstruction_features(
    folder: Path, source: ImageSource, count: int, autoencoder: Tokenizer, extractor: Extractor
) -> Tensor:
    """Return features ``[count, d]`` of reconstructions from the posteriors' means, kept in ``folder``.

    Raises:
        InputError: the images' height or width is not a multiple of the autoencoder's stride.
    """

    def images(rows: range, step: object) -> Tensor:
        return autoencoder.to_images(autoencoder.to_latents(source.tensor(rows)))

    description = f"reconstructions of {source.name}"
    extract_parts(folder, count, images, extractor, keep_images=True, description=description)
    return read_parts(folder, count)


def similarity(folder: Path, source: ImageSource, count: int) -> dict[str, float]:
    """Return mean PSNR in dB and mean SSIM of the reconstructions that ``folder`` holds, with 8 bits."""
    ratios, similarities = [], []
    for rows in part_ranges(count):
        output = read_part(folder, rows, "images").permute(0, 3, 1, 2).float() / 255
        originals = source.tensor(rows)
        ratios.append(psnr(output, originals))
        similarities.append(ssim(output, originals))
    return {"PSNR": float(torch.cat(ratios).mean()), "SSIM": float(torch.cat(similarities).mean())}
