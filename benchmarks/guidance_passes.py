"""Time of guidance in one pass of the backbone against two: far-b with a flow-map head and random weights.

    python -m benchmarks.guidance_passes

64 AR steps of 2 head steps, bfloat16, guidance 2.9, batch 1. Writes random weights to runs/ and runs
``far benchmark``.
"""

import dataclasses

import torch

from far.autoencoder import Autoencoder, AutoencoderConfig
from far.cli.main import main as far_command
from far.heads import FlowMapConfig
from far.model import FAR, ModelConfig, preset
from far.pipeline import Pipeline
from far.sampling import SamplingConfig

FOLDER = "runs/far-b-flow-map"


def main() -> None:
    network = preset("far-b")
    head = FlowMapConfig(network.head.width, network.head.depth, max_guidance=4.0)
    model = FAR(ModelConfig(dataclasses.replace(network, head=head)))
    sampling = SamplingConfig(ar_steps=64, head_steps=2, guidance=2.9)
    autoencoder, classes = Autoencoder(AutoencoderConfig()), [str(number) for number in range(1000)]
    Pipeline(model, autoencoder, classes, sampling).save_pretrained(FOLDER, torch.bfloat16)
    for passes in ("2", "1"):
        options = ["--models", f"./{FOLDER}", "--dtypes", "bfloat16", "--guidance-passes", passes]
        if status := far_command(["benchmark", *options]):
            raise SystemExit(status)


if __name__ == "__main__":
    main()
