"""Linear layers for inference on a CPU, with weights as its matrix instructions read them: bfloat16, or 8-bit integers.

Kept plain, a bfloat16 weight is laid out anew at every call, which for the few rows of a generation costs as much as the
product itself. Packed, the numbers are the same to the bit; only their order in memory differs. Eight-bit weights are an
approximation. What is packed serves no training, and eight-bit weights cannot be saved.
"""

import warnings

import torch
from torch import Tensor, nn

# Narrower layers (the projections of tokens) have few weights to read, and an image's values pass through them.
_INT8_WIDTH = 64


class PackedLinear(nn.Module):
    """What ``linear`` computes, ``[…, in] → […, out]``, from a copy of its bfloat16 weights in the kernel's own layout.

    ``weight.to_dense()`` is the plain weight.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach()), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return result


class Int8Linear(nn.Module):
    """About what ``linear`` computes, ``[…, in] → […, out]``, with 8-bit weights and inputs.

    Each row of the weight and each row of the input has its own scale, its largest absolute value over 127. So a row's result
    does not depend on the others. The rest is float32.
    """

    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        integers = (weight / scales.unsqueeze(1)).round().to(torch.int8)
        with warnings.catch_warnings():  # quantized tensors are to leave torch one day; the product's kernels have no other entrance
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(integers, scales.double(), torch.zeros(len(scales), dtype=torch.long), 0)
        self.packed = torch.ops.quantized.linear_prepack(quantized, None)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 1:  # such as the embedding of one guidance scale; the kernel wants rows
            return self(x.unsqueeze(0)).squeeze(0)  # type: ignore[no-any-return]
        scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)
        # Zero lies at 128 of 0 … 255, and ±1 at 127 steps from it.
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x / scale, 1 / 127, 128, self.packed)
        return product * scale if self.bias is None else torch.addcmul(self.bias, product, scale)

    @property
    def nbytes(self) -> int:
        """Of weights and scales."""
        return self.out_features * (self.in_features + 4)


def pack_linear_layers(module: nn.Module) -> None:
    """Replace the bfloat16 linear layers within ``module`` by packed ones, in place, where this makes them faster."""
    if not can_pack():
        return
    for name, child in module.named_children():
        if type(child) is nn.Linear and child.weight.device.type == "cpu" and child.weight.dtype == torch.bfloat16:
            setattr(module, name, PackedLinear(child))
        else:
            pack_linear_layers(child)


def quantize_linear_layers(module: nn.Module) -> None:
    """Replace the wide linear layers within ``module``, of float32 and on the CPU, by 8-bit ones, in place."""
    for name, child in module.named_children():
        if type(child) is nn.Linear and min(child.in_features, child.out_features) >= _INT8_WIDTH:
            setattr(module, name, Int8Linear(child))
        else:
            quantize_linear_layers(child)


def can_pack() -> bool:
    """Whether this build of torch has the operators (those of its own compiler) and this processor the bfloat16 instructions."""
    return (
        torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported"))
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def can_quantize() -> bool:
    """Whether this build of torch has 8-bit matrix products."""
    return torch.backends.quantized.engine != "none" and hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32")
