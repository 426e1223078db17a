"""Seconds an image at ImageNet size: MAR's diffusion head, the shortcut head on the same backbone, and FAR-Causal.

Random weights suffice for time. Latents only: the autoencoder's decoder costs every row the same and is timed apart.
The floor is the time that reading the weights takes at the measured bandwidth, once for every pass through a network.
"""

import argparse
import dataclasses
import functools
import resource
import statistics
import sys
from collections.abc import Callable

import torch
from timing import machine, median_ratio, paired, summary, with_head_share

from far.autoencoder import Autoencoder, AutoencoderConfig
from far.benchmark import read_bandwidth, weights_read
from far.model import FAR, ModelConfig, preset
from far.packing import pack_linear_layers
from far.sampling import SamplingConfig, SeededNoise, sample

# Masked backbones in float32, as MAR was released; the causal one, which is bound by reading its weights, in bfloat16 too.
ROWS = (
    ("mar", 100, "float32"),
    ("far", 8, "float32"),
    ("far", 4, "float32"),
    ("far-causal", 4, "float32"),
    ("far-causal", 8, "bfloat16"),
    ("far-causal", 4, "bfloat16"),
    ("far-causal", 2, "bfloat16"),
    ("far-causal", 1, "bfloat16"),
)


@dataclasses.dataclass
class Case:
    """A row: its model and sampling, and what is found."""

    model: FAR
    config: SamplingConfig
    floor: float
    shares: list[float] = dataclasses.field(default_factory=list)


def build(name: str, dtype: str) -> FAR:
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))  # so that no float32 copy of the weights counts as peak memory
    try:
        model = FAR(ModelConfig(preset(name))).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    pack_linear_layers(model)
    return model


def draw(model: FAR, config: SamplingConfig, batch: int) -> None:
    sample(model, torch.arange(batch), SeededNoise(range(batch), torch.device("cpu")), config)


def speed(arguments: argparse.Namespace) -> None:
    bandwidth = read_bandwidth()
    models: dict[tuple[str, str], FAR] = {}
    cases: dict[str, Case] = {}
    for family, steps, dtype in ROWS:
        name = f"{family}-{arguments.size}"
        if (name, dtype) not in models:
            models[name, dtype] = build(name, dtype)
        model = models[name, dtype]
        ar_steps = arguments.ar_steps if model.backbone.any_order else model.config.tokens
        config = SamplingConfig(ar_steps, steps, arguments.guidance)
        cases[f"{name} | {ar_steps} × {steps} | {dtype}"] = Case(model, config, weights_read(model, config) / bandwidth)
    calls: dict[str, Callable[[], object]] = {
        name: with_head_share(case.model.head, functools.partial(draw, case.model, case.config, arguments.batch), case.shares)
        for name, case in cases.items()
    }
    seconds = paired(calls, arguments.rounds, warmup=0)
    print(f"batch {arguments.batch}, guidance {arguments.guidance}, random weights, {machine()}, {bandwidth / 1e9:.0f} GB/s\n")
    print("| model | AR × head steps | dtype | seconds per image | head's share | reading of weights | times faster |\n|" + "---|" * 7)
    base = next(iter(seconds))
    for name, found in seconds.items():
        each = [value / arguments.batch for value in found]
        share, floor = statistics.median(cases[name].shares), cases[name].floor / statistics.median(found)
        print(f"| {name} | {summary(each)} | {share:.0%} | {floor:.0%} | {median_ratio(seconds[base], found):.1f} |")
    autoencoder = Autoencoder(AutoencoderConfig()).eval()
    decode = paired({"decoder": lambda: autoencoder.decode(torch.randn(1, 16, 16, 16))}, arguments.rounds)["decoder"]
    print(f"\nKL-16 decoder, float32: {summary(decode)} an image")


def memory(arguments: argparse.Namespace) -> None:
    """Peak memory of a causal generation beyond the loaded weights; in a process of its own, since a peak never falls."""
    model = build(f"far-causal-{arguments.size}", "bfloat16")
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    draw(model, SamplingConfig(model.config.tokens, 4, arguments.guidance), arguments.batch)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit / 2**30
    print(f"far-causal-{arguments.size}, batch {arguments.batch}, guided, 4 head steps, bfloat16: {peak:.2f} GB beyond the weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=["b", "l"], default="b", help="of the presets (default b)")
    parser.add_argument("--ar-steps", type=int, default=64, help="autoregressive steps of the masked models (default 64)")
    parser.add_argument("--guidance", type=float, default=2.9)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="measure the causal model's peak memory instead")
    arguments = parser.parse_args()
    memory(arguments) if arguments.memory else speed(arguments)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
