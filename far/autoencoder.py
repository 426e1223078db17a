"""The KL autoencoder: image ↔ latent.

Arithmetic and parameter names are those of the latent-diffusion autoencoder that MAR uses as KL-16.
"""

import dataclasses
import itertools
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from far.autoencoder_config import AutoencoderConfig, SmallDecoderConfig
from far.tokenizer import Posterior, Tokenizer

__all__ = ["Autoencoder", "AutoencoderConfig", "Posterior", "SmallDecoderConfig"]


class Autoencoder(Tokenizer):
    """The KL autoencoder of latent diffusion: images ``[b, 3, H, W]`` in [−1, 1] ↔ latents."""

    config: AutoencoderConfig
    encoder: "Encoder"
    decoder: "Decoder"
    small_decoder: "SmallDecoder | None"

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.small_decoder = SmallDecoder(config) if config.small_decoder.width else None

    def set_small_decoder(self, size: SmallDecoderConfig) -> None:
        """Put an untrained small decoder, or none, in place of any other, and use the full one."""
        self.config = dataclasses.replace(self.config, small_decoder=size)
        self.small_decoder = SmallDecoder(self.config) if size.width else None
        self.use_decoder("full")


class Encoder(nn.Module):
    """Images → ``2c`` channels; attention only at the coarsest resolution."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        self.conv_in = nn.Conv2d(3, config.width, 3, padding=1)
        self.down = nn.ModuleList()
        channels = config.width
        for index, width in enumerate(widths):
            last = index == len(widths) - 1
            level = Level(channels, width, config.blocks, groups, attention=last)
            if not last:
                level.downsample = Downsample(width)
            self.down.append(level)
            channels = width
        self.mid = _middle(channels, groups)
        self.norm_out = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(_silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents → images; one more block per level than the encoder, no attention in the levels."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        channels = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = _middle(channels, groups)
        levels = []
        for index in reversed(range(len(widths))):
            level = Level(channels, widths[index], config.blocks + 1, groups, attention=False)
            if index:
                level.upsample = Upsample(widths[index])
            levels.append(level)
            channels = widths[index]
        self.up = nn.ModuleList(reversed(levels))  # the published names count from the finest level
        self.norm_out = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(_silu(self.norm_out(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, then possibly a change of resolution."""

    def __init__(
        self, channels_in: int, channels_out: int, blocks: int, groups: int, *, attention: bool
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * blocks
        self.block = nn.ModuleList(ResidualBlock(a, b, groups) for a, b in itertools.pairwise(widths))
        attentions = blocks if attention else 0
        self.attn = nn.ModuleList(SpatialAttention(channels_out, groups) for _ in range(attentions))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return self.upsample(self.downsample(x))


def _middle(channels: int, groups: int) -> nn.Sequential:
    """Return the layers at the coarsest resolution."""
    parts: list[tuple[str, nn.Module]] = [
        ("block_1", ResidualBlock(channels, channels, groups)),
        ("attn_1", SpatialAttention(channels, groups)),
        ("block_2", ResidualBlock(channels, channels, groups)),
    ]
    return nn.Sequential(OrderedDict(parts))


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice; a 1×1 convolution on the shortcut if the width changes."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps=1e-6)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        same = channels_in == channels_out
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(_silu(self.norm1(x)))
        y = self.conv2(_silu(self.norm2(y)))
        return y.add_(self.nin_shortcut(x))


def _silu(x: Tensor) -> Tensor:
    """Return the SiLU of ``x``, in its memory unless gradients are recorded: new memory costs more."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions, residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(y.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve the resolution: pad one pixel at the right and bottom, then a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution: repeat every pixel, then a 3×3 convolution.

    In float32 on a CPU and without gradients, one transposed convolution does both in 4/9 of the arithmetic.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if plain or x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
            return self.conv(F.interpolate(x, scale_factor=2.0))
        # Made at every call: a copy that is kept would miss changes that torch does not count.
        return F.conv_transpose2d(x, transposed_weight(weight), self.conv.bias, stride=2, padding=1)


def transposed_weight(weight: Tensor) -> Tensor:
    """Return the weight ``[in, out, 4, 4]`` that convolves ``[out, in, 3, 3]`` after repeating every pixel.

    It is for a transposed convolution of stride 2 and padding 1, in the memory order of channels_last. Each
    output pixel reads 2 × 2 input pixels, whose weights are sums of one or two weights per axis.
    """
    last = torch.channels_last
    flipped = weight.transpose(0, 1).flip(2, 3).contiguous(memory_format=last)
    joint = flipped.new_zeros(*flipped.shape[:2], 4, 4).contiguous(memory_format=last)
    for rows, columns in itertools.product((slice(0, 3), slice(1, 4)), repeat=2):
        joint[:, :, rows, columns] += flipped
    return joint


class SmallDecoder(nn.Module):
    """Latents → images by convolutions and ReLUs at half the images' resolution and below (after TAESD).

    No layer normalizes or attends, so pixels depend on nearby latents only.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        size = config.small_decoder
        widths = [size.width * multiplier for multiplier in config.width_multipliers[:-1]]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.levels = nn.ModuleList()
        for index in reversed(range(len(widths))):
            level = nn.Sequential(*(PlainBlock(widths[index]) for _ in range(size.blocks)))
            if index:
                level.append(nn.ConvTranspose2d(widths[index], widths[index - 1], 4, stride=2, padding=1))
                level.append(nn.ReLU(inplace=True))
            self.levels.append(level)
        self.conv_out = nn.Conv2d(widths[0], 2 * 2 * 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv_in(x), inplace=True)
        for level in self.levels:
            x = level(x)
        return F.pixel_shuffle(self.conv_out(x), 2)


class PlainBlock(nn.Module):
    """Residual block ``relu(x + conv(relu(conv(x))))``, at first the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x), inplace=True)), inplace=True)
