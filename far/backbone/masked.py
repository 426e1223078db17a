"""MAR's masked encoder-decoder (arXiv 2406.11838, section 3.3).

The encoder sees the class (several copies, the "buffer") and the known tokens; the decoder sees the
encoder's output with mask tokens at the unknown positions, and gives ``z`` there. Which positions are
known, in which order they become so, and what is drawn from ``z`` is decided elsewhere.
"""

import dataclasses
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from far.backbone.backbone import Backbone
from far.backbone.config import MaskedConfig
from far.layers import Block, KeyValueCache, as_input, take
from far.tokens import sample_mask_ratio


class MaskedBackbone(Backbone):
    """Known tokens, in any order, and a class → ``z [b, m, decoder_width]`` at chosen positions."""

    any_order = True

    def __init__(self, config: MaskedConfig, tokens: int, channels: int, classes: int) -> None:
        super().__init__()
        self.config, self.tokens, self.classes = config, tokens, classes
        encoder, decoder = config.encoder_width, config.decoder_width
        self.class_embedding = nn.Embedding(classes + 1, encoder)
        self.token_projection = nn.Linear(channels, encoder)
        self.token_norm = nn.LayerNorm(encoder, eps=1e-6)
        self.encoder_positions = nn.Parameter(torch.empty(1, config.buffer + tokens, encoder))
        self.encoder_blocks = nn.ModuleList(
            Block(encoder, config.encoder_heads, config.dropout) for _ in range(config.encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(encoder, eps=1e-6)
        self.decoder_projection = nn.Linear(encoder, decoder)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder))
        self.decoder_positions = nn.Parameter(torch.empty(1, config.buffer + tokens, decoder))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder, config.decoder_heads, config.dropout) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder, eps=1e-6)
        self.condition_positions = nn.Parameter(torch.empty(1, tokens, decoder))
        self._initialize()

    @property
    def width(self) -> int:
        """The width of ``z``."""
        return self.config.decoder_width

    def _initialize(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and "embedding" not in name:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def encode(
        self, tokens: Tensor, known: Tensor, labels: Tensor, cache: KeyValueCache | None = None
    ) -> Tensor:
        """The encoder's output ``[b, buffer + k, encoder_width]``.

        Args:
            tokens: ``[b, n, channels]``; only the known ones are read.
            known: positions ``[b, k]`` of the known tokens.
            labels: ``[b]``, 0 … classes.
            cache: if it holds the buffer and the first tokens of ``known``, only the other ones are computed and returned.
        """
        buffer = self.config.buffer
        held = 0 if cache is None else cache.length
        known = known[:, max(0, held - buffer) :]
        # F.embedding, because the gradient of plain indexing is slow on a CPU.
        x = self.token_projection(as_input(take(tokens, known), self.token_norm.weight.dtype))
        x = x + F.embedding(known, self.encoder_positions[0, buffer:])
        if not held:
            prefix = self.class_embedding(labels).unsqueeze(1) + self.encoder_positions[:, :buffer]
            x = torch.cat([prefix, x.to(prefix.dtype)], dim=1)
        x = self.token_norm(x)
        for index, block in enumerate(self.encoder_blocks):
            x = block(x, remember=None if cache is None else functools.partial(cache.append, index))
        if cache is not None:
            cache.length += x.shape[1]
        return self.encoder_norm(x)

    def decode(
        self, encoded: Tensor, known: Tensor, query: Tensor, cache: KeyValueCache | None = None
    ) -> Tensor:
        """``z [b, m, decoder_width]`` at the positions ``query [b, m]``.

        Args:
            encoded: the encoder's output: of the buffer and the tokens at ``known [b, k]``; with a cache that holds
                something, of the last ones of them alone, and only their places and the query positions are computed.
        """
        if cache is None or not cache.length:
            x, places = self._decoder_inputs(encoded, known), query + self.config.buffer
            remember = [
                None if cache is None else functools.partial(cache.append, index)
                for index in range(len(self.decoder_blocks))
            ]
        else:
            x, written = self._new_decoder_inputs(encoded, known, query)
            places = torch.arange(encoded.shape[1], x.shape[1], device=x.device).expand(len(x), -1)
            remember = [
                functools.partial(cache.put, index, written) for index in range(len(self.decoder_blocks))
            ]
        for block, keep in zip(self.decoder_blocks[:-1], remember):
            x = block(x, remember=keep)
        # After the last attention each place is by itself, so only the query positions continue.
        x = self.decoder_blocks[-1](x, places, remember[-1])
        if cache is not None:
            cache.length = self.config.buffer + self.tokens
        return self.decoder_norm(x) + F.embedding(query, self.condition_positions[0])

    def _decoder_inputs(self, encoded: Tensor, known: Tensor) -> Tensor:
        """Buffer, known tokens and mask tokens, all in their places: ``[b, buffer + n, decoder_width]``."""
        buffer = self.config.buffer
        x = self.decoder_projection(encoded)
        grid = self.mask_token.to(x.dtype).expand(len(x), self.tokens, -1)
        index = known.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        grid = grid.scatter(1, index, x[:, buffer:])
        return torch.cat([x[:, :buffer], grid], dim=1) + self.decoder_positions

    def _new_decoder_inputs(self, encoded: Tensor, known: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens that became known and mask tokens at the query positions, ``[b, k + m, decoder_width]``, and their places."""
        x = self.decoder_projection(encoded)
        places = torch.cat([known[:, known.shape[1] - x.shape[1] :], query], dim=1) + self.config.buffer
        masks = self.mask_token.to(x.dtype).expand(len(x), query.shape[1], -1)
        return torch.cat([x, masks], dim=1) + F.embedding(places, self.decoder_positions[0]), places

    def forward(
        self,
        tokens: Tensor,
        known: Tensor,
        query: Tensor,
        labels: Tensor,
        cache: "MaskedCache | None" = None,
    ) -> Tensor:
        """Return ``z`` at ``query``; see :meth:`Backbone.forward`. Known and query positions may be any.

        A filled cache makes ``z`` an approximation (LazyMAR, arXiv 2503.12450): only newly known tokens and
        query positions go through the network. They attend to the cached keys and values of all other
        positions. ``known`` must begin with the known positions of the last call.
        """
        if cache is None:
            return self.decode(self.encode(tokens, known, labels), known, query)
        return self.decode(self.encode(tokens, known, labels, cache.encoder), known, query, cache.decoder)

    def new_cache(self, rows: int) -> "MaskedCache":
        """An empty cache, in the dtype and on the device of the weights."""
        config, like = self.config, self.encoder_norm.weight
        encoder = (
            config.encoder_depth,
            rows,
            config.encoder_heads,
            config.encoder_width // config.encoder_heads,
        )
        decoder = (
            config.decoder_depth,
            rows,
            config.decoder_heads,
            config.decoder_width // config.decoder_heads,
        )
        places = config.buffer + self.tokens
        return MaskedCache(
            KeyValueCache(*encoder, like.dtype, like.device),
            KeyValueCache(*decoder, like.dtype, like.device, growth=places),
        )

    def training_inputs(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A random share of the tokens is masked: these are the query positions ``[b, m]``, the others are known.

        One ratio a batch, from :func:`far.tokens.sample_mask_ratio`; other positions for every sample.
        """
        batch = len(tokens)
        ratio = sample_mask_ratio(generator, self.config.mask_ratio_min, self.config.mask_ratio_deviation)
        masked = max(1, math.ceil(self.tokens * ratio))
        orders = torch.rand(batch, self.tokens, generator=generator).argsort(dim=1).to(tokens.device)
        return tokens, orders[:, masked:], orders[:, :masked]


@dataclasses.dataclass(frozen=True)
class MaskedCache:
    """The encoder's keys and values lie in the order of generation, the decoder's by place."""

    encoder: KeyValueCache
    decoder: KeyValueCache

    def clear(self) -> None:
        """Hold nothing; the next step computes everything."""
        self.encoder.clear()
        self.decoder.clear()
