"""MAR's masked encoder-decoder (arXiv 2406.11838, section 3.3).

The encoder sees the class (several copies, the "buffer") and the known tokens. The decoder sees the encoder's
output with mask tokens at the unknown positions, and returns ``z`` there.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from far.backbone.backbone import Backbone
from far.backbone.config import MaskedConfig
from far.devices import to_device
from far.layers import Block, KeyValueCache, as_input, block_caches, take
from far.tokens import sample_mask_ratio


class MaskedBackbone(Backbone):
    """Known tokens, in any order, and a class → ``z [b, m, decoder_width]`` at query positions."""

    any_order = True
    exact_cache = False

    def __init__(self, config: MaskedConfig, tokens: int, channels: int, classes: int) -> None:
        super().__init__()
        self.config, self.tokens = config, tokens
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
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and "embedding" not in name:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    @property
    def width(self) -> int:
        return self.config.decoder_width

    def encode(
        self, tokens: Tensor, known: Tensor, labels: Tensor, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Return the encoder's output ``[b, buffer + k, encoder_width]``; see :meth:`forward`.

        If ``cache`` holds the buffer and the first tokens of ``known``, the output has only the other tokens.
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
        if cache is not None:
            cache.extend(*x.shape[:2])
        caches = block_caches(cache)
        for block in self.encoder_blocks:
            x = block(x, None, next(caches))
        return self.encoder_norm(x)

    def decode(
        self, encoded: Tensor, known: Tensor, query: Tensor, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Return ``z [b, m, decoder_width]`` at ``query`` from the output of :meth:`encode`.

        If ``cache`` holds all positions, only those of ``encoded`` and ``query`` are computed.
        """
        buffer, x = self.config.buffer, self.decoder_projection(encoded)
        masks = self.mask_token.to(x.dtype)
        if cache is None or not cache.length:
            # Buffer, known tokens and mask tokens in spatial order.
            grid = masks.expand(len(x), self.tokens, -1)
            grid = grid.scatter(1, known.unsqueeze(-1).expand(-1, -1, x.shape[-1]), x[:, buffer:])
            x = torch.cat([x[:, :buffer], grid], dim=1) + self.decoder_positions
            positions = query + buffer
            if cache is not None:
                cache.extend(*x.shape[:2])
        else:
            # New tokens, and mask tokens at the query positions.
            new = torch.cat([known[:, known.shape[1] - x.shape[1] :], query], dim=1) + buffer
            x = torch.cat([x, masks.expand(len(x), query.shape[1], -1)], dim=1)
            x = x + F.embedding(new, self.decoder_positions[0])
            positions = torch.arange(encoded.shape[1], x.shape[1], device=x.device).expand(len(x), -1)
            cache.overwrite(new)
        *blocks, last = self.decoder_blocks
        caches = block_caches(cache)
        for block in blocks:
            x = block(x, None, next(caches))
        # After the last attention, positions no longer interact, so only the query positions continue.
        x = last(x, positions, next(caches))
        return self.decoder_norm(x) + F.embedding(query, self.condition_positions[0])

    def forward(
        self, tokens: Tensor, known: Tensor, query: Tensor, labels: Tensor, cache: "MaskedCache | None" = None
    ) -> Tensor:
        """Return ``z`` at ``query``; see :meth:`Backbone.forward`. Known and query positions may be any.

        A filled cache makes ``z`` an approximation (LazyMAR, arXiv 2503.12450): only newly known tokens and
        query positions go through the network. They attend to the cached keys and values of all other
        positions. ``known`` must begin with the known positions of the last call.
        """
        encoder, decoder = (None, None) if cache is None else (cache.encoder, cache.decoder)
        return self.decode(self.encode(tokens, known, labels, encoder), known, query, decoder)

    def new_cache(self, rows: int) -> "MaskedCache":
        """Return an empty cache in the dtype and on the device of the weights."""
        config, like, positions = self.config, self.encoder_norm.weight, self.config.buffer + self.tokens
        encoder = config.encoder_heads, positions, config.encoder_width // config.encoder_heads, like
        decoder = config.decoder_heads, positions, config.decoder_width // config.decoder_heads, like
        return MaskedCache(
            KeyValueCache(config.encoder_depth, rows, *encoder),
            KeyValueCache(config.decoder_depth, rows, *decoder),
        )

    def training_inputs(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs that mask a random fraction of the tokens, the same one for the whole batch."""
        ratio = sample_mask_ratio(generator, self.config.mask_ratio_min, self.config.mask_ratio_std)
        masked = max(1, math.ceil(self.tokens * ratio))
        orders = torch.rand(len(tokens), self.tokens, generator=generator).argsort(dim=1)
        orders = to_device(orders, tokens.device)
        return tokens, orders[:, masked:], orders[:, :masked]


@dataclasses.dataclass(frozen=True)
class MaskedCache:
    """Keys and values of the encoder in order of generation, and of the decoder in spatial order."""

    encoder: KeyValueCache
    decoder: KeyValueCache

    def clear(self) -> None:
        self.encoder.clear()
        self.decoder.clear()
