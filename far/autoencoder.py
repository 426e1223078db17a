"""The KL autoencoder: image ↔ latent, its posterior, and the latents' scale and shift.

Arithmetic and parameter names are those of the latent-diffusion autoencoder that MAR uses as KL-16.
"""

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from far.autoencoder_config import AutoencoderConfig
from far.errors import InputError
from far.pictures import check_finite
from far.tokens import on_sphere

# Values in the largest activation of a batch: 16 images of 256 × 256 pixels at the published size.
_ACTIVATION = 2**27
# On a CPU, few images at a time with channels last stay in the caches: twice as fast at 64 × 64 pixels.
_CPU_CHUNK = 16


class Posterior:
    """The diagonal Gaussian ``q(latent | image)`` of moments ``[b, 2c, h, w]`` (mean, log-variance)."""

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = moments.chunk(2, dim=1)
        # The clamp keeps exp() finite; it is part of the published arithmetic.
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self, noise: Tensor) -> Tensor:
        """Return latents ``[b, c, h, w]`` from standard normal ``noise`` of the same shape."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """Return ``KL(q ‖ N(0, I))`` of each sample in nats, summed over the latent: ``[b]``."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))


class Autoencoder(nn.Module):
    """Images ``[b, 3, H, W]`` in [−1, 1] ↔ latents ``[b, c, H / stride, W / stride]``."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, images: Tensor) -> Posterior:
        """Return the posterior of images ``[b, 3, H, W]`` in [−1, 1]; see :meth:`moments`."""
        return Posterior(self.moments(images))

    def moments(self, images: Tensor) -> Tensor:
        """Return mean and log-variance ``[b, 2c, h, w]``, unscaled, as a latent cache stores them.

        Raises:
            InputError: the images' height or width is not a multiple of the stride.
        """
        height, width, stride = *images.shape[-2:], self.config.stride
        if height % stride or width % stride:
            raise InputError(f"image of {height}×{width}: both sides must be multiples of stride {stride}")
        moments = self._in_parts(lambda part: self.quant_conv(self.encoder(part)), images, height, width)
        if not self.config.spherical:
            return moments
        mean, logvar = moments.chunk(2, dim=1)
        return torch.cat([on_sphere(mean, dim=1), logvar], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Return images ``[b, 3, H, W]``, about [−1, 1], from unscaled latents ``[b, c, h, w]``."""
        if self.config.spherical:
            latents = on_sphere(latents, dim=1)
        height, width = (self.config.stride * side for side in latents.shape[-2:])
        return self._in_parts(lambda part: self.decoder(self.post_quant_conv(part)), latents, height, width)

    def images_at_once(self, height: int, width: int) -> int:
        """Return how many images of ``height × width`` pixels the networks take at once without gradients.

        Their largest activation, in the decoder, has at most 2²⁷ values, unless a single image has more.
        """
        widths = self.config.widths
        # A level of the decoder begins with the width of the next coarser one.
        levels = enumerate(zip(widths, [*widths[1:], widths[-1]]))
        largest = max(max(pair) * (height >> level) * (width >> level) for level, pair in levels)
        return max(1, _ACTIVATION // largest)

    def _in_parts(self, network: Callable[[Tensor], Tensor], x: Tensor, height: int, width: int) -> Tensor:
        """Return ``network(x)``, computed for a few images at a time unless gradients are recorded.

        A large batch would fill a GPU's memory, and activations of 2³¹ values overflow some kernels.
        """
        if torch.is_grad_enabled():
            return network(x)
        parts = [network(part) for part in x.split(self.images_at_once(height, width))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def normalize(self, latents: Tensor) -> Tensor:
        """Return unit-variance latents, as the generator models them, from raw ones."""
        shift, scale = (_per_channel(value, latents) for value in (self.config.shift, self.config.scale))
        return (latents - shift) * scale

    def denormalize(self, latents: Tensor) -> Tensor:
        """Return raw latents; the inverse of :meth:`normalize`."""
        shift, scale = (_per_channel(value, latents) for value in (self.config.shift, self.config.scale))
        return latents / scale + shift

    @torch.no_grad()
    def to_images(self, latents: Tensor) -> Tensor:
        """Return images ``[b, 3, H, W]`` in [0, 1] from unit-variance latents ``[b, c, h, w]``.

        Raises:
            NotFiniteError: an image has values that are not finite.
        """
        latents = self.denormalize(latents.to(self.quant_conv.weight.dtype))
        chunk = _CPU_CHUNK if latents.device.type == "cpu" else len(latents)
        parts = [
            self.decode(part.contiguous(memory_format=torch.channels_last)).float() / 2 + 0.5
            for part in latents.split(chunk)
        ]
        # All generated images leave a model here. A PNG would show NaN as black.
        return check_finite(torch.cat(parts)).clamp(0, 1).contiguous()

    @torch.no_grad()
    def to_latents(self, images: Tensor) -> Tensor:
        """Return unit-variance latents ``[b, c, h, w]``, the posteriors' means, from images in [0, 1]."""
        weight = self.quant_conv.weight
        images = (images * 2 - 1).to(weight.device, weight.dtype, memory_format=torch.channels_last)
        return self.normalize(self.encode(images).mean.float())

    def same_latents(self, other: "Autoencoder") -> bool:
        """Return whether both give the same latents, up to the rounding of weights when one was saved."""
        pairs = list(zip(self._encoding().values(), other._encoding().values()))
        return self.config == other.config and any(
            all(torch.equal(ours.to(dtype), theirs.to(dtype)) for ours, theirs in pairs)
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
        )

    def fingerprint(self) -> str:
        """Return a digest of the encoder's weights: other moments have another fingerprint."""
        digest = hashlib.sha256(b"spherical" if self.config.spherical else b"")
        for name, tensor in self._encoding().items():
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _encoding(self) -> dict[str, Tensor]:
        """Return the weights that latents depend on, in float32 on the CPU."""
        weights = self.encoder.state_dict() | self.quant_conv.state_dict()
        return {name: tensor.float().cpu() for name, tensor in weights.items()}


def _per_channel(value: float | tuple[float, ...], latents: Tensor) -> float | Tensor:
    """Return one value per channel as ``[1, c, 1, 1]`` like ``latents``, and a single number unchanged."""
    return latents.new_tensor(value).view(1, -1, 1, 1) if isinstance(value, tuple) else value


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
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


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
                level.upsample = _upsample(widths[index])
            levels.append(level)
            channels = widths[index]
        self.up = nn.ModuleList(reversed(levels))  # the published names count from the finest level
        self.norm_out = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


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
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.nin_shortcut(x) + y


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


def _upsample(channels: int) -> nn.Sequential:
    """Return layers that double the resolution by repetition."""
    convolution = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(repeat=nn.Upsample(scale_factor=2.0), conv=convolution))
