"""Distances between sets of features ``[n, d]``: pure functions, in float64.

Which network the features come from is the caller's business; see ``far.evaluation.features``.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from far.errors import InputError

# Rows compared at a time: 250 against 50,000 in float64 take 100 MB, and a few copies of that are needed.
_CHUNK = 250


@dataclass
class FeatureStatistics:
    """Count, mean ``[d]`` and covariance ``[d, d]``, gathered batch by batch in float64."""

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def empty(cls, features: int) -> "FeatureStatistics":
        return cls(0, torch.zeros(features, dtype=torch.float64), torch.zeros(features, features, dtype=torch.float64))

    def add(self, features: Tensor) -> None:
        """Count in a batch ``[n, d]``."""
        batch = features.double()
        self.count += len(batch)
        self.total += batch.sum(dim=0)
        self.outer += batch.T @ batch

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """The statistics of all of ``features [n, d]``, converted in chunks."""
        statistics = cls.empty(features.shape[1])
        for chunk in features.split(_CHUNK):
            statistics.add(chunk)
        return statistics

    @classmethod
    def known(cls, count: int, mean: Tensor, covariance: Tensor) -> "FeatureStatistics":
        """Statistics that somebody else computed: mean ``[d]``, unbiased covariance ``[d, d]``."""
        mean, covariance = mean.double(), covariance.double()
        return cls(count, count * mean, (count - 1) * covariance + count * torch.outer(mean, mean))

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance; needs two or more rows."""
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """``|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½)``, also for rank-deficient covariances.

    The trace of the root is the sum of the singular values of ``Σ₁^½ Σ₂^½``, so nothing is inverted
    and no complex number appears.

    Raises:
        ValueError: fewer than two rows on a side, or different feature counts.
        InputError: a feature was not finite.
    """
    if min(a.count, b.count) < 2:
        raise ValueError(f"a Fréchet distance needs two images a side, got {a.count} and {b.count}")
    if len(a.total) != len(b.total):
        raise ValueError(f"features of {len(a.total)} and {len(b.total)} dimensions cannot be compared")
    if not all(torch.isfinite(side.total).all() and torch.isfinite(side.covariance).all() for side in (a, b)):
        raise InputError("the features of the images are not finite; check the weights that drew them")
    root_trace = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    trace = a.covariance.trace() + b.covariance.trace() - 2 * root_trace
    return float((a.mean - b.mean).square().sum() + trace)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_bias(reference: FeatureStatistics, count: int, generator: torch.Generator) -> float:
    """The distance of ``count`` draws from the reference's own normal distribution to the reference.

    A model without any fault would still score about this much at ``count`` images.
    """
    values, vectors = torch.linalg.eigh(reference.covariance)
    scaled = vectors * values.clamp(min=0).sqrt()
    drawn = FeatureStatistics.empty(len(reference.total))
    for start in range(0, count, _CHUNK):
        normal = torch.randn(min(_CHUNK, count - start), len(values), generator=generator, dtype=torch.float64)
        drawn.add(reference.mean + normal @ scaled.T)
    return frechet_distance(drawn, reference)


@dataclass(frozen=True)
class Estimate:
    """A figure and its deviation over subsets or splits."""

    value: float
    deviation: float


def kernel_distance(a: Tensor, b: Tensor, generator: torch.Generator, *, subsets: int = 100, subset_size: int = 1000) -> Estimate:
    """KID (Bińkowski et al., arXiv 1801.01401): unbiased squared MMD with a cubic kernel, over random subsets.

    Args:
        a: features ``[n, d]``.
        b: features ``[m, d]``.
        subsets: how many.
        subset_size: images of each side in a subset, no more than the smaller side has.

    Raises:
        ValueError: fewer than two rows on a side.
    """
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise ValueError(f"a kernel distance needs two images a side, got {len(a)} and {len(b)}")
    values = []
    for _ in range(subsets):
        chosen = (features[torch.randperm(len(features), generator=generator)[:size]] for features in (a, b))
        values.append(squared_mmd(*chosen))
    found = torch.tensor(values, dtype=torch.float64)
    return Estimate(float(found.mean()), float(found.std(correction=0)))


def squared_mmd(a: Tensor, b: Tensor) -> float:
    """The unbiased estimate of the squared MMD of ``a [n, d]`` and ``b [m, d]``, kernel ``(x·y / d + 1)³``."""
    a, b = a.double(), b.double()
    within_a, within_b, between = ((x @ y.T / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    n, m = len(a), len(b)
    same = (within_a.sum() - within_a.trace()) / (n * (n - 1)) + (within_b.sum() - within_b.trace()) / (m * (m - 1))
    return float(same - 2 * between.mean())


def inception_score(logits: Tensor, generator: torch.Generator, *, splits: int = 10) -> Estimate:
    """``exp E KL(p(y|x) ‖ p(y))`` (Salimans et al., arXiv 1606.03498) of class logits ``[n, classes]``, over random splits.

    Raises:
        ValueError: fewer rows than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"an inception score over {splits} splits needs as many images, got {len(logits)}")
    order = torch.randperm(len(logits), generator=generator)
    scores = []
    for rows in order.tensor_split(splits):
        logs = logits[rows].double().log_softmax(dim=1)
        marginal = (logs.logsumexp(dim=0) - math.log(len(rows))).unsqueeze(0)
        scores.append((logs.exp() * (logs - marginal)).sum(dim=1).mean().exp())
    found = torch.stack(scores)
    return Estimate(float(found.mean()), float(found.std(correction=0)))


def precision_recall(fake: Tensor, real: Tensor, *, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991) of features ``[n, d]`` and ``[m, d]``.

    Precision is the share of ``fake`` within the reach of some row of ``real``, a row's reach being the
    distance to its k-th nearest neighbour in its own set; recall the same with the sides exchanged.

    Raises:
        ValueError: a side has no more rows than ``neighbours``.
    """
    if min(len(fake), len(real)) <= neighbours:
        raise ValueError(
            f"precision and recall with {neighbours} neighbours need more than {neighbours} images a side, got {len(fake)} and {len(real)}"
        )
    # Differences decide: centred rows lose fewer digits to the squares below.
    center = real.double().mean(dim=0)
    fake, real = fake.double() - center, real.double() - center
    return _share_within_reach(fake, real, neighbours), _share_within_reach(real, fake, neighbours)


def _share_within_reach(rows: Tensor, others: Tensor, neighbours: int) -> float:
    # A row's own distance of zero is one of those sorted, hence one more.
    reach = torch.cat([_squared_distances(chunk, others).kthvalue(neighbours + 1).values for chunk in others.split(_CHUNK)])
    within = [(_squared_distances(chunk, others) <= reach).any(dim=1) for chunk in rows.split(_CHUNK)]
    return float(torch.cat(within).double().mean())


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    squares = a.square().sum(dim=1).unsqueeze(1) + b.square().sum(dim=1)
    found = torch.addmm(squares, a, b.T, alpha=-2)
    # What is left between equal rows is rounding, which differs from chunk to chunk.
    return found.masked_fill_(found < squares.mul_(1e-12), 0.0)


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each of images ``[n, …]`` in [0, 1]: ``[n]``."""
    error = (images - references).square().flatten(1).mean(dim=1)
    return -10 * error.clamp(min=1e-12).log10()
