"""Autoencoders of diffusers as tokenizers. diffusers builds the networks, and is imported only for that."""

import importlib
from typing import Any

from torch import nn

from far.diffusers_config import DiffusersConfig
from far.errors import InputError
from far.tokenizer import Tokenizer


class DiffusersAutoencoder(Tokenizer):
    """An ``AutoencoderKL`` or ``AutoencoderDC`` of diffusers, with its own tensor names.

    A DC-AE has no variance: its moments are its latents.

    Raises:
        InputError: diffusers is not installed, or cannot build such a network.
    """

    config: DiffusersConfig

    def __init__(self, config: DiffusersConfig) -> None:
        super().__init__()
        self.config = config
        network_type = network_class(config)
        try:
            network = network_type.from_config(config.sizes)
        except Exception as error:  # diffusers raises anything, such as ZeroDivisionError
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"diffusers cannot build this {config.class_name} ({reason})") from error
        self.encoder, self.decoder, self.small_decoder = network.encoder, network.decoder, None
        self.quant_conv, self.post_quant_conv = (
            getattr(network, name, None) or nn.Identity() for name in ("quant_conv", "post_quant_conv")
        )

    def include_weights(self) -> None:
        """Let every folder that is saved from now on hold a copy of the weights, not only their source."""
        self.config = self.config.including_weights()


def network_class(config: DiffusersConfig) -> Any:
    """Return the class of diffusers that builds the networks.

    Raises:
        InputError: diffusers is not installed, or too old.
    """
    try:
        return getattr(importlib.import_module("diffusers"), config.class_name)
    except (ImportError, AttributeError, RuntimeError) as error:
        needs = f"{config.class_name} needs diffusers"
        raise InputError(f"{needs}. Run: pip install 'far-image[diffusers]'") from error
