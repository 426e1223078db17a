"""Training of the generator on cached latents: loss, optimizer groups, sample sheet and quick distance."""

import dataclasses
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from far.data.image_sets import check_meta, fingerprint, open_held_out, open_training_index, read_images
from far.data.images import sides
from far.data.latents import LatentCache
from far.devices import to_device
from far.errors import InputError
from far.evaluation.features import FeatureNetwork, load_feature_network
from far.evaluation.metrics import (
    LEAST_IMAGES,
    LEAST_REFERENCES,
    FeatureStatistics,
    Neighborhoods,
    frechet_distance,
    squared_mmd,
)
from far.files import json_digest
from far.model import FAR, ModelConfig
from far.pipeline import Pipeline
from far.progress import ImageBar
from far.seeds import seeded
from far.tokenizer import Tokenizer
from far.training.adapters import merged
from far.training.config import GeneratorRecipe, LoopConfig
from far.training.epochs import CHUNK, epoch_rows, image_chunks
from far.training.loop import published, resolve_loop
from far.training.sample_sheet import write_sample_sheet
from far.training.start import copy_backbone, copy_model, freeze_parts, local_name, recorded_start
from far.weights import digest

_TIME_BUCKETS = 4
# Images of each side that the quick KID compares. It has no bias, so few are enough.
_KID_IMAGES = 1000


class GeneratorTask:
    """Task of ``far train``; see :class:`far.training.loop.Task`.

    Args:
        config: network, training, sampling and evaluation.
        images: folder of the image set, with ``train`` and ``held-out``.
        latents: folder of the latent cache of ``train``.
        autoencoder: the one that made the cache. Moved to the training's device and frozen.
        run: the run's folder. If it holds a checkpoint, ``start_from`` is not read again.

    Raises:
        InputError: images, latents, autoencoder and network do not fit together, or the frozen backbone or
            the model to start from is of another network or autoencoder.
    """

    discriminator = None

    def __init__(
        self,
        config: GeneratorRecipe,
        images: Path,
        latents: Path,
        autoencoder: Tokenizer,
        run: Path | None = None,
    ) -> None:
        loop = resolve_loop(config.training)
        self.config = config = dataclasses.replace(config, training=loop)
        self.autoencoder = autoencoder.to(loop.device).requires_grad_(False)
        train = open_training_index(images / "train")
        check_meta(train)
        self.latents = LatentCache(latents, autoencoder, train)
        if self.latents.flip != config.flip:
            made = f"{latents} was made with generator.flip={str(self.latents.flip).lower()}"
            raise InputError(f"{made}. Set it to that, or remove the folder and run far cache again")
        self.classes = self.latents.meta["classes"]
        self.held_out = open_held_out(images, train)
        scale_and_shift = [autoencoder.config.scale, autoencoder.config.shift]
        self.identity = {
            "classes": self.classes,
            "images": fingerprint(train),
            "autoencoder": json_digest([autoencoder.fingerprint(), scale_and_shift])[:16],
            "start_from": config.start_from and Path(config.start_from).name,
        }
        trained = {"generator.freeze": sorted(config.freeze), "generator.adapter_rank": config.adapter_rank}
        self.identity |= {key: value for key, value in trained.items() if value}
        self.training: dict[str, Any] = {
            "command": "far train",
            "data": Path(self.held_out.meta["source"]).name,  # the name only: a model does not reveal paths
            "images": len(self.latents),
            "fingerprint of the images": self.identity["images"],
            "recipe": _recorded(config),
        }
        self.module = self._network(latents, run)
        if config.frozen_backbone is not None:
            weights = digest(self.module.backbone.state_dict())
            self.identity["weights of generator.frozen_backbone"] = weights[:16]
        embedding = self.module.backbone.get_parameter("class_embedding.weight")
        self.frozen = not any(
            each.requires_grad for each in self.module.backbone.parameters() if each is not embedding
        )
        self.features: FeatureNetwork = load_feature_network().to(loop.device)  # fails early if it is missing
        self._reference: Tensor | None = None

    def _network(self, latents: Path, run: Path | None) -> FAR:
        """Return the module to train, with the weights that it starts from."""
        config, autoencoder = self.config, self.autoencoder
        height, width = sides(self.latents.meta["size"])
        grid = height // autoencoder.config.stride, width // autoencoder.config.stride
        channels = autoencoder.config.latent_channels
        sizes = ModelConfig(config.network, len(self.classes), channels, grid)
        with seeded(config.training.seed):
            module = FAR(sizes)
        if config.frozen_backbone is not None:
            source = config.frozen_backbone
            self.training["backbone"] = copy_backbone(module, source, autoencoder, self.classes, latents)
        if config.start_from is not None:
            facts = None if run is None else recorded_start(run)
            if facts is None:
                facts, head_copied = copy_model(
                    module, config.start_from, autoencoder, self.classes, latents, config.freeze
                )
                if not head_copied:
                    config.check_unconditional()
            self.training |= facts
            with seeded(config.training.seed):
                freeze_parts(module, config.freeze, config.adapter_rank)
        if config.network.spherical and not autoencoder.config.spherical:
            raise InputError("network.spherical needs an autoencoder trained with model.spherical=true")
        config.sampling.check(module)
        return module

    def parameter_groups(self, config: LoopConfig) -> list[dict[str, Any]]:
        """Return groups as in MAR: weight decay for the backbone's matrices only. Rates depend on the part.

        Frozen parameters have no group.
        """
        backbone, head = (
            [parameter for parameter in part.parameters() if parameter.requires_grad]
            for part in (self.module.backbone, self.module.head)
        )
        embedding = self.module.backbone.get_parameter("class_embedding.weight")

        def rate(matrix: Tensor) -> float:
            own = config.class_embedding_learning_rate if matrix is embedding else None
            return own or config.learning_rate

        # Checkpoints number parameters in the order of groups, so the class embedding stays in its place.
        matrices = itertools.groupby((matrix for matrix in backbone if matrix.dim() > 1), rate)
        vectors = [parameter for parameter in backbone if parameter.dim() <= 1]
        head_rate = config.head_learning_rate or config.learning_rate
        groups: list[dict[str, Any]] = [
            *({"params": list(run), "lr": lr, "weight_decay": config.weight_decay} for lr, run in matrices),
            {"params": vectors, "lr": config.learning_rate, "weight_decay": 0.0},
            {"params": head, "lr": head_rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def batch(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return latents ``[b, c, h, w]``, half of them of mirror images if ``flip``, and labels ``[b]``."""
        loop = self.config.training
        rows = epoch_rows(number, loop.micro_batch_size, len(self.latents), loop.seed)
        labels = to_device(self.latents.labels[rows], torch.device(loop.device))
        return self.latents.draw(rows, generator), labels

    def loss(
        self, step: int, batch: tuple[Tensor, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the model's loss, and its terms and means within quarters of the head's time to log."""
        if self.frozen:  # its z without dropout, as in sampling
            self.module.backbone.eval()
        loss = self.module.loss(*batch, generator, label_drop=self.config.label_drop, step=step)
        values = {f"loss_{name}": term.mean() for name, term in loss.terms.items()}
        means = means_by_time(loss.samples, loss.t, _TIME_BUCKETS)
        values |= {f"loss_t{bucket / _TIME_BUCKETS:.2f}": mean for bucket, mean in enumerate(means)}
        return loss.value.mean(), values

    @torch.no_grad()
    def evaluate(self, ema: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Write a sample sheet, one row per class, and return quick figures against held-out images."""
        pipeline, network, classes = self._pipeline(ema), self.features, len(self.classes)
        images, per_class = self.config.evaluation.images, self.config.evaluation.grid_per_class
        shown = [label for label in range(min(classes, 32)) for _ in range(per_class)]
        write_sample_sheet(pipeline, shown, folder, step)
        if self._reference is None:
            self._reference = self._held_out_features()
        drawn, labels = [], quick_labels(images, classes)
        with ImageBar(images, "images for the quick distance", leave=False) as bar:
            for numbers in torch.arange(images).split(CHUNK):
                chosen = [labels[number] for number in numbers]
                seeds = (1000 + numbers).tolist()
                drawn.append(network(pipeline.draw(chosen, seeds, callback=bar.ar_step)).cpu())
        figures = quick_figures(torch.cat(drawn), self._reference)
        return {f"quick {name} ({network.name})": value for name, value in figures.items()}

    def _held_out_features(self) -> Tensor:
        rows = torch.arange(min(self.config.evaluation.references, len(self.held_out)))
        chunks = image_chunks(partial(read_images, self.held_out), rows, "features of held-out images")
        device = self.config.training.device
        return torch.cat([self.features(images.to(device) / 2 + 0.5).cpu() for images in chunks])

    def publish(self, ema: nn.Module, folder: Path, step: int, results: dict[str, Any]) -> None:
        """Write the EMA weights as a pipeline folder."""
        pipeline = self._pipeline(ema)
        if results:
            pipeline.results = {**results, **dataclasses.asdict(self.config.evaluation)}
        pipeline.training = {**self.training, "finished steps": step}
        pipeline.save_pretrained(folder)

    def _pipeline(self, ema: nn.Module) -> Pipeline:
        assert isinstance(ema, FAR)
        model = merged(ema) if self.config.adapter_rank else ema
        return Pipeline(model, self.autoencoder, self.classes, self.config.sampling)


def quick_labels(images: int, classes: int) -> list[int]:
    """Return the classes of the quick evaluation: in turn, or evenly spaced if there are too many."""
    if images >= classes:
        return [number % classes for number in range(images)]
    return [number * classes // images for number in range(images)]


def means_by_time(losses: Tensor, t: Tensor, buckets: int) -> Tensor:
    """Return the means ``[buckets]`` of losses ``[n]`` in equal ranges of times ``t [n]`` in 0 … 1.

    An empty range has the mean NaN.
    """
    # Not losses[bucket == 0]: a GPU would be waited for to know the size.
    members = F.one_hot((t * buckets).long().clamp(max=buckets - 1), buckets).to(losses.dtype)
    return (members * losses.unsqueeze(-1)).sum(dim=0) / members.sum(dim=0)


def quick_figures(features: Tensor, real: Tensor) -> dict[str, float]:
    """Return FD, KID and recall of generated images with ``features [n, d]``, against ``real [m, d]``.

    There is no recall of fewer than four images, or against fewer than six.
    """
    statistics = (FeatureStatistics.of(features), FeatureStatistics.of(real))
    figures = {
        "FD": frechet_distance(*statistics),
        "KID": squared_mmd(features[:_KID_IMAGES], real[:_KID_IMAGES]),
    }
    if len(features) >= LEAST_IMAGES and len(real) >= LEAST_REFERENCES:
        figures["recall"] = Neighborhoods(real).overlap(features).recall
    return figures


def _recorded(config: GeneratorRecipe) -> dict[str, Any]:
    """Return every value of the recipe section as the model stores it. Local folders become their names."""
    sources = {"frozen_backbone": config.frozen_backbone, "start_from": config.start_from}
    return {**published(config), **{key: name and local_name(name) for key, name in sources.items()}}
