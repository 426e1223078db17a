"""Images per second and peak memory of far evaluate: held-out images against as many training images.

Both sides are images, so nothing is generated. The cache starts empty, and all metrics are computed.
``--large`` instead measures precision, recall, density and coverage of 50,000 images against 10,000, on
random features of Inception's width.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from far.benchmark import machine
from far.evaluation.metrics import Neighborhoods


def peak_memory(who: int) -> float:
    """Return the peak memory in GB of this process or of its children."""
    return resource.getrusage(who).ru_maxrss / 2**20


def large() -> None:
    generator = torch.Generator().manual_seed(0)
    fake, real = (torch.randn(count, 2048, generator=generator) for count in (50_000, 10_000))
    start = time.perf_counter()
    Neighborhoods(real).overlap(fake)
    print(
        "precision, recall, density and coverage, 50,000 against 10,000 images of 2,048 features,"
        f" {machine()}"
    )
    print(f"{time.perf_counter() - start:.0f} s, peak memory: {peak_memory(resource.RUSAGE_SELF):.2f} GB")


def whole(data: Path, count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        paths = ["--cache", f"{name}/cache", "--out", f"{name}/out"]
        statistics = f"{name}/statistics.npz"
        far = [sys.executable, "-m", "far", "evaluate"]
        train = ["--images", str(data / "train"), "--count", str(count), "--save-statistics", statistics]
        subprocess.run([*far, *train, *paths], check=True, stderr=subprocess.DEVNULL)
        subprocess.run(
            [*far, "--images", str(data), "--reference", statistics, *paths],
            check=True,
            stderr=subprocess.DEVNULL,
        )
        result = json.loads(Path(name, "out", "result.json").read_text())
    judged = result["evaluated"]["count"]
    print(f"{data}: {judged} images against {result['reference']['count']}, float32, {machine()}")
    print(
        f"reading and features: {judged / result['extraction seconds']:.0f} images/s;"
        f" in total with all figures {result['seconds']:.0f} s"
    )
    print(f"peak memory: {peak_memory(resource.RUSAGE_CHILDREN):.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/avatars-64"))
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument(
        "--large", action="store_true", help="precision, recall, density and coverage of many images"
    )
    arguments = parser.parse_args()
    large() if arguments.large else whole(arguments.data, arguments.count)


if __name__ == "__main__":
    main()
