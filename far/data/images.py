"""Find image files (PNG, JPEG, WebP) and decode them into square RGB arrays."""

import threading
import unicodedata
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from far.colors import has_unusable_profile
from far.data.listing import SUFFIXES, class_folders, describe, images_in, images_within
from far.errors import InputError
from far.files import is_plain
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


class OtherFormat(InputError):
    """Raised for a file with an image's name and the content of another format."""


def find_images(
    folder: Path, left_out: Counter[str] | None = None
) -> tuple[list[str], list[tuple[Path, int]]]:
    """Return class names in natural order, and (path, label) of every image, sorted by label and path.

    ``folder`` has one subfolder per class. ``left_out`` counts the skipped files by reason.

    Raises:
        InputError: ``folder`` is not a folder or has no class folders; or a class has fewer than two images,
            is a dead link or a link to a parent folder or another class, or has a name that cannot be printed
            or differs from another only in case.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Give a folder with one subfolder of images per class")
    left_out = Counter() if left_out is None else left_out
    subfolders = class_folders(folder, left_out)
    _check_names(subfolders)
    others: Counter[str] = Counter()
    if outside := len(images_in(folder, others)) + others.total():
        left_out["outside the class folders"] += outside
    files: list[tuple[Path, int]] = []
    too_few: list[str] = []
    for label, subfolder in enumerate(subfolders):
        others = Counter()
        images = images_within(subfolder, others)
        if len(images) < 2:
            has = f"1 image, {describe(others)}" if images else describe(others)
            too_few.append(f"{subfolder.name!r} ({has.removesuffix(', ') or 'empty'})")
        files += [(path, label) for path in images]
        left_out.update(others)
    if not subfolders:
        names = ", ".join(SUFFIXES)
        raise InputError(f"{folder} has no class folders. Put images ({names}) into one subfolder per class")
    if too_few:
        raise InputError(few_images(folder, too_few))
    return [path.name for path in subfolders], files


def few_images(folder: Path, classes: list[str]) -> str:
    """Return the error message for described classes with too few images for both parts."""
    shown = ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")
    count = f"{len(classes)} {'class has' if len(classes) == 1 else 'classes have'}"
    return f"{folder}: {count} fewer than two readable images: {shown}. Add PNG, JPEG or WebP files"


def _check_names(subfolders: list[Path]) -> None:
    seen: dict[str | Path, Path] = {}
    for path in subfolders:
        if not is_plain(path.name):
            raise InputError(f"The name of the class {str(path)!r} cannot be printed. Rename the folder")
        name = unicodedata.normalize("NFC", path.name).strip().casefold()
        for key, problem in (
            (name, "differ only in case or spaces. Rename or merge the folders"),
            (path.resolve(), "are the same folder. Remove the link"),
        ):
            if (other := seen.setdefault(key, path)) is not path:
                raise InputError(f"The classes {str(other)!r} and {path.name!r} {problem}")


def _made_of(path: Path, make: Callable[[Image.Image], T]) -> T:
    """Return ``make(image)`` for an image file; errors of opening and decoding become :class:`InputError`."""
    try:
        with Image.open(path, formats=_FORMATS) as picture:
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
        if isinstance(cause, UnidentifiedImageError) and (other := _other_format(path)):
            raise OtherFormat(f"{path} is {other}. Convert it to PNG, JPEG or WebP, or remove it") from error
        raise InputError(f"{path} is not a readable image ({first_line(cause)}). Replace it") from error


def _other_format(path: Path) -> str | None:
    """Return the name of the file's other format, if its first bytes match one."""
    with path.open("rb") as file:
        start = file.read(24)
    if start[4:8] == b"ftyp":
        return "a HEIF or AVIF"
    return next((held for signature, held in _OTHER_FORMATS.items() if start.startswith(signature)), None)


def decode_image(path: Path, background: str = "white") -> Image.Image:
    """Read an image file as viewers show it: upright, sRGB, transparency on ``background``.

    Raises:
        InputError: the file cannot be decoded, is not PNG, JPEG or WebP, or is too large.
    """
    return _made_of(path, lambda picture: to_rgb(picture, background))


def read_image(path: Path, size: int, *, keep_colors: bool = False) -> np.ndarray:
    """Read an image file as ``[size, size, 3]`` uint8, center-cropped. See :func:`far.pictures.to_rgb`.

    ``keep_colors`` ignores embedded color profiles, as ADM prepares ImageNet.

    Raises:
        InputError: the file cannot be decoded, is not PNG, JPEG or WebP, is too large, or is one pixel thin.
    """
    return prepare_image(path, size, keep_colors=keep_colors)[0]


def prepare_image(path: Path, size: int, *, keep_colors: bool = False) -> tuple[np.ndarray, bool]:
    """Return the pixels of :func:`read_image`, and whether an unusable color profile was ignored."""

    def make(picture: Image.Image) -> tuple[np.ndarray, bool]:
        # The short side is scaled to the size, and the long side by the same factor.
        if min(picture.size) < 2 or max(picture.size) > 100 * min(picture.size):
            raise ValueError(f"{picture.width}×{picture.height} pixels are too thin for an image of {size}")
        pixels = np.asarray(center_crop(to_rgb(picture, keep_colors=keep_colors), size))
        return pixels, not keep_colors and has_unusable_profile(picture)

    return _made_of(path, make)


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """Return the central square scaled to ``size``, as ADM prepares ImageNet.

    The image is halved by averaging while the short side is at least twice the size, then scaled bicubically.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    scaled = round(picture.width * scale), round(picture.height * scale)
    picture = picture.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))
