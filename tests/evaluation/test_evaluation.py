"""From images to figures: parts, caching, statistics files, warnings, resumable and shared generation."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.classifier import LinearClassifier
from far.evaluation.extraction import PART, extract_parts, part_path, part_ranges, read_parts
from far.evaluation.features import FID_NETWORK
from far.evaluation.generated import Generation, extract_generated, parts_folder
from far.evaluation.images import open_images
from far.evaluation.metrics import (
    FeatureStatistics,
    Neighborhoods,
    frechet_distance,
    inception_score,
    kernel_distance,
)
from far.evaluation.references import Reference, features_of, open_reference, write_statistics
from far.evaluation.report import report
from far.pipeline import Pipeline
from far.sampling import SamplingConfig
from tests.refusals import refused


class MeanColors:
    """Small extractor: the mean of each color and of its square in each quarter of an image."""

    name = "mean colors"
    digest = "1" * 64
    dimensions = 24

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        pooled = torch.nn.functional.adaptive_avg_pool2d(torch.cat([images, images.square()], dim=1), 2)
        return pooled.flatten(1)

    def logits(self, features: Tensor) -> Tensor:
        return 10 * features[:, :3]


class NamedInception(MeanColors):
    name = FID_NETWORK


def random_images(rows: range, step: object = None, seed: int = 0) -> Tensor:
    """Return images that depend on their numbers only."""
    return torch.stack(
        [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(seed * 100_000 + row)) for row in rows]
    )


def test_parts_are_the_features_in_order(tmp_path: Path) -> None:
    network = MeanColors()
    extract_parts(tmp_path, 250, random_images, network, keep_images=True)
    assert [len(rows) for rows in part_ranges(250)] == [PART, PART, 250 - 2 * PART]
    images = (random_images(range(250)) * 255).round()
    torch.testing.assert_close(read_parts(tmp_path, 250), network(images / 255))
    assert torch.equal(read_parts(tmp_path, 250, "images"), images.to(torch.uint8).permute(0, 2, 3, 1))


def test_features_are_computed_from_eight_bits(tmp_path: Path) -> None:
    """A model's images get the same figures directly and from a file."""
    network = MeanColors()
    extract_parts(tmp_path / "exact", 5, random_images, network, keep_images=True)
    images = read_parts(tmp_path / "exact", 5, "images").numpy()
    np.savez(tmp_path / "saved.npz", arr_0=images)
    saved = features_of(open_images(tmp_path / "saved.npz"), network, tmp_path / "cache")
    assert torch.equal(saved, read_parts(tmp_path / "exact", 5))


def test_only_missing_parts_are_computed(tmp_path: Path) -> None:
    network = MeanColors()
    extract_parts(tmp_path, 350, random_images, network)
    whole = read_parts(tmp_path, 350)
    part_path(tmp_path, part_ranges(350)[1]).unlink()
    network.seen = 0
    extract_parts(tmp_path, 350, random_images, network)
    assert network.seen == PART
    assert torch.equal(read_parts(tmp_path, 350), whole)
    # A larger count keeps the full parts. The last part was shorter and is computed again.
    network.seen = 0
    extract_parts(tmp_path, 420, random_images, network)
    assert network.seen == 420 - 3 * PART
    assert torch.equal(read_parts(tmp_path, 420)[:350], whole)


def test_several_processes_share_the_parts(tmp_path: Path) -> None:
    single, networks = MeanColors(), [MeanColors() for _ in range(3)]
    extract_parts(tmp_path / "single", 530, random_images, single)
    for rank, network in enumerate(networks):
        extract_parts(tmp_path / "shared", 530, random_images, network, share=(rank, 3))
    assert torch.equal(read_parts(tmp_path / "shared", 530), read_parts(tmp_path / "single", 530))
    assert sum(network.seen for network in networks) == 530
    assert min(network.seen for network in networks) >= PART


def test_interruption_loses_one_part_at_most(tmp_path: Path) -> None:
    def failing(rows: range, step: object) -> Tensor:
        if rows.start >= 2 * PART:
            raise KeyboardInterrupt
        return random_images(rows)

    with pytest.raises(KeyboardInterrupt):
        extract_parts(tmp_path, 400, failing, MeanColors())
    assert len(list(tmp_path.iterdir())) == 2


def test_error_for_nan_features_names_the_image(tmp_path: Path) -> None:
    class Broken(MeanColors):
        def __call__(self, images: Tensor) -> Tensor:
            features = super().__call__(images)
            features[37 % len(features), 2] = float("nan")
            return features

    with refused("image 37"):
        extract_parts(tmp_path, 60, random_images, Broken())
    assert list(tmp_path.iterdir()) == []


def test_error_for_a_damaged_part_names_the_file(tmp_path: Path) -> None:
    extract_parts(tmp_path, 50, random_images, MeanColors())
    path = part_path(tmp_path, range(50))
    path.write_bytes(path.read_bytes()[:100])
    with refused(path.name):
        read_parts(tmp_path, 50)


def test_reference_features_are_computed_once(tmp_path: Path, image_set: Path) -> None:
    network = MeanColors()
    first = open_reference(image_set, network, tmp_path)
    assert network.seen == 12
    second = open_reference(image_set, network, tmp_path)
    assert network.seen == 12
    assert first.features is not None
    assert torch.equal(first.features, second.features)
    other = NamedInception()
    open_reference(image_set, other, tmp_path)
    assert other.seen == 12, "features of another network were used"
    retrained = MeanColors()
    retrained.digest = "2" * 64
    open_reference(image_set, retrained, tmp_path)
    assert retrained.seen == 12, "features of other weights were used"


def test_statistics_file_gives_the_features_of_its_images(tmp_path: Path, image_set: Path) -> None:
    network = MeanColors()
    direct = open_reference(image_set, network, tmp_path / "cache")
    assert direct.features is not None
    write_statistics(tmp_path / "statistics.npz", network, direct.features)
    network.seen = 0
    read = open_reference(tmp_path / "statistics.npz", network, tmp_path / "cache")
    assert network.seen == 0
    assert read.statistics.count == read.count == 12
    assert read.features is not None
    assert torch.equal(read.features, direct.features)
    assert frechet_distance(read.statistics, direct.statistics) == pytest.approx(0, abs=1e-9)


def test_statistics_of_another_network_are_refused(tmp_path: Path) -> None:
    write_statistics(tmp_path / "statistics.npz", MeanColors(), torch.rand(30, 24))
    with refused("statistics.npz", "mean colors", FID_NETWORK):
        open_reference(tmp_path / "statistics.npz", NamedInception(), tmp_path)
    retrained = MeanColors()
    retrained.digest = "2" * 64
    with refused("statistics.npz", "mean colors"):
        open_reference(tmp_path / "statistics.npz", retrained, tmp_path)


def test_statistics_are_written_under_any_file_name(tmp_path: Path) -> None:
    write_statistics(tmp_path / "STATISTICS.NPZ", MeanColors(), torch.rand(30, 24))
    assert [path.name for path in tmp_path.iterdir()] == ["STATISTICS.NPZ"]
    assert open_reference(tmp_path / "STATISTICS.NPZ", MeanColors(), tmp_path).count == 30


def test_adms_statistics_belong_to_inception(tmp_path: Path) -> None:
    """ADM's files have no network name and no features, so there is a distance but no KID."""
    features = torch.rand(60, 24, dtype=torch.float64)
    np.savez(tmp_path / "adm.npz", mu=features.mean(dim=0).numpy(), sigma=features.T.cov().numpy())
    with refused("adm.npz", FID_NETWORK):
        open_reference(tmp_path / "adm.npz", MeanColors(), tmp_path)
    reference = open_reference(tmp_path / "adm.npz", NamedInception(), tmp_path)
    assert reference.features is None
    assert reference.count is None, "the file has no count"
    found = report(torch.rand(40, 24), reference, NamedInception())
    assert set(found.figures) == {"FID", "floor of FID", "IS"}
    assert found.controls == {}
    assert any("adm.npz" in warning and "coverage" in warning for warning in found.warnings)


def test_adms_reference_batch_gives_statistics_and_features(tmp_path: Path) -> None:
    """The file's mu and sigma come from more images than it has, and the distance uses them."""
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "batch.npz", arr_0=images, mu=np.full(24, 0.25), sigma=np.eye(24))
    reference = open_reference(tmp_path / "batch.npz", NamedInception(), tmp_path)
    assert reference.features is not None
    assert reference.features.shape == (9, 24)
    np.testing.assert_allclose(reference.statistics.mean, np.full(24, 0.25))
    other = open_reference(tmp_path / "batch.npz", MeanColors(), tmp_path)
    assert other.statistics.count == 9


@pytest.mark.parametrize("name", ["extractor", "extractor_digest"])
@pytest.mark.parametrize(
    "value",
    [
        np.array("a\nb"),
        np.array(["a", "b"]),
        np.array(3),
        np.array([2**21], "<u4").view("<U1")[0:1].reshape(()),
    ],
)
def test_invalid_network_names_are_refused(name: str, value: np.ndarray, tmp_path: Path) -> None:
    write_statistics(tmp_path / "a.npz", MeanColors(), torch.rand(30, 24))
    with np.load(tmp_path / "a.npz") as arrays:
        np.savez(tmp_path / "b.npz", **{**arrays, name: value})
    with refused("b.npz"):
        open_reference(tmp_path / "b.npz", MeanColors(), tmp_path)


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"mu": np.zeros(24)}, "sigma"),
        ({"mu": np.zeros(23), "sigma": np.eye(23)}, "mu [23]"),
        ({"mu": np.full(24, np.nan), "sigma": np.eye(24)}, "mu"),
        ({"mu": np.zeros(24), "sigma": np.full((24, 24), np.inf)}, "sigma"),
        ({"mu": np.full(24, "0.5"), "sigma": np.eye(24)}, "mu"),
        ({"mu": np.zeros(24), "sigma": np.triu(np.ones((24, 24)))}, "sigma"),
        ({"mu": np.zeros(24), "sigma": -np.eye(24)}, "-1"),
        ({"mu": np.zeros(24), "sigma": np.eye(24), "count": np.array([5, 6])}, "[5, 6]"),
        ({"mu": np.zeros(24), "sigma": np.eye(24), "count": np.array("many")}, "'many'"),
        ({"mu": np.zeros(24), "sigma": np.eye(24), "count": np.array(1)}, "count"),
        ({"mu": np.zeros(24), "sigma": np.eye(24), "features": np.zeros((50, 7))}, "[50, 7]"),
        (
            {"mu": np.zeros(24), "sigma": np.eye(24), "count": np.array(9), "features": np.zeros((8, 24))},
            "[8, 24]",
        ),
        ({"mu": np.zeros(24), "sigma": np.eye(24), "features": np.full((9, 24), np.nan)}, "features"),
        ({"mu": np.zeros(24), "sigma": np.eye(24), "features": np.zeros((9, 24), int)}, "features"),
    ],
)
def test_invalid_statistics_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], named: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)  # type: ignore[arg-type]
    with refused("bad.npz", named):
        open_reference(tmp_path / "bad.npz", NamedInception(), tmp_path)


def reference_of(features: Tensor) -> Reference:
    return Reference("real", "0", FeatureStatistics.of(features), features, len(features), None)


def normal(count: int, seed: int, dimensions: int = 24) -> Tensor:
    """Return normal features far away from those of flat colors."""
    return 10 + torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


def test_report_has_the_values_of_the_metrics() -> None:
    generator = torch.Generator().manual_seed(0)
    fake, real = (
        5 + torch.rand(120, 24, generator=generator),
        5 + torch.rand(150, 24, generator=generator) * 1.1,
    )
    found = report(fake, reference_of(real), MeanColors())
    assert found.warnings == []
    figures = found.figures
    assert figures["FD (mean colors)"] == frechet_distance(
        FeatureStatistics.of(fake), FeatureStatistics.of(real)
    )
    overlap = dataclasses.asdict(Neighborhoods(real).overlap(fake))
    assert {key: figures[f"{key} (mean colors)"] for key in overlap} == overlap
    assert figures["KID (mean colors)"] == pytest.approx(
        kernel_distance(fake, real, generator).value, abs=1e-9
    )
    score = inception_score(MeanColors().logits(fake), generator, splits=1)
    assert figures["IS (mean colors)"] == pytest.approx(score.value)
    assert score.value > 1.2
    assert "FID" not in figures
    assert "FID" in report(fake, reference_of(real), NamedInception()).figures
    assert report(fake, reference_of(real), MeanColors()) == found, "the same seed gave other figures"


def test_spreads_are_reported_only_for_enough_images() -> None:
    few, many = (
        report(normal(count, 0, 3), reference_of(normal(2000, 1, 3)), ThreeFeatures()).figures
        for count in (1999, 10_000)
    )
    assert not any("error" in name or "std" in name for name in few)
    score = inception_score(normal(10_000, 0, 3), torch.Generator().manual_seed(0), splits=10)
    assert (many["IS (three)"], many["IS std over splits (three)"]) == (score.value, score.error)
    assert many["KID standard error (three)"] > 0


class ThreeFeatures(MeanColors):
    """Extractor of the mean of each color."""

    name = "three"
    dimensions = 3

    def __call__(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))

    def logits(self, features: Tensor) -> Tensor:
        return features


def test_figures_that_flat_colors_reach_give_a_warning() -> None:
    """For a network that returns the mean color only, flat colors are as good as real images."""
    real, fake = (torch.rand(500, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    found = report(fake, reference_of(real), ThreeFeatures())
    assert found.controls["flat colors"]["precision"] > 0.9
    assert found.controls["blurred noise"]["coverage"] < 0.05
    assert len(found.warnings) == 1
    assert all(
        text in found.warnings[0]
        for text in ("500 images", "precision", "density", "coverage", "flat colors")
    )
    far_off = report(fake + 5, reference_of(real + 5), ThreeFeatures())
    assert far_off.warnings == []
    assert far_off.controls["flat colors"]["precision"] == 0


def test_controls_do_not_depend_on_the_compared_images() -> None:
    real = torch.rand(300, 3, generator=torch.Generator().manual_seed(1))
    found = [
        report(fake, reference_of(real), ThreeFeatures()).controls for fake in (real[:200], real[:150] + 3)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(("count", "reference_count"), [(200, 3000), (3000, 3000), (3000, 400)])
def test_floor_is_the_distance_of_real_images(count: int, reference_count: int) -> None:
    found = report(normal(count, 1), reference_of(normal(reference_count, 0)), MeanColors())
    assert found.warnings == []
    fresh = [
        frechet_distance(
            FeatureStatistics.of(normal(count, seed)), FeatureStatistics.of(normal(reference_count, seed + 1))
        )
        for seed in range(10, 30, 2)
    ]
    assert found.figures["floor of FD (mean colors)"] == pytest.approx(sum(fresh) / len(fresh), rel=0.25)


def test_floor_without_features_comes_from_the_statistics() -> None:
    real = FeatureStatistics.of(normal(20_000, 0))
    found = report(normal(300, 1), Reference("real", "0", real, None, None, None), MeanColors())
    assert found.figures["floor of FD (mean colors)"] == pytest.approx(
        found.figures["FD (mean colors)"], rel=0.25
    )


def test_few_images_give_a_warning_with_their_bias() -> None:
    found = report(normal(12, 1), reference_of(normal(3000, 0)), MeanColors())
    assert len(found.warnings) == 1
    assert "12 images" in found.warnings[0]
    # Both sides are real, so the whole distance is bias.
    assert found.figures["floor of FD (mean colors)"] == pytest.approx(
        found.figures["FD (mean colors)"], rel=0.3
    )


def test_reported_bias_is_at_most_the_whole_distance() -> None:
    found = report(normal(12, 1), reference_of(normal(12, 1)), MeanColors())
    floor, distance = found.figures["floor of FD (mean colors)"], found.figures["FD (mean colors)"]
    assert floor > distance + 1  # the same images on both sides
    assert len(found.warnings) == 2  # few images, and a small reference
    assert all(warning.count(f"{distance:.1f}") == 2 for warning in found.warnings)  # all of it is bias


def test_small_reference_gives_a_warning_with_its_bias() -> None:
    real, fake = normal(12, 0), normal(3000, 1)
    found = report(fake, reference_of(real), MeanColors())
    assert len(found.warnings) == 1
    assert "reference's 12 images" in found.warnings[0]
    assert found.figures["bias of FD (mean colors) by the reference"] == pytest.approx(
        found.figures["FD (mean colors)"], rel=0.3
    )
    assert len(report(fake[:10], reference_of(real), MeanColors()).warnings) == 2


def test_too_few_images_on_a_side_are_refused() -> None:
    for count, reference_count in ((3, 40), (40, 5)):
        with refused(count, reference_count):
            report(torch.rand(count, 24), reference_of(torch.rand(reference_count, 24)), MeanColors())
    assert (
        report(torch.rand(4, 24), reference_of(torch.rand(6, 24)), MeanColors()).figures["FD (mean colors)"]
        > 0
    )
    statistics_only = Reference("real", "0", FeatureStatistics.of(torch.rand(40, 24)), None, 40, None)
    with refused("got 1"):
        report(torch.rand(1, 24), statistics_only, MeanColors())


def test_generated_features_do_not_depend_on_batches_or_processes(
    tmp_path: Path, pipeline_folder: Path
) -> None:
    pipeline = Pipeline.from_pretrained(pipeline_folder)
    network = MeanColors()
    generation = Generation(str(pipeline_folder), SamplingConfig(ar_steps=2, head_steps=1), 7, "float32")
    extract_generated(tmp_path / "a", 130, pipeline, generation, network, batch_size=64)
    for rank in (0, 1):
        extract_generated(tmp_path / "b", 130, pipeline, generation, network, batch_size=9, share=(rank, 2))
    torch.testing.assert_close(
        read_parts(tmp_path / "a", 130), read_parts(tmp_path / "b", 130), atol=2e-3, rtol=0
    )
    expected = pipeline.draw([2, 0, 1], [7 + 128, 7 + 129, 7 + 127], generation.sampling)[[2, 0, 1]]
    torch.testing.assert_close(
        read_parts(tmp_path / "a", 130)[127:], network((expected * 255).round() / 255), atol=2e-3, rtol=0
    )
    with refused("count 2", 3):
        extract_generated(tmp_path / "c", 2, pipeline, generation, network, batch_size=9)


def test_every_changed_setting_has_its_own_folder_of_parts(tmp_path: Path, pipeline_folder: Path) -> None:
    network = MeanColors()
    base = Generation(str(pipeline_folder), SamplingConfig(), 0, "float32")
    others = [
        Generation(str(pipeline_folder), SamplingConfig(guidance=2.0), 0, "float32"),
        Generation(str(pipeline_folder), SamplingConfig(), 1, "float32"),
        Generation(str(pipeline_folder), SamplingConfig(), 0, "bfloat16"),
    ]
    folders = {parts_folder(tmp_path, generation, network) for generation in (base, *others)}
    folders |= {
        parts_folder(tmp_path, base, NamedInception()),
        parts_folder(tmp_path, base, network, keep_images=True),
    }
    assert len(folders) == 6
    assert parts_folder(tmp_path, base, network) in folders


def test_linear_classifier_separates_separable_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = 3 * torch.randn(4, 10, generator=generator)
    labels = torch.arange(400) % 4
    features = centers[labels] + torch.randn(400, 10, generator=generator)
    classifier = LinearClassifier(features[:300], labels[:300])
    assert classifier.accuracy(features[300:], labels[300:]) > 0.95
    assert classifier.accuracy(features[300:], (labels[300:] + 1) % 4) < 0.05
    shuffled = labels[torch.randperm(400, generator=generator)]
    assert LinearClassifier(features[:300], shuffled[:300]).accuracy(features[300:], shuffled[300:]) < 0.5
