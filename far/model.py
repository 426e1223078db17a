"""``FAR``: a backbone and a head, its configuration, the named presets, and the training loss.

Masks and noise are drawn below this level, optimizers and files live above it, and so does the
autoencoder: the model sees latents only.
"""

import torch
from torch import Tensor, nn

from far.backbone import build_backbone
from far.heads import Condition, TokenLoss, build_head
from far.layers import take
from far.model_config import PRESETS as PRESETS
from far.model_config import ModelConfig
from far.model_config import NetworkConfig as NetworkConfig
from far.model_config import preset as preset
from far.tokens import on_sphere, patchify, unpatchify


class FAR(nn.Module):
    """Latents ``[b, c, h, w]`` of deviation 1 as a sequence of tokens, each drawn by the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(
            config.network.backbone, config.token_grid, config.token_channels, config.classes
        )
        self.head = build_head(config.network.head, config.token_channels, self.backbone.width)

    @property
    def null_label(self) -> int:
        """The label that stands for "no class"."""
        return self.config.classes

    def tokens(self, latents: Tensor) -> Tensor:
        """Latents ``[b, c, h, w]`` → tokens ``[b, n, d]``."""
        return patchify(latents, self.config.network.patch)

    def latents(self, tokens: Tensor) -> Tensor:
        """Tokens ``[b, n, d]`` → latents ``[b, c, h, w]``."""
        return unpatchify(tokens, self.config.network.patch, *self.config.token_grid)

    def constrain(self, tokens: Tensor) -> Tensor:
        """Tokens ``[…, d]`` as the model wants them: on the sphere, or as they are."""
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
        teacher: "FAR",
        step: int = 0,
    ) -> TokenLoss:
        """The head's loss at every token that the backbone predicts.

        For a head that learns guidance, half of the images go through the backbone a second time, without their class.

        Args:
            latents: normalized latents ``[b, c, h, w]``.
            labels: ``[b]``, 0 … classes − 1.
            label_drop: the share of samples that train the unconditional half of guidance.
            teacher: this model with EMA weights; its head gives targets to heads that bootstrap.
            step: of the training.
        """
        dropped = (torch.rand(len(labels), generator=generator) < label_drop).to(labels.device)
        labels = torch.where(dropped, self.null_label, labels)
        tokens = self.constrain(self.tokens(latents))
        fed, known, query = self.backbone.training_inputs(tokens, generator)
        z = self.backbone(fed, known, query, labels)
        targets = take(tokens, query)
        uncond = None
        if self.head.max_guidance > 1:
            half = -(-len(labels) // 2)
            with torch.no_grad():
                null = torch.full_like(labels[:half], self.null_label)
                uncond = self.backbone(fed[:half], known[:half], query[:half], null).flatten(0, 1)
        condition = Condition(z.flatten(0, 1), uncond)
        return self.head.loss(targets.flatten(0, 1), condition, generator, teacher.head, step)
