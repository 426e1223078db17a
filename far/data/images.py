"""Decode image files (PNG, JPEG, WebP) into RGB arrays of one size."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from far.colors import has_unusable_profile
from far.errors import InputError
from far.pictures import first_line, to_rgb

# Pillow has more decoders, and one of them passes the file to another program.
_FORMATS = ("PNG", "JPEG", "WEBP")
# The largest image that is decoded.
_MOST_PIXELS = 120_000_000
# Larger images are decoded one at a time, because decoding takes some 20 bytes per pixel.
_MANY_PIXELS = 16_000_000
# First bytes of other formats that are often found under the names of images.
_OTHER_FORMATS = {
    b"GIF8": "a GIF", b"BM": "a BMP", b"II*\0": "a TIFF", b"MM\0*": "a TIFF",
    b"\0\0\0\x0cjP": "a JPEG 2000", b"\xff\x0a": "a JPEG XL", b"8BPS": "a PSD", b"%PDF": "a PDF",
    b"<": "HTML or SVG", b"version https://git-lfs": "a pointer of Git LFS",
}  # fmt: skip
_one_at_a_time = threading.Lock()
T = TypeVar("T")
# Side of a square, or (height, width), in pixels.
Size = int | tuple[int, int]


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of images, given a side of squares or both."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


class OtherFormat(InputError):
    """Raised for a file with an image's name and the content of another format."""


def _made_of(open_file: Callable[[], IO[bytes]], title: object, make: Callable[[Image.Image], T]) -> T:
    """Return ``make(image)`` for an image file; errors of opening and decoding become :class:`InputError`."""
    start = b""
    try:
        with open_file() as file:
            start = file.read(24)
            file.seek(0)
            with Image.open(file, formats=_FORMATS) as picture:
                pixels = picture.width * picture.height
                if pixels > _MOST_PIXELS:
                    raise ValueError(f"{picture.width}×{picture.height} is more than {_MOST_PIXELS} pixels")
                if pixels <= _MANY_PIXELS:
                    return make(picture)
                # Decode in a thread that ends, because a thread may keep the memory that it freed.
                with _one_at_a_time, ThreadPoolExecutor(1) as thread:
                    return thread.submit(make, picture).result()
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        cause = error.__cause__ if isinstance(error, InputError) and error.__cause__ else error
        if isinstance(cause, UnidentifiedImageError) and (other := _other_format(start)):
            raise OtherFormat(f"{title} is {other}. Convert it to PNG, JPEG or WebP, or remove it") from error
        raise InputError(f"{title} is not a readable image ({first_line(cause)}). Replace it") from error


def _other_format(start: bytes) -> str | None:
    """Return the name of another format that begins with these bytes, if there is one."""
    if start[4:8] == b"ftyp":
        return "a HEIF or AVIF"
    return next((held for signature, held in _OTHER_FORMATS.items() if start.startswith(signature)), None)


def decode_image(path: Path, background: str = "white") -> Image.Image:
    """Read an image file as viewers show it: upright, sRGB, transparency on ``background``.

    Raises:
        InputError: the file cannot be decoded, is not PNG, JPEG or WebP, or is too large.
    """
    return _made_of(lambda: path.open("rb"), path, lambda picture: to_rgb(picture, background))


def prepare_image(
    open_file: Callable[[], IO[bytes]],
    title: object,
    size: Size,
    *,
    keep_colors: bool = False,
    crop: bool = True,
) -> tuple[np.ndarray, bool]:
    """Return the pixels ``[height, width, 3]`` uint8 of an image file, scaled to a size.

    Also return whether an unusable color profile was ignored.

    Args:
        open_file: opens the file of the image. Its errors become :class:`InputError`.
        title: the image's name in messages.
        size: side of a square, or (height, width), in pixels.
        keep_colors: ignore color profiles instead of converting to sRGB.
        crop: crop the center. Otherwise the whole image is scaled to the size, whatever its proportions.

    Raises:
        OtherFormat: the file is not PNG, JPEG or WebP, whatever its name.
        InputError: the image cannot be decoded, is too large, or is too thin.
    """

    def make(picture: Image.Image) -> tuple[np.ndarray, bool]:
        # The short side is scaled to the size, and the long side by the same factor.
        if min(picture.size) < 2 or max(picture.size) > 100 * min(picture.size):
            shown = f"{size}" if isinstance(size, int) else f"{size[1]}×{size[0]}"
            raise ValueError(f"{picture.width}×{picture.height} pixels are too thin for an image of {shown}")
        fit = center_crop if crop else stretch
        pixels = np.asarray(fit(to_rgb(picture, keep_colors=keep_colors), size))
        return pixels, not keep_colors and has_unusable_profile(picture)

    return _made_of(open_file, title, make)


def skip_reason(error: InputError) -> str:
    """Return the reason to skip an image that could not be read, for counts by reason."""
    return "in other formats under names of images" if isinstance(error, OtherFormat) else "broken"


def center_crop(picture: Image.Image, size: Size) -> Image.Image:
    """Return the largest central part of the size's proportions, scaled to it, as ADM prepares ImageNet.

    The image is halved by averaging while it stays as large as the size, then scaled bicubically.
    """
    height, width = sides(size)
    picture = _halved(picture, height, width)
    scale = max(width / picture.width, height / picture.height)
    scaled = round(picture.width * scale), round(picture.height * scale)
    picture = picture.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def stretch(picture: Image.Image, size: Size) -> Image.Image:
    """Return the whole image scaled to the size, as :func:`center_crop` scales, but without cropping."""
    height, width = sides(size)
    return _halved(picture, height, width).resize((width, height), Image.Resampling.BICUBIC)


def _halved(picture: Image.Image, height: int, width: int) -> Image.Image:
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    return picture
