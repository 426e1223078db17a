"""Distances between sets of features ``[n, d]``: pure functions, in float64.

Which network the features come from is the caller's business; see ``far.evaluation.features``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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
    """
    if min(a.count, b.count) < 2:
        raise ValueError(f"a Fréchet distance needs two images a side, got {a.count} and {b.count}")
    if len(a.total) != len(b.total):
        raise ValueError(f"features of {len(a.total)} and {len(b.total)} dimensions cannot be compared")
    root_trace = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    trace = a.covariance.trace() + b.covariance.trace() - 2 * root_trace
    return float((a.mean - b.mean).square().sum() + trace)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each of images ``[n, …]`` in [0, 1]: ``[n]``."""
    error = (images - references).square().flatten(1).mean(dim=1)
    return -10 * error.clamp(min=1e-12).log10()
