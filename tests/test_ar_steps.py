"""``benchmarks.ar_steps``: each cell is the distance of the images that the model draws with those values."""

from pathlib import Path
from typing import Any

import pytest
import torch

import far
from benchmarks import ar_steps
from far.data.image_sets import open_image_set, read_images
from far.evaluation.features import load_feature_network
from far.evaluation.metrics import FeatureStatistics, frechet_distance
from tests.refusals import refused


@torch.no_grad()
def test_table_has_the_distances_of_both_models(
    block_causal_diffusion_folder: Path,
    causal_diffusion_folder: Path,
    image_set: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = block_causal_diffusion_folder, causal_diffusion_folder
    options: dict[str, Any] = {"guidance": 2.0, "head_steps": 2}
    given = ["--steps", "2", "4", "--orders", "halton", "--guidance", "2", "--head-steps", "2"]
    sizes = ["--count", "6", "--seed", "3", "--batch-size", "4", "--data", str(image_set)]
    monkeypatch.setattr("sys.argv", ["ar_steps", *map(str, folders), *given, *sizes])
    ar_steps.main()
    printed = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed if line[:2] == "| "]
    assert rows[0] == ["model", "order", "2 AR steps", "4 AR steps"]

    network, held_out = load_feature_network(), open_image_set(image_set / "held-out")
    reference = FeatureStatistics.of(network(read_images(held_out, torch.arange(12)) / 2 + 0.5))

    def expected(folder: Path, **values: Any) -> str:
        pipeline = far.load(folder)
        images = pipeline.draw([0, 1, 2] * 2, range(3, 9), pipeline.sampling_config(**values, **options))
        return f"{frechet_distance(FeatureStatistics.of(network(images)), reference):.1f}"

    two, four = (expected(folders[0], ar_steps=steps, order="halton") for steps in (2, 4))
    assert rows[1:] == [
        [str(folders[0]), "halton", two, four],
        [str(folders[1]), "raster", "", expected(folders[1], ar_steps=4)],
    ]
    assert two != four, "both have the same images"


def test_count_below_the_number_of_classes_is_refused(
    causal_diffusion_folder: Path, image_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["ar_steps", str(causal_diffusion_folder), "--count", "2", "--data", str(image_set)]
    monkeypatch.setattr("sys.argv", given)
    with refused("count 2", "3 classes"):
        ar_steps.main()
