"""Publish a model and its card on the hub. Log in first, with: hf auth login.

A card on the hub is kept unless a comment in it marks it as generated.
"""

import argparse

from far.cli.export import diffusers_pipeline
from far.cli.model_arguments import NAMES, load_pipeline
from far.names import find_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("weights", help=NAMES)
    add("name", metavar="OWNER/NAME[@BRANCH]", help="repository, created if missing")
    license_help = "license of the weights in the hub's spelling: mit, cc-by-nc-4.0, other …"
    add("--license", required=True, metavar="NAME", help=license_help)
    add("--private", action="store_true", help="create a private repository (default: the owner's setting)")
    dtype_help = "dtype of the published weights (default float32)"
    diffusers_help = "publish a pipeline of diffusers, as far export diffusers writes it"
    add("--diffusers", action="store_true", help=diffusers_help)
    include_help = "publish a copy of an autoencoder of diffusers too, not only its name"
    add("--include-autoencoder", action="store_true", help=include_help)
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help=dtype_help)


def run(arguments: argparse.Namespace) -> None:
    folder = find_folder(arguments.weights)

    import torch

    from far.diffusers_autoencoder import DiffusersAutoencoder

    dtype, private = getattr(torch, arguments.dtype), arguments.private or None
    if arguments.diffusers:
        push = diffusers_pipeline().push_diffusers
    pipeline = load_pipeline(arguments.weights, folder, "float32", torch.device("cpu"))
    if arguments.diffusers:
        message = "Upload a model of far as a pipeline of diffusers"
        license, upload = arguments.license, {"private": private, "message": message}
        address = push(pipeline, arguments.name, dtype, license=license, **upload)
        print(f"{address}: published. Load it with trust_remote_code=True")
        return
    if arguments.include_autoencoder and isinstance(pipeline.autoencoder, DiffusersAutoencoder):
        pipeline.autoencoder.include_weights()
    address = pipeline.push_to_hub(arguments.name, license=arguments.license, private=private, dtype=dtype)
    print(f"{address}: published. Generate images with far generate --weights {arguments.name}")
