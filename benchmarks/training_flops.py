"""Parameters of the comparison's models, and the arithmetic of their training: the table in docs/results.md.

    python -m benchmarks.training_flops

Counts multiplications and additions of matrix products and attention, forward and backward, averaged over
mask ratios.
"""

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.comparison import MODELS, SETS
from benchmarks.results_report import replace_block, table, write_text
from benchmarks.results_rows import title
from far.backbone.config import MaskedConfig
from far.model import FAR, ModelConfig
from far.recipe import load_recipe
from far.seeds import seeded

STEPS = 60


def flops(model: FAR) -> float:
    """Return the mean FLOP per image over ``STEPS`` training steps if masks vary, else of one step."""
    config, total = model.config, 0
    steps = STEPS if isinstance(config.network.backbone, MaskedConfig) else 1
    latents, labels = torch.randn(2, config.latent_channels, *config.grid), torch.zeros(2, dtype=torch.long)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        with FlopCounterMode(display=False) as counter:
            # A step after those of plain flow matching. One of two images trains guidance in heads that learn
            # it.
            loss = model.loss(latents, labels, generator, label_drop=0.1, step=3200)
            loss.value.mean().backward()
        total += counter.get_total_flops()
    return total / steps / len(latents)


def main() -> None:
    lines = []
    for name, choice in MODELS.items():
        if choice.weights_of or name == "distilled":
            continue
        cells = [choice.backbone, title(name)]
        for images, channels, classes in ((SETS["avatars-64"], 12, 16), (SETS["fashion-mnist"], 4, 10)):
            overrides = [f"generator.network.head.kind={choice.head}", *choice.overrides]
            network = load_recipe(images.recipe(choice), overrides).generator.network
            model = FAR(ModelConfig(network, classes, channels, (8, 8)))
            parameters = sum(parameter.numel() for parameter in model.parameters())
            cells += [f"{parameters / 1e6:.2f} M", f"{flops(model) / 1e9:.2f}"]
        lines.append(cells)
        print(*cells, flush=True)
    heads = [
        "backbone",
        "head",
        "avatars-64: parameters",
        "GFLOP per image",
        "fashion-mnist: parameters",
        "GFLOP per image",
    ]
    page = Path("docs/results.md")
    write_text(page, replace_block(page.read_text(encoding="utf-8"), "training-flops", table(heads, lines)))


if __name__ == "__main__":
    with seeded(0):
        main()
