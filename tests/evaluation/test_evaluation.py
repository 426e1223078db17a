"""From images to figures: parts, caching, statistics files, warnings, and generation that can be interrupted and shared."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.classifier import LinearClassifier
from far.errors import InputError
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


class MeanColors:
    """A small real extractor: the mean of each color in each quarter, and of its square."""

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
    """Each image depends on its number only."""
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


def test_features_are_those_of_eight_bits(tmp_path: Path) -> None:
    """So a model's images score the same directly and from a file."""
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
    # Growing the count keeps the whole parts; the last one was cut short and is made anew.
    network.seen = 0
    extract_parts(tmp_path, 420, random_images, network)
    assert network.seen == 420 - 3 * PART
    assert torch.equal(read_parts(tmp_path, 420)[:350], whole)


def test_processes_share_the_parts(tmp_path: Path) -> None:
    single, networks = MeanColors(), [MeanColors() for _ in range(3)]
    extract_parts(tmp_path / "single", 530, random_images, single)
    for rank, network in enumerate(networks):
        extract_parts(tmp_path / "shared", 530, random_images, network, share=(rank, 3))
    assert torch.equal(read_parts(tmp_path / "shared", 530), read_parts(tmp_path / "single", 530))
    assert sum(network.seen for network in networks) == 530
    assert min(network.seen for network in networks) >= PART


def test_an_interruption_loses_one_part_at_most(tmp_path: Path) -> None:
    def failing(rows: range, step: object) -> Tensor:
        if rows.start >= 2 * PART:
            raise KeyboardInterrupt
        return random_images(rows)

    with pytest.raises(KeyboardInterrupt):
        extract_parts(tmp_path, 400, failing, MeanColors())
    assert len(list(tmp_path.iterdir())) == 2


def test_nan_features_name_the_image(tmp_path: Path) -> None:
    class Broken(MeanColors):
        def __call__(self, images: Tensor) -> Tensor:
            features = super().__call__(images)
            features[37 % len(features), 2] = float("nan")
            return features

    with pytest.raises(InputError, match="image 37 gives features that are not finite"):
        extract_parts(tmp_path, 60, random_images, Broken())
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    extract_parts(tmp_path, 50, random_images, MeanColors())
    path = part_path(tmp_path, range(50))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"part-00000000-50\.safetensors is missing or damaged"):
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
    assert other.seen == 12, "another network's features were taken"
    retrained = MeanColors()
    retrained.digest = "2" * 64
    open_reference(image_set, retrained, tmp_path)
    assert retrained.seen == 12, "the features of other weights were taken"


def test_a_statistics_file_equals_its_images(tmp_path: Path, image_set: Path) -> None:
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
    with pytest.raises(
        InputError, match=r"statistics\.npz holds statistics of mean colors, not of Inception-v3"
    ):
        open_reference(tmp_path / "statistics.npz", NamedInception(), tmp_path)
    retrained = MeanColors()
    retrained.digest = "2" * 64
    with pytest.raises(
        InputError, match=r"statistics\.npz holds statistics of mean colors with other weights"
    ):
        open_reference(tmp_path / "statistics.npz", retrained, tmp_path)


def test_statistics_are_written_whole_under_any_name(tmp_path: Path) -> None:
    write_statistics(tmp_path / "STATISTICS.NPZ", MeanColors(), torch.rand(30, 24))
    assert [path.name for path in tmp_path.iterdir()] == ["STATISTICS.NPZ"]
    assert open_reference(tmp_path / "STATISTICS.NPZ", MeanColors(), tmp_path).count == 30


def test_adms_statistics_are_inceptions(tmp_path: Path) -> None:
    """They name no network and hold no features: a distance, but no KID."""
    features = torch.rand(60, 24, dtype=torch.float64)
    np.savez(tmp_path / "adm.npz", mu=features.mean(dim=0).numpy(), sigma=features.T.cov().numpy())
    with pytest.raises(InputError, match="statistics of Inception-v3"):
        open_reference(tmp_path / "adm.npz", MeanColors(), tmp_path)
    reference = open_reference(tmp_path / "adm.npz", NamedInception(), tmp_path)
    assert reference.features is None
    assert reference.count is None, "a count was made up"
    found = report(torch.rand(40, 24), reference, NamedInception())
    assert set(found.figures) == {"FID", "floor of FID", "IS"}
    assert found.controls == {}
    assert any("adm.npz" in warning and "coverage" in warning for warning in found.warnings)


def test_adms_reference_batch_gives_statistics_and_features(tmp_path: Path) -> None:
    """Its mu and sigma come from more images than it holds; the distance is taken to those."""
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
def test_names_of_networks_that_are_none(name: str, value: np.ndarray, tmp_path: Path) -> None:
    write_statistics(tmp_path / "a.npz", MeanColors(), torch.rand(30, 24))
    with np.load(tmp_path / "a.npz") as arrays:
        np.savez(tmp_path / "b.npz", **{**arrays, name: value})
    with pytest.raises(InputError, match=r"b\.npz: the name of its network is damaged"):
        open_reference(tmp_path / "b.npz", MeanColors(), tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(24)}, "neither images"),
        ({"mu": np.zeros(23), "sigma": np.eye(23)}, "do not fit 24 features"),
        ({"mu": np.full(24, np.nan), "sigma": np.eye(24)}, "mu holds values that are not finite"),
        ({"mu": np.zeros(24), "sigma": np.full((24, 24), np.inf)}, "sigma holds values that are not finite"),
        ({"mu": np.full(24, "0.5"), "sigma": np.eye(24)}, "mu holds values that are not finite"),
        ({"mu": np.zeros(24), "sigma": np.triu(np.ones((24, 24)))}, "sigma is not symmetric"),
        ({"mu": np.zeros(24), "sigma": -np.eye(24)}, "sigma has the negative eigenvalue -1"),
        ({"mu": np.zeros(24), "sigma": np.eye(24), "count": np.array([5, 6])}, r"count is \[5, 6\]"),
        ({"mu": np.zeros(24), "sigma": np.eye(24), "count": np.array("many")}, "count is 'many'"),
        ({"mu": np.zeros(24), "sigma": np.eye(24), "count": np.array(1)}, "count is 1"),
        (
            {"mu": np.zeros(24), "sigma": np.eye(24), "features": np.zeros((50, 7))},
            r"features \[50, 7\] are not",
        ),
        (
            {"mu": np.zeros(24), "sigma": np.eye(24), "count": np.array(9), "features": np.zeros((8, 24))},
            r"features \[8, 24\] are not \[9, 24\]",
        ),
        (
            {"mu": np.zeros(24), "sigma": np.eye(24), "features": np.full((9, 24), np.nan)},
            "features hold values that are not finite",
        ),
        (
            {"mu": np.zeros(24), "sigma": np.eye(24), "features": np.zeros((9, 24), int)},
            "features hold values that are not finite",
        ),
    ],
)
def test_bad_statistics(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        open_reference(tmp_path / "bad.npz", NamedInception(), tmp_path)


def reference_of(features: Tensor) -> Reference:
    return Reference("real", "0", FeatureStatistics.of(features), features, len(features), None)


def normal(count: int, seed: int, dimensions: int = 24) -> Tensor:
    """Features far away from those of flat colors."""
    return 10 + torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


def test_figures_are_the_metrics() -> None:
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
    assert report(fake, reference_of(real), MeanColors()) == found, "one seed, other figures"


def test_spreads_are_reported_only_if_there_are_images_enough() -> None:
    few, many = (
        report(normal(count, 0, 3), reference_of(normal(2000, 1, 3)), ThreeFeatures()).figures
        for count in (1999, 10_000)
    )
    assert not any("error" in name or "std" in name for name in few)
    score = inception_score(normal(10_000, 0, 3), torch.Generator().manual_seed(0), splits=10)
    assert (many["IS (three)"], many["IS std over splits (three)"]) == (score.value, score.error)
    assert many["KID standard error (three)"] > 0


class ThreeFeatures(MeanColors):
    """The mean of each color."""

    name = "three"
    dimensions = 3

    def __call__(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))

    def logits(self, features: Tensor) -> Tensor:
        return features


def test_figures_that_flat_colors_reach_are_warned_of() -> None:
    """This network sees nothing but the mean color, so flat colors are as good as real images."""
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


def test_controls_do_not_depend_on_the_images_compared() -> None:
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


def test_floor_without_features_is_that_of_the_statistics() -> None:
    real = FeatureStatistics.of(normal(20_000, 0))
    found = report(normal(300, 1), Reference("real", "0", real, None, None, None), MeanColors())
    assert found.figures["floor of FD (mean colors)"] == pytest.approx(
        found.figures["FD (mean colors)"], rel=0.25
    )


def test_few_images_are_warned_of_with_their_bias() -> None:
    found = report(normal(12, 1), reference_of(normal(3000, 0)), MeanColors())
    assert len(found.warnings) == 1
    assert "12 images" in found.warnings[0]
    # Both are real: all of the distance is bias.
    assert found.figures["floor of FD (mean colors)"] == pytest.approx(
        found.figures["FD (mean colors)"], rel=0.3
    )


def test_no_more_than_the_whole_distance_is_called_bias() -> None:
    found = report(normal(12, 1), reference_of(normal(12, 1)), MeanColors())
    floor, distance = found.figures["floor of FD (mean colors)"], found.figures["FD (mean colors)"]
    assert floor > distance + 1  # the same images on both sides
    assert len(found.warnings) == 2  # few images, and a small reference
    assert all(f"{distance:.1f} is bias" in warning for warning in found.warnings)


def test_a_small_reference_is_warned_of_with_its_bias() -> None:
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
        with pytest.raises(InputError, match=f"got {count} and {reference_count}"):
            report(torch.rand(count, 24), reference_of(torch.rand(reference_count, 24)), MeanColors())
    assert (
        report(torch.rand(4, 24), reference_of(torch.rand(6, 24)), MeanColors()).figures["FD (mean colors)"]
        > 0
    )
    statistics_only = Reference("real", "0", FeatureStatistics.of(torch.rand(40, 24)), None, 40, None)
    with pytest.raises(InputError, match="got 1"):
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
    with pytest.raises(InputError, match="leaves some of the 3 classes empty"):
        extract_generated(tmp_path / "c", 2, pipeline, generation, network, batch_size=9)


def test_every_change_has_parts_of_its_own(tmp_path: Path, pipeline_folder: Path) -> None:
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
