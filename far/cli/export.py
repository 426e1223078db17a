"""Write a model for another library, into a new folder.

diffusers: for DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True), which needs far installed.
web: a page that draws in the browser, for any static web server. Try it with far demo --static FOLDER.
onnx: ONNX files, with a config.json that specifies the loop around them. far generate and far edit draw from
such a folder with ONNX Runtime, other programs in any language that has it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any

from far.cli.model_arguments import NAMES, add_decoder_argument, load_pipeline
from far.errors import InputError
from far.files import check_empty_folder
from far.names import find_folder
from far.notices import noticed
from far.onnx.config import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    written = "dtype of the written weights (default float32)"
    command = _add_format(formats, "diffusers", "a pipeline of diffusers")
    dtypes = ("float32", "bfloat16", "float16")
    command.add_argument("--dtype", choices=dtypes, default="float32", help=written)
    command.set_defaults(export=_to_diffusers)
    command = _add_format(formats, "onnx", "files for ONNX Runtime")
    command.add_argument(
        "--dtype", choices=DTYPES, default="float32", help=f"{written}; int8 also computes in it"
    )
    add_decoder_argument(command)
    command.set_defaults(export=_to_onnx)
    command = _add_format(formats, "web", "a page that draws in the browser")
    stored = "dtype of the weights (default int8, the smallest)"
    command.add_argument("--dtype", choices=DTYPES, default="int8", help=stored)
    add_decoder_argument(command)
    runtime = "folder dist of the npm package onnxruntime-web (default: npm downloads it)"
    command.add_argument("--runtime-files", type=Path, metavar="FOLDER", help=runtime)
    command.set_defaults(export=_to_web)


def _add_format(formats: Any, name: str, summary: str) -> argparse.ArgumentParser:
    """Add the parser of a format, with the arguments of all formats."""
    command: argparse.ArgumentParser = formats.add_parser(name, help=summary, allow_abbrev=False)
    command.add_argument("weights", help=NAMES)
    command.add_argument("out", type=Path, help="folder to write, new or empty")
    return command


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


def _to_onnx(arguments: argparse.Namespace, folder: Path) -> None:
    from far.onnx import export

    with noticed(f"exporting {arguments.weights}"):
        export(folder, arguments.out, dtype=arguments.dtype, decoder=arguments.decoder)
    size = sum(path.stat().st_size for path in arguments.out.iterdir()) / 1e6
    print(f"{arguments.out}: exported from {arguments.weights} ({size:.1f} MB)")


def _to_web(arguments: argparse.Namespace, folder: Path) -> None:
    from far.onnx.web import export_web

    with noticed(f"exporting {arguments.weights}"):
        options = {name: getattr(arguments, name) for name in ("dtype", "runtime_files", "decoder")}
        export_web(folder, arguments.out, **options)
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file()) / 1e6
    how = f"Try it with far demo --static {arguments.out}"
    print(f"{arguments.out}: exported from {arguments.weights} ({size:.1f} MB). {how}")


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
