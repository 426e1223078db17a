"""Image tensors ↔ Pillow pictures, contact sheets, and PNG files that record how they were made."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from far.classes import label_text
from far.colors import to_srgb
from far.errors import InputError, NotFiniteError
from far.files import atomic_path, printable

Output: TypeAlias = Literal["pil", "tensor", "np"]
Picture: TypeAlias = Image.Image | Tensor | np.ndarray
Pictures: TypeAlias = list[Image.Image]
Images: TypeAlias = list[Image.Image] | Tensor | np.ndarray

# A contact sheet has at least this width in pixels, and at most this many images of a class in a row.
_SHEET_WIDTH = 1000
_ROW_IMAGES = 8
# Durations of an animation's frames and of its last one.
_FRAME_MILLISECONDS, _LAST_MILLISECONDS = 120, 1500


def check_output(output: str) -> None:
    """Raise an :class:`InputError` unless ``output`` is ``"pil"``, ``"tensor"`` or ``"np"``."""
    if output not in (choices := ("pil", "tensor", "np")):
        raise InputError(f"output {output!r} does not exist. Choose one of {', '.join(choices)}")


def convert_output(images: Tensor, output: Output) -> Images:
    """Return images ``[n, 3, h, w]`` in [0, 1] as pictures, as they are, or as ``[n, h, w, 3]`` uint8."""
    if output == "pil":
        return to_pictures(images)
    return to_uint8(images) if output == "np" else images


def check_finite(images: Tensor) -> Tensor:
    """Return ``images [n, …]`` as they are.

    Raises:
        NotFiniteError: a value is NaN or infinite.
    """
    finite = images.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        values = f"values of image {int((~finite).nonzero()[0])} of {len(images)}"
        raise NotFiniteError(f"{values} are not finite. Check the weights, or take dtype float32")
    return images


def to_uint8(images: Tensor) -> np.ndarray:
    """Return images ``[n, 3, h, w]`` in [0, 1] as ``[n, h, w, 3]`` uint8, rounded.

    Raises:
        NotFiniteError: a value is NaN or infinite.
    """
    scaled = (check_finite(images).float().clamp(0, 1) * 255).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Return images ``[n, 3, h, w]`` in [0, 1] as Pillow pictures."""
    return [Image.fromarray(image) for image in to_uint8(images)]


def to_rgb(picture: Image.Image, background: str = "white", *, keep_colors: bool = False) -> Image.Image:
    """Return a Pillow picture of any mode as it is meant to be seen: upright, sRGB and opaque.

    All files, pictures and masks pass through here. EXIF orientation is applied, an embedded color profile is
    converted to sRGB, and 16 bits are scaled to 8. The given picture is not changed.

    Args:
        background: the color under transparent parts.
        keep_colors: ignore color profiles, as ADM's preparation of ImageNet does.

    Raises:
        InputError: the picture's file is damaged, or a pixel is not finite.
    """
    try:
        picture.load()
        if picture.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
            picture = ImageOps.exif_transpose(picture)
        picture = _eight_bits(picture)
        if not keep_colors:
            picture = to_srgb(picture)
        if picture.has_transparency_data:
            picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise InputError(f"the image cannot be decoded ({first_line(error)}). Replace it") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Scale 16-bit gray to 8 bits, which Pillow would clip; other pictures are returned as they are."""
    if not (picture.mode.startswith("I;16") or picture.mode in ("I", "F")):
        return picture
    values = np.asarray(picture)
    if picture.mode in ("I", "F"):
        if not np.isfinite(values).all():
            raise ValueError("it has values that are not finite numbers")
        values = np.clip(values, 0, 65535).round().astype(np.uint16)
    scale = 257 if values.max() > 255 else 1
    # A table takes far less memory than one float per pixel.
    table = (np.arange(65536) / scale).clip(0, 255).round().astype(np.uint8)
    scaled = Image.fromarray(table[values])
    if "icc_profile" in picture.info:
        scaled.info["icc_profile"] = picture.info["icc_profile"]
    return scaled


def to_tensor(picture: Image.Image, background: str = "white") -> Tensor:
    """Return a picture, converted by :func:`to_rgb`, as ``[3, h, w]`` float32 in [0, 1]."""
    return torch.from_numpy(np.array(to_rgb(picture, background))).permute(2, 0, 1).float() / 255


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Return images ``[n, 3, h, w]`` in [0, 1] in one picture, row by row; by default about square."""
    count, _, height, width = images.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height), "white")
    for index, picture in enumerate(to_pictures(images)):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return sheet


def contact_sheet(images: Tensor, labels: Sequence[int]) -> Image.Image:
    """Return all images in one picture with one row per class, and enlarge small ones.

    Classes are in order of appearance, their ``images [n, 3, h, w]`` in the given order. A class of more than
    eight images takes several rows of equal length. If the sheet would be more than twice as high as wide,
    the rows are arranged in several columns, so that it is about square. A single image stays as it is.
    """
    height, width = images.shape[-2:]
    rows = _class_rows(labels)
    length = max(map(len, rows))
    columns = _block_columns(len(rows), length * width, height)
    gap = width // 4 if length > 1 else 0
    block = length * width + gap
    sheet = Image.new("RGB", (columns * block - gap, -(-len(rows) // columns) * height), "white")
    pictures = to_pictures(images)
    for number, row in enumerate(rows):
        top, left = number // columns * height, number % columns * block
        for place, index in enumerate(row):
            sheet.paste(pictures[index], (left + place * width, top))
    return sheet if len(pictures) == 1 else enlarge(sheet)


def _class_rows(labels: Sequence[int]) -> list[list[int]]:
    """Return the indices of the images in each row of a contact sheet; a class's first row is its longest."""
    classes: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        classes.setdefault(label, []).append(index)
    most = max(map(len, classes.values()))
    length = -(-most // -(-most // _ROW_IMAGES))
    return [
        members[start : start + length]
        for members in classes.values()
        for start in range(0, len(members), length)
    ]


def _block_columns(rows: int, width: int, height: int) -> int:
    """Return in how many columns to arrange rows of ``width`` × ``height`` pixels: one, unless too high."""
    if rows * height <= 2 * width:
        return 1
    ratios = {columns: columns * width / (-(-rows // columns) * height) for columns in range(1, rows + 1)}
    return min(ratios, key=lambda columns: abs(math.log(ratios[columns])))


def enlarge(picture: Image.Image) -> Image.Image:
    """Repeat every pixel until the picture is at least 1000 pixels wide; return a wider one as it is."""
    factor = -(-_SHEET_WIDTH // picture.width)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def drawing_settings(
    weights: str, sampling: Mapping[str, object], dtype: str, classes: Sequence[str], label: int, seed: int
) -> dict[str, object]:
    """Return the text entries of a PNG: everything that an image of class ``label`` was drawn with."""
    drawn = {"label": label_text(classes, label), "class": classes[label], "seed": seed}
    return {"weights": weights, **sampling, "dtype": dtype, **drawn}


def encode_png(picture: Image.Image, settings: Mapping[str, object] | None = None) -> bytes:
    """Return the bytes of a PNG file; ``settings`` become its text entries."""
    info = PngInfo()
    for key, value in (settings or {}).items():
        info.add_text(key, printable(str(value)))
    file = io.BytesIO()
    picture.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def save_png(picture: Image.Image, path: Path, settings: Mapping[str, object] | None = None) -> None:
    """Write a PNG atomically; ``settings`` become its text entries."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(encode_png(picture, settings))


def save_gif(frames: Sequence[Image.Image], path: Path) -> None:
    """Write an infinite animation atomically; the last frame lasts a second and a half."""
    first, *others = frames
    durations = [_FRAME_MILLISECONDS] * len(others) + [_LAST_MILLISECONDS]
    with atomic_path(path) as temporary:
        first.save(temporary, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
