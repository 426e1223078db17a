"""Time decoding with every saving of it, at the sizes of KL-16 and of the bundled autoencoder.

Weights are random, and the alternatives take turns: repeated pixels and then a convolution, in place of one
transposed convolution; the full decoder as it is; a small decoder. Prints a Markdown table; takes about two
minutes on two cores.
"""

import argparse
import copy
import functools
from collections.abc import Callable

import torch
from torch import nn

from far.autoencoder import Autoencoder, AutoencoderConfig, SmallDecoderConfig, Upsample
from far.benchmark import machine, median_ratio, paired, summary
from far.precision import prepare_autoencoder
from far.seeds import seeded

# Size of the autoencoder, and latents along a side.
SIZES = {
    "KL-16, 256 × 256": (AutoencoderConfig(small_decoder=SmallDecoderConfig(64, 3)), 16),
    "avatars-64, 64 × 64": (
        AutoencoderConfig(
            width=16, width_multipliers=(1, 2, 4, 8), blocks=1, latent_channels=12, norm_groups=4,
            small_decoder=SmallDecoderConfig(24, 1),
        ),
        8,
    ),
}  # fmt: skip


def with_repetition(autoencoder: Autoencoder) -> Autoencoder:
    """Return a copy that repeats pixels and then convolves them."""
    plain = copy.deepcopy(autoencoder)
    for level in plain.decoder.up:
        if isinstance(level.upsample, Upsample):
            level.upsample = nn.Sequential(nn.Upsample(scale_factor=2.0), level.upsample.conv)
    return plain


@torch.no_grad()
def rows(config: AutoencoderConfig, side: int, batch: int, dtype: str, rounds: int) -> list[str]:
    """Return the cells of the alternatives: seconds per batch, and how many times faster than the first."""
    with seeded(0):
        full = prepare_autoencoder(Autoencoder(config).eval(), dtype, "cpu")
        latents = torch.randn(batch, config.latent_channels, side, side)
    small = copy.deepcopy(full)
    small.use_decoder("small")
    networks = {"repetition": with_repetition(full), "full": full, "small": small}
    calls: dict[str, Callable[[], object]] = {
        name: functools.partial(network.to_images, latents) for name, network in networks.items()
    }
    seconds = paired(calls, rounds)
    base = seconds["repetition"]
    return [f"{summary(times)}, {median_ratio(base, times):.2f}" for times in seconds.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{arguments.dtype}, {machine()}. Seconds per batch: median (range), times faster.\n")
    print("| autoencoder | batch | repetition, convolution | full | small |\n|---|---|---|---|---|")
    for name, (config, side) in SIZES.items():
        for batch in arguments.batch:
            cells = rows(config, side, batch, arguments.dtype, arguments.rounds)
            print(f"| {name} | {batch} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
