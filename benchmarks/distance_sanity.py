"""Does the default distance rise with damage? Blur, noise and missing classes against held-out images.

Training images of a set, damaged or not, are compared with as many held-out ones; figures are printed as a table.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from far.benchmark import machine
from far.data.image_sets import read_images
from far.data.shards import ShardReader
from far.evaluation.features import load_feature_network
from far.evaluation.metrics import FeatureStatistics, frechet_distance, kernel_distance
from far.evaluation.report import distance_name

CHUNK = 100


def blur(images: Tensor, deviation: float) -> Tensor:
    """Gaussian blur of ``[n, 3, h, w]``, edges repeated."""
    reach = round(4 * deviation + 0.5)
    x = torch.arange(-reach, reach + 1, dtype=images.dtype)
    kernel = (-0.5 * (x / deviation) ** 2).exp()
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1, 1)
    images = F.conv2d(F.pad(images, [reach, reach, 0, 0], mode="replicate"), kernel, groups=3)
    return F.conv2d(F.pad(images, [0, 0, reach, reach], mode="replicate"), kernel.transpose(2, 3), groups=3)


def noise(images: Tensor, deviation: float) -> Tensor:
    """Normal noise; ``deviation`` is in steps of 8 bits."""
    generator = torch.Generator().manual_seed(0)
    return (images + deviation / 255 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/avatars-64"))
    parser.add_argument("--count", type=int, default=5000)
    arguments = parser.parse_args()
    network = load_feature_network()
    train, held_out = (ShardReader(arguments.data / part, "images") for part in ("train", "held-out"))
    count = min(arguments.count, len(train), len(held_out))

    def features(reader: ShardReader, name: str, damage=lambda images: images) -> Tensor:  # type: ignore[no-untyped-def]
        rows = torch.arange(count).split(CHUNK)
        return torch.cat([network((damage(read_images(reader, part) / 2 + 0.5) * 255).round() / 255) for part in tqdm(rows, desc=name)])

    reference = features(held_out, "held-out")
    real = features(train, "real")
    labels = train.all("labels")[:count]
    classes = int(labels.max()) + 1
    alternatives = {"real images": real}
    for deviation in (0.5, 1.0, 2.0):
        alternatives[f"blur, σ {deviation} pixels"] = features(train, f"blur {deviation}", lambda x, d=deviation: blur(x, d))
    for deviation in (5.0, 20.0, 60.0):
        alternatives[f"noise, σ {deviation:g} of 255"] = features(train, f"noise {deviation}", lambda x, d=deviation: noise(x, d))
    for kept in (classes * 3 // 4, classes // 2, 1):
        alternatives[f"{kept} of {classes} classes"] = real[labels < kept]
    print(f"{arguments.data}: {count} training images against {count} held-out ones; float32, {machine()}\n")
    print(f"| images | number | {distance_name(network)} | KID × 1000 |\n|---|---|---|---|")
    statistics = FeatureStatistics.of(reference)
    for name, found in alternatives.items():
        kernel = kernel_distance(found, reference, torch.Generator().manual_seed(0)).value
        print(f"| {name} | {len(found)} | {frechet_distance(FeatureStatistics.of(found), statistics):.1f} | {1000 * kernel:.2f} |")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
