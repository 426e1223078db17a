"""Seconds per image of every row of the comparison, and the head's share of them; run it with nothing else on the machine.

    python benchmarks/results_times.py [SET …] [--rounds 5]

The rows of an image set take turns. Times are of the whole pipeline, pixels included, in the dtype of the quality
figures; they are stored beside the rows in docs/results/SET.json.
"""

import argparse
import functools
import statistics

import torch
from results import BATCH_SIZES, MODELS, RESULTS, SETS, Measurements, best_guidance, generation_of
from timing import machine, paired, summary, with_head_share

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
            timed = [model for model in MODELS if not MODELS[model].frozen and SETS[name].weights(model).is_dir()]
            for model in timed:
                pipeline = None
                for steps in MODELS[model].steps:
                    generation = generation_of(SETS[name].weights(model), head_steps=steps, guidance=best_guidance(store, model), seed=0)
                    pipeline = pipeline or Pipeline.from_pretrained(generation.weights, dtype=generation.dtype)
                    key = f"{model} {steps if isinstance(steps, int) else ' → '.join(map(str, steps))}"
                    labels = [index % len(pipeline.classes) for index in range(batch)]
                    draw = functools.partial(pipeline.draw, labels, range(batch), generation.sampling, batch_size=batch)
                    shares[key] = []
                    alternatives[key] = with_head_share(pipeline.model.head, draw, shares[key])
            for key, seconds in paired(alternatives, arguments.rounds).items():
                found = times.setdefault(key, {})
                found[f"batch {batch}"] = statistics.median(seconds) / batch
                found[f"head share {batch}"] = statistics.median(shares[key])
                print(f"{name}, batch {batch}, {key}: {summary(seconds)}, head {found[f'head share {batch}']:.0%}", flush=True)
        store.keep("setting", "times", {"machine": machine(), "rounds": arguments.rounds})
        for key, found in times.items():
            store.keep("times", key, found)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
