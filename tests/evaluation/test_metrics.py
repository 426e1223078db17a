"""Distances between feature sets, compared with closed forms, SciPy and torchmetrics."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from torch import Tensor

from far.evaluation.metrics import (
    FeatureStatistics,
    Neighborhoods,
    frechet_bias,
    frechet_distance,
    frechet_floor,
    inception_score,
    kernel_distance,
    psnr,
    squared_mmd,
)  # fmt: skip
from tests.refusals import refused


def gather(features: Tensor, *, chunk: int = 7) -> FeatureStatistics:
    statistics = FeatureStatistics.empty(features.shape[1])
    for part in features.split(chunk):
        statistics.add(part)
    return statistics


def features(count: int, dimensions: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Return correlated normal rows of different standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    return scale * torch.randn(count, dimensions, generator=generator, dtype=torch.float64) @ mixing + shift


def scipy_distance(a: Tensor, b: Tensor) -> float:
    """Return the usual formula, with the matrix square root of the product of the covariances."""
    (mean_a, cov_a), (mean_b, cov_b) = (
        (x.numpy().mean(axis=0), np.cov(x.numpy(), rowvar=False)) for x in (a, b)
    )
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * np.real(root)))


def test_statistics_do_not_depend_on_the_batches() -> None:
    x = features(50, 6, 0, shift=3.0)
    for chunk in (1, 7, 50):
        statistics = gather(x, chunk=chunk)
        assert statistics.count == 50
        np.testing.assert_allclose(statistics.mean, x.numpy().mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(
            statistics.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-9, atol=1e-9
        )
    single = gather(x.float())
    assert single.mean.dtype == torch.float64


@pytest.mark.parametrize(("dimensions", "scale", "shift"), [(1, 2.0, 0.0), (8, 1.0, 0.5), (32, 3.0, -1.0)])
def test_frechet_distance_equals_scipy(dimensions: int, scale: float, shift: float) -> None:
    a, b = features(300, dimensions, 0), features(400, dimensions, 1, scale, shift)
    assert frechet_distance(gather(a), gather(b)) == pytest.approx(
        scipy_distance(a, b)
        if dimensions > 1
        else float((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2),
        rel=1e-6,
    )


def test_frechet_distance_of_commuting_covariances_has_the_closed_form() -> None:
    """For diagonal covariances: the sum of squared differences of means and of standard deviations."""

    def exact(mean: list[float], deviation: list[float]) -> FeatureStatistics:
        count = 10
        mu, covariance = (
            torch.tensor(mean, dtype=torch.float64),
            torch.tensor(deviation, dtype=torch.float64).square().diag(),
        )
        return FeatureStatistics(count, count * mu, (count - 1) * covariance + count * torch.outer(mu, mu))

    a, b = exact([0.0, 1.0, 2.0], [1.0, 2.0, 0.0]), exact([3.0, 1.0, 0.0], [4.0, 0.5, 2.0])
    assert frechet_distance(a, b) == pytest.approx(9 + 0 + 4 + 9 + 2.25 + 4)
    assert frechet_distance(b, a) == pytest.approx(28.25)


def test_frechet_distance_of_equal_shifted_and_scaled_sets() -> None:
    x = features(100, 8, 0)
    assert frechet_distance(gather(x), gather(x)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(gather(x), gather(x + 2)) == pytest.approx(8 * 4, rel=1e-9)
    assert frechet_distance(gather(x), gather(x * 3)) == pytest.approx(
        float(4 * x.mean(dim=0).square().sum() + 4 * x.var(dim=0).sum()), rel=1e-9
    )


def test_frechet_distance_with_fewer_images_than_dimensions() -> None:
    """SciPy's root of rank-deficient covariances is inexact, but exact in the space of the rows."""
    a, b = features(10, 40, 0), features(12, 40, 1)
    basis = torch.linalg.qr(torch.cat([a, b]).T).Q
    reduced = frechet_distance(gather(a @ basis), gather(b @ basis))
    assert frechet_distance(gather(a), gather(b)) == pytest.approx(reduced, rel=1e-6)
    assert frechet_distance(gather(a), gather(a)) == pytest.approx(0, abs=1e-6)
    assert math.isfinite(frechet_distance(gather(a[:2]), gather(b[:2])))


def test_too_few_rows_and_other_dimensions_are_refused() -> None:
    with refused("1 and 5", error=ValueError):
        frechet_distance(gather(features(1, 3, 0)), gather(features(5, 3, 0)))
    with refused("3 and 4", error=ValueError):
        frechet_distance(gather(features(5, 3, 0)), gather(features(5, 4, 0)))


def test_psnr_has_the_closed_form() -> None:
    reference = torch.full((3, 3, 4, 4), 0.5)
    images = reference.clone()
    images[0] += 0.1
    images[1, :, :2] += 0.1
    assert psnr(images, reference).tolist() == pytest.approx([20.0, 20 + 10 * math.log10(2), 120.0], abs=1e-3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Identity(torch.nn.Module):
    """Network for torchmetrics whose features are its input."""

    num_features = 12

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_frechet_distance_equals_torchmetrics() -> None:
    from torchmetrics.image.fid import _compute_fid

    a, b = features(300, 12, 0), features(200, 12, 1, 2.0, 0.5)
    expected = _compute_fid(a.mean(dim=0), a.T.cov(), b.mean(dim=0), b.T.cov())
    assert frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b)) == pytest.approx(
        float(expected), rel=1e-6
    )


def test_computed_and_given_statistics_agree() -> None:
    a = features(600, 5, 0, shift=2.0)
    statistics = FeatureStatistics.of(a)
    assert statistics.count == 600
    np.testing.assert_allclose(statistics.covariance, np.cov(a.numpy(), rowvar=False), rtol=1e-9)
    known = FeatureStatistics.known(600, a.mean(dim=0), a.T.cov())
    np.testing.assert_allclose(known.mean, statistics.mean, rtol=1e-12)
    np.testing.assert_allclose(known.covariance, statistics.covariance, rtol=1e-9)


def test_bias_is_the_distance_of_fresh_samples() -> None:
    """Draws of a normal distribution have the predicted distance to it, which falls with their number."""
    generator = seeded(3)
    reference = FeatureStatistics.of(torch.randn(20_000, 30, generator=generator, dtype=torch.float64))
    found = [frechet_bias(reference, count, seeded()) for count in (20, 100, 1000)]
    fresh = [
        frechet_distance(
            FeatureStatistics.of(torch.randn(count, 30, generator=generator, dtype=torch.float64)), reference
        )
        for count in (20, 100, 1000)
    ]
    assert found == pytest.approx(fresh, rel=0.25)
    assert found[0] > 3 * found[1] > 9 * found[2] > 0


@pytest.mark.parametrize(("rows", "dimensions"), [(10, 40), (60, 5)])
def test_floor_is_the_scaled_distance_of_two_parts(rows: int, dimensions: int) -> None:
    real = features(rows, dimensions, 0)
    order = torch.randperm(rows, generator=seeded())
    small, rest = real[order[:4]], real[order[4:]]
    expected = (
        frechet_distance(FeatureStatistics.of(small), FeatureStatistics.of(rest))
        * (1 / 4)
        / (1 / 4 + 1 / (rows - 4))
    )
    assert frechet_floor(real, 4, math.inf, seeded()) == pytest.approx(expected, rel=1e-6)
    # For more images than half of the real ones, two halves are compared and scaled to the requested counts.
    half, other = real[order[: rows // 2]], real[order[rows // 2 :]]
    expected = (
        frechet_distance(FeatureStatistics.of(half), FeatureStatistics.of(other))
        * (1 / 500 + 1 / rows)
        / (4 / rows)
    )
    assert frechet_floor(real, 500, rows, seeded()) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_equals_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    a, b = features(80, 12, 0), features(80, 12, 1, 1.5, 0.3)
    assert squared_mmd(a, b) == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)
    assert squared_mmd(a.float(), b.float()) == pytest.approx(float(poly_mmd(a, b)), rel=1e-5)
    # A subset as large as both sets involves no randomness.
    whole = kernel_distance(a, b, seeded(), subsets=3, subset_size=500)
    assert whole.value == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)
    assert whole.error is None, "one subset does not vary"


def test_kernel_distance_is_the_mean_over_random_subsets() -> None:
    from torchmetrics.image.kid import poly_mmd

    a, b = features(60, 6, 0), features(90, 6, 1, 1.2)
    generator, expected = seeded(5), []
    for _ in range(8):
        first = a[torch.randperm(60, generator=generator)[:20]]
        second = b[torch.randperm(90, generator=generator)[:20]]
        expected.append(float(poly_mmd(first, second)))
    found = kernel_distance(a, b, seeded(5), subsets=8, subset_size=20)
    assert found.value == pytest.approx(np.mean(expected), rel=1e-9)


@pytest.mark.parametrize("count", [150, 600])
def test_error_of_a_kernel_distance_is_its_std_over_fresh_images(count: int) -> None:
    found = []
    for seed in range(120):
        a, b = torch.randn(2, count, 4, generator=seeded(seed), dtype=torch.float64)
        found.append(kernel_distance(a, b + 0.4, seeded(seed), subsets=40, subset_size=60))
    spread = np.std([estimate.value for estimate in found])
    assert np.mean([estimate.error for estimate in found]) == pytest.approx(spread, rel=0.3)


@pytest.mark.parametrize(("left", "right"), [(60, 60), (60, 500), (119, 500)])
def test_kernel_distance_of_few_images_has_no_error(left: int, right: int) -> None:
    """Subsets of almost all images of a side vary too little."""
    found = kernel_distance(features(left, 4, 0), features(right, 4, 1), seeded(), subsets=5, subset_size=60)
    assert found.error is None
    assert math.isfinite(found.value)


def test_squared_mmd_is_unbiased() -> None:
    """Equals brute force over all pairs, and has a mean of about zero for sets of one distribution."""
    a, b = features(7, 3, 0), features(5, 3, 1)

    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within = [
        np.mean([kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (a, b)
    ]
    assert squared_mmd(a, b) == pytest.approx(sum(within) - 2 * np.mean([kernel(x, y) for x in a for y in b]))
    values = [
        squared_mmd(*torch.randn(2, 20, 4, generator=seeded(seed), dtype=torch.float64))
        for seed in range(200)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(200)


def test_inception_score_against_torchmetrics() -> None:
    from torchmetrics.image.inception import InceptionScore

    logits = 2 * torch.randn(120, 12, generator=seeded())
    metric = InceptionScore(feature=Identity(), splits=1)
    metric.update(logits)
    assert inception_score(logits, seeded(), splits=1).value == pytest.approx(
        float(metric.compute()[0]), rel=1e-5
    )


def test_inception_score_of_certain_and_of_equal_predictions() -> None:
    certain = 1000 * torch.eye(5).repeat(4, 1)
    assert inception_score(certain, seeded(), splits=1).value == pytest.approx(5)
    assert inception_score(torch.ones(20, 5), seeded()).value == pytest.approx(1)
    split = inception_score(torch.randn(100, 5, generator=seeded()), seeded(), splits=4)
    assert split.error is not None
    assert split.error > 0
    assert inception_score(torch.ones(20, 5), seeded(), splits=1).error is None
    with refused("10", "9", error=ValueError):
        inception_score(torch.ones(9, 5), seeded(), splits=10)


def precision_recall(fake: Tensor, real: Tensor, *, neighbors: int = 3) -> tuple[float, float]:
    found = Neighborhoods(real, neighbors=neighbors).overlap(fake)
    return found.precision, found.recall


def density_coverage(fake: Tensor, real: Tensor, *, neighbors: int = 5) -> tuple[float, float]:
    found = Neighborhoods(real, density_neighbors=neighbors).overlap(fake)
    return found.density, found.coverage


def brute_share(rows: Tensor, others: Tensor, neighbors: int) -> float:
    reach = []
    for index, other in enumerate(others):
        distances = sorted(
            float((other - third).norm()) for position, third in enumerate(others) if position != index
        )
        reach.append(distances[neighbors - 1])
    return float(
        np.mean([any(float((row - other).norm()) <= r for other, r in zip(others, reach)) for row in rows])
    )


@pytest.mark.parametrize(("dimensions", "neighbors", "scale"), [(1, 1, 1.0), (4, 3, 0.5), (10, 5, 1.3)])
def test_precision_and_recall_equal_brute_force(dimensions: int, neighbors: int, scale: float) -> None:
    fake, real = features(40, dimensions, 0, scale), features(55, dimensions, 1, shift=0.5)
    expected = brute_share(fake, real, neighbors), brute_share(real, fake, neighbors)
    assert precision_recall(fake, real, neighbors=neighbors) == pytest.approx(expected, rel=1e-6)
    assert 0 < expected[0] < 1


def tree_share(rows: Tensor, others: Tensor, neighbors: int) -> float:
    reach = scipy.spatial.cKDTree(others).query(others, k=neighbors + 1)[0][:, -1]
    return float((scipy.spatial.distance.cdist(rows, others) <= reach).any(axis=1).mean())


def test_precision_and_recall_over_many_chunks() -> None:
    """More rows than one chunk, compared with SciPy's neighbor search."""
    fake, real = features(600, 3, 0, 0.6), features(520, 3, 1)
    expected = tree_share(fake, real, 3), tree_share(real, fake, 3)
    assert precision_recall(fake, real) == pytest.approx(expected, rel=1e-6)
    assert 0 < expected[1] < expected[0] < 1


def test_precision_and_recall_of_equal_and_of_distant_sets() -> None:
    x = features(30, 4, 0)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 1000) == (0.0, 0.0)
    with refused("got 3", error=ValueError):
        precision_recall(x[:3], x)


def test_precision_and_recall_far_from_the_origin() -> None:
    """Squares lose their digits far from the origin, unless rows are centered first."""
    fake, real = features(60, 4, 0, 0.7), features(50, 4, 1)
    assert precision_recall(fake + 1e8, real + 1e8) == precision_recall(fake, real)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_precision_and_recall_of_repeated_images(scale: float) -> None:
    """With more than k equal rows a radius is zero, and equal rows must be inside it in any chunk."""
    distinct = scale * features(90, 50, 0)
    fake, real = distinct.repeat_interleave(7, dim=0), distinct.repeat(10, 1)
    assert precision_recall(fake, real) == (1.0, 1.0)
    assert precision_recall(fake[:350], real)[1] == pytest.approx(50 / 90)
    assert precision_recall(fake, real[torch.arange(900) % 90 < 30])[0] == pytest.approx(30 / 90)


def brute_density_coverage(fake: Tensor, real: Tensor, neighbors: int) -> tuple[float, float]:
    """Compute the definitions of arXiv 2002.09797 pair by pair."""
    radii = []
    for index, row in enumerate(real):
        distances = sorted(
            float((row - other).norm()) for position, other in enumerate(real) if position != index
        )
        radii.append(distances[neighbors - 1])
    held = [[float((row - center).norm()) <= radius for center, radius in zip(real, radii)] for row in fake]
    return sum(map(sum, held)) / (neighbors * len(fake)), float(
        np.mean([any(column) for column in zip(*held)])
    )


@pytest.mark.parametrize(("dimensions", "neighbors", "scale"), [(1, 1, 1.0), (4, 3, 0.5), (10, 5, 1.3)])
def test_density_and_coverage_equal_brute_force(dimensions: int, neighbors: int, scale: float) -> None:
    fake, real = features(40, dimensions, 0, scale), features(55, dimensions, 1, shift=0.5)
    expected = brute_density_coverage(fake, real, neighbors)
    assert density_coverage(fake, real, neighbors=neighbors) == pytest.approx(expected, rel=1e-9)
    assert 0 < expected[1] < 1


def test_density_and_coverage_over_many_chunks() -> None:
    fake, real = features(600, 3, 0, 0.6), features(520, 3, 1)
    radii = scipy.spatial.cKDTree(real).query(real, k=6)[0][:, -1]
    held = scipy.spatial.distance.cdist(fake, real) <= radii
    assert density_coverage(fake, real) == pytest.approx(
        (held.sum() / (5 * 600), held.any(axis=0).mean()), rel=1e-9
    )
    assert density_coverage(fake + 1e8, real + 1e8) == pytest.approx(density_coverage(fake, real), rel=1e-9)


def test_density_and_coverage_of_real_and_of_distant_images() -> None:
    """Real images have density 1 and coverage 1 − 2⁻ᵏ for any distribution (Naeem et al., section 3.3)."""
    fake, real = torch.randn(2, 3000, 8, generator=seeded(), dtype=torch.float64)
    density, coverage = density_coverage(fake, real)
    assert density == pytest.approx(1, abs=0.05)
    assert coverage == pytest.approx(1 - 2**-5, abs=0.01)
    assert density_coverage(fake + 1000, real) == (0.0, 0.0)
    with refused("got 5", error=ValueError):
        density_coverage(fake[:30], real[:5])


def test_one_outlier_gives_precision_but_no_density() -> None:
    """The outlier's ball covers everything: images without content are in this ball and in no other."""
    real = torch.cat(
        [
            torch.randn(500, 8, generator=seeded(), dtype=torch.float64),
            torch.full((1, 8), 40.0, dtype=torch.float64),
        ]
    )
    fake = 20 + torch.randn(100, 8, generator=seeded(1), dtype=torch.float64)
    assert precision_recall(fake, real)[0] == 1
    assert density_coverage(fake, real)[0] == pytest.approx(1 / 5)


def test_frechet_and_kernel_distance_of_a_network_equal_torchmetrics() -> None:
    """Uses the complete metrics of torchmetrics with a small network, updated in batches."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Pooled(torch.nn.Module):
        num_features = 12

        def forward(self, images: Tensor) -> Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1)

    fake, real = (
        torch.rand(200, 3, 8, 8, generator=seeded(seed), dtype=torch.float64) * scale
        for seed, scale in ((0, 0.9), (1, 1.0))
    )
    distance = FrechetInceptionDistance(feature=Pooled(), input_img_size=(3, 8, 8)).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(feature=Pooled(), subsets=1, subset_size=200).set_dtype(torch.float64)
    for metric in (distance, kernel):
        for start in range(0, 200, 50):
            metric.update(real[start : start + 50], real=True)
            metric.update(fake[start : start + 50], real=False)
    a, b = (Pooled()(images) for images in (fake, real))
    assert frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b)) == pytest.approx(
        float(distance.compute()), rel=1e-6
    )
    assert kernel_distance(a, b, seeded(), subsets=1, subset_size=200).value == pytest.approx(
        float(kernel.compute()[0]), rel=1e-3
    )


def test_too_few_images_for_a_kernel_distance_are_refused() -> None:
    with refused("1 and 5", error=ValueError):
        kernel_distance(features(1, 3, 0), features(5, 3, 1), seeded())
