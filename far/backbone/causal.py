"""FAR-Causal's backbone: a decoder-only Transformer like LLaMA, over continuous tokens in raster order.

Its input is the class (one or several copies) and the tokens so far. Its output at each position is the
condition ``z`` of the next token.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from far.backbone.backbone import Backbone
from far.backbone.config import BlockCausalConfig, CausalConfig
from far.devices import to_device
from far.layers import (
    BlockCache,
    KeyValueCache,
    SwiGLU,
    as_input,
    attend,
    block_caches,
    rotary_table,
    rotate,
    take,
)


class CausalBackbone(Backbone):
    """Class and first tokens → ``z [b, m, width]`` of the next, on a ``grid`` of (rows, columns) tokens."""

    any_order = False
    exact_cache = True
    rotary: Tensor

    def __init__(self, config: CausalConfig, grid: tuple[int, int], channels: int, classes: int) -> None:
        super().__init__()
        self.config, self.tokens = config, grid[0] * grid[1]
        width = config.width
        self.class_embedding = nn.Embedding(classes + 1, width)
        self.class_positions = nn.Parameter(torch.empty(1, config.buffer, width))
        self.token_projection = nn.Linear(channels, width, bias=False)
        self.blocks = nn.ModuleList(CausalBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        if config.positions == "grid":
            rotary = rotary_grid(grid, config.buffer, width // config.heads)
        else:
            places = torch.arange(config.buffer + self.tokens).unsqueeze(-1)
            rotary = rotary_table(places, width // config.heads)
        # The last token is never an input.
        self.register_buffer("rotary", rotary[:, :-1], persistent=False)
        initialize_branches(self, config.depth)
        nn.init.normal_(self.class_embedding.weight)
        nn.init.normal_(self.class_positions, std=0.02)

    @property
    def width(self) -> int:
        return self.config.width

    def forward(
        self, tokens: Tensor, known: Tensor, query: Tensor, labels: Tensor, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Return ``z`` at ``query``; see :meth:`Backbone.forward`.

        The known tokens are the first ones in raster order. Query positions are among them, or the position
        after them. With a cache, only tokens that it does not hold go through the network, so ``query`` must
        be among these. If the cache has more rows than ``tokens``, the first rows are used.
        """
        buffer, start = self.config.buffer, 0 if cache is None else cache.length
        end = buffer + known.shape[1]
        fed = tokens[:, max(0, start - buffer) : end - buffer]
        x = self.token_projection(as_input(fed, self.norm.weight.dtype))
        if start == 0:
            prefix = self.class_embedding(labels).unsqueeze(1) + self.class_positions
            x = torch.cat([prefix, x.to(prefix.dtype)], dim=1)
        rotary = self.rotary[:, start:end].to(x.dtype)
        mask, caches = extend_cache(cache, x)
        for block in self.blocks:
            x = block(x, rotary, mask, next(caches))
        return self.norm(take(x, query + buffer - 1 - start))

    def training_inputs(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs for teacher forcing: one pass predicts every token from those before it."""
        positions = torch.arange(self.tokens, device=tokens.device).expand(len(tokens), -1)
        tokens = with_input_noise(tokens, self.config.input_noise, generator)
        return tokens, positions[:, :-1], positions

    def new_cache(self, rows: int) -> KeyValueCache:
        """Return an empty cache in the dtype and on the device of the weights."""
        config = self.config
        positions, head_width = self.rotary.shape[1], config.width // config.heads
        return KeyValueCache(config.depth, rows, config.heads, positions, head_width, self.norm.weight)


def with_input_noise(tokens: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Return tokens with Gaussian noise of a standard deviation. If it is 0, nothing is drawn."""
    if std == 0:
        return tokens
    return tokens + std * to_device(torch.randn(tokens.shape, generator=generator), tokens.device)


def extend_cache(cache: KeyValueCache | None, x: Tensor) -> tuple[Tensor | None, Iterator[BlockCache | None]]:
    """Let a cache append the positions of ``x [b, m, width]``. Return their mask and each block's part."""
    mask = None
    if cache is not None:
        cache.extend(*x.shape[:2])
        mask = cache.causal_mask()
    return mask, block_caches(cache)


def rotary_grid(grid: tuple[int, int], buffer: int, width: int) -> Tensor:
    """Return a :func:`rotary_table` of class copies at (0, 0) and a grid's tokens at (1, 1) and further."""
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])) + 1
    return rotary_table(torch.cat([places.new_zeros(buffer, 2), places]), width)


def initialize_branches(module: nn.Module, depth: int) -> None:
    """Draw the weights of linear layers so that every layer keeps the scale of its input.

    The last layers of the 2 · ``depth`` residual branches are smaller, so that the sum keeps it too.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            std = layer.in_features**-0.5
            if name.endswith(("project", "down")):
                std /= math.sqrt(2 * depth)
            nn.init.normal_(layer.weight, std=std)


class CausalBlock(nn.Module):
    """Pre-norm block without biases: RMSNorm, causal attention, RMSNorm, SwiGLU."""

    def __init__(self, config: CausalConfig | BlockCausalConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.attention = CausalAttention(config.width, config.heads)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.feed_forward = SwiGLU(config.width, config.hidden_width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | None, cache: BlockCache | None) -> Tensor:
        """Return ``[b, m, width]``; see :class:`CausalAttention`."""
        x = x + self.drop(self.attention(self.attention_norm(x), rotary, mask, cache))
        return x + self.drop(self.feed_forward(self.feed_forward_norm(x)))


class CausalAttention(nn.Module):
    """Multi-head causal attention of ``[b, m, width]`` to itself and to the cached positions before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | None, cache: BlockCache | None) -> Tensor:
        """Return ``[b, m, width]`` from ``x [b, m, width]``.

        Args:
            rotary: tables of the positions of ``x``.
            mask: of the pass, from :meth:`KeyValueCache.causal_mask`.
            cache: receives keys and values of ``x``.
        """
        batch, count, width = x.shape
        joint = self.query_key_value(x).view(batch, count, 3, self.heads, width // self.heads)
        joint = joint.permute(2, 0, 3, 1, 4)
        (query, key), value = rotate(joint[:2], rotary), joint[2]
        bias = None
        if cache is not None:
            key, value, bias = cache.write(key, value)
        if count == 1:
            y = attend(query, key, value, bias)
        else:
            y = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None)
        return self.project(y.transpose(1, 2).reshape(batch, count, width))
