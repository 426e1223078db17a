"""The model card states what the folder holds, and a handwritten card is kept."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

import far
from far import InputError, Pipeline
from far.card import may_replace, model_card
from far.folder import ModelFolder
from far.model import FAR


@pytest.fixture
def folder(pipeline_folder: Path, tmp_path: Path) -> Path:
    pipeline = Pipeline.from_pretrained(pipeline_folder)
    pipeline.results = {"step": 2600, "quick FD (some network)": 421.6123}
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def card(folder: Path, name: str | None = None, license: str | None = None) -> str:
    return model_card(folder, ModelFolder.open(folder).config, name, license)


def test_the_hub_reads_its_entries(folder: Path) -> None:
    data = ModelCard(card(folder, "ann/shapes", "cc-by-nc-4.0")).data.to_dict()
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == (
        "cc-by-nc-4.0",
        "far",
        "unconditional-image-generation",
    )
    assert {"masked", "shortcut"} <= set(data["tags"])
    assert "license" not in ModelCard(card(folder)).data.to_dict()


def test_numbers_in_the_card_are_those_of_the_model(folder: Path) -> None:
    pipeline, text = Pipeline.from_pretrained(folder), (folder / "README.md").read_text()
    assert pipeline.autoencoder is not None
    for name, module in (("generator", pipeline.model), ("autoencoder", pipeline.autoencoder)):
        count = sum(tensor.numel() for tensor in module.state_dict().values())
        assert f"| parameters of the {name} | {count:,} |" in text
    image, config = pipeline.generate([0])[0], pipeline.model.config
    assert f"| images | {image.width} × {image.height} pixels |" in text
    assert f"| tokens | {config.tokens} of {config.token_channels} channels |" in text
    assert "3 classes: circle, square, stripes." in text
    assert "| ar_steps | 4 |" in text
    assert "| quick FD (some network) | 421.61 |" in text


@pytest.mark.parametrize("classes", [None, ["1", "2", "3"], ["a", "a", "b"], ["number=1", "b", "c"]])
def test_code_in_the_card_runs_and_draws_the_models_images(
    classes: list[str] | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline.from_pretrained(folder)
    pipeline.classes = classes or pipeline.classes
    pipeline.save_pretrained(folder)
    assert 'far.load("ann/shapes@v1")' in card(folder, "ann/shapes@v1")
    monkeypatch.chdir(folder)
    (block,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    expected = pipeline.generate([0], seed=0)[0]
    assert np.array_equal(np.asarray(Image.open("image.png")), np.asarray(expected))


def test_unknown_facts_are_left_out(folder: Path) -> None:
    pipeline = Pipeline.from_pretrained(folder)
    pipeline.results, pipeline.autoencoder = {}, None
    pipeline.save_pretrained(folder.parent / "bare")
    text = (folder.parent / "bare" / "README.md").read_text()
    for absent in (
        "Results",
        "Training",
        "License",
        "license:",
        "far.load",
        "pixels",
        "of the autoencoder",
        "None",
    ):
        assert absent not in text
    assert "far convert kl16" in text


def test_training_of_the_models_it_started_from_is_shown_too(folder: Path) -> None:
    pipeline = Pipeline.from_pretrained(folder)
    backbone = {"command": "far train", "data": "Some images", "recipe": {"label_drop": 0.25}}
    pipeline.training = {"command": "far distill", "teacher": {"data": "Other images", "backbone": backbone}}
    pipeline.save_pretrained(folder)
    text = (folder / "README.md").read_text()
    levels = [line.partition(" ")[0] for line in text.splitlines() if re.match("#+ Training", line)]
    assert levels == ["##", "###", "####"]
    facts = ("far distill", "Other images", "Some images", "label_drop: 0.25")
    assert sorted(facts, key=text.index) == list(facts)


def test_card_shows_every_value_of_the_recipe(folder: Path) -> None:
    recipe = {"label_drop": 0.25, "network": {"head": {"kind": "flow", "steps": [1, 2]}}, "data": "a: b"}
    pipeline = Pipeline.from_pretrained(folder)
    pipeline.training = {"recipe": recipe}
    pipeline.save_pretrained(folder)
    text = (folder / "README.md").read_text()
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == recipe


def test_only_some_of_many_classes_are_listed(folder: Path) -> None:
    pipeline = Pipeline.from_pretrained(folder)
    config = dataclasses.replace(pipeline.model.config, classes=1000)
    pipeline.model, pipeline.classes = FAR(config), [f"c{number}" for number in range(1000)]
    pipeline.save_pretrained(folder)
    text = (folder / "README.md").read_text()
    assert "1000 classes: c0, c1," in text
    assert "c19" in text
    assert "c20" not in text


def test_generated_card_is_renewed_and_one_without_its_mark_is_kept(folder: Path) -> None:
    pipeline, path = Pipeline.from_pretrained(folder), folder / "README.md"
    pipeline.results = {"step": 2700}
    pipeline.save_pretrained(folder)
    renewed = path.read_text()
    assert "| step | 2700 |" in renewed
    (mark,) = [line for line in renewed.splitlines() if line.startswith("<!--")]
    own = renewed.replace(mark + "\n", "")
    path.write_text(own)
    pipeline.save_pretrained(folder, torch.float16)
    assert path.read_text() == own


def test_empty_cards_may_be_replaced_and_others_may_not() -> None:
    for text in ("", "\n", "---\nlicense: mit\n---\n", "---\nlicense: mit\ntags:\n- a\n---"):
        assert may_replace(text), text
    for text in ("# Mine", "---\nlicense: mit\n---\n# Mine", "a <!-- b -->\n", "---\nno end"):
        assert not may_replace(text), text


def test_card_that_cannot_be_written_is_named_in_one_line(folder: Path) -> None:
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    with pytest.raises(InputError, match=r"README\.md") as error:
        Pipeline.from_pretrained(folder).save_pretrained(folder)
    assert "\n" not in str(error.value)


def test_bundled_models_card_shows_its_training_and_that_of_its_backbone(tmp_path: Path) -> None:
    far.load("avatars-64-mar").save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["tags"][-2:] == ["block_causal", "diffusion"]
    head, backbone = re.split("^### Training of the backbone.*$", text, flags=re.MULTILINE)
    assert "| data | DiceBear styles, CC0 1.0 |" in head
    assert "| finished steps | 1500 |" in head
    assert "| finished steps | 6000 |" in backbone
    recipes = [yaml.safe_load(part.split("```yaml\n")[1].split("```")[0]) for part in (head, backbone)]
    assert [recipe["network"]["head"]["kind"] for recipe in recipes] == ["diffusion", "shortcut"]
