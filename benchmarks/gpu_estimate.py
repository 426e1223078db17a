"""Arithmetic, operations and memory of drawing the presets on a GPU, computed; writes tables of docs/gpu.md.

    python -m benchmarks.gpu_estimate     # about two minutes, no GPU, no weights are created

Every preset draws on torch's ``meta`` device, whose tensors have shapes and no values, in bfloat16 with
guidance. An operation is one call of torch that writes a tensor; on a GPU that is one kernel, seldom more.
"""

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.cluster import PEAKS
from benchmarks.results_report import replace_block, table
from far.autoencoder import Autoencoder, AutoencoderConfig
from far.benchmark.cost import weight_bytes, weights_read
from far.benchmark.rows import Row
from far.benchmark.watch import Watch, generate, segments
from far.files import atomic_path
from far.model import FAR, ModelConfig, preset
from far.pipeline import Pipeline
from far.sampling import SamplingConfig, SeededNoise, sample

DOCUMENT = Path("docs/gpu.md")
META = torch.device("meta")
# AR steps × head steps of each preset.
STEPS = {"far-b": (64, 4), "far-l": (64, 4), "far-h": (64, 4), "far-bc-b": (64, 4), "far-causal-b": (256, 4)}
BATCHES = (1, 8, 64, 256)
GUIDANCE = 2.9
# Bytes per second that an H100 SXM reads, from NVIDIA's data sheet.
BANDWIDTH = 3.35e12
# Seconds in which Python and torch start one operation: a guess. benchmarks.gpu measures it.
LAUNCH = 5e-6
GIB = 2**30


class Account(TorchDispatchMode):
    """Count what is computed, and the bytes of storages that live at a time, from the start of the mode on.

    Attributes:
        flop: multiplications and additions of products and convolutions.
        operations: operations that write a tensor.
        live, peak: bytes of live storages on the meta device, and their maximum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = self.operations = self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(value.untyped_storage()) for value in tree_leaves(args) if isinstance(value, Tensor)}
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flop += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        written = func._schema.is_mutable
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device == META:
                storage = tensor.untyped_storage()
                if id(storage) not in inputs and id(storage) not in self.known:
                    self._add(storage)
                    written = True
        self.operations += written and "empty" not in func.name()
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self.known.add(id(storage))
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, id(storage), storage.nbytes())

    def _drop(self, key: int, count: int) -> None:
        self.known.discard(key)
        self.live -= count


@contextlib.contextmanager
def account() -> Iterator[Account]:
    """Count the block's work on the meta device, with attention as one operation, as on a GPU."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        counted.flop += 4 * query.numel() * key.shape[-2]
        return query.new_zeros(*query.shape[:-1], value.shape[-1])

    with (
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        mock.patch("far.tokenizer.check_finite", lambda images: images),
        Account() as counted,
    ):
        yield counted


def pipeline_of(name: str) -> Pipeline:
    with META:
        model = FAR(ModelConfig(preset(name))).eval().bfloat16()
        autoencoder = Autoencoder(AutoencoderConfig()).eval().bfloat16()
    return Pipeline(model, autoencoder, [str(label) for label in range(1000)], SamplingConfig())


def row_of(name: str, batch: int = 1) -> Row:
    ar_steps, head_steps = STEPS[name]
    return Row(name, SamplingConfig(ar_steps, head_steps, GUIDANCE), "bfloat16", batch)


def work(pipeline: Pipeline, row: Row) -> tuple[float, float]:
    """Return flop and operations of a batch with its pixels, estimated from some AR steps."""
    plan = segments(row.sampling)
    with account() as counted:
        flop = generate(pipeline, row, plan, lambda: float(counted.flop))
    # All AR steps have the same operations, on tensors of other sizes.
    some = [dataclasses.replace(plan[-1], stands_for=row.sampling.ar_steps)]
    with account() as counted:
        operations = generate(pipeline, row, some, lambda: float(counted.operations))
    return sum(flop.values()), sum(operations.values())


def peak(pipeline: Pipeline, row: Row) -> int:
    """Return the bytes of tensors that drawing latents adds at its peak, the last AR step.

    An exact cache is filled 16 tokens at a time before, which takes little beside the cache.
    """
    every = 16 if pipeline.model.backbone.exact_cache else row.sampling.ar_steps
    watch = Watch(pipeline.model, range(every - 1, row.sampling.ar_steps, every), lambda: 0.0)
    labels = torch.zeros(row.batch, dtype=torch.long, device=META)
    with account() as counted:
        sample(watch.model, labels, SeededNoise(range(row.batch), META), row.sampling)
    return counted.peak


def decoding(batch: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the bytes of tensors that decoding at KL-16's size adds at its peak."""
    with META:
        autoencoder = Autoencoder(AutoencoderConfig()).eval().to(dtype)
        latents = torch.empty(batch, 16, 16, 16)
    with account() as counted:
        autoencoder.to_images(latents)
    return counted.peak


def encoding(batch: int, dtype: torch.dtype) -> int:
    """Return the bytes of tensors that encoding at KL-16's size adds at its peak."""
    with META:
        autoencoder = Autoencoder(AutoencoderConfig()).eval().to(dtype)
        images = torch.empty(batch, 3, 256, 256)
    with account() as counted:
        autoencoder.to_latents(images)
    return counted.peak


def tables() -> dict[str, str]:
    """Return the tables by name of their block."""
    pixels, times, memory = {batch: decoding(batch) for batch in BATCHES}, [], []
    for name, (ar_steps, head_steps) in STEPS.items():
        pipeline = pipeline_of(name)
        assert pipeline.autoencoder is not None
        flop, operations = work(pipeline, row_of(name))
        read = {batch: weights_read(pipeline.model, row_of(name, batch)) / BANDWIDTH for batch in BATCHES}
        seconds = [max(batch * flop / PEAKS["H100"], read[batch]) for batch in BATCHES]
        times.append([
            name, f"{ar_steps} × {head_steps}", f"{flop / 1e12:.3g}", f"{operations / ar_steps:.0f}",
            f"{operations * LAUNCH:.2g}", *(f"{value:.2g}" for value in seconds),
        ])  # fmt: skip
        weights = weight_bytes(pipeline.model) + weight_bytes(pipeline.autoencoder)
        one, two = (peak(pipeline, row_of(name, batch)) for batch in (1, 2))
        peaks = [max(one + (batch - 1) * (two - one), pixels[batch]) for batch in BATCHES]
        memory.append([name, gib(weights), *(gib(weights + peak) for peak in peaks)])
    coding = [
        [verb, str(dtype).removeprefix("torch."), *(gib(peak_of(batch, dtype)) for batch in BATCHES)]
        for verb, peak_of in {"decode": decoding, "encode": encoding}.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    batches = [f"batch {batch}" for batch in BATCHES]
    first = ["preset", "steps", "TFLOP per image", "operations per AR step", "launching"]
    return {
        "arithmetic": table([*first, *batches], times),
        "memory": table(["preset", "weights", *batches], memory),
        "pixels": table(["", "dtype", *batches], coding),
    }


def main() -> None:
    blocks = tables()
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, block in blocks.items():
        print(block)
        text = replace_block(text, name, block)
    with atomic_path(DOCUMENT) as temporary:
        temporary.write_text(text, encoding="utf-8")


def gib(count: float) -> str:
    return f"{count / GIB:.2f}" if count < 10 * GIB else f"{count / GIB:.1f}"


if __name__ == "__main__":
    main()
