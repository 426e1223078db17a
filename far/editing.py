"""Images and masks for editing: checks, masks from boxes, canvases, and the tokens that a mask touches.

The tokens are drawn by ``far.sampling``; ``Pipeline.edit`` combines both.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from far.config import listed, whole_number
from far.errors import InputError
from far.pictures import to_rgb, to_tensor


def image_pixels(image: Any, size: tuple[int, int]) -> Tensor:
    """Return an image of ``size`` (height, width) in pixels as ``[3, height, width]`` floats in [0, 1].

    Args:
        image: a Pillow image, uint8 ``[height, width, 3 or 4]``, or floats ``[3, height, width]``.

    Raises:
        InputError: the image is of another type, size or range.
    """
    tensor = _pixels("image", image, "white")
    if tensor.shape != (3, *size):
        raise InputError(f"image has shape {list(tensor.shape)}, not {[3, *size]}. Crop or resize it")
    low, high = tensor.float().aminmax()  # NaN if any value is
    if not (tensor.is_floating_point() and low >= 0 and high <= 1):
        raise InputError(f"image holds {tensor.dtype} from {low:g} to {high:g}. Give floats within 0 … 1")
    return tensor


def mask_pixels(mask: Any, size: tuple[int, int]) -> Tensor:
    """Return a mask as bool ``[height, width]``, true where to redraw.

    Args:
        mask: a Pillow image, or numbers ``[height, width]``, above 0.5 where to redraw.
        size: the expected (height, width) in pixels.

    Raises:
        InputError: the mask is of another type or size, or holds values that are not finite.
    """
    tensor = _pixels("mask", mask, "black")
    if tensor.dim() == 3 and not isinstance(mask, Tensor):
        # The channels of an image or array come first or, if there is one only, possibly last.
        tensor = tensor[..., 0] if tensor.shape[-1] == 1 else tensor.float().mean(dim=0)
    if tensor.shape != size:
        raise InputError(f"mask has shape {list(tensor.shape)}, not {list(size)}. Crop or resize it")
    if not tensor.isfinite().all():
        raise InputError("mask holds values that are not finite. Give 1 to redraw and 0 to keep")
    return tensor > 0.5


def _pixels(name: str, given: Any, background: str) -> Tensor:
    """Return a Pillow image, or 8-bit pixels, as ``[3, H, W]`` in [0, 1]; other values as they are."""
    if isinstance(given, np.ndarray):
        if given.dtype == np.uint8 and given.ndim == 3 and given.shape[-1] in (3, 4):
            return to_tensor(Image.fromarray(given), background)
        try:
            given = torch.from_numpy(given.copy())
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} has dtype {given.dtype}. Give uint8 or float32") from error
    if isinstance(given, Image.Image):
        return to_tensor(given, background)
    if isinstance(given, Tensor) and not given.is_complex():
        return given
    kind = type(given).__name__
    raise InputError(f"{name} is a {kind}. Give a Pillow image, or an array or tensor of real numbers")


def box_mask(size: tuple[int, int], box: tuple[int, int, int, int]) -> Tensor:
    """Return a bool mask ``[height, width]``, true inside a box.

    Args:
        size: (height, width) of the image in pixels.
        box: (left, top, right, bottom) in pixels, right and bottom excluded.

    Raises:
        InputError: the box is not four whole numbers, is empty, or leaves the image.
    """
    height, width = size
    sides = [whole_number("box", side) for side in listed("box", box)]
    if len(sides) != 4:
        raise InputError(f"box {sides} is not four numbers. Give left, top, right and bottom in pixels")
    left, top, right, bottom = sides
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        remedy = f"Give left, top, right and bottom within 0 0 {width} {height}"
        raise InputError(f"box {left} {top} {right} {bottom} is empty or leaves the image. {remedy}")
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def place(picture: Image.Image, size: tuple[int, int], left: int, top: int) -> tuple[Image.Image, Tensor]:
    """Place an image on a larger canvas, repeat its border pixels outwards, and mask everything around it.

    Args:
        picture: a picture of any mode, converted by :func:`far.pictures.to_rgb`.
        size: (height, width) of the canvas in pixels.
        left: column of the image's left side on the canvas.
        top: row of its upper side.

    Returns:
        The canvas, and a bool mask ``[height, width]``, true around the image.

    Raises:
        InputError: the image is damaged or leaves the canvas.
    """
    height, width = size
    left, top = whole_number("left", left), whole_number("top", top)
    picture = to_rgb(picture)  # upright, before its sides are measured
    right, bottom = left + picture.width, top + picture.height
    if not (left >= 0 and top >= 0 and right <= width and bottom <= height):
        placed = f"an image of {picture.width}×{picture.height} pixels placed at {left} {top}"
        raise InputError(f"{placed} leaves the canvas of {width}×{height}. Move the image, or reduce it")
    margins = ((top, height - bottom), (left, width - right), (0, 0))
    canvas = np.pad(np.asarray(picture), margins, mode="edge")
    return Image.fromarray(canvas), ~box_mask(size, (left, top, right, bottom))


def touched_tokens(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return which tokens ``mask [H, W]`` touches with at least one pixel: bool ``[rows · columns]``.

    Raises:
        InputError: the mask touches no token, or every token.
    """
    rows, columns = grid
    cell = mask.shape[0] // rows, mask.shape[1] // columns
    touched = F.max_pool2d(mask[None].float(), cell)[0].flatten() > 0
    if not touched.any():
        raise InputError("the mask marks nothing to redraw. Paint the part to redraw white")
    if touched.all():
        raise InputError(f"the mask touches all {rows}×{columns} tokens. Mark less, or generate a new image")
    return touched


def paste_kept(drawn: Tensor, image: Tensor, redrawn: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return drawn images ``[b, 3, H, W]`` with the pixels of ``image [3, H, W]`` in all kept tokens.

    ``redrawn`` is a bool ``[tokens]`` or ``[b, tokens]``, and ``grid`` the (rows, columns) of tokens.
    """
    cells = redrawn.view(-1, 1, *grid).float()
    mask = F.interpolate(cells, size=image.shape[-2:], mode="nearest").bool()
    return torch.where(mask.to(drawn.device), drawn, image.to(drawn))


def blend_kept(drawn: Tensor, image: Tensor, redrawn: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return drawn images like :func:`paste_kept`, but without a visible seam.

    In a strip of a quarter of a token beside redrawn tokens, ``image`` fades into ``drawn``, which should
    show the same there: kept tokens, decoded. All other pixels of kept tokens are those of ``image``.
    """
    cells = redrawn.view(-1, 1, *grid).float()
    mask = F.interpolate(cells, size=image.shape[-2:], mode="nearest")
    width = max(1, image.shape[-2] // grid[0] // 8)
    # Widened by half of the strip and blurred over all of it: 1 up to the seam, 0 beyond the strip.
    window = 2 * width + 1
    mask = F.max_pool2d(mask, window, stride=1, padding=width)
    mask = F.avg_pool2d(mask, window, stride=1, padding=width, count_include_pad=False)
    return torch.lerp(image.to(drawn), drawn, mask.to(drawn))
