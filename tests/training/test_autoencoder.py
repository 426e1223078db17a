"""Training of the autoencoder: losses fall, latents are normalized, figures equal a recomputation."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from far.autoencoder import Autoencoder, AutoencoderConfig, Posterior
from far.cli.main import main
from far.data.image_sets import read_images
from far.data.latents import open_latents
from far.data.shards import ShardReader
from far.errors import InputError
from far.evaluation.metrics import ssim
from far.folder import load_autoencoder
from far.recipe import load_recipe
from far.training.autoencoder import AutoencoderTask, latent_statistics, noisy


@pytest.fixture
def autoencoder_recipe(tmp_path: Path, image_set: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
data: {image_set}
run: {tmp_path / "run"}
autoencoder:
  model: {{width: 8, width_multipliers: [1, 2, 2], blocks: 1, latent_channels: 4, norm_groups: 2}}
  loss: {{perceptual_weight: 0.1, kl_weight: 1.0e-4, evaluation_images: 12}}
  training:
    {{steps: 120, batch_size: 8, learning_rate: 3.0e-3, warmup_steps: 5, ema_decay: 0.9, log_every: 20,
     checkpoint_every: 60, evaluate_every: 120, dtype: float32}}
""")
    return path


def test_autoencoder_and_generator_are_trained_by_four_commands(
    autoencoder_recipe: Path, tmp_path: Path, image_set: Path
) -> None:
    assert main(["train-autoencoder", str(autoencoder_recipe)]) == 0
    run = tmp_path / "run"
    entries = [json.loads(line) for line in (run / "autoencoder/log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    results = json.loads((run / "autoencoder/config.json").read_text())["results"]
    assert results["images"] == 12
    distances = [results[f"reconstruction FD (EfficientNet-Lite{number})"] for number in (0, 2)]
    assert all(distance > 0 for distance in distances)
    assert distances[0] != distances[1]

    # The reported PSNR and SSIM equal a plain computation.
    autoencoder = load_autoencoder(run / "autoencoder")
    held_out = read_images(ShardReader(image_set / "held-out", "images"), torch.arange(12))
    with torch.no_grad():
        output = autoencoder.decode(autoencoder.encode(held_out).mean).clamp(-1, 1)
        errors = ((output - held_out) / 2).square().mean(dim=(1, 2, 3))
    assert results["psnr"] == pytest.approx(float((-10 * errors.log10()).mean()), abs=0.01)
    similarity = ssim(output.double() / 2 + 0.5, held_out.double() / 2 + 0.5).mean()
    assert results["ssim"] == pytest.approx(float(similarity), abs=1e-4)

    # Scale and shift give every channel of the training images' latents mean 0 and standard deviation 1.
    train = read_images(ShardReader(image_set / "train", "images"), torch.arange(60))
    with torch.no_grad():
        posterior = autoencoder.encode(train)
        latents = autoencoder.normalize(
            posterior.sample(torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1)))
        )
    assert latents.std(dim=(0, 2, 3)).tolist() == pytest.approx([1] * 4, abs=0.1)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.15
    torch.testing.assert_close(autoencoder.normalize(autoencoder.denormalize(latents)), latents)

    # Continue to a generator: cache, train, generate.
    small = [
        "generator.network.patch=2",
        "generator.network.backbone={encoder_width: 16, encoder_depth: 1, encoder_heads: 2, "
        "decoder_width: 16, decoder_depth: 1, decoder_heads: 2, buffer: 2}",
        "generator.network.head={width: 16, depth: 1}",
        "generator.training.steps=10", "generator.sampling={ar_steps: 2, head_steps: 1}",
        "generator.evaluation={images: 6, references: 12}",
    ]  # fmt: skip
    assert main(["cache", str(autoencoder_recipe)]) == 0
    assert len(open_latents(run / "latents", autoencoder)) == 60
    assert main(["train", str(autoencoder_recipe), *small]) == 0
    assert (
        main(
            ["generate", "--weights", str(run / "model"), "--count", "3", "--out", str(tmp_path / "grid.png")]
        )
        == 0
    )
    assert (tmp_path / "grid.png").stat().st_size > 100


def test_publishing_leaves_the_config_of_the_average_unchanged(
    autoencoder_recipe: Path, tmp_path: Path, image_set: Path
) -> None:
    task = AutoencoderTask(load_recipe(autoencoder_recipe).autoencoder, image_set)
    ema = Autoencoder(task.module.config)
    task.publish(ema, tmp_path / "published", 0, {})
    assert ema.config == task.module.config
    published = load_autoencoder(tmp_path / "published", device="cpu")
    assert published.config.scale != ema.config.scale
    for name, tensor in published.state_dict().items():
        assert torch.equal(tensor, ema.state_dict()[name]), name


def test_images_are_mirrored_only_with_flip(autoencoder_recipe: Path, image_set: Path) -> None:
    images = read_images(ShardReader(image_set / "train", "images"), torch.arange(60))
    found = {}
    for flip in ("true", "false"):
        recipe = load_recipe(autoencoder_recipe, [f"autoencoder.flip={flip}"])
        task = AutoencoderTask(recipe.autoencoder, image_set)
        batches = [task.batch(number, torch.Generator().manual_seed(number)) for number in range(5)]
        drawn = torch.cat(batches)
        assert len(drawn) == 40
        as_stored, mirrored = (
            (drawn.unsqueeze(1) == each).flatten(2).all(dim=2).any(dim=1)
            for each in (images, images.flip(-1))
        )
        assert (as_stored | mirrored).all()
        found[flip] = int((mirrored & ~as_stored).sum())
    assert 8 < found["true"] < 32
    assert found["false"] == 0


def test_noise_follows_each_channels_scale_and_each_images_level() -> None:
    generator, scales = torch.Generator().manual_seed(0), torch.tensor([0.1, 1.0, 30.0]).view(3, 1, 1)
    latents = torch.randn(4000, 3, 8, 8, generator=generator) * scales + 5
    noise = (noisy(latents, 0.6, generator) - latents) / scales
    torch.testing.assert_close(noise.mean(dim=(0, 2, 3)), torch.zeros(3), atol=0.01, rtol=0)
    # Levels are uniform from 0 to 0.6: of mean 0.3 and mean square 0.12.
    assert noise.square().mean(dim=(0, 2, 3)).tolist() == pytest.approx([0.12] * 3, rel=0.05)
    levels = noise.flatten(1).std(dim=1)
    assert levels.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist() == pytest.approx(
        [0.15, 0.3, 0.45], abs=0.02
    )


@pytest.mark.parametrize("level", [0.0, 0.5])
def test_decoder_sees_latents_with_noise_in_training(
    level: float, autoencoder_recipe: Path, image_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(autoencoder_recipe, [f"autoencoder.loss.latent_noise={level}"])
    task = AutoencoderTask(recipe.autoencoder, image_set)
    with torch.no_grad():
        task.module.quant_conv.weight[4:], task.module.quant_conv.bias[4:] = 0, -30.0  # draws equal the mean
    seen, decode = [], task.module.decode
    monkeypatch.setattr(task.module, "decode", lambda latents: seen.append(latents) or decode(latents))
    batch = task.batch(0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        task.loss(0, batch, torch.Generator().manual_seed(0))
        mean = task.module.encode(batch).mean
    noise = (seen[0] - mean).std(dim=(0, 2, 3)) / mean.std(dim=(0, 2, 3))
    assert ((noise > 0.2 * level) & (noise < level + 1e-4)).all()


def test_figures_are_printed_after_training_and_for_a_finished_run(
    autoencoder_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["train-autoencoder", str(autoencoder_recipe), "autoencoder.training.steps=1"]
    assert main(command) == 0
    assert "psnr" in capsys.readouterr().out.splitlines()[-1]
    assert main([*command, "--resume"]) == 0
    done, figures = capsys.readouterr().out.splitlines()
    assert "step 1" in done
    assert "psnr" in figures


def test_image_sizes_that_the_stride_does_not_divide_are_rejected(
    autoencoder_recipe: Path, capsys: pytest.CaptureFixture
) -> None:
    override = "autoencoder.model={width: 8, width_multipliers: [1, 1, 1, 1, 1], norm_groups: 2}"
    assert (
        main(["train-autoencoder", str(autoencoder_recipe), override, "autoencoder.training.steps=1"]) == 0
    )  # 16 pixels, stride 16
    with pytest.raises(InputError, match="stride 16"):
        Autoencoder(AutoencoderConfig(width=8, width_multipliers=(1,) * 5, norm_groups=2)).encode(
            torch.zeros(1, 3, 24, 16)
        )
    capsys.readouterr()


def test_kl_equals_that_of_torch_distributions() -> None:
    moments = torch.randn(3, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    posterior = Posterior(moments)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(posterior.mean, (0.5 * posterior.logvar).exp()),
        torch.distributions.Normal(0.0, 1.0),
    )
    torch.testing.assert_close(posterior.kl(), exact.sum(dim=(1, 2, 3)))
    generator = torch.Generator().manual_seed(1)
    samples = torch.stack(
        [posterior.sample(torch.randn(3, 4, 2, 2, generator=generator)) for _ in range(3000)]
    )
    torch.testing.assert_close(samples.mean(dim=0), posterior.mean, atol=0.2, rtol=0)
    torch.testing.assert_close(samples.var(dim=0).log(), posterior.logvar, atol=0.2, rtol=0)


@pytest.mark.parametrize(
    "values",
    [
        {"width_multipliers": (1, 1)}, {"width_multipliers": (1,) * 6}, {"width_multipliers": (1, 0, 1)},
        {"width": 0},
        {"latent_channels": 0}, {"norm_groups": 7}, {"shift": (0.0, 1.0)}, {"scale": 0.0},
        {"scale": (1.0, 1.0)}, {"scale": (1.0,) * 15 + (0.0,)}, {"scale": (1.0,) * 15 + (-1.0,)},
    ],
)  # fmt: skip
def test_invalid_sizes_are_rejected(values: dict) -> None:
    with pytest.raises(InputError):
        AutoencoderConfig(**values)


@pytest.mark.parametrize(("levels", "stride"), [(3, 4), (4, 8), (5, 16)])
def test_stride_doubles_with_each_level(levels: int, stride: int) -> None:
    autoencoder = Autoencoder(
        AutoencoderConfig(
            width=4, width_multipliers=(1,) * levels, blocks=1, latent_channels=3, norm_groups=2
        )
    )
    images = torch.zeros(2, 3, 2 * stride, 3 * stride)
    assert autoencoder.encode(images).mean.shape == (2, 3, 2, 3)
    assert autoencoder.decode(torch.zeros(2, 3, 2, 3)).shape == images.shape


@torch.no_grad()
def test_spherical_autoencoders_encode_onto_the_sphere_and_decode_directions() -> None:
    torch.manual_seed(0)
    config = AutoencoderConfig(
        width=8, width_multipliers=(1, 1, 2), blocks=1, latent_channels=3, norm_groups=4
    )
    plain, spherical = Autoencoder(config), Autoencoder(dataclasses.replace(config, spherical=True))
    spherical.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected, found = plain.encode(images), spherical.encode(images)
    torch.testing.assert_close(found.mean.norm(dim=1), torch.full((2, 4, 4), 3**0.5))
    torch.testing.assert_close(found.mean / 3**0.5, expected.mean / expected.mean.norm(dim=1, keepdim=True))
    assert torch.equal(found.logvar, expected.logvar)
    # A spherical decoder first normalizes its latents.
    torch.testing.assert_close(
        spherical.decode(7 * found.mean), plain.decode(found.mean), rtol=1e-4, atol=1e-5
    )


def test_spherical_latents_keep_scale_and_shift(image_set: Path) -> None:
    config = AutoencoderConfig(
        width=8, width_multipliers=(1, 1, 2), blocks=1, latent_channels=3, norm_groups=4, spherical=True
    )
    reader = ShardReader(image_set / "train", "images")
    found = latent_statistics(Autoencoder(config), partial(read_images, reader), torch.arange(10))
    assert found == {"scale": 1.0, "shift": 0.0}
