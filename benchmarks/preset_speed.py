"""Seconds an image at ImageNet size: MAR's diffusion head against the shortcut head on the same backbone.

Random weights suffice for time. Latents only: the autoencoder's decoder costs every row the same and is timed apart.
"""

import argparse
import functools
import statistics
from collections.abc import Callable

import torch
from timing import machine, median_ratio, paired, summary, with_head_share

from far.autoencoder import Autoencoder, AutoencoderConfig
from far.model import FAR, ModelConfig, preset
from far.sampling import SamplingConfig, SeededNoise, sample

STEPS = {"mar": (100,), "far": (8, 4)}


def draw(model: FAR, config: SamplingConfig, batch: int) -> None:
    sample(model, torch.arange(batch), SeededNoise(range(batch), torch.device("cpu")), config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=["b", "l", "h"], default="b", help="of the presets (default b)")
    parser.add_argument("--ar-steps", type=int, default=64, help="autoregressive steps (default 64)")
    parser.add_argument("--guidance", type=float, default=2.9)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    calls: dict[str, Callable[[], object]] = {}
    shares: dict[str, list[float]] = {}
    for family, all_steps in STEPS.items():
        torch.manual_seed(0)
        model = FAR(ModelConfig(preset(f"{family}-{arguments.size}"))).eval().to(dtype)
        for steps in all_steps:
            name = f"{family}-{arguments.size}, {steps} head steps"
            config = SamplingConfig(arguments.ar_steps, steps, arguments.guidance)
            shares[name] = []
            calls[name] = with_head_share(model.head, functools.partial(draw, model, config, arguments.batch), shares[name])
    seconds = paired(calls, arguments.rounds, warmup=0)
    setting = f"{arguments.ar_steps} AR steps, guidance {arguments.guidance}, {arguments.dtype}, random weights"
    print(f"batch {arguments.batch}, {setting}, {machine()}\n")
    print("| model | seconds per image | head's share | times faster |\n|---|---|---|---|")
    base = next(iter(seconds))
    for name, found in seconds.items():
        each = [value / arguments.batch for value in found]
        ratio = median_ratio(seconds[base], found)
        print(f"| {name} | {summary(each)} | {statistics.median(shares[name]):.0%} | {ratio:.2f} |")
    autoencoder = Autoencoder(AutoencoderConfig()).eval()
    decode = paired({"decoder": lambda: autoencoder.decode(torch.randn(1, 16, 16, 16))}, arguments.rounds)["decoder"]
    print(f"\nKL-16 decoder, float32: {summary(decode)} an image")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
