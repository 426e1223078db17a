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

# Kind → help, and its source.
_KINDS = {
    "mar": ("a MAR checkpoint (.pth)", "checkpoint-last.pth of MAR's page, github.com/LTH14/mar"),
    "kl16": ("MAR's KL-16 autoencoder (.ckpt)", "kl16.ckpt of MAR's page, github.com/LTH14/mar"),
    "from-diffusers": (
        "an AutoencoderKL of diffusers (folder)",
        "folder with config.json and diffusion_pytorch_model….safetensors, such as vae in a pipeline",
    ),
    "to-diffusers": ("any model's autoencoder, into an AutoencoderKL of diffusers", NAMES),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, (summary, source) in _KINDS.items():
        outward = kind == "to-diffusers"
        others = "" if outward else "; may hold the other part of a model"
        command = kinds.add_parser(kind, help=summary, allow_abbrev=False)
        command.add_argument("source", type=str if outward else Path, help=source)
        command.add_argument("out", type=Path, help=f"folder to write{others}")
        if kind == "mar":
            command.add_argument("--no-ema", action="store_true", help="convert the raw, not the EMA weights")


def run(arguments: argparse.Namespace) -> None:
    source = find_folder(arguments.source) if arguments.kind == "to-diffusers" else arguments.source
    check_exists(source, f"Give the {_KINDS[arguments.kind][1]}")

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
