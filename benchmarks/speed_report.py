"""Run the default rows of ``far benchmark``; write the tables and the plot of docs/results.md and speed.md.

    python -m benchmarks.speed_report

Takes about seven minutes on two otherwise idle cores.
"""

import subprocess
import sys
from pathlib import Path

from benchmarks.results_report import replace_block
from far.files import atomic_path

SPEED_COLUMNS = ("model", "steps", "dtype", "seconds per image", "memory", "times faster")


def main() -> None:
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


def write(path: Path, block: str) -> None:
    text = replace_block(path.read_text(encoding="utf-8"), "benchmark", block)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
