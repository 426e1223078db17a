"""Write a model for another library, into a new folder.

diffusers: for DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True), which needs far installed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

from far.cli.model_arguments import NAMES, load_pipeline
from far.errors import InputError
from far.files import check_empty_folder
from far.names import find_folder
from far.notices import noticed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    command = formats.add_parser("diffusers", help="a pipeline of diffusers", allow_abbrev=False)
    command.add_argument("weights", help=NAMES)
    command.add_argument("out", type=Path, help="folder to write, new or empty")
    dtypes = ("float32", "bfloat16", "float16")
    help = "dtype of the written weights (default float32)"
    command.add_argument("--dtype", choices=dtypes, default="float32", help=help)
    command.set_defaults(export=_to_diffusers)


def run(arguments: argparse.Namespace) -> None:
    check_empty_folder(arguments.out)
    arguments.export(arguments, find_folder(arguments.weights))


def _to_diffusers(arguments: argparse.Namespace, folder: Path) -> None:
    export = diffusers_pipeline().export_diffusers

    import torch

    pipeline = load_pipeline(arguments.weights, folder, "float32", torch.device("cpu"))
    with noticed(f"exporting {arguments.weights}"):
        export(pipeline, arguments.out, getattr(torch, arguments.dtype))
    print(f"{arguments.out}: exported from {arguments.weights}. Load it with trust_remote_code=True")


def diffusers_pipeline() -> ModuleType:
    """Return the module of diffusers' pipelines.

    Raises:
        InputError: diffusers is not installed.
    """
    try:
        import far.diffusers_pipeline
    except ModuleNotFoundError as error:
        raise InputError(f"this needs {error.name}. Run pip install 'far-image[diffusers]'") from error
    return far.diffusers_pipeline
