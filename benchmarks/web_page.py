"""Seconds from opening an exported web page to its first image, and seconds of the next images.

    python -m benchmarks.web_page

Needs Chromium. Exports the page, unless --page gives one, serves it with `far demo --static` in a new process
and opens it in a new browser each round, so that nothing is cached. Targets on two cores: first image within
10 s, next ones within 3 s.
"""

import argparse
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from playwright.sync_api import sync_playwright

from far.benchmark import machine
from far.onnx.config import DTYPES
from far.onnx.web import export_web

# Waits until the page can draw, clicks, and returns the seconds since the navigation began: then, and when
# the image is on the screen.
DRAW = """name => new Promise((done, fail) => {
    const button = document.getElementById(name), line = document.getElementById("status");
    let ready = null;
    const look = () => {
        const error = document.getElementById("error").textContent;
        if (error) return fail(new Error(error));
        if (ready === null && !button.disabled) {
            ready = performance.now() / 1000;
            button.click();
        } else if (ready !== null && line.textContent.startsWith("Drawn")) {
            return done([ready, performance.now() / 1000]);
        }
        requestAnimationFrame(look);
    };
    look();
})"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, help="a page of far export web (default: export one)")
    parser.add_argument("--weights", default="avatars-64", help="model to export")
    parser.add_argument("--dtype", choices=DTYPES, default="int8", help="dtype of the exported weights")
    parser.add_argument("--runtime-files", type=Path, metavar="FOLDER", help="as far export web takes")
    parser.add_argument("--rounds", type=int, default=5, help="times that the page is opened")
    parser.add_argument("--images", type=int, default=5, help="images per round after the first one")
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        page = parsed.page
        if page is None:
            page = Path(temporary) / "page"
            export_web(parsed.weights, page, dtype=parsed.dtype, runtime_files=parsed.runtime_files)
        size = sum(path.stat().st_size for path in page.rglob("*") if path.is_file()) / 1e6
        print(f"{parsed.page or f'{parsed.weights}, {parsed.dtype}'}, {size:.1f} MB, {machine()}\n")
        report(measured(page, parsed.rounds, parsed.images))


def measured(page: Path, rounds: int, images: int) -> list[list[list[float]]]:
    """Return, per round and image, the seconds since the navigation at which it was begun and finished."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "far", "demo", "--static", str(page), "--port", str(port)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as server,
        sync_playwright() as playwright,
    ):
        try:
            assert server.stdout is not None
            if not server.stdout.readline():
                raise SystemExit("the demo did not start")
            flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
            times: list[list[list[float]]] = []
            for _ in range(rounds):
                browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
                opened = browser.new_page()
                opened.goto(f"http://127.0.0.1:{port}/")
                buttons = ["draw", *["another"] * images]
                times.append([opened.evaluate(DRAW, button) for button in buttons])
                browser.close()
            return times
        finally:
            server.terminate()


def report(times: list[list[list[float]]]) -> None:
    """Print the seconds of all rounds."""
    rows = {
        "model loaded": [first[0] for first, *_ in times],
        "first image, from opening the page": [first[1] for first, *_ in times],
        "a next image": [end - begin for _, *others in times for begin, end in others],
    }
    print("| | seconds, median (range) |\n|---|---|")
    for name, seconds in rows.items():
        if seconds:
            print(f"| {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) |")


if __name__ == "__main__":
    main()
