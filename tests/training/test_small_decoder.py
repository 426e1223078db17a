"""Distillation of a small decoder: it learns the full decoder's images, everything else stays."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import far
from far.autoencoder_config import DECODERS
from far.cli.main import main
from far.data.image_sets import read_images
from far.data.latents import open_latents
from far.diffusers_format import to_diffusers
from far.errors import InputError
from far.evaluation.features import load_feature_network
from far.evaluation.generated import Generation, parts_folder
from far.evaluation.images import open_images
from far.evaluation.metrics import psnr
from far.folder import load_autoencoder
from far.recipe import load_recipe
from far.sampling import SamplingConfig
from far.training.autoencoder import AutoencoderTask


@pytest.fixture
def small_recipe(tmp_path: Path, image_set: Path, autoencoder_folder: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
data: {image_set}
run: {tmp_path / "run"}
autoencoder:
  model: {{width: 8, width_multipliers: [1, 1, 2], blocks: 1, latent_channels: 2, norm_groups: 4,
    small_decoder: {{width: 8, blocks: 1}}}}
  loss: {{perceptual_weight: 0.1, evaluation_images: 4}}
  training:
    {{steps: 20, batch_size: 4, learning_rate: 1.0e-2, warmup_steps: 2, ema_decay: 0.9, log_every: 5,
     checkpoint_every: 100, evaluate_every: 100, dtype: float32}}
  start_from: {autoencoder_folder}
  stage: small-decoder
""")
    return path


def make_task(path: Path, *overrides: str) -> AutoencoderTask:
    recipe = load_recipe(path, overrides)
    return AutoencoderTask(recipe.autoencoder, Path(recipe.data))


def test_loss_compares_with_the_full_decoders_images_of_the_same_latents(small_recipe: Path) -> None:
    task = make_task(small_recipe)
    batch = task.batch(0, torch.Generator().manual_seed(0))
    _, terms = task.loss(0, batch, torch.Generator().manual_seed(1))
    assert task.module.small_decoder is not None
    with torch.no_grad():
        posterior = task.module.encode(batch)
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
        latents = task.module.post_quant_conv(posterior.sample(noise))
        target, output = task.module.decoder(latents), task.module.small_decoder(latents)
    torch.testing.assert_close(terms["l1"].detach(), F.l1_loss(output, target))
    torch.testing.assert_close(terms["mse"].detach(), F.mse_loss(output, target))
    distance = task.features.perceptual_distance(output / 2 + 0.5, target / 2 + 0.5).mean()
    torch.testing.assert_close(terms["perceptual"].detach(), distance)


def test_adversarial_term_compares_with_the_full_decoders_images(small_recipe: Path) -> None:
    task = make_task(
        small_recipe, "autoencoder.loss.adversarial_weight=0.5",
        "autoencoder.discriminator={width: 8, layers: 1}",
    )  # fmt: skip
    batch = task.batch(0, torch.Generator().manual_seed(0))
    loss, terms = task.loss(0, batch, torch.Generator().manual_seed(1))
    loss.backward()
    with torch.no_grad():
        posterior = task.module.encode(batch)
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
        target = task.module.decode(posterior.sample(noise), "full")
        assert task.discriminator is not None
        torch.testing.assert_close(terms["logits_real"], task.discriminator(target).mean())


def test_stage_trains_the_small_decoder_alone(
    small_recipe: Path, autoencoder_folder: Path, latents_folder: Path, tmp_path: Path
) -> None:
    assert main(["train-autoencoder", str(small_recipe)]) == 0
    folder = tmp_path / "run/autoencoder"
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    before, after = load_autoencoder(autoencoder_folder), load_autoencoder(folder, decoder="small")
    tensors = after.state_dict()
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, tensors.pop(name)), name
    assert {name.partition(".")[0] for name in tensors} == {"small_decoder"}
    assert after.same_latents(before)
    assert after.config.scale == before.config.scale
    open_latents(latents_folder, after)  # the cache of the first autoencoder stays valid

    # The figures in config.json are those of the small decoder.
    images = read_images(make_task(small_recipe).held_out, torch.arange(4))
    with torch.no_grad():
        output = after.decode(after.encode(images).mean).clamp(-1, 1)
    results = json.loads((folder / "config.json").read_text())["results"]
    assert results["psnr"] == pytest.approx(float(psnr(output / 2 + 0.5, images / 2 + 0.5).mean()), abs=1e-3)

    # Another training of the full decoder removes the small one, which has learned the earlier images.
    options = ["autoencoder.model.small_decoder.width=0", f"autoencoder.start_from={folder}"]
    for stage, trained in (("decoder", {"decoder", "post_quant_conv"}), ("all", None)):
        task = make_task(small_recipe, *options, f"autoencoder.stage={stage}")
        assert task.module.small_decoder is None
        assert task.module.config.small_decoder.width == 0
        [group] = task.parameter_groups(task.loop)
        expected = {
            parameter for name, parameter in task.module.named_parameters()
            if trained is None or name.partition(".")[0] in trained
        }  # fmt: skip
        assert {*group["params"]} == expected

    # Diffusers knows no small decoder.
    for name, autoencoder in (("with", after), ("without", before)):
        to_diffusers(autoencoder, tmp_path / name)
    files = [
        (tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes() for name in ("with", "without")
    ]
    assert files[0] == files[1]


def test_pipeline_and_commands_decode_with_the_small_decoder(
    small_recipe: Path, pipeline_folder: Path, image_set: Path, tmp_path: Path
) -> None:
    assert main(["train-autoencoder", str(small_recipe), "autoencoder.training.steps=2"]) == 0
    pipeline = far.load(pipeline_folder)
    full = pipeline.generate([0, 1], output="tensor")
    pipeline.autoencoder = load_autoencoder(tmp_path / "run/autoencoder")
    assert torch.equal(pipeline.generate([0, 1], output="tensor"), full)
    model = tmp_path / "model"
    pipeline.save_pretrained(model)
    small = far.load(model, decoder="small").generate([0, 1], output="np")
    assert (small != far.load(model).generate([0, 1], output="np")).any()

    def arrays(decoder: str) -> object:
        out = tmp_path / f"{decoder}.npz"
        command = ["generate", "--weights", str(model), "--labels", "0", "1", "--decoder", decoder, "--dtype"]
        assert main([*command, "float32", "--out", str(out)]) == 0
        return open_images(out).tensor(range(2))

    expected = torch.from_numpy(small).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(arrays("small"), expected, atol=1 / 255 + 1e-6, rtol=0)

    # far evaluate measures the price. Parts of another decoder's images are not continued.
    out, figures = tmp_path / "evaluation", []
    for decoder in ("full", "small"):
        command = ["evaluate", "--images", str(image_set / "held-out"), "--autoencoder", str(model)]
        options = ["--reference", str(image_set), "--decoder", decoder, "--out", str(out)]
        assert main([*command, *options]) == 0
        result = json.loads((out / "result.json").read_text())
        assert result["evaluated"]["decoder"] == decoder
        figures.append(result["figures"]["PSNR"])
    assert abs(figures[0] - figures[1]) > 0.1
    network = load_feature_network()
    folders = {
        parts_folder(out, Generation(str(model), SamplingConfig(), 0, "float32", decoder=decoder), network)
        for decoder in DECODERS
    }
    assert len(folders) == 2


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("autoencoder.start_from=null", "start_from"),
        ("autoencoder.model.small_decoder.width=0", "width 0"),
        ("autoencoder.stage=decoder", "small_decoder"),
        ("autoencoder.stage=all", "small_decoder"),
        ("autoencoder.model.small_decoder={width: -1}", "width -1"),
        ("autoencoder.model.small_decoder={blocks: 0}", "blocks 0"),
    ],
)
def test_wrong_recipe_is_rejected_in_one_line(
    override: str, named: str, small_recipe: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train-autoencoder", str(small_recipe), override]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert named in line


def test_model_without_a_small_decoder_is_named(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for load in (far.load, far.load_autoencoder):
        with pytest.raises(InputError, match=str(pipeline_folder)):
            load(pipeline_folder, decoder="small")
    command = ["generate", "--weights", str(pipeline_folder), "--decoder", "small"]
    assert main([*command, "--out", str(tmp_path / "out.png")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert str(pipeline_folder) in line
    assert not (tmp_path / "out.png").exists()
