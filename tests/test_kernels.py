"""torch still has the private operators of far/kernels.py, and 8-bit products are exact, even on AVX2."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from far import kernels
from far.kernels import INT8_KERNELS, NO_BFLOAT16, Int8Kernel

x86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="fbgemm multiplies on x86 only"
)
# As on a processor without AVX-512: fbgemm, oneDNN and torch itself each have their own variable.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
OPERATORS = {
    "mkldnn::_is_mkldnn_bf16_supported": "() -> bool",
    "mkldnn::_reorder_linear_weight": "(Tensor, …) -> Tensor",
    "mkldnn::_linear_pointwise": "(Tensor, Tensor, Tensor?, str, Scalar?[], str?) -> Tensor",
    "quantized::linear_prepack": "(Tensor, Tensor?) -> packed weight",
    "quantized::linear_with_input_q_dq_qweight_dq_output_fp32": "(Tensor, float, int, packed weight) -> Tensor",  # noqa: E501
}


@x86
def test_torch_still_has_the_private_operators_that_kernels_calls() -> None:
    def exists(name: str) -> bool:
        library, _, operator = name.partition("::")
        return hasattr(getattr(torch.ops, library), operator)

    missing = [f"{name}{signature}" for name, signature in OPERATORS.items() if not exists(name)]
    assert not missing, f"torch {torch.__version__} has no {' and no '.join(missing)}: mend far/kernels.py"
    changed = "a signature or a layout has changed: mend far/kernels.py"
    reason = kernels.bfloat16_fault()
    assert reason in (None, NO_BFLOAT16), f"packed bfloat16 weights no longer work ({reason}), {changed}"
    reason = kernels.no_int8()
    assert reason is None, f"8-bit products no longer work ({reason}), {changed}"


@x86
@pytest.mark.parametrize("operator", OPERATORS)
def test_missing_operator_is_reported_in_one_line_and_not_used(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, _, name = operator.partition("::")
    if library == "mkldnn" and kernels.bfloat16_fault() and not name.startswith("_is"):
        pytest.skip("without bfloat16 instructions, the operator is never called")
    present = getattr(torch.ops, library)

    class Later:
        """A later release's operators: all but one."""

        def __getattr__(self, asked: str) -> object:
            if asked == name:
                raise AttributeError(f"no attribute {name!r}")
            return getattr(present, asked)

    monkeypatch.setattr(torch.ops, library, Later())
    fault = (
        kernels.bfloat16_fault.__wrapped__()
        if library == "mkldnn"
        else kernels.int8_fault.__wrapped__("paired")
    )
    assert fault is not None
    assert name in fault
    assert "\n" not in fault
    multiplies = name.startswith(("_linear", "linear_with"))
    assert len(kernels.product_operators()) == (1 if multiplies else 2)


@x86
@pytest.mark.parametrize("inputs", [1, 2, 3, 95, 96, 768])
def test_paired_weights_stay_within_sixteen_bits(inputs: int) -> None:
    weight = torch.randn(200, inputs, generator=torch.Generator().manual_seed(inputs))
    weight[:20] = weight[:20].abs()
    weight[20:40] = 1
    weight[40] = 0
    integers, scales = kernels.int8_weight(weight, "paired")
    padded = torch.nn.functional.pad(integers.int(), (0, inputs % 2)).unflatten(1, (-1, 2))
    # Inputs are 0 to 255: the largest sum of two products has positive weights only, the smallest negative
    # ones.
    assert (255 * padded.clamp(min=0).sum(dim=2)).max() < 2**15
    assert (255 * padded.clamp(max=0).sum(dim=2)).min() >= -(2**15)
    assert (integers * scales[:, None] - weight).abs().max() <= 0.5001 * scales.max()
    # No scale is coarser than these limits need.
    largest = torch.maximum(padded.abs().amax(dim=(1, 2)), padded.sum(dim=2).abs().amax(dim=1))
    assert (largest[weight.abs().amax(dim=1) > 0] >= 126).all()


@x86
@pytest.mark.parametrize("rows", [1, 2, 7, 130])
@pytest.mark.parametrize("kernel", INT8_KERNELS)
def test_kernel_gives_the_product_of_the_integers(kernel: Int8Kernel, rows: int) -> None:
    if kernels.int8_fault(kernel):
        pytest.skip(f"{kernel}: {kernels.int8_fault(kernel)}")
    generator = torch.Generator().manual_seed(rows)
    integers = torch.randint(-127, 128, (rows, 190), generator=generator)
    integers[0] = 127
    weight = torch.randn(80, 190, generator=generator)
    weight[0] = 1
    found = kernels.int8_product(integers / 127, kernels.pack_int8(weight, kernel))
    rounded, scales = kernels.int8_weight(weight, kernel)
    exact = (integers @ rounded.long().T).double() / 127 * scales
    # The operator multiplies an integer below 2²⁴ by a float32: a few roundings of 2⁻²⁴ each.
    assert ((found - exact).abs() <= 2**-21 * exact.abs().amax(dim=1, keepdim=True)).all()


def saturating(x: Tensor, weight: Tensor) -> Tensor:
    """Return the product of bytes ``x`` and 8-bit weights as AVX2: 16 bits hold two neighboring products."""
    pairs = x.unflatten(1, (-1, 2))[:, None] * weight.unflatten(1, (-1, 2))
    return pairs.sum(dim=3).clamp(-(2**15), 2**15 - 1).sum(dim=2)


def test_sixteen_bits_spoil_whole_weights_and_not_paired_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (
        torch.randn(64, 256, generator=generator),
        torch.randint(0, 256, (33, 256), generator=generator),
    )
    x[0], weight[0] = 255, 1
    whole, paired = (kernels.int8_weight(weight, kernel)[0].long() for kernel in INT8_KERNELS)
    assert torch.equal(saturating(x, paired), x @ paired.T)
    assert not torch.equal(saturating(x, whole), x @ whole.T)


REPORT = """
import json, torch
from far import kernels
torch.manual_seed(0)
x, weight = torch.rand(5, 256) * 2 - 1, torch.randn(64, 256)
errors = {}
for kernel in kernels.INT8_KERNELS:
    integers, scales = kernels.int8_weight(weight, kernel)
    exact = ((x * 127).round().double() @ integers.double().T) / 127 * scales
    found = kernels.int8_product(x, kernels.pack_int8(weight, kernel))
    errors[kernel] = ((found - exact).abs().max() / exact.abs().max()).item()
faults = {"fault": kernels.int8_fault("whole"), "bfloat16": kernels.bfloat16_fault()}
print(json.dumps({"chosen": kernels.int8_kernel(), "errors": errors, **faults}))
"""


@x86
def test_processor_with_avx2_alone_takes_the_kernel_that_is_exact_there() -> None:
    environment = {**os.environ, **AVX2}
    run = subprocess.run(
        [sys.executable, "-c", REPORT], env=environment, capture_output=True, text=True, check=True
    )
    report = json.loads(run.stdout)
    assert report["chosen"] == "paired"
    assert "%" in report["fault"]
    assert report["errors"]["paired"] < 0.01  # an input halfway between two integers may be rounded to either
    assert report["errors"]["whole"] > 2 * report["errors"]["paired"]
    assert report["bfloat16"] == NO_BFLOAT16


def test_trials_do_not_depend_on_the_default_dtype_and_device() -> None:
    def faults() -> list[str | None]:
        return [kernels.bfloat16_fault.__wrapped__(), *map(kernels.int8_fault.__wrapped__, INT8_KERNELS)]

    expected = faults()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            assert faults() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_preparing_weights_leaves_the_engine_of_quantized_models_alone() -> None:
    before = torch.backends.quantized.engine
    if kernels.int8_kernel():
        kernels.pack_int8(torch.ones(64, 64), "paired")
    assert torch.backends.quantized.engine == before
