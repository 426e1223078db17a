"""Judge a model, a folder or an .npz: Fréchet distance, KID, Inception Score, precision and recall.

The default network is EfficientNet-Lite0, whose figures compare with no published ones; give FID's own
weights with --inception FILE for figures that do. Generation goes on where it stopped, and can be shared
among processes: torchrun --nproc-per-node N -m far evaluate … . result.json records how to repeat it.
"""

import argparse
import datetime
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed

import far
from far.cli.sampling_arguments import add_sampling_arguments, sampling_options
from far.errors import InputError
from far.evaluation.extraction import part_ranges, process_share, read_part, read_parts
from far.evaluation.features import Extractor, load_feature_network
from far.evaluation.generated import Generation, extract_generated, parts_folder
from far.evaluation.images import open_images, write_npz
from far.evaluation.inception import load_inception
from far.evaluation.references import Reference, default_cache, features_of, open_reference, write_statistics
from far.evaluation.report import figures
from far.files import check_writable, write_json
from far.pipeline import Pipeline, find_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    judged = parser.add_mutually_exclusive_group(required=True)
    judged.add_argument("--weights", help="bundled name or folder of a model, which draws the images")
    judged.add_argument("--images", type=Path, help="folder of images, or an image set that far data made")
    judged.add_argument("--npz", type=Path, help="uint8 images [n, h, w, 3] as arr_0, ADM's format")
    parser.add_argument("--reference", type=Path, help="folder, image set, .npz of images, or statistics file (.npz with mu and sigma)")
    parser.add_argument("--count", type=int, help="images judged (default: 10000 of a model, all of a folder or .npz)")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder for result.json (default evaluation)")
    parser.add_argument(
        "--inception", type=Path, metavar="FILE", help="pt_inception-2015-12-05 state dict: real FID instead of the default"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image; also of subsets and splits (default 0)")
    add_sampling_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=64, help="images drawn together (default 64)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the generator's weights")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps … (default cpu)")
    parser.add_argument("--save-npz", type=Path, metavar="FILE", help="also write the model's images in ADM's format")
    parser.add_argument("--save-statistics", type=Path, metavar="FILE", help="write mu, sigma and features, to be a --reference later")
    parser.add_argument("--cache", type=Path, help="folder for features of real images (default: far in the user's cache folder)")


def run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    rank, processes = process_share()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if arguments.device == "cuda" and processes > 1 else arguments.device
    extractor = load_inception(arguments.inception) if arguments.inception else load_feature_network()
    extractor = extractor.to(device)
    cache = arguments.cache or default_cache()
    start = time.perf_counter()
    if processes > 1:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=2))
    try:
        with torch.no_grad():
            # The reference comes first: what is wrong with it should show before hours of generation.
            reference = open_reference(arguments.reference, extractor, cache) if arguments.reference and rank == 0 else None
            extraction_start = time.perf_counter()
            described, parts, features = _judged_features(arguments, extractor, device, cache)
            seconds = {"extraction seconds": time.perf_counter() - extraction_start}
        if rank > 0:
            return
        if reference is not None:
            _report(arguments, reference, features, extractor, described, seconds, start)
        if arguments.save_statistics:
            write_statistics(arguments.save_statistics, extractor, features)
            print(f"wrote {arguments.save_statistics}")
        if parts is not None:
            shutil.rmtree(parts)
    finally:
        if processes > 1:
            torch.distributed.destroy_process_group()


def _check(arguments: argparse.Namespace) -> None:
    if arguments.reference is None and arguments.save_statistics is None:
        raise InputError("give --reference to compare with, or --save-statistics to write statistics")
    if arguments.weights is None:
        given = [name for name, value in sampling_options(arguments).items() if value is not None] + ["save_npz"] * bool(arguments.save_npz)
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} is for --weights only; leave it out")
        if process_share()[1] > 1:
            raise InputError("several processes are for --weights only; run far evaluate without torchrun")
    if arguments.count is not None and arguments.count < 2:
        raise InputError(f"--count {arguments.count}: give at least 2")
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size {arguments.batch_size} must be positive")
    if arguments.weights is not None:
        find_folder(arguments.weights)
    for path in (arguments.out / "result.json", arguments.save_npz, arguments.save_statistics):
        if path is not None:
            check_writable(path)


def _judged_features(
    arguments: argparse.Namespace, extractor: Extractor, device: str, cache: Path
) -> tuple[dict[str, Any], Path | None, torch.Tensor]:
    """What was judged, the folder of generated parts if any, and the features (on rank 0)."""
    if arguments.weights is None:
        source = open_images(arguments.images or arguments.npz)
        if arguments.count is not None and arguments.count > source.count:
            raise InputError(f"--count {arguments.count}: {source.name} holds {source.count} images")
        features = features_of(source, extractor, cache, count=arguments.count)
        return {"images": source.name, "digest": source.digest, "count": len(features)}, None, features
    count = arguments.count or 10_000
    pipeline = Pipeline.from_pretrained(arguments.weights, dtype=arguments.dtype, device=device)
    sampling = pipeline.sampling_config(**sampling_options(arguments))
    generation = Generation(arguments.weights, sampling, arguments.seed, arguments.dtype)
    keep = arguments.save_npz is not None
    parts = parts_folder(arguments.out, generation, extractor, keep_images=keep)
    share = process_share()
    extract_generated(
        parts, count, pipeline, generation, extractor, batch_size=arguments.batch_size, keep_images=keep, share=share
    )  # fmt: skip
    if share[1] > 1:
        torch.distributed.barrier()
    described = {
        **generation.describe(),
        "count": count,
        "batch size": arguments.batch_size,
        "device": arguments.device,
        "processes": share[1],
    }
    if share[0] > 0:
        return described, None, torch.empty(0)
    if keep:
        labels = [row % len(pipeline.classes) for row in range(count)]
        images = (read_part(parts, rows, "images").numpy() for rows in part_ranges(count))
        write_npz(arguments.save_npz, images, count, labels)
        print(f"wrote {arguments.save_npz} ({count} images)")
    return described, parts, read_parts(parts, count)


def _report(
    arguments: argparse.Namespace,
    reference: Reference,
    features: torch.Tensor,
    extractor: Extractor,
    described: dict[str, Any],
    seconds: dict[str, float],
    start: float,
) -> None:
    found, warnings = figures(features, reference, extractor, seed=arguments.seed)
    for warning in warnings:
        print(f"far: warning: {warning}", file=sys.stderr)
    result = {
        "figures": found,
        "warnings": warnings,
        "judged": described,
        "reference": {"source": reference.source, "digest": reference.digest, "count": reference.statistics.count},
        "extractor": extractor.name,
        "seed": arguments.seed,
        **seconds,
        "seconds": time.perf_counter() - start,
        "command": ["far", *sys.argv[1:]],
        "threads": torch.get_num_threads(),
        "versions": {"far": far.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    write_json(arguments.out / "result.json", result)
    for name, value in found.items():
        print(f"{name:40s} {value:.4f}")
    print(f"wrote {arguments.out / 'result.json'} ({len(features)} images against {reference.statistics.count})")
