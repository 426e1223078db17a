"""Distance of models by AR steps and order: the same seeds drawn in 1, 2, 4, 8 and 16 AR steps.

    python -m benchmarks.ar_steps MODEL… [--orders random raster] [--count 1000]

Prints a Markdown table of the FD against held-out images, one row per model and order. A model without a
choice of order or steps, as a causal one, has one row in raster order with its number of tokens as steps.
Models that are to be compared should have the same guidance, temperature and head steps: give them as
options. Needs the image set (``far data avatars data/avatars-64``).
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import far
from benchmarks.head_steps import feature_statistics
from far.benchmark import machine
from far.cli.sampling_arguments import add_sampling_arguments, sampling_options
from far.data.image_sets import read_images
from far.data.shards import ShardReader
from far.evaluation.features import FeatureNetwork, load_feature_network
from far.evaluation.generated import check_class_balance
from far.evaluation.metrics import FeatureStatistics, frechet_distance
from far.pipeline import Pipeline

STEPS = (1, 2, 4, 8, 16)
OWN_AXES = ("ar_steps", "order")


@dataclasses.dataclass(frozen=True)
class Measure:
    """Values that all cells of the table share.

    Attributes:
        network: extracts features.
        reference: statistics of the held-out images.
        count: images per cell, with seeds ``seed``, ``seed`` + 1, …
        batch_size: images drawn together.
    """

    network: FeatureNetwork
    reference: FeatureStatistics
    count: int
    seed: int
    batch_size: int

    def distance(self, pipeline: Pipeline, name: str, **sampling: Any) -> float:
        """Return the FD of the model's images, of all classes in turn."""
        config, classes = pipeline.sampling_config(**sampling), len(pipeline.classes)

        def drawn(rows: Tensor) -> Tensor:
            labels, seeds = (
                [row % classes for row in rows.tolist()],
                [self.seed + row for row in rows.tolist()],
            )
            return pipeline.draw(labels, seeds, config, batch_size=self.batch_size)

        return frechet_distance(feature_statistics(self.network, name, self.count, drawn), self.reference)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder or bundled name")
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS, metavar="N", help="AR steps")
    parser.add_argument(
        "--orders", nargs="+", choices=("random", "halton", "raster"), default=["random", "raster"]
    )
    parser.add_argument("--data", type=Path, default=Path("data/avatars-64"), help="image set")
    parser.add_argument("--count", type=int, default=1000, help="images per cell")
    parser.add_argument("--references", type=int, default=2000, help="held-out images")
    parser.add_argument("--seed", type=int, default=0, help="of the first image")
    parser.add_argument("--batch-size", type=int, default=100, help="images drawn together")
    add_sampling_arguments(parser, without=OWN_AXES)
    arguments = parser.parse_args()
    options = sampling_options(arguments, without=OWN_AXES)
    network, held_out = load_feature_network(), ShardReader(arguments.data / "held-out", "images")
    references = min(arguments.references, len(held_out))
    reference = feature_statistics(
        network, "held-out images", references, lambda rows: read_images(held_out, rows) / 2 + 0.5
    )
    measure = Measure(network, reference, arguments.count, arguments.seed, arguments.batch_size)
    given = ", ".join(f"{name} {value}" for name, value in options.items())
    print(
        f"FD ({network.name}) of {arguments.count} images of seeds {arguments.seed} …, against {references}"
        f" held-out ones of {arguments.data.name}; {given or 'sampling values of each model'}, float32,"
        f" {machine()}\n"
    )
    print("| model | order | " + " | ".join(f"{steps} AR steps" for steps in arguments.steps) + " |")
    print("|---" * (2 + len(arguments.steps)) + "|")
    for model in arguments.models:
        for row in rows(far.load(model), model, arguments.orders, arguments.steps, measure, options):
            print(f"| {' | '.join(row)} |", flush=True)


def rows(
    pipeline: Pipeline,
    name: str,
    orders: Sequence[str],
    steps: Sequence[int],
    measure: Measure,
    options: dict[str, Any],
) -> Iterator[list[str]]:
    """Return one row of cells per order: name, order, and the distance at each number of AR steps.

    Numbers of steps that the model does not take are empty.
    """
    check_class_balance(measure.count, len(pipeline.classes))
    any_order, tokens = pipeline.model.backbone.any_order, pipeline.model.config.tokens
    for order in orders if any_order else ["raster"]:
        cells, chosen = [], {**options, "order": order} if any_order else options
        for count in steps:
            takes = 1 <= count <= tokens if any_order else count == tokens
            title = f"{name}, {order}, {count} AR steps"
            cells.append(
                f"{measure.distance(pipeline, title, ar_steps=count, **chosen):.1f}" if takes else ""
            )
        yield [name, order, *cells]


if __name__ == "__main__":
    with torch.no_grad():
        main()
