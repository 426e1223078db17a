"""Measured tables of docs/cluster.md: training steps on this CPU, compared with the computed memory."""

import json
import os
import statistics
import subprocess
import sys

import torch

from benchmarks.cluster import GB, flops, kept_by, memory, sizes_of, table
from far.benchmark import machine, product_peak
from far.model import PRESETS, ModelConfig
from far.recipe import load_recipe

# Engine, processes, and whether activations are checkpointed.
WAYS = {
    "1 process": ("ddp", 1, False),
    "2 processes, DDP": ("ddp", 2, False),
    "2 processes, FSDP2": ("fsdp", 2, False),
    "1 process, checkpointed": ("ddp", 1, True),
}


def models() -> dict[str, tuple[ModelConfig, tuple[int, ...]]]:
    """Return the measured models, and their images per micro-batch."""
    avatars = load_recipe("avatars-64").generator.network
    return {
        "avatars-64": (ModelConfig(avatars, 16, 8, (8, 8)), (64, 128)),
        "far-b": (ModelConfig(PRESETS["far-b"]), (1, 4)),
    }


def measured_tables() -> dict[str, str]:
    """Return the measured tables by name."""
    of_memory = []
    for name, (config, batches) in models().items():
        sizes = sizes_of(config)
        kept = [kept_by(config, 1.0, gpu=False, checkpointed=checkpointed) for checkpointed in (False, True)]
        for images in batches:
            for way, (parallel, processes, checkpointed) in WAYS.items():
                # One process accumulates, so that its gradients exist during the forward pass, as with DDP.
                micro_batches = 1 if parallel == "fsdp" else 2
                # Return freed memory to the system at once: glibc keeps much of it otherwise.
                options = {"MALLOC_MMAP_THRESHOLD_": "65536"}
                found = train(
                    name, images, parallel, processes, micro_batches, 2, checkpointed=checkpointed, **options
                )["bytes"]
                computed = memory(sizes, kept[checkpointed], images, parallel, processes, micro_batches)
                row = [
                    name,
                    way,
                    str(images),
                    f"{computed / GB:.2f}",
                    f"{found / GB:.2f}",
                    f"{found / computed:.2f}",
                ]
                of_memory.append(row)
                print(*row, flush=True)
    return {
        "measured": table(["model", "processes", "images", "GB computed", "GB measured", "ratio"], of_memory),
        "speed": measured_speed(),
    }


def measured_speed() -> str:
    rows = []
    peak = product_peak(torch.bfloat16)
    for name, (config, batches) in models().items():
        seconds = statistics.median(train(name, batches[-1], "ddp", 1, 1, steps=12)["seconds"][2:])
        rate, work = batches[-1] / seconds, flops(config)
        rows.append(
            [
                name,
                str(batches[-1]),
                f"{rate:.3g}",
                f"{work / 1e9:.2f}",
                f"{rate * work / 1e9:.0f}",
                f"{rate * work / peak:.0%}",
            ]
        )
    heading = [
        "model",
        "batch",
        "images/s",
        "GFLOP per image",
        "GFLOP/s",
        f"of the product's {peak / 1e9:.0f}",
    ]
    return table(heading, rows) + f"\n{machine()}; median of 10 steps.\n"


def train(
    name: str,
    images: int,
    parallel: str,
    processes: int,
    micro_batches: int,
    steps: int,
    *,
    checkpointed: bool = False,
    **variables: str,
) -> dict:
    """Return the measurements of ``benchmarks.cluster_process`` in new processes with these variables."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if processes > 1
        else []
    )
    arguments = [name, images, parallel, micro_batches, steps, *(["checkpointed"] if checkpointed else [])]
    command = [sys.executable, *launcher, "-m", "benchmarks.cluster_process", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    printed = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ).stdout
    return json.loads(printed.splitlines()[-1])
