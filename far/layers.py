"""Layers of the networks: attention, feed-forward, Transformer block, rotary positions, key-value cache.

:class:`Attention`, :class:`FeedForward` and :class:`Block` use the parameter names of the published MAR
checkpoints, which are those of timm.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Attention scores per product on a CPU, few enough to stay in the processor's caches.
_SCORES = 2_500_000
# Largest absolute value of an input token in float16. Tokens of trained models stay below ten.
_FLOAT16_TOKEN = 1000.0
# The positions of a cache that a block sees are a multiple of this.
_SHOWN = 64


class Attention(nn.Module):
    """Multi-head self-attention over ``[b, n, width]``, bidirectional, with one joint projection."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, positions: Tensor | None = None, cache: "BlockCache | None" = None
    ) -> Tensor:
        """Return ``[b, n, width]``, or ``[b, m, width]`` if ``positions [b, m]`` selects the queries.

        Queries attend to all of ``x`` and to the keys and values in ``cache``.
        """
        batch, count, width = x.shape
        qkv = self.qkv(x).view(batch, count, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if positions is not None:
            q = take(qkv[:, :, 0].flatten(2), positions).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        bias = None
        if cache is not None:
            k, v, bias = cache.write(k, v)
        y = attend(q, k, v, bias, dropout=self.dropout if self.training else 0.0)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Return attention of queries ``[b, heads, m, head_width]`` to n keys, with ``bias [n]`` on their scores.

    In bfloat16 on a CPU, products of a few rows at a time are faster than the fused kernel, several times for
    a single query. They round scores to bfloat16.
    """
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or query.requires_grad:
        mask = None if bias is None else bias.expand(query.shape[2], -1)
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout)
    rows = max(1, _SCORES // (query.shape[1] * query.shape[2] * key.shape[2]))
    query = query * query.shape[-1] ** -0.5
    attended = []
    for q, k, v in zip(query.split(rows), key.split(rows), value.split(rows)):
        # Products of three axes take half the time of products of four.
        scores = q.flatten(0, 1) @ k.flatten(0, 1).transpose(1, 2)
        scores = scores if bias is None else scores + bias
        attended.append((scores.softmax(dim=-1) @ v.flatten(0, 1)).unflatten(0, q.shape[:2]))
    return torch.cat(attended)


def take(x: Tensor, positions: Tensor) -> Tensor:
    """Return the rows ``[b, m, c]`` of ``x [b, n, c]`` at ``positions [b, m]``."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def as_input(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Return tokens ``[…, channels]`` in the ``dtype`` of a network's weights.

    A barely trained diffusion head draws values above 10,000, whose projections overflow in float16. Float16
    therefore scales such a token down, which keeps its direction. The next norm ignores its length.
    """
    if dtype == torch.float16:
        tokens = tokens * (_FLOAT16_TOKEN / tokens.abs().amax(dim=-1, keepdim=True).clamp(min=_FLOAT16_TOKEN))
    return tokens.to(dtype)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the blocks of backbones and heads: children of every ``ModuleList`` named ``…blocks``."""
    return [
        block
        for name, children in module.named_modules()
        if isinstance(children, nn.ModuleList) and name.endswith("blocks")
        for block in children
    ]


class FeedForward(nn.Module):
    """Linear, GELU, linear, with a hidden width of four times ``width``."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm Transformer block."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = FeedForward(width, dropout)

    def forward(
        self, x: Tensor, positions: Tensor | None = None, cache: "BlockCache | None" = None
    ) -> Tensor:
        """Return ``x`` after attention and feed-forward; see :meth:`Attention.forward`."""
        residual = x if positions is None else take(x, positions)
        x = residual + self.attn(self.norm1(x), positions, cache)
        return x + self.mlp(self.norm2(x))


class SwiGLU(nn.Module):
    """LLaMA's feed-forward ``down(silu(gate(x)) · up(x))`` without biases (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def rotary_table(positions: Tensor, width: int) -> Tensor:
    """Return cosines and sines ``[2, n, width]`` for :func:`rotate` (RoPE, arXiv 2104.09864).

    Args:
        positions: ``[n, axes]``. Each axis rotates its own pairs, by 1 to 1e-4 radians per position.
        width: channels per head.
    """
    pairs = width // 2 // positions.shape[1]
    frequencies = 10_000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = (positions.double().unsqueeze(-1) * frequencies).flatten(1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)]).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs (i, i + width/2) of ``x […, n, width]`` by ``table [2, n, width]``."""
    cosine, sine = table.to(x.dtype)
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, dims=-1), sine)


class KeyValueCache:
    """Keys and values of all blocks of a Transformer, ``[depth, rows, heads, positions, head_width]`` each.

    Call :meth:`extend` or :meth:`overwrite` once per pass, then let each block write into its part, one of
    :meth:`blocks`. Memory is allocated once. Blocks see its first positions, a multiple of 64 of them, so
    that kernels see few shapes. A pass may leave out the last rows, which then have gaps and cannot be used
    again until :meth:`clear`.

    Attributes:
        start: number of positions held before this pass.
        length: number of positions held after this pass.
    """

    def __init__(
        self, depth: int, rows: int, heads: int, positions: int, head_width: int, like: Tensor
    ) -> None:
        """Create an empty cache for at most ``positions``, in the dtype and on the device of ``like``."""
        # Zeros, because the bias hides unused positions by a product with zero, which NaNs would survive.
        self.keys, self.values = like.new_zeros(2, depth, rows, heads, positions, head_width)
        self.clear()

    def clear(self) -> None:
        """Hold nothing."""
        self.start, self.length, self.rows = 0, 0, self.keys.shape[1]
        self.positions: Tensor | None = None
        self.bias: Tensor | None = None

    def extend(self, rows: int, count: int) -> None:
        """Let the blocks of this pass append ``count`` positions to the first ``rows`` rows."""
        self._keep(rows)
        self.start, self.length, self.positions = self.length, self.length + count, None
        assert self.length <= self.keys.shape[3], f"{self.length} positions of {self.keys.shape[3]}"
        self.bias = None
        if self.length < (shown := self._shown()):
            self.bias = self.keys.new_zeros(shown)
            self.bias[self.length :].fill_(-torch.inf)

    def causal_mask(self) -> Tensor | None:
        """Return which positions each one appended by this pass sees, ``[m, positions]``.

        None if the pass appends a single position, or if the cache was empty: then attention among the new
        positions is plainly causal.
        """
        count = self.length - self.start
        if self.start == 0 or count == 1:
            return None
        return self.keys.new_ones(count, self._shown(), dtype=torch.bool).tril(self.start)

    def overwrite(self, positions: Tensor) -> None:
        """Let the blocks of this pass overwrite held ``positions [b, m]`` of the first b rows."""
        self._keep(len(positions))
        self.start, self.positions = self.length, positions

    def blocks(self) -> "list[BlockCache]":
        """Return the part of each block in this pass."""
        state, shown = (self.start, self.length, self.positions, self.bias), self._shown()
        keys, values = (held[:, : self.rows, :, :shown] for held in (self.keys, self.values))
        return [BlockCache(key, value, *state) for key, value in zip(keys, values)]

    def _shown(self) -> int:
        """Return how many positions the blocks see in this pass."""
        return min(-(-self.length // _SHOWN) * _SHOWN, self.keys.shape[3])

    def _keep(self, rows: int) -> None:
        assert rows <= self.rows, f"{rows} rows after a pass with {self.rows}: the others have gaps"
        self.rows = rows


class BlockCache(NamedTuple):
    """Keys and values of one block in a pass, views of the memory of a :class:`KeyValueCache`.

    Compiled blocks take no index of a block, for which torch would compile some of them again.

    Attributes:
        keys: ``[rows, heads, positions, head_width]``, and so ``values``.
        start: number of positions held before this pass.
        length: number of positions held after this pass.
        positions: held positions ``[rows, m]`` that the pass overwrites, or None if it appends.
        bias: ``[positions]``, hides unused memory in the scores, if there is any.
    """

    keys: Tensor
    values: Tensor
    start: int
    length: int
    positions: Tensor | None
    bias: Tensor | None

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write keys and values ``[rows, heads, m, head_width]``. Return all to attend to, and ``bias``."""
        for memory, new in ((self.keys, keys), (self.values, values)):
            if self.positions is None:
                memory[:, :, self.start : self.length] = new
            else:
                index = self.positions[:, None, :, None].expand_as(new)
                memory.scatter_(2, index, new.to(memory.dtype))  # autocast gives another dtype
        return (keys, values, None) if self.start == 0 else (self.keys, self.values, self.bias)


def block_caches(cache: KeyValueCache | None) -> Iterator[BlockCache | None]:
    """Iterate over the parts of a cache, one per block, or over None without a cache."""
    return itertools.repeat(None) if cache is None else iter(cache.blocks())
