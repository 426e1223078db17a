"""Trainings that start from a trained model, or train a head on its frozen backbone."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import newest
from conftest import RENAMED
from hub_server import serve, use
from refusals import refused

from far.autoencoder import Autoencoder
from far.autoencoder_config import AutoencoderConfig
from far.backbone import BlockCausalConfig, CausalConfig, MaskedConfig
from far.classes import imagenet_classes, matched_classes
from far.cli.main import main
from far.folder import load_autoencoder
from far.heads import ShortcutConfig
from far.model import FAR, ModelConfig, NetworkConfig
from far.pipeline import Pipeline
from far.recipe import load_recipe
from far.sampling_config import SamplingConfig
from far.training.generator import GeneratorTask
from far.training.log import Meter
from far.training.loop import Trainer
from far.training.start import copy_model, match_embeddings

BLOCK_CAUSAL = BlockCausalConfig(width=16, encoder_depth=1, decoder_depth=1, heads=2)


@pytest.fixture
def joint(recipe: Path) -> Path:
    """Train briefly a model with a diffusion head, whose backbone other trainings copy."""
    options = ["generator.network.head.kind=diffusion", "generator.training.dtype=auto"]
    assert main(["train", str(recipe), "model=joint", *options]) == 0
    return recipe.parent / "run" / "joint"


def task(path: Path, *overrides: str) -> GeneratorTask:
    recipe = load_recipe(path, overrides)
    autoencoder = load_autoencoder(recipe.autoencoder_folder)
    return GeneratorTask(
        recipe.generator, Path(recipe.data), recipe.latents_folder, autoencoder, recipe.model_folder
    )


def trainer(path: Path, *overrides: str) -> Trainer:
    """Return the training of a recipe, to be run step by step."""
    trained, recipe = task(path, *overrides), load_recipe(path, overrides)
    return Trainer(trained, recipe.generator.training, recipe.model_folder)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["train", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("far: error: ")]
    return line


def assert_equal_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    theirs = b.state_dict()
    assert a.state_dict().keys() == theirs.keys()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_frozen_backbone_stays_and_the_head_is_trained(recipe: Path, joint: Path) -> None:
    assert main(["train", str(recipe), "model=frozen", f"generator.frozen_backbone={joint}"]) == 0
    before = Pipeline.from_pretrained(joint).model
    frozen = Pipeline.from_pretrained(recipe.parent / "run" / "frozen")
    after = frozen.model
    assert frozen.training["backbone"] == Pipeline.from_pretrained(joint).training != {}
    assert frozen.training["recipe"]["frozen_backbone"] == "joint", "the name only, not the path"
    assert after.config.network.head.kind == "shortcut"
    for (name, old), new in zip(before.backbone.state_dict().items(), after.backbone.state_dict().values()):
        assert torch.equal(old, new), name
    fresh = after.head.network.state_dict()
    assert any(
        tensor.abs().max() > 0 for name, tensor in fresh.items() if "out" in name or "final" in name
    ), "the head did not move"
    entries = [
        json.loads(line) for line in (recipe.parent / "run" / "frozen" / "log.jsonl").read_text().splitlines()
    ]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < losses[0]


def test_run_with_a_frozen_backbone_resumes(recipe: Path, joint: Path) -> None:
    options = [str(recipe), f"generator.frozen_backbone={joint}"]
    assert main(["train", *options, "model=whole"]) == 0
    assert main(["train", *options, "model=half", "generator.training.steps=10"]) == 0
    assert main(["train", *options, "model=half", "--resume"]) == 0
    whole, half = (
        Pipeline.from_pretrained(recipe.parent / "run" / name).model.state_dict()
        for name in ("whole", "half")
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(half[name], tensor, msg=name)


def test_run_is_not_resumed_with_another_frozen_backbone(
    recipe: Path, pipeline_folder: Path, tmp_path: Path
) -> None:
    first = trainer(recipe, f"generator.frozen_backbone={pipeline_folder}")
    first.train_step(Meter())
    first.save()
    other, another = Pipeline.from_pretrained(pipeline_folder), tmp_path / "other" / pipeline_folder.name
    with torch.no_grad():
        next(other.model.backbone.parameters()).mul_(2)
    other.save_pretrained(another)  # of the same name
    with refused("step-00000001", "frozen_backbone"):
        trainer(recipe, f"generator.frozen_backbone={another}").restore(resume=True)
    moved = shutil.copytree(pipeline_folder, tmp_path / "moved")
    trainer(recipe, f"generator.frozen_backbone={moved}").restore(resume=True)


def test_new_head_that_guides_needs_images_without_their_class(recipe: Path, pipeline_folder: Path) -> None:
    options = [f"generator.start_from={pipeline_folder}", "generator.label_drop=0"]
    options.append("generator.sampling.guidance=3.0")
    task(recipe, *options)  # the copied head may have learned it
    with refused("label_drop"):
        task(recipe, *options, "generator.network.head.kind=flow")


@pytest.mark.parametrize(
    ("options", "random"),
    [
        (["frozen_backbone={}"], False),
        (["start_from={}", "freeze=[backbone]"], False),
        (["start_from={}", "freeze=[class_embedding, head]"], True),
        (["start_from={}", "adapter_rank=2"], True),
        ([], True),
    ],
)
def test_only_a_backbone_in_training_drops_values(
    options: list[str], random: bool, recipe: Path, pipeline_folder: Path
) -> None:
    trained = trainer(recipe, *(f"generator.{option.format(pipeline_folder)}" for option in options)).task
    with torch.no_grad():  # the values of a new head do not depend on z
        for parameter in trained.module.head.parameters():  # type: ignore[union-attr]
            parameter.add_(0.1 * torch.randn_like(parameter))
    losses = []
    for seed in (0, 1):  # dropout draws from torch's default generator
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(0)
        losses.append(trained.loss(0, trained.batch(0, generator), generator)[0])
    assert bool(losses[0] != losses[1]) == random


@pytest.mark.parametrize(
    "override",
    [
        "generator.network.backbone.encoder_width=32",
        "generator.network.patch=1",
        "generator.network.spherical=true",
    ],
)
def test_backbone_of_other_sizes_is_rejected(
    recipe: Path, joint: Path, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe), "model=other", f"generator.frozen_backbone={joint}", override]) == 2
    assert str(joint) in capsys.readouterr().err.splitlines()[-1]


def test_missing_backbone_is_rejected(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "generator.frozen_backbone=nowhere"]) == 2
    assert "'nowhere'" in capsys.readouterr().err.splitlines()[-1]


def test_backbone_of_other_classes_or_another_autoencoder_is_rejected(
    recipe: Path, joint: Path, renamed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal([str(recipe), *renamed, f"generator.frozen_backbone={joint}"], capsys)
    for part in (str(joint), str(tmp_path / "other" / "latents"), "'square'", "'rings'"):
        assert part in line
    # The backbone's folder with an autoencoder that encodes differently.
    pipeline = Pipeline.from_pretrained(joint)
    assert pipeline.autoencoder is not None
    with torch.no_grad():
        pipeline.autoencoder.encoder.conv_in.weight.mul_(1.1)
    pipeline.save_pretrained(tmp_path / "moved")
    line = refusal([str(recipe), "model=third", f"generator.frozen_backbone={tmp_path / 'moved'}"], capsys)
    assert str(tmp_path / "moved") in line
    assert "autoencoder" in line
    # In float16 it is the same autoencoder.
    Pipeline.from_pretrained(joint).save_pretrained(tmp_path / "half", torch.float16)
    assert main(["train", str(recipe), "model=fourth", f"generator.frozen_backbone={tmp_path / 'half'}"]) == 0


def test_training_starts_from_the_averaged_weights_of_a_model(recipe: Path, pipeline_folder: Path) -> None:
    source, started = (
        Pipeline.from_pretrained(pipeline_folder),
        task(recipe, f"generator.start_from={pipeline_folder}"),
    )
    assert_equal_weights(started.module, source.model)
    assert all(parameter.requires_grad for parameter in started.module.parameters())
    name = started.training["recipe"]["start_from"]
    assert name == pipeline_folder.name, "the name only, not the path"
    # Keys that change training but not what the weights compute may differ.
    values = ["generator.network.backbone.dropout=0.0", "generator.network.backbone.mask_ratio_min=0.1"]
    assert_equal_weights(
        task(recipe, f"generator.start_from={pipeline_folder}", *values).module, source.model
    )


@pytest.mark.parametrize(
    "backbone",
    [MaskedConfig(16, 1, 2, 16, 1, 2, 1), CausalConfig(width=16, depth=1, heads=2), BLOCK_CAUSAL],
    ids=type,
)
def test_backbone_may_differ_in_every_fraction_and_noise_of_its_training(
    backbone: MaskedConfig | CausalConfig | BlockCausalConfig, tmp_path: Path
) -> None:
    """Keys of type float change how a backbone is trained, not what its weights compute."""
    config = ModelConfig(NetworkConfig(backbone, ShortcutConfig(16, 1)), 2, 4, (2, 2))
    source = Pipeline(FAR(config), None, ["a", "b"], SamplingConfig(ar_steps=4))
    source.save_pretrained(tmp_path / "source")
    values = {
        field.name: getattr(backbone, field.name) / 2
        for field in dataclasses.fields(backbone)
        if isinstance(getattr(backbone, field.name), float)
    }
    assert len(values) > 1
    network = dataclasses.replace(config.network, backbone=dataclasses.replace(backbone, **values))
    module, autoencoder = FAR(dataclasses.replace(config, network=network)), Autoencoder(AutoencoderConfig())
    copy_model(module, str(tmp_path / "source"), autoencoder, ["a", "b"], Path("latents"))
    assert_equal_weights(module, source.model)


def test_training_starts_from_a_bundled_model() -> None:
    source = Pipeline.from_pretrained("avatars-64-causal", device="cpu")
    assert source.autoencoder is not None
    module = FAR(source.model.config)
    copy_model(module, "avatars-64-causal", source.autoencoder, source.classes, Path("latents"))
    assert_equal_weights(module, source.model)


def test_head_of_another_kind_starts_fresh_and_this_is_printed(
    recipe: Path, diffusion_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Pipeline.from_pretrained(diffusion_folder)
    source.training = {"data": "birds"}
    source.save_pretrained(tmp_path / "birds")
    started = task(recipe, f"generator.start_from={tmp_path / 'birds'}")
    assert_equal_weights(started.module.backbone, source.model.backbone)
    assert_equal_weights(started.module.head, task(recipe).module.head)
    assert main(["train", str(recipe), f"generator.start_from={tmp_path / 'birds'}"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "birds" in line]
    assert "diffusion" in line
    card = (recipe.parent / "run" / "model" / "README.md").read_text()
    assert line.rpartition(": started from ")[2] in card
    assert "| data | birds |" in card


def test_classes_are_matched_by_name_and_new_ones_start_from_the_mean(
    recipe: Path, pipeline_folder: Path, renamed: list[str]
) -> None:
    options = [*renamed, f"generator.start_from={pipeline_folder}"]
    source = Pipeline.from_pretrained(pipeline_folder)
    circle, square, stripes, null = source.model.backbone.class_embedding.weight  # type: ignore[misc, union-attr]
    started = task(recipe, *options)
    rows = started.module.backbone.class_embedding.weight
    assert (source.classes, RENAMED) == (["circle", "square", "stripes"], ["circle", "rings", "square"])
    for row, expected in zip(rows, (circle, (circle + square + stripes) / 3, square, null), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(row, expected)
    for part in ("2 classes", "rings", "stripes"):
        assert part in started.training["started from"]


def test_equal_classes_keep_their_embeddings_although_names_repeat() -> None:
    trained = torch.randn(4, 5)
    names = ["crane", "crane", "maillot"]
    assert torch.equal(match_embeddings(trained, matched_classes(names, names)), trained)


def test_classes_of_imagenet_are_matched_by_word_or_by_wordnet_id() -> None:
    words = list(imagenet_classes().values())
    ours = ["golden retriever", "n01818515", "my dog", "n02012849", "n03126707"]
    assert matched_classes(words, ours) == [207, 88, None, 134, 517]
    with refused("crane", "n02012849", "n03126707"):
        matched_classes(words, ["crane"])
    with refused("crane"):
        matched_classes(["crane", "crane"], ["crane"])
    assert matched_classes(["a", "b"], ["n01818515"]) == [None]
    assert matched_classes(["n02099601", "n01818515"], ["macaw", "mine", "golden retriever"]) == [1, None, 0]
    with refused("macaw", "n01818515"):
        matched_classes(words, ["macaw", "n01818515"])


def test_training_starts_from_a_model_of_the_hub(
    recipe: Path, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as hub:
        use(hub, monkeypatch, tmp_path / "cache")
        hub.commit("someone/model", {path.name: path.read_bytes() for path in pipeline_folder.iterdir()})
        started = task(recipe, "generator.start_from=someone/model")
    assert_equal_weights(started.module, Pipeline.from_pretrained(pipeline_folder).model)
    assert started.training["recipe"]["start_from"] == "someone/model"


def test_every_difference_of_the_network_is_named(recipe: Path, pipeline_folder: Path) -> None:
    other = ["generator.network.backbone.encoder_heads=4", "generator.network.backbone.buffer=3"]
    with refused(pipeline_folder, "encoder_heads=2", "buffer=2"):
        task(recipe, f"generator.start_from={pipeline_folder}", *other)


@pytest.mark.parametrize(
    "override",
    [
        "network.backbone.encoder_width=32",
        "network.backbone.encoder_heads=4",
        "network.backbone={kind: causal, width: 16, depth: 1, heads: 2}",
        "network.patch=1",
        "network.spherical=true",
    ],
)
def test_start_from_a_model_of_another_network_is_refused(
    recipe: Path, pipeline_folder: Path, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal([str(recipe), f"generator.start_from={pipeline_folder}", f"generator.{override}"], capsys)
    assert str(pipeline_folder) in line
    if "causal" in override:
        assert "network.backbone.kind=masked (here causal)" in line
        assert "network.backbone.encoder_depth=1" in line
    else:
        assert override.partition("=")[0] in line


def test_start_from_a_model_of_another_autoencoder_or_image_size_is_refused(
    recipe: Path, pipeline_folder: Path, tmp_path: Path
) -> None:
    pipeline = Pipeline.from_pretrained(pipeline_folder)
    assert pipeline.autoencoder is not None
    with torch.no_grad():
        pipeline.autoencoder.encoder.conv_in.weight.mul_(1.1)
    pipeline.save_pretrained(tmp_path / "moved")
    with refused(tmp_path / "moved", "autoencoder", "encoder's weights"):
        task(recipe, f"generator.start_from={tmp_path / 'moved'}")
    pipeline.autoencoder.config = dataclasses.replace(pipeline.autoencoder.config, scale=3.0)
    pipeline.save_pretrained(tmp_path / "scaled")
    with refused(tmp_path / "scaled", "autoencoder", "scale"):
        task(recipe, f"generator.start_from={tmp_path / 'scaled'}")
    larger = dataclasses.replace(pipeline.model.config, grid=(8, 8))
    with refused(pipeline_folder, [4, 4], [8, 8]):
        copy_model(FAR(larger), str(pipeline_folder), pipeline.autoencoder, pipeline.classes, Path("latents"))


def test_start_from_and_frozen_backbone_exclude_each_other(recipe: Path) -> None:
    with refused("start_from", "frozen_backbone"):
        load_recipe(recipe, ["generator.start_from=a", "generator.frozen_backbone=b"])


def test_run_that_started_from_a_model_resumes_without_it(
    recipe: Path, pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pipeline_folder, tmp_path / "source")
    training = ["schedule=constant", "checkpoint_every=5", "steps=10"]
    options = [str(recipe), f"generator.start_from={tmp_path / 'source'}"]
    options += [f"generator.training.{value}" for value in training]
    run = recipe.parent / "run"
    assert main(["train", *options, "model=whole"]) == 0
    assert main(["train", *options, "model=half", "generator.training.steps=5"]) == 0
    assert "source" in refusal([str(recipe), "model=half", "--resume"], capsys)
    shutil.rmtree(tmp_path / "source")
    assert main(["train", *options, "model=half", "--resume"]) == 0
    whole, half = newest(run / "whole"), newest(run / "half")
    assert whole["step"] == half["step"] == 10
    for name, tensor in whole["tensors"].items():
        assert torch.equal(half["tensors"][name], tensor), name
    facts = [Pipeline.from_pretrained(run / name).training for name in ("whole", "half")]
    assert facts[0] == facts[1]
    assert "source" in facts[0]["started from"]
