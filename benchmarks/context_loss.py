"""Held-out flow loss by the number of known tokens: how well a backbone uses its context.

    python -m benchmarks.context_loss MODEL… [--order raster]

Each model predicts the velocity of the next token of an order from the tokens before it, at step size 0. All
models of one autoencoder get the same images, latents, noise and times, so their losses can be compared: a
causal model and a masked one differ only in what they make of the same context. Prints a Markdown table.
Needs the image set (``far data avatars data/avatars-64``).
"""

import argparse
import itertools
from pathlib import Path

import torch
from torch import Tensor

import far
from far.data.image_sets import open_image_set, read_images
from far.errors import InputError
from far.heads import Condition
from far.heads.flow import interpolate
from far.layers import take
from far.pipeline import Pipeline
from far.seeds import seeded_generator
from far.tokens import halton_orders, raster_orders

CHUNK = 100


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder or bundled name")
    parser.add_argument("--data", type=Path, default=Path("data/avatars-64"), help="image set")
    parser.add_argument("--order", choices=("raster", "halton", "random"), default="raster")
    parser.add_argument("--images", type=int, default=1000, help="held-out images")
    parser.add_argument("--samples", type=int, default=4, help="noise samples per token")
    parser.add_argument("--seed", type=int, default=0, help="of latents, noise, times and random orders")
    arguments = parser.parse_args()
    held_out = open_image_set(arguments.data / "held-out")
    rows = torch.arange(min(arguments.images, len(held_out)))
    images, labels = read_images(held_out, rows), held_out.rows("labels", rows)
    print(
        f"{len(rows)} held-out images of {arguments.data.name}, {arguments.samples} noise samples per token,"
        f" {arguments.order} order, seed {arguments.seed}, float32\n"
    )
    for number, name in enumerate(arguments.models):
        losses = context_losses(
            far.load(name), images, labels, arguments.order, arguments.samples, arguments.seed
        )
        starts = [0, *(2**power for power in range((len(losses) - 1).bit_length())), len(losses)]
        if number == 0:
            spans = [f"{a}" if b - a == 1 else f"{a} to {b - 1}" for a, b in itertools.pairwise(starts)]
            print(f"| known tokens | {' | '.join(spans)} | all |")
            print("|---" * (len(spans) + 2) + "|")
        means = [losses[a:b].mean() for a, b in itertools.pairwise(starts)]
        print(f"| {name} | {' | '.join(f'{mean:.3f}' for mean in [*means, losses.mean()])} |", flush=True)


@torch.no_grad()
def context_losses(
    pipeline: Pipeline, images: Tensor, labels: Tensor, order: str, samples: int, seed: int
) -> Tensor:
    """Return the mean flow loss ``[n]`` of the token that follows the first 0 … n − 1 tokens of an order.

    Args:
        images: ``[b, 3, h, w]`` in [−1, 1].
        labels: ``[b]``.
        order: ``raster``, ``halton`` or ``random``. A causal model takes raster order only.
        samples: noise samples per token.
        seed: of latents, noise, times and random orders.
    """
    model, generator = pipeline.model, seeded_generator(seed)
    if order != "raster" and not model.backbone.any_order:
        raise InputError(f"order {order}: a causal model takes raster order only. Give --order raster")
    assert pipeline.autoencoder is not None
    totals = torch.zeros(model.config.tokens)
    for part, label in zip(images.split(CHUNK), labels.split(CHUNK)):
        posterior = pipeline.autoencoder.encode(part)
        noise = torch.randn(posterior.mean.shape, generator=generator)
        tokens = model.constrain(model.tokens(pipeline.autoencoder.normalize(posterior.sample(noise))))
        orders = _orders(model.config.token_grid, order, len(part), generator)
        # By position, so that a token has the same noise in every order.
        noise = torch.randn(samples, *tokens.shape, generator=generator)
        t = torch.rand(samples, *tokens.shape[:2], generator=generator)
        for known in range(len(totals)):
            query = orders[:, known : known + 1]
            z = model.backbone(tokens, orders[:, :known], query, label)[:, 0]
            x, image, position = take(tokens, query)[:, 0], torch.arange(len(part)), query[:, 0]
            epsilon, time = noise[:, image, position], t[:, image, position]
            velocity = model.head.velocity(interpolate(epsilon, x, time), time, Condition(z))
            totals[known] += (velocity - (x - epsilon)).square().mean(dim=(0, 2)).sum()
    return totals / len(images)


def _orders(grid: tuple[int, int], order: str, batch: int, generator: torch.Generator) -> Tensor:
    """Return orders ``[batch, n]`` of a grid's positions; ``halton`` begins at a random one."""
    count = grid[0] * grid[1]
    # Drawn for every order, so that the noise after it is the same.
    orders = torch.rand(batch, count, generator=generator).argsort(dim=1)
    if order == "halton":
        return halton_orders(*grid, orders[:, 0])
    return orders if order == "random" else raster_orders(count, batch)


if __name__ == "__main__":
    main()
