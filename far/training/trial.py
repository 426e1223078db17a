"""Short measurement of both trainings on this machine: steps, evaluations, checkpoints, and the cache."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from far.data.image_sets import open_held_out
from far.data.latents import write_latents
from far.data.shards import ShardWriter
from far.data.training_images import open_training_images
from far.folder import load_autoencoder
from far.training.autoencoder import AutoencoderTask, statistics_rows
from far.training.config import AutoencoderRecipe, GeneratorRecipe, LoopConfig
from far.training.estimate import times_left
from far.training.generator import GeneratorTask
from far.training.log import Meter
from far.training.loop import Task, Trainer

# Images of each part that a trial reads: four batches of the cache.
IMAGES = 256
# Evaluated images of the two evaluations that give the seconds per image. Recall needs six of each side.
_FEW, _MANY = 6, 38
# A trial times steps for this many seconds, but at least 3 and at most 50 of them.
_SECONDS, _LEAST_STEPS, _MOST_STEPS = 3.0, 3, 50


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds that the parts of a training take.

    Attributes:
        step: one optimizer step.
        saving: one checkpoint, with the published model.
        evaluating: one evaluation without its images.
        image: one image of an evaluation.
    """

    step: float
    saving: float
    evaluating: float
    image: float

    def seconds(self, config: LoopConfig, images: int) -> float:
        """Return the duration of a training that evaluates on ``images`` images."""
        evaluations = times_left(0, config.steps, config.evaluate_every)
        checkpoints = times_left(0, config.steps, config.checkpoint_every)
        evaluating = evaluations * (self.evaluating + images * self.image)
        return config.steps * self.step + evaluating + checkpoints * self.saving


def write_sample(data: Path, folder: Path) -> float:
    """Write an image set of :data:`IMAGES` rows of each part of the set ``data``, evenly spaced.

    Smaller parts repeat their rows. Unreadable images are left out. Return the seconds that reading a
    training image takes, which matters if it is decoded from its source.

    Raises:
        InputError: the set is missing or damaged, or its source is missing or changed.
    """
    train, read = open_training_images(data / "train")
    held_out = open_held_out(data, train)
    rows = _spaced(len(held_out))
    tensors = {name: held_out.rows(name, rows) for name in ("images", "labels")}
    _write_part(folder / "held-out", held_out.meta, tensors)
    start = time.perf_counter()
    batch = read(_spaced(len(train)))
    reading = (time.perf_counter() - start) / IMAGES
    pixels = batch.images.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    _write_part(folder / "train", train.meta | {"kind": "images"}, {"images": pixels, "labels": batch.labels})
    return reading


def _spaced(count: int) -> Tensor:
    return torch.arange(IMAGES) * max(1, count // IMAGES) % count


def _write_part(folder: Path, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    writer = ShardWriter(folder, meta)
    writer.write(tensors, cursor=IMAGES)
    writer.finish()


def time_autoencoder(
    section: AutoencoderRecipe, sample: Path, run: Path, images: int, reading: float = 0.0
) -> tuple[Speed, float]:
    """Return the speed of an autoencoder's training, and the seconds that a cache of ``images`` images takes.

    Args:
        sample: image set of :func:`write_sample`.
        run: receives ``autoencoder`` and ``latents``, as the folder of a run.
        reading: seconds that reading an image takes. The cache reads while it encodes, on the same cores if
            it is made on a CPU. Elsewhere it may take less time than returned.
    """
    training = section.training

    def task(count: int) -> AutoencoderTask:
        loss = dataclasses.replace(section.loss, evaluation_images=count)
        return AutoencoderTask(dataclasses.replace(section, loss=loss), sample)

    speed = _measure(task, training, run / "autoencoder")
    autoencoder = load_autoencoder(run / "autoencoder", device="cpu")
    encoding = _seconds(lambda: write_latents(sample, autoencoder, run / "latents", device=training.device))
    # A checkpoint encodes more images than the sample has, for the statistics of the latents. The cache
    # encodes each image twice: as it is and mirrored.
    more = max(0, len(statistics_rows(images)) - IMAGES)
    saving = speed.saving + more * (encoding / IMAGES / 2 + reading)
    step = speed.step + reading * training.batch_size
    return dataclasses.replace(speed, step=step, saving=saving), images * (encoding / IMAGES + reading)


def time_generator(section: GeneratorRecipe, sample: Path, run: Path) -> Speed:
    """Return the speed of a generator's training, after :func:`time_autoencoder` with the same arguments."""
    return _measure(
        lambda count: _generator_task(section, sample, run, count), section.training, run / "model"
    )


def parameters_and_step(section: GeneratorRecipe, sample: Path, run: Path) -> tuple[int, float]:
    """Return the number of parameters of a generator, and the seconds of a training step."""
    trainer = Trainer(_generator_task(section, sample, run, _FEW), section.training, run / "model")
    return sum(parameter.numel() for parameter in trainer.module.parameters()), _step_seconds(trainer)


def _generator_task(section: GeneratorRecipe, sample: Path, run: Path, count: int) -> GeneratorTask:
    evaluation = dataclasses.replace(section.evaluation, images=count, references=2 * count)
    autoencoder = load_autoencoder(run / "autoencoder", device="cpu")
    config = dataclasses.replace(section, evaluation=evaluation)
    return GeneratorTask(config, sample, run / "latents", autoencoder)


def _measure(make: Callable[[int], Task], config: LoopConfig, folder: Path) -> Speed:
    """Train a few steps, save into ``folder``, evaluate. ``make`` takes the number of images to evaluate."""
    few, many = make(_FEW), make(_MANY)
    trainer = Trainer(few, config, folder)
    step = _step_seconds(trainer)
    saving = _seconds(trainer.save)
    durations = []
    for task in (few, many):
        task.evaluate(trainer.ema.module, folder, 0)  # the first evaluation of a task is slower
        durations.append(_seconds(functools.partial(task.evaluate, trainer.ema.module, folder, 0)))
    image = max(0.0, durations[1] - durations[0]) / (_MANY - _FEW)
    return Speed(step, saving, max(0.0, durations[0] - _FEW * image), image)


def _step_seconds(trainer: Trainer) -> float:
    """Return the mean duration of a step, after a first one that allocates memory."""
    meter = Meter()
    trainer.train_step(meter)
    steps: list[float] = []
    while len(steps) < _LEAST_STEPS or (sum(steps) < _SECONDS and len(steps) < _MOST_STEPS):
        steps.append(_seconds(lambda: trainer.train_step(meter)))
    return statistics.fmean(steps)


def _seconds(run: Callable[[], object]) -> float:
    """Return the seconds that ``run`` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
