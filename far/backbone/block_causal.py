"""A backbone that is causal in any order (after ARPG, arXiv 2503.10568).

The encoder attends causally to the class and the known tokens, in the order in which they became known. In
the decoder, each query position attends to the encoder's outputs, not to other query positions. So one
training pass predicts every token of a random order from those before it, and sampling draws several tokens
per step with an exact key-value cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from far.backbone.backbone import Backbone
from far.backbone.causal import CausalBlock, extend_cache, initialize_branches, rotary_grid, with_input_noise
from far.backbone.config import BlockCausalConfig
from far.devices import to_device
from far.layers import BlockCache, KeyValueCache, SwiGLU, as_input, attend, rotate, take


class BlockCausalBackbone(Backbone):
    """Class and known tokens, in any order → ``z [b, m, width]``, on a ``grid`` of (rows, columns) tokens."""

    any_order = True
    exact_cache = True
    rotary: Tensor

    def __init__(self, config: BlockCausalConfig, grid: tuple[int, int], channels: int, classes: int) -> None:
        super().__init__()
        self.config, self.tokens, width = config, grid[0] * grid[1], config.width
        self.class_embedding = nn.Embedding(classes + 1, width)
        self.class_positions = nn.Parameter(torch.empty(1, config.buffer, width))
        self.token_projection = nn.Linear(channels, width, bias=False)
        self.token_positions = nn.Embedding(self.tokens, width)
        self.encoder_blocks = nn.ModuleList(CausalBlock(config) for _ in range(config.encoder_depth))
        self.encoder_norm = nn.RMSNorm(width, eps=1e-6)
        self.query_embedding = nn.Embedding(self.tokens, width)
        self.decoder_blocks = nn.ModuleList(QueryBlock(config) for _ in range(config.decoder_depth))
        self.decoder_norm = nn.RMSNorm(width, eps=1e-6)
        rotary = rotary_grid(grid, config.buffer, width // config.heads)
        self.register_buffer("rotary", rotary, persistent=False)
        initialize_branches(self, config.encoder_depth + config.decoder_depth)
        for embedding in (self.class_embedding, self.token_positions, self.query_embedding):
            nn.init.normal_(embedding.weight)
        nn.init.normal_(self.class_positions, std=0.02)

    @property
    def width(self) -> int:
        return self.config.width

    def forward(
        self, tokens: Tensor, known: Tensor, query: Tensor, labels: Tensor, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Return ``z`` at ``query``; see :meth:`Backbone.forward`.

        The condition at a query position that is itself known depends on the tokens before it in ``known``
        only, as in training. With a cache, only tokens that it does not hold go through the encoder;
        ``known`` must begin with the known positions of the last call, and the condition at a known query
        position then depends on itself and later tokens too, so it means nothing.
        If the cache has more rows than ``tokens``, the first rows are used.
        """
        buffer, start = self.config.buffer, 0 if cache is None else cache.length
        new = known[:, max(0, start - buffer) :]
        x = self.token_projection(as_input(take(tokens, new), self.encoder_norm.weight.dtype))
        x = x + F.embedding(new, self.token_positions.weight)
        places = new + buffer
        if start == 0:
            prefix = self.class_embedding(labels).unsqueeze(1) + self.class_positions
            x = torch.cat([prefix, x.to(prefix.dtype)], dim=1)
            copies = torch.arange(buffer, device=places.device).expand(len(places), -1)
            places = torch.cat([copies, places], dim=1)
        rotary = self._rotary_at(places).to(x.dtype)
        mask, caches = extend_cache(cache, x)
        for block in self.encoder_blocks:
            x = block(x, rotary, mask, next(caches))
        memory = self.encoder_norm(x)
        visible = self._visible(known, query) if cache is None else None
        x = F.embedding(query, self.query_embedding.weight)
        tables = self._rotary_at(query + buffer).to(x.dtype), rotary
        for block in self.decoder_blocks:
            x = block(x, memory, tables, visible, next(caches))
        return self.decoder_norm(x)

    def _rotary_at(self, places: Tensor) -> Tensor:
        """Return rotary tables ``[2, b, 1, m, head_width]`` of ``places [b, m]``, class copies first."""
        return self.rotary[:, places].unsqueeze(2)

    def _visible(self, known: Tensor, query: Tensor) -> Tensor:
        """Return which class copies and known tokens each query position sees, ``[b, 1, m, buffer + k]``.

        A position that is known sees the tokens before it, any other position sees all.
        """
        batch, count = known.shape
        order = torch.arange(-self.config.buffer, count, device=known.device)
        ranks = known.new_full((batch, self.tokens), count)
        ranks = ranks.scatter(1, known, order[self.config.buffer :].expand(batch, -1))
        return (order < ranks.gather(1, query).unsqueeze(-1)).unsqueeze(1)

    def training_inputs(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs for teacher forcing in an order per image, random or raster.

        One pass predicts every token from those before it.
        """
        orders = torch.rand(len(tokens), self.tokens, generator=generator).argsort(dim=1)
        raster = torch.rand(len(tokens), 1, generator=generator) < self.config.raster_fraction
        orders = to_device(torch.where(raster, torch.arange(self.tokens), orders), tokens.device)
        tokens = with_input_noise(tokens, self.config.input_noise, generator)
        return tokens, orders[:, :-1], orders

    def new_cache(self, rows: int) -> KeyValueCache:
        """Return an empty cache in the dtype and on the device of the weights."""
        config = self.config
        depth, head_width = config.encoder_depth + config.decoder_depth, config.width // config.heads
        positions = config.buffer + self.tokens
        return KeyValueCache(depth, rows, config.heads, positions, head_width, self.encoder_norm.weight)


class QueryBlock(nn.Module):
    """Pre-norm block of query positions: RMSNorm, attention to the known tokens only, RMSNorm, SwiGLU."""

    def __init__(self, config: BlockCausalConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.feed_forward_norm = nn.RMSNorm(width, eps=1e-6)
        self.feed_forward = SwiGLU(width, config.hidden_width)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        rotary: tuple[Tensor, Tensor],
        visible: Tensor | None,
        cache: BlockCache | None,
    ) -> Tensor:
        """Return ``[b, m, width]`` from ``x [b, m, width]`` and ``memory [b, k, width]``.

        Args:
            rotary: tables of the positions of ``x`` and of ``memory``.
            visible: ``[b, 1, m, k]``, which of ``memory`` each query sees; all by default.
            cache: receives keys and values of ``memory``. Queries see all that it holds.
        """
        query = self._heads(self.query(self.attention_norm(x)), 1)[0]
        key, value = self._heads(self.key_value(memory), 2)
        query, key, bias = rotate(query, rotary[0]), rotate(key, rotary[1]), None
        if cache is not None:
            key, value, bias = cache.write(key, value)
        if visible is None:
            y = attend(query, key, value, bias)
        else:
            y = F.scaled_dot_product_attention(query, key, value, visible)
        x = x + self.drop(self.project(y.transpose(1, 2).flatten(2)))
        return x + self.drop(self.feed_forward(self.feed_forward_norm(x)))

    def _heads(self, x: Tensor, parts: int) -> Tensor:
        """Split ``[b, n, parts · width]`` into ``[parts, b, heads, n, head_width]``."""
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4)
