"""Our autoencoder against the numbers of MAR's, with the raw weights and through a converted checkpoint."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import far
from far.autoencoder import Autoencoder, AutoencoderConfig
from far.convert import convert_kl16

FIXTURE = Path(__file__).parent / "fixtures" / "kl16_reference.safetensors"


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_file(FIXTURE)


@pytest.fixture(scope="module")
def weights(reference: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix("weights."): tensor
        for name, tensor in reference.items()
        if name.startswith("weights.")
    }


@pytest.fixture(params=["direct", "converted", "converted bare"])
def autoencoder(request: pytest.FixtureRequest, weights: dict[str, Tensor], tmp_path: Path) -> Autoencoder:
    if request.param == "direct":
        autoencoder = Autoencoder(AutoencoderConfig(width=32, width_multipliers=(1, 1, 1, 1, 1)))
        autoencoder.load_state_dict(weights)
        return autoencoder
    torch.save({"model": weights} if request.param == "converted" else weights, tmp_path / "kl16.ckpt")
    convert_kl16(tmp_path / "kl16.ckpt", tmp_path / "converted")
    loaded = far.load_autoencoder(tmp_path / "converted")
    assert isinstance(loaded, Autoencoder)
    return loaded


@torch.no_grad()
def test_posterior_and_reconstruction(autoencoder: Autoencoder, reference: dict[str, Tensor]) -> None:
    posterior = autoencoder.encode(reference["image"])
    torch.testing.assert_close(posterior.mean, reference["posterior.mean"], rtol=0, atol=1e-4)
    torch.testing.assert_close(posterior.logvar, reference["posterior.logvar"], rtol=0, atol=1e-4)
    reconstruction = autoencoder.decode(reference["posterior.mode"])
    torch.testing.assert_close(reconstruction, reference["reconstruction"], rtol=0, atol=1e-4)


def test_scale_is_the_published_one(autoencoder: Autoencoder, reference: dict[str, Tensor]) -> None:
    mean = reference["posterior.mean"]
    torch.testing.assert_close(autoencoder.normalize(mean), mean * 0.2325)
    torch.testing.assert_close(autoencoder.denormalize(autoencoder.normalize(mean)), mean)


def test_published_size() -> None:
    """At the width of the published file: 66,456,019 parameters in 312 tensors."""
    with torch.device("meta"):
        autoencoder = Autoencoder(AutoencoderConfig())
    assert sum(parameter.numel() for parameter in autoencoder.parameters()) == 66_456_019
    assert len(autoencoder.state_dict()) == 312
