"""What of an image is redrawn: masks from boxes, a small image on a larger canvas, and which tokens a mask touches.

Drawing the tokens is the sampler's work (``far.sampling``); ``Pipeline.edit`` puts both together.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from far.config import listed, whole_number
from far.errors import InputError
from far.pictures import to_rgb


def box_mask(size: tuple[int, int], box: tuple[int, int, int, int]) -> Tensor:
    """A mask ``[height, width]``, true within ``box`` (left, top, right, bottom) in pixels, right and bottom excluded.

    Raises:
        InputError: the box is not four whole numbers, is empty, or leaves the image of ``size`` (height, width).
    """
    height, width = size
    sides = [whole_number("box", side) for side in listed("box", box)]
    if len(sides) != 4:
        raise InputError(f"box {sides}: give left, top, right and bottom in pixels")
    left, top, right, bottom = sides
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise InputError(
            f"box {left} {top} {right} {bottom}: give left, top, right and bottom in pixels, within 0 0 {width} {height} and not empty"
        )
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def place(picture: Image.Image, size: tuple[int, int], left: int, top: int) -> tuple[Image.Image, Tensor]:
    """Lay a picture on a canvas of ``size`` (height, width), its edges carried on outwards, and mask all around it.

    Args:
        picture: of any mode; it is made upright and sRGB as :func:`far.pictures.to_rgb` does.
        left: column of the canvas for the picture's left side, in pixels.
        top: row of the canvas for its upper side.

    Returns:
        The canvas, and a bool mask ``[height, width]``, true around the picture.

    Raises:
        InputError: the picture is damaged, its place is not two whole numbers, or it does not lie within the canvas.
    """
    height, width = size
    left, top = whole_number("left", left), whole_number("top", top)
    picture = to_rgb(picture)  # upright, before its sides are measured
    right, bottom = left + picture.width, top + picture.height
    if not (left >= 0 and top >= 0 and right <= width and bottom <= height):
        raise InputError(
            f"an image of {picture.height}×{picture.width} pixels placed at {left} {top} does not lie within the model's {height}×{width}; "
            "give the left and top pixel of a place where it does, or a smaller image"
        )
    margins = ((top, height - bottom), (left, width - right), (0, 0))
    canvas = np.pad(np.asarray(picture), margins, mode="edge")
    return Image.fromarray(canvas), ~box_mask(size, (left, top, right, bottom))


def touched_tokens(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which tokens of a ``grid`` (rows, columns) a mask ``[H, W]`` touches with a pixel or more: ``[tokens]``, row by row.

    Raises:
        InputError: it touches none, or all.
    """
    rows, columns = grid
    cell = mask.shape[0] // rows, mask.shape[1] // columns
    touched = F.max_pool2d(mask[None].float(), cell)[0].flatten() > 0
    if not touched.any():
        raise InputError("the mask marks nothing to redraw; paint what is to be redrawn white")
    if touched.all():
        raise InputError(
            f"the mask touches every one of the {rows}×{columns} tokens, so nothing is kept; mark less, or generate an image"
        )
    return touched


def paste_kept(drawn: Tensor, image: Tensor, redrawn: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images ``drawn [b, 3, H, W]`` with the pixels of ``image [3, H, W]`` in all tokens that are not ``redrawn [tokens]``."""
    cells = redrawn.view(1, 1, *grid).float()
    mask = F.interpolate(cells, size=image.shape[-2:], mode="nearest").bool()
    return torch.where(mask.to(drawn.device), drawn, image.to(drawn))
