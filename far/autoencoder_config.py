"""Size and latent statistics of an autoencoder. Needs no torch: a recipe is checked without it."""

import dataclasses
from typing import Any, Literal

from far.config import check_count, to_dict
from far.errors import InputError

# The networks of an autoencoder that turn latents into images.
DecoderName = Literal["full", "small"]
DECODERS: tuple[DecoderName, ...] = ("full", "small")


@dataclasses.dataclass(frozen=True)
class SmallDecoderConfig:
    """Size of a second, faster decoder, which the stage ``small-decoder`` trains to imitate the first.

    Attributes:
        width: channels at half the image's resolution; at coarser ones they are multiplied by the
            autoencoder's ``width_multipliers``. 0 is no small decoder.
        blocks: residual blocks per resolution.
    """

    width: int = 0
    blocks: int = 1

    def __post_init__(self) -> None:
        if self.width < 0:
            raise InputError(f"small_decoder width {self.width} must be at least 0")
        check_count("small_decoder width", max(1, self.width))
        check_count("small_decoder blocks", self.blocks, 2**8)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Size and latent statistics of an autoencoder.

    Attributes:
        width: channels at full resolution.
        width_multipliers: factors of ``width``, one per resolution. 3 to 5 of them give a stride of 4 to 16.
        blocks: residual blocks per resolution.
        latent_channels: channels of a latent.
        norm_groups: groups of each normalization, a divisor of ``width``. Narrow autoencoders need few,
            because a group of one channel loses that channel's mean.
        scale: a latent leaves as ``(latent − shift) · scale``, with zero mean and unit variance over the
            training images; one number, or one per channel, measured at the end of training.
        shift: see ``scale``; one number, or one per channel.
        spherical: scale every latent vector to the norm √latent_channels, in encoding and decoding
            (SphereAR, arXiv 2509.24335).
        small_decoder: size of a second, faster decoder, if there is one.
    """

    width: int = 128
    width_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    latent_channels: int = 16
    norm_groups: int = 32
    scale: float | tuple[float, ...] = 0.2325
    shift: float | tuple[float, ...] = 0.0
    spherical: bool = False
    small_decoder: SmallDecoderConfig = SmallDecoderConfig()

    def __post_init__(self) -> None:
        multipliers = list(self.width_multipliers)
        if not 3 <= len(multipliers) <= 5 or not 1 <= min(multipliers) <= max(multipliers) <= 2**8:
            raise InputError(f"width_multipliers {multipliers} must be 3 to 5 numbers of 1 to {2**8}")
        for name in ("width", "blocks", "latent_channels", "norm_groups"):
            check_count(f"autoencoder {name}", getattr(self, name), 2**8 if name == "blocks" else 2**16)
        if self.width % self.norm_groups:
            raise InputError(f"norm_groups {self.norm_groups} must divide the width {self.width}")
        for name, value in (("scale", self.scale), ("shift", self.shift)):
            if isinstance(value, tuple) and len(value) != self.latent_channels:
                count = f"{len(value)} values for {self.latent_channels} latent channels"
                raise InputError(f"autoencoder {name} has {count}. Give one number, or one per channel")
        if min(self.scale if isinstance(self.scale, tuple) else (self.scale,)) <= 0:
            raise InputError(f"autoencoder scale {self.scale} must be positive")

    @property
    def widths(self) -> list[int]:
        """Channels at each resolution, from the finest."""
        return [self.width * multiplier for multiplier in self.width_multipliers]

    @property
    def stride(self) -> int:
        """Pixels of image per latent, along a side."""
        return 2 ** (len(self.width_multipliers) - 1)

    @property
    def moment_channels(self) -> int:
        """Channels of the cached moments: mean and log-variance."""
        return 2 * self.latent_channels

    @property
    def arithmetic(self) -> str:
        """Settings that moments depend on besides the encoder's weights, as text."""
        return "spherical" if self.spherical else ""

    @property
    def latent_settings(self) -> dict[str, Any]:
        """Settings that normalized latents depend on besides the encoder's weights."""
        return {name: value for name, value in to_dict(self).items() if name != "small_decoder"}
