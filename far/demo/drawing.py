"""Requests of the demo's page, and the frames that answer them. This module does not depend on the page."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from far.autoencoder_config import DecoderName
from far.editing import blend_kept, paste_kept
from far.errors import InputError
from far.pictures import drawing_settings
from far.pipeline import Pipeline
from far.sampling import Kept, Progress, SamplingConfig
from far.tokenizer import decoder_setting

MOST_IMAGES = 16

Number = TypeVar("Number", int, float)


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model, with the name that the user gave and the dtype of its weights."""

    name: str
    pipeline: Pipeline
    dtype: str

    @property
    def head(self) -> str:
        """Kind of the head in words."""
        return self.kinds["heads"].replace("_", " ")

    @property
    def kinds(self) -> dict[str, str]:
        """Kind of the head and of the backbone."""
        network = self.pipeline.model.config.network
        return {"heads": network.head.kind, "backbones": network.backbone.kind}


def load_models(
    names: Sequence[str],
    dtype: str,
    device: str | torch.device,
    *,
    record: bool = True,
    compile: bool = False,
    decoder: DecoderName = "full",
) -> list[Model]:
    """Load models and draw a first token with each, so that the first click does not wait for a warm-up.

    Raises:
        InputError: one of them cannot be loaded, or has no autoencoder or no such decoder.
    """
    models = []
    options: dict[str, Any] = {"record": record, "compile": compile, "decoder": decoder}
    for name in dict.fromkeys(names):
        pipeline = Pipeline.from_pretrained(name, dtype=dtype, device=device, **options)
        pipeline.preview(next(pipeline.stream([0], [0])))
        models.append(Model(name, pipeline, pipeline.dtype))
    return models


@dataclasses.dataclass(frozen=True)
class Order:
    """Images that one click requests from one model: one image per seed, all of one class."""

    model: Model
    label: int
    seeds: list[int]
    config: SamplingConfig

    @classmethod
    def of_entries(
        cls, model: Model, label: object, seed: object, count: object = 1, **sampling: object
    ) -> "Order":
        """Return the order for the entries of the page's fields. Other sampling options are the model's.

        Raises:
            InputError: the class is unknown, or an entry is not a number or out of range. Seeds that are too
                large raise in :func:`draw`.
        """
        first, images = number("seed", seed, int), number("images", count, int)
        if not 1 <= images <= MOST_IMAGES:
            raise InputError(f"images {images} is out of range. Give 1 to {MOST_IMAGES}")
        kinds = {n: float if isinstance(v, float) else int for n, v in vars(SamplingConfig()).items()}
        values = {name: number(name, entry, kinds[name]) for name, entry in sampling.items()}
        config = model.pipeline.sampling_config(**values)
        config.check(model.pipeline.model)
        # The page offers names, so a name wins over a number here.
        classes, name = model.pipeline.classes, str("" if label is None else label)
        chosen = classes.index(name) if name in classes else model.pipeline.label(name)
        return cls(model, chosen, list(range(first, first + images)), config)

    @property
    def class_name(self) -> str:
        return self.model.pipeline.classes[self.label]

    def settings(self, seed: int) -> dict[str, object]:
        """Return the text entries of a seed's PNG, as ``far generate`` writes them."""
        model, sampling = self.model, dataclasses.asdict(self.config)
        sampling |= decoder_setting(model.pipeline.autoencoder)
        return drawing_settings(model.name, sampling, model.dtype, model.pipeline.classes, self.label, seed)


def number(name: str, entry: object, kind: Callable[[str], Number]) -> Number:
    """Return the entry of a field as an ``int`` or a ``float``.

    Raises:
        InputError: the entry is empty, or not such a number.
    """
    try:
        return kind(str(entry))
    except ValueError:
        shown = "empty" if entry in (None, "") else repr(str(entry)[:40])
        raise InputError(f"{name} is {shown}. Give a {'whole number' if kind is int else 'number'}") from None


@dataclasses.dataclass(frozen=True)
class Frame:
    """Images after an AR step.

    Attributes:
        images: ``[b, 3, h, w]`` in [0, 1], mid-gray at tokens that are not drawn yet.
        progress: the AR step.
        seconds: seconds that the model has taken so far.
    """

    images: Tensor
    progress: Progress
    seconds: float

    @property
    def finished(self) -> bool:
        return self.progress.step + 1 == self.progress.steps


def draw(order: Order) -> Iterator[Frame]:
    """Yield one frame per AR step. The last one has the finished images.

    Seconds include neither previews nor the caller's work between frames.

    Raises:
        InputError: a seed is out of range.
    """
    pipeline = order.model.pipeline
    steps = pipeline.stream([order.label] * len(order.seeds), order.seeds, order.config)
    return _frames(steps, lambda progress: pipeline.decode(progress.latents), pipeline.preview)


def redraw(order: Order, image: Tensor, marked: Sequence[int]) -> tuple[Order, Iterator[Frame]]:
    """Return an order with the AR steps that redrawing takes, and its frames, like :meth:`Pipeline.edit`.

    Args:
        order: one seed, and the model's own AR steps.
        image: ``[3, H, W]`` in [0, 1], of the model's size.
        marked: the tokens to redraw, at least one. If it is all of them, the image counts for nothing.

    Raises:
        InputError: a seed is out of range, or a causal model would have to draw before kept tokens.
    """
    pipeline, config = order.model.pipeline, order.model.pipeline.model.config
    redrawn = torch.zeros(config.tokens, dtype=torch.bool)
    redrawn[list(marked)] = True
    ar_steps = max(1, round(order.config.ar_steps * len(marked) / config.tokens))
    order = dataclasses.replace(order, config=dataclasses.replace(order.config, ar_steps=ar_steps))
    kept = None
    if not redrawn.all():
        kept = Kept(pipeline.encode(image.unsqueeze(0)), (~redrawn).nonzero().flatten())

    def finished(progress: Progress) -> Tensor:
        return blend_kept(pipeline.decode(progress.latents), image, redrawn, config.token_grid)

    def preview(progress: Progress) -> Tensor:
        return paste_kept(finished(progress), torch.full_like(image, 0.5), progress.known, config.token_grid)

    steps = pipeline.stream([order.label], order.seeds, order.config, kept=kept)
    return order, _frames(steps, finished, preview)


def _frames(
    steps: Iterator[Progress], finished: Callable[[Progress], Tensor], preview: Callable[[Progress], Tensor]
) -> Iterator[Frame]:
    """Yield the frames of a drawing from its AR steps, with the seconds that the model takes."""
    seconds, start = 0.0, time.perf_counter()
    for progress in steps:
        images = finished(progress) if progress.step + 1 == progress.steps else None
        seconds += time.perf_counter() - start
        yield Frame(preview(progress) if images is None else images, progress, seconds)
        start = time.perf_counter()
