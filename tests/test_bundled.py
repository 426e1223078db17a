"""The bundled models are what their recipes say, small enough to be carried by everyone, and draw what they are asked for."""

from pathlib import Path

import pytest
import torch

import far
from far.evaluation.features import load_feature_network
from far.pipeline import BUNDLED
from far.recipe import load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
NAMES = sorted(folder.name for folder in BUNDLED.iterdir())
# The last of the recipes that made each.
MADE_BY = {"avatars-64": "avatars-64-head", "avatars-64-causal": "avatars-64-causal"}


@pytest.mark.parametrize("name", NAMES)
def test_size_and_recipe(name: str) -> None:
    assert sum(file.stat().st_size for file in (BUNDLED / name).iterdir()) <= 30e6
    pipeline, recipe = far.load(name), load_recipe(RECIPES / f"{MADE_BY[name]}.yaml")
    assert pipeline.model.config.network == recipe.generator.network
    assert pipeline.defaults == recipe.generator.sampling


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_classes_look_alike_within_and_differ_between(name: str) -> None:
    """In the feature network's eyes, images of planets are nearer to each other than to images of voxel robots."""
    pipeline = far.load(name)
    labels = ["planets"] * 8 + ["voxel-bot"] * 8
    images = pipeline.generate(labels=labels, seed=0, output="tensor")
    features = torch.nn.functional.normalize(load_feature_network()(images) - load_feature_network()(images).mean(dim=0), dim=1)
    likeness = features @ features.T
    within = (likeness[:8, :8].sum() + likeness[8:, 8:].sum() - 16) / (2 * 8 * 7)
    assert float(within) > float(likeness[:8, 8:].mean()) + 0.5
