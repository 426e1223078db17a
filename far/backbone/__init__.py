"""Backbones: known tokens and a class → conditions at chosen positions."""

from far.backbone.backbone import Backbone
from far.backbone.causal import CausalBackbone, CausalConfig
from far.backbone.masked import MaskedBackbone, MaskedConfig


def build_backbone(config: MaskedConfig | CausalConfig, grid: tuple[int, int], channels: int, classes: int) -> Backbone:
    """The backbone of ``config`` for a ``grid`` of (rows, columns) tokens of ``channels``."""
    if isinstance(config, CausalConfig):
        return CausalBackbone(config, grid, channels, classes)
    return MaskedBackbone(config, grid[0] * grid[1], channels, classes)


__all__ = ["Backbone", "CausalBackbone", "CausalConfig", "MaskedBackbone", "MaskedConfig", "build_backbone"]
