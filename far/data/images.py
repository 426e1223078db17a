"""Finding and decoding image files of any kind into square RGB arrays.

What is done with the arrays (packing into shards) is in ``far.data.folders``.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from far.errors import InputError
from far.files import is_plain
from far.pictures import to_rgb

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def find_images(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """Class names and (path, label) of every image under ``folder``, one subfolder a class, both sorted.

    Raises:
        InputError: no such folder, no subfolder with images, or a class with fewer than two images.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give a folder with one subfolder of images a class")
    classes: list[str] = []
    found: list[tuple[Path, int]] = []
    for subfolder in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if not is_plain(subfolder.name):
            raise InputError(f"class {str(subfolder)!r}: its name cannot be printed; rename the folder")
        files = sorted(path for path in subfolder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not files:
            continue
        if len(files) < 2:
            raise InputError(f"class {subfolder} has one image; two are needed, one to train on and one held out")
        found += [(path, len(classes)) for path in files]
        classes.append(subfolder.name)
    if not classes:
        raise InputError(f"{folder} holds no classes; put the images ({', '.join(SUFFIXES)}) into one subfolder a class")
    return classes, found


def decode_image(path: Path, background: str = "white") -> Image.Image:
    """An image file as it is to be looked at: upright, RGB, transparency on ``background``.

    Raises:
        InputError: the file cannot be decoded, or is implausibly large.
    """
    try:
        with Image.open(path) as opened:
            return to_rgb(ImageOps.exif_transpose(opened), background)
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is no readable image ({reason}); replace or remove it") from error


def read_image(path: Path, size: int) -> np.ndarray:
    """An image file as ``[size, size, 3]`` uint8: decoded and centre-cropped.

    Raises:
        InputError: the file cannot be decoded, is implausibly large, or is one pixel thin.
    """
    picture = decode_image(path)
    # The short side becomes the size, and the long one as many times longer.
    if min(picture.size) < 2 or max(picture.size) > 100 * min(picture.size):
        raise InputError(f"{path} has {picture.width}×{picture.height} pixels, too thin for an image of {size}; replace or remove it")
    return np.asarray(centre_crop(picture, size))


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
