"""Packed linear layers compute exactly what plain ones do and are saved as such; 8-bit ones approximate."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import far
from far.backbone import BlockCausalConfig
from far.backbone.causal import CausalConfig
from far.backbone.masked import MaskedConfig
from far.errors import InputError
from far.heads import ShortcutConfig
from far.kernels import INT8_KERNELS, Int8Kernel, bfloat16_fault, int8_fault, int8_weight, no_int8
from far.model import FAR, ModelConfig, NetworkConfig
from far.names import BUNDLED
from far.packing import (
    Int8Linear,
    PackedLinear,
    pack_linear_layers,
    quantize_linear_layers,
)
from far.precision import resolve_dtype
from far.sampling import SamplingConfig, SeededNoise, sample
from far.weights import save_tensors

BACKBONES = [
    MaskedConfig(32, 1, 2, 32, 1, 2, 2),
    CausalConfig(width=32, depth=2, heads=2),
    BlockCausalConfig("block_causal", 32, 1, 1, 2),
]
packing = pytest.mark.skipif(
    bfloat16_fault() is not None, reason="the processor has no bfloat16 matrix instructions"
)
integers = pytest.mark.skipif(
    no_int8() is not None, reason="this build of torch has no 8-bit matrix products"
)


@packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (7,), (3, 5), (4, 0), (128,), (2, 300)])
def test_packed_product_equals_the_plain_one_bit_for_bit(shape: tuple[int, ...], bias: bool) -> None:
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


@packing
def test_other_dtypes_and_layers_are_not_packed() -> None:
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Conv2d(4, 4, 1, dtype=torch.bfloat16)})
    pack_linear_layers(module)
    assert type(module["a"]) is nn.Linear
    assert type(module["b"]) is nn.Conv2d


@packing
@pytest.mark.parametrize("backbone", BACKBONES, ids=[config.kind for config in BACKBONES])
def test_packed_model_draws_the_same_tokens(
    backbone: MaskedConfig | CausalConfig | BlockCausalConfig,
) -> None:
    torch.manual_seed(0)
    plain = FAR(ModelConfig(NetworkConfig(backbone, ShortcutConfig(16, 1, 2), patch=2), 3, 2, (4, 4))).eval()
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
            sample(
                model,
                torch.tensor([0, 1]),
                SeededNoise([3, 4], torch.device("cpu")),
                SamplingConfig(steps, 2, 2.0),
            )
            for model in (plain, packed)
        ]
    assert torch.equal(*drawn)


@packing
def test_packed_model_is_saved_with_plain_weights(tmp_path: Path) -> None:
    pipeline = far.Pipeline.from_pretrained("avatars-64", dtype="bfloat16")
    assert any(isinstance(module, PackedLinear) for module in pipeline.model.modules())
    pipeline.save_pretrained(tmp_path)
    plain = load_file(BUNDLED / "avatars-64" / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == plain.keys()
    assert all(torch.equal(saved[name], plain[name].to(torch.bfloat16)) for name in plain)


@packing
def test_packed_tensors_can_be_saved_in_another_dtype(tmp_path: Path) -> None:
    linear = nn.Linear(16, 8).to(torch.bfloat16)
    save_tensors(tmp_path / "x.safetensors", PackedLinear(linear).state_dict(), torch.float32)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["weight"], linear.weight.float())


# --- Eight bits
# ----------------------------------------------------------------------------------------------


def integer_product(linear: nn.Linear, x: torch.Tensor, kernel: Int8Kernel) -> torch.Tensor:
    """Return the layer's output from products of integers, in float64."""
    integers, weight_scales = int8_weight(linear.weight, kernel)
    scales = x.double().abs().amax(dim=-1, keepdim=True) / 127
    product = (x / scales).round() @ integers.double().T
    return product * scales * weight_scales + (0 if linear.bias is None else linear.bias)


@integers
@torch.no_grad()
@pytest.mark.parametrize("kernel", INT8_KERNELS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (2,), (7,), (3, 5), (130,)])
def test_int8_products_equal_products_of_integers(
    shape: tuple[int, ...], bias: bool, kernel: Int8Kernel
) -> None:
    if int8_fault(kernel):
        pytest.skip(f"{kernel}: {int8_fault(kernel)}")
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(96, 80, bias=bias)
    x = torch.randn(*shape, 96, generator=generator) * torch.rand(*shape, 1, generator=generator) * 10
    found = Int8Linear(linear, kernel)(x)
    # A value halfway between two whole numbers may be rounded to either.
    step = (x.abs().amax(dim=-1, keepdim=True) / 127 * linear.weight.abs().max()).double()
    assert ((found - integer_product(linear, x, kernel)).abs() <= 2 * step + 1e-6).all()
    assert (found - integer_product(linear, x, kernel)).abs().mean() < 0.02 * step.mean()
    assert (found - linear(x)).std() < 0.02 * linear(x).std()


@integers
@torch.no_grad()
def test_row_of_an_int8_product_does_not_depend_on_the_others() -> None:
    layer = Int8Linear(nn.Linear(96, 80))
    x = torch.randn(4, 96) * torch.tensor([[1.0], [1e3], [1e-3], [0.0]])
    for row in range(4):
        torch.testing.assert_close(layer(x[row : row + 1])[0], layer(x)[row], rtol=1e-6, atol=1e-7)
    assert torch.equal(layer(x)[3], layer.bias)


@integers
@pytest.mark.parametrize("name", ["avatars-64", "avatars-64-causal"])
def test_int8_model_draws_nearly_the_same_images(name: str) -> None:
    steps = {"ar_steps": 4} if name == "avatars-64" else {}
    exact, low = (
        far.load(name, dtype=dtype).generate([3, 5], seed=1, output="tensor", **steps)
        for dtype in ("float32", "int8")
    )
    difference = (low - exact).abs().mean()
    assert 1e-5 < difference < 0.03


@integers
def test_narrow_layers_are_not_quantized() -> None:
    module = nn.ModuleDict({"narrow": nn.Linear(16, 256), "wide": nn.Linear(256, 256)})
    quantize_linear_layers(module)
    assert type(module["narrow"]) is nn.Linear
    assert isinstance(module["wide"], Int8Linear)
    assert module["wide"].nbytes == 256 * 256 + 4 * 256


@integers
def test_int8_model_cannot_be_saved(tmp_path: Path) -> None:
    pipeline = far.Pipeline.from_pretrained("avatars-64", dtype="int8")
    with pytest.raises(InputError, match="int8"):
        pipeline.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_dtypes_and_int8_on_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("far.precision.resolve_device", torch.device)
    for dtype, device in (("half", "cpu"), ("int8", "cuda:0")):
        with pytest.raises(InputError) as error:
            resolve_dtype(dtype, device)
        assert dtype in str(error.value)
        assert "\n" not in str(error.value)
