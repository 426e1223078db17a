"""Publish a model and its card on the hub. Log in first, with: hf auth login.

A card on the hub is kept unless a comment in it marks it as generated.
"""

import argparse

from far.cli.model_arguments import NAMES
from far.names import find_folder
from far.notices import noticed

_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", help=NAMES)
    parser.add_argument("name", metavar="OWNER/NAME[@BRANCH]", help="repository, created if missing")
    parser.add_argument(
        "--license",
        required=True,
        metavar="NAME",
        help="license of the weights in the hub's spelling: mit, cc-by-nc-4.0, other …",
    )
    parser.add_argument(
        "--private", action="store_true", help="create a private repository (default: the owner's setting)"
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="float32", help="dtype of the published weights (default float32)"
    )


def run(arguments: argparse.Namespace) -> None:
    folder = find_folder(arguments.weights)

    import torch

    from far.pipeline import Pipeline

    with noticed(f"loading {arguments.weights}"):
        pipeline = Pipeline.from_pretrained(folder, device="cpu")
    address = pipeline.push_to_hub(
        arguments.name,
        license=arguments.license,
        private=arguments.private or None,
        dtype=getattr(torch, arguments.dtype),
    )
    print(f"{address}: published. Generate images with far generate --weights {arguments.name}")
