"""Convert a published MAR checkpoint, or MAR's KL-16 autoencoder, into a folder that far.load reads.

Both into the same folder give a model that generates images. Nothing in a pickle is executed.
"""

import argparse
from pathlib import Path

from far.convert import convert_kl16, convert_mar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    mar = kinds.add_parser("mar", help="a MAR checkpoint (.pth)", allow_abbrev=False)
    mar.add_argument("source", type=Path, help="checkpoint-last.pth")
    mar.add_argument("out", type=Path, help="folder to write")
    mar.add_argument("--no-ema", action="store_true", help="take the raw weights instead of the EMA ones")
    kl16 = kinds.add_parser("kl16", help="MAR's KL-16 autoencoder (.ckpt)", allow_abbrev=False)
    kl16.add_argument("source", type=Path, help="kl16.ckpt")
    kl16.add_argument("out", type=Path, help="folder to write; may hold a converted MAR")


def run(arguments: argparse.Namespace) -> None:
    if arguments.kind == "mar":
        convert_mar(arguments.source, arguments.out, ema=not arguments.no_ema)
    else:
        convert_kl16(arguments.source, arguments.out)
    print(f"{arguments.out}: converted from {arguments.source}")
