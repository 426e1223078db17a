"""Compare far on a GPU with the CPU, and time it: ``python -m benchmarks.gpu``, at most 8 minutes.

Needs torch, numpy, safetensors, Pillow, PyYAML and tqdm, but no installation and no internet. The
repository's folders ``far/`` and ``benchmarks/`` are enough. The report, a JSON file, is written after every
entry. Each part has a deadline; entries that do not fit are skipped and listed. Without a GPU, the checks
compare the CPU with itself at tiny sizes, and nothing is timed. The exit status is 1 if a check fails.
"""

import argparse
import contextlib
import json
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_checks import autoencoders, bundled_models, heads, recordings
from benchmarks.gpu_compiled import compiled_blocks
from benchmarks.gpu_speed import SPEED
from benchmarks.gpu_training import training
from far.devices import device_title, resolve_device

ROOT = Path(__file__).resolve().parents[1]
CHECKS = {
    "heads": heads, "bundled models": bundled_models, "recordings": recordings, "training": training,
    "autoencoder": autoencoders, "compiled blocks": compiled_blocks,
}  # fmt: skip

# Seconds of each part. Later parts may use what earlier ones leave. Starting torch and CUDA takes the rest of
# the eight minutes.
PARTS = {
    "machine": 15, "heads": 40, "bundled models": 30, "recordings": 30, "training": 30, "autoencoder": 15,
    "far-b": 65, "far-bc-b": 20, "far-causal-b": 45, "approximations": 20, "MAR's plain path": 55,
    "training speed": 45, "compiled blocks": 50,
}  # fmt: skip


class Late(BaseException):
    """Raised at the deadline of a part. Handlers of ``Exception`` do not catch it."""


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise :class:`Late` in the block after ``seconds``."""

    def over(*_: object) -> None:
        raise Late

    previous = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def run_part(
    calls: dict[str, Callable[[], dict[str, Any]]], until: float, write: Callable[[dict[str, Any]], None]
) -> None:
    """Compute the entries of a part in order and ``write`` them after each.

    Args:
        calls: entry by name.
        until: deadline, a value of ``time.monotonic``.
        write: receives the part so far.
    """
    start, entries, left_out = time.monotonic(), {}, []
    for name, call in calls.items():
        seconds = until - time.monotonic()
        try:
            if seconds <= 0:
                raise Late
            with deadline(seconds):
                entries[name] = call()
        except Late:
            left_out.append(name)
        except Exception as error:  # such as out of memory; the other entries may still work
            entries[name] = {"error": "".join(traceback.format_exception_only(error)).strip(), "holds": False}
            print("".join(traceback.format_exception(error)), file=sys.stderr)
        print(f"  {name}: {json.dumps(entries[name]) if name in entries else 'left out'}", flush=True)
        write({"seconds": round(time.monotonic() - start, 1), "entries": entries, "left_out": left_out})


def checks(value: Any, name: str = "") -> Iterator[tuple[str, bool]]:
    """Yield name and outcome of every check in a report."""
    if isinstance(value, dict):
        if "holds" in value:
            yield name, value["holds"]
        for key, inner in value.items():
            yield from checks(inner, f"{name}: {key}" if name else key)


def machine(device: torch.device) -> dict[str, Any]:
    """Return the conditions of the figures."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "commit": commit, "device": device_title(device),
        "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", help="cuda, cuda:1 … or cpu (default: a GPU if present)")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu.json"), help="file of the report (default gpu.json)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="run only these parts")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    small = device.type == "cpu"
    report: dict[str, Any] = {"machine": machine(device), "parts": {}}
    if small:
        report["note"] = "no GPU: checks of the CPU against itself, at tiny sizes"
        print(report["note"])
        torch.set_num_threads(1)  # at these sizes, more threads are slower
    until = time.monotonic()
    for name in arguments.parts:
        print(name, flush=True)
        until += PARTS[name]
        calls = {**CHECKS, **SPEED}[name](device, small)

        def write(part: dict[str, Any], name: str = name) -> None:
            report["parts"][name] = part
            outcomes = dict(checks(report["parts"]))
            report["checks"] = {
                "held": sum(outcomes.values()),
                "failed": [key for key, held in outcomes.items() if not held],
            }
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")

        run_part(calls, until, write)
    print(
        f"{report['checks']['held']} checks held, {len(report['checks']['failed'])} failed."
        f" See {arguments.out}"
    )
    return 1 if report["checks"]["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
