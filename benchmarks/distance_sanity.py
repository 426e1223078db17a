"""Figures of damaged and empty images, compared with those of real images, by number of images.

Training images of a set, damaged or replaced, are compared with as many held-out images. Prints one table
with all kinds of damage at the largest count, and one with a few kinds at every count. Features are kept in
runs/distance-sanity, so that an interrupted run continues.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from far.benchmark import machine
from far.data.shards import ShardReader
from far.evaluation.extraction import extract_parts, read_parts
from far.evaluation.features import load_feature_network
from far.evaluation.images import open_images
from far.evaluation.metrics import FeatureStatistics, Neighborhoods, frechet_distance, kernel_distance
from far.evaluation.report import distance_name

WORK = Path("runs/distance-sanity")
AT_EVERY_COUNT = ("real images", "blur, σ 1 pixels", "flat colors", "blurred noise")


def blur(images: Tensor, sigma: float) -> Tensor:
    """Blur ``[n, 3, h, w]`` with a Gaussian and repeated edges."""
    reach = round(4 * sigma + 0.5)
    x = torch.arange(-reach, reach + 1, dtype=images.dtype)
    kernel = (-0.5 * (x / sigma) ** 2).exp()
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1, 1)
    images = F.conv2d(F.pad(images, [reach, reach, 0, 0], mode="replicate"), kernel, groups=3)
    return F.conv2d(F.pad(images, [0, 0, reach, reach], mode="replicate"), kernel.transpose(2, 3), groups=3)


def kinds(real: Callable[[range], Tensor], size: tuple[int, int]) -> dict[str, Callable[[range], Tensor]]:
    """Return, for each kind of images, a function from image numbers to ``[n, 3, h, w]`` in [0, 1]."""

    def seeded(rows: range) -> torch.Generator:
        return torch.Generator().manual_seed(rows.start)

    def blurred(sigma: float, rows: range) -> Tensor:
        return blur(real(rows), sigma)

    def noisy(sigma: float, rows: range) -> Tensor:
        images = real(rows)
        return (images + sigma / 255 * torch.randn(images.shape, generator=seeded(rows))).clamp(0, 1)

    return {
        "real images": real,
        **{f"blur, σ {sigma:g} pixels": functools.partial(blurred, sigma) for sigma in (0.5, 1.0, 2.0)},
        **{f"noise, σ {sigma:g} of 255": functools.partial(noisy, sigma) for sigma in (5.0, 20.0, 60.0)},
        "flat colors": lambda rows: torch.rand(len(rows), 3, 1, 1, generator=seeded(rows)).expand(
            -1, -1, *size
        ),
        "blurred noise": lambda rows: blur(torch.rand(len(rows), 3, *size, generator=seeded(rows)), 4.0),
    }


class Reference:
    """Held-out features ``[m, d]``, to which other features are compared."""

    def __init__(self, features: Tensor) -> None:
        self.features, self.statistics, self.neighborhoods = (
            features,
            FeatureStatistics.of(features),
            Neighborhoods(features),
        )

    def row(self, name: str, features: Tensor) -> str:
        """Return a table row with all figures of ``features [n, d]``."""
        distance = frechet_distance(FeatureStatistics.of(features), self.statistics)
        kernel = kernel_distance(features, self.features, torch.Generator().manual_seed(0), subsets=10).value
        found = self.neighborhoods.overlap(features)
        overlap = " | ".join(
            f"{value:.2f}" for value in (found.precision, found.recall, found.density, found.coverage)
        )
        return f"| {name} | {len(features)} | {distance:.1f} | {1000 * kernel:.2f} | {overlap} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data/avatars-64"))
    parser.add_argument("--counts", type=int, nargs="+", default=[60, 200, 1000, 4000])
    arguments = parser.parse_args()
    network = load_feature_network()
    train, held_out = (open_images(arguments.data / part) for part in ("train", "held-out"))
    most = min(max(arguments.counts), train.count, held_out.count)

    def features(name: str, digest: str, images: Callable[[range], Tensor]) -> Tensor:
        folder = WORK / f"{digest}-{name}"
        extract_parts(folder, most, lambda rows, _: images(rows), network, description=name)
        return read_parts(folder, most)

    reference = features("held-out", held_out.digest, held_out.tensor)
    found = {
        name: features(name, train.digest, images) for name, images in kinds(train.tensor, train.size).items()
    }
    labels = ShardReader(arguments.data / "train", "images").all("labels")[:most]
    classes = int(labels.max()) + 1
    fewer = {
        f"{kept} of {classes} classes": found["real images"][labels < kept]
        for kept in (classes * 3 // 4, classes // 2, 1)
    }
    title = (
        f"| images | number | {distance_name(network)} | KID × 1000 |"
        f" precision | recall | density | coverage |\n{'|---' * 8}|"
    )
    print(f"{arguments.data}: training images against {most} held-out ones; float32, {machine()}\n\n{title}")
    whole = Reference(reference)
    rows = {}
    for name, chosen in {**found, **fewer}.items():
        rows[name] = whole.row(name, chosen)
        print(rows[name], flush=True)
    print(f"\nAgainst as many held-out images:\n\n{title}")
    for count in sorted(set(arguments.counts)):
        compared = whole if count >= most else Reference(reference[:count])
        for name in AT_EVERY_COUNT:
            print(rows[name] if compared is whole else compared.row(name, found[name][:count]), flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
