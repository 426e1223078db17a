"""Milliseconds from a click on the demo's page to an image; and the screenshot docs/images/demo.png.

    python -m benchmarks.demo

Needs Chromium. Starts `far demo` in a new process. The first click is reported separately.
"""

import argparse
import shutil
import socket
import statistics
import subprocess
import sys
import time

from playwright.sync_api import Page, expect, sync_playwright

from far.benchmark import machine

# Clicks, and returns the milliseconds until the first and the finished image are on the screen.
CLICK = """button => new Promise(done => {
    const place = document.querySelector("#generated");
    const before = place.querySelector("img")?.src;
    const start = performance.now();
    let first = null;
    const look = () => {
        const image = place.querySelector("img");
        if (image?.complete && image.src !== before) {
            first ??= performance.now() - start;
            if (place.querySelector("a[download]")) return done([first, performance.now() - start]);
        }
        requestAnimationFrame(look);
    };
    button.click();
    look();
})"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", nargs="+", default=["avatars-64", "avatars-64-mar"])
    parser.add_argument("--clicks", type=int, default=10)
    parser.add_argument("--picture", default="docs/images/demo.png")
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.perf_counter()
    command = [sys.executable, "-m", "far", "demo", "--weights", *arguments.weights, "--port", str(port)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as server,
        sync_playwright() as playwright,
    ):
        assert server.stdout is not None
        if not server.stdout.readline():
            raise SystemExit("the demo did not start")
        print(
            f"{arguments.weights[0]}, one image, {machine()}\n"
            f"ready {time.perf_counter() - started:.1f} s after the start\n"
        )
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        try:
            page = browser.new_page(viewport={"width": 1120, "height": 920}, color_scheme="light")
            page.goto(f"http://127.0.0.1:{port}")
            expect(page.locator("#generated .empty")).to_be_visible(timeout=60_000)
            measure(page, arguments.clicks)
            compare(page)
            edit(page, arguments.picture)
        finally:
            browser.close()
            server.terminate()


def measure(page: Page, clicks: int) -> None:
    times = []
    for seed in range(1 + clicks):
        page.get_by_label("Seed").first.fill(str(seed))
        times.append(page.get_by_role("button", name="Generate").evaluate(CLICK))
    print("| click | first tokens shown, ms | image finished, ms |\n|---|---|---|")
    print("| the first | {:.0f} | {:.0f} |".format(*times[0]))
    middle = [
        f"{statistics.median(column):.0f} ({min(column):.0f} to {max(column):.0f})"
        for column in zip(*times[1:])
    ]
    print(f"| the next {clicks} | {middle[0]} | {middle[1]} |\n")


def compare(page: Page) -> None:
    """Draw the same seeds with both heads, each with its model's default steps."""
    page.get_by_role("tab", name="Heads").click()
    panel = page.get_by_role("tabpanel")
    panel.get_by_label("Class").click()
    page.get_by_role("option", name="voxel-bot", exact=True).click()
    for seed in ("6", "7"):
        panel.get_by_label("Seed").fill(seed)
        panel.get_by_role("button", name="Compare").click()
        expect(page.locator("#heads-right").get_by_text(f"seed {seed}")).to_be_visible(timeout=60_000)
        expect(page.locator("#heads-verdict .verdict")).to_be_visible(timeout=60_000)
    print(page.locator("#heads-verdict .verdict").inner_text())


def edit(page: Page, path: str) -> None:
    """Take the screenshot: a picture with parts marked to be redrawn. It shows no times."""
    page.get_by_role("tab", name="Edit").click()
    panel = page.get_by_role("tabpanel")
    panel.get_by_label("Class").click()
    page.get_by_role("option", name="planets", exact=True).click()
    panel.get_by_label("Seed").fill("3")
    panel.get_by_role("button", name="New picture").click()
    with page.expect_download(timeout=60_000) as download:
        panel.get_by_text("↓ PNG").click(timeout=60_000)
    panel.get_by_label("Open an image").set_input_files(download.value.path())
    for token in (5, 6, 9, 10):
        panel.locator(f"[data-token='{token}']").click()
    page.screenshot(path=path)


if __name__ == "__main__":
    main()
