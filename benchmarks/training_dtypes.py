"""Seconds of a recipe's training steps, autoencoder and generator, in auto, float32 and bfloat16.

Runs steps of the training loop (loss, optimizer, EMA) on random images, dtypes in turn. Prints a Markdown
table. Two variables simulate a processor with AVX2 and nothing newer, except in products of 8-bit integers:
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python -m benchmarks.training_dtypes
"""

import argparse
import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from far.autoencoder import Autoencoder
from far.benchmark import machine, paired, summary
from far.data.latents import write_latents
from far.data.shards import ShardWriter
from far.devices import TrainingDtype
from far.recipe import Recipe, load_recipe
from far.training.autoencoder import AutoencoderTask
from far.training.config import LoopConfig
from far.training.generator import GeneratorTask
from far.training.log import Meter
from far.training.loop import Trainer, resolve_loop

IMAGES, CLASSES = 256, 16
DTYPES: tuple[TrainingDtype, ...] = ("float32", "auto", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, nargs="?", default=Path("avatars-64"))
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels (default 64)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="the first is the base of the ratios"
    )
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    print(f"{arguments.recipe}, seed 0, {arguments.rounds} rounds in turn, {machine()}\n")
    print("| trained | batch | dtype | seconds per step | relative to the first |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        data = write_images(Path(name) / "data", arguments.size)
        for part in arguments.parts:
            loop = getattr(recipe, part).training
            seconds = paired(PARTS[part](recipe, data, Path(name), arguments.dtypes), arguments.rounds)
            base = statistics.median(seconds[arguments.dtypes[0]])
            for dtype in arguments.dtypes:
                chosen = f"auto: {resolve_loop(loop).dtype}" if dtype == "auto" else dtype
                ratio = statistics.median(seconds[dtype]) / base
                print(
                    f"| {part} | {loop.batch_size} | {chosen} | {summary(seconds[dtype])} | {ratio:.2f} |",
                    flush=True,
                )


def write_images(folder: Path, size: int) -> Path:
    """Write an image set of random pixels."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "held-out"):
        meta = {
            "kind": "images",
            "size": size,
            "classes": [str(number) for number in range(CLASSES)],
            "source": "random pixels",
        }
        writer = ShardWriter(folder / split, meta)
        images = torch.randint(0, 256, (IMAGES, size, size, 3), generator=generator).to(torch.uint8)
        writer.write({"images": images, "labels": torch.arange(IMAGES) % CLASSES}, cursor=IMAGES)
        writer.finish()
    return folder


def autoencoder_steps(
    recipe: Recipe, data: Path, folder: Path, dtypes: Sequence[TrainingDtype]
) -> dict[str, Callable[[], object]]:
    """Return one training step of the recipe's autoencoder by dtype."""
    config = recipe.autoencoder
    return steps(
        config.training, folder, dtypes,
        lambda loop: AutoencoderTask(dataclasses.replace(config, training=loop), data),
    )  # fmt: skip


def generator_steps(
    recipe: Recipe, data: Path, folder: Path, dtypes: Sequence[TrainingDtype]
) -> dict[str, Callable[[], object]]:
    """Return one training step of the recipe's generator by dtype."""
    config, autoencoder = recipe.generator, Autoencoder(recipe.autoencoder.model)
    write_latents(data, autoencoder, folder / "latents")
    return steps(
        config.training, folder, dtypes,
        lambda loop: GeneratorTask(
            dataclasses.replace(config, training=loop), data, folder / "latents", autoencoder
        ),
    )  # fmt: skip


def steps(
    loop: LoopConfig,
    folder: Path,
    dtypes: Sequence[TrainingDtype],
    task: Callable[[LoopConfig], AutoencoderTask | GeneratorTask],
) -> dict[str, Callable[[], object]]:
    """Return one training step by dtype, each with its own trainer."""
    meter = Meter()
    calls: dict[str, Callable[[], object]] = {}
    for dtype in dtypes:
        config = resolve_loop(dataclasses.replace(loop, dtype=dtype))
        trainer = Trainer(task(config), config, folder / dtype)
        calls[dtype] = functools.partial(trainer.train_step, meter)
    return calls


PARTS = {"autoencoder": autoencoder_steps, "generator": generator_steps}


if __name__ == "__main__":
    main()
