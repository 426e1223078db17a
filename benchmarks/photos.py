"""Memory and time of the recipes photos-… on one GPU, computed as in docs/cluster.md; prints a table.

    python -m benchmarks.photos

Memory is that of a micro-batch of the recipe. Hours are those of the recipe's steps at the utilization of
MAR's own training, without checkpoints and evaluations.
"""

import argparse

from benchmarks.cluster import GB, PEAKS, flops, largest_kept, mar_utilization, memory, sizes_of, table
from far.model import ModelConfig
from far.recipe import load_recipe

# Both autoencoders give as many tokens of 16 channels, so memory and time are equal.
RECIPES = {"photos-128-kl16": 128, "photos-256-kl16": 256}
CLASSES = 100
_STRIDE = 16


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    rows = []
    for name, size in RECIPES.items():
        generator = load_recipe(name).generator
        loop, grid = generator.training, (size // _STRIDE,) * 2
        config = ModelConfig(generator.network, CLASSES, 16, grid)
        needed = memory(sizes_of(config), largest_kept(config), loop.micro_batch_size) / GB
        work = flops(config)
        speeds = [peak * mar_utilization() / work for peak in PEAKS.values()]
        hours = [loop.steps * loop.batch_size / speed / 3600 for speed in speeds]
        numbers = [f"{needed:.0f}", f"{work / 1e9:.0f}", *(f"{speed:.0f}" for speed in speeds)]
        rows.append([f"`{name}`", *numbers, *(f"{each:.1f}" for each in hours)])
    heading = ["recipe", "GB", "GFLOP per image", *(f"images/s, {gpu}" for gpu in PEAKS)]
    print(table([*heading, *(f"hours, {gpu}" for gpu in PEAKS)], rows))


if __name__ == "__main__":
    main()
