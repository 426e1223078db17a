"""Checks of ``benchmarks.gpu``: results of a device against those of the CPU, each with its value and limit.

In float32, results differ by the order of sums only. In 16-bit formats, the limit is ten roundings of the
largest value, on average.
"""

import contextlib
import copy
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from far.autoencoder import Autoencoder, AutoencoderConfig
from far.backbone import BlockCausalConfig, CausalConfig, MaskedConfig
from far.benchmark.mar_plain import PlainMar
from far.compiling import compile_blocks, compile_fault
from far.heads import HEADS, HeadConfig
from far.model import FAR, ModelConfig, NetworkConfig
from far.pipeline import Pipeline
from far.recording import can_record
from far.sampling import Kept, SamplingConfig, SeededNoise, ar_steps, prepare_start, sample
from far.seeds import seeded

Calls = dict[str, Callable[[], dict[str, Any]]]
CPU = torch.device("cpu")
FLOAT32 = 1e-4
# Half of the distance from 1 to the next representable value.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
CLASSES, CHANNELS, GRID, BATCH = 5, 3, (2, 4), 3
BACKBONES: dict[str, MaskedConfig | CausalConfig | BlockCausalConfig] = {
    "masked": MaskedConfig(32, 2, 2, 48, 2, 2, buffer=2, dropout=0.0),
    "causal": CausalConfig(width=32, depth=2, heads=2, dropout=0.0),
    "block_causal": BlockCausalConfig(width=32, encoder_depth=2, decoder_depth=2, heads=2, dropout=0.0),
}
HEAD_CASES: list[dict[str, Any]] = [
    *({"kind": kind} for kind in sorted(HEADS)),
    {"kind": "flow_map", "max_guidance": 4.0},
    {"kind": "flow", "solver": "heun"},
]


def check(found: float, limit: float) -> dict[str, Any]:
    return {"found": float(f"{found:.3g}"), "limit": float(f"{limit:.3g}"), "holds": bool(found <= limit)}


def worst(ours: Tensor, reference: Tensor) -> float:
    """Return the largest difference as a fraction of the reference's largest value."""
    return float(
        (ours.detach().float().cpu() - reference.detach().float()).abs().max()
        / reference.detach().abs().max().clamp(min=1e-12)
    )


def title(head: dict[str, Any]) -> str:
    return " ".join(map(str, head.values()))


def tiny(backbone: str, kind: str, **head: Any) -> FAR:
    """Return an untrained model without zero weights."""
    with seeded(0):
        model = FAR(
            ModelConfig(
                NetworkConfig(BACKBONES[backbone], HeadConfig.kinds[kind](32, 2, **head)),
                CLASSES,
                CHANNELS,
                GRID,
            )
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def drawn_tokens(
    model: FAR, config: SamplingConfig, kept: Kept | None, given: list[Tensor] | None = None
) -> list[Tensor]:
    """Return the tokens after each AR step, those of ``kept`` first.

    With ``given``, each step continues from these tokens instead of its own. Otherwise rounding differences
    of untrained causal models grow with each token.
    """
    device, drawn, constrain = next(model.parameters()).device, [], model.constrain

    def follow(tokens: Tensor) -> Tensor:
        drawn.append(constrain(tokens).float().cpu())
        return drawn[-1].to(device) if given is None else given[len(drawn) - 1].to(device)

    labels = torch.arange(BATCH, device=device)
    with _replaced(model, follow):
        sample(model, labels, SeededNoise(range(BATCH), device), config, kept=kept)
    return drawn


@contextlib.contextmanager
def _replaced(model: FAR, constrain: Callable[[Tensor], Tensor]) -> Iterator[None]:
    model.constrain = constrain  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del model.constrain


def head_case(
    device: torch.device,
    backbone: str,
    head: dict[str, Any],
    guidance: float,
    kept: int,
    dtypes: tuple[torch.dtype, ...],
) -> dict[str, Any]:
    """Compare every AR step, continued from the CPU's tokens, in each number format."""
    model = tiny(backbone, **head)
    tokens = model.config.tokens - kept
    config = SamplingConfig(
        ar_steps=3 if model.backbone.any_order else tokens,
        head_steps=min(4, model.head.max_steps),
        guidance=guidance,
        temperature=0.9,
    )
    given = (
        Kept(
            torch.randn(BATCH, CHANNELS, *GRID, generator=torch.Generator().manual_seed(3)),
            torch.arange(kept),
        )
        if kept
        else None
    )
    reference = drawn_tokens(model, config, given)
    found = {}
    for dtype in dtypes:
        drawn = drawn_tokens(copy.deepcopy(model).to(device, dtype), config, given, reference)
        if dtype == torch.float32:
            found["float32"] = check(
                max(worst(ours, theirs) for ours, theirs in zip(drawn, reference)), FLOAT32
            )
        else:
            mean = max(
                float((ours - theirs).abs().mean() / theirs.abs().max())
                for ours, theirs in zip(drawn, reference)
            )
            found[str(dtype).removeprefix("torch.")] = check(mean, 10 * ROUNDING[dtype])
    return found


def heads(device: torch.device, small: bool) -> Calls:
    calls: Calls = {}
    # Processors without bfloat16 instructions take a second even for a model this small.
    dtypes = (torch.float32, torch.float16) if small else (torch.float32, torch.bfloat16, torch.float16)
    for backbone, head, guidance, kept in itertools.product(BACKBONES, HEAD_CASES, (1.0, 3.0), (0, 3)):
        if small and (guidance, kept) != (3.0, 3):
            continue
        name = f"{backbone} {title(head)}, guidance {guidance:g}{', kept tokens' if kept else ''}"
        calls[name] = functools.partial(head_case, device, backbone, head, guidance, kept, dtypes)
    calls["MAR's plain path is ours"] = functools.partial(plain_case, device)
    return calls


def plain_case(device: torch.device) -> dict[str, Any]:
    """Compare images of MAR's arithmetic and ours, from the same noise in float32 on the device."""
    found = {}
    for guidance in (1.0, 3.0):
        model = tiny("masked", kind="diffusion").to(device)
        seeds, labels = range(BATCH), torch.arange(BATCH, device=device)
        ours = sample(
            model,
            labels,
            SeededNoise(seeds, device),
            SamplingConfig(ar_steps=3, head_steps=4, guidance=guidance),
        )
        noise = SeededNoise(seeds, device)
        plain = PlainMar(
            model, lambda rows, channels: noise.normals([rows // BATCH], channels)[0].flatten(0, 1)
        )
        orders = noise.orders(model.config.tokens).to(device).flip(1)
        theirs = plain.sample(labels, orders, 3, 4, guidance)
        found[f"guidance {guidance:g}"] = check(worst(ours, theirs.cpu()), FLOAT32)
    return found


# Sampling of each bundled model.
BUNDLED: dict[str, dict[str, Any]] = {
    "avatars-64": {},
    "avatars-64-causal": {},
    "avatars-64-mar": {"head_steps": 10},
}
SHORT: dict[str, Any] = {"ar_steps": 2, "head_steps": 1}


@functools.lru_cache(maxsize=4)
def bundled(name: str, dtype: str, device: str) -> Pipeline:
    return Pipeline.from_pretrained(name, dtype=dtype, device=device)


def pixels(pipeline: Pipeline, count: int, first: int = 0, **sampling: Any) -> Tensor:
    numbers = range(first, first + count)
    labels = [number % len(pipeline.classes) for number in numbers]
    images = pipeline.draw(labels, numbers, pipeline.sampling_config(**sampling), batch_size=count)
    return images.float().cpu()


def bundled_case(name: str, device: torch.device, count: int, small: bool) -> dict[str, Any]:
    """Compare images of a trained model in both formats with the CPU's in float32.

    The diffusion head amplifies errors at its noisy end: even CPUs differ by 0.012 between the formats.
    """
    sampling = SHORT if small else BUNDLED[name]
    reference = pixels(bundled(name, "float32", "cpu"), count, **sampling)
    ours = pixels(bundled(name, "float32", str(device)), count, **sampling)
    again = pixels(bundled(name, "float32", str(device)), count, **sampling)
    found = {
        "float32 pixels": check(float((ours - reference).abs().max()), 2e-3),
        "the same call twice, differing numbers": check(int((ours != again).sum()), 0),
    }
    if not small:
        low = pixels(bundled(name, "bfloat16", str(device)), count, **sampling)
        found["bfloat16 mean of pixels"] = check(
            float((low - reference).abs().mean()), 0.03 if name == "avatars-64-mar" else 0.01
        )
    return found


def batch_case(device: torch.device, sizes: tuple[int, ...], small: bool) -> dict[str, Any]:
    """Compare an image drawn alone with the same image in larger batches."""
    pipeline = bundled("avatars-64", "float32", str(device))
    sampling = SHORT if small else {}
    alone = pixels(pipeline, 1, **sampling)
    return {
        f"batch {size}": check(float((pixels(pipeline, size, **sampling)[:1] - alone).abs().max()), 2e-3)
        for size in sizes
    }


def edit_case(device: torch.device, small: bool) -> dict[str, Any]:
    """Check that an edit keeps pixels away from its seam and draws the CPU's new pixels."""
    edited = {}
    for place in ("cpu", str(device)):
        pipeline = bundled("avatars-64", "float32", place)
        height, width = pipeline.image_size
        image = torch.linspace(0, 1, 3 * height * width).view(3, height, width)
        mask = torch.zeros(height, width)
        mask[: height // 2] = 1
        edited[place] = pipeline.edit(image, mask, 1, output="tensor", **(SHORT if small else {})).cpu()
    kept = (edited[str(device)] - image)[:, :, 3 * height // 4 :].abs().max()
    return {
        "kept pixels": check(float(kept), 1e-6),
        "new pixels": check(float((edited[str(device)] - edited["cpu"]).abs().max()), 2e-3),
    }


def halton_case(device: torch.device, count: int, small: bool) -> dict[str, Any]:
    sampling = {"order": "halton", **(SHORT if small else {})}
    reference = pixels(bundled("avatars-64", "float32", "cpu"), count, **sampling)
    ours = pixels(bundled("avatars-64", "float32", str(device)), count, **sampling)
    return {"float32 pixels": check(float((ours - reference).abs().max()), 2e-3)}


@torch.no_grad()
def recording_case(
    name: str, device: torch.device, count: int, small: bool, compiled: bool = False
) -> dict[str, Any]:
    """Compare recorded generations with eager ones to the bit: other seeds, and weights changed in place.

    If blocks are ``compiled``, eager ones are compared with those of plain blocks too.
    """
    plain = bundled(name, "float32", str(device))
    recorded = copy.deepcopy(plain)
    if compiled:
        compile_blocks(recorded.model)
    eager = Pipeline(recorded.model, recorded.autoencoder, recorded.classes, recorded.defaults, record=False)
    sampling = SHORT if small else BUNDLED[name]

    def differing(first: int) -> int:
        ours, theirs = (pixels(pipeline, count, first, **sampling) for pipeline in (recorded, eager))
        return int((ours != theirs).sum())

    found = {f"differing numbers, call {call + 1}": check(differing(call * count), 0) for call in range(4)}
    check_not_plain(recorded, compiled)
    if compiled:
        ours, theirs = (pixels(pipeline, count, 0, **sampling) for pipeline in (eager, plain))
        found["pixels of plain blocks"] = check(float((ours - theirs).abs().max()), 2e-3)
    for parameter in recorded.model.parameters():
        parameter.mul_(0.99)
    found["differing numbers after an update of the weights"] = check(differing(0), 0)
    noise, labels = SeededNoise(range(count), device), torch.arange(count, device=device)
    config = recorded.sampling_config(**sampling)
    start = prepare_start(recorded.model, labels, noise, config)
    with _no_waits(device):
        for _ in ar_steps(recorded.model, start, config):
            pass
    return found


def check_not_plain(pipeline: Pipeline, compiled: bool) -> None:
    """Raise an error if a pipeline on a GPU fell back to eager generations, or to plain blocks if compiled.

    Both fall back by themselves, with the same images, so no comparison would notice.
    """
    recordings = pipeline.recordings
    if recordings.enabled and can_record(pipeline.device) and not len(recordings):
        raise RuntimeError(f"generations are not recorded: {recordings.fault}")
    if compiled and (fault := compile_fault()):
        raise RuntimeError(f"blocks are not compiled: {fault}")


@contextlib.contextmanager
def _no_waits(device: torch.device) -> Iterator[None]:
    """Raise an error in the block if the host waits for a CUDA device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def recordings(device: torch.device, small: bool) -> Calls:
    names = [*BUNDLED][:1] if small else [*BUNDLED]
    count = 1 if small else 4
    return {name: functools.partial(recording_case, name, device, count, small) for name in names}


def bundled_models(device: torch.device, small: bool) -> Calls:
    count = 1 if small else 16
    calls: Calls = {
        name: functools.partial(bundled_case, name, device, count, small)
        for name in ([*BUNDLED][:1] if small else BUNDLED)
    }
    calls["one seed, one image"] = functools.partial(batch_case, device, (2,) if small else (4, 16), small)
    calls["edit"] = functools.partial(edit_case, device, small)
    calls["Halton order"] = functools.partial(halton_case, device, count, small)
    return calls


@functools.lru_cache(maxsize=1)
def kl16(small: bool) -> tuple[Autoencoder, int]:
    """Return an untrained autoencoder of the published size, or a tiny one, and its image size in pixels."""
    config = (
        AutoencoderConfig(width=16, width_multipliers=(1, 1, 2), blocks=1, norm_groups=4)
        if small
        else AutoencoderConfig()
    )
    with seeded(0):
        return Autoencoder(config).eval(), 32 if small else 256


@torch.no_grad()
def coding_case(device: torch.device, small: bool) -> dict[str, Any]:
    autoencoder, side = kl16(small)
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = autoencoder.moments(images)
    reference = autoencoder.decode(moments.chunk(2, dim=1)[0])
    there = copy.deepcopy(autoencoder).to(device)
    return {
        "moments": check(worst(there.moments(images.to(device)), moments), FLOAT32),
        "images": check(worst(there.decode(moments.chunk(2, dim=1)[0].to(device)), reference), FLOAT32),
    }


@torch.no_grad()
def parts_case(device: torch.device, small: bool) -> dict[str, Any]:
    """Check that decoding a large batch gives the images of small batches in bounded memory."""
    autoencoder, side = kl16(small)
    count, found = 8 if small else 256, {}
    latents = torch.randn(
        count, autoencoder.config.latent_channels, *[side // autoencoder.config.stride] * 2
    ).to(device)
    for dtype in (torch.float32,) if small else (torch.float32, torch.bfloat16):
        there = copy.deepcopy(autoencoder).to(device, dtype)
        there.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        there.decode(latents[:1].to(dtype))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        start = time.perf_counter()
        images = there.decode(latents.to(dtype))
        last = images[-1:].float().cpu()  # waits for all images
        entry: dict[str, Any] = {"images": count, "seconds": round(time.perf_counter() - start, 3)}
        alone = there.decode(latents[-1:].to(dtype))
        limit = FLOAT32 if dtype == torch.float32 else 10 * ROUNDING[dtype]
        entry["the last image alone"] = check(worst(alone, last), limit)
        if device.type == "cuda":
            entry["GiB beside weights"] = check((torch.cuda.max_memory_allocated(device) - before) / 2**30, 8)
        found[str(dtype).removeprefix("torch.")] = entry
    return found


def autoencoders(device: torch.device, small: bool) -> Calls:
    return {
        "encode and decode": functools.partial(coding_case, device, small),
        "decode in parts": functools.partial(parts_case, device, small),
    }  # fmt: skip
