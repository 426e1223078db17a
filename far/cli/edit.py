"""Redraw a part of an image: inside it (inpainting), around it (outpainting), or as another class.

Redraws the white of --mask, the inside of --redraw, the outside of --keep, or everything around a smaller
image at --place. All tokens that this touches are drawn again. The others stay, blended at the seams.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from far.cli.machine_arguments import prepare_machine, print_chosen
from far.cli.model_arguments import (
    add_drawing_arguments,
    add_weights_argument,
    check_export,
    load_model_or_export,
)
from far.cli.sampling_arguments import sampling_options
from far.config import check_count, check_seed
from far.devices import device_title
from far.errors import InputError
from far.files import check_exists, check_suffix, check_writable
from far.names import find_folder

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from far.sampling import Progress

# All versions are drawn in one batch.
_MOST_VERSIONS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", type=Path, help="image to edit (a larger one is cropped and scaled to the model's size)")
    add_weights_argument(parser)
    add("--label", required=True, help="class number or name to draw")
    region = parser.add_mutually_exclusive_group(required=True).add_argument
    region("--mask", type=Path, metavar="IMAGE", help="image of the same size, white where to redraw")
    box: dict[str, Any] = {"type": int, "nargs": 4, "metavar": ("LEFT", "TOP", "RIGHT", "BOTTOM")}
    region("--redraw", **box, help="box to redraw, in pixels of the model's size")
    region("--keep", **box, help="box to keep, in pixels; redraw everything around it")
    place_help = "position of an image smaller than the model's; draw everything around it"
    region("--place", type=int, nargs=2, metavar=("LEFT", "TOP"), help=place_help)
    paste_help = "decode kept tokens instead of copying their pixels from the image"
    add("--no-paste", action="store_true", help=paste_help)
    count_help = "versions, with seeds SEED, SEED + 1, … (default 1)"
    add("--count", type=int, metavar="N", default=1, help=count_help)
    add("--seed", type=int, metavar="N", default=0, help="seed of the first version (default 0)")
    out_help = "PNG; a contact sheet if there are several versions (default edited.png)"
    add("--out", type=Path, default=Path("edited.png"), help=out_help)
    add_drawing_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    weights = find_folder(arguments.weights)
    check_export(arguments, weights)

    from far.pictures import contact_sheet, drawing_settings, save_png
    from far.precision import resolve_dtype
    from far.progress import ImageBar
    from far.tokenizer import decoder_setting

    device = prepare_machine(arguments)
    dtype = resolve_dtype(arguments.dtype, device)
    pipeline, device, dtype = load_model_or_export(
        arguments.weights, weights, dtype, device, decoder=arguments.decoder
    )
    picture, mask = _image_and_mask(arguments, pipeline.image_size)
    seeds = [arguments.seed + index for index in range(arguments.count)]
    sampling = sampling_options(arguments)
    steps = 0
    # The bar appears with the first AR step, not before an error.
    with ImageBar(arguments.count, "editing", delay=0.01) as bar:

        def report(progress: Progress) -> None:
            nonlocal steps
            if not steps:
                print_chosen(device=(arguments.device, device_title(device)), dtype=(arguments.dtype, dtype))
            steps = progress.steps
            bar.ar_step(progress)

        options = {**sampling, "seed": seeds, "paste": not arguments.no_paste, "callback": report}
        images = pipeline.edit(picture, mask, arguments.label, output="tensor", **options)
    label = pipeline.label(arguments.label)
    used = dataclasses.asdict(pipeline.sampling_config(**{**sampling, "ar_steps": steps}))
    settings = drawing_settings(arguments.weights, used, dtype, pipeline.classes, label, arguments.seed)
    settings |= decoder_setting(pipeline.autoencoder) | {"image": arguments.image.name}
    save_png(contact_sheet(images, [label] * len(images)), arguments.out, settings)
    print(f"wrote {arguments.out} ({arguments.count} {'version' if arguments.count == 1 else 'versions'})")


def _check(arguments: argparse.Namespace) -> None:
    check_seed("--seed", arguments.seed)
    check_count("--count", arguments.count, _MOST_VERSIONS)
    check_suffix("--out", arguments.out, ".png")
    check_exists(arguments.image, "Give an image, such as far generate --out FOLDER writes")
    check_exists(arguments.mask, "Give an image of the same size, or use --redraw, --keep or --place")
    check_writable(arguments.out)


def _image_and_mask(arguments: argparse.Namespace, size: tuple[int, int]) -> tuple[Image.Image, Tensor]:
    """Return the image at ``size`` (height, width), and a mask of that size, above 0.5 where to redraw."""
    from far.data.images import decode_image
    from far.editing import box_mask, place
    from far.pictures import to_tensor

    picture = decode_image(arguments.image)
    if arguments.place is not None:
        canvas, mask = place(picture, size, *arguments.place)
        return canvas, mask.float()
    fitted = _fit(picture, size, arguments.image)
    if arguments.redraw is not None:
        return fitted, box_mask(size, tuple(arguments.redraw)).float()
    if arguments.keep is not None:
        return fitted, 1 - box_mask(size, tuple(arguments.keep)).float()
    painted = decode_image(arguments.mask, "black")  # unpainted regions are kept
    if painted.size != picture.size:
        ours = f"{arguments.image} {picture.width}×{picture.height}. Give a mask of the image's size"
        raise InputError(f"{arguments.mask} has {painted.width}×{painted.height} pixels and {ours}")
    return fitted, _fitted_mask(to_tensor(painted).mean(dim=0), size)


def _fitted_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a mask cropped as :func:`_fit` crops images, and scaled by maxima so that thin strokes stay."""
    import torch.nn.functional as F

    if mask.shape == size:
        return mask
    scale = min(mask.shape[0] / size[0], mask.shape[1] / size[1])
    height, width = round(size[0] * scale), round(size[1] * scale)
    top, left = (mask.shape[0] - height) // 2, (mask.shape[1] - width) // 2
    return F.adaptive_max_pool2d(mask[None, top : top + height, left : left + width], size)[0]


def _fit(picture: Image.Image, size: tuple[int, int], path: Path) -> Image.Image:
    """Return an image at the model's size, prepared like a training image."""
    from far.data.images import center_crop

    height, width = size
    if picture.size == (width, height):
        return picture
    if picture.width < width or picture.height < height:
        ours = f"the model's images {width}×{height}. Resize it, or give --place LEFT TOP to draw around it"
        raise InputError(f"{path} has {picture.width}×{picture.height} pixels and {ours}")
    return center_crop(picture, size)
