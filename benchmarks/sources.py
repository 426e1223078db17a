"""Speed of listing many small files, and of far cache from JPEG files against the encoder alone.

    OMP_NUM_THREADS=2 python -m benchmarks.sources

Lists and hashes small files in a folder and in a tar, as far data does before it decodes anything. Then
encodes photographs of 512 × 384 pixels with a KL-16 autoencoder of random weights, without mirror images:
prepared tensors, and the same images from a folder and from a tar, which far cache decodes while it encodes.
Takes 3 minutes on 2 cores with AVX-512.
"""

import argparse
import io
import resource
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from far.autoencoder import Autoencoder, AutoencoderConfig
from far.benchmark import machine, median_ratio, paired, summary
from far.data.detection import open_source
from far.data.latents import write_latents
from far.data.packing import Preparation, write_images
from far.data.training_images import open_training_images


def photographs(count: int) -> Iterator[bytes]:
    """Yield JPEG files of smooth noise, which take about as many bytes as photographs."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        rough = Image.fromarray(generator.integers(0, 256, (96, 128, 3), dtype=np.uint8))
        file = io.BytesIO()
        rough.resize((512, 384), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        yield file.getvalue()


def write_both(folder: Path, contents: Iterator[bytes]) -> tuple[Path, Path]:
    """Write files of images into a folder, 1,000 per class, and into a tar."""
    images, tar_path = folder / "images", folder / "images.tar"
    images.mkdir(parents=True)
    with tarfile.open(tar_path, "w") as tar:
        for number, content in enumerate(contents):
            path = images / f"{number // 1000:03d}" / f"{number:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            tar.add(path, path.relative_to(images))
    return images, tar_path


def listing(folder: Path, count: int, rounds: int) -> None:
    content = next(photographs(1))[:600]
    places = write_both(folder / "small", (content for _ in range(count)))

    def read(place: Path) -> None:
        source = open_source(str(place))
        for number in source.in_order(range(len(source.records))):
            source.digest(source.records[number])

    seconds = paired({place.name: partial(read, place) for place in places}, rounds, warmup=0)
    folder_name, tar_name = seconds
    print(f"listing and hashing {count:,} files of 600 bytes in the page cache, {machine()}")
    for name, values in seconds.items():
        print(f"- {name}: {summary(values)}")
    print(f"- tar / folder: {median_ratio(seconds[tar_name], seconds[folder_name]):.2f}")
    print(f"- peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")


@torch.no_grad()
def encode(autoencoder: Autoencoder, images: torch.Tensor, batch_size: int) -> None:
    for batch in images.split(batch_size):
        autoencoder.moments(batch)


def caching(folder: Path, count: int, size: int, batch_size: int, rounds: int) -> None:
    autoencoder = Autoencoder(AutoencoderConfig()).eval()
    alternatives: dict[str, Callable[[], object]] = {}
    calls = iter(range(10**6))
    for place in write_both(folder / "photographs", photographs(count)):
        images = folder / f"set of {place.name}"
        write_images(open_source(str(place)), images, Preparation(size, 0.05, copy=False))
        reader, read = open_training_images(images / "train")
        prepared = read(torch.arange(len(reader))).images

        def cache(images: Path = images) -> None:
            target = folder / f"latents {next(calls)}"
            write_latents(images, autoencoder, target, batch_size, device="cpu", flip=False)

        alternatives["encoder alone"] = partial(encode, autoencoder, prepared, batch_size)
        alternatives[f"far cache from a {'tar' if place.suffix else 'folder'}"] = cache
    encode(autoencoder, prepared[:batch_size], batch_size)
    seconds = paired(alternatives, rounds, warmup=0)
    conditions = f"batches of {batch_size}, float32, {machine()}"
    print(f"\n{len(prepared)} images of {size} × {size}, {conditions}")
    print("\n| | seconds | speed of the encoder alone |\n|---|---|---|")
    for name, values in seconds.items():
        share = median_ratio(seconds["encoder alone"], values)
        print(f"| {name} | {summary(values)} | {100 * share:.1f} % |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=18)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        listing(Path(temporary), arguments.files, arguments.rounds)
        caching(Path(temporary), arguments.images, arguments.size, arguments.batch_size, arguments.rounds)
