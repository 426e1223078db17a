"""The registry of heads, and how one is built from its configuration."""

from far.heads.config import HEADS, HeadConfig
from far.heads.diffusion import DiffusionHead
from far.heads.energy import EnergyHead
from far.heads.flow import FlowHead
from far.heads.flow_map import FlowMapHead
from far.heads.head import Head
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
