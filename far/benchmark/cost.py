"""Operations of a generation, and bytes of weights that it holds and reads."""

import itertools
import math
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from far.benchmark.rows import Row
from far.heads.flow import FlowHead
from far.heads.network import HeadNetwork, times_together
from far.kernels import product_operators
from far.model import FAR
from far.packing import Int8Linear
from far.tokens import cosine_token_counts


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


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's weights."""
    integers = sum(part.nbytes for part in module.modules() if isinstance(part, Int8Linear))
    return integers + sum(tensor.nbytes for tensor in itertools.chain(module.parameters(), module.buffers()))


def weights_read(model: FAR, row: Row) -> int:
    """Return the bytes of weights that one generation of a row's batch reads.

    Each AR step reads the backbone and the head's embedding of the condition, each number of head steps the
    embeddings of times once, and each evaluation of the head's network the rest of it, except that several
    evaluations share one reading of the modulations. A head with a network of another form is read as a whole
    in each head step.
    """
    network = getattr(model.head, "network", model.head)
    parts = dict.fromkeys(("time_embeddings", "condition_embedding", "modulation"), 0)
    if isinstance(network, HeadNetwork):
        for name, part in network.named_modules():
            if (kind := name.rpartition(".")[2]) in parts:
                parts[kind] += weight_bytes(part)
    times, condition, modulations = parts.values()
    # Besides its network, a head has at most an embedding of guidance.
    guidance = weight_bytes(model.head) - weight_bytes(network)
    steps = [row.sampling.head_steps_at(step) for step in range(row.sampling.ar_steps)]
    twice = isinstance(model.head, FlowHead) and model.head.config.solver == "heun"
    evaluations = [2 * count if twice else count for count in steps]
    readings = [math.ceil(n / together) for n, together in zip(evaluations, _modulated_together(model, row))]
    return (
        len(steps) * (weight_bytes(model.backbone) + condition + guidance)
        + len(set(steps)) * times
        + sum(evaluations) * (weight_bytes(network) - times - condition - modulations)
        + sum(readings) * modulations
    )


def _modulated_together(model: FAR, row: Row) -> list[int]:
    """Return how many evaluations of the head's network share one product of modulations, by AR step."""
    config = row.sampling
    counts = cosine_token_counts(model.config.tokens, config.ar_steps)
    if row.plain:
        return [1] * len(counts)
    in_head = config.guided_in_head(model)
    halves = [1 if in_head or scale == 1.0 else 2 for scale in config.guidance_scales(counts)]
    return [times_together(two * row.batch * count) for two, count in zip(halves, counts)]
