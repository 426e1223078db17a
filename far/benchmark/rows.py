"""The rows of a benchmark: which model is sampled how, and the models themselves."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from far.autoencoder import Autoencoder, AutoencoderConfig
from far.autoencoder_config import DecoderName, SmallDecoderConfig
from far.devices import has_fast_bfloat16, resolve_device
from far.errors import InputError, prefix_errors
from far.model import FAR, PRESETS, ModelConfig, preset
from far.names import find_folder
from far.pipeline import Pipeline
from far.precision import prepare, prepare_autoencoder, resolve_dtype
from far.sampling_config import FAST, SamplingConfig, unused_options
from far.seeds import seeded

# Seed of the presets' random weights and of the first image.
SEED = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a batch of images of one model, a preset or a name for :func:`find_folder`.

    A ``plain`` row is computed as in MAR's released code; see :mod:`far.benchmark.mar_plain`. ``decoder`` is
    the autoencoder's.
    """

    model: str
    sampling: SamplingConfig
    dtype: str
    batch: int = 1
    plain: bool = False
    decoder: DecoderName = "full"


# MAR's number of AR steps, and the guidance scale of its published results.
_PRESET_AR_STEPS = 64
_PRESET_GUIDANCE = 2.9
# Size of a preset's small decoder: a 20th of the arithmetic of KL-16's decoder.
_PRESET_SMALL_DECODER = SmallDecoderConfig(width=64, blocks=3)
# Used with half of the AR steps.
FASTEST: dict[str, Any] = {"order": "halton", "refresh_every": 2, "guidance_every": 4}
# Model, AR steps, head steps, dtype and other options. MAR as released comes first: it is the base of ratios.
_DEFAULT_ROWS: tuple[tuple[str, int, int, str, dict[str, Any]], ...] = (
    ("mar-b", 64, 100, "float32", {}),
    ("mar-b", 64, 100, "bfloat16", {}),
    ("far-b", 64, 4, "float32", {}),
    ("far-b", 64, 4, "bfloat16", {}),
    ("far-b", 64, 4, "int8", FAST),
    ("far-b", 32, 4, "int8", FASTEST),
    ("far-bc-b", 64, 4, "bfloat16", {}),
    ("far-bc-b", 64, 2, "int8", {}),
    ("far-bc-b", 64, 2, "int8", {"decoders": ("small",)}),
    ("far-causal-b", 256, 4, "bfloat16", {}),
    ("far-causal-b", 256, 2, "bfloat16", {}),
    ("far-causal-b", 256, 2, "int8", {}),
    ("far-causal-b", 256, 1, "int8", {}),
)


def default_rows(
    *, batches: Sequence[int] = (1,), guidance: float | None = None, cuda: bool = False
) -> list[Row]:
    """Return the rows of ``far benchmark``: MAR as released, and faster variants, one change at a time.

    With ``cuda``, rows in int8, which only CPUs have, are in bfloat16, and MAR's plain path comes first:
    there, what a CPU hardly notices (thousands of waits and copies) takes most of the time.

    Raises:
        InputError: a batch or the guidance is out of range.
    """
    rows = []
    for batch, (model, ar, head, dtype, others) in itertools.product(batches, _DEFAULT_ROWS):
        dtype = "bfloat16" if cuda and dtype == "int8" else dtype
        values = {"ar_steps": [ar], "head_steps": [head], "dtypes": [dtype], "guidance": guidance, **others}
        rows += rows_of([model], batches=[batch], **values)
    if not cuda:
        return rows
    plain = [dataclasses.replace(row, plain=True) for row in rows[:: len(_DEFAULT_ROWS)]]
    return list(dict.fromkeys(plain + rows))


def usable_rows(rows: Sequence[Row], device: str | torch.device = "auto") -> tuple[list[Row], dict[str, str]]:
    """Return the rows whose dtypes make sense on a device, and a reason for each dtype left out."""
    device = resolve_device(device)
    reasons = {}
    for dtype in dict.fromkeys(row.dtype for row in rows):
        try:
            resolve_dtype(dtype, device)
        except InputError as error:
            reasons[dtype] = str(error)
        if dtype == "bfloat16" and not has_fast_bfloat16(device):
            reasons[dtype] = f"device {device} is not known to multiply it faster than float32"
    return [row for row in rows if row.dtype not in reasons], reasons


def rows_of(
    models: Sequence[str],
    *,
    batches: Sequence[int] = (1,),
    ar_steps: Sequence[int] | None = None,
    head_steps: Sequence[int] | None = None,
    dtypes: Sequence[str] = ("float32",),
    decoders: Sequence[DecoderName] = ("full",),
    **options: Any,
) -> list[Row]:
    """Return every combination of the given values, models outermost.

    None is a folder's own value. A preset has 64 AR steps, its head's number of steps and guidance 2.9. A
    causal model always takes its number of tokens as AR steps, and no option of masked models.

    Args:
        models: presets, or names that :func:`far.names.find_folder` takes.
        batches: numbers of images drawn together.
        ar_steps: numbers of AR steps.
        head_steps: numbers of head steps.
        dtypes: dtypes of the weights.
        decoders: decoders of the autoencoder.
        options: further values of :class:`far.SamplingConfig`.

    Raises:
        InputError: a model is unknown or does not support a value.
    """
    for batch in batches:
        if batch < 1:
            raise InputError(f"batch {batch} must be positive")
    rows = []
    for model_name in models:
        model, defaults = _outline(model_name)
        any_order = model.backbone.any_order
        ar_choices = (ar_steps or [defaults.ar_steps]) if any_order else [model.config.tokens]
        left_out = unused_options(model)
        given = {name: value for name, value in options.items() if value is not None and name not in left_out}
        head_choices: Sequence[int | tuple[int, ...]] = head_steps or [defaults.head_steps]
        choices = itertools.product(batches, ar_choices, head_choices, dtypes, decoders)
        for batch, ar, head, dtype, decoder in choices:
            config = dataclasses.replace(defaults, ar_steps=ar, head_steps=head, **given)
            config.check(model)
            rows.append(Row(model_name, config, dtype, batch, decoder=decoder))
    return rows


def _outline(name: str) -> tuple[FAR, SamplingConfig]:
    """Return a model that serves for checks only, and its default sampling options."""
    if name not in PRESETS:
        pipeline = Pipeline.from_pretrained(_folder(name), device="cpu")
        return pipeline.model, pipeline.defaults
    with torch.device("meta"):  # no memory, no time
        model = FAR(ModelConfig(preset(name)))
    return model, SamplingConfig(_PRESET_AR_STEPS, model.head.default_steps, guidance=_PRESET_GUIDANCE)


def _folder(name: str) -> Path:
    with prefix_errors(f"model {name!r} is not a preset ({', '.join(PRESETS)}), and "):
        return find_folder(name)


def load_models(rows: Sequence[Row], device: str | torch.device) -> dict[tuple[str, str], Pipeline]:
    """Return the pipeline of each model and dtype of ``rows``.

    Presets get random weights of a fixed seed, which suffice for timing, and an autoencoder of KL-16's size.

    Raises:
        InputError: a model cannot be loaded, or lacks the decoder of a row.
    """
    device = resolve_device(device)
    pipelines = {}
    models = dict.fromkeys((row.model, row.dtype) for row in rows)
    for name, dtype in tqdm(models, desc="loading", unit="model"):
        if name not in PRESETS:
            pipelines[name, dtype] = Pipeline.from_pretrained(_folder(name), dtype=dtype, device=device)
            continue
        with seeded(SEED):
            autoencoder = Autoencoder(AutoencoderConfig()).eval()
            model = prepare(FAR(ModelConfig(preset(name))), dtype, device)
            if any(row.model == name and row.decoder == "small" for row in rows):
                autoencoder.set_small_decoder(_PRESET_SMALL_DECODER)
            autoencoder = prepare_autoencoder(autoencoder, dtype, device)
        classes = [str(label) for label in range(model.config.classes)]
        pipelines[name, dtype] = Pipeline(model, autoencoder, classes, SamplingConfig())
    for row in rows:
        with prefix_errors(f"{row.model}: "):
            select_decoder(pipelines[row.model, row.dtype], row)
    return pipelines


def select_decoder(pipeline: Pipeline, row: Row) -> None:
    """Let the pipeline of a row decode with the row's decoder."""
    if pipeline.autoencoder is not None:
        pipeline.autoencoder.use_decoder(row.decoder)
