"""Seconds per image of every row of the comparison and of its backbone, and the head's fraction.

    python -m benchmarks.results_times [SET …] [--rounds 5]

Run nothing else on the machine meanwhile. ``make results TRAIN=1`` trains the weights. The rows of an image
set are measured in turn. Times are of the whole pipeline, pixels included, in the dtype of the quality
figures, and are stored with the rows in docs/results/SET.json.
"""

import argparse
import functools
import statistics
import time

import torch

from benchmarks.comparison import BATCH_SIZES, DTYPE, MODELS, RESULTS, SETS
from benchmarks.recorded import Measurements, made, tell_missing
from benchmarks.results import best_guidance, generation_of
from far.benchmark import Row, generate, segments, summary
from far.pipeline import Pipeline


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="*", default=list(SETS))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    for name in arguments.sets:
        tell_missing(name, [SETS[name].weights(model) for model in MODELS if MODELS[model].timed])
        store = Measurements(RESULTS / f"{name}.json")
        times: dict[str, dict[str, float]] = {}
        for batch in BATCH_SIZES:
            for key, found in measure(name, store, batch, arguments.rounds).items():
                seconds = [sum(parts.values()) for parts in found]
                share = statistics.median(parts["head"] / sum(parts.values()) for parts in found)
                backbone = statistics.median(parts["encoder"] + parts["decoder"] for parts in found)
                values = {f"batch {batch}": statistics.median(seconds), f"backbone {batch}": backbone}
                values = {kind: value / batch for kind, value in values.items()} | {
                    f"head share {batch}": share
                }
                times.setdefault(key, {}).update(values)
                print(
                    f"{name}, batch {batch}, {key}: {summary(seconds)}, head {share:.0%},"
                    f" backbone {backbone:.3f} s",
                    flush=True,
                )
        if not times:
            continue
        store.keep("setting", "times", {**made(), "rounds": arguments.rounds})
        for key, found in times.items():
            store.keep("times", key, found)


def measure(name: str, store: Measurements, batch: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Return seconds by part for each round, one list per row, measured in turn after a warm-up round."""
    calls = {}
    for model in (model for model in MODELS if MODELS[model].timed and SETS[name].weights(model).is_dir()):
        pipeline = Pipeline.from_pretrained(SETS[name].weights(model), dtype=DTYPE)
        for steps in MODELS[model].steps:
            options = {
                "head_steps": steps,
                "guidance": best_guidance(store, model),
                "guidance_passes": MODELS[model].passes,
            }
            generation = generation_of(SETS[name].weights(model), seed=0, **options)
            row = Row(generation.weights, generation.sampling, generation.dtype, batch)
            plan = segments(generation.sampling, full=True)
            key = f"{model} {steps if isinstance(steps, int) else ' → '.join(map(str, steps))}"
            calls[key] = functools.partial(generate, pipeline, row, plan, time.perf_counter)
    found: dict[str, list[dict[str, float]]] = {key: [] for key in calls}
    for turn in range(1 + rounds):
        for key, call in calls.items():
            parts = call()
            if turn > 0:
                found[key].append(parts)
    return found


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
