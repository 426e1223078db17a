"""Configurations of the backbones, without torch, so that recipes are checked quickly."""

import dataclasses
import math
from typing import Literal

from far.config import check_count
from far.errors import InputError


@dataclasses.dataclass(frozen=True)
class MaskedConfig:
    """Size of the masked backbone, and its masking in training.

    Attributes:
        encoder_width: channels of the encoder, a multiple of its heads.
        encoder_depth: blocks of the encoder.
        encoder_heads: attention heads of the encoder.
        decoder_width: channels of the decoder, a multiple of its heads.
        decoder_depth: blocks of the decoder.
        decoder_heads: attention heads of the decoder.
        buffer: copies of the class token before the sequence.
        dropout: probability of dropout in attention and feed-forward parts.
        mask_ratio_min: smallest masking ratio. Each batch draws its ratio from a normal distribution of mean
            1, truncated to [``mask_ratio_min``, 1]. Models of few tokens need a low minimum, because each
            token that becomes known changes the image a lot.
        mask_ratio_std: standard deviation of the normal distribution.
        kind: selects this backbone, which is the default.
    """

    encoder_width: int = 768
    encoder_depth: int = 12
    encoder_heads: int = 12
    decoder_width: int = 768
    decoder_depth: int = 12
    decoder_heads: int = 12
    buffer: int = 64
    dropout: float = 0.1
    mask_ratio_min: float = 0.7
    mask_ratio_std: float = 0.25
    kind: Literal["masked"] = "masked"

    def __post_init__(self) -> None:
        for part in ("encoder", "decoder"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            check_count(f"{part}_width", width)
            if heads < 1 or width % heads:
                raise InputError(f"{part}_width {width} must be a positive multiple of {part}_heads {heads}")
            check_count(f"{part}_depth", getattr(self, f"{part}_depth"), 2**10)
        check_count("buffer", self.buffer)
        _check_fractions(self.dropout)
        if not 0 <= self.mask_ratio_min < 1 or self.mask_ratio_std <= 0:
            least, std = self.mask_ratio_min, self.mask_ratio_std
            raise InputError(f"mask_ratio_min {least} must be in [0, 1), and mask_ratio_std {std} positive")


@dataclasses.dataclass(frozen=True)
class CausalConfig:
    """Size of the causal backbone, and its training.

    Attributes:
        kind: selects this backbone; required.
        width: channels, a multiple of the heads.
        depth: number of blocks.
        heads: attention heads.
        buffer: copies of the class token before the sequence.
        positions: rotary positions: ``grid`` is (row, column), ``sequence`` is the index in the sequence.
        dropout: probability of dropout in attention and feed-forward parts.
        input_noise: standard deviation of noise on the input tokens in training. It prepares the backbone for
            the head's errors in sampling.
    """

    kind: Literal["causal"] = "causal"
    width: int = 768
    depth: int = 12
    heads: int = 12
    buffer: int = 1
    positions: Literal["grid", "sequence"] = "grid"
    dropout: float = 0.1
    input_noise: float = 0.1

    def __post_init__(self) -> None:
        width, heads, positions = self.width, self.heads, self.positions
        check_count("width", width)
        if heads < 1 or width % heads:
            raise InputError(f"width {width} must be a positive multiple of heads {heads}")
        pair = 4 if positions == "grid" else 2  # two channels per axis rotate together
        if width // heads % pair:
            raise InputError(f"width {width} / heads {heads} must be a multiple of {pair} ({positions})")
        check_count("depth", self.depth, 2**10)
        check_count("buffer", self.buffer)
        _check_fractions(self.dropout, self.input_noise)

    @property
    def hidden_width(self) -> int:
        """Hidden width of the feed-forward part."""
        return _hidden_width(self.width)


@dataclasses.dataclass(frozen=True)
class BlockCausalConfig:
    """Size of the block-causal backbone, and its training.

    Attributes:
        kind: selects this backbone; required.
        width: channels, a multiple of the heads.
        encoder_depth: blocks of the known tokens.
        decoder_depth: blocks of the query positions.
        heads: attention heads.
        buffer: copies of the class token before the sequence.
        raster_fraction: fraction of images that are trained in raster order. The others have random orders.
        dropout: probability of dropout in attention and feed-forward parts.
        input_noise: standard deviation of noise on the input tokens in training. It prepares the backbone for
            the head's errors in sampling.
    """

    kind: Literal["block_causal"] = "block_causal"
    width: int = 768
    encoder_depth: int = 12
    decoder_depth: int = 12
    heads: int = 12
    buffer: int = 1
    raster_fraction: float = 0.5
    dropout: float = 0.1
    input_noise: float = 0.1

    def __post_init__(self) -> None:
        width, heads = self.width, self.heads
        check_count("width", width)
        if heads < 1 or width % heads or width // heads % 4:  # rows and columns each rotate two channels
            raise InputError(f"width {width} must be a multiple of 4 times heads {heads}")
        for name in ("encoder_depth", "decoder_depth"):
            check_count(name, getattr(self, name), 2**10)
        check_count("buffer", self.buffer)
        if not 0 <= self.raster_fraction <= 1:
            raise InputError(f"raster_fraction {self.raster_fraction} must be within 0 … 1")
        _check_fractions(self.dropout, self.input_noise)

    @property
    def hidden_width(self) -> int:
        """Hidden width of the feed-forward part."""
        return _hidden_width(self.width)


def _check_fractions(dropout: float, input_noise: float = 0.0) -> None:
    """Raise an :class:`InputError` if dropout is not within [0, 1), or the noise is negative or infinite."""
    if not 0 <= dropout < 1:
        raise InputError(f"dropout {dropout} must be at least 0 and below 1")
    if not 0 <= input_noise < math.inf:
        raise InputError(f"input_noise {input_noise} must be a number of at least 0")


def _hidden_width(width: int) -> int:
    """Return LLaMA's 8/3 of the width, rounded up to a multiple of 256."""
    return -(-8 * width // (3 * 256)) * 256
