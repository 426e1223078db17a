"""Backbones: known tokens and a class → conditions at chosen positions."""

from typing import TYPE_CHECKING

from far.backbone.config import AnyOrderConfig, CausalConfig, MaskedConfig
from far.lazy import lazily

if TYPE_CHECKING:
    from far.backbone.any_order import AnyOrderBackbone
    from far.backbone.backbone import Backbone
    from far.backbone.build import build_backbone
    from far.backbone.causal import CausalBackbone
    from far.backbone.masked import MaskedBackbone
else:
    _HOMES = {
        "AnyOrderBackbone": "far.backbone.any_order", "Backbone": "far.backbone.backbone",
        "CausalBackbone": "far.backbone.causal", "MaskedBackbone": "far.backbone.masked",
        "build_backbone": "far.backbone.build",
    }  # fmt: skip
    __getattr__, __dir__ = lazily(__name__, _HOMES)

__all__ = [
    "AnyOrderBackbone", "AnyOrderConfig", "Backbone", "CausalBackbone", "CausalConfig", "MaskedBackbone",
    "MaskedConfig", "build_backbone",
]  # fmt: skip
