"""Adversarial training of the autoencoder, and training of its decoder alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import newest
from torch import nn

from far.cli.main import main
from far.data.image_sets import read_images
from far.data.latents import open_latents
from far.folder import load_autoencoder, save_autoencoder
from far.recipe import load_recipe
from far.training.autoencoder import AutoencoderTask
from far.training.discriminator import Discriminator, adaptive_weight, adversarial_losses
from far.training.log import Meter
from far.training.loop import Trainer

ADVERSARIAL = [
    "autoencoder.loss.adversarial_weight=0.5", "autoencoder.loss.adversarial_start=5",
    "autoencoder.discriminator={width: 8, layers: 1, learning_rate: 1.0e-3}",
]  # fmt: skip


@pytest.fixture
def decoder_recipe(tmp_path: Path, image_set: Path, autoencoder_folder: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
data: {image_set}
run: {tmp_path / "run"}
autoencoder:
  model: {{width: 8, width_multipliers: [1, 1, 2], blocks: 1, latent_channels: 2, norm_groups: 4}}
  loss: {{perceptual_weight: 0.1, evaluation_images: 4}}
  training:
    {{steps: 10, batch_size: 4, learning_rate: 3.0e-3, warmup_steps: 2, ema_decay: 0.9, log_every: 1,
     checkpoint_every: 100, evaluate_every: 100, dtype: float32}}
  start_from: {autoencoder_folder}
  stage: decoder
""")
    return path


def make_task(path: Path, *overrides: str) -> AutoencoderTask:
    recipe = load_recipe(path, overrides)
    return AutoencoderTask(recipe.autoencoder, Path(recipe.data))


def images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def norm(gradients: list[torch.Tensor]) -> float:
    return float(torch.cat([gradient.flatten() for gradient in gradients]).norm())


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_logit_depends_on_its_patch_and_on_no_other_image(layers: int, patch: int) -> None:
    torch.manual_seed(0)
    discriminator, x = Discriminator(8, layers), images(2, 96).requires_grad_()
    torch.testing.assert_close(discriminator(x)[1:], discriminator(x[1:]))
    for index, layer in enumerate(discriminator.body):  # its statistics are of the whole image
        if isinstance(layer, nn.GroupNorm):
            discriminator.body[index] = nn.Identity()
    logits = discriminator(x)
    middle = logits.shape[-1] // 2
    [gradient] = torch.autograd.grad(logits[0, 0, middle, middle], x)
    assert not gradient[1].any()
    rows, columns = gradient[0].abs().sum(dim=0).nonzero().unbind(dim=1)
    assert int(rows.max() - rows.min()) + 1 == int(columns.max() - columns.min()) + 1 == patch


def test_one_backward_pass_gives_each_network_its_own_gradient() -> None:
    torch.manual_seed(0)
    discriminator, real = Discriminator(8, 1), images(3, 16)
    fake = images(3, 16, seed=1).requires_grad_()
    losses = adversarial_losses(discriminator, real, fake)
    (0.3 * losses["adversarial"] + losses["discriminator"]).backward()

    # Reference: separate passes. The hinge loss is in Lim and Ye 2017 (arXiv 1705.02894).
    logits_real, logits_fake = discriminator(real), discriminator(fake.detach())
    hinge = ((1 - logits_real).clamp(min=0).mean() + (1 + logits_fake).clamp(min=0).mean()) / 2
    expected = torch.autograd.grad(hinge, list(discriminator.parameters()))
    for parameter, gradient in zip(discriminator.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)
    [expected_fake] = torch.autograd.grad(-0.3 * discriminator(fake).mean(), fake)
    torch.testing.assert_close(fake.grad, expected_fake)


@pytest.mark.parametrize("factor", [1.0, 1e-6])
def test_adaptive_weight_is_the_ratio_of_gradient_norms(factor: float) -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    # Gradients (3, 4) and (0, 2) times the factor; VQGAN adds 1e-4 to the norm of the second.
    loss, adversarial = factor * (3 * weight[0] + 4 * weight[1]), factor * weight[1].square() / 2
    expected = 5 * factor / (2 * factor + 1e-4)
    assert float(adaptive_weight(loss, adversarial, weight)) == pytest.approx(expected, rel=1e-5)


def test_adversarial_term_pulls_as_strongly_as_its_weight_says(decoder_recipe: Path) -> None:
    plain = make_task(decoder_recipe)
    task = make_task(decoder_recipe, *ADVERSARIAL)
    last, batch = task.module.decoder.conv_out.weight, images(4, 16)

    def gradient(of: AutoencoderTask, step: int) -> torch.Tensor:
        loss, _ = of.loss(step, batch, torch.Generator().manual_seed(0))
        return torch.autograd.grad(loss, of.module.decoder.conv_out.weight)[0]

    before = gradient(plain, 0)
    assert torch.equal(gradient(task, 4), before)
    assert norm([gradient(task, 5) - before]) == pytest.approx(0.5 * norm([before]), rel=0.01)
    assert last.grad is None


def test_discriminator_learns_to_tell_images_from_reconstructions(decoder_recipe: Path) -> None:
    task = make_task(decoder_recipe, *ADVERSARIAL, "autoencoder.loss.adversarial_weight=1.0e-6")
    assert task.discriminator is not None
    optimizer = torch.optim.AdamW(task.discriminator.parameters(), lr=1e-3)
    for step in range(40):
        batch = task.batch(step, torch.Generator().manual_seed(step))
        loss, terms = task.loss(5, batch, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert terms["discriminator"] < 0.3
    assert terms["logits_fake"] < -0.5 < 0.5 < terms["logits_real"]


@pytest.mark.parametrize("options", [[], ADVERSARIAL], ids=["plain", "adversarial"])
def test_decoder_stage_keeps_encoder_and_latents(
    options: list[str], decoder_recipe: Path, autoencoder_folder: Path, tmp_path: Path, latents_folder: Path
) -> None:
    assert main(["train-autoencoder", str(decoder_recipe), *options]) == 0
    before, after = (load_autoencoder(path) for path in (autoencoder_folder, tmp_path / "run/autoencoder"))
    assert after.config == before.config
    assert after.same_latents(before)
    for name, tensor in before.state_dict().items():
        trained = name.startswith(("decoder.", "post_quant_conv."))
        assert torch.equal(tensor, after.state_dict()[name]) is not trained, name
    # A cache of the first autoencoder is valid for the second.
    open_latents(latents_folder, after)
    x = read_images(make_task(decoder_recipe).held_out, torch.arange(4))
    with torch.no_grad():
        assert torch.equal(before.encode(x).mean, after.encode(x).mean)
    entries = [json.loads(line) for line in (tmp_path / "run/autoencoder/log.jsonl").read_text().splitlines()]
    logged = {"adversarial", "discriminator", "adaptive_weight", "logits_real", "logits_fake"}
    for entry in entries[:10]:
        assert logged & entry.keys() == (logged if options and entry["step"] > 5 else set())


def test_step_trains_both_networks_and_clips_each_gradient_alone(
    decoder_recipe: Path, tmp_path: Path
) -> None:
    task = make_task(decoder_recipe, *ADVERSARIAL, "autoencoder.training.gradient_clip=1.0e-3")
    trainer = Trainer(task, task.loop, tmp_path / "run")
    trainer.step = 5
    assert task.discriminator is not None
    first_layers = [task.module.decoder.conv_in.weight, next(task.discriminator.parameters())]
    before = [layer.detach().clone() for layer in first_layers]
    trainer.train_step(Meter())
    assert not any(torch.equal(old, layer) for old, layer in zip(before, first_layers))
    for network in (task.module, task.discriminator):
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        assert norm(gradients) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(("saved_at", "dtype"), [(3, "float32"), (7, "float16")])
def test_adversarial_run_resumes_exactly(
    saved_at: int, dtype: str, decoder_recipe: Path, tmp_path: Path
) -> None:
    """Before and after the step at which the discriminator's training starts."""
    folders = [tmp_path / "whole", tmp_path / "parts"]

    def trainer(folder: Path) -> Trainer:
        task = make_task(decoder_recipe, *ADVERSARIAL, f"autoencoder.training.dtype={dtype}")
        return Trainer(task, task.loop, folder)

    trainer(folders[0]).run()
    first = trainer(folders[1])
    for _ in range(saved_at):
        first.train_step(Meter())
    first.save()
    second = trainer(folders[1])
    second.restore(resume=True)
    assert second.step == saved_at
    second.run()
    assert second.skipped_steps < 3  # float16 starts with a loss factor that is too large
    whole, parts = (newest(folder)["tensors"] for folder in folders)
    assert whole.keys() == parts.keys()
    assert {name.partition(".")[0] for name in whole} == {"module", "ema", "optimizer", "discriminator"}
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("autoencoder.start_from=null", "start_from"),
        ("autoencoder.start_from=nowhere", "nowhere"),
        ("autoencoder.model.latent_channels=4", "latent_channels"),
        ("autoencoder.loss.adversarial_weight=-1.0", "-1.0"),
        ("autoencoder.loss.adversarial_start=-1", "-1"),
        ("autoencoder.loss.latent_noise=-0.5", "-0.5"),
        ("autoencoder.discriminator={width: 6}", "width 6"),
        ("autoencoder.discriminator={layers: 0}", "layers 0"),
        ("autoencoder.discriminator={learning_rate: 0.0}", "learning_rate 0.0"),
        ("autoencoder.discriminator={layers: 3}", "layers 3"),
    ],
)
def test_wrong_values_are_rejected_in_one_line(
    override: str, named: str, decoder_recipe: Path, capsys: pytest.CaptureFixture
) -> None:
    options = [*ADVERSARIAL, override]
    assert main(["train-autoencoder", str(decoder_recipe), *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert named in line


def test_resuming_from_another_autoencoder_is_rejected(
    decoder_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train-autoencoder", str(decoder_recipe)]) == 0
    other = load_autoencoder(tmp_path / "run/autoencoder")
    nn.init.zeros_(other.quant_conv.weight)
    save_autoencoder(other, tmp_path / "other")
    capsys.readouterr()
    options = [f"autoencoder.start_from={tmp_path / 'other'}", "autoencoder.training.steps=12", "--resume"]
    assert main(["train-autoencoder", str(decoder_recipe), *options]) == 2
    assert "start_from" in capsys.readouterr().err


def test_run_that_started_from_an_autoencoder_resumes_without_it(
    decoder_recipe: Path, autoencoder_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(autoencoder_folder, tmp_path / "source")
    scale = load_autoencoder(tmp_path / "source").config.scale
    options = [
        "train-autoencoder", str(decoder_recipe), f"autoencoder.start_from={tmp_path / 'source'}",
        "autoencoder.training.schedule=constant",
    ]  # fmt: skip
    whole, half = ([*options, f"run={tmp_path / name}"] for name in ("whole", "half"))
    assert main(whole) == 0
    assert main([*half, "autoencoder.training.steps=5"]) == 0
    shutil.rmtree(tmp_path / "source")
    assert main([*half, "--resume"]) == 0
    folders = [tmp_path / name / "autoencoder" for name in ("whole", "half")]
    expected, resumed = (newest(folder) for folder in folders)
    assert expected["step"] == resumed["step"] == 10
    for name, tensor in expected["tensors"].items():
        assert torch.equal(resumed["tensors"][name], tensor), name
    assert [load_autoencoder(folder).config.scale for folder in folders] == [scale, scale]
