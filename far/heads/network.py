"""Network of all heads: MAR's residual MLP with adaptive layer norm, for any number of times."""

import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from far.layers import as_input

_FREQUENCIES = 128
# Rows per product of modulations. Beyond this, a product takes the time of its arithmetic, not that of
# reading its weights, on CPUs and GPUs alike.
_ROWS = 256


class HeadNetwork(nn.Module):
    """Residual blocks, each modulated by the sum of the embeddings of condition and times.

    Args:
        channels: channels of an input.
        outputs: channels of an output.
        condition: channels of a condition.
        width: channels of the blocks.
        depth: number of blocks.
        times: number of scalars that condition the network, such as a time and a step size.
    """

    def __init__(
        self, channels: int, outputs: int, condition: int, width: int, depth: int, times: int = 1
    ) -> None:
        super().__init__()
        self.time_embeddings = nn.ModuleList(TimeEmbedding(width) for _ in range(times))
        self.condition_embedding = nn.Linear(condition, width)
        self.input_projection = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.output = OutputLayer(width, outputs)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if "time" in name:
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # With zero modulation and output, every block starts as the identity and the network as zero.
        for name, parameter in self.named_parameters():
            if "modulation" in name or name.startswith("output."):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, z: Tensor, *times: Tensor) -> Tensor:
        """Return outputs ``[…, outputs]``.

        Args:
            x: noisy tokens ``[…, channels]``.
            z: conditions ``[…, condition]``, whose leading axes broadcast with those of ``x``.
            times: within 0 … 1000, each broadcastable to the leading axes.
        """
        return self.conditioned(x, self.embed_condition(z), self.embed_times(*times))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation, read from a norm because linear layers may hold integers."""
        return self.blocks[0].norm.weight.dtype  # type: ignore[union-attr, return-value]

    def embed_condition(self, z: Tensor) -> Tensor:
        """Return the embeddings ``[…, width]`` of conditions ``z […, condition]``."""
        return self.condition_embedding(z.to(self.dtype))

    def embed_times(self, *times: Tensor) -> Tensor:
        """Return the summed embeddings ``[…, width]`` of times ``[…]``, or 0 without times."""
        embedded = [embed(time, self.dtype) for embed, time in zip(self.time_embeddings, times, strict=True)]
        zero = self.blocks[0].norm.weight.new_zeros(())  # type: ignore[union-attr, operator]
        return functools.reduce(torch.add, embedded) if embedded else zero

    def conditioned(self, x: Tensor, condition: Tensor, time: Tensor) -> Tensor:
        """Return outputs ``[…, outputs]`` for embeddings ``[…, width]`` that broadcast with ``x``."""
        embedding = F.silu(condition + time)
        x = self.input_projection(as_input(x, self.dtype))
        for block in self.blocks:
            x = block(x, embedding)
        return self.output(x, embedding)

    def at_times(self, condition: Tensor, times: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        """Iterate over the network at one of its ``times`` after the other, for a draw of several head steps.

        Each item maps ``x`` to the outputs of :meth:`conditioned`, except for rounding. Modulations do not
        depend on ``x``, so each block computes those of several times in one product. This launches fewer
        kernels, and reads these weights, more than half of the network's, less often.

        Args:
            condition: embeddings ``[…, width]`` of conditions.
            times: embeddings ``[steps, width]`` of times.
        """
        layers = *self.blocks, self.output
        for some in times.split(times_together(condition.numel() // condition.shape[-1])):
            embedding = F.silu(condition + some.view(len(some), *[1] * (condition.dim() - 1), -1))
            modulations = [layer.modulation(embedding) for layer in layers]  # type: ignore[union-attr, operator]
            for index in range(len(some)):
                yield functools.partial(self._modulated, [modulation[index] for modulation in modulations])

    def _modulated(self, modulations: list[Tensor], x: Tensor) -> Tensor:
        x = self.input_projection(as_input(x, self.dtype))
        for block, modulation in zip(self.blocks, modulations):
            x = block(x, modulation=modulation)
        return self.output(x, modulation=modulations[-1])


def times_together(rows: int) -> int:
    """Return for how many times :meth:`HeadNetwork.at_times` modulates ``rows`` conditions in one product."""
    return max(1, _ROWS // max(1, rows))


class TimeEmbedding(nn.Module):
    """MLP of the cosines and sines of a scalar at 128 frequencies, 1 down to 1e-4: ``[…, width]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(2 * _FREQUENCIES, width)
        self.linear_out = nn.Linear(width, width)

    def forward(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        exponents = torch.arange(_FREQUENCIES, device=time.device, dtype=torch.float32) / _FREQUENCIES
        angles = time.float().unsqueeze(-1) * torch.exp(-math.log(10_000) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.linear_out(F.silu(self.linear_in(waves.to(dtype))))


class ResidualBlock(nn.Module):
    """Residual block ``x + gate · MLP(norm(x) · (1 + scale) + shift)``.

    Shift, scale and gate are projections of ``embedding``, unless they are given as ``modulation``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.linear_in = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, embedding: Tensor | None = None, modulation: Tensor | None = None) -> Tensor:
        modulation = self.modulation(embedding) if modulation is None else modulation
        shift, scale, gate = modulation.chunk(3, dim=-1)
        y = self.norm(x) * (1 + scale) + shift
        return x + gate * self.linear_out(F.silu(self.linear_in(y)))


class OutputLayer(nn.Module):
    """Modulated norm without weights of its own, then a linear layer; see :class:`ResidualBlock`."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, outputs)

    def forward(self, x: Tensor, embedding: Tensor | None = None, modulation: Tensor | None = None) -> Tensor:
        modulation = self.modulation(embedding) if modulation is None else modulation
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
