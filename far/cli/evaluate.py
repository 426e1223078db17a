"""Evaluate images: Fréchet distance, KID, Inception Score, precision, recall, density and coverage.

With --autoencoder, the images are reconstructed first, and PSNR and SSIM are reported too.

The default network is EfficientNet-Lite0, whose values are not comparable with published ones. The perceptual
loss of autoencoders uses it too; no loss uses --features efficientnet-lite2. --inception FILE loads FID's own
weights, for values that compare with published ones. result.json holds the values and all settings to repeat
them. The same command continues an interrupted generation, and several processes can share it: torchrun
--nproc-per-node N -m far evaluate …
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import platform
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import far
from far.classes import unmatched_classes
from far.cli.machine_arguments import add_machine_arguments, prepare_machine, print_chosen
from far.cli.model_arguments import NAMES, add_decoder_argument, add_graph_arguments, check_applies
from far.cli.sampling_arguments import MOST_IMAGES, add_sampling_arguments, sampling_options
from far.config import check_count, check_seed
from far.data.listing import describe
from far.devices import device_title
from far.diffusers_config import PREFIX
from far.errors import InputError
from far.files import check_exists, check_suffix, check_writable, printable, write_json
from far.names import find_folder
from far.notices import noticed
from far.precision import DTYPES
from far.processes import joined, started_by_torchrun

if TYPE_CHECKING:
    import torch

    from far.evaluation.features import Extractor
    from far.evaluation.images import ImageSource
    from far.evaluation.references import Reference

_DEFAULT_COUNT = 10_000
# Distance between the first images of consecutive --seed values: above any count, so none share an image.
_IMAGE_SEEDS = 2**32
_CLASSES_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True).add_argument
    source("--weights", metavar="MODEL", help=f"model that generates the images: {NAMES}")
    source("--images", type=Path, metavar="FOLDER", help="folder of images, or an image set of far data")
    source("--npz", type=Path, metavar="FILE", help="uint8 images [n, h, w, 3] as arr_0, ADM's format")
    number = functools.partial(parser.add_argument, type=int, metavar="N")
    path = functools.partial(parser.add_argument, type=Path)
    add = parser.add_argument
    add(
        "--autoencoder",
        metavar="MODEL",
        help="evaluate its reconstructions of --images or --npz instead",
    )
    path("--reference", metavar="PATH", help="images as above, or a statistics file (.npz with mu and sigma)")
    number("--count", help="number of images (default: 10000 of a model, all of a folder or .npz)")
    path("--out", metavar="FOLDER", default="evaluation", help="folder for result.json (default evaluation)")
    network = parser.add_mutually_exclusive_group().add_argument
    network("--features", metavar="NETWORK", help="efficientnet-lite0 (default) or efficientnet-lite2")
    inception = "state dict pt_inception-2015-12-05, for FID as published"
    network("--inception", type=Path, metavar="FILE", help=inception)
    number("--seed", default=0, help="image i has seed SEED · 2³² + i; seeds subsets and splits (default 0)")
    number("--batch-size", default=64, help="images drawn together, at most 100 (default 64)")
    path("--save-npz", metavar="FILE", help="also write the model's images in ADM's format")
    path("--save-statistics", metavar="FILE", help="write mu, sigma and features, for a later --reference")
    path("--cache", metavar="FOLDER", help="folder for features (default: far in the user's cache folder)")
    add_sampling_arguments(parser)
    add_machine_arguments(parser, DTYPES[1:], "float32")
    add_graph_arguments(parser)
    add_decoder_argument(parser)


@dataclasses.dataclass(frozen=True)
class EvaluatedImages:
    """Images to evaluate, opened and checked.

    ``size`` is (height, width) in pixels. ``described`` goes into ``result.json``. ``extract`` computes
    missing features, and returns all on rank 0; ``similarity`` then compares reconstructions with their
    originals. ``parts`` is the folder of generated or reconstructed images, removed at the end.
    """

    count: int
    size: tuple[int, int] | None
    described: dict[str, Any]
    extract: Callable[[], torch.Tensor]
    parts: Path | None = None
    classes: Sequence[str] = ()
    similarity: Callable[[], dict[str, float]] = dict


def run(arguments: argparse.Namespace) -> None:
    _check(arguments)

    import torch

    from far.evaluation.features import DEFAULT_NETWORK, load_feature_network
    from far.evaluation.inception import load_inception
    from far.evaluation.references import default_cache, open_reference, write_statistics
    from far.evaluation.report import check_counts

    device = prepare_machine(arguments, started_by_torchrun())
    name, weights = arguments.features or DEFAULT_NETWORK, arguments.inception
    network = load_inception(weights) if weights else load_feature_network(name)
    extractor: Extractor = network.to(device)
    cache = arguments.cache or default_cache()
    start = time.perf_counter()
    # Errors on either side should appear before hours of generation.
    with noticed(f"opening {arguments.weights or arguments.images or arguments.npz}"):
        if arguments.weights is None:
            source = _open_images(arguments, extractor, cache, device)
        else:
            source = _open_model(arguments, extractor, device)
    written = arguments.reference is not None or source.parts is not None
    with joined() as processes, processes.alone_in(arguments.out) if written else contextlib.nullcontext():
        with torch.no_grad():
            reference = None
            if arguments.reference and processes.rank == 0:
                reference = open_reference(arguments.reference, extractor, cache)
                check_counts(source.count, reference)
            if processes.rank == 0:
                print_chosen(device=(arguments.device, device_title(device)))
            extraction_start = time.perf_counter()
            features = source.extract()
            extraction = time.perf_counter() - extraction_start
        if processes.rank > 0:
            return
        if reference is not None:
            result = _compare(source, features, reference, extractor, arguments.seed)
            seconds = {"extraction seconds": extraction, "seconds": time.perf_counter() - start}
            _write(arguments, result | seconds)
        if arguments.save_statistics:
            write_statistics(arguments.save_statistics, extractor, features)
            left_out = _left_out(source.described.get("images"), source.described.get("left out"))
            print(f"wrote {arguments.save_statistics} ({source.count} images){left_out}")
        if source.parts is not None:
            shutil.rmtree(source.parts)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.reference is None and arguments.save_statistics is None:
        raise InputError("--reference is missing. Give images to compare with, or use --save-statistics")
    if arguments.weights is not None and arguments.autoencoder is not None:
        raise InputError("--autoencoder is for --images or --npz only. Omit it")
    if arguments.weights is None:
        given = [*sampling_options(arguments), *(["save_npz"] if arguments.save_npz else [])]
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} is for --weights only. Omit it")
        fixed = {"dtype": ("float32",), "compile": (False,), "record": (True,), "batch_size": (64,)}
        check_applies(arguments, fixed, "--images and --npz")
        if arguments.autoencoder is None:
            check_applies(arguments, {"decoder": ("full",)}, "--images and --npz without --autoencoder")
        if started_by_torchrun().count > 1:
            raise InputError("several processes are for --weights only. Run far evaluate without torchrun")
    if arguments.count is not None and not 2 <= arguments.count <= MOST_IMAGES:
        raise InputError(f"--count {arguments.count} is out of range. Give 2 to {MOST_IMAGES}")
    check_seed("--seed", arguments.seed)
    if arguments.weights is not None and arguments.seed >= 2**63 // _IMAGE_SEEDS:
        raise InputError(f"--seed {arguments.seed} is too large. Give a number below 2³¹")
    check_count("--batch-size", arguments.batch_size, 2**40)
    outputs = {"--save-npz": arguments.save_npz, "--save-statistics": arguments.save_statistics}
    for option, path in outputs.items():
        check_suffix(option, path, ".npz")
    _check_apart({"--npz": arguments.npz, "--reference": arguments.reference, **outputs}, outputs)
    check_exists(arguments.images, "Give a folder of images, or an image set of far data")
    check_exists(arguments.npz, "far generate --out FILE.npz writes one")
    check_exists(arguments.reference, "Give a folder or .npz of images, an image set, or saved statistics")
    check_exists(arguments.inception, "Get pt_inception-2015-12-05-6726825d.pth from pytorch-fid's page")
    for model in filter(None, (arguments.weights, arguments.autoencoder)):
        if not model.startswith(PREFIX):
            find_folder(model)
    for path in filter(None, (arguments.out / "result.json", *outputs.values())):
        check_writable(path)


def _check_apart(files: Mapping[str, Path | None], outputs: Collection[str]) -> None:
    """Raise an :class:`InputError` if an option of ``outputs`` would overwrite another option's file."""
    seen: dict[Path, str] = {}
    for option, path in files.items():
        if path is not None and seen.setdefault(path.resolve(), option) != option and option in outputs:
            raise InputError(f"{option} {path} is the file of {seen[path.resolve()]}. Give another name")


def _open_images(
    arguments: argparse.Namespace, extractor: Extractor, cache: Path, device: torch.device
) -> EvaluatedImages:
    from far.evaluation.images import open_images
    from far.evaluation.references import features_of

    source = open_images(arguments.images or arguments.npz)
    count = source.count if arguments.count is None else arguments.count
    if count > source.count:
        raise InputError(f"--count {count} is too large: {source.name} holds {source.count} images")
    described = {"images": source.name, "digest": source.digest, "count": count}
    described["left out"] = dict(source.left_out)
    if arguments.autoencoder is not None:
        return _open_reconstructions(arguments, source, described, extractor, device)
    extract = functools.partial(features_of, source, extractor, cache, count=count)
    return EvaluatedImages(count, source.size, described, extract, classes=source.classes)


def _open_reconstructions(
    arguments: argparse.Namespace,
    images: ImageSource,
    described: dict[str, Any],
    extractor: Extractor,
    device: torch.device,
) -> EvaluatedImages:
    from far.evaluation.reconstructions import reconstruction_features, reconstructions_folder, similarity
    from far.folder import load_autoencoder
    from far.weights import digest

    autoencoder = load_autoencoder(arguments.autoencoder, device="cpu", decoder=arguments.decoder)
    count = described["count"]
    parts = reconstructions_folder(arguments.out, images, autoencoder, extractor)
    described = {**described, "autoencoder": arguments.autoencoder, "decoder": arguments.decoder}
    described["autoencoder sha256"] = digest(autoencoder.state_dict())
    autoencoder.to(device)
    extract = functools.partial(reconstruction_features, parts, images, count, autoencoder, extractor)
    similar = functools.partial(similarity, parts, images, count)
    return EvaluatedImages(count, images.size, described, extract, parts, images.classes, similar)


def _open_model(arguments: argparse.Namespace, extractor: Extractor, device: torch.device) -> EvaluatedImages:
    import torch

    from far.evaluation.extraction import part_ranges, read_part, read_parts
    from far.evaluation.generated import Generation, check_class_balance, extract_generated, parts_folder
    from far.evaluation.images import write_npz
    from far.pipeline import Pipeline

    count = arguments.count or _DEFAULT_COUNT
    pipeline = Pipeline.from_pretrained(
        arguments.weights,
        dtype=arguments.dtype,
        device=device,
        record=arguments.record,
        compile=arguments.compile,
        decoder=arguments.decoder,
    )
    sampling = pipeline.sampling_config(**sampling_options(arguments))
    sampling.check(pipeline.model)
    check_class_balance(count, len(pipeline.classes))
    generation = Generation(
        arguments.weights, sampling, arguments.seed * _IMAGE_SEEDS, pipeline.dtype, arguments.compile,
        arguments.decoder,
    )  # fmt: skip
    keep = arguments.save_npz is not None
    parts = parts_folder(arguments.out, generation, extractor, keep_images=keep)
    processes = started_by_torchrun()

    def extract() -> torch.Tensor:
        extract_generated(
            parts, count, pipeline, generation, extractor,
            batch_size=arguments.batch_size, keep_images=keep, share=(processes.rank, processes.count),
        )  # fmt: skip
        processes.wait()
        if processes.rank > 0:
            return torch.empty(0)
        if keep:
            labels = [row % len(pipeline.classes) for row in range(count)]
            images = (read_part(parts, rows, "images").numpy() for rows in part_ranges(count))
            write_npz(arguments.save_npz, images, count, labels)
            print(f"wrote {arguments.save_npz} ({count} images)")
        return read_parts(parts, count)

    described = {
        **generation.describe(), "count": count, "batch size": arguments.batch_size,
        "processes": processes.count, "device": device_title(device) if processes.count == 1 else device.type,
    }  # fmt: skip
    size = None if pipeline.autoencoder is None else pipeline.image_size
    return EvaluatedImages(count, size, described, extract, parts, pipeline.classes)


def _compare(
    source: EvaluatedImages, features: torch.Tensor, reference: Reference, extractor: Extractor, seed: int
) -> dict[str, Any]:
    """Compare images with the reference, print warnings, and return the entries of ``result.json``."""
    from far.evaluation.report import report

    with noticed("comparing the features with the reference"):
        found = report(features, reference, extractor, seed=seed)
    warnings = [*found.warnings, *_differences(source, reference)]
    for warning in warnings:
        print(f"far: warning: {printable(warning)}", file=sys.stderr)
    return {
        "figures": {**source.similarity(), **found.figures}, "controls": found.controls, "warnings": warnings,
        "evaluated": {**source.described, "size": source.size},
        "reference": {
            "source": reference.source, "digest": reference.digest, "count": reference.count,
            "size": reference.size, "left out": dict(reference.left_out),
        },
        "extractor": extractor.name, "extractor sha256": extractor.digest, "seed": seed,
    }  # fmt: skip


def _differences(source: EvaluatedImages, reference: Reference) -> Iterator[str]:
    """Yield one warning per difference between the sides that raises the distance but is not the model's."""
    if reference.size is not None and source.size is not None and reference.size != source.size:
        sizes = " and ".join(f"{width}×{height}" for height, width in (source.size, reference.size))
        yield f"evaluated images and reference have {sizes} pixels. The enlargement counts as a difference"
    if unmatched := unmatched_classes(source.classes, reference.classes):
        names = ", ".join(unmatched[:_CLASSES_SHOWN]) + (" …" if len(unmatched) > _CLASSES_SHOWN else "")
        yield f"one side has no images of the classes {names}, which counts as a difference"


def _write(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write ``result.json`` and print its figures."""
    import torch

    versions = {"far": far.__version__, "torch": torch.__version__, "python": platform.python_version()}
    made = {"command": ["far", *sys.argv[1:]], "threads": torch.get_num_threads(), "versions": versions}
    write_json(arguments.out / "result.json", result | made)
    for name, value in result["figures"].items():
        key = name.partition(" ")[0]
        controls = [f"{kind} {score[key]:.4f}" for kind, score in result["controls"].items() if key in score]
        print(f"{name:40s} {value:.4f}" + (f"   ({', '.join(controls)})" if controls else ""))
    evaluated, reference = result["evaluated"], result["reference"]
    of = "" if reference["count"] is None else f"{reference['count']} of "
    against = of + reference["source"]
    left_out = _left_out(evaluated.get("images"), evaluated.get("left out"))
    left_out += _left_out(reference["source"], reference["left out"])
    print(f"wrote {arguments.out / 'result.json'} ({evaluated['count']} images against {against}){left_out}")


def _left_out(folder: object, counts: Mapping[str, int] | None) -> str:
    """Return the end of a line that counts the files of a folder that are not images."""
    return f", without {describe(counts)} in {folder}" if counts else ""
