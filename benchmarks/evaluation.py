"""Images per second and peak memory of far evaluate: all held-out images of a set against as many training images.

Both sides are images, so nothing is generated; the cache starts empty, and all metrics are computed.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/avatars-64"))
    parser.add_argument("--count", type=int, default=10_000)
    arguments = parser.parse_args()
    count = str(arguments.count)
    with tempfile.TemporaryDirectory() as name:
        paths = ["--cache", f"{name}/cache", "--out", f"{name}/out"]
        statistics = f"{name}/statistics.npz"
        far = [sys.executable, "-m", "far", "evaluate"]
        train = ["--images", str(arguments.data / "train"), "--count", count, "--save-statistics", statistics]
        subprocess.run([*far, *train, *paths], check=True, stderr=subprocess.DEVNULL)
        subprocess.run([*far, "--images", str(arguments.data), "--reference", statistics, *paths], check=True, stderr=subprocess.DEVNULL)
        result = json.loads(Path(name, "out", "result.json").read_text())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    judged = result["judged"]["count"]
    print(f"{arguments.data}: {judged} images against {result['reference']['count']}, float32, {machine()}")
    print(f"reading and features: {judged / result['extraction seconds']:.0f} images/s; with all figures {result['seconds']:.0f} s in all")
    print(f"peak memory: {peak:.2f} GB")


if __name__ == "__main__":
    main()
