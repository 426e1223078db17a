"""Build the backbone that a configuration describes."""

from far.backbone.backbone import Backbone
from far.backbone.block_causal import BlockCausalBackbone
from far.backbone.causal import CausalBackbone
from far.backbone.config import BlockCausalConfig, CausalConfig, MaskedConfig
from far.backbone.masked import MaskedBackbone


def build_backbone(
    config: MaskedConfig | CausalConfig | BlockCausalConfig,
    grid: tuple[int, int],
    channels: int,
    classes: int,
) -> Backbone:
    """Return the backbone of ``config`` for a ``grid`` of (rows, columns) tokens of ``channels``."""
    if isinstance(config, CausalConfig):
        return CausalBackbone(config, grid, channels, classes)
    if isinstance(config, BlockCausalConfig):
        return BlockCausalBackbone(config, grid, channels, classes)
    return MaskedBackbone(config, grid[0] * grid[1], channels, classes)
