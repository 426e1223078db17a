"""Size and latent statistics of an autoencoder. Needs no torch: a recipe is checked without it."""

import dataclasses

from far.config import check_count
from far.errors import InputError


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Size and latent statistics of an autoencoder.

    Attributes:
        width: channels at full resolution.
        width_multipliers: factors of ``width``, one per resolution, 3 to 5 of them; the stride is ``2 ** (len −
            1)``: 4 to 16.
        blocks: residual blocks per resolution.
        latent_channels: channels of a latent.
        norm_groups: groups of each normalization, a divisor of ``width``. Narrow autoencoders want few: a
            group of one channel loses that channel's mean.
        scale: a latent leaves as ``(latent − shift) · scale``, with unit variance over the training images;
            measured at the end of training.
        shift: see ``scale``; one number, or one per channel.
        spherical: scale every latent vector to the norm √latent_channels, in encoding and decoding
            (SphereAR, arXiv 2509.24335).
    """

    width: int = 128
    width_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    latent_channels: int = 16
    norm_groups: int = 32
    scale: float = 0.2325
    shift: float | tuple[float, ...] = 0.0
    spherical: bool = False

    def __post_init__(self) -> None:
        if not 3 <= len(self.width_multipliers) <= 5:
            raise InputError(
                f"width_multipliers: {len(self.width_multipliers)} of them give stride 2^{len(self.width_multipliers) - 1}; "
                "use 3 to 5 entries, for stride 4 to 16"
            )
        for name, most in (
            ("width", 2**16),
            ("blocks", 2**8),
            ("latent_channels", 2**16),
            ("norm_groups", 2**16),
        ):
            check_count(f"autoencoder {name}", getattr(self, name), most)
        if self.scale <= 0:
            raise InputError(f"autoencoder scale {self.scale} must be positive")
        if not 1 <= min(self.width_multipliers) <= max(self.width_multipliers) <= 2**8:
            raise InputError(
                f"width_multipliers {list(self.width_multipliers)} must be positive, and at most {2**8}"
            )
        if self.width % self.norm_groups:
            raise InputError(f"norm_groups {self.norm_groups} must divide the width {self.width}")
        if isinstance(self.shift, tuple) and len(self.shift) != self.latent_channels:
            raise InputError(
                f"shift has {len(self.shift)} entries for {self.latent_channels} latent channels; give one each"
            )

    @property
    def stride(self) -> int:
        """Pixels of image per latent, along a side."""
        return 2 ** (len(self.width_multipliers) - 1)
