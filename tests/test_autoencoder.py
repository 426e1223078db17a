"""Decoders: arithmetic that inference saves, and the small decoder's shapes and reach."""

import copy

import pytest
import torch
import torch.nn.functional as F

from far.autoencoder import Autoencoder, AutoencoderConfig, SmallDecoderConfig, Upsample
from far.errors import InputError

TINY = AutoencoderConfig(width=8, width_multipliers=(1, 2, 3), blocks=1, latent_channels=2, norm_groups=4)
SMALL = AutoencoderConfig(
    width=8, width_multipliers=(1, 2, 3), blocks=1, latent_channels=2, norm_groups=4,
    small_decoder=SmallDecoderConfig(4, 2),
)  # fmt: skip


def repeated(layer: Upsample, x: torch.Tensor) -> torch.Tensor:
    """Every pixel four times, then the 3×3 convolution, in float64."""
    x = x.double().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    weight, bias = layer.conv.weight, layer.conv.bias
    assert bias is not None
    return F.conv2d(x, weight.double(), bias.double(), padding=1).float()


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8)])
def test_upsampling_equals_repetition_and_convolution(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer, x = Upsample(3), torch.randn(2, 3, *size)
    torch.testing.assert_close(layer(x), repeated(layer, x), rtol=1e-5, atol=1e-6)
    for memory in (torch.channels_last, torch.contiguous_format):
        torch.testing.assert_close(
            layer.to(memory_format=memory)(x), repeated(layer, x), rtol=1e-5, atol=1e-6
        )


@torch.no_grad()
def test_upsampling_follows_its_weight() -> None:
    torch.manual_seed(0)
    layer, x, others = Upsample(3), torch.randn(1, 3, 4, 4), Upsample(3)

    def check(changed: Upsample) -> None:
        torch.testing.assert_close(changed(x), repeated(changed, x), rtol=1e-5, atol=1e-6)

    check(layer)
    layer.conv.weight.mul_(2)
    check(layer)
    layer.load_state_dict(others.state_dict())
    check(layer)
    twin = copy.deepcopy(layer)
    twin.conv.weight.add_(1)
    check(twin)
    check(layer)
    layer.conv.weight = torch.nn.Parameter(torch.randn(3, 3, 3, 3))
    check(layer)
    check(layer.to(torch.bfloat16).to(torch.float32))
    with torch.enable_grad():
        layer(x).sum().backward()
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()
    check(layer)
    with torch.inference_mode():
        made = Upsample(3)
        check(made)


@torch.no_grad()
def test_upsampling_is_exported_as_repetition_and_convolution() -> None:
    torch.manual_seed(0)
    layer, x = Upsample(3), torch.randn(1, 3, 4, 4)
    layer(x)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), repeated(layer, x), rtol=1e-5, atol=1e-6)


def test_decoding_with_gradients_equals_decoding_without() -> None:
    torch.manual_seed(0)
    autoencoder, latents = Autoencoder(TINY), torch.randn(2, 2, 4, 3)
    given = latents.clone()
    expected = autoencoder.decode(latents.requires_grad_())
    expected.sum().backward()
    assert latents.grad is not None
    with torch.no_grad():
        decoded = autoencoder.decode(latents)
        moments = autoencoder.moments(decoded)
    torch.testing.assert_close(decoded, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(autoencoder.moments(decoded).detach(), moments, rtol=1e-5, atol=1e-5)
    assert torch.equal(latents, given)


def test_gradient_of_a_decoder_equals_finite_differences() -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder(SMALL).double()
    for decoder in ("full", "small"):
        latents = torch.randn(1, 2, 2, 1, dtype=torch.float64, requires_grad=True)
        autoencoder.use_decoder(decoder)
        assert torch.autograd.gradcheck(autoencoder.decode, latents)


@torch.no_grad()
@pytest.mark.parametrize("config", [SMALL, AutoencoderConfig(
    width=4, width_multipliers=(1, 1, 2, 2, 4), blocks=1, latent_channels=3, norm_groups=2,
    small_decoder=SmallDecoderConfig(4, 1),
)], ids=["stride 4", "stride 16"])  # fmt: skip
def test_small_decoder_makes_images_of_the_full_ones_size_each_alone(config: AutoencoderConfig) -> None:
    torch.manual_seed(0)
    autoencoder, latents = Autoencoder(config), torch.randn(3, config.latent_channels, 2, 3)
    full = autoencoder.to_images(latents)
    autoencoder.use_decoder("small")
    small = autoencoder.to_images(latents)
    assert small.shape == full.shape == (3, 3, 2 * config.stride, 3 * config.stride)
    assert not torch.allclose(small, full, atol=1e-2)
    for index in range(3):
        alone = autoencoder.to_images(latents[index : index + 1])
        torch.testing.assert_close(alone, small[index : index + 1], rtol=0, atol=1e-5)


def test_autoencoder_without_a_small_decoder_refuses_it() -> None:
    autoencoder = Autoencoder(TINY)
    for name in ("small", "tiny"):
        with pytest.raises(InputError, match=name):
            autoencoder.use_decoder(name)  # type: ignore[arg-type]


@torch.no_grad()
def test_small_decoder_changes_no_latents() -> None:
    autoencoder = Autoencoder(TINY)
    other = copy.deepcopy(autoencoder)
    other.set_small_decoder(SmallDecoderConfig(4, 1))
    assert other.same_latents(autoencoder)
    assert other.fingerprint() == autoencoder.fingerprint()
