"""Seconds per image of a bundled model by head steps, against the same backbone with MAR's diffusion head.

The diffusion head has the same width and depth and untrained weights, which do not affect its time. So this
does not measure its quality. Batch 1 and a large batch are reported separately.
"""

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable

import torch

import far
from far.benchmark import machine, median_ratio, paired, summary
from far.heads import DiffusionConfig, build_head
from far.model import FAR
from far.pipeline import Pipeline


def with_diffusion_head(pipeline: Pipeline) -> Pipeline:
    network = pipeline.model.config.network
    head = DiffusionConfig(network.head.width, network.head.depth)
    config = dataclasses.replace(pipeline.model.config, network=dataclasses.replace(network, head=head))
    model = FAR(config)
    model.backbone.load_state_dict(pipeline.model.backbone.state_dict())
    model.head = build_head(head, config.token_channels, model.backbone.width)
    return Pipeline(model, pipeline.autoencoder, pipeline.classes, pipeline.defaults)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="avatars-64")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    pipeline = far.load(arguments.weights)
    baseline = with_diffusion_head(pipeline)
    defaults = pipeline.defaults
    print(
        f"{arguments.weights}, float32, seed 0, {defaults.ar_steps} AR steps, guidance {defaults.guidance},"
        f" {machine()}\n"
    )
    print(
        "| batch | head | head steps | seconds per batch | ms per image | times faster |\n"
        "|---|---|---|---|---|---|"
    )
    for batch in (1, 64):
        labels = [index % len(pipeline.classes) for index in range(batch)]
        calls: dict[tuple[str, int], Callable[[], object]] = {}
        for drawn, head_steps in ((baseline, (100,)), (pipeline, (4, 2, 1))):
            for steps in head_steps:
                key = drawn.model.config.network.head.kind, steps
                calls[key] = functools.partial(drawn.generate, labels, head_steps=steps, output="tensor")
        seconds = paired(calls, arguments.rounds)
        for (kind, steps), times in seconds.items():
            ratio = median_ratio(seconds["diffusion", 100], times)
            milliseconds = statistics.median(times) / batch * 1000
            print(
                f"| {batch} | {kind} | {steps} | {summary(times)} | {milliseconds:.1f} | {ratio:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
