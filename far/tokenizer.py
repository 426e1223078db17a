"""Image tokenizers with continuous latents: image ↔ latent, its posterior, the latents' scale and shift."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from far.autoencoder_config import DECODERS, AutoencoderConfig, DecoderName
from far.devices import to_device
from far.diffusers_config import DiffusersConfig
from far.errors import InputError
from far.pictures import check_finite
from far.tokens import on_sphere

# Values in the largest activation of a batch: 16 images of 256 × 256 pixels at the published size.
_ACTIVATION = 2**27
# On a CPU, few images at a time with channels last stay in the caches: twice as fast at 64 × 64 pixels.
_CPU_CHUNK = 16


class Posterior:
    """The diagonal Gaussian ``q(latent | image)`` of moments ``[b, 2c, h, w]`` (mean, log-variance).

    A ``deterministic`` one has no variance: its moments ``[b, c, h, w]`` are the latents.
    """

    def __init__(self, moments: Tensor, *, deterministic: bool = False) -> None:
        self.deterministic = deterministic
        if deterministic:
            self.mean = moments
            return
        self.mean, logvar = moments.chunk(2, dim=1)
        # The clamp keeps exp() finite; it is part of the published arithmetic.
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self, noise: Tensor) -> Tensor:
        """Return latents ``[b, c, h, w]`` from standard normal ``noise`` of the same shape."""
        return self.mean if self.deterministic else self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """Return ``KL(q ‖ N(0, I))`` of each sample in nats, summed over the latent: ``[b]``."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))


class Tokenizer(nn.Module):
    """Images ``[b, 3, H, W]`` in [−1, 1] ↔ latents ``[b, c, H / stride, W / stride]``.

    Base class of :class:`far.autoencoder.Autoencoder` and
    :class:`far.diffusers_autoencoder.DiffusersAutoencoder`, which build the networks.

    Attributes:
        config: sizes, and scale and shift of the latents.
        encoder: images → what ``quant_conv`` turns into moments.
        decoder: what ``post_quant_conv`` makes of latents → images.
        quant_conv: 1×1 convolution, or the identity.
        post_quant_conv: as ``quant_conv``.
        small_decoder: a faster, approximate network in place of ``decoder``, or None.
        active_decoder: the one that decodes; see :meth:`use_decoder`.
    """

    config: AutoencoderConfig | DiffusersConfig
    encoder: nn.Module
    decoder: nn.Module
    quant_conv: nn.Module
    post_quant_conv: nn.Module
    small_decoder: nn.Module | None
    active_decoder: DecoderName = "full"

    def use_decoder(self, name: DecoderName) -> None:
        """Decode with ``full`` or ``small`` from now on.

        Raises:
            InputError: there is no such decoder.
        """
        if name not in DECODERS:
            raise InputError(f"decoder {name!r} does not exist. Choose one of {', '.join(DECODERS)}")
        if name == "small" and self.small_decoder is None:
            raise InputError("decoder 'small' is missing in this autoencoder. Train one, or use 'full'")
        self.active_decoder = name

    def decoder_network(self, name: DecoderName) -> nn.Module:
        """Return the decoder of a name, which the autoencoder must have."""
        network = self.small_decoder if name == "small" else self.decoder
        assert network is not None
        return network

    def encode(self, images: Tensor) -> Posterior:
        """Return the posterior of images ``[b, 3, H, W]`` in [−1, 1]; see :meth:`moments`."""
        return self.posterior(self.moments(images))

    def posterior(self, moments: Tensor) -> Posterior:
        """Return the posterior of moments as :meth:`moments` returns them."""
        deterministic = self.config.moment_channels == self.config.latent_channels
        return Posterior(moments, deterministic=deterministic)

    def moments(self, images: Tensor) -> Tensor:
        """Return mean and log-variance ``[b, 2c, h, w]``, unscaled, as a latent cache stores them.

        A tokenizer without variance returns its latents ``[b, c, h, w]``.

        Raises:
            InputError: the images' height or width is not a multiple of the stride.
        """
        height, width, stride = *images.shape[-2:], self.config.stride
        if height % stride or width % stride:
            unfit = f"images of {width}×{height} pixels do not divide by the autoencoder's stride {stride}"
            raise InputError(f"{unfit}. Crop or resize them")
        moments = self._in_parts(lambda part: self.quant_conv(self.encoder(part)), images, height, width)
        if not self.config.spherical:
            return moments
        mean, logvar = moments.chunk(2, dim=1)
        return torch.cat([on_sphere(mean, dim=1), logvar], dim=1)

    def decode(self, latents: Tensor, decoder: DecoderName | None = None) -> Tensor:
        """Return images ``[b, 3, H, W]``, about [−1, 1], from unscaled latents ``[b, c, h, w]``.

        ``decoder`` is one that the autoencoder has, by default ``active_decoder``.
        """
        network = self.decoder_network(decoder or self.active_decoder)
        if self.config.spherical:
            latents = on_sphere(latents, dim=1)
        height, width = (self.config.stride * side for side in latents.shape[-2:])
        return self._in_parts(lambda part: network(self.post_quant_conv(part)), latents, height, width)

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
        latents = self.denormalize(latents.to(next(self.decoder.parameters()).dtype))
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
        weight = next(self.encoder.parameters())
        images = (images * 2 - 1).to(weight.device, weight.dtype, memory_format=torch.channels_last)
        return self.normalize(self.encode(images).mean.float())

    def same_latents(self, other: "Tokenizer") -> bool:
        """Return whether both give the same latents, up to the rounding of weights when one was saved."""
        pairs = list(zip(self._encoding().values(), other._encoding().values()))
        return self.config.latent_settings == other.config.latent_settings and any(
            all(torch.equal(ours.to(dtype), theirs.to(dtype)) for ours, theirs in pairs)
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
        )

    def fingerprint(self) -> str:
        """Return a digest of the encoder's arithmetic and weights: other moments have another fingerprint."""
        digest = hashlib.sha256(self.config.arithmetic.encode())
        for name, tensor in self._encoding().items():
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _encoding(self) -> dict[str, Tensor]:
        """Return the weights that latents depend on, in float32 on the CPU."""
        weights = self.encoder.state_dict() | self.quant_conv.state_dict()
        return {name: tensor.float().cpu() for name, tensor in weights.items()}


def decoder_setting(autoencoder: Tokenizer | None) -> dict[str, object]:
    """Return the decoder to record with an image, unless it is the full one."""
    if autoencoder is None or autoencoder.active_decoder == "full":
        return {}
    return {"decoder": autoencoder.active_decoder}


def _per_channel(value: float | tuple[float, ...], latents: Tensor) -> float | Tensor:
    """Return one value per channel as ``[1, c, 1, 1]`` like ``latents``, and a single number unchanged."""
    if not isinstance(value, tuple):
        return value
    return to_device(torch.tensor(value, dtype=latents.dtype), latents.device).view(1, -1, 1, 1)
