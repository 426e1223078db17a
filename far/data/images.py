"""Finding and decoding image files (PNG, JPEG, WebP) into square RGB arrays.

What is done with the arrays (packing into shards) is in ``far.data.folders``.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from far.errors import InputError
from far.files import is_plain
from far.pictures import first_line, to_rgb

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Of Pillow's many decoders, one hands the file to another program.
_FORMATS = ("PNG", "JPEG", "WEBP")
# The largest of a file that is decoded; above the second number only one is at a time, as it takes up to 16 bytes a pixel.
_MOST_PIXELS, _MANY_PIXELS = 120_000_000, 16_000_000
_one_at_a_time = threading.Lock()

T = TypeVar("T")


def class_folders(folder: Path) -> list[Path]:
    """The subfolders of ``folder``, sorted, without hidden ones.

    Raises:
        InputError: one is a link to a folder above.
    """
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    for path in found:
        if folder.resolve().is_relative_to(path.resolve()):
            raise InputError(f"class {path} is a link to a folder above it; remove it, or let it lead to the class's images")
    return found


def images_within(folder: Path) -> list[Path]:
    """Every image file in ``folder`` and its subfolders, sorted; ``folder`` may be a link, links to folders in it are not followed."""
    return sorted(path for path in folder.rglob("*") if is_image(path))


def is_image(path: Path) -> bool:
    """Whether it is a file, not a device or a pipe, with the name of an image."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def find_images(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """Class names and (path, label) of every image under ``folder``, one subfolder a class, both sorted.

    Raises:
        InputError: no such folder, no subfolder with images, one that is a link to a folder above, or a class with fewer than
            two images.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give a folder with one subfolder of images a class")
    classes: list[str] = []
    found: list[tuple[Path, int]] = []
    for subfolder in class_folders(folder):
        if not is_plain(subfolder.name):
            raise InputError(f"class {str(subfolder)!r}: its name cannot be printed; rename the folder")
        files = images_within(subfolder)
        if not files:
            continue
        if len(files) < 2:
            raise InputError(f"class {subfolder} has one image; two are needed, one to train on and one held out")
        found += [(path, len(classes)) for path in files]
        classes.append(subfolder.name)
    if not classes:
        raise InputError(f"{folder} holds no classes; put the images ({', '.join(SUFFIXES)}) into one subfolder a class")
    return classes, found


def _made_of(path: Path, make: Callable[[Image.Image], T]) -> T:
    """What ``make`` gives for an image file, which is opened but not decoded; what it raises becomes an :class:`InputError`."""
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            pixels = picture.width * picture.height
            if pixels > _MOST_PIXELS:
                raise ValueError(f"it has {picture.width}×{picture.height} pixels, more than {_MOST_PIXELS} in all")
            if pixels <= _MANY_PIXELS:
                return make(picture)
            # In a thread that ends, since what a thread has freed may stay set aside for it.
            with _one_at_a_time, ThreadPoolExecutor(1) as thread:
                return thread.submit(make, picture).result()
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        cause = error.__cause__ if isinstance(error, InputError) and isinstance(error.__cause__, Exception) else error
        raise InputError(f"{path} is no readable image ({first_line(cause)}); replace or remove it") from error


def decode_image(path: Path, background: str = "white") -> Image.Image:
    """Read an image file as it is meant to be seen: upright, sRGB, transparency on ``background``.

    Raises:
        InputError: the file cannot be decoded, is no PNG, JPEG or WebP, or is implausibly large.
    """
    return _made_of(path, lambda picture: to_rgb(picture, background))


def read_image(path: Path, size: int, *, keep_colors: bool = False) -> np.ndarray:
    """Read an image file as ``[size, size, 3]`` uint8: decoded by :func:`far.pictures.to_rgb`, then center-cropped.

    ``keep_colors`` ignores embedded color profiles, as ADM's preparation of ImageNet does.

    Raises:
        InputError: the file cannot be decoded, is no PNG, JPEG or WebP, is implausibly large, or is one pixel thin.
    """

    def make(picture: Image.Image) -> np.ndarray:
        # The short side becomes the size, and the long one as many times longer.
        if min(picture.size) < 2 or max(picture.size) > 100 * min(picture.size):
            raise ValueError(f"{picture.width}×{picture.height} pixels are too thin for an image of {size}")
        return np.asarray(centre_crop(to_rgb(picture, keep_colors=keep_colors), size))

    return _made_of(path, make)


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """The central square, scaled to ``size``, as ADM prepares ImageNet.

    Halved by averaging while the short side is at least twice the size, then bicubic to the size, then cut.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))
