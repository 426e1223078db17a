"""Generate images with a model: a contact sheet, a folder of PNGs, or an .npz.

A contact sheet has one row per class. The pixels of small images are repeated, so that it is at least 1000
pixels wide. A single image, and those in a folder or .npz, are written at their own size. Image i has seed
SEED + i, so an image does not depend on the batch around it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from far.classes import label_text
from far.cli.machine_arguments import prepare_machine, print_chosen
from far.cli.model_arguments import (
    add_drawing_arguments,
    add_graph_arguments,
    add_weights_argument,
    check_export,
    load_model_or_export,
)
from far.cli.sampling_arguments import MOST_IMAGES, sampling_options
from far.config import check_count, check_seed
from far.devices import device_title
from far.errors import InputError
from far.files import check_suffix, check_writable, files_together
from far.names import find_folder
from far.notices import noticed
from far.sampling_config import SamplingConfig, fast_options

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from far.pipeline import Pipeline
    from far.sampling import Progress

# Suffixes of other image formats, which nobody means as the name of a folder.
_OTHER_FORMATS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_weights_argument(parser)
    add = parser.add_argument
    add("--labels", nargs="+", metavar="LABEL", help="class numbers or names, or 'all' (default)")
    count_help = "number of images, shared evenly by the labels (default: one per label)"
    add("--count", type=int, metavar="N", help=count_help)
    out_help = ".png (a contact sheet), .npz, or a folder of PNGs (default samples.png)"
    add("--out", type=Path, default=Path("samples.png"), help=out_help)
    add("--seed", type=int, metavar="N", default=0, help="seed of the first image (default 0)")
    add("--overwrite", action="store_true", help="replace the generated images that the folder --out holds")
    fast_help = "approximate: int8 on a CPU; masked models recompute all positions every 4th AR step only"
    add("--fast", action="store_true", help=fast_help)
    add("--batch-size", type=int, metavar="N", default=64, help="images drawn together (default 64)")
    add("--gif", type=Path, help="also write an animation of the first batch, token by token")
    add_drawing_arguments(parser)
    add_graph_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    weights = find_folder(arguments.weights)
    check_export(arguments, weights)

    import torch

    from far.evaluation.images import write_npz
    from far.pictures import contact_sheet, drawing_settings, save_gif, save_png, to_pictures, to_uint8
    from far.precision import resolve_dtype
    from far.tokenizer import decoder_setting

    device = prepare_machine(arguments)
    dtype = resolve_dtype(_dtype(arguments, device), device)
    options = {name: getattr(arguments, name) for name in ("record", "compile", "decoder")}
    pipeline, device, dtype = load_model_or_export(arguments.weights, weights, dtype, device, **options)
    chosen, places = _labels(pipeline, arguments)
    labels = [chosen[place] for place in places]
    texts = [label_text(pipeline.classes, label) for label in labels]
    options = sampling_options(arguments)
    if arguments.fast:
        options = {**fast_options(pipeline.model), **options}
    config = pipeline.sampling_config(**options)
    config.check(pipeline.model)  # before the bar appears
    print_chosen(device=(arguments.device, device_title(device)), dtype=(arguments.dtype, dtype))
    folder, png = _is_folder(arguments.out), arguments.out.suffix.lower() == ".png"
    sampling = dataclasses.asdict(config) | decoder_setting(pipeline.autoencoder)
    parts: list[Any] = []
    frames: list[Image.Image] = []
    # A folder is filled at the end, so that an interrupted run is not mistaken for a whole one.
    earlier = functools.partial(_earlier_images, arguments.out, arguments.overwrite)
    with files_together(arguments.out, earlier) if folder else contextlib.nullcontext(arguments.out) as out:

        def finish(images: Tensor, start: int) -> None:
            if not folder:
                parts.append(images.cpu() if png else to_uint8(images))
                return
            for number, picture in enumerate(to_pictures(images), start):
                label, seed = labels[number], arguments.seed + number
                made = drawing_settings(arguments.weights, sampling, dtype, pipeline.classes, label, seed)
                save_png(picture, out / f"{number:06d}.png", made)

        done = _draw(pipeline, labels, config, arguments, finish, frames if arguments.gif else None)
        for number in range(done, len(labels)) if folder else ():  # a batch whose writing was interrupted
            (out / f"{number:06d}.png").unlink(missing_ok=True)
    if not folder:
        drawn = {"labels": " ".join(texts[:done]), "seed": arguments.seed}
        described = {"weights": arguments.weights, **sampling, "dtype": dtype, **drawn}
        if png:
            save_png(contact_sheet(torch.cat(parts)[:done], labels[:done]), arguments.out, described)
        else:
            finished = parts[: -(-done // arguments.batch_size)]  # without a batch that was interrupted
            write_npz(arguments.out, finished, done, labels[:done])
    if done < len(labels):
        raise KeyboardInterrupt(_remaining(arguments, texts, places, done))
    if arguments.gif is not None:
        with noticed(f"writing {arguments.gif}"):
            save_gif(frames, arguments.gif)
        print(f"wrote {arguments.gif}")
    print(f"wrote {arguments.out} ({len(labels)} image{'s' if len(labels) != 1 else ''})")


def _check(arguments: argparse.Namespace) -> None:
    """Check all arguments that need no model."""
    check_count("--batch-size", arguments.batch_size, 2**40)
    check_seed("--seed", arguments.seed)
    if arguments.count is not None:
        check_count("--count", arguments.count, MOST_IMAGES)
    if arguments.out.suffix.lower() in _OTHER_FORMATS:
        raise InputError(f"--out {arguments.out} is not supported. Give a name in .png or .npz, or a folder")
    filled = _is_folder(arguments.out) and arguments.out.exists()
    if filled:
        _earlier_images(arguments.out, arguments.overwrite)
    check_writable(arguments.out / "000000.png" if filled else arguments.out)
    check_suffix("--gif", arguments.gif, ".gif")
    if arguments.gif is not None:
        check_writable(arguments.gif)


def _is_folder(out: Path) -> bool:
    return out.suffix.lower() not in (".png", ".npz")


def _draw(
    pipeline: Pipeline,
    labels: list[int],
    config: SamplingConfig,
    arguments: argparse.Namespace,
    finish: Callable[[Tensor, int], None],
    frames: list[Image.Image] | None,
) -> int:
    """Draw images batch by batch, and return how many are finished. An interruption leaves whole batches.

    ``finish`` takes each batch ``[b, 3, h, w]`` and the number of its first image. ``frames`` receives a
    contact sheet of the first batch after each AR step.
    """
    from far.pictures import contact_sheet
    from far.progress import ImageBar

    done = 0
    with ImageBar(len(labels), "generating") as bar:

        def step(progress: Progress) -> None:
            bar.ar_step(progress)
            if frames is not None and done == 0:
                frames.append(contact_sheet(pipeline.preview(progress), labels[: arguments.batch_size]))

        try:
            while done < len(labels):
                chunk = labels[done : done + arguments.batch_size]
                seeds = [arguments.seed + done + index for index in range(len(chunk))]
                images = pipeline.draw(chunk, seeds, config, batch_size=arguments.batch_size, callback=step)
                finish(images, done)
                done += len(chunk)
        except KeyboardInterrupt:
            if not done:
                raise
    return done


def _remaining(arguments: argparse.Namespace, texts: list[str], places: list[int], done: int) -> str:
    """Return how many images an interruption leaves, and the commands that draw the others.

    One command draws the rest of the label at which the drawing ended, and one the labels after it.
    """
    rest = places[done:]
    names = list(dict(zip(rest, texts[done:])).values())
    partial = rest.count(rest[0]) if rest[0] == places[done - 1] else 0
    parts = [(names[:1], partial), (names[1:], len(rest) - partial)] if partial else [(names, len(rest))]
    numbered = (f"{arguments.out.stem}-{number}{arguments.out.suffix}" for number in itertools.count(2))
    outs = (out for name in numbered if not (out := arguments.out.with_name(name)).exists())
    commands, seed = [], arguments.seed + done
    for labels, count in parts:
        if count:
            changed = {"labels": labels, "count": count, "seed": seed, "out": next(outs), "gif": None}
            commands.append(_command({**vars(arguments), "overwrite": False, **changed}))
            seed += count
    return f"{done} of {len(places)} images are in {arguments.out}. Draw the others: {' && '.join(commands)}"


def _command(arguments: dict[str, Any]) -> str:
    """Return the command line that gives these arguments."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["far", "generate"]
    for action in parser._actions:
        value = arguments.get(action.dest, action.default)
        if value != action.default:
            values = value if isinstance(value, list) else [] if isinstance(value, bool) else [value]
            words += [action.option_strings[-1], *map(str, values)]
    return shlex.join(words)


def _earlier_images(folder: Path, overwrite: bool) -> list[Path]:
    """Return the numbered PNGs of an earlier run in ``folder``, which ``overwrite`` allows to replace."""
    if not folder.is_dir():
        raise InputError(f"--out {folder} is a file. Give a folder, or a name that ends in .png or .npz")
    suffixes = (".png", ".jpg", ".jpeg", ".webp")
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    for path in images:
        if not re.fullmatch(r"[0-9]{6,}\.png", path.name):
            raise InputError(f"--out {folder} holds another image, {path.name}. Choose another folder")
    if images and not overwrite:
        raise InputError(f"--out {folder} holds {len(images)} images. Add --overwrite to replace them")
    return images


def _dtype(arguments: argparse.Namespace, device: torch.device) -> str:
    """Return the requested dtype. ``--fast`` alone selects int8 if supported, and prints why if not."""
    if not arguments.fast or arguments.dtype != "auto":
        return str(arguments.dtype)

    from far.kernels import no_int8

    reason = no_int8() if device.type == "cpu" else f"int8 is for CPUs, not for {device}"
    if reason is None:
        return "int8"
    print(f"--fast does not use int8 weights: {reason}")
    return "auto"


def _labels(pipeline: Pipeline, arguments: argparse.Namespace) -> tuple[list[int], list[int]]:
    """Return the chosen classes, and for each image the index of its class among them.

    Each class has equally many images, or the first ones have one more.
    """
    every = arguments.labels is None or (arguments.labels == ["all"] and "all" not in pipeline.classes)
    chosen = [pipeline.label(name) for name in (range(len(pipeline.classes)) if every else arguments.labels)]
    count = len(chosen) if arguments.count is None else arguments.count
    check_count("--count", count, MOST_IMAGES)  # the default is the number of labels
    return chosen, sorted(number % len(chosen) for number in range(count))
