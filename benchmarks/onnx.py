"""Compare an ONNX export with torch on the CPU: paired seconds per image, and difference of the images.

    python -m benchmarks.onnx --weights avatars-64 --batch 1 64

torch runs in float32, and the export in each of --dtypes. Every round times all of them in turn, so that
other load of the machine falls on all alike.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import far.onnx
from far.devices import set_threads
from far.onnx.config import DTYPES
from far.pipeline import Pipeline, load


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--weights", default="avatars-64", help="bundled name, folder or hub name")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="images drawn together")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that is not")
    parser.add_argument("--threads", type=int, help="CPU threads (default: OMP_NUM_THREADS, or one per core)")
    parsed = parser.parse_args(arguments)
    if parsed.threads is not None:
        set_threads(parsed.threads)
    pipelines: dict[str, Pipeline] = {"torch float32": load(parsed.weights, device="cpu")}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in parsed.dtypes:
            out = Path(folder) / dtype
            far.onnx.export(parsed.weights, out, dtype=dtype)
            size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
            pipelines[f"onnx {dtype}"] = far.onnx.load(out)
            print(f"onnx {dtype}: {size:.1f} MB")
    for batch in parsed.batch:
        report(pipelines, batch, parsed.rounds)


def report(pipelines: dict[str, Pipeline], batch: int, rounds: int) -> None:
    """Print seconds per image and differences of all pipelines, relative to the first."""
    draws = {name: draw(pipeline, batch) for name, pipeline in pipelines.items()}
    images = {name: call() for name, call in draws.items()}
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    for _ in range(rounds):
        for name, call in draws.items():
            start = time.perf_counter()
            call()
            seconds[name].append((time.perf_counter() - start) / batch)
    first, *_ = draws
    for name, times in seconds.items():
        ratio = statistics.median(base / own for base, own in zip(seconds[first], times))
        error = (images[name] - images[first]).abs()
        print(
            f"batch {batch}, {name}: {statistics.median(times):.4f} s per image, "
            f"{ratio:.2f} times as fast as {first}; "
            f"differs by {error.square().mean().sqrt():.1e} rms, at most {error.max():.1e}"
        )


def draw(pipeline: Pipeline, batch: int) -> Callable[[], torch.Tensor]:
    """Return a function that draws the same ``batch`` images with each call."""
    labels = [index % len(pipeline.classes) for index in range(batch)]
    return lambda: pipeline.generate(labels, seed=0, output="tensor")


if __name__ == "__main__":
    main()
