"""Large batches go through autoencoder and feature networks in parts: bounded memory, equal results."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import far.tokenizer
from far.autoencoder import Autoencoder, AutoencoderConfig
from far.evaluation.features import FeatureNetwork

TINY = AutoencoderConfig(width=8, width_multipliers=(1, 2, 3), blocks=1, latent_channels=2, norm_groups=4)
# The largest activations of 32 × 16 pixels: 16 channels, the second level's, at the finest resolution.
TINY_LARGEST = 16 * 32 * 16


def largest_activation(module: nn.Module, call: Callable[[], Tensor]) -> tuple[int, int]:
    """Return the largest output of any submodule, and the number of calls of the first convolution."""
    sizes: list[int] = []
    for part in module.modules():
        part.register_forward_hook(
            lambda part, _, output: sizes.append(output.numel()) if isinstance(output, Tensor) else None
        )
    calls: list[int] = []
    next(part for part in module.modules() if isinstance(part, nn.Conv2d)).register_forward_hook(
        lambda *_: calls.append(1)
    )
    call()
    return max(sizes), len(calls)


@torch.no_grad()
@pytest.mark.parametrize("at_once", [1, 5, 7])
def test_decoding_in_parts_equals_decoding_whole(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    autoencoder, latents = Autoencoder(TINY), torch.randn(7, 2, 8, 4)
    images = autoencoder.decode(latents)
    moments = autoencoder.moments(images)
    monkeypatch.setattr(far.tokenizer, "_ACTIVATION", at_once * TINY_LARGEST)
    assert autoencoder.images_at_once(32, 16) == at_once
    torch.testing.assert_close(
        autoencoder.decode(latents), images, rtol=0, atol=1e-5 * float(images.abs().max())
    )
    torch.testing.assert_close(
        autoencoder.moments(images), moments, rtol=0, atol=1e-5 * float(moments.abs().max())
    )


@torch.no_grad()
@pytest.mark.parametrize("at_once", [1, 3])
def test_no_activation_is_larger_than_the_bound(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far.tokenizer, "_ACTIVATION", (at_once + 1) * TINY_LARGEST - 1)
    autoencoder = Autoencoder(TINY)
    largest, calls = largest_activation(
        autoencoder.decoder, lambda: autoencoder.decode(torch.randn(7, 2, 8, 4))
    )
    assert largest == at_once * TINY_LARGEST
    assert calls == -(-7 // at_once)
    largest, calls = largest_activation(
        autoencoder.encoder, lambda: autoencoder.moments(torch.randn(7, 3, 32, 16))
    )
    assert largest <= at_once * TINY_LARGEST
    assert calls == -(-7 // at_once)


@torch.no_grad()
def test_batch_of_256_at_the_published_size_stays_far_below_32_bits() -> None:
    with torch.device("meta"):
        autoencoder, latents = Autoencoder(AutoencoderConfig()), torch.empty(256, 16, 16, 16)
    assert largest_activation(autoencoder, lambda: autoencoder.decode(latents))[0] == 2**27
    assert (
        largest_activation(
            autoencoder, lambda: autoencoder.moments(torch.empty(256, 3, 256, 256, device="meta"))
        )[0]
        <= 2**27
    )


@torch.no_grad()
def test_image_above_the_bound_is_decoded_alone_and_an_empty_batch_stays_empty() -> None:
    with torch.device("meta"):
        assert Autoencoder(AutoencoderConfig()).images_at_once(2048, 2048) == 1
    assert Autoencoder(TINY).decode(torch.empty(0, 2, 4, 4)).shape == (0, 3, 16, 16)


def test_training_does_not_split_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far.tokenizer, "_ACTIVATION", TINY_LARGEST)
    autoencoder = Autoencoder(TINY)
    assert (
        largest_activation(autoencoder.decoder, lambda: autoencoder.decode(torch.randn(3, 2, 8, 4)))[1] == 1
    )


@torch.no_grad()
def test_features_of_a_large_batch_are_computed_in_parts_on_any_device() -> None:
    with torch.device("meta"):
        network, images = FeatureNetwork(), torch.empty(1000, 3, 32, 32)
    largest, calls = largest_activation(network, lambda: network(images))
    assert calls > 1
    assert largest < 2**27
