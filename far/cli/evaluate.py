"""Evaluate a model, a folder or an .npz: Fréchet distance, KID, Inception Score, precision, recall, density, coverage.

The default network is EfficientNet-Lite0, whose figures compare with no published ones; give FID's own
weights with --inception FILE for figures that do. Generation goes on where it stopped, and can be shared
among processes: torchrun --nproc-per-node N -m far evaluate … . result.json records how to repeat it.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import far
from far.classes import unmatched_classes
from far.cli.machine_arguments import add_machine_arguments, prepare_machine, tell_chosen
from far.cli.sampling_arguments import MOST_IMAGES, add_sampling_arguments, sampling_options
from far.config import check_seed
from far.data.listing import describe
from far.devices import device_title
from far.errors import InputError
from far.files import check_exists, check_writable, printable, write_json
from far.names import find_folder
from far.notices import noticed
from far.precision import DTYPES
from far.processes import joined, started_by_torchrun

if TYPE_CHECKING:
    import torch

    from far.evaluation.features import Extractor
    from far.evaluation.references import Reference
    from far.pipeline import Pipeline

_DEFAULT_COUNT = 10_000
# From the first image of one --seed to that of the next, which is more than any count: no two share an image.
_IMAGE_SEEDS = 2**32
_CLASSES_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    judged = parser.add_mutually_exclusive_group(required=True)
    judged.add_argument(
        "--weights", help="bundled name, folder or OWNER/NAME[@REVISION] of a model, which draws the images"
    )
    judged.add_argument("--images", type=Path, help="folder of images, or an image set that far data made")
    judged.add_argument("--npz", type=Path, help="uint8 images [n, h, w, 3] as arr_0, ADM's format")
    parser.add_argument(
        "--reference",
        type=Path,
        help="folder, image set, .npz of images, or statistics file (.npz with mu and sigma)",
    )
    parser.add_argument(
        "--count", type=int, help="images judged (default: 10000 of a model, all of a folder or .npz)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("evaluation"), help="folder for result.json (default evaluation)"
    )
    parser.add_argument(
        "--inception",
        type=Path,
        metavar="FILE",
        help="pt_inception-2015-12-05 state dict: real FID instead of the default",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="image i has seed SEED · 2³² + i; also of subsets and splits (default 0)",
    )
    add_sampling_arguments(parser)
    parser.add_argument(
        "--batch-size", type=int, default=64, help="images drawn together, at most 100 (default 64)"
    )
    add_machine_arguments(parser, DTYPES[1:], "float32")
    parser.add_argument(
        "--save-npz", type=Path, metavar="FILE", help="also write the model's images in ADM's format"
    )
    parser.add_argument(
        "--save-statistics",
        type=Path,
        metavar="FILE",
        help="write mu, sigma and features, to be a --reference later",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="folder for features of real images (default: far in the user's cache folder)",
    )


@dataclasses.dataclass(frozen=True)
class Judged:
    """What is to be judged, opened and checked: ``extract`` computes what is missing, and on rank 0 returns the features.

    ``described`` stands in result.json; ``parts`` holds generated images until that is written.
    """

    count: int
    size: tuple[int, int] | None
    described: dict[str, Any]
    extract: Callable[[], torch.Tensor]
    parts: Path | None = None
    classes: Sequence[str] = ()


def run(arguments: argparse.Namespace) -> None:
    _check(arguments)

    import torch

    from far.evaluation.features import load_feature_network
    from far.evaluation.inception import load_inception
    from far.evaluation.references import default_cache, open_reference, write_statistics
    from far.evaluation.report import check_counts

    device = prepare_machine(arguments, started_by_torchrun())
    extractor: Extractor = (
        load_inception(arguments.inception) if arguments.inception else load_feature_network()
    ).to(device)
    cache = arguments.cache or default_cache()
    start = time.perf_counter()
    # What is wrong with either side should show before hours of generation.
    with noticed(f"opening {arguments.weights or arguments.images or arguments.npz}"):
        judged = (
            _open_images(arguments, extractor, cache)
            if arguments.weights is None
            else _open_model(arguments, extractor, device)
        )
    with joined() as processes:
        with torch.no_grad():
            reference = (
                open_reference(arguments.reference, extractor, cache)
                if arguments.reference and processes.rank == 0
                else None
            )
            if reference is not None:
                check_counts(judged.count, reference)
            if processes.rank == 0:
                tell_chosen(device=(arguments.device, device_title(device)))
            extraction_start = time.perf_counter()
            features = judged.extract()
            seconds = {"extraction seconds": time.perf_counter() - extraction_start}
        if processes.rank > 0:
            return
        if reference is not None:
            _report(arguments, reference, features, extractor, judged, seconds, start)
        if arguments.save_statistics:
            write_statistics(arguments.save_statistics, extractor, features)
            print(
                f"wrote {arguments.save_statistics} ({judged.count} images)"
                + _left_out(judged.described.get("images"), judged.described.get("left out"))
            )
        if judged.parts is not None:
            shutil.rmtree(judged.parts)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.reference is None and arguments.save_statistics is None:
        raise InputError("give --reference to compare with, or --save-statistics to write statistics")
    if arguments.weights is None:
        given = [*sampling_options(arguments), *(["save_npz"] if arguments.save_npz else [])]
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} is for --weights only; leave it out")
        if started_by_torchrun().count > 1:
            raise InputError("several processes are for --weights only; run far evaluate without torchrun")
    if arguments.count is not None and not 2 <= arguments.count <= MOST_IMAGES:
        raise InputError(f"--count {arguments.count}: give at least 2 and at most {MOST_IMAGES}")
    check_seed("--seed", arguments.seed)
    if arguments.weights is not None and arguments.seed >= 2**63 // _IMAGE_SEEDS:
        raise InputError(
            f"--seed {arguments.seed}: give a number below 2³¹, so that the images' seeds stay below 2⁶³"
        )
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size {arguments.batch_size} must be positive")
    outputs = {"--save-npz": arguments.save_npz, "--save-statistics": arguments.save_statistics}
    for option, path in outputs.items():
        if path is not None and path.suffix != ".npz":
            raise InputError(f"{option} {path}: give a name that ends in .npz")
    _check_apart({"--npz": arguments.npz, "--reference": arguments.reference, **outputs}, outputs)
    check_exists(
        arguments.images,
        "Give a folder of images, such as far generate --out FOLDER writes, or an image set of far data",
    )
    check_exists(arguments.npz, "far generate --out FILE.npz writes one")
    check_exists(
        arguments.reference,
        "Give a folder of images, an image set (far data makes one), or statistics (far evaluate --save-statistics writes them)",
    )
    check_exists(
        arguments.inception, "Get pt_inception-2015-12-05-6726825d.pth, as published for pytorch-fid"
    )
    if arguments.weights is not None:
        find_folder(arguments.weights)
    for path in (arguments.out / "result.json", arguments.save_npz, arguments.save_statistics):
        if path is not None:
            check_writable(path)


def _check_apart(files: Mapping[str, Path | None], outputs: Collection[str]) -> None:
    """Raise an :class:`InputError` if an option of ``outputs`` would overwrite another option's file."""
    seen: dict[Path, str] = {}
    for option, path in files.items():
        if path is not None and seen.setdefault(path.resolve(), option) != option and option in outputs:
            raise InputError(
                f"{option} {path} would overwrite the file of {seen[path.resolve()]}; give another name"
            )


def _open_images(arguments: argparse.Namespace, extractor: Extractor, cache: Path) -> Judged:
    from far.evaluation.images import open_images
    from far.evaluation.references import features_of

    source = open_images(arguments.images or arguments.npz)
    count = source.count if arguments.count is None else arguments.count
    if count > source.count:
        raise InputError(f"--count {count}: {source.name} holds {source.count} images")
    described = {
        "images": source.name,
        "digest": source.digest,
        "count": count,
        "left out": dict(source.left_out),
    }
    return Judged(
        count,
        source.size,
        described,
        lambda: features_of(source, extractor, cache, count=count),
        classes=source.classes,
    )


def _open_model(arguments: argparse.Namespace, extractor: Extractor, device: torch.device) -> Judged:
    import torch

    from far.evaluation.extraction import part_ranges, read_part, read_parts
    from far.evaluation.generated import Generation, check_class_balance, extract_generated, parts_folder
    from far.evaluation.images import write_npz
    from far.pipeline import Pipeline

    count = arguments.count or _DEFAULT_COUNT
    pipeline = Pipeline.from_pretrained(arguments.weights, dtype=arguments.dtype, device=device)
    sampling = pipeline.sampling_config(**sampling_options(arguments))
    sampling.check(pipeline.model)
    check_class_balance(count, len(pipeline.classes))
    generation = Generation(arguments.weights, sampling, arguments.seed * _IMAGE_SEEDS, arguments.dtype)
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
            write_npz(
                arguments.save_npz,
                (read_part(parts, rows, "images").numpy() for rows in part_ranges(count)),
                count,
                labels,
            )
            print(f"wrote {arguments.save_npz} ({count} images)")
        return read_parts(parts, count)

    setting = {"count": count, "batch size": arguments.batch_size, "processes": processes.count}
    setting["device"] = device_title(device) if processes.count == 1 else device.type
    return Judged(
        count, _pixels(pipeline), {**generation.describe(), **setting}, extract, parts, pipeline.classes
    )


def _pixels(pipeline: Pipeline) -> tuple[int, int] | None:
    """(height, width) of a model's images."""
    if pipeline.autoencoder is None:
        return None
    rows, columns = pipeline.model.config.grid
    return rows * pipeline.autoencoder.config.stride, columns * pipeline.autoencoder.config.stride


def _report(
    arguments: argparse.Namespace,
    reference: Reference,
    features: torch.Tensor,
    extractor: Extractor,
    judged: Judged,
    seconds: dict[str, float],
    start: float,
) -> None:
    import torch

    from far.evaluation.report import report

    with noticed("comparing the features with the reference"):
        found = report(features, reference, extractor, seed=arguments.seed)
    warnings = list(found.warnings)
    if reference.size is not None and judged.size is not None and reference.size != judged.size:
        sizes = " and ".join(f"{width}×{height}" for height, width in (judged.size, reference.size))
        warnings.append(
            f"judged images and reference have {sizes} pixels; the enlargement counts as a difference"
        )
    if unmatched := unmatched_classes(judged.classes, reference.classes):
        names = ", ".join(unmatched[:_CLASSES_SHOWN]) + (" …" if len(unmatched) > _CLASSES_SHOWN else "")
        warnings.append(
            f"evaluated images and reference have different classes ({names} on one side only), "
            "which counts as a difference"
        )
    for warning in warnings:
        print(f"far: warning: {printable(warning)}", file=sys.stderr)
    result = {
        "figures": found.figures,
        "controls": found.controls,
        "warnings": warnings,
        "judged": {**judged.described, "size": judged.size},
        "reference": {
            "source": reference.source,
            "digest": reference.digest,
            "count": reference.count,
            "size": reference.size,
            "left out": dict(reference.left_out),
        },
        "extractor": extractor.name,
        "extractor sha256": extractor.digest,
        "seed": arguments.seed,
        **seconds,
        "seconds": time.perf_counter() - start,
        "command": ["far", *sys.argv[1:]],
        "threads": torch.get_num_threads(),
        "versions": {"far": far.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    write_json(arguments.out / "result.json", result)
    for name, value in found.figures.items():
        key = name.partition(" ")[0]
        beside = ", ".join(
            f"{kind} {scores[key]:.4f}" for kind, scores in found.controls.items() if key in scores
        )
        print(f"{name:40s} {value:.4f}" + (f"   ({beside})" if beside else ""))
    against = reference.source if reference.count is None else f"{reference.count} of {reference.source}"
    others = _left_out(judged.described.get("images"), judged.described.get("left out")) + _left_out(
        reference.source, reference.left_out
    )
    print(f"wrote {arguments.out / 'result.json'} ({len(features)} images against {against}){others}")


def _left_out(folder: object, counts: Mapping[str, int] | None) -> str:
    """Return what to add to a line about files in a folder that are not images."""
    return f"; left out of {folder}: {describe(Counter(counts))}" if counts else ""
