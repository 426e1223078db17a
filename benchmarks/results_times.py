"""Seconds per image of every row of the comparison, and the head's share of them; run it with nothing else on the machine.

    python benchmarks/results_times.py [SET …] [--rounds 5]

The rows of an image set take turns. Times are of the whole pipeline, pixels included, in the dtype of the quality
figures; they are stored beside the rows in docs/results/SET.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from results import BATCH_SIZES, HEAD_STEPS, RESULTS, SETS, Measurements, best_guidance, generation_of
from timing import machine, paired, summary

from far.pipeline import Pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=list(SETS))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    for name in arguments.sets:
        store = Measurements(RESULTS / f"{name}.json")
        times: dict[str, dict[str, float]] = {}
        for batch in BATCH_SIZES:
            alternatives = {}
            shares: dict[str, list[float]] = {}
            for head, all_steps in HEAD_STEPS.items():
                pipeline = None
                for steps in all_steps:
                    generation = generation_of(SETS[name].weights(head), head_steps=steps, guidance=best_guidance(store, head), seed=0)
                    pipeline = pipeline or Pipeline.from_pretrained(generation.weights, dtype=generation.dtype)
                    key = f"{head} {steps if isinstance(steps, int) else ' → '.join(map(str, steps))}"
                    alternatives[key] = timed_call(pipeline, generation.sampling, batch, shares.setdefault(key, []))
            for key, seconds in paired(alternatives, arguments.rounds).items():
                found = times.setdefault(key, {})
                found[f"batch {batch}"] = statistics.median(seconds) / batch
                found[f"head share {batch}"] = statistics.median(shares[key])
                print(f"{name}, batch {batch}, {key}: {summary(seconds)}, head {found[f'head share {batch}']:.0%}", flush=True)
        store.values["times setting"] = {"machine": machine(), "rounds": arguments.rounds}
        for key, found in times.items():
            store.keep("times", key, found)


def timed_call(pipeline: Pipeline, sampling: Any, batch: int, shares: list[float]) -> Callable[[], None]:
    """A generation of ``batch`` images that appends the head's share of its time to ``shares``."""
    labels = [index % len(pipeline.classes) for index in range(batch)]
    inside = [0.0]

    def call() -> None:
        inside[0] = 0.0
        sample = pipeline.model.head.sample

        def measured(*values: Any, **options: Any) -> torch.Tensor:
            start = time.perf_counter()
            result = sample(*values, **options)
            inside[0] += time.perf_counter() - start
            return result

        start = time.perf_counter()
        pipeline.model.head.sample = measured  # type: ignore[method-assign]
        try:
            pipeline.draw(labels, range(batch), sampling, batch_size=batch)
        finally:
            del pipeline.model.head.sample
        shares.append(inside[0] / (time.perf_counter() - start))

    return call


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
