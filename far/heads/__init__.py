"""Heads: generative models of one token given its condition ``z``. To add one, see CONTRIBUTING.md."""

from typing import TYPE_CHECKING

from far.heads.config import (
    DiffusionConfig,
    EnergyConfig,
    FlowConfig,
    FlowMapConfig,
    HeadConfig,
    ShortcutConfig,
)
from far.lazy import lazily

if TYPE_CHECKING:
    from far.heads.build import HEADS, build_head, register
    from far.heads.head import Condition, Draw, Head, Normal, TokenLoss
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "HEADS": "far.heads.build",
            "Condition": "far.heads.head",
            "Draw": "far.heads.head",
            "Head": "far.heads.head",
            "Normal": "far.heads.head",
            "TokenLoss": "far.heads.head",
            "build_head": "far.heads.build",
            "register": "far.heads.build",
        },
    )

__all__ = [
    "HEADS",
    "Condition",
    "DiffusionConfig",
    "Draw",
    "EnergyConfig",
    "FlowConfig",
    "FlowMapConfig",
    "Head",
    "HeadConfig",
    "Normal",
    "ShortcutConfig",
    "TokenLoss",
    "build_head",
    "register",
]
