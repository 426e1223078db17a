"""Parameters, and arithmetic of a training step, of the comparison's masked and causal models.

Multiplications and additions of matrix products and attention, forward and backward, averaged over mask ratios.
"""

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from far.model import FAR, ModelConfig
from far.recipe import load_recipe

STEPS = 500


def flops(model: FAR) -> float:
    """Per image, over ``STEPS`` steps."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    total = 0
    for _ in range(STEPS):
        latents = torch.randn(1, config.latent_channels, *config.grid, generator=generator)
        with FlopCounterMode(display=False) as counter:
            model.loss(latents, torch.zeros(1, dtype=torch.long), generator, label_drop=0.1, teacher=model).value.mean().backward()
        total += counter.get_total_flops()
    return total / STEPS


def main() -> None:
    print("| image set | backbone | parameters | GFLOP an image |\n|---|---|---|---|")
    for name, channels, side, classes in (("avatars-64", 8, 8, 16), ("fashion-mnist", 4, 8, 10)):
        for suffix in ("", "-causal"):
            network = load_recipe(Path(f"recipes/comparison/{name}{suffix}.yaml")).generator.network
            model = FAR(ModelConfig(network, classes, channels, (side, side)))
            parameters = sum(parameter.numel() for parameter in model.parameters())
            print(f"| {name} | {network.backbone.kind} | {parameters:,} | {flops(model) / 1e9:.2f} |")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
