"""Heads: generative models of one token given its condition ``z``. To add one, see CONTRIBUTING.md."""

from typing import TYPE_CHECKING

from far.heads.config import HeadConfig
from far.lazy import lazily

if TYPE_CHECKING:
    from far.heads.build import HEADS, build_head
    from far.heads.head import Head, TokenLoss
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "HEADS": "far.heads.build",
            "Head": "far.heads.head",
            "TokenLoss": "far.heads.head",
            "build_head": "far.heads.build",
        },
    )

__all__ = ["HEADS", "Head", "HeadConfig", "TokenLoss", "build_head"]
