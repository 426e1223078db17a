"""Training of the KL autoencoder: its loss, its held-out figures, the latents' scale and shift."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from far.autoencoder import Autoencoder, AutoencoderConfig, Posterior
from far.data.image_sets import fingerprint, open_held_out, open_image_set, read_images
from far.data.shards import ShardReader
from far.errors import InputError
from far.evaluation.features import FeatureNetwork, load_feature_network
from far.evaluation.metrics import FeatureStatistics, frechet_distance, psnr
from far.folder import save_autoencoder
from far.pictures import check_finite, enlarge, grid, save_png
from far.seeds import seeded
from far.training.config import AutoencoderLossConfig, LoopConfig
from far.training.loop import epoch_rows, resolve_loop

_CHUNK = 100


class AutoencoderTask:
    """See :class:`far.training.loop.Task`. ``data`` holds ``train`` and ``held-out`` images."""

    def __init__(
        self, model: AutoencoderConfig, loss: AutoencoderLossConfig, data: Path, loop: LoopConfig
    ) -> None:
        loop = resolve_loop(loop)
        self.config, self.loop = loss, loop
        self.train_images = open_image_set(data / "train")
        self.held_out = open_held_out(data, self.train_images)
        self.identity = {"images": fingerprint(self.train_images)}
        size = self.train_images.meta["size"]
        if size % model.stride:
            raise InputError(
                f"{data}: images of {size} pixels are no multiple of the autoencoder's stride {model.stride}"
            )
        with seeded(loop.seed):
            self.module = Autoencoder(model)
        self.features: FeatureNetwork = load_feature_network().to(loop.device)
        self.results: dict[str, float] = {}

    def parameter_groups(self, config: LoopConfig) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters()), "lr": config.learning_rate, "weight_decay": 0.0}]

    def batch(self, number: int, generator: torch.Generator) -> Tensor:
        rows = epoch_rows(number, self.loop.micro_batch_size, len(self.train_images), self.loop.seed)
        images = read_images(self.train_images, rows)
        flip = torch.rand(len(images), generator=generator) < 0.5
        images[flip] = images[flip].flip(-1)
        return images.to(self.loop.device)

    def loss(
        self, step: int, batch: Tensor, ema: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        posterior = self.module.encode(batch)
        posterior = Posterior(torch.cat([posterior.mean, posterior.logvar], dim=1).float())
        noise = torch.randn(posterior.mean.shape, generator=generator).to(batch.device)
        output = self.module.decode(posterior.sample(noise)).float()
        terms = {
            "l1": F.l1_loss(output, batch),
            "mse": F.mse_loss(output, batch),
            "perceptual": self.features.perceptual_distance(output / 2 + 0.5, batch / 2 + 0.5).mean(),
            "kl": posterior.kl().mean() / posterior.mean[0].numel(),
        }
        total = sum(getattr(config, f"{name}_weight") * term for name, term in terms.items())
        return total, terms  # type: ignore[return-value]

    @torch.no_grad()
    def evaluate(self, ema: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """PSNR and reconstruction Fréchet distance on held-out images, and a sheet: originals above, reconstructions below."""
        assert isinstance(ema, Autoencoder)
        self.results = reconstruction_figures(
            ema, self.features, self.held_out, self.config.evaluation_images
        )
        images = read_images(self.held_out, torch.arange(min(16, len(self.held_out)))).to(self.loop.device)
        pairs = torch.cat([images, ema.decode(ema.encode(images).mean)])
        save_png(enlarge(grid(pairs / 2 + 0.5, columns=len(images))), folder / "reconstructions.png")
        self.publish(ema, folder, step)
        return self.results

    @torch.no_grad()
    def publish(self, ema: nn.Module, folder: Path, step: int) -> None:
        """Measure the latents' scale and shift, then write the folder's config and weights."""
        assert isinstance(ema, Autoencoder)
        rows = torch.arange(0, len(self.train_images), max(1, len(self.train_images) // 2000))
        ema.config = dataclasses.replace(ema.config, **latent_statistics(ema, self.train_images, rows))
        save_autoencoder(ema, folder, self.results)


@torch.no_grad()
def reconstruction_figures(
    autoencoder: Autoencoder, network: FeatureNetwork, images: ShardReader, count: int
) -> dict[str, float]:
    """PSNR in dB and the Fréchet distance of reconstructions (of the posterior's mean) to the originals.

    Raises:
        InputError: fewer than two images.
    """
    device = next(autoencoder.parameters()).device
    rows = torch.arange(min(count, len(images)))
    if len(rows) < 2:
        raise InputError(f"{images.folder} holds {len(rows)} image; a Fréchet distance needs two or more")
    real, fake = FeatureStatistics.empty(network.dimensions), FeatureStatistics.empty(network.dimensions)
    ratios = []
    for chunk in _chunks(rows, "reconstructions"):
        batch = read_images(images, chunk).to(device)
        output = check_finite(autoencoder.decode(autoencoder.encode(batch).mean)).clamp(-1, 1)
        ratios.append(psnr(output / 2 + 0.5, batch / 2 + 0.5))
        real.add(network(batch / 2 + 0.5).cpu())
        fake.add(network(output / 2 + 0.5).cpu())
    distance = frechet_distance(real, fake)
    return {
        "psnr": float(torch.cat(ratios).mean()),
        f"reconstruction FD ({network.name})": distance,
        "images": len(rows),
    }


def _chunks(rows: Tensor, description: str) -> Iterator[Tensor]:
    """Parts of ``rows`` for the networks, with a progress bar."""
    with tqdm(total=len(rows), desc=description, unit="img", leave=False) as bar:
        for chunk in rows.split(_CHUNK):
            yield chunk
            bar.update(len(chunk))


def latent_statistics(autoencoder: Autoencoder, images: ShardReader, rows: Tensor) -> dict[str, Any]:
    """``scale`` and per-channel ``shift`` that give the sampled latents deviation 1 and mean 0; a sphere stays where it is."""
    if autoencoder.config.spherical:
        return {"scale": 1.0, "shift": 0.0}
    device = next(autoencoder.parameters()).device
    generator = torch.Generator().manual_seed(0)
    latents = []
    for chunk in _chunks(rows, "scale and shift"):
        posterior = autoencoder.encode(read_images(images, chunk).to(device))
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        latents.append(
            posterior.sample(noise).cpu().double()
        )  # summed on the CPU: not every device has float64
    stacked = torch.cat(latents)
    shift = stacked.mean(dim=(0, 2, 3))
    scale = 1 / (stacked - shift.view(1, -1, 1, 1)).std()
    return {"scale": float(scale), "shift": tuple(shift.tolist())}
