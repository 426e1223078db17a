"""Linear layers for inference on a CPU, with weights as its matrix instructions read them: bfloat16, or 8-bit integers.

In torch's own layout, a bfloat16 weight is reordered at every call, which for the few rows of a generation costs as much
as the product itself. Packed, only the order in memory differs, and the results are equal bit for bit. 8-bit weights are
an approximation. Packed layers are for inference only, and 8-bit weights cannot be saved.
"""

import torch
from torch import Tensor, nn

from far import kernels
from far.errors import InputError
from far.kernels import Int8Kernel

# Narrower layers (the projections of tokens) have few weights to read, and an image's values pass through them.
_INT8_WIDTH = 64


class PackedLinear(nn.Module):
    """Linear layer ``[…, in] → […, out]`` with a copy of the bfloat16 weights of ``linear`` in the kernel's own layout.

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

    Each row of the weight and each row of the input has its own scale, so a row's result does not depend on the others.
    Inputs are rounded to 127ths of their largest absolute value. All else is float32.

    Args:
        linear: float32, on the CPU.
        kernel: how to round the weights, see :func:`far.kernels.int8_weight`; None takes the first one that is exact here.

    Raises:
        InputError: no kernel is exact on this machine.
    """

    bias: Tensor | None

    def __init__(self, linear: nn.Linear, kernel: Int8Kernel | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        kernel = kernel or kernels.int8_kernel()
        if kernel is None:
            raise InputError(f"int8 weights cannot be used here: {kernels.no_int8()}; take another dtype")
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
    """Replace the bfloat16 linear layers within ``module`` by packed ones, in place, where this makes them faster."""
    if not can_pack():
        return
    for name, child in module.named_children():
        if (
            type(child) is nn.Linear
            and child.weight.device.type == "cpu"
            and child.weight.dtype == torch.bfloat16
        ):
            setattr(module, name, PackedLinear(child))
        else:
            pack_linear_layers(child)


def quantize_linear_layers(module: nn.Module, kernel: Int8Kernel | None = None) -> None:
    """Replace the wide linear layers within ``module``, of float32 and on the CPU, by 8-bit ones, in place.

    Args:
        kernel: as in :class:`Int8Linear`.

    Raises:
        InputError: no kernel is exact on this machine.
    """
    for name, child in module.named_children():
        if type(child) is nn.Linear and min(child.in_features, child.out_features) >= _INT8_WIDTH:
            setattr(module, name, Int8Linear(child, kernel))
        else:
            quantize_linear_layers(child, kernel)


def can_pack() -> bool:
    """Return whether this processor and this build of torch multiply packed bfloat16 weights."""
    return kernels.bfloat16_fault() is None


def can_quantize() -> bool:
    """Return whether this processor and this build of torch multiply 8-bit integers exactly."""
    return kernels.int8_kernel() is not None
