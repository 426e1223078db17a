"""Memory of `far demo` while visitors click without a pause.

    python -m benchmarks.demo_soak

Starts the demo in a new process and sends the requests of its page. A visitor draws one to four images, or
the same image with two models, and sometimes closes the page before the end. The exit status is 1 if the
memory of the last minute is more than 5 % above that of the second one, or if a drawing failed. Linux only.
"""

import argparse
import collections
import dataclasses
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

from far.benchmark import machine

PATIENCE = 120  # seconds
LIMIT = 5  # percent


@dataclasses.dataclass
class Demo:
    """A running demo: its address, the ids of its functions by name, and counts of outcomes."""

    address: str
    functions: dict[str, int]
    weights: list[str]
    seen: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    over: threading.Event = dataclasses.field(default_factory=threading.Event)

    def visit(self, number: int) -> None:
        """Click as one visitor after the other until the test is over."""
        draw = random.Random(number)
        while not self.over.is_set():
            try:
                self.seen[self.click(draw, f"visitor-{number}-{draw.random()}")] += 1
            except httpx.HTTPError as error:
                self.seen[type(error).__name__] += 1

    def click(self, draw: random.Random, session: str) -> str:
        """Request a drawing, follow it, and return its outcome."""
        label, seed = str(draw.randrange(16)), str(draw.randrange(2**63 - 16))
        if draw.random() < 0.25:
            name, entries = "compare_heads", [label, seed, self.weights[0], 2, self.weights[-1], 2]
        else:
            name, entries = "generate", [draw.choice(self.weights), label, seed, draw.randint(1, 4), 2, 16, 2]
        leaves = draw.random() < 0.1
        body = {"data": entries, "fn_index": self.functions[name], "session_hash": session}
        httpx.post(f"{self.address}/gradio_api/queue/join", json=body, timeout=PATIENCE).raise_for_status()
        with httpx.stream(
            "GET", f"{self.address}/gradio_api/queue/data", params={"session_hash": session}, timeout=PATIENCE
        ) as response:
            for line in response.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {"msg": ""}
                if message["msg"] == "process_generating" and leaves:
                    return "left"
                if message["msg"] == "process_completed":
                    return "finished" if message["success"] else f"failed: {message['output']}"
        return "cut off"


def memory(process: int) -> float:
    """Return the resident memory of a process in MB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return int(found[1]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        default=["avatars-64", "avatars-64-causal"],
        help="bundled models (default: two of them)",
    )
    parser.add_argument(
        "--visitors", type=int, default=8, help="number of visitors at the same time (default 8)"
    )
    parser.add_argument("--minutes", type=int, default=10, help="3 or more (default 10)")
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "far", "demo", "--weights", *arguments.weights, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as server:
        try:
            assert server.stdout is not None
            if not server.stdout.readline():
                raise SystemExit("the demo did not start")
            address = f"http://127.0.0.1:{port}"
            config = httpx.get(f"{address}/config", timeout=PATIENCE).json()
            functions = {function["api_name"]: function["id"] for function in config["dependencies"]}
            demo = Demo(address, functions, arguments.weights)
            minutes = soak(demo, server.pid, arguments.visitors, arguments.minutes)
        finally:
            server.terminate()
    growth = 100 * (minutes[-1] / minutes[1] - 1)
    print(f"{arguments.visitors} visitors for {arguments.minutes} minutes, {machine()}: {dict(demo.seen)}\n")
    print("| minute | memory, MB |\n|---|---|")
    print("\n".join(f"| {minute} | {megabytes:.0f} |" for minute, megabytes in enumerate(minutes, 1)))
    print(f"\nfrom the second minute to the last: {growth:+.1f} %")
    sys.exit(growth > LIMIT or not demo.seen["finished"] or bool(set(demo.seen) - {"finished", "left"}))


def soak(demo: Demo, process: int, visitors: int, minutes: int) -> list[float]:
    """Return the median memory of each minute in MB."""
    threads = [threading.Thread(target=demo.visit, args=(number,)) for number in range(visitors)]
    for thread in threads:
        thread.start()
    found = []
    try:
        for _ in range(minutes):
            samples = []
            for _ in range(30):
                time.sleep(2)
                samples.append(memory(process))
            found.append(statistics.median(samples))
    finally:
        demo.over.set()
        for thread in threads:
            thread.join()
    return found


if __name__ == "__main__":
    main()
