"""Run the default rows of ``far benchmark``; write the tables and the plot of docs/results.md and speed.md.

    python -m benchmarks.speed_report [--gpu]

Takes about five minutes on two otherwise idle cores. If docs/results/gpu.json exists, a report of
``benchmarks.gpu`` from a GPU, its table is written too; ``--gpu`` writes nothing else.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.results_report import replace_block, table
from far.errors import InputError
from far.files import atomic_path, read_json

GPU = Path("docs/results/gpu.json")
# Parts of the report with whole images, and the entry that is the base of ratios.
GPU_PARTS = ("MAR's plain path", "far-b", "far-bc-b", "far-causal-b", "compiled blocks", "approximations")
PLAIN = "MAR's plain path, float16 autocast"
SPEED_COLUMNS = ("model", "steps", "dtype", "seconds per image", "memory", "times faster")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="write the table of docs/results/gpu.json alone")
    only_gpu = parser.parse_args().gpu
    if GPU.exists():
        write(Path("docs/speed.md"), gpu_table(read_json(GPU)), "gpu")
    elif only_gpu:
        raise SystemExit(f"{GPU} does not exist. Write it on a GPU: python -m benchmarks.gpu --out {GPU}")
    if not only_gpu:
        benchmark()


def benchmark() -> None:
    command = [
        "-m",
        "far",
        "benchmark",
        "--json",
        "docs/results/benchmark.json",
        "--plot",
        "docs/images/benchmark.png",
    ]
    printed = subprocess.run(
        [sys.executable, *command], check=True, stdout=subprocess.PIPE, encoding="utf-8"
    ).stdout
    print(printed)
    heading, *rest = printed.splitlines()
    lines = [line for line in rest if line.startswith("|")]
    write(Path("docs/results.md"), "\n".join([heading, "", *lines]) + "\n")
    write(Path("docs/speed.md"), "\n".join(columns(lines)) + "\n")


def columns(lines: list[str]) -> list[str]:
    """Return the table with the columns of docs/speed.md."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    places = [cells[0].index(name) for name in SPEED_COLUMNS]
    return [
        "| " + " | ".join("---" if row == 1 else line[place] for place in places) + " |"
        for row, line in enumerate(cells)
    ]


def gpu_table(report: dict[str, Any]) -> str:
    """Return the table of a report of ``benchmarks.gpu``, with the card in a line above it.

    Raises:
        InputError: the report is not from a GPU.
    """
    machine = report["machine"]
    if not machine["device"].startswith("cuda"):
        raise InputError(f"{GPU} is from device {machine['device']!r}, not from a GPU. Write it on one")
    measured = [
        (part, *name.rsplit(", batch ", 1), entry)
        for part in GPU_PARTS
        for name, entry in report["parts"].get(part, {"entries": {}})["entries"].items()
        if "seconds per image" in entry
    ]
    plain = {batch: entry["seconds per image"] for _, title, batch, entry in measured if title == PLAIN}
    lines = []
    for part, title, batch, entry in measured:
        seconds = entry["seconds per image"]
        name = f"{part}, {title}" if part.startswith("far") else title
        faster = f"{plain[batch] / seconds:.1f}" if batch in plain else "–"
        gib = f"{entry['GiB']:.1f}"
        lines.append([name, batch, f"{seconds:.4g}", f"{1 / seconds:.4g}", gib, faster])
    heads = ["model and sampling", "batch", "seconds per image", "images/s", "GiB", "times faster"]
    versions = f"torch {machine['torch']}, CUDA {machine['cuda']}, TF32 off, commit {machine['commit'][:7]}"
    return f"{machine['device']}, {versions}.\n\n{table(heads, lines)}"


def write(path: Path, block: str, name: str = "benchmark") -> None:
    text = replace_block(path.read_text(encoding="utf-8"), name, block)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
