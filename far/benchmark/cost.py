"""Operations of a generation, and bytes of weights that it holds and reads."""

import itertools
import math
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from far.heads.flow import FlowHead
from far.heads.network import HeadNetwork
from far.kernels import product_operators
from far.model import FAR
from far.packing import Int8Linear
from far.sampling_config import SamplingConfig


def flop_counter() -> FlopCounterMode:
    """Return a counter of additions and multiplications in matrix products, convolutions and attention.

    It also counts the kernels that torch's own table of operators does not list.
    """

    def linear(x: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
        return 2 * math.prod(out_shape) * x[-1]

    def attention(*shapes: Any, **_: Any) -> Any:
        return sdpa_flop_count(*shapes[:3])

    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping: dict[Any, Any] = {flash: attention, **dict.fromkeys(product_operators(), linear)}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def size(module: nn.Module) -> int:
    """Return the bytes of a module's weights."""
    integers = sum(part.nbytes for part in module.modules() if isinstance(part, Int8Linear))
    return integers + sum(tensor.nbytes for tensor in itertools.chain(module.parameters(), module.buffers()))


def weights_read(model: FAR, config: SamplingConfig) -> int:
    """Return the bytes of weights that one generation reads.

    Each AR step reads the backbone and the head's embedding of the condition, each head step the rest of the
    head's network, and each number of head steps the embeddings of times once. A head with a network of
    another form is read as a whole in each head step.
    """
    network = getattr(model.head, "network", None)
    if isinstance(network, HeadNetwork):
        times, condition = size(network.time_embeddings), size(network.condition_embedding)
    else:
        network, times, condition = model.head, 0, 0
    # Besides its network, a head has at most an embedding of guidance.
    guidance = size(model.head) - size(network)
    passes = sum(config.head_steps_at(step) for step in range(config.ar_steps))
    embedded = len({config.head_steps_at(step) for step in range(config.ar_steps)})
    if isinstance(model.head, FlowHead):
        passes *= 2 if model.head.config.solver == "heun" else 1
    per_step = size(model.backbone) + condition + guidance
    return config.ar_steps * per_step + embedded * times + passes * (size(network) - times - condition)
