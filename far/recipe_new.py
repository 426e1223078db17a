"""Recipe with sizes and steps that fit an image set, a number of minutes, and this machine.

The rules come from trainings on two CPU cores at 32 × 32 and 64 × 64 pixels. For larger images and faster
machines they extrapolate.
"""

import dataclasses
import json
import math
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import torch
import yaml

from far.config import from_dict
from far.data.image_sets import open_held_out, open_training_index
from far.data.images import sides
from far.devices import device_title, resolve_device
from far.errors import InputError
from far.files import printable
from far.recipe import Recipe
from far.training.estimate import duration
from far.training.trial import (
    Speed,
    parameters_and_step,
    time_autoencoder,
    time_generator,
    write_sample,
)

# Width multipliers of the autoencoder by stride.
_MULTIPLIERS = {4: (1, 2, 4), 8: (1, 2, 4, 8), 16: (1, 2, 4, 8, 8)}
_CHANNELS = 12
# Attention and the number of AR steps make more tokens slow.
_MOST_TOKENS = 256
_MOST_AR_STEPS = 64
_AUTOENCODER_BATCH, _GENERATOR_BATCH = 16, 64
# The autoencoder limits the quality of everything: it gets this fraction of the time that the cache leaves.
_AUTOENCODER_SHARE = 1 / 3
# So many steps took one of width 16 to 28.5 dB on 47,900 images. A width that leaves fewer is too large.
_AUTOENCODER_STEPS, _MOST_WIDTH = 7500, 128
# Generators: width of the block-causal backbone, depth of its encoder and decoder, million parameters. The
# right one sees about one token per parameter: 4 to 8 million in an hour or two of two CPU cores.
_SIZES = ((128, 2, 1.7), (192, 3, 4.0), (256, 3, 7.4), (384, 4, 19), (512, 5, 43), (768, 6, 103))
# Evaluations of a training, the fraction of its time for all of them, and the images of each.
_EVALUATIONS, _EVALUATION_FRACTION, _FEWEST_IMAGES, _MOST_IMAGES = 2, 0.05, 16, 1000
_CHECKPOINT_SECONDS = 300
# With fewer steps a training is pointless.
_LEAST_STEPS = 100
# From so many passes on, a model may repeat its images.
_MANY_PASSES = 200

_TEMPLATE = Template("""\
# $size pixels: $tokens tokens of $channels channels, block-causal backbone, shortcut head.
# Measured on $machine: $times.
#   far train-autoencoder $file
#   far cache $file
#   far train $file
#   far generate --weights $model --count 64
data: $data  # your image set: the folder that far data wrote
run: $run  # your run folder: receives autoencoder/, latents/ and the model

autoencoder:
  # 4 multipliers give stride 8 and (size / stride / patch)² tokens; one more gives a quarter of them.
  # Larger width: sharper and slower.
  model:
    width: $width
    width_multipliers: [$multipliers]
    blocks: 1
    latent_channels: $latent_channels
    norm_groups: $groups
  # Larger perceptual_weight: finer texture, lower PSNR. Larger kl_weight: noisier latents in training, so the
  # decoder tolerates larger errors of the generator; softer images.
  loss: {l1_weight: 1.0, perceptual_weight: 0.5, kl_weight: 5.0e-3, evaluation_images: $autoencoder_images}
  training:
    steps: $autoencoder_steps  # an image is seen steps × batch_size / images times (here $autoencoder_passes)
    batch_size: $autoencoder_batch  # reduce it if memory is short
    learning_rate: $autoencoder_rate  # proportional to the batch size; lower for larger width
    schedule: cosine
    warmup_steps: $autoencoder_warmup
    gradient_clip: 1.0
    ema_decay: $autoencoder_ema  # closer to 1 for longer training
    checkpoint_every: $autoencoder_checkpoint  # an interruption loses at most this many steps
    evaluate_every: $autoencoder_evaluate  # steps between contact sheets and quick distances$device

generator:
  network:
    patch: $patch  # latents per token along a side; a smaller one: more tokens, slower and finer
    # Larger width and depth: for more images, classes and time. kind: masked, causal or block_causal.
    backbone:
      kind: block_causal
      width: $backbone
      encoder_depth: $depth
      decoder_depth: $depth
      heads: $heads
      buffer: 4
      dropout: 0.0
    # Every token has a loss, so few noise samples per token suffice.
    # kind: shortcut, flow, diffusion, flow_map or energy. Larger width or depth: better but slower.
    head: {kind: shortcut, width: $head, depth: 3, samples_per_token: 2}
  label_drop: $label_drop  # fraction of images trained without their class, which guidance needs
  training:
    steps: $generator_steps  # an image is seen steps × batch_size / images times (here $generator_passes)
    batch_size: $generator_batch  # reduce it if memory is short (or increase micro_batches)
    learning_rate: $generator_rate  # proportional to the batch size; lower for larger width
    schedule: wsd  # lowers the learning rate in the last fifth of the steps: a longer run can begin before it
    warmup_steps: $generator_warmup
    gradient_clip: 1.0
    ema_decay: $generator_ema  # closer to 1 for longer training
    checkpoint_every: $generator_checkpoint  # an interruption loses at most this many steps
    evaluate_every: $generator_evaluate  # steps between contact sheets and quick distances$device
  # Defaults of far generate, which can override them. At most as many AR steps as tokens; guidance 1 is off.
  # order: random, halton, or raster (row by row), made for one AR step per token.
  sampling: {ar_steps: $ar_steps, order: $order, head_steps: 4, guidance: $guidance, temperature: 0.8}
  # Counts of the quick distance: generated and held-out images. Compare only figures with equal counts.
  evaluation: {images: $generator_images, references: $references, grid_per_class: $sheet}
""")


@dataclasses.dataclass(frozen=True)
class Images:
    """An image set: folder, (height, width) in pixels, training images, held-out images, and classes."""

    folder: Path
    size: tuple[int, int]
    train: int
    held_out: int
    classes: int


@dataclasses.dataclass(frozen=True)
class Length:
    """Steps of a training, steps between checkpoints and evaluations, and images of an evaluation."""

    steps: int = _LEAST_STEPS
    checkpoint: int = _LEAST_STEPS
    evaluate: int = _LEAST_STEPS
    images: int = _FEWEST_IMAGES


@dataclasses.dataclass(frozen=True)
class Plan:
    """Values of a recipe that depend on image set, time and machine.

    Attributes:
        stride: pixels per latent, along a side.
        patch: latents per token, along a side.
        width: width of the autoencoder.
        backbone: width and depth of the backbone.
        autoencoder: length of the autoencoder's training.
        generator: length of the generator's training.
    """

    stride: int
    patch: int
    width: int = 16
    backbone: tuple[int, int] = _SIZES[0][:2]
    autoencoder: Length = Length()
    generator: Length = Length()

    def tokens(self, images: Images) -> int:
        """Return the number of tokens of an image."""
        return math.prod(images.size) // (self.stride * self.patch) ** 2


def read_images(folder: Path) -> Images:
    """Return the facts about an image set from its indices.

    Raises:
        InputError: the set is missing, unfinished or damaged.
    """
    train = open_training_index(folder / "train")
    held_out = open_held_out(folder, train)
    return Images(folder, sides(train.meta["size"]), len(train), len(held_out), len(train.meta["classes"]))


def stride_and_patch(images: Images) -> tuple[int, int]:
    """Return pixels per latent and latents per token, along a side: 16 tokens at 32 × 32 and 64 × 64 pixels.

    Raises:
        InputError: no stride divides both sides, or the images have too many tokens.
    """
    height, width = images.size
    longest = max(images.size)
    most = 4 if longest <= 32 else 8 if longest <= 128 else 16
    for cell, stride, patch in ((s * p, s, p) for s in (16, 8, 4) if s <= most for p in (2, 1)):
        if not height % cell and not width % cell and height * width <= _MOST_TOKENS * cell**2:
            return stride, patch
    unfit = f"no autoencoder with stride 4, 8 or 16 maps to at most {_MOST_TOKENS} tokens"
    raise InputError(
        f"{images.folder} has images of {width}×{height} pixels, which {unfit}. "
        "Make it again with another --size: a multiple of 16 up to 512"
    )


def length(speed: Speed, seconds: float) -> Length:
    """Return the longest training of at most ``seconds``, or one of the fewest steps if none fits."""
    share = _EVALUATION_FRACTION * seconds / _EVALUATIONS - speed.evaluating
    images = _MOST_IMAGES
    if speed.image:
        images = max(_FEWEST_IMAGES, min(_MOST_IMAGES, int(share / speed.image)))
    checkpoints = max(1, round(seconds / _CHECKPOINT_SECONDS))
    pauses = checkpoints * speed.saving + _EVALUATIONS * (speed.evaluating + images * speed.image)
    steps = max(_LEAST_STEPS, int((seconds - pauses) / speed.step))
    return Length(steps, -(-steps // checkpoints), -(-steps // _EVALUATIONS), images)


def least_seconds(speed: Speed) -> float:
    """Return the duration of the shortest training that makes sense."""
    evaluating = _EVALUATIONS * (speed.evaluating + _FEWEST_IMAGES * speed.image)
    return _LEAST_STEPS * speed.step + speed.saving + evaluating


def autoencoder_width(step: float, seconds: float) -> int:
    """Return the largest width whose training of ``seconds`` has enough steps, given a step's at width 16.

    Twice the width takes up to four times as long.
    """
    width, steps = 16, seconds / step
    while width < _MOST_WIDTH and steps / 4 >= _AUTOENCODER_STEPS:
        width, steps = 2 * width, steps / 4
    return width


def backbone_size(parameters: int, tokens_per_second: float, seconds: float) -> tuple[int, int]:
    """Return width and depth of the largest generator that sees at least one token per parameter.

    Args:
        parameters: those of the smallest generator.
        tokens_per_second: training speed of the smallest. Time is taken as proportional to parameters.
        seconds: duration of the training.
    """
    most = math.sqrt(parameters * tokens_per_second * max(0.0, seconds))
    fitting = [size[:2] for size in _SIZES if size[2] * 1e6 <= most]
    return fitting[-1] if fitting else _SIZES[0][:2]


def recipe_text(images: Images, plan: Plan, device: str, remarks: Mapping[str, str]) -> str:
    """Return the commented recipe. ``remarks`` are ``file``, ``machine`` and ``times`` in its first lines."""
    height, width = images.size
    tokens = plan.tokens(images)
    backbone, depth = plan.backbone
    guided = images.classes > 1  # a single class needs no guidance
    run = run_folder(images.folder)
    # Found for width 16 and for widths up to 256. Wider networks need lower rates.
    rates = 8e-4 * 16 / plan.width, 1.5e-3 * min(1, 256 / backbone)
    return _TEMPLATE.substitute(
        remarks,
        size=f"{width} × {height}",
        tokens=tokens,
        channels=_CHANNELS * plan.patch**2,
        data=json.dumps(str(images.folder), ensure_ascii=False),
        run=json.dumps(str(run), ensure_ascii=False),
        model=printable(shlex.quote(str(run / "model"))),
        width=plan.width,
        multipliers=", ".join(map(str, _MULTIPLIERS[plan.stride])),
        latent_channels=_CHANNELS,
        groups=plan.width // 4,
        autoencoder_batch=_AUTOENCODER_BATCH,
        patch=plan.patch,
        backbone=backbone,
        depth=depth,
        heads=backbone // 64,
        head=backbone * 5 // 4,
        generator_batch=_GENERATOR_BATCH,
        device="" if device == "auto" else f"\n    device: {device}  # auto, cpu, cuda, cuda:1, mps or xpu",
        label_drop=0.1 if guided else 0.0,
        guidance=3.0 if guided else 1.0,
        ar_steps=min(tokens, _MOST_AR_STEPS),
        order="raster" if tokens <= _MOST_AR_STEPS else "random",
        references=max(2, min(2 * plan.generator.images, images.held_out)),
        sheet=max(1, min(4, 32 // images.classes)),
        **_training("autoencoder", plan.autoencoder, _AUTOENCODER_BATCH / images.train, rates[0]),
        **_training("generator", plan.generator, _GENERATOR_BATCH / images.train, rates[1]),
    )


def _training(name: str, length: Length, passes_per_step: float, rate: float) -> dict[str, Any]:
    values = {
        "steps": length.steps,
        "passes": f"{length.steps * passes_per_step:.1f}",
        "images": length.images,
        "rate": f"{rate:.1e}".replace("e-0", "e-"),
        "warmup": min(100, length.steps // 10),
        "ema": round(min(0.9999, 1 - 12 / length.steps), 4),
        "checkpoint": length.checkpoint,
        "evaluate": length.evaluate,
    }
    return {f"{name}_{key}": value for key, value in values.items()}


def run_folder(data: Path) -> Path:
    """Return the folder of a run on the image set ``data``."""
    return Path("runs") / data.resolve().name


def check_time(images: Images, seconds: float, cache: float, autoencoder: Speed, generator: Speed) -> None:
    """Raise an :class:`InputError` if ``seconds`` are too few for the cache and the shortest trainings."""
    least = cache + max(
        least_seconds(autoencoder) / _AUTOENCODER_SHARE, least_seconds(generator) / (1 - _AUTOENCODER_SHARE)
    )
    if seconds < least:
        needed = f"the cache of {images.train:,} images and {_LEAST_STEPS} steps of each training"
        enough = math.ceil(least / 60)
        raise InputError(f"--minutes {seconds / 60:g} is too short for {needed}. Give at least {enough}")


def new_recipe(data: Path, minutes: float, device: str, file: Path) -> tuple[str, list[str]]:
    """Measure short trainings on some of the images. Return a recipe, and lines about its duration.

    Args:
        data: folder of the image set.
        minutes: time for autoencoder, cache and generator together.
        device: as in a recipe.
        file: name of the recipe in the commands of its first lines.

    Raises:
        InputError: the image set is missing or damaged, no stride divides its sides, the
            device cannot be used, or the minutes are too few.
    """
    images, hardware = read_images(data), resolve_device(device)
    with tempfile.TemporaryDirectory(prefix="far-") as folder:
        plan, times = _measured_plan(images, 60 * minutes, device, Path(folder))
    machine, threads = device_title(hardware), torch.get_num_threads()
    if hardware.type == "cpu":
        machine += f" with {threads} thread{'s' if threads > 1 else ''}"
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in times.items())
    remarks = {"file": printable(shlex.quote(str(file))), "machine": machine, "times": parts}
    lines = [f"about {duration(sum(times.values()))} on {machine}: {parts}"]
    passes = plan.generator.steps * _GENERATOR_BATCH / images.train
    if passes > _MANY_PASSES:
        many = f"each image is seen {passes:,.0f} times, so the model may repeat images"
        lines.append(f"{many}. Give more images or fewer minutes")
    return recipe_text(images, plan, device, remarks), lines


def _measured_plan(
    images: Images, seconds: float, device: str, folder: Path
) -> tuple[Plan, dict[str, float]]:
    """Return the plan for a time in seconds, and the seconds of its parts. ``folder`` receives the trials."""
    plan, sample = Plan(*stride_and_patch(images)), folder / "images"
    reading = write_sample(images.folder, sample)

    def recipe() -> Recipe:
        text = recipe_text(images, plan, device, {"file": "", "machine": "", "times": ""})
        return from_dict(Recipe, yaml.safe_load(text), "the new recipe")

    run = folder / "narrow"
    autoencoder, cache = time_autoencoder(recipe().autoencoder, sample, run, images.train, reading)
    width = autoencoder_width(autoencoder.step, _AUTOENCODER_SHARE * (seconds - cache))
    if width > plan.width:
        plan, run = dataclasses.replace(plan, width=width), folder / "wide"
        autoencoder, cache = time_autoencoder(recipe().autoencoder, sample, run, images.train, reading)
    first, second = (share * (seconds - cache) for share in (_AUTOENCODER_SHARE, 1 - _AUTOENCODER_SHARE))
    parameters, step = parameters_and_step(recipe().generator, sample, run)
    tokens_per_second = plan.tokens(images) * _GENERATOR_BATCH / step
    plan = dataclasses.replace(plan, backbone=backbone_size(parameters, tokens_per_second, second))
    generator = time_generator(recipe().generator, sample, run)
    check_time(images, seconds, cache, autoencoder, generator)
    plan = dataclasses.replace(
        plan, autoencoder=length(autoencoder, first), generator=length(generator, second)
    )
    final = recipe()
    return plan, {
        "autoencoder": autoencoder.seconds(final.autoencoder.training, plan.autoencoder.images),
        "cache": cache,
        "generator": generator.seconds(final.generator.training, plan.generator.images),
    }
