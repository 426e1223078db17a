"""Parameters of the comparison's models, and the arithmetic of their training steps.

Counts multiplications and additions of matrix products and attention, forward and backward, averaged over
mask ratios.
"""

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.comparison import MODELS, SETS
from far.model import FAR, ModelConfig
from far.recipe import load_recipe
from far.seeds import seeded

STEPS = 200


def flops(model: FAR) -> float:
    """Return the mean FLOP per image over ``STEPS`` training steps."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    total = 0
    for _ in range(STEPS):
        latents, labels = (
            torch.randn(2, config.latent_channels, *config.grid, generator=generator),
            torch.zeros(2, dtype=torch.long),
        )
        with FlopCounterMode(display=False) as counter:
            # A step after those of plain flow matching. One of two images trains guidance in heads that learn
            # it.
            loss = model.loss(latents, labels, generator, label_drop=0.1, teacher=model, step=1600)
            loss.value.mean().backward()
        total += counter.get_total_flops()
    return total / STEPS / len(latents)


def main() -> None:
    print("| image set | model | parameters | GFLOP per image |\n|---|---|---|---|")
    for images, channels, classes in ((SETS["avatars-64"], 8, 16), (SETS["fashion-mnist"], 4, 10)):
        for name, choice in MODELS.items():
            if choice.frozen or choice.weights_of or name == "distilled":
                continue
            overrides = [
                f"generator.network.head.{override}"
                for override in (f"kind={choice.head}", *choice.overrides)
            ]
            network = load_recipe(Path(images.recipe(choice)), overrides).generator.network
            model = FAR(ModelConfig(network, classes, channels, (8, 8)))
            parameters = sum(parameter.numel() for parameter in model.parameters())
            print(f"| {images.name} | {name} | {parameters:,} | {flops(model) / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    with seeded(0):
        main()
