"""Linear layers whose weights lie in memory as the CPU's bfloat16 matrix instructions read them.

Kept plain, such a weight is laid out anew at every call, which for the few rows of a generation costs as much as the
product itself. The numbers are the same to the bit; only their order in memory differs. For inference only. Nothing is
packed where the processor lacks the instructions, nor off the CPU, nor in another dtype.
"""

import torch
from torch import Tensor, nn


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


def pack_linear_layers(module: nn.Module) -> None:
    """Replace the bfloat16 linear layers within ``module`` by packed ones, in place, where this makes them faster."""
    if not can_pack():
        return
    for name, child in module.named_children():
        if type(child) is nn.Linear and child.weight.device.type == "cpu" and child.weight.dtype == torch.bfloat16:
            setattr(module, name, PackedLinear(child))
        else:
            pack_linear_layers(child)


def can_pack() -> bool:
    """Whether this build of torch has the operators (those of its own compiler) and this processor the bfloat16 instructions."""
    return (
        torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported"))
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
