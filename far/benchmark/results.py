"""Measure the rows of a benchmark: time in turn, arithmetic, memory, and the machine's limits."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from tqdm import tqdm

from far.benchmark.cost import flop_counter, weight_bytes, weights_read
from far.benchmark.hardware import peak_device_memory, peak_memory, product_peak, read_bandwidth
from far.benchmark.mar_plain import draw_plain, generate_plain
from far.benchmark.rows import SEED, Row, load_models, select_decoder
from far.benchmark.timing import clock, median_ratio
from far.benchmark.watch import PARTS, Segment, generate, segments
from far.devices import resolve_device
from far.packing import has_int8
from far.pipeline import Pipeline

# Unless rounds are given, a second one runs only if it ends by then: ten minutes with imports and the table.
_MOST_SECONDS = 570


@dataclasses.dataclass
class RowResult:
    """Measurements of a row, of a whole batch unless stated otherwise.

    Attributes:
        row: the row.
        timed_steps: number of AR steps that were timed in each round.
        weights: bytes of the weights of model and autoencoder.
        peak: bytes of the host's memory that drawing and decoding added. On a CPU, a masked model's are
            those of its last AR steps.
        first_peak: ``peak`` of the first run. It includes kernels and buffers that torch keeps for later.
        device_peak: bytes of a GPU's memory that drawing and decoding added; None without CUDA.
        flop: operations by part.
        fastest: seconds that ``flop`` would take at the measured peak of each network's dtype.
        reading: seconds that it would take to read each network's weights once per pass.
        rounds: seconds by part of each round.
    """

    row: Row
    timed_steps: int
    weights: int
    peak: int | None
    first_peak: int | None
    device_peak: int | None
    flop: dict[str, float]
    fastest: float
    reading: float
    rounds: list[dict[str, float]] = dataclasses.field(default_factory=list)

    @property
    def estimated(self) -> bool:
        """Return whether the timed AR steps represent others."""
        return self.timed_steps < self.row.sampling.ar_steps

    @property
    def batch_seconds(self) -> list[float]:
        """Seconds of each round."""
        return [sum(parts.values()) for parts in self.rounds]

    @property
    def image_seconds(self) -> list[float]:
        """Seconds of each round divided by the batch."""
        return [seconds / self.row.batch for seconds in self.batch_seconds]

    @property
    def shares(self) -> dict[str, float]:
        """Fraction of all rounds' time by part."""
        return {part: sum(parts[part] for parts in self.rounds) / sum(self.batch_seconds) for part in PARTS}

    def share_of_time(self, seconds: float) -> float:
        """Return ``seconds`` as a fraction of the median round."""
        return seconds / statistics.median(self.batch_seconds)


@dataclasses.dataclass
class Report:
    """Results of all rows, of which the first is the base of ratios, and the machine's limits.

    ``bandwidth`` is the bytes per second of reading, and ``peaks`` are the operations per second of a large
    matrix product, by dtype.
    """

    results: list[RowResult]
    bandwidth: float
    peaks: dict[str, float]
    device: torch.device = torch.device("cpu")

    def times_faster(self, result: RowResult) -> float:
        """Return how many times faster than the first row a row draws an image: the median over rounds."""
        return median_ratio(self.results[0].image_seconds, result.image_seconds)


def measure(
    rows: Sequence[Row], *, rounds: int | None = None, full: bool = False, device: str | torch.device = "auto"
) -> Report:
    """Time every row in turn, after a first run that warms up and measures arithmetic and memory.

    Args:
        rows: the rows to measure.
        rounds: number of timed rounds. None is two, or one if a second would end after more than 9.5 minutes.
        full: draw whole images. Otherwise, on a CPU, the time is estimated from the AR steps of
            :func:`segments`. Other devices always draw whole images.
        device: device to run on.

    Raises:
        InputError: this machine does not support a model, a device or a dtype.
    """
    begin, device = time.perf_counter(), resolve_device(device)
    pipelines = load_models(rows, device)
    report = Report([], read_bandwidth(device), {}, device)
    with tqdm(total=len(rows) * (1 + (rounds or 2)), desc="benchmark", unit="run") as bar:
        for row in rows:
            bar.set_postfix_str(f"warm-up, {row.model}")
            pipeline = pipelines[row.model, row.dtype]
            select_decoder(pipeline, row)
            report.results.append(_first_run(pipeline, row, full, report))
            bar.update()
        for turn in range(rounds or 2):
            start = time.perf_counter()
            for result in report.results:
                row = result.row
                bar.set_postfix_str(f"round {turn + 1}, {row.model}")
                plan, pipeline = segments(row.sampling, full=full), pipelines[row.model, row.dtype]
                select_decoder(pipeline, row)
                timed = watched_seconds if device.type == "cpu" else whole_seconds
                result.rounds.append(timed(pipeline, row, plan, clock(device)))
                bar.update()
            now = time.perf_counter()
            if rounds is None and now - begin + now - start > _MOST_SECONDS:
                break
    return report


def watched_seconds(
    pipeline: Pipeline, row: Row, plan: Sequence[Segment], reading: Callable[[], float]
) -> dict[str, float]:
    """Return the growth of ``reading`` by part in a generation with readings around each network."""
    return (generate_plain if row.plain else generate)(pipeline, row, plan, reading)


def whole_seconds(
    pipeline: Pipeline, row: Row, plan: Sequence[Segment], reading: Callable[[], float]
) -> dict[str, float]:
    """Return the growth of ``reading`` in an unwatched generation, divided as in a watched one.

    Readings of a GPU wait for it. Around every network they would slow a generation down, and they cannot
    be part of a recording. A pipeline keeps few recordings, so other rows may have replaced this row's:
    two untimed generations make it again.
    """
    for _ in range(0 if row.plain else 2):
        _draw(pipeline, row)
    start = reading()
    _draw(pipeline, row)
    seconds = reading() - start
    watched = watched_seconds(pipeline, row, plan, reading)
    return {part: seconds * value / sum(watched.values()) for part, value in watched.items()}


def _draw(pipeline: Pipeline, row: Row) -> None:
    """Draw and decode a row's batch as users do, or as MAR's code does."""
    if row.plain:
        return draw_plain(pipeline, row)
    labels = [image % pipeline.model.config.classes for image in range(row.batch)]
    seeds = range(SEED, SEED + row.batch)
    pipeline.draw(labels, seeds, row.sampling, batch_size=row.batch)


def _first_run(pipeline: Pipeline, row: Row, full: bool, report: Report) -> RowResult:
    """Warm up a row and return all of its result but the time."""
    autocast = torch.float16 if row.plain and pipeline.device.type == "cuda" else None
    speeds = {part: _peak_of(pipeline.model, report, autocast) for part in PARTS}
    weights, read = weight_bytes(pipeline.model), weights_read(pipeline.model, row)
    if (autoencoder := pipeline.autoencoder) is not None:
        speeds["autoencoder"] = _peak_of(autoencoder, report, autocast)
        weights += weight_bytes(autoencoder)
        read += weight_bytes(autoencoder.decoder_network(row.decoder))
        read += weight_bytes(autoencoder.post_quant_conv)
    # An exact cache would catch up with many skipped tokens in one pass, which takes too much memory.
    exact = pipeline.model.backbone.exact_cache
    plan = segments(row.sampling, full=full or exact)
    flop: dict[str, float] = {}
    with flop_counter() as counter:
        first_peak = peak_memory(
            lambda: flop.update(watched_seconds(pipeline, row, plan, counter.get_total_flops))
        )
    peak, device_peak = _peaks(pipeline, row)
    watched = pipeline.device.type == "cpu"  # elsewhere, whole images are timed
    timed = sum(len(segment.timed) for segment in segments(row.sampling, full=full or not watched))
    fastest = sum(flop[part] / speeds[part] for part in PARTS)
    return RowResult(
        row, timed, weights, peak, first_peak, device_peak, flop, fastest, read / report.bandwidth
    )


def _peaks(pipeline: Pipeline, row: Row) -> tuple[int | None, int | None]:
    """Return the bytes that drawing and decoding add to the host's memory, and to a GPU's."""
    if pipeline.device.type == "cpu":
        # A masked model takes the most memory in its last AR steps, when most tokens are known.
        exact = pipeline.model.backbone.exact_cache
        last = segments(row.sampling, full=True) if exact else segments(row.sampling)[-1:]
        return peak_memory(lambda: watched_seconds(pipeline, row, last, time.perf_counter)), None
    on_device: list[int | None] = []

    def draw_twice() -> None:  # the second generation may record what later ones replay
        for _ in range(2):
            _draw(pipeline, row)

    peak = peak_memory(lambda: on_device.append(peak_device_memory(draw_twice, pipeline.device)))
    return peak, on_device[0]


def _peak_of(module: nn.Module, report: Report, autocast: torch.dtype | None) -> float:
    """Return the measured operations per second in ``autocast``, or in the dtype of a network's weights."""
    like = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
    dtype = autocast or (torch.int8 if has_int8(module) else like.dtype)
    name = str(dtype).removeprefix("torch.")
    if name not in report.peaks:
        report.peaks[name] = product_peak(dtype, like.device)
    return report.peaks[name]
