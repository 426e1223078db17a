"""Low-rank adapters change nothing at first, are the only trained weights, and merge into plain layers."""

import copy

import pytest
import torch
from torch import Tensor, nn

from far.backbone.backbone import Backbone
from far.pipeline import Pipeline
from far.training.adapters import AdaptedLinear, adapters, add_adapters, merged

RANK = 2


@pytest.fixture(params=["diffusion_folder", "causal_diffusion_folder"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return Pipeline.from_pretrained(request.getfixturevalue(request.param)).model.backbone


def outputs(backbone: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens, positions = torch.randn(5, 4, 8, generator=generator), torch.arange(4).expand(5, -1)
    return backbone(tokens, positions[:, :2], positions[:, 2:3], torch.tensor([0, 1, 2, 3, 0]))  # type: ignore[operator]


def stir(parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def test_new_adapters_change_no_output(backbone: Backbone) -> None:
    before = outputs(backbone)
    linear = [layer for layer in backbone.modules() if isinstance(layer, nn.Linear)]
    add_adapters(backbone, RANK)
    torch.testing.assert_close(outputs(backbone), before, rtol=1e-6, atol=1e-6)
    added = adapters(backbone)
    assert len(added) == 2 * len(linear), "every linear layer is adapted"
    assert sum(adapter.numel() for adapter in added) == sum(
        RANK * (layer.in_features + layer.out_features) for layer in linear
    )
    trained = {id(parameter) for parameter in backbone.parameters() if parameter.requires_grad}
    assert trained == {id(adapter) for adapter in added}


def test_training_step_changes_adapters_only(backbone: Backbone) -> None:
    add_adapters(backbone, RANK)
    before = copy.deepcopy(backbone.state_dict())
    for _ in range(2):  # in the first one, the gradient of ``down`` is zero
        backbone.zero_grad()
        outputs(backbone).square().sum().backward()
        torch.optim.SGD(adapters(backbone), lr=0.01).step()
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.endswith((".up", ".down")), name


def test_merged_backbone_is_plain_with_equal_outputs(backbone: Backbone) -> None:
    plain = copy.deepcopy(backbone)
    add_adapters(backbone, RANK)
    stir(adapters(backbone))
    before, expected = copy.deepcopy(backbone.state_dict()), outputs(backbone)
    plain_again = merged(backbone)
    assert not any(isinstance(layer, AdaptedLinear) for layer in plain_again.modules())
    assert list(plain_again.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(outputs(plain_again), expected, rtol=1e-4, atol=1e-5)
    assert float((expected - outputs(plain)).detach().abs().max()) > 0.05
    plain.load_state_dict(plain_again.state_dict())
    torch.testing.assert_close(outputs(plain), expected, rtol=1e-4, atol=1e-5)
    # The original is unchanged.
    assert list(backbone.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert torch.equal(outputs(backbone), expected)


def test_adapted_linear_layer_equals_its_formula() -> None:
    layer = nn.Linear(3, 2)
    adapted = AdaptedLinear(layer, 1)
    stir([adapted.up, adapted.down])
    x = torch.randn(4, 3)
    torch.testing.assert_close(adapted(x), x @ (layer.weight + adapted.up @ adapted.down).T + layer.bias)
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
