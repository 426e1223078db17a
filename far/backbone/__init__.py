"""Backbones: known tokens and a class → conditions at chosen positions."""

from typing import TYPE_CHECKING

from far.backbone.config import BlockCausalConfig, CausalConfig, MaskedConfig
from far.lazy import lazily

if TYPE_CHECKING:
    from far.backbone.backbone import Backbone
    from far.backbone.block_causal import BlockCausalBackbone
    from far.backbone.build import build_backbone
    from far.backbone.causal import CausalBackbone
    from far.backbone.masked import MaskedBackbone
else:
    _HOMES = {
        "Backbone": "far.backbone.backbone", "BlockCausalBackbone": "far.backbone.block_causal",
        "CausalBackbone": "far.backbone.causal", "MaskedBackbone": "far.backbone.masked",
        "build_backbone": "far.backbone.build",
    }  # fmt: skip
    __getattr__, __dir__ = lazily(__name__, _HOMES)

__all__ = [
    "Backbone", "BlockCausalBackbone", "BlockCausalConfig", "CausalBackbone", "CausalConfig",
    "MaskedBackbone", "MaskedConfig", "build_backbone",
]  # fmt: skip
