"""Bundled models fit their recipes, are small, and draw images of the given class."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import far
from far.errors import InputError
from far.evaluation.features import load_feature_network
from far.folder import load_autoencoder
from far.heads import FlowConfig
from far.model import FAR
from far.names import BUNDLED
from far.pipeline import Pipeline
from far.precision import prepare, prepare_autoencoder
from far.recipe import load_recipe
from far.sampling import SamplingConfig

NAMES = sorted(folder.name for folder in BUNDLED.iterdir())
# The last of the recipes that made each.
MADE_BY = {
    "avatars-64": "avatars-64",
    "avatars-64-causal": "avatars-64-causal",
    "avatars-64-mar": "avatars-64-mar",
}


@pytest.mark.parametrize("name", NAMES)
def test_bundled_model_is_small_and_made_by_its_recipe(name: str) -> None:
    assert sum(file.stat().st_size for file in (BUNDLED / name).iterdir()) <= 30e6
    pipeline, recipe = far.load(name), load_recipe(MADE_BY[name])
    assert pipeline.model.config.network == recipe.generator.network
    assert pipeline.defaults == recipe.generator.sampling


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_images_of_a_class_are_more_similar_than_those_of_two(name: str) -> None:
    """Features of planets are nearer to each other than to those of voxel robots."""
    pipeline = far.load(name)
    labels = ["planets"] * 8 + ["voxel-bot"] * 8
    # A diffusion head's 100 steps would take most of the time of this test.
    steps = 20 if pipeline.model.config.network.head.kind == "diffusion" else pipeline.defaults.head_steps
    images = pipeline.generate(labels=labels, seed=0, output="tensor", head_steps=steps)
    features = load_feature_network()(images)
    features = torch.nn.functional.normalize(features - features.mean(dim=0), dim=1)
    likeness = features @ features.T
    within = (likeness[:8, :8].sum() + likeness[8:, 8:].sum() - 16) / (2 * 8 * 7)
    assert float(within) > float(likeness[:8, 8:].mean()) + 0.5


@pytest.mark.parametrize("name", ["avatars-64-causal", "avatars-64-mar"])
def test_bundled_models_share_the_autoencoder_of_the_first(name: str) -> None:
    assert not (BUNDLED / name / "autoencoder.safetensors").exists()
    ours, theirs = load_autoencoder(BUNDLED / name), load_autoencoder(BUNDLED / "avatars-64")
    assert ours.config == theirs.config
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in ours.state_dict().items())


# --- A model that shares tensors with a bundled one -------------------------------------------------------


def with_other_head() -> Pipeline:
    """Return the bundled model with an untrained head."""
    trained = Pipeline.from_pretrained("avatars-64")
    config = trained.model.config
    network = dataclasses.replace(config.network, head=FlowConfig(16, 1))
    model = FAR(dataclasses.replace(config, network=network))
    model.backbone.load_state_dict(trained.model.backbone.state_dict())
    return Pipeline(model, trained.autoencoder, trained.classes, SamplingConfig(4, 2))


def test_with_a_base_only_changed_tensors_are_written_and_all_are_loaded(tmp_path: Path) -> None:
    pipeline = with_other_head()
    pipeline.save_pretrained(tmp_path / "whole", torch.float16)
    pipeline.save_pretrained(tmp_path / "head", torch.float16, base="avatars-64")
    assert {path.name for path in (tmp_path / "head").iterdir()} == {"config.json", "model.safetensors"}
    assert all(name.startswith("head.") for name in load_file(tmp_path / "head" / "model.safetensors"))
    whole, head = Pipeline.from_pretrained(tmp_path / "whole"), Pipeline.from_pretrained(tmp_path / "head")
    assert torch.equal(
        whole.generate([3], output="tensor"),
        head.generate([3], output="tensor"),
    )
    head.save_pretrained(tmp_path / "again", torch.float16)
    for name in ("model.safetensors", "autoencoder.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (
            "saved without a base, it is whole"
        )


def test_weights_packed_for_inference_are_compared_by_their_values(tmp_path: Path) -> None:
    pipeline = with_other_head()
    assert pipeline.autoencoder is not None
    pipeline.model, pipeline.autoencoder = (
        prepare(pipeline.model, "bfloat16", "cpu"),
        prepare_autoencoder(pipeline.autoencoder, "bfloat16", "cpu"),
    )
    pipeline.save_pretrained(tmp_path, base="avatars-64")
    again = Pipeline.from_pretrained(tmp_path, dtype="bfloat16")
    assert torch.equal(
        again.generate([3], output="tensor"),
        pipeline.generate([3], output="tensor"),
    )


def test_autoencoder_of_a_base_is_loaded(tmp_path: Path) -> None:
    with_other_head().save_pretrained(tmp_path, base="avatars-64")
    ours, theirs = load_autoencoder(tmp_path), load_autoencoder(BUNDLED / "avatars-64")
    assert ours.config == theirs.config
    assert torch.equal(ours.decoder.conv_out.weight, theirs.decoder.conv_out.weight)


def test_autoencoder_that_differs_from_the_base_is_written(tmp_path: Path) -> None:
    pipeline = with_other_head()
    with torch.no_grad():
        pipeline.autoencoder.decoder.conv_out.bias.add_(1.0)  # type: ignore[union-attr, operator]
    pipeline.save_pretrained(tmp_path, base="avatars-64")
    again = Pipeline.from_pretrained(tmp_path)
    assert torch.equal(again.autoencoder.decoder.conv_out.bias, pipeline.autoencoder.decoder.conv_out.bias)  # type: ignore[union-attr]


def test_autoencoder_with_another_scale_than_the_base_is_written(tmp_path: Path) -> None:
    pipeline = with_other_head()
    assert pipeline.autoencoder is not None
    pipeline.autoencoder.config = dataclasses.replace(pipeline.autoencoder.config, scale=0.5)
    pipeline.save_pretrained(tmp_path, base="avatars-64")
    assert load_autoencoder(tmp_path).config == pipeline.autoencoder.config


@pytest.mark.parametrize(
    "base",
    [
        {"weights": "avatars-64", "sha256": {"model.safetensors": "0" * 64}},
        {"weights": "../bundled/avatars-64", "sha256": {}},
        {"weights": "/etc", "sha256": {}},
        {"weights": ["avatars-64"]},
        "avatars-64",
    ],
)
def test_base_that_is_not_the_bundled_model_is_refused(base: object, tmp_path: Path) -> None:
    with_other_head().save_pretrained(tmp_path, base="avatars-64")
    config = json.loads((tmp_path / "config.json").read_text())
    config["base"] = base
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="base"):
        Pipeline.from_pretrained(tmp_path)


def test_base_must_be_bundled(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'elsewhere'"):
        with_other_head().save_pretrained(tmp_path / "out", base="elsewhere")
    assert not (tmp_path / "out").exists()


def test_base_must_be_whole(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'avatars-64-mar'.*'avatars-64'"):
        with_other_head().save_pretrained(tmp_path / "out", base="avatars-64-mar")
    assert not (tmp_path / "out").exists()


def test_tensor_that_the_base_has_in_another_shape_is_named(tmp_path: Path) -> None:
    with_other_head().save_pretrained(tmp_path, base="avatars-64")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["head.network.output.linear.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"head\.network\.output\.linear\.weight"):
        Pipeline.from_pretrained(tmp_path)
