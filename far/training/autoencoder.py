"""Training of the KL autoencoder: loss, figures on held-out images, and scale and shift of the latents."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from far.autoencoder import Autoencoder, Decoder, Posterior, SmallDecoder
from far.autoencoder_config import AutoencoderConfig
from far.data.image_sets import fingerprint, open_held_out, read_images
from far.data.images import sides
from far.data.shards import ShardReader
from far.data.training_images import open_training_images, read_full
from far.devices import to_device
from far.errors import InputError
from far.evaluation.features import SECOND_NETWORK, FeatureNetwork, load_feature_network
from far.evaluation.metrics import FeatureStatistics, frechet_distance, psnr, ssim
from far.folder import load_autoencoder, save_autoencoder
from far.pictures import check_finite, enlarge, grid, save_png
from far.seeds import seeded
from far.training.config import AutoencoderRecipe, LoopConfig
from far.training.discriminator import Discriminator, adaptive_weight, adversarial_losses
from far.training.epochs import epoch_rows, image_chunks
from far.training.loop import resolve_loop
from far.training.runs import checkpoints_folder, list_checkpoints


class AutoencoderTask:
    """Task of ``far train-autoencoder``; see :class:`far.training.loop.Task`.

    Args:
        config: size of the autoencoder, weights of the loss terms, and training.
        data: folder of the image set, with ``train`` and ``held-out``.
        run: the run's folder. If it holds a checkpoint, ``start_from`` is not read again.

    Raises:
        InputError: the images are missing or changed, their size is not a multiple of the autoencoder's
            stride, they are too small for the discriminator, or ``start_from`` has sizes other than
            ``model``.
    """

    def __init__(self, config: AutoencoderRecipe, data: Path, run: Path | None = None) -> None:
        self.loss_config, self.loop, self.stage = config.loss, resolve_loop(config.training), config.stage
        self.flip = config.flip
        self.train_images, read = open_training_images(data / "train")
        self._read = partial(read_full, read, len(self.train_images))
        self.held_out = open_held_out(data, self.train_images)
        self.identity: dict[str, Any] = {"images": fingerprint(self.train_images)}
        size, stride = sides(self.train_images.meta["size"]), config.model.stride
        if any(side % stride for side in size):
            shown = "×".join(map(str, reversed(size)))
            raise InputError(f"{data}: size {shown} is not a multiple of the autoencoder's stride {stride}")
        with seeded(self.loop.seed):
            self.module = Autoencoder(config.model)
            self.discriminator = _discriminator(config, min(size), self.loop.device)
        self.discriminator_rate = config.discriminator.learning_rate or self.loop.learning_rate
        if config.start_from is not None:
            resumed = run is not None and list_checkpoints(checkpoints_folder(run))
            # The published model has the scale and shift of its source, which no checkpoint holds.
            self.module = _trained_autoencoder(str(run) if resumed else config.start_from, config.model)
            self.identity["start_from"] = Path(config.start_from).name
        with seeded(self.loop.seed):
            self.trained = _set_stage(self.module, config)
        self.features: FeatureNetwork = load_feature_network().to(self.loop.device)
        self.unseen: FeatureNetwork = load_feature_network(SECOND_NETWORK).to(self.loop.device)

    def parameter_groups(self, config: LoopConfig) -> list[dict[str, Any]]:
        """Return the group of the trained parameters, and one of the discriminator if there is one."""
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [{"params": trained, "lr": config.learning_rate, "weight_decay": 0.0}]
        if self.discriminator is not None:
            parameters = list(self.discriminator.parameters())
            groups.append({"params": parameters, "lr": self.discriminator_rate, "weight_decay": 0.0})
        return groups

    def batch(self, number: int, generator: torch.Generator) -> Tensor:
        """Return images ``[b, 3, h, w]`` in [−1, 1], half of them mirrored at random if ``flip``."""
        rows = epoch_rows(number, self.loop.micro_batch_size, len(self.train_images), self.loop.seed)
        images = self._read(rows)
        if self.flip:
            flip = torch.rand(len(images), generator=generator) < 0.5
            images[flip] = images[flip].flip(-1)
        # Activations keep the layout of their input. On a CPU, this one trains about 1.15 times as fast.
        images = images.to(memory_format=torch.channels_last)
        return to_device(images, torch.device(self.loop.device))

    def loss(self, step: int, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its terms to log: reconstruction errors, KL divergence, adversarial losses.

        A small decoder is compared with the images of the full decoder, not with those of the batch.
        The discriminator's loss is added to the autoencoder's. Neither has a gradient in the other's weights.
        """
        with torch.set_grad_enabled(self.stage == "all"):
            posterior = self.module.encode(batch)
        posterior = Posterior(torch.cat([posterior.mean, posterior.logvar], dim=1).float())
        noise = to_device(torch.randn(posterior.mean.shape, generator=generator), batch.device)
        latents = posterior.sample(noise)
        if self.loss_config.latent_noise:
            latents = noisy(latents, self.loss_config.latent_noise, generator)
        if self.stage == "small-decoder":
            with torch.no_grad():
                batch = self.module.decode(latents, "full").float()
        output = self.module.decode(latents).float()
        terms = {
            "l1": F.l1_loss(output, batch),
            "mse": F.mse_loss(output, batch),
            "perceptual": self.features.perceptual_distance(output / 2 + 0.5, batch / 2 + 0.5).mean(),
            "kl": posterior.kl().mean() / posterior.mean[0].numel(),
        }
        weighted = (getattr(self.loss_config, f"{name}_weight") * term for name, term in terms.items())
        total = sum(weighted, start=batch.new_zeros(()))
        if self.discriminator is None or step < self.loss_config.adversarial_start:
            return total, terms
        losses = adversarial_losses(self.discriminator, batch, output)
        adaptive = adaptive_weight(total, losses["adversarial"], self.trained.conv_out.weight)
        weight = self.loss_config.adversarial_weight * adaptive
        total = total + weight * losses["adversarial"] + losses["discriminator"]
        return total, {**terms, **losses, "adaptive_weight": adaptive}

    @torch.no_grad()
    def evaluate(self, ema: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Return figures of reconstructions; write ``reconstructions.png``, with the originals above."""
        assert isinstance(ema, Autoencoder)
        count = self.loss_config.evaluation_images
        figures = reconstruction_figures(ema, (self.features, self.unseen), self.held_out, count)
        images = read_images(self.held_out, torch.arange(min(16, len(self.held_out)))).to(self.loop.device)
        pairs = torch.cat([images, ema.decode(ema.encode(images).mean)])
        save_png(enlarge(grid(pairs / 2 + 0.5, columns=len(images))), folder / "reconstructions.png")
        return figures

    @torch.no_grad()
    def publish(self, ema: nn.Module, folder: Path, step: int, results: dict[str, Any]) -> None:
        """Measure the latents' scale and shift if the encoder is trained, then write config and weights."""
        assert isinstance(ema, Autoencoder)
        if self.stage == "all":
            rows = statistics_rows(len(self.train_images))
            ema = copy.copy(ema)  # shares the weights; the trainer's EMA keeps its own config
            ema.config = dataclasses.replace(ema.config, **latent_statistics(ema, self._read, rows))
        save_autoencoder(ema, folder, results)


def noisy(latents: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise to raw latents ``[b, c, h, w]`` (noise-augmented decoding, arXiv 2510.11690).

    Each image has its own standard deviation, uniform from 0 to ``most``. It is relative to each channel's
    over the batch, because scales are unknown while an encoder is trained.
    """
    std = latents.detach().std(dim=(0, 2, 3), correction=0, keepdim=True)
    levels = most * torch.rand(len(latents), 1, 1, 1, generator=generator)
    noise = levels * torch.randn(latents.shape, generator=generator)
    return latents + std * to_device(noise, latents.device)


def _set_stage(module: Autoencoder, config: AutoencoderRecipe) -> Decoder | SmallDecoder:
    """Leave gradients only to the networks that a stage trains, and return the decoder among them.

    The small decoder of the autoencoder that the stage starts from is removed: it has learned the images of a
    decoder that the other stages change, and its input passes ``post_quant_conv``, which they change too.
    """
    module.set_small_decoder(config.model.small_decoder)
    if config.stage == "all":
        return module.decoder
    module.requires_grad_(False)
    if config.stage == "decoder":
        module.post_quant_conv.requires_grad_(True)
        return module.decoder.requires_grad_(True)
    module.use_decoder("small")
    assert module.small_decoder is not None
    return module.small_decoder.requires_grad_(True)


def _discriminator(config: AutoencoderRecipe, size: int, device: str) -> Discriminator | None:
    """Return the discriminator for images with a short side of ``size``, or None if its weight is 0."""
    if config.loss.adversarial_weight == 0:
        return None
    width, layers = config.discriminator.width, config.discriminator.layers
    if size >> layers < 3:
        raise InputError(f"images of {size} pixels are too small for discriminator.layers {layers}. Lower it")
    return Discriminator(width, layers).to(device)


def _trained_autoencoder(source: str, sizes: AutoencoderConfig) -> Autoencoder:
    """Load the autoencoder to start from, which must have ``sizes``. Scale and shift are its own."""
    trained = load_autoencoder(source, device="cpu")
    if not isinstance(trained, Autoencoder):
        raise InputError(f"start_from {source} is an autoencoder of diffusers. Give one of far")
    theirs = dataclasses.asdict(trained.config)
    for name, ours in dataclasses.asdict(sizes).items():
        if name not in ("scale", "shift", "small_decoder") and theirs[name] != ours:
            raise InputError(
                f"the autoencoder {source} has {name} {theirs[name]}. Set autoencoder.model.{name} to it"
            )
    return trained


@torch.no_grad()
def reconstruction_figures(
    autoencoder: Autoencoder, networks: Sequence[FeatureNetwork], images: ShardReader, count: int
) -> dict[str, float]:
    """Return PSNR in dB, SSIM and Fréchet distances of reconstructions from the posterior's mean."""
    device = next(autoencoder.parameters()).device
    rows = torch.arange(min(count, len(images)))
    statistics = [[FeatureStatistics.empty(network.dimensions) for _ in range(2)] for network in networks]
    ratios, similarities = [], []
    for batch in image_chunks(partial(read_images, images), rows, "reconstructions"):
        batch = batch.to(device)
        output = check_finite(autoencoder.decode(autoencoder.encode(batch).mean)).clamp(-1, 1)
        output, batch = output / 2 + 0.5, batch / 2 + 0.5
        ratios.append(psnr(output, batch))
        similarities.append(ssim(output, batch))
        for network, (real, fake) in zip(networks, statistics):
            real.add(network(batch).cpu())
            fake.add(network(output).cpu())
    distances = {
        f"reconstruction FD ({network.name})": frechet_distance(real, fake)
        for network, (real, fake) in zip(networks, statistics)
    }
    means = {
        name: float(torch.cat(found).mean()) for name, found in (("psnr", ratios), ("ssim", similarities))
    }
    return {**means, **distances, "images": len(rows)}


def statistics_rows(count: int) -> Tensor:
    """Return the rows of ``count`` images for the latents' statistics: all, or some 2,000."""
    return torch.arange(0, count, max(1, count // 2000))


@torch.no_grad()
def latent_statistics(
    autoencoder: Autoencoder, read: Callable[[Tensor], Tensor], rows: Tensor
) -> dict[str, Any]:
    """Return ``scale`` and ``shift`` that give every channel of sampled latents mean 0 and std 1.

    ``read`` returns the images ``[n, 3, h, w]`` of rows. Spherical latents keep scale 1 and shift 0.
    """
    if autoencoder.config.spherical:
        return {"scale": 1.0, "shift": 0.0}
    device = next(autoencoder.parameters()).device
    generator = torch.Generator().manual_seed(0)
    latents = []
    for batch in image_chunks(read, rows, "scale and shift"):
        posterior = autoencoder.encode(batch.to(device))
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        latents.append(posterior.sample(noise).cpu().double())  # not every device has float64
    stacked = torch.cat(latents)
    shift = stacked.mean(dim=(0, 2, 3))
    scale = 1 / stacked.std(dim=(0, 2, 3))
    return {"scale": tuple(scale.tolist()), "shift": tuple(shift.tolist())}
