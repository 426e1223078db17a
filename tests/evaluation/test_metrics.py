"""Distances between feature sets against closed forms and SciPy."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from far.evaluation.metrics import FeatureStatistics, frechet_distance, psnr


def gather(features: Tensor, *, chunk: int = 7) -> FeatureStatistics:
    statistics = FeatureStatistics.empty(features.shape[1])
    for part in features.split(chunk):
        statistics.add(part)
    return statistics


def features(count: int, dimensions: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Correlated normal rows of different deviations."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    return scale * torch.randn(count, dimensions, generator=generator, dtype=torch.float64) @ mixing + shift


def scipy_distance(a: Tensor, b: Tensor) -> float:
    """The formula as usually written, with the matrix square root of the product of the covariances."""
    (mean_a, cov_a), (mean_b, cov_b) = ((x.numpy().mean(axis=0), np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * np.real(root)))


def test_statistics_do_not_depend_on_the_batches() -> None:
    x = features(50, 6, 0, shift=3.0)
    for chunk in (1, 7, 50):
        statistics = gather(x, chunk=chunk)
        assert statistics.count == 50
        np.testing.assert_allclose(statistics.mean, x.numpy().mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(statistics.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-9, atol=1e-9)
    single = gather(x.float())
    assert single.mean.dtype == torch.float64


@pytest.mark.parametrize(("dimensions", "scale", "shift"), [(1, 2.0, 0.0), (8, 1.0, 0.5), (32, 3.0, -1.0)])
def test_against_scipy(dimensions: int, scale: float, shift: float) -> None:
    a, b = features(300, dimensions, 0), features(400, dimensions, 1, scale, shift)
    assert frechet_distance(gather(a), gather(b)) == pytest.approx(
        scipy_distance(a, b) if dimensions > 1 else float((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2), rel=1e-6
    )


def test_closed_form_of_commuting_covariances() -> None:
    """For diagonal covariances: the squared differences of means and of deviations, summed up."""

    def exact(mean: list[float], deviation: list[float]) -> FeatureStatistics:
        count = 10
        mu, covariance = torch.tensor(mean, dtype=torch.float64), torch.tensor(deviation, dtype=torch.float64).square().diag()
        return FeatureStatistics(count, count * mu, (count - 1) * covariance + count * torch.outer(mu, mu))

    a, b = exact([0.0, 1.0, 2.0], [1.0, 2.0, 0.0]), exact([3.0, 1.0, 0.0], [4.0, 0.5, 2.0])
    assert frechet_distance(a, b) == pytest.approx(9 + 0 + 4 + 9 + 2.25 + 4)
    assert frechet_distance(b, a) == pytest.approx(28.25)


def test_equal_sets_and_pure_shift() -> None:
    x = features(100, 8, 0)
    assert frechet_distance(gather(x), gather(x)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(gather(x), gather(x + 2)) == pytest.approx(8 * 4, rel=1e-9)
    assert frechet_distance(gather(x), gather(x * 3)) == pytest.approx(
        float(4 * x.mean(dim=0).square().sum() + 4 * x.var(dim=0).sum()), rel=1e-9
    )


def test_fewer_images_than_dimensions() -> None:
    """Rank-deficient covariances: SciPy's root is inexact there, but in the space of the rows it is not."""
    a, b = features(10, 40, 0), features(12, 40, 1)
    basis = torch.linalg.qr(torch.cat([a, b]).T).Q
    reduced = frechet_distance(gather(a @ basis), gather(b @ basis))
    assert frechet_distance(gather(a), gather(b)) == pytest.approx(reduced, rel=1e-6)
    assert frechet_distance(gather(a), gather(a)) == pytest.approx(0, abs=1e-6)
    assert math.isfinite(frechet_distance(gather(a[:2]), gather(b[:2])))


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="two images a side, got 1 and 5"):
        frechet_distance(gather(features(1, 3, 0)), gather(features(5, 3, 0)))
    with pytest.raises(ValueError, match="features of 3 and 4 dimensions"):
        frechet_distance(gather(features(5, 3, 0)), gather(features(5, 4, 0)))


def test_psnr() -> None:
    reference = torch.full((3, 3, 4, 4), 0.5)
    images = reference.clone()
    images[0] += 0.1
    images[1, :, :2] += 0.1
    assert psnr(images, reference).tolist() == pytest.approx([20.0, 20 + 10 * math.log10(2), 120.0], abs=1e-3)
