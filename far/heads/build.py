"""Registry of heads, and the function that builds one from its configuration."""

from typing import TypeVar

from far.errors import InputError
from far.heads.config import HeadConfig
from far.heads.diffusion import DiffusionHead
from far.heads.energy import EnergyHead
from far.heads.flow import FlowHead
from far.heads.flow_map import FlowMapHead
from far.heads.head import Head
from far.heads.shortcut import ShortcutHead

# Heads by the kind of their configuration.
HEADS: dict[str, type[Head]] = {
    cls.config_class.kind: cls for cls in (ShortcutHead, FlowHead, DiffusionHead, FlowMapHead, EnergyHead)
}

AnyHead = TypeVar("AnyHead", bound=Head)


def register(head: type[AnyHead]) -> type[AnyHead]:
    """Register a head class, as a decorator: recipes and ``config.json`` then accept its kind and keys."""
    kind = head.config_class.kind
    HEADS[kind], HeadConfig.kinds[kind] = head, head.config_class
    return head


def build_head(config: HeadConfig, channels: int, condition: int) -> Head:
    """Return an untrained head for tokens of ``channels`` and conditions of ``condition`` channels.

    Raises:
        InputError: the kind of ``config`` is not registered.
    """
    if config.kind not in HEADS:
        raise InputError(f"head kind {config.kind!r} is not registered. Choose one of: {', '.join(HEADS)}")
    return HEADS[config.kind](config, channels, condition)
