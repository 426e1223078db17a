"""Structural similarity, compared with closed forms, a loop over windows, and torchmetrics."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from far.evaluation.metrics import ssim

C1, C2 = 0.01**2, 0.03**2


def image_pairs(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return images of different contrast per channel, and noisy copies."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, height, width, generator=generator, dtype=torch.float64)
    images = images * torch.tensor([1.0, 0.3, 0.05]).view(3, 1, 1)
    noise = torch.rand(images.shape, generator=generator, dtype=torch.float64)
    return images, (0.7 * images + 0.2 * noise).clamp(0, 1)


def by_windows(image: np.ndarray, reference: np.ndarray, size: int = 11) -> float:
    """Return the mean similarity of two channels ``[h, w]`` over all windows, each computed alone."""
    offsets = range(size)
    middle = (size - 1) / 2
    weights = np.array(
        [
            [math.exp(-((i - middle) ** 2 + (j - middle) ** 2) / (2 * 1.5**2)) for j in offsets]
            for i in offsets
        ]
    )
    weights /= weights.sum()
    values = []
    for top in range(image.shape[0] - size + 1):
        for left in range(image.shape[1] - size + 1):
            a, b = (side[top : top + size, left : left + size] for side in (image, reference))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            variance_a, variance_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
            similar_means = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
            values.append(similar_means * (2 * covariance + C2) / (variance_a + variance_b + C2))
    return float(np.mean(values))


def test_equal_images_have_similarity_one() -> None:
    images, _ = image_pairs(2, 16, 16)
    torch.testing.assert_close(ssim(images, images), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(("a", "b"), [(0.0, 1.0), (0.2, 0.3), (0.9, 0.5)])
def test_constant_images_have_the_closed_form(a: float, b: float) -> None:
    images, references = (torch.full((1, 3, 12, 14), value) for value in (a, b))
    expected = (2 * a * b + C1) / (a**2 + b**2 + C1)
    assert ssim(images, references).item() == pytest.approx(expected, abs=1e-3)  # in float32
    assert ssim(images.double(), references.double()).item() == pytest.approx(expected, abs=1e-7)


def test_similarity_equals_a_loop_over_windows_and_torchmetrics() -> None:
    images, references = image_pairs(2, 17, 14)
    found = ssim(images, references)
    expected = [
        np.mean([by_windows(*channels) for channels in zip(image.numpy(), reference.numpy())])
        for image, reference in zip(images, references)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    # torchmetrics pads the images by reflection. Only windows within the image are published.
    _, maps = structural_similarity_index_measure(
        images, references, data_range=1.0, reduction="none", return_full_image=True
    )
    assert found.tolist() == pytest.approx(maps[..., 5:-5, 5:-5].mean(dim=(1, 2, 3)).tolist(), rel=1e-6)
    assert ssim(images.float(), references.float()).tolist() == pytest.approx(expected, rel=1e-4)


def test_window_is_cut_to_a_small_image() -> None:
    images, references = image_pairs(1, 8, 8)
    channels = zip(images[0].numpy(), references[0].numpy())
    expected = np.mean([by_windows(*pair, size=8) for pair in channels])
    assert ssim(images, references).item() == pytest.approx(expected, rel=1e-9)
