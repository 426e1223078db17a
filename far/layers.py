"""Building blocks that the networks share: attention, feed-forward, Transformer block, rotary positions, key-value cache.

Parameter names of :class:`Attention`, :class:`FeedForward` and :class:`Block` are those of the published MAR
checkpoints (which are timm's).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What becomes of a block's new keys and values: all that its queries are to see, and what is added to the scores of each key.
Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]
# Scores that the plain products of attention have in memory at once: they stay in the caches.
_SCORES = 2_500_000
# What numbers of a token a float16 network is fed at most; a trained model's are below ten.
_FLOAT16_TOKEN = 1000.0


class Attention(nn.Module):
    """Multi-head self-attention over ``[b, n, width]``, bidirectional, with one joint projection."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor | None = None, remember: Remember | None = None) -> Tensor:
        """Return ``[b, n, width]``, or ``[b, m, width]`` at the query ``positions [b, m]`` alone.

        ``remember`` maps keys and values ``[b, heads, n, head_width]`` of ``x`` to those that are seen, and a bias of them.
        """
        batch, count, width = x.shape
        qkv = self.qkv(x).view(batch, count, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if positions is not None:
            q = take(qkv[:, :, 0].flatten(2), positions).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        bias = None
        if remember is not None:
            k, v, bias = remember(k, v)
        y = attend(q, k, v, bias, dropout=self.dropout if self.training else 0.0)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention of all queries ``[b, heads, m, head_width]`` to all keys ``[b, heads, n, head_width]``; ``bias [n]`` is added to scores.

    The CPU's fused kernel takes longer in bfloat16 than plain products of a few rows at a time, several times as long for a
    single query; the scores of these are rounded to bfloat16.
    """
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or query.requires_grad:
        mask = None if bias is None else bias.expand(query.shape[2], -1)
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout)
    rows = max(1, _SCORES // (query.shape[1] * query.shape[2] * key.shape[2]))
    query = query * query.shape[-1] ** -0.5
    return torch.cat(
        [_attend(q, k, v, bias) for q, k, v in zip(query.split(rows), key.split(rows), value.split(rows))]
    )


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """By products of three axes, which take half of the time of products of four."""
    scores = query.flatten(0, 1) @ key.flatten(0, 1).transpose(1, 2)
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(dim=-1) @ value.flatten(0, 1)).unflatten(0, query.shape[:2])


def take(x: Tensor, positions: Tensor) -> Tensor:
    """Rows ``[b, m, c]`` of ``x [b, n, c]`` at ``positions [b, m]``."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def as_input(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Tokens ``[…, channels]`` as a network with weights of ``dtype`` is fed them.

    A diffusion head that is hardly trained draws numbers in the ten thousands. Projected they leave the range of float16, and one
    infinity makes NaNs of all tokens after it. So in float16 such a token is shortened, its direction kept: the norms that follow
    take its length away in any case.
    """
    if dtype == torch.float16:
        tokens = tokens * (_FLOAT16_TOKEN / tokens.abs().amax(dim=-1, keepdim=True).clamp(min=_FLOAT16_TOKEN))
    return tokens.to(dtype)


class FeedForward(nn.Module):
    """Linear, GELU, linear, four times as wide inside."""

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

    def forward(self, x: Tensor, positions: Tensor | None = None, remember: Remember | None = None) -> Tensor:
        """See :meth:`Attention.forward`."""
        seen = x if positions is None else take(x, positions)
        x = seen + self.attn(self.norm1(x), positions, remember)
        return x + self.mlp(self.norm2(x))


class SwiGLU(nn.Module):
    """LLaMA's feed-forward ``down(silu(gate(x)) · up(x))`` of ``[…, width]`` (arXiv 2002.05202); no biases.

    Gate and up are one product.
    """

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def rotary_table(positions: Tensor, width: int) -> Tensor:
    """What :func:`rotate` turns heads of ``width`` numbers by (arXiv 2104.09864): ``[2, n, width]``.

    Args:
        positions: ``[n, axes]``; each axis turns its own ``width/2/axes`` pairs, by 1 down to 1e-4 radians a position.
    """
    pairs = width // 2 // positions.shape[1]
    frequencies = 10_000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = (positions.double().unsqueeze(-1) * frequencies).flatten(1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)]).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs (i, i + width/2) of ``x […, n, width]`` by ``table [2, n, width]``: a · cos − b · sin, and b · cos + a · sin."""
    cosine, sine = table.to(x.dtype)
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, dims=-1), sine)


class KeyValueCache:
    """Keys and values of all blocks of a Transformer, ``[depth, rows, heads, places, head_width]`` each.

    ``length`` places are held; whoever writes to all blocks moves it on. The memory grows with them by ``growth`` places at a
    time, so that keys lie in one piece and kernels see few shapes. Rows can be left out on the way, the last ones first; from
    then on they have gaps, until the cache is cleared.
    """

    def __init__(
        self,
        depth: int,
        rows: int,
        heads: int,
        head_width: int,
        dtype: torch.dtype,
        device: torch.device,
        growth: int = 64,
    ) -> None:
        self.growth = growth
        # Zeros, since what is not held yet is multiplied by zero, which NaNs would survive.
        self.keys = torch.zeros(depth, rows, heads, 0, head_width, dtype=dtype, device=device)
        self.values = self.keys.clone()
        self.clear()

    def clear(self) -> None:
        """Hold nothing."""
        self.length, self.rows = 0, self.keys.shape[1]
        self.bias = self._bias(0)

    def append(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write ``[b, heads, m, head_width]`` behind what is held of a block's first b rows.

        Returns all of it with room behind, and the bias ``[places]`` that hides the room.
        """
        rows, end = self._keep(len(keys)), self.length + keys.shape[2]
        if block == 0:
            self._grow(end)
            self.bias = self._bias(end)
        self.keys[block, :rows, :, self.length : end] = keys
        self.values[block, :rows, :, self.length : end] = values
        if not self.length:
            return keys, values, None
        return self.keys[block, :rows], self.values[block, :rows], self.bias

    def put(
        self, block: int, positions: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write over the held ``positions [b, m]`` of a block's first b rows; otherwise as :meth:`append`."""
        rows = self._keep(len(keys))
        index = positions[:, None, :, None].expand_as(keys)
        return (
            self.keys[block, :rows].scatter_(2, index, keys),
            self.values[block, :rows].scatter_(2, index, values),
            self.bias,
        )

    def _keep(self, rows: int) -> int:
        assert rows <= self.rows, "rows that were left out have gaps"
        self.rows = rows
        return rows

    def _grow(self, places: int) -> None:
        missing = places - self.keys.shape[3]
        if missing > 0:
            room = -(-missing // self.growth) * self.growth
            self.keys, self.values = (F.pad(held, (0, 0, 0, room)) for held in (self.keys, self.values))

    def _bias(self, held: int) -> Tensor | None:
        """Minus infinity for all places but the first ``held``; None where there are no others."""
        places = self.keys.shape[3]
        if held == places:
            return None
        bias = self.keys.new_zeros(places)
        bias[held:] = -torch.inf
        return bias
