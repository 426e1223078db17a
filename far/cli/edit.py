"""Redraw a part of an image: in it (inpainting), around it (outpainting), or as another class.

What is redrawn: the white of --mask, the inside of --redraw, the outside of --keep, or all around an image that is
smaller than the model's and lies at --place. The tokens that this touches are drawn anew, the others stay exactly.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from far.classes import label_text
from far.cli.machine_arguments import add_machine_arguments, prepare_machine, tell_chosen
from far.cli.sampling_arguments import add_sampling_arguments, sampling_options
from far.config import check_count, check_seed
from far.devices import device_title
from far.errors import InputError
from far.files import check_exists, check_writable
from far.names import find_folder
from far.notices import noticed
from far.precision import DTYPES

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from far.sampling import Progress

# All versions are drawn together.
_MOST_VERSIONS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "image", type=Path, help="of the model's size; a larger one is cropped to its middle and scaled"
    )
    parser.add_argument("--label", required=True, help="class number or name of what is drawn")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--mask", type=Path, help="image of the same size, white where to redraw")
    box = {"type": int, "nargs": 4, "metavar": ("LEFT", "TOP", "RIGHT", "BOTTOM")}
    where.add_argument("--redraw", **box, help="box to redraw, in the model's pixels")  # type: ignore[arg-type]
    where.add_argument("--keep", **box, help="box to keep; all around it is redrawn")  # type: ignore[arg-type]
    where.add_argument(
        "--place",
        type=int,
        nargs=2,
        metavar=("LEFT", "TOP"),
        help="where a smaller image lies; all around it is drawn",
    )
    parser.add_argument(
        "--weights",
        default="avatars-64",
        help="bundled name, folder or OWNER/NAME[@REVISION], with a masked backbone",
    )
    parser.add_argument(
        "--count", type=int, default=1, help="versions, of seeds SEED, SEED + 1, … (default 1)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("edited.png"),
        help="PNG, a contact sheet of several versions (default edited.png)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first version (default 0)")
    parser.add_argument(
        "--no-paste",
        action="store_true",
        help="decode kept tokens too, instead of putting the image's own pixels back",
    )
    add_sampling_arguments(parser)
    add_machine_arguments(parser, DTYPES)


def run(arguments: argparse.Namespace) -> None:
    check_seed("--seed", arguments.seed)
    check_count("--count", arguments.count, _MOST_VERSIONS)
    if arguments.out.suffix.lower() != ".png":
        raise InputError(f"--out {arguments.out}: give a name that ends with .png")
    check_exists(arguments.image, "Give an image, such as far generate --out FOLDER writes")
    check_exists(
        arguments.mask,
        "Give an image of the same size, white where to redraw; or --redraw, --keep or --place",
    )
    check_writable(arguments.out)
    weights = find_folder(arguments.weights)

    from torch import Tensor

    from far.pictures import contact_sheet, save_png
    from far.pipeline import Pipeline
    from far.precision import resolve_dtype
    from far.progress import ImageBar

    device = prepare_machine(arguments)
    dtype = resolve_dtype(arguments.dtype, device)
    with noticed(f"loading {arguments.weights}"):
        pipeline = Pipeline.from_pretrained(weights, dtype=dtype, device=device)
    picture, mask = _image_and_mask(arguments, pipeline.image_size)
    seeds = [arguments.seed + index for index in range(arguments.count)]
    sampling = sampling_options(arguments)
    steps = 0
    with ImageBar(
        arguments.count, "editing", delay=0.01
    ) as bar:  # appears with the first step, not before an error

        def report(progress: Progress) -> None:
            nonlocal steps
            if not steps:
                tell_chosen(device=(arguments.device, device_title(device)), dtype=(arguments.dtype, dtype))
            steps = progress.steps
            bar.ar_step(progress)

        images = pipeline.edit(
            picture,
            mask,
            arguments.label,
            seed=seeds,
            paste=not arguments.no_paste,
            output="tensor",
            callback=report,
            **sampling,
        )
    assert isinstance(images, Tensor)  # the output asked for
    config = dataclasses.replace(pipeline.sampling_config(**sampling), ar_steps=steps)
    settings = {
        "weights": arguments.weights,
        **dataclasses.asdict(config),
        "dtype": dtype,
        "image": arguments.image.name,
    }
    label = pipeline.label(arguments.label)
    sheet = contact_sheet(images, [label] * len(images))
    made = {
        "label": label_text(pipeline.classes, label),
        "class": pipeline.classes[label],
        "seed": arguments.seed,
    }
    save_png(sheet, arguments.out, {**settings, **made})
    print(f"wrote {arguments.out} ({arguments.count} {'version' if arguments.count == 1 else 'versions'})")


def _image_and_mask(arguments: argparse.Namespace, size: tuple[int, int]) -> tuple[Image.Image, Tensor]:
    """The image at the model's ``size`` (height, width), and ``[height, width]``, above 0.5 where to redraw."""
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
    painted = decode_image(arguments.mask, "black")  # what was not painted on is kept
    if painted.size != picture.size:
        raise InputError(
            f"{arguments.mask} has {painted.height}×{painted.width} pixels and {arguments.image} {picture.height}×{picture.width}; "
            "give a mask of the image's size"
        )
    return fitted, _fitted_mask(to_tensor(painted).mean(dim=0), size)


def _fitted_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of a mask as :func:`_fit` takes it of an image, so scaled that a thin stroke stays: every pixel counts."""
    import torch.nn.functional as F

    side = min(mask.shape)
    top, left = (mask.shape[0] - side) // 2, (mask.shape[1] - side) // 2
    return (
        mask
        if mask.shape == size
        else F.adaptive_max_pool2d(mask[None, top : top + side, left : left + side], size)[0]
    )


def _fit(picture: Image.Image, size: tuple[int, int], path: Path) -> Image.Image:
    """A picture at the model's size, as training images are prepared."""
    from far.data.images import center_crop

    height, width = size
    if picture.size == (width, height):
        return picture
    if min(picture.size) < max(size) or height != width:
        raise InputError(
            f"{path} has {picture.height}×{picture.width} pixels, the model's images {height}×{width}; "
            "resize it, or give --place LEFT TOP to draw around it"
        )
    return center_crop(picture, height)
