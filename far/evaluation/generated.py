"""Features of generated images: their labels, seeds and folder of parts, which any process can continue."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from far.autoencoder_config import DecoderName
from far.config import to_dict
from far.errors import InputError
from far.evaluation.extraction import extract_parts
from far.evaluation.features import Extractor
from far.files import json_digest, sha256
from far.names import find_folder
from far.pipeline import Pipeline
from far.sampling import Progress, SamplingConfig


@dataclasses.dataclass(frozen=True)
class Generation:
    """Settings that determine a set of generated images, except its length.

    Image i has class i mod classes and seed ``seed`` + i. ``dtype`` is that of the generator's weights,
    ``decoder`` the autoencoder's. ``compile`` changes images by rounding.
    """

    weights: str
    sampling: SamplingConfig
    seed: int
    dtype: str
    compile: bool = False
    decoder: DecoderName = "full"

    def describe(self) -> dict[str, Any]:
        """Return all settings with the SHA-256 of every file of the weights, as JSON values."""
        paths = sorted(find_folder(self.weights).iterdir())
        files = {path.name: sha256(path) for path in paths if path.suffix in (".json", ".safetensors")}
        return {**to_dict(self), "sha256": files}


def parts_folder(
    base: Path, generation: Generation, extractor: Extractor, *, keep_images: bool = False
) -> Path:
    """Return the folder for a generation's parts, unique to its weights, settings, network and content."""
    network = [extractor.name, extractor.digest]
    described = {**generation.describe(), "extractor": network, "images": keep_images}
    del described["weights"]  # equal files under another name are equal weights
    return base / f"parts-{json_digest(described)[:16]}"


def check_class_balance(count: int, classes: int) -> None:
    """Raise an :class:`InputError` if ``count`` images cannot show every class."""
    if count < classes:
        raise InputError(f"count {count} leaves some of the {classes} classes empty. Use {classes} or more")


def extract_generated(
    folder: Path,
    count: int,
    pipeline: Pipeline,
    generation: Generation,
    extractor: Extractor,
    *,
    batch_size: int,
    keep_images: bool = False,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Draw ``count`` images and write their parts. See :func:`far.evaluation.extraction.extract_parts`.

    Raises:
        InputError: there are fewer images than classes.
    """
    classes = len(pipeline.classes)
    check_class_balance(count, classes)

    def images(rows: range, step: Callable[[Progress], None]) -> Tensor:
        labels, seeds = [row % classes for row in rows], [generation.seed + row for row in rows]
        return pipeline.draw(labels, seeds, generation.sampling, batch_size=batch_size, callback=step)

    extract_parts(
        folder, count, images, extractor, keep_images=keep_images, share=share, description="generating"
    )
