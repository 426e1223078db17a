"""Images per second, the loader's fraction of a step, and peak memory of a recipe's generator training.

Runs ``far train`` for a few hundred steps in a temporary folder, with the recipe's latent cache (run ``far
cache`` first), and reads its log.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from far.benchmark import machine
from far.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path, nargs="?", default=Path("avatars-64"))
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        (run / "latents").symlink_to(recipe.latents_folder.resolve())
        overrides = [
            f"run={run}", f"autoencoder_from={recipe.autoencoder_folder}",
            f"generator.training.steps={arguments.steps}", "generator.training.log_every=10",
            "generator.evaluation.images=100", "generator.evaluation.references=100",
        ]  # fmt: skip
        subprocess.run(
            [sys.executable, "-m", "far", "train", str(arguments.recipe), *overrides],
            check=True,
            stderr=subprocess.DEVNULL,
        )
        entries = [json.loads(line) for line in (run / "model" / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry][1:]  # the first includes the warm-up
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    training = recipe.generator.training
    print(
        f"{arguments.recipe}: batch {training.batch_size}, {steps[-1]['dtype']}, seed {training.seed},"
        f" {machine()}"
    )
    rate = statistics.median(entry["images_per_second"] for entry in steps)
    print(f"images/s: median {rate:.0f} over {arguments.steps} steps")
    print(f"loader's fraction of a step: {statistics.median(entry['loader_share'] for entry in steps):.2%}")
    print(f"peak memory: {peak:.2f} GB")


if __name__ == "__main__":
    main()
