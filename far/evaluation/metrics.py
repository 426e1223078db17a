"""Distances between sets of features ``[n, d]``: pure functions, in float64."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from far.errors import InputError

# Rows compared at a time. 250 against 50,000 in float64 take 100 MB, and a few copies are needed.
_CHUNK = 250
# Window, its standard deviation in pixels, and constants of the structural similarity, as published.
_SSIM_WINDOW, _SSIM_DEVIATION, _SSIM_C1, _SSIM_C2 = 11, 1.5, 0.01**2, 0.03**2


@dataclass
class FeatureStatistics:
    """Count, mean ``[d]`` and covariance ``[d, d]``, accumulated batch by batch in float64."""

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def empty(cls, features: int) -> "FeatureStatistics":
        return cls(0, torch.zeros(features).double(), torch.zeros(features, features).double())

    def add(self, features: Tensor) -> None:
        """Add a batch ``[n, d]``."""
        batch = features.double()
        self.count += len(batch)
        self.total += batch.sum(dim=0)
        self.outer += batch.T @ batch

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """Return the statistics of ``features [n, d]``, converted in chunks."""
        statistics = cls.empty(features.shape[1])
        for chunk in features.split(_CHUNK):
            statistics.add(chunk)
        return statistics

    @classmethod
    def known(cls, count: int, mean: Tensor, covariance: Tensor) -> "FeatureStatistics":
        """Return statistics with a given mean ``[d]`` and unbiased covariance ``[d, d]``."""
        mean, covariance = mean.double(), covariance.double()
        return cls(count, count * mean, (count - 1) * covariance + count * torch.outer(mean, mean))

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance ``[d, d]``; needs two or more rows."""
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return ``|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½)``, also for rank-deficient covariances.

    The trace of the root is the sum of the singular values of ``F₁ᵀ F₂`` with ``Σ = F Fᵀ``.

    Raises:
        ValueError: a side has fewer than two rows, or the numbers of features differ.
        InputError: a feature is not finite.
    """
    if min(a.count, b.count) < 2:
        raise ValueError(f"a Fréchet distance needs two images per side, got {a.count} and {b.count}")
    if len(a.total) != len(b.total):
        raise ValueError(f"features of {len(a.total)} and {len(b.total)} dimensions cannot be compared")
    if not all(torch.isfinite(side.total).all() and torch.isfinite(side.covariance).all() for side in (a, b)):
        raise InputError("The features of the images are not finite. Check the model and the images")
    root_trace = torch.linalg.svdvals(_factor(a).T @ _factor(b)).sum()
    trace = a.covariance.trace() + b.covariance.trace() - 2 * root_trace
    return float((a.mean - b.mean).square().sum() + trace)


def _factor(statistics: FeatureStatistics) -> Tensor:
    """Return ``F [d, r]`` with ``F Fᵀ = covariance``, with the largest rank r that the count allows."""
    covariance = statistics.covariance
    features, rank = len(covariance), min(statistics.count - 1, len(covariance))
    basis = None
    if 4 * rank < features:
        # For few images, products with random vectors span all columns, so a small decomposition is exact.
        generator = torch.Generator().manual_seed(0)
        normal = torch.randn(features, rank, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(covariance @ normal).Q
        covariance = basis.T @ covariance @ basis
    values, vectors = torch.linalg.eigh(covariance)
    factor = vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()
    return factor if basis is None else basis @ factor


def frechet_bias(reference: FeatureStatistics, count: int, generator: torch.Generator) -> float:
    """Return the distance of ``count`` draws from the reference's normal distribution to the reference.

    A perfect model would score about this distance with ``count`` images.
    """
    values, vectors = torch.linalg.eigh(reference.covariance)
    scaled = vectors * values.clamp(min=0).sqrt()
    drawn = FeatureStatistics.empty(len(reference.total))
    for start in range(0, count, _CHUNK):
        shape = (min(_CHUNK, count - start), len(values))
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        drawn.add(reference.mean + normal @ scaled.T)
    return frechet_distance(drawn, reference)


def frechet_floor(real: Tensor, count: int, reference_count: float, generator: torch.Generator) -> float:
    """Estimate the distance of ``count`` real images to ``reference_count`` others, which is bias only.

    The rows of ``real [m, d]`` are split at random, ``count`` of them or half against the rest. The bias
    falls with 1 / count on either side, so the distance is scaled to the requested counts. With fewer images
    than features it falls more slowly, and the estimate is too low. A ``reference_count`` of ``math.inf`` is
    for exact statistics.

    Raises:
        ValueError: there are fewer than four rows.
    """
    if len(real) < real.shape[1]:
        # Only the directions of the rows matter. Project on them to save time.
        real = real.double() @ torch.linalg.qr(real.double().T).Q
    order = torch.randperm(len(real), generator=generator)
    drawn = max(2, min(count, len(real) // 2))
    sides = [FeatureStatistics.of(real[rows]) for rows in (order[:drawn], order[drawn:])]
    scale = (1 / count + 1 / reference_count) / (1 / drawn + 1 / (len(real) - drawn))
    return frechet_distance(*sides) * scale


@dataclass(frozen=True)
class Estimate:
    """A figure and its error; the error is ``None`` if there are too few images."""

    value: float
    error: float | None


def kernel_distance(
    a: Tensor, b: Tensor, generator: torch.Generator, *, subsets: int = 100, subset_size: int = 1000
) -> Estimate:
    """Return KID (Bińkowski et al., arXiv 1801.01401) of features ``a [n, d]`` and ``b [m, d]``.

    KID is the unbiased squared MMD, here the mean over random subsets of ``subset_size`` images per side, or
    of all images if they are fewer. ``error`` is the standard error of the mean, from the standard deviation
    over the subsets. It needs twice ``subset_size`` images per side, because subsets that share most of their
    images vary too little.

    Raises:
        ValueError: a side has fewer than two rows.
    """
    smaller = min(len(a), len(b))
    if smaller < 2:
        raise ValueError(f"a kernel distance needs two images per side, got {len(a)} and {len(b)}")
    if max(len(a), len(b)) <= subset_size:
        return Estimate(squared_mmd(a, b), None)
    size = min(subset_size, smaller)
    values = []
    for _ in range(subsets):
        chosen = (features[torch.randperm(len(features), generator=generator)[:size]] for features in (a, b))
        values.append(squared_mmd(*chosen))
    distances = torch.tensor(values, dtype=torch.float64)
    if smaller < 2 * subset_size:
        return Estimate(float(distances.mean()), None)
    # Subsets drawn without replacement from n images vary less than independent ones, by 1 − size / n.
    # n images are n / size independent subsets.
    fraction = size / smaller
    return Estimate(float(distances.mean()), float(distances.std() * math.sqrt(fraction / (1 - fraction))))


def squared_mmd(a: Tensor, b: Tensor) -> float:
    """Return the unbiased squared MMD of ``a [n, d]`` and ``b [m, d]`` with the kernel ``(x·y / d + 1)³``."""
    a, b = a.double(), b.double()
    within_a, within_b, between = ((x @ y.T / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    same = sum((x.sum() - x.trace()) / (len(x) * (len(x) - 1)) for x in (within_a, within_b))
    return float(same - 2 * between.mean())


def inception_score(logits: Tensor, generator: torch.Generator, *, splits: int = 10) -> Estimate:
    """Return the Inception Score ``exp E KL(p(y|x) ‖ p(y))`` (Salimans et al., arXiv 1606.03498).

    The value is the mean over random splits of the class logits ``[n, classes]``. ``error`` is the standard
    deviation over the splits, as published, and ``None`` with one split.

    Raises:
        ValueError: there are fewer rows than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"an inception score over {splits} splits needs as many images, got {len(logits)}")
    order = torch.randperm(len(logits), generator=generator)
    scores = []
    for rows in order.tensor_split(splits):
        logs = logits[rows].double().log_softmax(dim=1)
        marginal = (logs.logsumexp(dim=0) - math.log(len(rows))).unsqueeze(0)
        scores.append((logs.exp() * (logs - marginal)).sum(dim=1).mean().exp())
    values = torch.stack(scores)
    return Estimate(float(values.mean()), float(values.std(correction=0)) if splits > 1 else None)


@dataclass(frozen=True)
class Overlap:
    """Overlap of a set of images with the real ones, by neighborhoods of features.

    Attributes:
        precision: fraction of images inside the ball of any real one (Kynkäänniemi et al., arXiv 1904.06991).
        recall: fraction of real images inside the ball of any image of the set.
        density: mean number of real balls around an image, divided by k (Naeem et al., arXiv 2002.09797);
            about 1 for real images, and unbounded.
        coverage: fraction of real images whose ball contains an image of the set.
    """

    precision: float
    recall: float
    density: float
    coverage: float


# Fewest generated and real images: one more than the neighbors of a ball.
LEAST_IMAGES, LEAST_REFERENCES = 4, 6


class Neighborhoods:
    """Balls around real images, with features ``[m, d]``, to the k-th nearest neighbor among them.

    Precision and recall have k = ``neighbors``, density and coverage ``density_neighbors``.

    Raises:
        ValueError: ``real`` has no more rows than the larger k.
    """

    def __init__(self, real: Tensor, *, neighbors: int = 3, density_neighbors: int = 5) -> None:
        self.neighbors, self.density_neighbors = neighbors, density_neighbors
        # Centered features have small squares, so that differences keep their digits.
        self._center = real.double().mean(dim=0)
        self._real = real.double() - self._center
        self._radii = _squared_radii(self._real, neighbors, density_neighbors)

    def overlap(self, fake: Tensor) -> Overlap:
        """Compare a set of features ``[n, d]`` with the real images.

        Raises:
            ValueError: ``fake`` has no more rows than ``neighbors``.
        """
        fake, real, (radii, density_radii) = fake.double() - self._center, self._real, self._radii
        (fake_radii,) = _squared_radii(fake, self.neighbors)
        inside = around = 0
        covered, recalled = torch.zeros(2, len(real), dtype=torch.bool)
        for rows, reach in zip(fake.split(_CHUNK), fake_radii.split(_CHUNK)):
            distances = _squared_distances(rows, real)
            inside += int((distances <= radii).any(dim=1).sum())
            recalled |= (distances <= reach.unsqueeze(1)).any(dim=0)
            within = distances <= density_radii
            around += int(within.sum())
            covered |= within.any(dim=0)
        precision, density = inside / len(fake), around / (self.density_neighbors * len(fake))
        return Overlap(precision, float(recalled.double().mean()), density, float(covered.double().mean()))


def _squared_radii(rows: Tensor, *neighbors: int) -> list[Tensor]:
    """Return the squared distance of each row to its k-th nearest neighbor, ``[len(rows)]`` for each k."""
    most = max(neighbors)
    if len(rows) <= most:
        raise ValueError(f"balls of {most} neighbors need more than {most} images per side, got {len(rows)}")
    # A row is its own nearest neighbor, so the k-th one has index k.
    nearest = torch.cat(
        [_squared_distances(chunk, rows).topk(most + 1, largest=False).values for chunk in rows.split(_CHUNK)]
    )
    return [nearest[:, k] for k in neighbors]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    squares = a.square().sum(dim=1).unsqueeze(1) + b.square().sum(dim=1)
    distances = torch.addmm(squares, a, b.T, alpha=-2)
    # The distance of equal rows is rounding, which differs from chunk to chunk, so it is set to zero.
    return distances.masked_fill_(distances < squares.mul_(1e-12), 0.0)


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, ``[n]``, of images ``[n, …]`` in [0, 1]."""
    error = (images - references).square().flatten(1).mean(dim=1)
    return -10 * error.clamp(min=1e-12).log10()


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Return the structural similarity (Wang et al. 2004), ``[n]``, of images ``[n, c, h, w]`` in [0, 1].

    It is the mean over channels and all positions of the published Gaussian window of 11 × 11 pixels, which
    is cut to the size of smaller images.
    """
    height, width = images.shape[-2:]
    # Centered values keep more digits, and leave variances and covariances unchanged.
    x, y = images - 0.5, references - 0.5
    stacked = torch.cat([x, y, x * x, y * y, x * y]).flatten(0, 1).unsqueeze(1)
    rows, columns = (_gaussian_window(min(_SSIM_WINDOW, side), images) for side in (height, width))
    local = F.conv2d(F.conv2d(stacked, rows.view(1, 1, -1, 1)), columns.view(1, 1, 1, -1))
    mean_x, mean_y, square_x, square_y, product = local.unflatten(0, (5, *images.shape[:2])).squeeze(3)
    variances, covariance = square_x + square_y - mean_x**2 - mean_y**2, product - mean_x * mean_y
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    luminance = (2 * mean_x * mean_y + _SSIM_C1) / (mean_x**2 + mean_y**2 + _SSIM_C1)
    structure = (2 * covariance + _SSIM_C2) / (variances + _SSIM_C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _gaussian_window(length: int, like: Tensor) -> Tensor:
    """Return normalized weights ``[length]`` of a Gaussian of standard deviation 1.5."""
    offsets = torch.arange(length, device=like.device, dtype=like.dtype) - (length - 1) / 2
    return torch.softmax(-offsets.square() / (2 * _SSIM_DEVIATION**2), dim=0)
