"""Fraction of a model's images that are recognized as their class, for each class and in all.

    python -m benchmarks.class_accuracy --weights avatars-64

A linear classifier on EfficientNet-Lite0 features, fitted to training images, decides. The first line is of
held-out images. Needs the image set (far data avatars data/avatars-64).
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

import far
from benchmarks.classifier import LinearClassifier
from far.benchmark import machine
from far.data.shards import ShardReader
from far.evaluation.features import load_feature_network
from far.evaluation.images import open_images
from far.evaluation.references import features_of

CACHE = Path("evaluation")
CHUNK = 100


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="avatars-64")
    parser.add_argument("--data", type=Path, default=Path("data/avatars-64"))
    parser.add_argument("--fit", type=int, default=10000, help="training images to fit")
    parser.add_argument("--count", type=int, default=4000, help="images to draw and to hold out")
    parser.add_argument("--seed", type=int, default=7, help="image i has seed SEED · 2³² + i")
    arguments = parser.parse_args()
    pipeline, network = far.load(arguments.weights), load_feature_network()

    def real(part: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = ShardReader(arguments.data / part, "images").all("labels")[:count]
        return features_of(open_images(arguments.data / part), network, CACHE, count=len(labels)), labels

    classifier = LinearClassifier(*real("train", arguments.fit))
    print(f"{arguments.weights}, {pipeline.defaults}, {machine()}\n")
    print(f"held-out images: {classifier.accuracy(*real('held-out', arguments.count)):.3f}")
    labels = torch.arange(arguments.count) % len(pipeline.classes)
    parts = []
    for rows in tqdm(torch.arange(arguments.count).split(CHUNK), unit="batch"):
        seeds = [(arguments.seed << 32) + int(row) for row in rows]
        parts.append(network(pipeline.generate(labels[rows].tolist(), seed=seeds, output="tensor")))
    features = torch.cat(parts)
    print(f"drawn images: {classifier.accuracy(features, labels):.3f}")
    for number, name in enumerate(pipeline.classes):
        of_class = labels == number
        print(f"  {name}: {classifier.accuracy(features[of_class], labels[of_class]):.3f}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
