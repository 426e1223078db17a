"""The model card: what it tells is what the folder holds, and what somebody wrote is kept."""

import json
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
from far.card import may_replace, model_card, write_card


@pytest.fixture
def folder(pipeline_folder: Path, tmp_path: Path) -> Path:
    pipeline = Pipeline.from_pretrained(pipeline_folder)
    pipeline.results = {"step": 2600, "quick FD (some network)": 421.6123}
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_hub_reads_its_entries(folder: Path) -> None:
    data = ModelCard(model_card(folder, "ann/shapes", "cc-by-nc-4.0")).data.to_dict()
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == (
        "cc-by-nc-4.0",
        "far",
        "unconditional-image-generation",
    )
    assert {"masked", "shortcut"} <= set(data["tags"])
    assert "license" not in ModelCard(model_card(folder)).data.to_dict()


def test_figures_are_those_of_the_model(folder: Path) -> None:
    pipeline, card = Pipeline.from_pretrained(folder), (folder / "README.md").read_text()
    assert pipeline.autoencoder is not None
    for name, module in (("generator", pipeline.model), ("autoencoder", pipeline.autoencoder)):
        assert (
            f"| parameters of the {name} | {sum(tensor.numel() for tensor in module.state_dict().values()):,} |"
            in card
        )
    image = pipeline.generate([0])[0]
    assert f"| images | {image.width} × {image.height} pixels |" in card
    assert (
        f"| tokens | {pipeline.model.config.tokens} of {pipeline.model.config.token_channels} channels |"
        in card
    )
    assert "3 classes: circle, square, stripes." in card
    assert "| ar_steps | 4 |" in card
    assert "| quick FD (some network) | 421.61 |" in card


@pytest.mark.parametrize("classes", [None, ["1", "2", "3"], ["a", "a", "b"], ["number=1", "b", "c"]])
def test_a_name_or_the_folder_in_the_code_which_runs(
    classes: list[str] | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline.from_pretrained(folder)
    pipeline.classes = classes or pipeline.classes
    pipeline.save_pretrained(folder)
    assert 'far.load("ann/shapes@v1")' in model_card(folder, "ann/shapes@v1")
    monkeypatch.chdir(folder)
    (block,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    expected = pipeline.generate([0], seed=0)[0]
    assert np.array_equal(np.asarray(Image.open("picture.png")), np.asarray(expected))


def test_what_is_not_known_is_left_out(folder: Path) -> None:
    pipeline = Pipeline.from_pretrained(folder)
    pipeline.results, pipeline.autoencoder = {}, None
    pipeline.save_pretrained(folder.parent / "bare")
    card = (folder.parent / "bare" / "README.md").read_text()
    for absent in (
        "## Results",
        "## Training",
        "## Licence",
        "license:",
        "far.load",
        "pixels",
        "parameters of the autoencoder",
        "None, ",
    ):
        assert absent not in card
    assert "far convert kl16" in card


def test_the_training_of_what_it_began_from_is_told_too(folder: Path) -> None:
    pipeline = Pipeline.from_pretrained(folder)
    backbone = {"command": "far train", "data": "Some images", "recipe": {"label_drop": 0.25}}
    pipeline.training = {"command": "far distill", "teacher": {"data": "Other images", "backbone": backbone}}
    pipeline.save_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert [line for line in card.splitlines() if line.startswith("#") and "raining" in line] == [
        "## Training",
        "### Training of the teacher that it began from",
        "#### Training of the backbone that it began from",
    ]
    assert (
        card.index("far distill")
        < card.index("Other images")
        < card.index("Some images")
        < card.index("label_drop: 0.25")
    )


def test_many_classes_are_cut_short(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "classes": [f"c{number}" for number in range(1000)]})
    )
    card = model_card(folder)
    assert "1000 classes: c0, c1," in card
    assert "c19 … (all in `config.json`)" in card
    assert "c20" not in card


@pytest.mark.parametrize(
    "change",
    [lambda text: text + "More.", lambda text: "More.\n" + text, lambda text: text.replace("image", "IMAGE")],
)
def test_a_changed_card_is_kept_and_an_own_one_renewed(folder: Path, change: object) -> None:
    own = (folder / "README.md").read_text()
    write_card(folder, "ann/shapes", "mit")
    renewed = (folder / "README.md").read_text()
    assert renewed != own
    changed = change(renewed)  # type: ignore[operator]
    (folder / "README.md").write_text(changed)
    Pipeline.from_pretrained(folder).save_pretrained(folder, torch.float16)
    assert (folder / "README.md").read_text() == changed


def test_what_may_be_replaced(folder: Path) -> None:
    own = (folder / "README.md").read_text()
    for card in (own, "", "\n", "---\nlicense: mit\n---\n", "---\nlicense: mit\ntags:\n- a\n---"):
        assert may_replace(card), card
    for card in (
        "# Mine",
        "---\nlicense: mit\n---\n# Mine",
        own.replace("\n", "\n\n", 1),
        own[:-1],
        "a <!-- b -->\n",
        "---\nno end",
    ):
        assert not may_replace(card), card


def test_a_card_that_cannot_be_written_is_one_line(folder: Path) -> None:
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    with pytest.raises(InputError, match=r"README\.md"):
        write_card(folder)


def test_a_bundled_model_tells_its_training_and_that_of_its_backbone(tmp_path: Path) -> None:
    pipeline = far.load("avatars-64")
    assert isinstance(pipeline, Pipeline)
    pipeline.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"][-2:] == ["masked", "flow_map"]
    head, backbone = card.split("### Training of the backbone that it began from")
    assert "| data | DiceBear styles, CC0 1.0 |" in head
    assert "| finished steps | 1000 |" in head
    assert "| finished steps | 2600 |" in backbone
    recipes = [yaml.safe_load(part.split("```yaml\n")[1].split("```")[0]) for part in (head, backbone)]
    assert [recipe["network"]["head"]["kind"] for recipe in recipes] == ["flow_map", "shortcut"]
