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
    _HOMES = dict.fromkeys(("HEADS", "build_head", "register"), "far.heads.build")
    _HOMES |= dict.fromkeys(("Condition", "Draw", "Head", "Normal", "TokenLoss"), "far.heads.head")
    __getattr__, __dir__ = lazily(__name__, _HOMES)

__all__ = [
    "HEADS", "Condition", "DiffusionConfig", "Draw", "EnergyConfig", "FlowConfig", "FlowMapConfig", "Head",
    "HeadConfig", "Normal", "ShortcutConfig", "TokenLoss", "build_head", "register",
]  # fmt: skip
