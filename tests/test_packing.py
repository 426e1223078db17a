"""Packed linear layers compute what plain ones do, and are saved as if they had never been packed."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import far
from far.backbone.causal import CausalConfig
from far.backbone.masked import MaskedConfig
from far.heads import HeadConfig
from far.model import FAR, ModelConfig, NetworkConfig
from far.packing import PackedLinear, can_pack, pack_linear_layers
from far.sampling import SamplingConfig, SeededNoise, sample
from far.weights import save_tensors

BACKBONES = [MaskedConfig(32, 1, 2, 32, 1, 2, 2), CausalConfig(width=32, depth=2, heads=2)]
pytestmark = pytest.mark.skipif(not can_pack(), reason="the processor has no bfloat16 matrix instructions")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (7,), (3, 5), (4, 0), (128,), (2, 300)])
def test_the_product_is_the_same_to_the_bit(shape: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(48, 80, bias=bias).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_(generator=generator)
        x = torch.randn(*shape, 48, generator=generator).to(torch.bfloat16)
        packed = PackedLinear(linear)
        assert packed(x).shape == linear(x).shape
        assert torch.equal(packed(x), linear(x))
    assert torch.equal(packed.weight.to_dense(), linear.weight)


def test_other_dtypes_and_other_layers_stay() -> None:
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Conv2d(4, 4, 1, dtype=torch.bfloat16)})
    pack_linear_layers(module)
    assert type(module["a"]) is nn.Linear
    assert type(module["b"]) is nn.Conv2d


@pytest.mark.parametrize("backbone", BACKBONES, ids=[config.kind for config in BACKBONES])
def test_a_packed_model_draws_the_same_tokens(backbone: MaskedConfig | CausalConfig) -> None:
    torch.manual_seed(0)
    plain = FAR(ModelConfig(NetworkConfig(backbone, HeadConfig("shortcut", 16, 1, 2), patch=2), 3, 2, (4, 4))).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain = plain.to(torch.bfloat16)
    packed = copy.deepcopy(plain)
    pack_linear_layers(packed)
    assert not any(type(module) is nn.Linear for module in packed.modules())
    steps = packed.config.tokens
    with torch.no_grad():
        drawn = [
            sample(model, torch.tensor([0, 1]), SeededNoise([3, 4], torch.device("cpu")), SamplingConfig(steps, 2, 2.0))
            for model in (plain, packed)
        ]
    assert torch.equal(*drawn)


def test_a_packed_model_is_saved_plain(tmp_path: Path) -> None:
    pipeline = far.Pipeline.from_pretrained("avatars-64", dtype="bfloat16")
    assert any(isinstance(module, PackedLinear) for module in pipeline.model.modules())
    pipeline.save_pretrained(tmp_path)
    plain = load_file(far.pipeline.find_folder("avatars-64") / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == plain.keys()
    assert all(torch.equal(saved[name], plain[name].to(torch.bfloat16)) for name in plain)


def test_tensors_of_a_packed_module_are_saved_in_another_dtype(tmp_path: Path) -> None:
    linear = nn.Linear(16, 8).to(torch.bfloat16)
    save_tensors(tmp_path / "x.safetensors", PackedLinear(linear).state_dict(), torch.float32)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["weight"], linear.weight.float())
