"""Training of the generator on cached latents: its loss, its optimizer groups, its sample grid and quick distance."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from far.autoencoder import Autoencoder, Posterior
from far.classes import check_same_classes
from far.config import to_dict
from far.data.image_sets import check_meta, fingerprint, open_held_out, read_images
from far.data.latents import open_latents
from far.data.shards import ShardReader
from far.errors import InputError
from far.evaluation.features import FeatureNetwork, load_feature_network
from far.evaluation.metrics import FeatureStatistics, frechet_distance
from far.files import json_digest
from far.model import FAR, ModelConfig, NetworkConfig
from far.pictures import contact_sheet, save_png
from far.pipeline import Pipeline
from far.progress import ImageBar
from far.sampling import SamplingConfig
from far.seeds import seeded
from far.training.config import EvaluationConfig, LoopConfig
from far.training.loop import epoch_rows, published, resolve_loop

_CHUNK = 100
_TIME_BUCKETS = 4


class GeneratorTask:
    """See :class:`far.training.loop.Task`."""

    def __init__(
        self,
        network: NetworkConfig,
        sampling: SamplingConfig,
        evaluation: EvaluationConfig,
        loop: LoopConfig,
        *,
        label_drop: float,
        images: Path,
        latents: Path,
        autoencoder: Autoencoder,
        frozen_backbone: str | None = None,
    ) -> None:
        if not 0 <= label_drop < 1:
            raise InputError(f"label_drop {label_drop} must be at least 0 and below 1")
        loop = resolve_loop(loop)
        self.loop, self.sampling, self.evaluation, self.label_drop = loop, sampling, evaluation, label_drop
        self.autoencoder = autoencoder.to(loop.device).requires_grad_(False)
        train = ShardReader(images / "train", "images", index_only=True)
        check_meta(train)
        self.latents = open_latents(latents, autoencoder, train)
        self.classes = self.latents.meta["classes"]
        self.labels = self.latents.all("labels")
        self.held_out = open_held_out(images, train)
        scale_and_shift = [autoencoder.config.scale, autoencoder.config.shift]
        self.identity = {
            "classes": self.classes,
            "images": fingerprint(train),
            "autoencoder": json_digest([autoencoder.fingerprint(), scale_and_shift])[:16],
        }
        side = self.latents.meta["size"] // autoencoder.config.stride
        config = ModelConfig(network, len(self.classes), autoencoder.config.latent_channels, (side, side))
        with seeded(loop.seed):
            self.module = FAR(config)
        self.training: dict[str, Any] = {
            "command": "far train",
            "data": Path(self.held_out.meta["source"]).name,  # of an image folder: where it lies is nobody else's affair
            "images": len(self.latents),
            "fingerprint of the images": self.identity["images"],
            "recipe": {
                "network": to_dict(network), "training": published(loop), "sampling": to_dict(sampling), "label_drop": label_drop,
            },
        }  # fmt: skip
        if frozen_backbone is not None:
            self.training["backbone"] = _take_backbone(
                self.module, frozen_backbone, autoencoder, self.classes, latents
            )
        if network.spherical and not autoencoder.config.spherical:
            raise InputError(
                "network.spherical needs an autoencoder whose decoder knows such latents: train it with model.spherical=true"
            )
        sampling.check(self.module)
        self.results: dict[str, Any] = {}
        self._reference: FeatureStatistics | None = None
        self.features: FeatureNetwork = load_feature_network().to(
            loop.device
        )  # now, and not only when it is first needed

    def parameter_groups(self, config: LoopConfig) -> list[dict[str, Any]]:
        """As in MAR: decay for all of the backbone but norms and biases, none for the head, which has its own rate.

        A frozen backbone has no group.
        """
        decayed: list[Tensor] = []
        plain: list[Tensor] = []
        for parameter in filter(lambda parameter: parameter.requires_grad, self.module.backbone.parameters()):
            (decayed if parameter.dim() > 1 else plain).append(parameter)
        head_rate = config.learning_rate if config.head_learning_rate is None else config.head_learning_rate
        groups = [
            {"params": decayed, "lr": config.learning_rate, "weight_decay": config.weight_decay},
            {"params": plain, "lr": config.learning_rate, "weight_decay": 0.0},
            {"params": list(self.module.head.parameters()), "lr": head_rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def batch(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Moments ``[b, 2c, h, w]`` of random flips, and labels ``[b]``."""
        rows = epoch_rows(number, self.loop.micro_batch_size, len(self.latents), self.loop.seed)
        flips = torch.randint(0, 2, (len(rows),), generator=generator)
        moments = self.latents.rows("moments", rows)[torch.arange(len(rows)), flips].float()
        return moments.to(self.loop.device), self.labels[rows].to(self.loop.device)

    def loss(
        self, step: int, batch: tuple[Tensor, Tensor], ema: nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(ema, FAR)
        moments, labels = batch
        posterior = Posterior(moments)
        noise = torch.randn(posterior.mean.shape, generator=generator).to(moments.device)
        latents = self.autoencoder.normalize(posterior.sample(noise))
        loss = self.module.loss(
            latents, labels, generator, label_drop=self.label_drop, teacher=ema, step=step
        )
        values = {f"loss_{name}": part.mean() for name, part in loss.parts.items()}
        buckets = (loss.t * _TIME_BUCKETS).long().clamp(max=_TIME_BUCKETS - 1)
        for bucket in range(_TIME_BUCKETS):
            chosen = loss.rows[buckets == bucket]
            if len(chosen):
                values[f"loss_t{bucket / _TIME_BUCKETS:.2f}"] = chosen.mean()
        return loss.value.mean(), values

    def evaluate(self, ema: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """A sample sheet (one row a class) and the quick Fréchet distance against held-out images."""
        pipeline = self._pipeline(ema)
        classes = len(self.classes)
        shown = [label for label in range(min(classes, 32)) for _ in range(self.evaluation.grid_per_class)]
        with ImageBar(len(shown), "sample sheet", leave=False) as bar:
            sheet = pipeline.draw(shown, range(len(shown)), callback=bar.ar_step)
        save_png(contact_sheet(sheet, shown), folder / "samples" / f"step-{step:08d}.png", {"step": step})
        network = self.features
        with torch.no_grad():
            if self._reference is None:
                self._reference = self._held_out_statistics()
            drawn = FeatureStatistics.empty(network.dimensions)
            with ImageBar(self.evaluation.images, "images for the quick distance", leave=False) as bar:
                for start in range(0, self.evaluation.images, _CHUNK):
                    labels = [
                        index % classes for index in range(start, min(start + _CHUNK, self.evaluation.images))
                    ]
                    seeds = range(1000 + start, 1000 + start + len(labels))
                    drawn.add(network(pipeline.draw(labels, seeds, callback=bar.ar_step)).cpu())
        distance = frechet_distance(drawn, self._reference)
        self.results = {
            "step": step,
            f"quick FD ({network.name})": distance,
            **dataclasses.asdict(self.evaluation),
        }
        self.publish(ema, folder, step)
        return {f"quick FD ({network.name})": distance}

    def _held_out_statistics(self) -> FeatureStatistics:
        statistics = FeatureStatistics.empty(self.features.dimensions)
        count = min(self.evaluation.references, len(self.held_out))
        with tqdm(total=count, desc="features of held-out images", unit="img", leave=False) as bar:
            for rows in torch.arange(count).split(_CHUNK):
                images = read_images(self.held_out, rows).to(self.loop.device)
                statistics.add(self.features(images / 2 + 0.5).cpu())
                bar.update(len(rows))
        return statistics

    def publish(self, ema: nn.Module, folder: Path, step: int) -> None:
        """Write the EMA weights as a pipeline folder."""
        pipeline = self._pipeline(ema)
        pipeline.training = {**self.training, "finished steps": step}
        pipeline.save_pretrained(folder)

    def _pipeline(self, ema: nn.Module) -> Pipeline:
        assert isinstance(ema, FAR)
        return Pipeline(ema, self.autoencoder, self.classes, self.sampling, self.results)


def _take_backbone(
    module: FAR, weights: str, autoencoder: Autoencoder, classes: list[str], latents: Path
) -> dict[str, Any]:
    """Copy the backbone of a trained pipeline into ``module`` and freeze it; the head stays fresh.

    Returns what is known of that pipeline's training.

    Raises:
        InputError: the pipeline has another network, other classes than ``latents``, or another autoencoder.
    """
    pipeline = Pipeline.from_pretrained(weights, device="cpu")
    trained = pipeline.model
    ours, theirs = module.config.network, trained.config.network
    if (theirs.backbone, theirs.spherical, trained.config.token_channels) != (
        ours.backbone,
        ours.spherical,
        module.config.token_channels,
    ):
        raise InputError(
            f"the backbone of {weights} is another than the recipe's; give both the same network.backbone, spherical and patch"
        )
    source = f"the backbone of {weights}"
    check_same_classes(
        pipeline.classes,
        source,
        classes,
        str(latents),
        "train on the same classes, or train the backbone too",
    )
    if trained.config.grid != module.config.grid:
        grids = f"{list(trained.config.grid)} latents an image, {latents} has {list(module.config.grid)}"
        raise InputError(f"{source} was trained on {grids}; train on images of the same size")
    if pipeline.autoencoder is not None and not pipeline.autoencoder.same_latents(autoencoder):
        raise InputError(
            f"{source} was trained on latents of another autoencoder than {latents}; give both the same autoencoder_from"
        )
    module.backbone.load_state_dict(trained.backbone.state_dict())
    module.backbone.requires_grad_(False)
    return pipeline.training
