"""``FAR``: a backbone and a head, with its configuration, named presets and training loss."""

import torch
from torch import Tensor, nn

from far.backbone import build_backbone
from far.devices import to_device
from far.heads import Condition, TokenLoss, build_head
from far.layers import take
from far.model_config import PRESETS as PRESETS
from far.model_config import ModelConfig
from far.model_config import NetworkConfig as NetworkConfig
from far.model_config import preset as preset
from far.tokens import on_sphere, patchify, unpatchify


class FAR(nn.Module):
    """Generator of unit-variance latents ``[b, c, h, w]`` as a sequence of tokens, each drawn by the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        network, channels = config.network, config.token_channels
        self.backbone = build_backbone(network.backbone, config.token_grid, channels, config.classes)
        self.head = build_head(network.head, channels, self.backbone.width)

    @property
    def null_label(self) -> int:
        """Label that means "no class"."""
        return self.config.classes

    def tokens(self, latents: Tensor) -> Tensor:
        """Cut latents ``[b, c, h, w]`` into tokens ``[b, n, d]``."""
        return patchify(latents, self.config.network.patch)

    def latents(self, tokens: Tensor) -> Tensor:
        """Join tokens ``[b, n, d]`` to latents ``[b, c, h, w]``."""
        return unpatchify(tokens, self.config.network.patch, *self.config.token_grid)

    def constrain(self, tokens: Tensor) -> Tensor:
        """Return tokens ``[…, d]`` scaled to the sphere if the model is spherical, else unchanged."""
        if not self.config.network.spherical:
            return tokens
        return on_sphere(tokens.unflatten(-1, (self.config.latent_channels, -1)), dim=-2).flatten(-2)

    def loss(
        self,
        latents: Tensor,
        labels: Tensor,
        generator: torch.Generator,
        *,
        label_drop: float,
        step: int = 0,
    ) -> TokenLoss:
        """Return the head's loss at every query position of one training step.

        If the head learns guidance, half of the images pass through the backbone again, without their class.

        Args:
            latents: normalized latents ``[b, c, h, w]``.
            labels: ``[b]``, 0 … classes − 1.
            label_drop: fraction of samples without class, which train the unconditional half of guidance.
            step: training step, from 0.
        """
        dropped = to_device(torch.rand(len(labels), generator=generator) < label_drop, labels.device)
        labels = torch.where(dropped, self.null_label, labels)
        tokens = self.constrain(self.tokens(latents))
        fed, known, query = self.backbone.training_inputs(tokens, generator)
        z, uncond = self.backbone(fed, known, query, labels).flatten(0, 1), None
        if self.head.max_guidance > 1:
            half = -(-len(labels) // 2)
            with torch.no_grad():
                null = torch.full_like(labels[:half], self.null_label)
                uncond = self.backbone(fed[:half], known[:half], query[:half], null).flatten(0, 1)
        targets = take(tokens, query).flatten(0, 1)
        # The head is its own teacher: that of the EMA lags and does not know this backbone's conditions.
        return self.head.loss(targets, Condition(z, uncond), generator, self.head, step)
