"""Heads: generative models of one token given its condition ``z``. To add one, see CONTRIBUTING.md."""

from far.heads.diffusion import DiffusionHead
from far.heads.energy import EnergyHead
from far.heads.flow import FlowHead
from far.heads.flow_map import FlowMapHead
from far.heads.head import HEADS, Head, HeadConfig, TokenLoss
from far.heads.shortcut import ShortcutHead

HEADS |= {
    "diffusion": DiffusionHead,
    "energy": EnergyHead,
    "flow": FlowHead,
    "flow_map": FlowMapHead,
    "shortcut": ShortcutHead,
}


def build_head(config: HeadConfig, channels: int, condition: int) -> Head:
    """The head of ``config`` for tokens of ``channels`` and conditions of ``condition`` numbers."""
    return HEADS[config.kind](config, channels, condition)  # type: ignore[call-arg, arg-type]


__all__ = ["HEADS", "Head", "HeadConfig", "TokenLoss", "build_head"]
