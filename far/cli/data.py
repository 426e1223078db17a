"""Write an image set: from your own images (far data SOURCE OUT), Fashion-MNIST, or rendered avatars.

An image set is a folder with train/ and held-out/ in it. The same command continues an interrupted run.
far data from --help lists the options of far data SOURCE OUT.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from far.data.avatar_styles import HELD_OUT_SEED
from far.data.detection import open_source
from far.data.image_folders import class_folder_source
from far.data.sources import Source
from far.files import check_exists

_OUT = "folder of the image set"
_KINDS = ("from", "folder", "fashion-mnist", "avatars")


def with_kind(arguments: Sequence[str]) -> list[str]:
    """Insert the word ``from`` that ``far data SOURCE OUT`` leaves out; options may come first."""
    words = arguments[1:]
    if arguments[:1] != ["data"] or not words or words[0] in (*_KINDS, "-h", "--help"):
        return list(arguments)
    return ["data", "from", *words]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")

    help_text = "your own images, of any kind; the word from may be left out"
    images = sources.add_parser("from", help=help_text, allow_abbrev=False)
    images.add_argument("images", help="folder of images, or .tar, .parquet, .csv or .jsonl files")
    _add_preparation(images)
    no_copy = "do not store the training images: far cache reads them from SOURCE"
    images.add_argument("--no-copy", action="store_true", help=no_copy)
    images.add_argument("--label", metavar="NAME", help="column or JSON key of the labels (default label)")
    folder = sources.add_parser("folder", help="one subfolder of images per class", allow_abbrev=False)
    folder.add_argument("images", help="folder with one subfolder of images per class")
    _add_preparation(folder)
    folder.set_defaults(no_copy=False)

    fashion = sources.add_parser("fashion-mnist", help="Fashion-MNIST's IDX files", allow_abbrev=False)
    add = fashion.add_argument
    add("out", type=Path, help=_OUT)
    add("--from", dest="files", type=Path, required=True, metavar="FOLDER", help="holds the four .gz files")

    avatars = sources.add_parser("avatars", help="drawn avatars in sixteen CC0 styles", allow_abbrev=False)
    add = avatars.add_argument
    add("out", type=Path, help=_OUT)
    add("--size", type=int, default=64, help="side in pixels, a divisor of 128 (default 64)")
    add("--per-class", type=int, default=HELD_OUT_SEED, help=f"training images (default {HELD_OUT_SEED})")
    add("--held-out-per-class", type=int, default=625, help="held-out images (default 625)")


def _pixels(text: str) -> int | tuple[int, int]:
    """Return the side of squares, or (height, width)."""
    match = re.fullmatch("([0-9]{1,9})(?:x([0-9]{1,9}))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a side nor WIDTHxHEIGHT")
    width, height = int(match[1]), int(match[2] or match[1])
    return width if width == height else (height, width)


def _add_preparation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("out", type=Path, help=_OUT)
    add("--size", type=_pixels, default=256, help="side in pixels, or WIDTHxHEIGHT (default 256)")
    add("--resize-only", action="store_true", help="stretch images to the size instead of cropping them")
    share_help = "for evaluation (default 0.05, or the source's own part)"
    add("--held-out-share", type=float, metavar="FRACTION", help=share_help)
    add("--strict", action="store_true", help="stop at the first unreadable file")
    add("--keep-colors", action="store_true", help="ignore color profiles, as ADM does for ImageNet")


def run(arguments: argparse.Namespace) -> None:
    if arguments.source in ("from", "folder"):
        source = _open(arguments)

        from far.data.packing import Preparation, write_images

        preparation = Preparation(
            arguments.size,
            held_out_share=arguments.held_out_share,
            strict=arguments.strict,
            keep_colors=arguments.keep_colors,
            copy=not arguments.no_copy,
            crop=not arguments.resize_only,
        )
        summary = write_images(source, arguments.out, preparation)
    elif arguments.source == "fashion-mnist":
        check_exists(arguments.files, "Give a folder with the four .gz files of Fashion-MNIST")

        from far.data.fashion_mnist import write_fashion_mnist

        summary = write_fashion_mnist(arguments.files, arguments.out)
    else:
        from far.data.avatars import write_avatars

        counts = (arguments.per_class, arguments.held_out_per_class)
        summary = write_avatars(arguments.out, arguments.size, *counts)
    for hint in summary.hints:
        print(f"far: note: {hint}")
    print(f"{arguments.out}: {summary}")


def _open(arguments: argparse.Namespace) -> Source:
    if arguments.source == "folder":
        check_exists(Path(arguments.images), "Give a folder with one subfolder of images per class")
        return class_folder_source(Path(arguments.images))
    source = open_source(arguments.images, arguments.label)
    print(f"{arguments.images}: {source.kind}")
    return source
