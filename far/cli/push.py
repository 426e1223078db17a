"""Publish a model and its card on the hub; log in first, with: hf auth login.

A card that somebody wrote or changed on the hub stays as it is.
"""

import argparse

from far.names import find_folder
from far.notices import noticed

_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", help="folder, bundled name, or OWNER/NAME[@REVISION] of the hub")
    parser.add_argument("name", metavar="OWNER/NAME[@BRANCH]", help="the repository, made where missing")
    parser.add_argument(
        "--license",
        required=True,
        help="of the weights, as the hub abbreviates it: mit, cc-by-nc-4.0, other …",
    )
    parser.add_argument(
        "--private", action="store_true", help="make a new repository private (default: as its owner's are)"
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="float32", help="of the published weights (default float32)"
    )


def run(arguments: argparse.Namespace) -> None:
    folder = find_folder(arguments.weights)

    import torch

    from far.pipeline import Pipeline

    with noticed(f"loading {arguments.weights}"):
        pipeline = Pipeline.from_pretrained(folder, device="cpu")
    address = pipeline.push_to_hub(
        arguments.name, license=arguments.license, private=arguments.private or None, dtype=getattr(torch, arguments.dtype)
    )  # fmt: skip
    print(f"{address}: published; draw from it with far generate --weights {arguments.name}")
