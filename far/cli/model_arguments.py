"""Arguments of commands that draw with one model, and how they load it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from far.autoencoder_config import DECODERS
from far.cli.machine_arguments import add_machine_arguments
from far.cli.sampling_arguments import add_sampling_arguments
from far.errors import InputError
from far.notices import noticed
from far.onnx.config import is_export
from far.precision import DTYPES

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from far.pipeline import Pipeline

NAMES = "bundled name, folder, or OWNER/NAME[@REVISION] of the hub"


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--weights``."""
    meaning = f"{NAMES} (default avatars-64)"
    parser.add_argument("--weights", metavar="MODEL", default="avatars-64", help=meaning)


def add_decoder_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--decoder``."""
    meaning = "decoder of latents: small is faster and approximate, if the model has one (default full)"
    parser.add_argument("--decoder", choices=DECODERS, default="full", help=meaning)


def add_drawing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sampling options and the options of the machine."""
    add_sampling_arguments(parser)
    add_machine_arguments(parser, DTYPES)
    add_decoder_argument(parser)


def add_graph_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--no-record`` and ``--compile``."""
    meaning = "on CUDA, run every AR step from Python instead of recording generations as graphs"
    parser.add_argument("--no-record", dest="record", action="store_false", help=meaning)
    meaning = "compile the model's blocks; the first batch then takes longer, by a minute or more"
    parser.add_argument("--compile", action="store_true", help=meaning)


def check_export(arguments: argparse.Namespace, folder: Path) -> None:
    """Raise an :class:`InputError` for an option that does not apply if ``folder`` is an ONNX export."""
    if not is_export(folder):
        return
    allowed: dict[str, tuple[object, ...]] = {
        "device": ("auto", "cpu"), "dtype": ("auto",), "decoder": ("full",), "fast": (False,),
        "compile": (False,),
    }  # fmt: skip
    check_applies(arguments, allowed, f"the ONNX export {folder}")


def check_applies(arguments: argparse.Namespace, allowed: Mapping[str, Sequence[object]], place: str) -> None:
    """Raise an :class:`InputError` for an option with a value other than the ``allowed`` ones.

    Args:
        allowed: values by option; the first one is the default.
        place: where other values do not apply, for the message.
    """
    for name, values in allowed.items():
        if (given := getattr(arguments, name, values[0])) not in values:
            if isinstance(given, bool):
                option = f"--{name}" if given else f"--no-{name}"
            else:
                shown = " ".join(map(str, given)) if isinstance(given, list) else given
                option = f"--{name.replace('_', '-')} {shown}"
            raise InputError(f"{option} does not apply to {place}. Omit it")


def load_pipeline(name: str, folder: Path, dtype: str, device: torch.device, **options: Any) -> Pipeline:
    """Return the pipeline in ``folder``, with a line on stderr that names it if loading takes long.

    ``options`` are further parameters of :meth:`far.Pipeline.from_pretrained`.
    """
    from far.pipeline import Pipeline

    with noticed(f"loading {name}"):
        return Pipeline.from_pretrained(folder, dtype=dtype, device=device, **options)


def load_model_or_export(
    name: str, folder: Path, dtype: str, device: torch.device, **options: Any
) -> tuple[Pipeline, torch.device, str]:
    """Return the pipeline in ``folder`` as :func:`load_pipeline` or that of an ONNX export; device and dtype.

    An export has its own dtype and device; see :func:`check_export`.
    """
    if not is_export(folder):
        pipeline = load_pipeline(name, folder, dtype, device, **options)
        return pipeline, device, pipeline.dtype
    from far.onnx import load

    with noticed(f"loading {name}"):
        pipeline = load(folder)
    return pipeline, pipeline.device, pipeline.dtype
