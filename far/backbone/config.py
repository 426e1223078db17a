"""Sizes of the backbones and how they are trained. Needs no torch: a recipe is checked without it."""

import dataclasses
import math
from typing import Literal

from far.config import check_count
from far.errors import InputError


@dataclasses.dataclass(frozen=True)
class MaskedConfig:
    """Size of the backbone, and how it is masked in training.

    ``buffer`` is the number of class-token copies before the sequence. The masking ratio of a batch is
    drawn from a normal of mean 1 and ``mask_ratio_deviation``, truncated to [``mask_ratio_min``, 1]; models of
    few tokens want a low minimum, since there every token that becomes known changes the picture much.
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
    mask_ratio_deviation: float = 0.25
    kind: Literal["masked"] = "masked"

    def __post_init__(self) -> None:
        for part in ("encoder", "decoder"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            check_count(f"{part}_width", width)
            if heads < 1 or width % heads:
                raise InputError(f"{part}_width {width} must be a positive multiple of {part}_heads {heads}")
            check_count(f"{part}_depth", getattr(self, f"{part}_depth"), 2**10)
        if self.buffer < 1:
            raise InputError(f"buffer {self.buffer} must be positive: with no token known, it is all that the encoder sees")
        check_count("buffer", self.buffer)
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout {self.dropout} must be at least 0 and below 1")
        if not 0 <= self.mask_ratio_min < 1 or self.mask_ratio_deviation <= 0:
            raise InputError(
                f"mask_ratio_min {self.mask_ratio_min} must be at least 0 and below 1, "
                f"and mask_ratio_deviation {self.mask_ratio_deviation} positive"
            )


@dataclasses.dataclass(frozen=True)
class CausalConfig:
    """Size of the backbone, and how it is trained.

    ``buffer`` is the number of class-token copies before the sequence. ``positions`` of the rotary embedding are
    (row, column), or the number in the sequence. ``input_noise`` is the deviation of the noise on the tokens that are
    fed in training: in sampling the backbone sees tokens with the head's errors, here it learns to bear them.
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
        check_count("width", self.width)
        if self.heads < 1 or self.width % self.heads:
            raise InputError(f"width {self.width} must be a positive multiple of heads {self.heads}")
        axes = 2 if self.positions == "grid" else 1
        if self.width // self.heads % (2 * axes):
            raise InputError(
                f"width {self.width} / heads {self.heads} must be a multiple of {2 * axes} for rotary positions on a {self.positions}"
            )
        check_count("depth", self.depth, 2**10)
        check_count("buffer", self.buffer)
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout {self.dropout} must be at least 0 and below 1")
        if not (math.isfinite(self.input_noise) and self.input_noise >= 0):
            raise InputError(f"input_noise {self.input_noise} must be a number of at least 0")

    @property
    def hidden_width(self) -> int:
        """Of the feed-forward part: 8/3 of the width, rounded up to a multiple of 256 (LLaMA's rule)."""
        return -(-8 * self.width // (3 * 256)) * 256
