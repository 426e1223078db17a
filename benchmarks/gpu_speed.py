"""Timings of ``benchmarks.gpu``: the machine, images with their decoding, MAR's plain path, training steps.

Weights are untrained, because time does not depend on them. Without a GPU everything runs once at tiny sizes,
and no figure is kept.
"""

import contextlib
import dataclasses
import functools
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_checks import check_not_plain
from benchmarks.gpu_training import RandomLatents
from far.autoencoder import Autoencoder, AutoencoderConfig
from far.backbone import BlockCausalConfig, CausalConfig, MaskedConfig
from far.benchmark.mar_plain import PlainMar
from far.compiling import compile_blocks
from far.heads import Condition, FlowMapConfig
from far.model import FAR, ModelConfig, NetworkConfig, preset
from far.pipeline import Pipeline
from far.sampling import FAST, SamplingConfig, SeededNoise
from far.tokens import cosine_token_counts, random_orders
from far.training.config import LoopConfig
from far.training.log import Meter
from far.training.loop import Trainer

Calls = dict[str, Callable[[], dict[str, Any]]]
GUIDANCE = 2.9
AR_STEPS = 64
# Measured AR steps of 64, each representing a quarter of them.
STAND_FOR = (8, 24, 40, 56)
HEAD_STEPS = 100


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(device: torch.device, call: Callable[[], Any], *, enough: float = 2.0) -> float:
    """Return the time of a call: the first if long, else the median of up to five more."""
    found: list[float] = []
    while len(found) < 6 and sum(found) <= enough:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:] or found)


def entry(small: bool, figures: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the rounded figures; without a GPU only that the entry ran."""
    measured = figures()
    return (
        {"ran": True}
        if small
        else {
            name: float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in measured.items()
        }
    )


def peak(device: torch.device) -> float:
    """Return the most GiB that torch held since :func:`reset`, unused memory of recordings included."""
    return torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else math.nan


def reset(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def machine(device: torch.device, small: bool) -> Calls:
    """Return timings of copies, products and launches, on which all other figures depend."""

    def copying() -> dict[str, Any]:
        source = torch.empty(2**16 if small else 2**30, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return {
            "GB/s read and written": 2 * source.nbytes / seconds(device, lambda: target.copy_(source)) / 1e9
        }

    def product() -> dict[str, Any]:
        side = 64 if small else 8192
        a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
        return {"bfloat16 TFLOP/s": 2 * side**3 / seconds(device, lambda: a @ b) / 1e12}

    def launch() -> dict[str, Any]:
        x, count = torch.zeros(1, device=device), 1000

        def many() -> None:
            for _ in range(count):
                x.add_(1)

        return {"microseconds per launch": seconds(device, many) / count * 1e6}

    calls = {"copy": copying, "product": product, "launch": launch}
    found: Calls = {name: functools.partial(entry, small, call) for name, call in calls.items()}
    found["attention kernel"] = functools.partial(attention_kernels, device)
    return found


def attention_kernels(device: torch.device) -> dict[str, Any]:
    """Return the attention kernels that torch selects for backbone, cached query, and autoencoder."""
    shapes = {
        "backbone": ((2, 12, 320, 64), 320, False),
        "cached": ((2, 12, 1, 64), 256, True),
        "autoencoder": ((2, 1, 256, 512), 256, False),
    }
    found = {}
    for name, (shape, keys, biased) in shapes.items():
        query = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        key = query.new_zeros(*shape[:2], keys, shape[3])
        bias = query.new_zeros(shape[2], keys) if biased else None
        found[name] = torch.nn.attention.SDPBackend(torch._fused_sdp_choice(query, key, key, bias)).name
    return found


def network_of(name: str, small: bool) -> NetworkConfig:
    """Return a preset or a tiny network like it; ``far-b flow_map`` has a head that learns guidance."""
    full = preset(name.removesuffix(" flow_map"))
    if name.endswith("flow_map"):
        full = dataclasses.replace(
            full, head=FlowMapConfig(full.head.width, full.head.depth, max_guidance=4.0)
        )
    if not small:
        return full
    tiny: dict[str, MaskedConfig | CausalConfig | BlockCausalConfig] = {
        "masked": MaskedConfig(16, 1, 2, 16, 1, 2, buffer=2),
        "block_causal": BlockCausalConfig(width=16, encoder_depth=1, decoder_depth=1, heads=2),
        "causal": CausalConfig(width=16, depth=1, heads=2),
    }
    return NetworkConfig(tiny[full.backbone.kind], dataclasses.replace(full.head, width=16, depth=1))


def model_config(name: str, small: bool) -> ModelConfig:
    return (
        ModelConfig(network_of(name, small), 5, 4, (4, 4)) if small else ModelConfig(network_of(name, small))
    )


@functools.lru_cache(maxsize=1)
def pipeline_of(name: str, device: torch.device, small: bool, compiled: bool = False) -> Pipeline:
    """Return an untrained model in bfloat16 with an autoencoder of the published size."""
    config = model_config(name, small)
    sizes = (
        AutoencoderConfig(width=16, width_multipliers=(1, 1, 2), blocks=1, norm_groups=4, latent_channels=4)
        if small
        else AutoencoderConfig()
    )
    with device:
        model, autoencoder = FAR(config), Autoencoder(sizes)
    dtype = torch.float32 if small else torch.bfloat16
    if compiled:
        compile_blocks(model)
    autoencoder.eval().to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Pipeline(
        model.to(dtype), autoencoder, [str(label) for label in range(config.classes)], SamplingConfig()
    )


def drawing_case(
    device: torch.device,
    small: bool,
    name: str,
    batch: int,
    sampling: dict[str, Any],
    compiled: bool = False,
) -> dict[str, Any]:
    """Time whole images, from labels to pixels, of recorded generations and of those run from Python."""

    def figures() -> dict[str, Any]:
        made = pipeline_of(name, device, small, compiled)
        # New pipelines, without recordings of other batches.
        pipeline, eager = (
            Pipeline(made.model, made.autoencoder, made.classes, made.defaults, record=record)
            for record in (True, False)
        )
        reset(device)
        tokens = pipeline.model.config.tokens
        config = SamplingConfig(**{"guidance": GUIDANCE, "ar_steps": min(AR_STEPS, tokens), **sampling})
        if not pipeline.model.backbone.any_order:
            config = dataclasses.replace(config, ar_steps=tokens)
        labels = [number % len(pipeline.classes) for number in range(batch)]
        draw, draw_eagerly = (
            functools.partial(each.draw, labels, range(batch), config, batch_size=batch)
            for each in (pipeline, eager)
        )
        first = seconds(device, draw_eagerly, enough=0.0) if compiled else None
        eager_took = seconds(device, draw_eagerly)
        eager_peak = peak(device)
        reset(device)
        draw()  # the next one is recorded
        recording = seconds(device, draw, enough=0.0)
        took = seconds(device, draw)
        check_not_plain(pipeline, compiled)
        return {
            **({"seconds of the first batch, which compiles": first} if compiled else {}),
            "eager seconds per batch": eager_took,
            "eager GiB": eager_peak,
            "seconds of the recorded batch": recording,
            "seconds per batch": took,
            "seconds per image": took / batch,
            "images/s": batch / took,
            "GiB": peak(device),
        }

    return entry(small, figures)


def drawing(name: str, head_steps: tuple[int, ...], device: torch.device, small: bool) -> Calls:
    return {
        f"{steps} head steps, batch {batch}": functools.partial(
            drawing_case, device, small, name, batch, {"head_steps": steps}
        )
        for batch in ((1, 2) if small else (1, 8, 64, 256))
        for steps in head_steps
    }


def approximations(device: torch.device, small: bool) -> Calls:
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "--fast": ("far-b", {"head_steps": 4, **FAST}),
        "half of the AR steps, Halton order": (
            "far-b",
            {"head_steps": 4, "ar_steps": 4 if small else 32, "order": "halton"},
        ),
        "flow map, 2 steps, one pass": ("far-b flow_map", {"head_steps": 2}),
    }
    return {
        f"{title}, batch {batch}": functools.partial(drawing_case, device, small, name, batch, sampling)
        for title, (name, sampling) in cases.items()
        for batch in (1, 2 if small else 64)
    }


@functools.lru_cache(maxsize=1)
def mar_b(device: torch.device, small: bool, dtype: torch.dtype) -> FAR:
    with device:
        return FAR(model_config("mar-b", small)).eval().to(dtype)


def before_step(
    model: FAR, batch: int, step: int, ar_steps: int, device: torch.device
) -> tuple[Tensor, Tensor, int, int]:
    """Return random tokens, orders ``[b, n]``, and the counts of tokens known before and drawn in a step."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
    counts = cosine_token_counts(model.config.tokens, ar_steps)
    orders = random_orders(model.config.tokens, generators).to(device)
    tokens = torch.randn(batch, model.config.tokens, model.config.token_channels, device=device)
    return tokens, orders, sum(counts[:step]), counts[step]


def plain_step(device: torch.device, small: bool, batch: int, step: int, ar_steps: int) -> Callable[[], Any]:
    model = mar_b(device, small, torch.float32)
    tokens, orders, known, _ = before_step(model, batch, step, ar_steps, device)
    mask = torch.ones(batch, model.config.tokens, device=device).scatter(1, orders[:, :known], 0.0)
    plain, labels = PlainMar(model), torch.zeros(batch, dtype=torch.long, device=device)
    # MAR's order starts with the tokens that are drawn last.
    config = SamplingConfig(ar_steps=ar_steps, head_steps=2 if small else HEAD_STEPS, guidance=GUIDANCE)

    @torch.no_grad()
    def call() -> None:
        with contextlib.nullcontext() if small else torch.autocast(device.type, torch.float16):
            plain.ar_step(tokens, mask, labels, orders.flip(1), step, config)

    return call


def our_step(device: torch.device, small: bool, batch: int, step: int, ar_steps: int) -> Callable[[], Any]:
    """Return one AR step of our sampler in bfloat16: the backbone on both guidance halves, and the head."""
    model = mar_b(device, small, torch.float32 if small else torch.bfloat16)
    tokens, orders, known, count = before_step(model, batch, step, ar_steps, device)
    head_steps = 2 if small else HEAD_STEPS
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    labels = torch.cat([labels, torch.full_like(labels, model.null_label)])
    query = orders[:, known : known + count].sort(dim=1).values
    twice = tokens.repeat(2, 1, 1), orders[:, :known].repeat(2, 1), query.repeat(2, 1)
    draws = model.head.noise_draws(head_steps)
    normals = SeededNoise(range(batch), device).normals([count] * draws, model.config.token_channels)

    @torch.no_grad()
    def call() -> None:
        z, uncond = model.backbone(*twice, labels).chunk(2)
        draw = model.head.sampler(head_steps, tokens)
        draw(Condition(z, uncond, GUIDANCE), iter(normals).__next__, 1.0)

    return call


def mar_case(
    device: torch.device, small: bool, batch: int, make: Callable[..., Callable[[], Any]]
) -> dict[str, Any]:
    """Extrapolate a generation of 64 × 100 steps, without decoding, from four of its AR steps."""

    def figures() -> dict[str, Any]:
        ar_steps, steps = (4, (1, 2)) if small else (AR_STEPS, STAND_FOR)
        make(device, small, batch, steps[0], ar_steps)()
        reset(device)
        took = [seconds(device, make(device, small, batch, step, ar_steps), enough=0.0) for step in steps]
        whole = sum(took) * ar_steps / len(steps)
        return {
            "extrapolated from AR steps": list(steps),
            "seconds per batch": whole,
            "seconds per image": whole / batch,
            "GiB": peak(device),
        }

    return entry(small, figures)


def mar_plain(device: torch.device, small: bool) -> Calls:
    paths = {"MAR's plain path, float16 autocast": plain_step, "mar-b here, bfloat16": our_step}
    return {
        f"{title}, batch {batch}": functools.partial(mar_case, device, small, batch, make)
        for batch in ((1, 2) if small else (1, 64, 256))
        for title, make in paths.items()
    }


class PlainLoss(RandomLatents):
    """Task with MAR's plain loss at its mean masking ratio, 0.86."""

    def loss(
        self, step: int, batch: tuple[Tensor, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mask = torch.ones(self.batch_size, self.module.config.tokens, device=self.device)
        mask[:, : self.module.config.tokens // 7] = 0
        return PlainMar(self.module).loss(*batch, mask), {}


def training_case(device: torch.device, small: bool, name: str, batch: int, plain: bool) -> dict[str, Any]:
    """Time whole training steps: batch, loss, gradients, AdamW, EMA."""

    def figures() -> dict[str, Any]:
        for earlier in (pipeline_of, mar_b):
            earlier.cache_clear()
        reset(device)
        with device:
            model = FAR(model_config(name, small))
        loop = LoopConfig(batch_size=batch, dtype="float32" if small else "bfloat16", device=str(device))
        with tempfile.TemporaryDirectory() as folder:
            task = PlainLoss if plain else RandomLatents
            run = Trainer(task(model, device, batch), loop, Path(folder))
            with FlopCounterMode(display=False) as counter:
                run.train_step(Meter())
            meter = Meter()
            took = seconds(device, lambda: run.train_step(meter))
        operations = counter.get_total_flops()
        return {
            "images/s": batch / took, "TFLOP/s": operations / took / 1e12,
            "GFLOP per image": operations / batch / 1e9,
            "share of drawing and moving the batch": meter.loading / meter.seconds, "GiB": peak(device),
        }  # fmt: skip

    return entry(small, figures)


def training_speed(device: torch.device, small: bool) -> Calls:
    calls: Calls = {}
    for batch in (2,) if small else (64, 128, 16, 32):
        for name, plain in (("far-b", False), ("far-bc-b", False), ("far-causal-b", False), ("mar-b", True)):
            title = "MAR's plain loss" if plain else name
            calls[f"{title}, micro-batch {batch}"] = functools.partial(
                training_case, device, small, name, batch, plain
            )
    return calls


SPEED: dict[str, Callable[[torch.device, bool], Calls]] = {
    "machine": machine,
    "far-b": functools.partial(drawing, "far-b", (4,)),
    "far-bc-b": functools.partial(drawing, "far-bc-b", (4,)),
    "far-causal-b": functools.partial(drawing, "far-causal-b", (4, 1)),
    "approximations": approximations,
    "MAR's plain path": mar_plain,
    "training speed": training_speed,
}
