"""Image tensors ↔ Pillow pictures, grids, and PNG files that carry how they were made."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from far.files import atomic_path


def to_uint8(images: Tensor) -> np.ndarray:
    """Images ``[n, 3, h, w]`` in [0, 1] → ``[n, h, w, 3]`` uint8, rounded."""
    scaled = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Images ``[n, 3, h, w]`` in [0, 1] → Pillow pictures."""
    return [Image.fromarray(image) for image in to_uint8(images)]


def to_rgb(picture: Image.Image, background: str = "white") -> Image.Image:
    """A Pillow picture of any mode as RGB, transparency on ``background``."""
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        # Pillow would clip these instead of scaling them.
        values = np.asarray(picture)
        if picture.mode in ("I", "F"):
            values = np.clip(values, 0, 65535).round().astype(np.uint16)
        scale = 257 if values.max() > 255 else 1
        table = (np.arange(65536) / scale).clip(0, 255).round().astype(np.uint8)  # far smaller than a float for each pixel
        picture = Image.fromarray(table[values])
    if picture.has_transparency_data:
        picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def to_tensor(picture: Image.Image, background: str = "white") -> Tensor:
    """A Pillow picture, its transparency on ``background`` → ``[3, h, w]`` in [0, 1]; the inverse of :func:`to_pictures`."""
    return torch.from_numpy(np.array(to_rgb(picture, background))).permute(2, 0, 1).float() / 255


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """All images ``[n, 3, h, w]`` in [0, 1] row by row, about square unless ``columns`` is given."""
    count, _, height, width = images.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height), "white")
    for index, picture in enumerate(to_pictures(images)):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return sheet


def encode_png(picture: Image.Image, settings: Mapping[str, object] | None = None) -> bytes:
    """The bytes of a PNG file; ``settings`` become its text entries."""
    info = PngInfo()
    for key, value in (settings or {}).items():
        info.add_text(key, str(value))
    file = io.BytesIO()
    picture.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def save_png(picture: Image.Image, path: Path, settings: Mapping[str, object] | None = None) -> None:
    """Write a PNG atomically; ``settings`` become its text entries."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(encode_png(picture, settings))


def save_gif(frames: Sequence[Image.Image], path: Path, milliseconds: int = 120) -> None:
    """Write an endless animation atomically; the last frame stays for a second and a half."""
    durations = [milliseconds] * (len(frames) - 1) + [1500]
    with atomic_path(path) as temporary:
        frames[0].save(temporary, format="GIF", save_all=True, append_images=list(frames[1:]), duration=durations, loop=0)
