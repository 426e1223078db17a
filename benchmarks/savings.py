"""Savings and costs of each way to draw faster: seconds at ImageNet's size, distances on the small models.

    python -m benchmarks.savings [--sets SET …] [--seconds] [--rounds N] [--batch N --ways WAY …]

Distances are kept in docs/results/savings.json and measured if they are missing or their weights changed, by
any number of processes. Without the weights, which ``make results TRAIN=1`` trains, recorded distances are
kept. ``--seconds`` times every row in turn, which needs an idle machine. Then the table of docs/results.md is
written. Both sizes use the same options except AR steps: 64 for 256 tokens there, 8 for 16 tokens here.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison import RESULTS, SETS, ImageSet, Row
from benchmarks.recorded import WEIGHTS, Measurements, made, tell_missing
from benchmarks.results_measure import (
    current,
    current_rows,
    described,
    folder_training,
    generate,
    generation_of,
    measure_floors,
    recorded_choice,
    shared_by_present,
)
from benchmarks.results_report import replace_block
from benchmarks.results_rows import training_text
from far.benchmark import FASTEST, measure, rows_of
from far.evaluation.generated import Generation
from far.evaluation.metrics import FeatureStatistics, frechet_distance
from far.files import atomic_path
from far.sampling import FAST

FILE = RESULTS / "savings.json"
COUNT = 4_000
PRESETS = {"mar": "mar-b", "masked": "far-b", "causal": "far-causal-b"}
AR_STEPS = 64
BATCHES = (1, 16)


@dataclasses.dataclass(frozen=True)
class Way:
    """A row: a model and its sampling, with the fraction ``ar_share`` of the default AR steps."""

    model: str
    head_steps: int | tuple[int, ...]
    dtype: str
    ar_share: float = 1.0
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)

    def generation(self, images: ImageSet, compared: Measurements) -> Generation:
        """Return the small model's generation, with the sampling of the comparison's rows ``compared``."""
        steps = self.head_steps if isinstance(self.head_steps, int) else self.head_steps[0]
        guidance, temperature = recorded_choice(compared, Row(self.model, steps))
        sampling = {"head_steps": self.head_steps, "guidance": guidance, "temperature": temperature}
        usual = generation_of(images.weights(self.model), seed=0, **sampling, **self.sampling)
        ar_steps = round(usual.sampling.ar_steps * self.ar_share)
        return dataclasses.replace(
            usual, sampling=dataclasses.replace(usual.sampling, ar_steps=ar_steps), dtype=self.dtype
        )


WAYS = {
    "MAR": Way("mar", 100, "float32"),
    "shortcut head": Way("masked", 4, "float32"),
    "+ bfloat16": Way("masked", 4, "bfloat16"),
    "+ int8": Way("masked", 4, "int8"),
    "bfloat16, all positions every 2nd AR step": Way("masked", 4, "bfloat16", sampling={"refresh_every": 2}),
    "bfloat16, all positions every 4th AR step": Way("masked", 4, "bfloat16", sampling={"refresh_every": 4}),
    "bfloat16, guidance's difference every 4th AR step": Way(
        "masked", 4, "bfloat16", sampling={"guidance_every": 4}
    ),
    "bfloat16, guidance from a quarter on": Way(
        "masked", 4, "bfloat16", sampling={"guidance_interval": (0.25, 1.0)}
    ),
    "bfloat16, head steps from 4 to 2": Way("masked", (4, 2), "bfloat16"),
    "bfloat16, Halton order": Way("masked", 4, "bfloat16", sampling={"order": "halton"}),
    "bfloat16, half of the AR steps": Way("masked", 4, "bfloat16", 0.5),
    "bfloat16, half of the AR steps, Halton order": Way("masked", 4, "bfloat16", 0.5, {"order": "halton"}),
    "together": Way("masked", 4, "int8", sampling=FAST),
    "together, half of the AR steps": Way("masked", 4, "int8", 0.5, FASTEST),
    "FAR-Causal": Way("causal", 4, "float32"),
    "FAR-Causal, bfloat16": Way("causal", 2, "bfloat16"),
    "FAR-Causal, int8": Way("causal", 2, "int8"),
    "FAR-Causal, int8, 1 head step": Way("causal", 1, "int8"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sets",
        nargs="*",
        choices=list(SETS),
        default=list(SETS),
        help="image sets whose distances are measured (default: all)",
    )
    parser.add_argument("--seconds", action="store_true", help="time all rows at ImageNet's size")
    parser.add_argument(
        "--rounds", type=int, default=3, help="number of timings of each row, in turn (default 3)"
    )
    parser.add_argument(
        "--batch", type=int, choices=BATCHES, default=1, help="images drawn together when timed (default 1)"
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=list(WAYS),
        default=list(WAYS),
        help="timed rows; the first is the baseline",
    )
    arguments = parser.parse_args()
    store = Measurements(FILE)
    with torch.no_grad():
        for name in arguments.sets:
            measure_distances(SETS[name], store)
    if arguments.seconds:
        measure_seconds(store, arguments.ways, arguments.batch, arguments.rounds)
    report = Path("docs/results.md")
    store.load()
    with atomic_path(report) as temporary:
        temporary.write_text(replace_block(report.read_text(), "savings", table(store.values)))


def measure_distances(images: ImageSet, store: Measurements) -> None:
    if (shared := shared_by_present(images)) is not None:
        autoencoder, training = shared
        store.drop_other_weights(autoencoder, {"training": training}, WEIGHTS / images.name)
    tell_missing(images.name, [images.weights(way.model) for way in WAYS.values()])
    compared = current_rows(images)
    at_hand = {name: way for name, way in WAYS.items() if images.trained(way.model)}
    missing = {name: way.generation(images, compared) for name, way in at_hand.items()}
    missing = {
        name: drawn
        for name, drawn in missing.items()
        if not current(store.values["rows"].get(f"{images.name}, {name}"), drawn)
    }
    if not missing:
        return
    evaluator = measure_floors(images, compared)
    for name, generation in missing.items():
        features, labels = generate(generation, evaluator.network, COUNT)
        distance = frechet_distance(FeatureStatistics.of(features), evaluator.reference.statistics)
        accuracy = evaluator.classifier.accuracy(features, labels)
        print(images.name, name, f"{distance:.1f} {accuracy:.3f}", flush=True)
        row = {
            "distance": distance,
            "class accuracy": accuracy,
            "count": COUNT,
            **described(generation, folder_training(Path(generation.weights))),
        }
        store.keep("rows", f"{images.name}, {name}", row)


def measure_seconds(store: Measurements, names: list[str], batch: int, rounds: int) -> None:
    rows = []
    for way in map(WAYS.__getitem__, names):
        steps: dict[str, Any] = {"ar_steps": [round(AR_STEPS * way.ar_share)], "head_steps": [way.head_steps]}
        rows += rows_of([PRESETS[way.model]], batches=[batch], dtypes=[way.dtype], **steps, **way.sampling)
    report = measure(rows, rounds=rounds)
    for name, result in zip(names, report.results):
        seconds = {"rounds": result.image_seconds, "times faster": report.times_faster(result)}
        store.keep(f"seconds, batch {batch}", name, {**seconds, **made(), **dataclasses.asdict(result.row)})


def table(values: dict[str, Any]) -> str:
    """Return one row per way: seconds at ImageNet's size, then the distance on each image set.

    Each distance is also given relative to MAR's and to the plain model's.
    """
    heads = [f"s per image, batch {batch} | times faster" for batch in BATCHES] + [
        f"FD, {name} | ratio to MAR | ratio to the plain model" for name in SETS
    ]
    lines = ["| way | " + " | ".join(heads) + " |", "|---" * (1 + 2 * len(BATCHES) + 3 * len(SETS)) + "|"]
    plain = {way.model: name for name, way in reversed(WAYS.items())}
    for name, way in WAYS.items():
        cells = [name]
        for batch in BATCHES:
            timed = values.get(f"seconds, batch {batch}", {}).get(name)
            cells += (
                ["", ""]
                if timed is None
                else [f"{statistics.median(timed['rounds']):.3g}", f"{timed['times faster']:.1f}"]
            )
        for images in SETS:
            distances = [
                values["rows"].get(f"{images}, {key}", {}).get("distance")
                for key in (name, "MAR", plain[way.model])
            ]
            if None in distances:
                cells += [""] * 3
                continue
            own, of_mar, of_plain = distances
            cells += [f"{own:.1f}", f"{own / of_mar:.3f}", f"{own / of_plain:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    for images in SETS:
        if (row := values["rows"].get(f"{images}, MAR")) is not None:
            lines += ["", f"Training on {images}: {training_text(row)}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
