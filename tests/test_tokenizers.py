"""Autoencoders of diffusers as tokenizers: diffusers' own arithmetic, and models trained on their latents."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, write_recipe
from diffusers import AutoencoderDC, AutoencoderKL
from hub_server import TOKEN, serve, use
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import far
from far import InputError
from far.cli.main import main
from far.data.shards import ShardWriter
from far.folder import load_autoencoder
from far.tokenizer import Posterior

SIZE = 64


def kl(levels: int, **changes: Any) -> AutoencoderKL:
    """An ``AutoencoderKL`` of random weights, narrow, with as many levels as the published one."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(4,) * (levels - 2) + (8, 8),
        norm_num_groups=2,
        **changes,
    )


def dc() -> AutoencoderDC:
    """An ``AutoencoderDC`` of random weights with the levels of DC-AE f32c32."""
    sizes = dict(block_out_channels=(4, 4, 8, 8, 16, 32), layers_per_block=(0, 1, 1, 1, 1, 1))
    blocks = dict(block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3)
    multiscales = dict(qkv_multiscales=((), (), (), (5,), (5,), (5,)))
    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (sizes | blocks | multiscales).items()
    }
    return AutoencoderDC(latent_channels=32, attention_head_dim=4, scaling_factor=0.41407, **sides)


CHANNEL_MEANS = [0.1 * number - 1 for number in range(32)]
CHANNEL_STDS = [0.5 + 0.1 * number for number in range(32)]
# The layout of each published configuration, with its own scale and shift.
TOKENIZERS = {
    "SD 1.x": lambda: kl(4, latent_channels=4),
    "SDXL": lambda: kl(4, latent_channels=4, scaling_factor=0.13025, layers_per_block=2),
    "SD3": lambda: kl(
        4,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    "VA-VAE": lambda: kl(
        5, latent_channels=32, scaling_factor=1.0, latents_mean=CHANNEL_MEANS, latents_std=CHANNEL_STDS
    ),
    "DC-AE": dc,
}


def saved(name: str, folder: Path) -> Any:
    """Save a tokenizer with random weights, and return diffusers' own module."""
    torch.manual_seed(0)
    theirs = TOKENIZERS[name]().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return theirs


def scale_and_shift(theirs: Any) -> tuple[Tensor, Tensor]:
    """What diffusers' pipelines compute with, per channel."""
    config = theirs.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None:
        return config.scaling_factor / torch.tensor(std), torch.tensor(mean)
    return torch.tensor([config.scaling_factor]), torch.tensor([config.get("shift_factor") or 0.0])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for split, count in (("train", 9), ("held-out", 6)):
        writer = ShardWriter(
            folder / split, {"kind": "images", "size": SIZE, "classes": CLASSES, "source": "x"}
        )
        pixels = torch.randint(0, 256, (count, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
        writer.write({"images": pixels, "labels": torch.arange(count) % 3}, cursor=count)
        writer.finish()
    return folder


def few_steps(images: Path, folder: Path, autoencoder: str) -> list[str]:
    """Write a recipe that trains for two steps, and return its arguments."""
    recipe = write_recipe(folder / "recipe.yaml", images, folder / "run", Path(autoencoder))
    training = {"steps": 2, "batch_size": 4, "checkpoint_every": 2, "evaluate_every": 2}
    settings = (f"generator.training.{key}={value}" for key, value in training.items())
    return [str(recipe), *settings, "generator.sampling.ar_steps=1"]


@torch.no_grad()
@pytest.mark.parametrize("name", TOKENIZERS)
def test_moments_and_images_are_those_of_diffusers(name: str, tmp_path: Path) -> None:
    theirs = saved(name, tmp_path)
    ours = load_autoencoder(f"diffusers:{tmp_path}", device="cpu")
    pixels = torch.rand(2, 3, SIZE, 2 * SIZE, generator=torch.Generator().manual_seed(1))
    encoded = theirs.encode(pixels * 2 - 1)
    expected = encoded.latent if name == "DC-AE" else encoded.latent_dist.parameters
    moments = ours.moments(pixels * 2 - 1)
    torch.testing.assert_close(moments, expected, atol=1e-5, rtol=1e-5)
    config = ours.config
    assert moments.shape == (2, config.moment_channels, SIZE // config.stride, 2 * SIZE // config.stride)
    latents = encoded.latent if name == "DC-AE" else encoded.latent_dist.mean
    assert latents.shape[1] == config.latent_channels
    scale, shift = (value.view(1, -1, 1, 1) for value in scale_and_shift(theirs))
    normalized = (latents - shift) * scale
    torch.testing.assert_close(ours.to_latents(pixels), normalized, atol=1e-5, rtol=1e-5)
    decoded = (theirs.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours.to_images(normalized), decoded, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_model_is_trained_and_draws_through_the_autoencoder(
    name: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = saved(name, tmp_path / "vae")
    recipe = few_steps(images, tmp_path, f"diffusers:{tmp_path / 'vae'}")
    assert main(["cache", *recipe]) == 0
    for patch in (1, 2):
        settings = [*recipe, f"generator.network.patch={patch}", f"model=patch-{patch}"]
        assert main(["train", *settings]) == 0, capsys.readouterr().err
        model = tmp_path / "run" / f"patch-{patch}"
        assert not (model / "autoencoder.safetensors").exists()
        out = tmp_path / f"images-{patch}"
        command = ["generate", "--weights", str(model), "--labels", "square", "--dtype", "float32"]
        assert main([*command, "--out", str(out)]) == 0
        (drawn,) = out.rglob("*.png")
        assert Image.open(drawn).size == (SIZE, SIZE)
        pipeline = far.load(model)
        *_, last = pipeline.stream(["square"], [0])
        scale, shift = (value.view(1, -1, 1, 1) for value in scale_and_shift(theirs))
        with torch.no_grad():
            decoded = theirs.decode(last.latents / scale + shift).sample / 2 + 0.5
        expected = (decoded.clamp(0, 1) * 255).round()[0].permute(1, 2, 0)
        difference = torch.from_numpy(np.array(Image.open(drawn), dtype="f4")) - expected
        assert difference.abs().max() <= 1


def test_latents_without_variance_are_not_noisy() -> None:
    moments, noise = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    assert torch.equal(Posterior(moments, deterministic=True).sample(noise), moments)


@pytest.fixture
def model(pipeline_folder: Path, tmp_path: Path) -> Path:
    """A model whose autoencoder is in ``vae`` beside it."""
    torch.manual_seed(0)
    kl(3, latent_channels=2).save_pretrained(tmp_path / "vae")
    pipeline = far.load(pipeline_folder)
    pipeline.autoencoder = load_autoencoder(f"diffusers:{tmp_path / 'vae'}")
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(name: Path | str, *expected: str) -> None:
    with pytest.raises(InputError) as caught:
        load_autoencoder(name)
    assert "\n" not in str(caught.value)
    for text in expected:
        assert text in str(caught.value)


def test_autoencoder_that_is_missing_or_has_changed_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    far.load(model)
    vae = tmp_path / "vae"
    config, weights = vae / "config.json", vae / "diffusion_pytorch_model.safetensors"
    text, tensors = config.read_text(), load_file(weights)
    config.write_text(json.dumps({**json.loads(text), "scaling_factor": 0.2}))
    refused(model, str(vae), str(model))
    config.write_text(text)
    save_file({**tensors, "decoder.conv_out.bias": tensors["decoder.conv_out.bias"] + 0.1}, weights)
    refused(model, str(vae), str(model))
    vae.rename(tmp_path / "elsewhere")
    refused(model, str(vae), str(model))
    assert main(["generate", "--weights", str(model), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_included_copy_needs_no_source(model: Path, tmp_path: Path) -> None:
    pipeline = far.load(model)
    expected = pipeline.generate([0, 1], output="tensor")
    pipeline.autoencoder.include_weights()
    pipeline.save_pretrained(tmp_path / "copy")
    shutil.rmtree(tmp_path / "vae")
    again = far.load(tmp_path / "copy")
    assert torch.equal(again.generate([0, 1], output="tensor"), expected)
    again.save_pretrained(tmp_path / "copy of the copy", torch.float16)
    third = far.load(tmp_path / "copy of the copy")
    assert third.autoencoder.same_latents(again.autoencoder)
    for file in ("config.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / "copy" / file).read_text()


def test_other_latent_channels_than_the_models_are_refused(model: Path, tmp_path: Path) -> None:
    pipeline = far.load(model)
    kl(3, latent_channels=3).save_pretrained(tmp_path / "other")
    pipeline.autoencoder = load_autoencoder(f"diffusers:{tmp_path / 'other'}")
    with pytest.raises(InputError, match=r"2 latent channels.* 3"):
        pipeline.save_pretrained(tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_only_what_moments_depend_on_needs_another_cache(tmp_path: Path) -> None:
    kl(3, latent_channels=2).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())

    def with_entries(**changes: Any) -> Any:
        config.write_text(json.dumps({**values, **changes}))
        return load_autoencoder(f"diffusers:{tmp_path}")

    plain = with_entries()
    rescaled, regrouped = with_entries(scaling_factor=0.5), with_entries(norm_num_groups=1)
    assert plain.fingerprint() == rescaled.fingerprint() != regrouped.fingerprint()
    assert not plain.same_latents(rescaled)
    assert not plain.same_latents(regrouped)
    assert plain.same_latents(with_entries(sample_size=512, force_upcast=False))


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "AutoencoderTiny"},
        {"_class_name": None},
        {"_class_name": ["AutoencoderKL"]},
        {"in_channels": 4},
        {"latent_channels": 2.5},
        {"latent_channels": 3},
        {"block_out_channels": []},
        {"block_out_channels": [10**9, 4, 8]},
        {"layers_per_block": 10**9},
        {"norm_num_groups": 3},
        {"scaling_factor": 0},
        {"latents_std": [1.0, 1.0]},
        {"latents_mean": [0.0], "latents_std": [1.0]},
        {"down_block_types": ["Wavelet"] * 3},
    ],
)
def test_wrong_configuration_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    kl(3, latent_channels=2).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    refused(f"diffusers:{tmp_path}", str(tmp_path))


def test_folder_without_safetensors_and_missing_package_are_refused(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    vae = tmp_path / "vae"
    kl(3, latent_channels=2).save_pretrained(vae)
    recipe = few_steps(images, tmp_path, f"diffusers:{vae}")

    def check(*expected: str) -> None:
        assert main(["cache", *recipe]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert all(text in line for text in expected), line
        assert not (tmp_path / "run").exists()

    with monkeypatch.context() as without:
        without.setitem(sys.modules, "diffusers", None)
        check("diffusers")
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.bin")
    check(str(vae), "safetensors")
    shutil.rmtree(vae)
    check(str(vae))


def test_autoencoder_of_the_hub_is_stored_as_a_commit(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kl(3, latent_channels=2).save_pretrained(tmp_path / "vae")
    files = {f"vae/{path.name}": path.read_bytes() for path in (tmp_path / "vae").iterdir()}
    with serve() as hub:
        use(hub, monkeypatch, tmp_path / "cache")
        commit = hub.commit("bob/painter", {**files, "vae/model.bin": b"pickle", "unet/config.json": b"{}"})
        pipeline = far.load(pipeline_folder)
        pipeline.autoencoder = load_autoencoder("diffusers:bob/painter/vae")
        assert hub.downloaded() == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
        expected = pipeline.generate([0], output="tensor")
        pipeline.save_pretrained(tmp_path / "model")
        assert f"bob/painter/vae@{commit}" in (tmp_path / "model" / "README.md").read_text()
        hub.commit("bob/painter", {"vae/config.json": b"{}"})  # a later commit changes nothing
        assert torch.equal(far.load(tmp_path / "model").generate([0], output="tensor"), expected)
        refused("diffusers:bob/painter", "bob/painter")
        refused("diffusers:bob/nothing", "bob/nothing")


def test_publishing_needs_an_autoencoder_that_others_can_load(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve() as hub:
        use(hub, monkeypatch, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        push = ["push", str(model), "ann/shapes", "--license", "mit"]
        assert main(push) == 2
        assert str(tmp_path / "vae") in capsys.readouterr().err
        assert hub.branches == {}
        expected = far.load(model).generate([0], output="tensor")
        assert main([*push, "--include-autoencoder"]) == 0, capsys.readouterr().err
        shutil.rmtree(tmp_path / "vae")
        assert torch.equal(far.load("ann/shapes").generate([0], output="tensor"), expected)
