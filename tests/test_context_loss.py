"""``benchmarks.context_loss``: losses against a closed form, and the contexts that it gives a backbone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.context_loss import context_losses
from far.pipeline import Pipeline
from tests.refusals import refused

IMAGES = 2 * torch.rand(300, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 1
LABELS = torch.arange(300) % 3


@pytest.fixture
def pipeline(pipeline_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(pipeline_folder, device="cpu")


@torch.no_grad()
def test_a_velocity_of_zero_loses_the_second_moments_of_token_and_noise(pipeline: Pipeline) -> None:
    for parameter in pipeline.model.head.network.output.parameters():  # type: ignore[union-attr]
        parameter.zero_()
    assert pipeline.autoencoder is not None
    posterior = pipeline.autoencoder.encode(IMAGES)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    tokens = pipeline.model.tokens(pipeline.autoencoder.normalize(posterior.sample(noise)))
    losses = {
        order: context_losses(pipeline, IMAGES, LABELS, order, samples=8, seed=0)
        for order in ("raster", "halton", "random")
    }
    expected = tokens.square().mean(dim=(0, 2)) + 1  # E‖x − ε‖² per channel, by position
    torch.testing.assert_close(losses["raster"], expected, rtol=0.05, atol=0)
    for order in ("halton", "random"):  # the same tokens, noise and times in another order
        torch.testing.assert_close(losses[order].sum(), losses["raster"].sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("order", ["raster", "halton", "random"])
def test_each_token_is_predicted_once_from_those_before_it(pipeline: Pipeline, order: str) -> None:
    calls: list[tuple[Tensor, Tensor]] = []
    pipeline.model.backbone.register_forward_pre_hook(
        lambda module, inputs: calls.append((inputs[1], inputs[2]))
    )
    context_losses(pipeline, IMAGES[:7], LABELS[:7], order, samples=1, seed=0)
    drawn = torch.cat([query for _, query in calls], dim=1)
    assert torch.equal(drawn.sort(dim=1).values, torch.arange(4).expand(7, -1))
    for count, (known, _) in enumerate(calls):
        assert torch.equal(known, drawn[:, :count])
    if order == "raster":
        assert torch.equal(drawn[0], torch.arange(4))
    if order == "random":
        assert len(drawn.unique(dim=0)) > 1


def test_causal_models_are_refused_other_orders(causal_diffusion_folder: Path) -> None:
    pipeline = Pipeline.from_pretrained(causal_diffusion_folder, device="cpu")
    with refused("halton", "causal"):
        context_losses(pipeline, IMAGES[:1], LABELS[:1], "halton", samples=1, seed=0)
