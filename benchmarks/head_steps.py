"""Distance and images of a model by head steps: the same seeds drawn with 1, 2, 4, 8 and 32 steps.

Prints a Markdown table of "FD (EfficientNet-Lite0)" against held-out images, with two floors: other real
images at the same counts, and the autoencoder's reconstructions. Needs the image set (``far data avatars
data/avatars-64``). Writes an image with one row per step count and one column per class.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import far
from far.benchmark import machine
from far.data.image_sets import read_images
from far.data.shards import ShardReader
from far.evaluation.features import FeatureNetwork, load_feature_network
from far.evaluation.metrics import FeatureStatistics, frechet_distance
from far.pictures import grid, save_png

STEPS = (1, 2, 4, 8, 32)
CHUNK = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="avatars-64")
    parser.add_argument("--data", type=Path, default=Path("data/avatars-64"))
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--references", type=int, default=2000)
    parser.add_argument("--picture", type=Path, default=Path("docs/images/head-steps.png"))
    arguments = parser.parse_args()
    pipeline = far.load(arguments.weights)
    assert pipeline.autoencoder is not None
    network = load_feature_network()
    held_out = ShardReader(arguments.data / "held-out", "images")

    def real(rows: Tensor) -> Tensor:
        return read_images(held_out, rows) / 2 + 0.5

    def reconstructed(rows: Tensor) -> Tensor:
        images = read_images(held_out, rows + arguments.references)
        assert pipeline.autoencoder is not None
        return (pipeline.autoencoder.decode(pipeline.autoencoder.encode(images).mean) / 2 + 0.5).clamp(0, 1)

    reference = feature_statistics(network, "held-out images", arguments.references, real)
    other = min(arguments.count, len(held_out) - arguments.references)
    results = {
        "real images": feature_statistics(
            network, "real", other, lambda rows: real(rows + arguments.references)
        ),
        "reconstructions": feature_statistics(network, "reconstructions", other, reconstructed),
    }
    classes = len(pipeline.classes)
    for steps in STEPS:
        config = pipeline.sampling_config(head_steps=steps)

        def drawn(rows: Tensor, config=config) -> Tensor:  # type: ignore[no-untyped-def]
            return pipeline.draw(
                [row % classes for row in rows.tolist()], rows.tolist(), config, batch_size=CHUNK
            )

        name = f"{steps} head steps"
        results[name] = feature_statistics(network, name, arguments.count, drawn)
    defaults = pipeline.defaults
    print(
        f"{arguments.weights}: {arguments.count} images of seeds 0 …, against {arguments.references} held-out"
        f" ones; {defaults.ar_steps} AR steps, guidance {defaults.guidance}, float32, {machine()}\n"
    )
    print(f"| images | number | FD ({network.name}) |\n|---|---|---|")
    for name, found in results.items():
        print(f"| {name} | {found.count} | {frechet_distance(found, reference):.1f} |")
    rows = [
        pipeline.draw(range(classes), range(classes), pipeline.sampling_config(head_steps=steps))
        for steps in STEPS
    ]
    save_png(
        grid(torch.cat(rows), columns=classes),
        arguments.picture,
        {"rows": f"head steps {STEPS}", "weights": arguments.weights},
    )


def feature_statistics(
    network: FeatureNetwork, name: str, count: int, images_of: Callable[[Tensor], Tensor]
) -> FeatureStatistics:
    """Return statistics of the features of images 0 … ``count`` − 1, with a progress bar of that ``name``.

    ``images_of`` returns the images ``[b, 3, h, w]`` in [0, 1] of row numbers ``[b]``.
    """
    found = FeatureStatistics.empty(network.dimensions)
    for rows in tqdm(torch.arange(count).split(CHUNK), desc=name, unit="batch"):
        found.add(network(images_of(rows)))
    return found


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
