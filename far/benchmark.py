"""Where the time of a generation goes: rows of settings in turn, each split by network, with arithmetic, memory and floors.

Parsing options and writing tables is the command's (``far.cli.benchmark``). How good the images are is measured in
``far.evaluation``. Nothing here changes how an image is drawn: the sampler runs as it is, and its model's methods are
watched from outside.
"""

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

from far.autoencoder import Autoencoder, AutoencoderConfig
from far.backbone import MaskedBackbone
from far.devices import has_bfloat16_products, resolve_device
from far.errors import InputError
from far.heads.flow import FlowHead
from far.kernels import product_operators
from far.model import FAR, PRESETS, ModelConfig, preset
from far.names import find_folder
from far.packing import Int8Linear
from far.pipeline import Pipeline
from far.precision import prepare, prepare_autoencoder, resolve_dtype
from far.sampling import FAST, SamplingConfig, SeededNoise, sample
from far.sampling_config import MASKED_ONLY
from far.seeds import seeded

SEED = 0
# The whole of a generation; "sampler" is what is left when the networks are taken away.
PARTS = ("encoder", "decoder", "head", "autoencoder", "sampler")
_SEGMENTS = 4
_BANDWIDTH_BYTES = 2**30
_PRODUCT_SIDE = 2048
# Unless rounds are given, a second one begins only if it ends by then: ten minutes with imports and the table.
_MOST_SECONDS = 570


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: ``batch`` images of a model (a preset, or what find_folder takes) drawn together."""

    model: str
    sampling: SamplingConfig
    dtype: str
    batch: int = 1


# MAR's own choice of AR steps, and its guidance scale for published figures.
_PRESET_AR_STEPS = 64
_PRESET_GUIDANCE = 2.9
# With half of the AR steps.
FASTEST: dict[str, Any] = {"order": "halton", "refresh_every": 2, "guidance_every": 4}
# MAR as it was released comes first: all others are compared with it. Model, AR steps, head steps, dtype, what else is unusual.
_DEFAULT_ROWS: tuple[tuple[str, int, int, str, dict[str, Any]], ...] = (
    ("mar-b", 64, 100, "float32", {}),
    ("mar-b", 64, 100, "bfloat16", {}),
    ("far-b", 64, 4, "float32", {}),
    ("far-b", 64, 4, "bfloat16", {}),
    ("far-b", 64, 4, "int8", FAST),
    ("far-b", 32, 4, "int8", FASTEST),
    ("far-causal-b", 256, 4, "bfloat16", {}),
    ("far-causal-b", 256, 2, "bfloat16", {}),
    ("far-causal-b", 256, 2, "int8", {}),
    ("far-causal-b", 256, 1, "int8", {}),
)


def default_rows(*, batches: Sequence[int] = (1,), guidance: float | None = None) -> list[Row]:
    """MAR as it was released, and what makes it faster step by step.

    Raises:
        InputError: a batch or the guidance is out of range.
    """
    rows = []
    for batch, (model, ar, head, dtype, unusual) in itertools.product(batches, _DEFAULT_ROWS):
        options = {**unusual, "guidance": guidance}
        rows += rows_of([model], batches=[batch], ar_steps=[ar], head_steps=[head], dtypes=[dtype], **options)
    return rows


def usable_rows(rows: Sequence[Row], device: str | torch.device = "auto") -> tuple[list[Row], dict[str, str]]:
    """Return the rows whose dtype a device has instructions for, and why the dtypes of the others are left out.

    Raises:
        InputError: there is no such device here.
    """
    device = resolve_device(device)
    reasons = {}
    for dtype in dict.fromkeys(row.dtype for row in rows):
        try:
            resolve_dtype(dtype, device)
        except InputError as error:
            reasons[dtype] = str(error)
        if dtype == "bfloat16" and not has_bfloat16_products(device):
            reasons[dtype] = f"device {device} has no instructions for it"
    return [row for row in rows if row.dtype not in reasons], reasons


def rows_of(
    models: Sequence[str],
    *,
    batches: Sequence[int] = (1,),
    ar_steps: Sequence[int] | None = None,
    head_steps: Sequence[int] | None = None,
    dtypes: Sequence[str] = ("float32",),
    **options: Any,
) -> list[Row]:
    """Every combination of the given values, models outermost; a causal model always takes its number of tokens as AR steps.

    ``options`` are further values of :class:`far.sampling.SamplingConfig`; a causal model is spared those of masked ones.
    What is ``None`` is the model's default: a folder's own, and for a preset 64 AR steps, its head's usual steps and guidance 2.9.

    Raises:
        InputError: a model is unknown, or cannot be sampled with a value.
    """
    for batch in batches:
        if batch < 1:
            raise InputError(f"batch {batch} must be positive")
    rows = []
    for name in models:
        model, defaults = _outline(name)
        ar_choices = (ar_steps or [defaults.ar_steps]) if model.backbone.any_order else [model.config.tokens]
        given = {name: value for name, value in options.items() if value is not None}
        if not model.backbone.any_order:
            given = {name: value for name, value in given.items() if name not in MASKED_ONLY}
        head_choices: Sequence[int | tuple[int, ...]] = head_steps or [defaults.head_steps]
        for batch, ar, head, dtype in itertools.product(batches, ar_choices, head_choices, dtypes):
            config = dataclasses.replace(defaults, ar_steps=ar, head_steps=head, **given)
            config.check(model)
            rows.append(Row(name, config, dtype, batch))
    return rows


def _outline(name: str) -> tuple[FAR, SamplingConfig]:
    """A model that serves for checks alone, and its default sampling values."""
    if name not in PRESETS:
        pipeline = Pipeline.from_pretrained(_folder(name), device="cpu")
        return pipeline.model, pipeline.defaults
    with torch.device("meta"):  # no memory, no time
        model = FAR(ModelConfig(preset(name)))
    return model, SamplingConfig(_PRESET_AR_STEPS, model.head.default_steps, _PRESET_GUIDANCE)


def _folder(name: str) -> Path:
    try:
        return find_folder(name)
    except InputError as error:
        raise InputError(
            f"model {name!r} is no preset ({', '.join(PRESETS)}) and no folder: {error}"
        ) from None


def load_models(rows: Sequence[Row], device: str | torch.device) -> dict[tuple[str, str], Pipeline]:
    """The pipeline of each model and dtype of ``rows``, each once.

    Presets get random weights of a fixed seed, which suffice for time, and the published KL-16 autoencoder's sizes.

    Raises:
        InputError: there is no such device here, or a folder's files are damaged.
    """
    device = resolve_device(device)
    wanted = dict.fromkeys((row.model, row.dtype) for row in rows)
    pipelines = {}
    for name, dtype in tqdm(wanted, desc="loading", unit="model"):
        if name not in PRESETS:
            pipelines[name, dtype] = Pipeline.from_pretrained(_folder(name), dtype=dtype, device=device)
            continue
        with seeded(SEED):
            autoencoder = prepare_autoencoder(Autoencoder(AutoencoderConfig()).eval(), dtype, device)
            model = prepare(FAR(ModelConfig(preset(name))), dtype, device)
        pipelines[name, dtype] = Pipeline(
            model, autoencoder, [str(label) for label in range(model.config.classes)], SamplingConfig()
        )
    return pipelines


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive AR steps that are run: ``untimed`` ones, then ``timed`` ones, whose mean stands for ``stands_for`` steps."""

    untimed: range
    timed: range
    stands_for: int


def segments(sampling: SamplingConfig, *, full: bool = False) -> list[Segment]:
    """What is run of a generation: all of it if ``full`` or short, else four stretches spread evenly over it.

    The timed steps lie in the middle of the quarter that they stand for, since a step's work grows as tokens become known.
    Where some steps compute what others reuse, a stretch is of whole periods of them; otherwise an untimed step before it lets
    a cache catch up with what was skipped.
    """
    ar_steps, period = sampling.ar_steps, math.lcm(sampling.refresh_every, sampling.guidance_every)
    untimed = 1 if period == 1 else 0
    timed = -(-max(2, ar_steps // 32) // period) * period
    if full or ar_steps < _SEGMENTS * (timed + untimed):
        return [Segment(range(0), range(ar_steps), ar_steps)]
    borders = [index * ar_steps // _SEGMENTS for index in range(_SEGMENTS + 1)]
    plan = []
    for start, end in itertools.pairwise(borders):
        first = max(start + untimed, (start + end - timed) // 2) // period * period
        plan.append(Segment(range(first - untimed, first), range(first, first + timed), end - start))
    return plan


class Watch:
    """Readings of something that only grows (a clock, a counter of operations), by AR step and network.

    Steps that are not in ``run`` are skipped: conditions become zeros, tokens noise, and no network is called.
    """

    def __init__(self, model: FAR, run: Container[int], reading: Callable[[], float]) -> None:
        self.run, self.reading = run, reading
        self.step = 0
        self.borders: list[float] = []
        self.inside: list[dict[str, float]] = []
        self.width = model.backbone.width
        self.dtype = next(
            parameter.dtype for parameter in model.backbone.parameters() if parameter.is_floating_point()
        )
        self.begin = reading()

    def wrap(self, part: str, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``method``, whose growth is added to ``part`` of the step."""

        def measured(*values: Any, **options: Any) -> Tensor:
            start = self.reading()
            result = method(*values, **options)
            self.inside[-1][part] += self.reading() - start
            return result

        return measured

    def forward(
        self,
        method: Callable[..., Tensor],
        tokens: Tensor,
        known: Tensor,
        query: Tensor,
        *rest: Any,
        **options: Any,
    ) -> Tensor:
        """Replacement of ``Backbone.forward``, the first call of each AR step."""
        if self.step == len(self.borders):
            self.borders.append(self.reading())
            self.inside.append({"encoder": 0.0, "backbone": 0.0, "head": 0.0})
        if self.step in self.run:
            return self.wrap("backbone", method)(tokens, known, query, *rest, **options)
        return torch.zeros(*query.shape, self.width, dtype=self.dtype, device=query.device)

    def sample(
        self, method: Callable[..., Tensor], z: Tensor, normal: Callable[[], Tensor], **options: Any
    ) -> Tensor:
        """Stands for ``Head.sample``; the head is called once a step."""
        drawn = self.wrap("head", method)(z, normal, **options) if self.step in self.run else normal()
        self.step += 1
        return drawn

    def parts(self, plan: Sequence[Segment]) -> dict[str, float]:
        """The growth over the whole generation by part, estimated from the timed steps of ``plan``; called at its end."""
        borders = [*self.borders, self.reading()]
        found = dict.fromkeys(PARTS, 0.0)
        found["sampler"] = borders[0] - self.begin
        for segment in plan:
            weight = segment.stands_for / len(segment.timed)
            for step in segment.timed:
                inside = self.inside[step]
                found["encoder"] += weight * inside["encoder"]
                # Whatever a backbone does besides encoding; a causal one only decodes.
                found["decoder"] += weight * (inside["backbone"] - inside["encoder"])
                found["head"] += weight * inside["head"]
                found["sampler"] += weight * (
                    borders[step + 1] - borders[step] - inside["backbone"] - inside["head"]
                )
        return found


@contextlib.contextmanager
def watched(model: FAR, run: Container[int], reading: Callable[[], float]) -> Iterator[Watch]:
    """``model`` with its networks' methods replaced by a :class:`Watch`'s for one generation; put back at the end."""
    watch = Watch(model, run, reading)
    backbone, head = model.backbone, model.head
    forward, draw = backbone.forward, head.sample
    if isinstance(backbone, MaskedBackbone):
        backbone.encode = watch.wrap("encoder", backbone.encode)  # type: ignore[method-assign]
    backbone.forward = functools.partial(watch.forward, forward)  # type: ignore[method-assign]
    head.sample = functools.partial(watch.sample, draw)  # type: ignore[method-assign]
    try:
        yield watch
    finally:
        del backbone.forward, head.sample
        if isinstance(backbone, MaskedBackbone):
            del backbone.encode


def generate(
    pipeline: Pipeline, row: Row, plan: Sequence[Segment], reading: Callable[[], float]
) -> dict[str, float]:
    """How much ``reading`` grows over a row's batch, by :data:`PARTS`: one generation of the steps of ``plan``, and one decoding."""
    labels = torch.arange(row.batch, device=pipeline.device) % pipeline.model.config.classes
    noise = SeededNoise(range(SEED, SEED + row.batch), pipeline.device)
    run = {step for segment in plan for step in (*segment.untimed, *segment.timed)}
    with watched(pipeline.model, run, reading) as watch:
        latents = sample(pipeline.model, labels, noise, row.sampling)
        parts = watch.parts(plan)
    if pipeline.autoencoder is not None:
        start = reading()
        pipeline.decode(latents)
        parts["autoencoder"] = reading() - start
    return parts


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds, with all that was started on ``device`` done."""

    def reading() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    return reading


def flop_counter() -> FlopCounterMode:
    """Counts multiplications and additions of matrix products, convolutions and attention, also where torch's own table ends."""

    def linear(x: list[int], weight: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
        return 2 * math.prod(out_shape) * x[-1]

    def attention(
        query: list[int], key: list[int], value: list[int], *_: Any, out_shape: Any, **__: Any
    ) -> int:
        return sdpa_flop_count(query, key, value)  # type: ignore[no-any-return]

    mapping: dict[Any, Callable[..., int]] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention
    }
    mapping |= dict.fromkeys(product_operators(), linear)
    return FlopCounterMode(display=False, custom_mapping=mapping)


def size(module: nn.Module) -> int:
    """Bytes of a module's weights."""
    integers = sum(part.nbytes for part in module.modules() if isinstance(part, Int8Linear))
    return integers + sum(tensor.nbytes for tensor in itertools.chain(module.parameters(), module.buffers()))


def weights_read(model: FAR, config: SamplingConfig) -> int:
    """Bytes of weights that one generation reads: backbone and embeddings of the condition at each AR step, the head's network at
    each pass, and the embeddings of times once for each number of head steps."""
    network: Any = model.head.network
    times, condition = size(network.time_embeddings), size(network.condition_embedding)
    # Beside its network a head holds nothing, or an embedding of guidance.
    guidance = size(model.head) - size(network)
    passes = sum(config.head_steps_at(step) for step in range(config.ar_steps))
    embedded = len({config.head_steps_at(step) for step in range(config.ar_steps)})
    if isinstance(model.head, FlowHead):
        passes *= 2 if model.head.config.solver == "heun" else 1
    at_each_step = size(model.backbone) + condition + guidance
    return config.ar_steps * at_each_step + embedded * times + passes * (size(network) - times - condition)


def read_bandwidth(device: str | torch.device = "cpu") -> float:
    """Bytes a second at which a gigabyte is read, the best of five."""
    block = torch.ones(_BANDWIDTH_BYTES // 4, device=device)
    return block.nbytes / min(paired({"read": _finished(block.sum, block.device)}, 5)["read"])


def product_peak(dtype: torch.dtype, device: str | torch.device = "cpu") -> float:
    """Operations a second of a large matrix product, the best of five."""
    a = torch.randn(_PRODUCT_SIDE, _PRODUCT_SIDE, device=device).to(dtype)
    return _product_speed(lambda: a @ a, a.device)


def int8_product_peak() -> float:
    """The same of a linear layer of 8-bit integers, its inputs' conversion included."""
    layer, a = (
        Int8Linear(nn.Linear(_PRODUCT_SIDE, _PRODUCT_SIDE, bias=False)),
        torch.randn(_PRODUCT_SIDE, _PRODUCT_SIDE),
    )
    return _product_speed(lambda: layer(a), a.device)


def _product_speed(call: Callable[[], object], device: torch.device) -> float:
    return 2 * _PRODUCT_SIDE**3 / min(paired({"product": _finished(call, device)}, 5)["product"])


def _finished(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    reading = clock(device)

    def finished() -> None:
        call()
        reading()

    return finished


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes by which ``call`` raised this process's memory at its highest; ``None`` where the system does not tell (not Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what earlier work freed is not to be taken for this call's
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is resident now
        before = _resident("VmRSS")
    except OSError:
        call()
        return None
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@dataclasses.dataclass
class Finding:
    """What is found of a row. ``rounds`` are seconds and ``flop`` operations of a whole batch, by :data:`PARTS`.

    Attributes:
        timed_steps: AR steps that were timed in each round.
        weights: bytes of the model's weights and the autoencoder's.
        peak: bytes beyond what was resident before, while the batch was drawn and decoded; of a masked model, its last AR steps.
        first_peak: the same of the first run. What torch keeps from it, such as kernels for each length of sequence, serves
            later rows too, so it depends on the rows before.
        fastest: seconds that the counted operations would take at the measured peak of each network's dtype.
        reading: seconds that reading each network's weights once a pass would take at the measured bandwidth.
    """

    row: Row
    timed_steps: int
    weights: int
    peak: int | None
    first_peak: int | None
    flop: dict[str, float]
    fastest: float
    reading: float
    rounds: list[dict[str, float]] = dataclasses.field(default_factory=list)

    @property
    def estimated(self) -> bool:
        return self.timed_steps < self.row.sampling.ar_steps

    @property
    def batch_seconds(self) -> list[float]:
        """Of each round."""
        return [sum(parts.values()) for parts in self.rounds]

    @property
    def image_seconds(self) -> list[float]:
        """Of each round, an image's share of the batch."""
        return [seconds / self.row.batch for seconds in self.batch_seconds]

    @property
    def shares(self) -> dict[str, float]:
        """Of the time of all rounds; they sum to 1."""
        return {part: sum(parts[part] for parts in self.rounds) / sum(self.batch_seconds) for part in PARTS}

    def share_of_time(self, seconds: float) -> float:
        """``seconds`` for a batch as a share of the median time of one."""
        return seconds / statistics.median(self.batch_seconds)


@dataclasses.dataclass
class Report:
    """All rows' findings, the first of which is the base of ratios, and what the machine reached on its own."""

    findings: list[Finding]
    bandwidth: float
    peaks: dict[str, float]

    def times_faster(self, finding: Finding) -> float:
        """Than the first row, an image: the median over rounds of the ratios, pair by pair."""
        return median_ratio(self.findings[0].image_seconds, finding.image_seconds)


def measure(
    rows: Sequence[Row], *, rounds: int | None = None, full: bool = False, device: str | torch.device = "auto"
) -> Report:
    """Time every row ``rounds`` times in turn, after a round that warms up and counts operations and memory.

    Args:
        rounds: None is two, or one if a second like it would end more than 9.5 minutes after the start.
        full: draw whole images; otherwise a row's time is estimated from the AR steps of :func:`segments`.

    Raises:
        InputError: a model, device or dtype cannot be used here.
    """
    begin, device = time.perf_counter(), resolve_device(device)
    pipelines = load_models(rows, device)
    report = Report([], read_bandwidth(device), {})
    with tqdm(total=len(rows) * (1 + (rounds or 2)), desc="benchmark", unit="run") as bar:
        for row in rows:
            bar.set_postfix_str(f"warm-up, {row.model}")
            report.findings.append(_first_look(pipelines[row.model, row.dtype], row, full, report))
            bar.update()
        for turn in range(rounds or 2):
            start = time.perf_counter()
            for finding in report.findings:
                row = finding.row
                bar.set_postfix_str(f"round {turn + 1}, {row.model}")
                pipeline = pipelines[row.model, row.dtype]
                plan = segments(row.sampling, full=full)
                finding.rounds.append(generate(pipeline, row, plan, clock(pipeline.device)))
                bar.update()
            now = time.perf_counter()
            if rounds is None and now - begin + now - start > _MOST_SECONDS:
                break
    return report


def _first_look(pipeline: Pipeline, row: Row, full: bool, report: Report) -> Finding:
    """Everything of a row but its time; warms it up at once."""
    speeds = {part: _peak_of(pipeline.model, report) for part in PARTS}
    weights, read = size(pipeline.model), weights_read(pipeline.model, row.sampling)
    if pipeline.autoencoder is not None:
        speeds["autoencoder"] = _peak_of(pipeline.autoencoder, report)
        weights += size(pipeline.autoencoder)
        read += size(pipeline.autoencoder.decoder) + size(pipeline.autoencoder.post_quant_conv)
    # A causal model's cache would catch up with many tokens in one pass, which takes more memory than it ever needs.
    plan = segments(row.sampling, full=full or not pipeline.model.backbone.any_order)
    flop: dict[str, float] = {}
    with flop_counter() as counter:
        first_peak = _host_peak(
            pipeline, lambda: flop.update(generate(pipeline, row, plan, counter.get_total_flops))
        )
    # In the last steps of a masked model most is known.
    last = segments(row.sampling)[-1:] if pipeline.model.backbone.any_order else plan
    peak = _host_peak(pipeline, lambda: generate(pipeline, row, last, time.perf_counter))
    timed = sum(len(segment.timed) for segment in segments(row.sampling, full=full))
    fastest = sum(flop[part] / speeds[part] for part in PARTS)
    return Finding(row, timed, weights, peak, first_peak, flop, fastest, read / report.bandwidth)


def _host_peak(pipeline: Pipeline, call: Callable[[], object]) -> int | None:
    """:func:`peak_memory` of ``call``, which is run in any case; None where the memory in use is not the process's own."""
    peak = peak_memory(call)
    return peak if pipeline.device.type == "cpu" else None


def _peak_of(module: nn.Module, report: Report) -> float:
    """The measured operations a second in the dtype of a network's weights."""
    if any(isinstance(part, Int8Linear) for part in module.modules()):
        if "int8" not in report.peaks:
            report.peaks["int8"] = int8_product_peak()
        return report.peaks["int8"]
    like = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
    name = str(like.dtype).removeprefix("torch.")
    if name not in report.peaks:
        report.peaks[name] = product_peak(like.dtype, like.device)
    return report.peaks[name]


def paired(
    alternatives: dict[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call, ``rounds`` a name, taken in turn after ``warmup`` uncounted rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for turn in range(warmup + rounds):
        for name, call in alternatives.items():
            start = time.perf_counter()
            call()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: Sequence[float]) -> str:
    """Median and range in seconds."""
    return f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median over rounds of ``a / b``, pair by pair."""
    return statistics.median(x / y for x, y in zip(a, b))


def machine() -> str:
    """One line that says where the figures come from."""
    software = (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, Python {platform.python_version()}"
    )
    return f"{software}, {processor()} {torch.backends.cpu.get_cpu_capability()}"


def processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
