"""Held-out flow loss of a training by steps, images and processor time, to compare settings.

    python -m benchmarks.training_curve RECIPE [KEY=VALUE …] [--muon RATE] [--every STEPS]

Trains in a temporary folder without evaluations. All runs get the same held-out latents, noise and times.
The loss is that of the averaged weights at step size 0, over the positions that training predicts. With
``--muon`` torch's Muon trains the matrices of the backbone's blocks, and AdamW everything else. Prints a
Markdown table. Needs a latent cache (``far cache RECIPE``).
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from far.data.image_sets import read_images
from far.folder import load_autoencoder
from far.heads import Condition
from far.heads.flow import draw_noise_and_time, interpolate
from far.layers import take
from far.model import FAR
from far.recipe import load_recipe
from far.seeds import seeded_generator
from far.training.config import LoopConfig
from far.training.generator import GeneratorTask
from far.training.log import Meter
from far.training.loop import Trainer

CHUNK = 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="file or name")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--muon", type=float, help="learning rate of Muon; default: AdamW alone")
    parser.add_argument("--every", type=int, default=40, help="steps between rows")
    parser.add_argument("--images", type=int, default=256, help="held-out images")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    config = recipe.generator.training
    autoencoder = load_autoencoder(recipe.autoencoder_folder, device="cpu")
    task = GeneratorTask(recipe.generator, Path(recipe.data), recipe.latents_folder, autoencoder)
    latents, labels = held_out_latents(task, arguments.images)
    print("| steps | images | processor seconds | held-out flow loss |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(task, config, Path(folder))
        if arguments.muon is not None:
            trainer.optimizer = MuonAndAdamW(task, config, arguments.muon)  # type: ignore[assignment]
            trainer.peaks = [group["lr"] for group in trainer.optimizer.param_groups]
        meter, seconds = Meter(), 0.0
        while trainer.step < config.steps:
            start = time.process_time()
            trainer.train_step(meter)
            seconds += time.process_time() - start
            if trainer.step % arguments.every == 0 or trainer.step == config.steps:
                loss = held_out_loss(trainer.ema.module, latents, labels)
                images = trainer.step * config.batch_size
                print(f"| {trainer.step} | {images:,} | {seconds:.1f} | {loss:.4f} |", flush=True)


class MuonAndAdamW:
    """Muon for the matrices of the backbone's blocks, AdamW with the task's groups for everything else.

    Muon's updates have the root mean square of AdamW's (``match_rms_adamw``), so that rates compare.
    """

    def __init__(self, task: GeneratorTask, config: LoopConfig, rate: float) -> None:
        modules = task.module.backbone.modules()
        blocks = [block for module in modules if isinstance(module, nn.ModuleList) for block in module]
        matrices = [p for block in blocks for p in block.parameters() if p.dim() == 2]
        chosen = set(matrices)
        groups = [
            {**group, "params": [p for p in group["params"] if p not in chosen]}
            for group in task.parameter_groups(config)
        ]
        others = [group for group in groups if group["params"]]
        self.parts = (
            torch.optim.Muon(matrices, rate, config.weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.95), fused=True),
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()


@torch.no_grad()
def held_out_latents(task: GeneratorTask, count: int) -> tuple[Tensor, Tensor]:
    """Return normalized posterior means ``[n, c, h, w]`` and labels ``[n]`` of held-out images."""
    rows = torch.arange(min(count, len(task.held_out)))
    means = [task.autoencoder.encode(read_images(task.held_out, part)).mean for part in rows.split(CHUNK)]
    return task.autoencoder.normalize(torch.cat(means)), task.held_out.rows("labels", rows)


@torch.no_grad()
def held_out_loss(model: nn.Module, latents: Tensor, labels: Tensor) -> float:
    """Return the mean flow loss at the positions that training predicts."""
    assert isinstance(model, FAR)
    losses = []
    for number, (part, label) in enumerate(zip(latents.split(CHUNK), labels.split(CHUNK))):
        generator = seeded_generator(number)
        tokens = model.constrain(model.tokens(part))
        fed, known, query = model.backbone.training_inputs(tokens, generator)
        z = model.backbone(fed, known, query, label).flatten(0, 1)
        x = take(tokens, query).flatten(0, 1)
        noise, t = draw_noise_and_time(x, 2, generator)
        velocity = model.head.velocity(interpolate(noise, x, t), t, Condition(z))
        losses.append((velocity - (x - noise)).square().mean(dim=-1).flatten())
    return float(torch.cat(losses).mean())


if __name__ == "__main__":
    main()
