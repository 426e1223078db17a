"""Comparison of heads and backbones on two image sets: train, measure and write the documents' tables.

    python -m benchmarks.results [--train] [--set SET …] [--only ROW …]

Prints an estimate of the time first. For each row, guidance and temperature are swept over 2,000 images, and
the best are measured on 10,000 images from other seeds. Everything measured is kept at once in
docs/results/SET.json with the SHA-256 of its weights, so an interrupted run resumes, and a row is measured
again only if its weights changed. Rows keep their recorded figures while their weights are missing.
``--train`` trains the missing models by the recipes of recipes/comparison (hours), each before its rows are
measured, and writes the weights to runs/results/weights/. The documents are written after each model.
"""

import argparse
import functools
from itertools import groupby
from pathlib import Path

import torch

from benchmarks.comparison import MODELS, SETS, TEACHER, ImageSet, Row, add_rows, add_sets, selected_rows
from benchmarks.distillation import distill
from benchmarks.recorded import Measurements, tell_missing
from benchmarks.results_estimate import estimate, keep_rate
from benchmarks.results_measure import (
    current_rows,
    is_recorded,
    measure_floors,
    measure_row,
    recipe_training,
    training_of,
)
from benchmarks.results_report import write_report
from far.cli.main import main as far_command
from far.pipeline import Pipeline
from far.recipe import load_recipe


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sets(parser)
    add_rows(parser)
    parser.add_argument("--train", action="store_true", help="train what is not trained yet")
    options = parser.parse_args(arguments)
    rows = selected_rows(options.only)
    sets = [SETS[name] for name in options.sets]
    print(*estimate(sets, rows, options.train), sep="\n", flush=True)
    for images in sets:
        complete(images, rows, options.train)
    report()


def report() -> None:
    write_report([images.results for images in SETS.values()], Path("docs/results.md"), Path("README.md"))


def complete(images: ImageSet, rows: list[Row], train: bool) -> None:
    """Train missing models if ``train``, and measure the missing rows of all models that are present."""
    if train:
        check_trainings(images, rows)
        for command in images.preparation:
            run(*command)
    else:
        tell_missing(images.name, [images.weights(row.model, row.seed) for row in rows])
    evaluator = functools.cache(lambda: measure_floors(images, current_rows(images)))
    for (name, seed), group in groupby(rows, lambda row: (row.model, row.seed)):
        missing = [row for row in group if not is_recorded(images, current_rows(images), row)]
        if missing and train:
            train_model(images, name, seed)
        if missing and images.trained(name, seed):
            store = current_rows(images)
            with torch.no_grad():
                for row in missing:
                    measure_row(images, store, evaluator(), row)
            report()  # whenever this run ends, the documents have what was measured


def check_trainings(images: ImageSet, rows: list[Row]) -> None:
    """Raise a SystemExit if present weights were trained otherwise than their recipes say."""
    for row in rows:
        expected = recipe_training(images, row)
        if images.trained(row.model, row.seed) and training_of(images, row) != expected:
            weights = images.weights(row.model, row.seed)
            raise SystemExit(
                f"{weights} was trained by another recipe ({training_of(images, row)}, now {expected})."
                f" Remove it and {images.runs / weights.name}"
            )


def train_model(images: ImageSet, name: str, seed: int) -> None:
    """Train a model, unless its weights are present, and save them in float16: these are measured."""
    model = MODELS[name]
    if images.trained(name, seed):
        return
    name = model.weights_of or name
    model = MODELS[name]
    if name == "distilled":
        train_model(images, TEACHER, seed)
        distill(images.name)
        return
    folder = images.weights(name, seed).name
    overrides = [f"model={folder}", f"generator.training.seed={seed}"]
    overrides += [f"generator.network.head.kind={model.head}", *model.overrides]
    if model.head == "flow_map":  # a quarter of the steps is plain flow matching
        steps = load_recipe(images.recipe(model)).generator.training.steps
        overrides.append(f"generator.network.head.flow_steps={steps // 4}")
    run("train", str(images.recipe(model)), *overrides, "--resume")
    Pipeline.from_pretrained(images.runs / folder).save_pretrained(images.weights(name, seed), torch.float16)
    keep_rate(Measurements(images.results), name, images.runs / folder)


def run(*command: str) -> None:
    print("far", *command, flush=True)
    if far_command(command) != 0:
        raise SystemExit(2)


if __name__ == "__main__":
    main()
