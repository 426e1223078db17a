"""Linear layers for inference on a CPU, with weights in the layout of its instructions: bfloat16 or 8-bit.

Without packing, every call reorders a bfloat16 weight. For the few rows of a generation, this costs as much
as the product itself. Packed results are equal bit for bit. 8-bit weights are an approximation.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from far import kernels
from far.errors import InputError
from far.kernels import Int8Kernel

# Narrower layers (the projections of tokens) have few weights to read, and carry the image's own values.
_INT8_WIDTH = 64

L = TypeVar("L", bound=nn.Module)


class PackedLinear(nn.Module):
    """Linear layer ``[…, in] → […, out]`` with a copy of bfloat16 weights in the kernel's own layout.

    ``weight.to_dense()`` is the plain weight.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(kernels.pack_bfloat16(linear.weight.detach()), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.bfloat16_linear(x, self.weight, self.bias)


class Int8Linear(nn.Module):
    """Linear layer ``[…, in] → […, out]`` that approximates ``linear`` with 8-bit weights and inputs.

    Each row of the weight and of the input has its own scale, so rows do not influence each other. Inputs are
    rounded to 127ths of their largest absolute value. Everything else is float32.

    Args:
        linear: a layer in float32 on the CPU.
        kernel: how weights are rounded, see :func:`far.kernels.int8_weight`; None takes the first kernel that
            is exact on this machine.

    Raises:
        InputError: no kernel is exact on this machine.
    """

    bias: Tensor | None

    def __init__(self, linear: nn.Linear, kernel: Int8Kernel | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        kernel = kernel or kernels.int8_kernel()
        if kernel is None:
            raise InputError(f"int8 weights cannot be used here: {kernels.no_int8()}. Take another dtype")
        self.packed = kernels.pack_int8(linear.weight.detach(), kernel)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 1:  # such as the embedding of one guidance scale; the kernel takes rows only
            return self(x.unsqueeze(0)).squeeze(0)  # type: ignore[no-any-return]
        scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)
        product = kernels.int8_product(x / scale, self.packed)
        return product * scale if self.bias is None else torch.addcmul(self.bias, product, scale)

    @property
    def nbytes(self) -> int:
        """Size of weights and scales in bytes."""
        return self.out_features * (self.in_features + 4)


def pack_linear_layers(module: nn.Module) -> None:
    """Replace bfloat16 linear layers on the CPU within ``module`` by packed ones, in place, if supported."""

    def packed(linear: nn.Linear) -> nn.Module:
        fits = linear.weight.device.type == "cpu" and linear.weight.dtype == torch.bfloat16
        return PackedLinear(linear) if fits else linear

    if kernels.bfloat16_fault() is None:
        _replace(module, nn.Linear, packed)


def quantize_linear_layers(module: nn.Module, kernel: Int8Kernel | None = None) -> None:
    """Replace the wide linear layers within a module by 8-bit ones, in place.

    Args:
        module: in float32 on the CPU.
        kernel: as in :class:`Int8Linear`, and so are the errors.
    """

    def rounded(linear: nn.Linear) -> nn.Module:
        wide = min(linear.in_features, linear.out_features) >= _INT8_WIDTH
        return Int8Linear(linear, kernel) if wide else linear

    _replace(module, nn.Linear, rounded)


def unpack_linear_layers(module: nn.Module) -> None:
    """Replace the packed linear layers within ``module`` by plain ones, in place; 8-bit ones stay."""

    def plain(packed: PackedLinear) -> nn.Module:
        linear = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(packed.weight.detach().to_dense()), packed.bias
        return linear

    _replace(module, PackedLinear, plain)


def _replace(module: nn.Module, kind: type[L], replacement: Callable[[L], nn.Module]) -> None:
    """Replace all layers within a module that are exactly of a class, in place."""
    for name, child in module.named_children():
        if type(child) is kind:
            setattr(module, name, replacement(child))
        else:
            _replace(child, kind, replacement)


def has_int8(module: nn.Module) -> bool:
    """Return whether a module holds 8-bit linear layers."""
    return any(isinstance(part, Int8Linear) for part in module.modules())


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters, including those in 8-bit linear layers."""
    packed = [part for part in module.modules() if isinstance(part, Int8Linear)]
    int8 = sum(part.out_features * (part.in_features + (part.bias is not None)) for part in packed)
    return int8 + sum(parameter.numel() for parameter in module.parameters())
