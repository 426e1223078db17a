"""Convert a published MAR checkpoint, MAR's KL-16 or an AutoencoderKL of diffusers into a model folder.

A MAR and an autoencoder in the same folder are a whole model. Nothing in a pickle is executed.
to-diffusers converts the autoencoder of any model back.
"""

import argparse
from pathlib import Path

from far.cli.model_arguments import NAMES
from far.files import check_exists
from far.names import find_folder
from far.notices import noticed

_SOURCES = {
    "mar": "Get checkpoint-last.pth from MAR's page, github.com/LTH14/mar",
    "kl16": "Get kl16.ckpt from MAR's page, github.com/LTH14/mar",
    "from-diffusers": "Give the folder of an AutoencoderKL, such as vae in a diffusers pipeline",
    "to-diffusers": "Give a folder with an autoencoder, such as far train-autoencoder writes",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    mar = kinds.add_parser("mar", help="a MAR checkpoint (.pth)", allow_abbrev=False)
    mar.add_argument("source", type=Path, help="checkpoint-last.pth")
    mar.add_argument("out", type=Path, help="folder to write")
    mar.add_argument("--no-ema", action="store_true", help="convert the raw weights, not the EMA weights")
    kl16 = kinds.add_parser("kl16", help="MAR's KL-16 autoencoder (.ckpt)", allow_abbrev=False)
    kl16.add_argument("source", type=Path, help="kl16.ckpt")
    kl16.add_argument("out", type=Path, help="folder to write; may hold a converted MAR")
    inward = kinds.add_parser(
        "from-diffusers", help="an AutoencoderKL of diffusers (folder)", allow_abbrev=False
    )
    inward.add_argument(
        "source",
        type=Path,
        help="folder with config.json and diffusion_pytorch_model….safetensors, whole or in shards",
    )
    inward.add_argument("out", type=Path, help="folder to write; may hold a converted MAR")
    outward = kinds.add_parser(
        "to-diffusers", help="any model's autoencoder, into an AutoencoderKL of diffusers", allow_abbrev=False
    )
    outward.add_argument("source", metavar="weights", help=NAMES)
    outward.add_argument("out", type=Path, help="folder to write")


def run(arguments: argparse.Namespace) -> None:
    source = find_folder(arguments.source) if arguments.kind == "to-diffusers" else arguments.source
    check_exists(source, _SOURCES[arguments.kind])

    from far.convert import convert_kl16, convert_mar
    from far.diffusers_format import from_diffusers, to_diffusers
    from far.folder import load_autoencoder

    read = ""
    with noticed(f"converting {source}"):
        if arguments.kind == "mar":
            convert_mar(source, arguments.out, ema=not arguments.no_ema)
        elif arguments.kind == "kl16":
            convert_kl16(source, arguments.out)
        elif arguments.kind == "from-diffusers":
            read = f" ({from_diffusers(source, arguments.out)})"
        else:
            to_diffusers(load_autoencoder(source, device="cpu"), arguments.out)
    print(f"{arguments.out}: converted from {arguments.source}{read}")
