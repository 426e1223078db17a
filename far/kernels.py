"""Matrix products of CPUs that torch has as private operators only. No other module calls these operators.

Each is tried on a small product before it is used: a release of torch may change an operator, and a processor
may compute it wrong. `tests/test_kernels.py` names what a release has changed.

Processors without VNNI multiply 8-bit integers by an instruction (vpmaddubsw) that adds two neighboring
products into 16 bits and saturates: 255 × 127 twice is 64770, and 32767 is what remains. So there are two
kernels. ``"whole"`` uses all of a weight's 8 bits and is exact with VNNI. ``"paired"`` limits the sum of two
neighboring weights to 128, so that no sum leaves 16 bits (255 × 128 = 32640), and is exact on all x86
processors. `benchmarks/kernels.py` measures both. oneDNN's 8-bit product saturates too, and is slower here.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Int8Kernel = Literal["whole", "paired"]

# In order of preference: equally fast, the first with the smaller error.
INT8_KERNELS: tuple[Int8Kernel, ...] = ("whole", "paired")

NO_BFLOAT16 = "this processor has no bfloat16 instructions"
# A trial does not depend on the caller's default dtype and device.
_PLAIN: Any = {"dtype": torch.float32, "device": "cpu"}
# What torch raises if an operator is missing, or takes or supports other arguments.
_BREAKAGE = (AttributeError, RuntimeError, TypeError)


def pack_bfloat16(weight: Tensor) -> Tensor:
    """Return a bfloat16 weight ``[out, in]`` in the layout of oneDNN. ``to_dense()`` of it is the weight."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def bfloat16_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Return the linear layer ``[…, in] → […, out]`` of a weight from :func:`pack_bfloat16`."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return result


@functools.cache
def bfloat16_fault() -> str | None:
    """Return why :func:`bfloat16_linear` cannot be used here, in a clause; None if it can."""
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return NO_BFLOAT16
        x, weight = _ramp(3, 48).to(torch.bfloat16), _ramp(80, 48).to(torch.bfloat16)
        packed = pack_bfloat16(weight)
        if not torch.equal(packed.to_dense(), weight):
            return "the packed weight's to_dense() differs from the weight"
        expected = torch.nn.functional.linear(x, weight).float()
        # Both round float32 sums to 8 bits. With a wrong layout, errors are about as large as the sums.
        if not torch.allclose(bfloat16_linear(x, packed, None).float(), expected, rtol=2**-7, atol=2**-7):
            return "the packed product differs from the plain one"
    except _BREAKAGE as error:
        return _first_line(error)
    return None


def _ramp(rows: int, columns: int) -> Tensor:
    """Return different values in (-1, 1), ``[rows, columns]``."""
    return torch.arange(rows * columns, **_PLAIN).mul(0.618034).frac().mul(2).sub(1).view(rows, columns)


def int8_weight(weight: Tensor, kernel: Int8Kernel) -> tuple[Tensor, Tensor]:
    """Return int8 integers ``[out, in]`` and scales ``[out]`` whose product is nearly ``weight [out, in]``.

    In each row the largest absolute weight becomes 127; with ``"paired"``, the largest among the weights and
    the sums of the neighbors 0 and 1, 2 and 3, ….
    """
    largest = weight.abs().amax(dim=1)
    if kernel == "paired":
        neighbors = weight[:, : weight.shape[1] // 2 * 2].unflatten(1, (-1, 2)).sum(dim=2)
        largest = torch.cat([largest.unsqueeze(1), neighbors.abs()], dim=1).amax(dim=1)
    scales = largest.clamp(min=1e-12) / 127
    return (weight / scales.unsqueeze(1)).round().to(torch.int8), scales


def pack_int8(weight: Tensor, kernel: Int8Kernel) -> Any:
    """Return a float32 weight ``[out, in]`` in 8 bits, in the layout of fbgemm, for :func:`int8_product`."""
    integers, scales = int8_weight(weight, kernel)
    zeros = torch.zeros_like(scales, dtype=torch.long)
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():  # quantized tensors are deprecated; the operator takes nothing else
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(integers, scales.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(quantized, None)
    finally:
        torch.backends.quantized.engine = engine


def int8_product(x: Tensor, packed: Any) -> Tensor:
    """Return ``[…, in] → […, out]``, float32, for ``x`` in [-1, 1] and a weight from :func:`pack_int8`.

    ``x`` is rounded to 127ths: zero is 128 of 0 … 255, and ±1 is 127 away from it.
    """
    y: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1 / 127, 128, packed)
    return y


def int8_kernel() -> Int8Kernel | None:
    """Return the first exact one of :data:`INT8_KERNELS` on this machine."""
    return next((kernel for kernel in INT8_KERNELS if int8_fault(kernel) is None), None)


def no_int8() -> str | None:
    """Return why no 8-bit kernel can be used here, in a clause; None if one can."""
    return None if int8_kernel() else int8_fault(INT8_KERNELS[-1])


@functools.cache
def int8_fault(kernel: Int8Kernel) -> str | None:
    """Return why products of a kernel cannot be used here, in a clause; None if they are exact."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return "this build of torch has no 8-bit matrix products (fbgemm)"
    try:
        error = int8_error(kernel)
    except _BREAKAGE as breakage:
        return _first_line(breakage)
    # Rounding to float32 is about 1e-7, and one unit of the inputs 2e-3.
    return None if error < 1e-5 else f"8-bit matrix products are wrong by up to {error:.0%} on this processor"


def int8_error(kernel: Int8Kernel) -> float:
    """Return the largest error of worst-case products as a fraction of the largest product."""
    worst = 0.0
    # Were other weights neighbors than those that "paired" limits, one of the rows would saturate.
    patterns = [[1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [1, -1, 0, 1], [-1, -1, -1, -1]]
    for inputs in (64, 509):  # with and without a remainder of the blocks that a kernel multiplies
        weight = torch.tensor(patterns, **_PLAIN).repeat(11, inputs // 4 + 1)[:, :inputs]
        integers, scales = int8_weight(weight, kernel)
        packed = pack_int8(weight, kernel)
        for rows in (1, 2, 130):  # fbgemm has a kernel for each number of rows
            x = torch.ones(rows, inputs, **_PLAIN)
            x[1::2, ::3] = -1
            exact = (x * 127).long() @ integers.long().T
            found = int8_product(x, packed).double() / scales * 127
            worst = max(worst, ((found - exact).abs().max() / exact.abs().max()).item())
    return worst


def product_operators() -> list[Callable[..., Tensor]]:
    """Return the operators that multiply their first argument by packed weights, for counts of FLOPs."""
    names = (("mkldnn", "_linear_pointwise"), ("quantized", "linear_with_input_q_dq_qweight_dq_output_fp32"))
    found = [getattr(getattr(torch.ops, library), name, None) for library, name in names]
    return [operator for operator in found if operator is not None]


def _first_line(error: Exception) -> str:
    return f"torch {torch.__version__}: {str(error).strip().partition(chr(10))[0]}"
