"""Sizes of a generator and the named presets, without torch, so that recipes are checked quickly."""

import dataclasses

from far.backbone.config import BlockCausalConfig, CausalConfig, MaskedConfig
from far.config import check_count
from far.errors import InputError
from far.heads.config import DiffusionConfig, HeadConfig, ShortcutConfig


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Sizes of backbone and head, and latents per token.

    Attributes:
        backbone: kind and size of the backbone.
        head: kind and size of the head.
        patch: latents per token along each side.
        spherical: restrict latents to the norm √channels (SphereAR, arXiv 2509.24335), so that the norm of
            drawn tokens cannot drift. The autoencoder should be spherical too.
    """

    backbone: MaskedConfig | CausalConfig | BlockCausalConfig = MaskedConfig()
    head: HeadConfig = ShortcutConfig()
    patch: int = 1
    spherical: bool = False


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A network and the sizes of its data. ``grid`` is (rows, columns) of latents, not of tokens."""

    network: NetworkConfig = NetworkConfig()
    classes: int = 1000
    latent_channels: int = 16
    grid: tuple[int, ...] = (16, 16)

    def __post_init__(self) -> None:
        patch = self.network.patch
        if len(self.grid) != 2 or min(self.grid) < 1 or patch < 1 or any(side % patch for side in self.grid):
            raise InputError(f"grid {list(self.grid)} must be two positive multiples of the patch {patch}")
        check_count("grid", max(self.grid), 2**8)
        check_count("classes", self.classes, 2**20)
        check_count("latent_channels", self.latent_channels)

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.grid[0] // self.network.patch, self.grid[1] // self.network.patch

    @property
    def tokens(self) -> int:
        return self.token_grid[0] * self.token_grid[1]

    @property
    def token_channels(self) -> int:
        return self.latent_channels * self.network.patch**2


def _masked(width: int, depth: int, heads: int, head: HeadConfig) -> NetworkConfig:
    return NetworkConfig(MaskedConfig(width, depth, heads, width, depth, heads), head)


def _causal(width: int, depth: int, heads: int, head: HeadConfig) -> NetworkConfig:
    return NetworkConfig(CausalConfig(width=width, depth=depth, heads=heads), head)


def _block_causal(width: int, depth: int, heads: int, head: HeadConfig) -> NetworkConfig:
    return NetworkConfig(
        BlockCausalConfig(width=width, encoder_depth=depth, decoder_depth=depth, heads=heads), head
    )


# MAR's sizes (arXiv 2406.11838), at 16 × 16 tokens of 16 channels and 1000 classes.
PRESETS: dict[str, NetworkConfig] = {
    # width, depth and attention heads of the backbone; width and depth of the head; parameters
    "mar-b": _masked( 768, 12, 12, DiffusionConfig(1024,  6)),  # 208 M
    "mar-l": _masked(1024, 16, 16, DiffusionConfig(1280,  8)),  # 479 M
    "mar-h": _masked(1280, 20, 16, DiffusionConfig(1536, 12)),  # 943 M
    "far-b": _masked( 768, 12, 12, ShortcutConfig(1024,  6)),  # 210 M
    "far-l": _masked(1024, 16, 16, ShortcutConfig(1280,  8)),  # 481 M
    "far-h": _masked(1280, 20, 16, ShortcutConfig(1536, 12)),  # 946 M
    # LlamaGen's blocks (arXiv 2406.06525), whose 111, 343 and 775 M include two vocabulary tables.
    "far-causal-b":  _causal( 768, 12, 12, ShortcutConfig(1024,  6)),  # 123 M
    "far-causal-l":  _causal(1024, 24, 16, ShortcutConfig(1280,  8)),  # 384 M
    "far-causal-xl": _causal(1280, 36, 20, ShortcutConfig(1536, 12)),  # 887 M
    # As many blocks, half of them for the known tokens and half for the query positions (arXiv 2503.10568).
    "far-bc-b":  _block_causal( 768,  6, 12, ShortcutConfig(1024,  6)),  # 123 M
    "far-bc-l":  _block_causal(1024, 12, 16, ShortcutConfig(1280,  8)),  # 384 M
    "far-bc-xl": _block_causal(1280, 18, 20, ShortcutConfig(1536, 12)),  # 887 M
}  # fmt: skip


def preset(name: str) -> NetworkConfig:
    """Return the preset of a name.

    Raises:
        InputError: no preset has this name.
    """
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}. Choose one of: {', '.join(PRESETS)}")
    return PRESETS[name]
