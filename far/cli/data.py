"""Write an image set: from a folder of your own images, Fashion-MNIST, or rendered avatars.

An image set is a folder with train/ and held-out/ in it. The same command continues an interrupted run.
"""

import argparse
from pathlib import Path

from far.data.avatar_styles import HELD_OUT_SEED
from far.files import check_exists

_OUT = "folder of the image set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")

    folder = sources.add_parser("folder", help="your own images, one subfolder per class", allow_abbrev=False)
    add = folder.add_argument
    add("images", type=Path, help="folder with one subfolder of images per class")
    add("out", type=Path, help=_OUT)
    add("--size", type=int, default=256, help="side of the images in pixels (default 256)")
    share_help = "for evaluation (default 0.05)"
    add("--held-out-share", type=float, default=0.05, metavar="FRACTION", help=share_help)
    add("--strict", action="store_true", help="stop at the first unreadable file")
    add("--keep-colors", action="store_true", help="ignore color profiles, as ADM does for ImageNet")

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


def run(arguments: argparse.Namespace) -> None:
    if arguments.source == "folder":
        check_exists(arguments.images, "Give a folder with one subfolder of images per class")

        from far.data.folders import write_folder

        options = (arguments.size, arguments.held_out_share, arguments.strict, arguments.keep_colors)
        summary = write_folder(arguments.images, arguments.out, *options)
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
