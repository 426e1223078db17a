"""Images per second of training with one process and with two, one thread each, measured in turn.

    python -m benchmarks.processes [--batch-size N]

Steps of the recipe avatars-64 (after far cache) in two micro-batches, seed 0, on the CPU. Two cores must be
free. Communication does not depend on the batch size, so it matters less for large batches. The final
checkpoint and evaluation are not timed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from far.benchmark import machine
from far.recipe import load_recipe
from far.training.loop import resolve_loop

STEPS = 12
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WAYS = {
    "1 process": ([], "ddp"),
    "2 processes, DDP": (TORCHRUN, "ddp"),
    "2 processes, FSDP2": (TORCHRUN, "fsdp"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=Path, default=Path("runs/avatars-64/latents"))
    parser.add_argument(
        "--batch-size",
        type=int,
        default=128,
        help="images per step of all processes together (default 128)",
    )
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way in WAYS:
            rates[way].append(images_per_second(way, arguments.latents, arguments.batch_size))
    dtype = resolve_loop(load_recipe(Path("avatars-64")).generator.training).dtype
    print(
        f"{machine()}; one thread per process, batch {arguments.batch_size}, {dtype}\n\n"
        "| processes | images/s | relative to one process |\n|---|---|---|"
    )
    one = statistics.median(rates["1 process"])
    for way, found in rates.items():
        middle = statistics.median(found)
        print(f"| {way} | {middle:.0f} ({min(found):.0f} to {max(found):.0f}) | {middle / one:.2f} |")


def images_per_second(way: str, latents: Path, batch_size: int) -> float:
    """Return the logged images per second of the second half of the steps."""
    launcher, parallel = WAYS[way]
    values = {
        "steps": STEPS,
        "log_every": STEPS // 2,
        "batch_size": batch_size,
        "micro_batches": 2,
        "parallel": parallel,
        "device": "cpu",
    }
    with tempfile.TemporaryDirectory() as run:
        (Path(run) / "latents").symlink_to(latents.resolve())
        overrides = [
            f"run={run}",
            "autoencoder_from=avatars-64",
            "generator.evaluation.images=16",
            "generator.evaluation.references=16",
        ]
        overrides += [f"generator.training.{name}={value}" for name, value in values.items()]
        command = [sys.executable, *launcher, "-m", "far", "train", "avatars-64", *overrides]
        subprocess.run(
            command,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        entries = [json.loads(line) for line in (Path(run) / "model" / "log.jsonl").read_text().splitlines()]
    return float([entry["images_per_second"] for entry in entries if "images_per_second" in entry][-1])


if __name__ == "__main__":
    main()
