"""Configurations of the trainings. Imports no torch, so that recipes are checked without it."""

import dataclasses
from typing import Literal

from far.autoencoder_config import AutoencoderConfig
from far.config import check_count, check_seed, check_types
from far.devices import TrainingDtype, check_device_name
from far.errors import InputError
from far.model_config import NetworkConfig
from far.sampling_config import SamplingConfig

# Images of a trajectory group. They have equally many known tokens, so the backbone processes them together.
GROUP = 64


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Length, speed, precision and reporting of a training.

    Attributes:
        steps: optimizer steps.
        batch_size: images per step, at all processes together.
        micro_batches: equal parts of a step's images that go through the network one after the other, or on
            several processes; their gradients are averaged. The result depends on this number, not on the
            number of processes.
        learning_rate: learning rate of AdamW, reached after the warmup.
        head_learning_rate: learning rate of a generator's head; ``null`` takes ``learning_rate``.
        class_embedding_learning_rate: learning rate of a generator's class embedding; ``null`` takes
            ``learning_rate``.
        schedule: learning rate after the warmup: ``constant``; ``cosine``, which lowers it to zero along a
            half cosine; or ``wsd`` (warmup, stable, decay), which keeps it until the last ``decay_fraction``
            of the steps and then lowers it to zero as 1 − √progress. Before that, ``steps`` can be raised.
        decay_fraction: part of ``steps`` in which ``wsd`` lowers the learning rate.
        warmup_steps: steps over which the learning rate rises from zero.
        weight_decay: weight decay of AdamW for the backbone's matrices; heads and autoencoders are trained
            without. In ``far distill``, for the head and the adapters.
        gradient_clip: largest norm of the gradient; a larger gradient is scaled down to it.
        ema_decay: decay of the averaged weights, which are evaluated and saved; it warms up to this value.
        max_skipped_steps: end the run after this many steps in a row whose loss or gradient is not finite;
            such steps change nothing. The default exceeds the 16 halvings from float16's first loss factor,
            65536, to 1.
        dtype: autocast type of the forward pass; weights stay in float32. ``auto`` is bfloat16 if the device
            multiplies it faster, else float32; a resumed run keeps its checkpoint's. In float16 the loss is
            scaled by a factor that adapts to the gradients.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, a ``torch.device``, or ``auto``: a GPU if there is
            one, else the CPU.
        compile: compile the blocks of a generator's backbone and head. The first steps take longer, by a
            minute or more; results change by rounding.
        parallel: with several processes, ``ddp`` replicates the module; ``fsdp`` shards it, trading
            communication for memory.
        checkpoint_activations: keep only the inputs of a generator's blocks for the backward pass, which
            computes the rest again: at most a quarter of the memory per image, 1.3 times the arithmetic, the
            same gradients.
        deterministic: use deterministic algorithms only, or end at an operation that has none. A resumed run
            then repeats an uninterrupted one to the bit on CUDA too, as it always does on a CPU.
        seed: fixes weights, batches and noise; each step depends on the seed and its number only.
        log_every: steps between lines of log.jsonl.
        checkpoint_every: steps between checkpoints.
        evaluate_every: steps between evaluations.
        tensorboard: write TensorBoard files too; needs the extra ``log``.
    """

    steps: int = 10_000
    batch_size: int = 128
    micro_batches: int = 1
    learning_rate: float = 1e-4
    head_learning_rate: float | None = None
    class_embedding_learning_rate: float | None = None
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    decay_fraction: float = 0.2
    warmup_steps: int = 100
    weight_decay: float = 0.02
    gradient_clip: float = 3.0
    ema_decay: float = 0.9999
    max_skipped_steps: int = 20
    dtype: TrainingDtype = "auto"
    device: str = "auto"
    compile: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    checkpoint_activations: bool = False
    deterministic: bool = False
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 1000
    evaluate_every: int = 1000
    tensorboard: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", str(self.device))
        check_device_name(self.device)
        check_types(self)
        for name in ("batch_size", "micro_batches"):
            check_count(name, getattr(self, name), 2**20)
        for name in ("steps", "max_skipped_steps", "log_every", "checkpoint_every", "evaluate_every"):
            check_count(name, getattr(self, name), 2**40)
        for name in (
            "learning_rate", "gradient_clip", "head_learning_rate", "class_embedding_learning_rate"
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"{name} {value} must be positive")
        for name in ("weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} {getattr(self, name)} must be at least 0")
        size, parts = self.batch_size, self.micro_batches
        if size % parts:
            raise InputError(f"batch_size {size} / micro_batches {parts} is not a whole number")
        check_seed("seed", self.seed)
        if not 0 < self.decay_fraction <= 1:
            raise InputError(f"decay_fraction {self.decay_fraction} must be above 0 and at most 1")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay {self.ema_decay} must be at least 0 and below 1")

    @property
    def micro_batch_size(self) -> int:
        """Images per micro-batch."""
        return self.batch_size // self.micro_batches


@dataclasses.dataclass(frozen=True)
class AutoencoderLossConfig:
    """Weights of the autoencoder's loss terms, noise on its latents, and the images of its evaluation.

    Attributes:
        l1_weight: weight of the mean absolute error over pixels in [−1, 1].
        mse_weight: weight of the mean squared error over pixels in [−1, 1].
        perceptual_weight: weight of the mean distance between features of EfficientNet-Lite0.
        kl_weight: weight of the KL divergence in nats per latent value.
        latent_noise: largest standard deviation of Gaussian noise added to the latents that the decoder sees
            in training, relative to each channel's; each image has its own, from 0 to this. The decoder
            then tolerates a generator's errors better, and reconstructs less exactly. 0 is off.
        adversarial_weight: weight of the adversarial term. It multiplies the adaptive weight, the ratio of
            the gradient norms of the other terms and this one at the decoder's last layer. 0 is off.
        adversarial_start: step from which the discriminator and the adversarial term are trained.
        evaluation_images: held-out images per evaluation, at least 2.
    """

    l1_weight: float = 1.0
    mse_weight: float = 0.0
    perceptual_weight: float = 0.3
    kl_weight: float = 1e-3
    latent_noise: float = 0.0
    adversarial_weight: float = 0.0
    adversarial_start: int = 0
    evaluation_images: int = 1000

    def __post_init__(self) -> None:
        for name in ("latent_noise", "adversarial_weight", "adversarial_start"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} {getattr(self, name)} must be at least 0")
        if self.evaluation_images < 2:
            raise InputError(f"evaluation_images {self.evaluation_images} must be at least 2")


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Patch discriminator of the adversarial term, used if ``loss.adversarial_weight`` is above 0.

    Attributes:
        width: channels of the first layer, a multiple of 4; each further layer doubles them, up to eight
            times.
        layers: layers that halve the resolution. A logit sees a patch of 16, 34 or 70 pixels a side with 1, 2
            or 3 layers.
        learning_rate: learning rate of AdamW for the discriminator; ``null`` takes the training's.
    """

    width: int = 64
    layers: int = 3
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        check_count("discriminator width", self.width, 2**12)
        check_count("discriminator layers", self.layers, 6)
        if self.width % 4:
            raise InputError(f"discriminator width {self.width} must be a multiple of 4")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise InputError(f"discriminator learning_rate {self.learning_rate} must be positive")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Quick FD, KID and recall during training. Few images bias FD and recall: compare equal counts only.

    Attributes:
        images: generated images, at least 2.
        references: held-out images to compare with, at least 2.
        grid_per_class: images per class on the sample sheet.
    """

    images: int = 500
    references: int = 2000
    grid_per_class: int = 4

    def __post_init__(self) -> None:
        for name, least in (("images", 2), ("references", 2), ("grid_per_class", 1)):
            if getattr(self, name) < least:
                raise InputError(f"evaluation.{name} {getattr(self, name)} must be at least {least}")


def _check_adapter_rank(rank: int) -> None:
    if rank < 0:
        raise InputError(f"adapter_rank {rank} must be at least 0")
    check_count("adapter_rank", max(1, rank))


def _check_rates(training: LoopConfig, *without: str, model: str) -> None:
    """Raise an :class:`InputError` if a rate is given for a part that a training lacks or does not train."""
    for part in without:
        if (value := getattr(training, f"{part}_learning_rate")) is not None:
            raise InputError(f"{part}_learning_rate {value} does not apply to {model}. Remove it")


def _check_label_drop(label_drop: float) -> None:
    """Raise an :class:`InputError` unless ``label_drop`` is a fraction of images that leaves some labeled."""
    if not 0 <= label_drop < 1:
        raise InputError(f"label_drop {label_drop} must be at least 0 and below 1")


@dataclasses.dataclass(frozen=True)
class AutoencoderRecipe:
    """Recipe section of ``far train-autoencoder``.

    Attributes:
        model: size of the autoencoder.
        loss: weights of the loss terms.
        discriminator: network of the adversarial term.
        training: how it is trained.
        flip: train on mirror images too.
        start_from: a trained autoencoder (folder, bundled name or ``OWNER/NAME``) to start from; it has the
            sizes in ``model``.
        stage: ``all``; ``decoder`` to train the decoder of ``start_from`` only; or ``small-decoder`` to train
            a small one of the size ``model.small_decoder``, which learns the images of the full one. In both,
            the encoder, scale and shift stay, and with them all cached latents and generators.
    """

    model: AutoencoderConfig = AutoencoderConfig()
    loss: AutoencoderLossConfig = AutoencoderLossConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    training: LoopConfig = LoopConfig()
    flip: bool = True
    start_from: str | None = None
    stage: Literal["all", "decoder", "small-decoder"] = "all"

    def __post_init__(self) -> None:
        _check_rates(self.training, "head", "class_embedding", model="an autoencoder")
        for name in ("compile", "checkpoint_activations"):
            if getattr(self.training, name):
                raise InputError(f"{name} is for generators, not for an autoencoder. Set it to false")
        if self.stage != "all" and self.start_from is None:
            needs = f"stage {self.stage} needs a trained autoencoder"
            raise InputError(f"{needs}. Name it in autoencoder.start_from")
        width = self.model.small_decoder.width
        if (self.stage == "small-decoder") != (width > 0):
            either = "Set stage to small-decoder and the width above 0, or neither"
            raise InputError(f"stage {self.stage} does not fit model.small_decoder.width {width}. {either}")


@dataclasses.dataclass(frozen=True)
class GeneratorRecipe:
    """Recipe section of ``far train``: network, training, and default sampling values.

    Attributes:
        network: sizes of backbone and head.
        training: how they are trained.
        sampling: the trained model's defaults.
        evaluation: the quick evaluation during training.
        label_drop: fraction of images that are trained without their class; guidance needs some.
        flip: train on mirror images too. ``false`` is for images whose left and right differ, such as text;
            ``far cache`` then omits the mirror images.
        frozen_backbone: a trained model (folder, bundled name or ``OWNER/NAME``) whose backbone is copied and
            frozen, so that only the head is trained.
        start_from: a trained model (folder, bundled name or ``OWNER/NAME``) whose averaged weights a new
            training starts from: its backbone, and its head if kind and sizes agree. Classes are matched by
            name; new ones start from the mean of the trained ones. Not read when a run is resumed.
        freeze: parts of the model in ``start_from`` that keep their weights: ``class_embedding``,
            ``backbone`` (all of it but the class embedding) and ``head``.
        adapter_rank: rank of low-rank adapters (LoRA, arXiv 2106.09685) that are trained in place of the
            backbone of ``start_from``, one per linear layer; class embedding and head are trained as usual.
            Saved models hold the sum of both, in plain layers. 0 trains the backbone itself.
    """

    network: NetworkConfig = NetworkConfig()
    training: LoopConfig = LoopConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    label_drop: float = 0.1
    flip: bool = True
    frozen_backbone: str | None = None
    start_from: str | None = None
    freeze: tuple[Literal["class_embedding", "backbone", "head"], ...] = ()
    adapter_rank: int = 0

    def __post_init__(self) -> None:
        _check_label_drop(self.label_drop)
        if self.frozen_backbone is not None and self.start_from is not None:
            raise InputError("frozen_backbone and start_from are both given. Give one of them")
        _check_adapter_rank(self.adapter_rank)
        if self.start_from is None:  # else the head may have been trained with it
            self.check_unconditional()
        freeze = list(self.freeze)
        if self.start_from is None and (freeze or self.adapter_rank):
            needing = f"freeze {freeze}" if freeze else f"adapter_rank {self.adapter_rank}"
            raise InputError(f"{needing} needs trained weights. Name a model in generator.start_from")
        if "backbone" in freeze and self.adapter_rank:
            problem = (
                f"adapter_rank {self.adapter_rank} trains adapters of the backbone, which freeze excludes"
            )
            raise InputError(f"{problem}. Remove backbone from freeze: its own weights stay in any case")
        if {"class_embedding", "backbone", "head"} <= {*freeze}:
            raise InputError(f"freeze {freeze} leaves nothing to train. Remove a part")
        frozen = {*freeze} if self.frozen_backbone is None else {"class_embedding"}
        _check_rates(self.training, *sorted(frozen - {"backbone"}), model="a part that is frozen")

    def check_unconditional(self) -> None:
        """Raise an :class:`InputError` if guidance needs an unconditional half, which is not trained."""
        guided = self.sampling.guidance != 1 or getattr(self.network.head, "max_guidance", None) is not None
        if guided and not self.label_drop:
            problem = "label_drop 0 trains no unconditional half, which guidance needs"
            raise InputError(f"{problem}. Raise it, or set sampling.guidance to 1 and omit max_guidance")


@dataclasses.dataclass(frozen=True)
class TrajectoryConfig:
    """Trajectories of the teacher, computed once before training.

    Attributes:
        images: number of images, rounded up to whole groups of 64.
        tokens_per_image: tokens per image whose conditions and trajectories are kept, at most the model's
            tokens.
        max_guidance: largest guidance scale; scales are drawn between 1 and this.
        label_drop: fraction of images without their class, so that the student keeps the unconditional half
            of guidance.
        token_limit: clips the predictions of a diffusion teacher that has no limit of its own, see
            ``head.token_limit``; near the noise its errors are magnified. ``null`` is no limit.
        seed: fixes all random draws.
    """

    images: int = 20_000
    tokens_per_image: int = 8
    max_guidance: float = 4.0
    label_drop: float = 0.1
    token_limit: float | None = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "tokens_per_image"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} must be positive")
        _check_label_drop(self.label_drop)
        check_types(self)
        if self.max_guidance <= 1:
            raise InputError(f"max_guidance {self.max_guidance} must be above 1")
        if self.token_limit is not None and self.token_limit <= 0:
            raise InputError(f"token_limit {self.token_limit} must be positive, or null")
        check_seed("seed", self.seed)


_DISTILLATION_LOOP = LoopConfig(
    steps=4000, batch_size=256, learning_rate=1e-3, schedule="cosine", weight_decay=0.0, gradient_clip=1.0,
    ema_decay=0.999, checkpoint_every=500, evaluate_every=1000,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Settings of ``far distill``. The student's head has the size of the teacher's.

    Attributes:
        trajectories: the teacher's trajectories, computed once before training.
        training: training of the student.
        samples_per_token: steps of each trajectory per training step.
        adapter_rank: rank of low-rank adapters in the backbone; 0 trains none.
    """

    trajectories: TrajectoryConfig = TrajectoryConfig()
    training: LoopConfig = _DISTILLATION_LOOP
    samples_per_token: int = 4
    adapter_rank: int = 0

    def __post_init__(self) -> None:
        size = self.training.micro_batch_size
        if size % GROUP:
            raise InputError(f"training.batch_size / micro_batches is {size}. Make it a multiple of {GROUP}")
        if (images := self.trajectories.images) <= GROUP:
            raise InputError(f"trajectories.images {images} are all held out. Give more than {GROUP}")
        if self.samples_per_token < 1:
            raise InputError(f"samples_per_token {self.samples_per_token} must be positive")
        _check_adapter_rank(self.adapter_rank)
        _check_rates(self.training, "class_embedding", model="far distill, which keeps the embedding")
