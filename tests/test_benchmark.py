"""Arithmetic of the benchmark: skipped AR steps, counted operations and estimates. No speed is asserted."""

import dataclasses
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from far.autoencoder import AutoencoderConfig
from far.backbone import BlockCausalConfig, CausalConfig, MaskedBackbone, MaskedConfig
from far.benchmark import report
from far.benchmark.cost import flop_counter, weight_bytes, weights_read
from far.benchmark.hardware import peak_memory, product_peak
from far.benchmark.mar_plain import draw_plain
from far.benchmark.results import Report, RowResult, measure, watched_seconds, whole_seconds
from far.benchmark.rows import Row, default_rows, load_models, rows_of
from far.benchmark.watch import PARTS, Segment, Watch, generate, segments
from far.errors import InputError
from far.heads import Condition, DiffusionConfig, Head, HeadConfig
from far.kernels import no_int8
from far.layers import Block
from far.model import FAR, PRESETS, ModelConfig, NetworkConfig
from far.packing import Int8Linear
from far.pipeline import Pipeline
from far.precision import prepare
from far.sampling import SamplingConfig, SeededNoise, sample

BACKBONES = {
    "masked": MaskedConfig(32, 2, 2, 32, 3, 2, 3),
    "causal": CausalConfig(width=32, depth=2, heads=2),
    "block_causal": BlockCausalConfig(width=32, encoder_depth=2, decoder_depth=2, heads=2),
}
each_backbone = pytest.mark.parametrize("backbone", BACKBONES)


def model(backbone: str, dtype: str = "float32", kind: str = "shortcut", **options: Any) -> FAR:
    """A model of 16 tokens with random (not zero) outputs."""
    torch.manual_seed(0)
    head = HeadConfig.kinds[kind](16, 1, 2, **options)  # type: ignore[arg-type]
    made = FAR(ModelConfig(NetworkConfig(BACKBONES[backbone], head, patch=2), 3, 2, (8, 8))).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return prepare(made, dtype, "cpu")


def pipeline(backbone: str, dtype: str = "float32") -> Pipeline:
    return Pipeline(model(backbone, dtype), None, ["a", "b", "c"], SamplingConfig())


def count_calls(counts: Counter, name: str, module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: counts.update([name]))


@pytest.mark.parametrize("ar_steps", [*range(1, 70), 100, 128, 255, 256])
@pytest.mark.parametrize("full", [False, True])
def test_segments_represent_every_step(ar_steps: int, full: bool) -> None:
    plan = segments(SamplingConfig(ar_steps), full=full)
    assert sum(segment.stands_for for segment in plan) == ar_steps
    run = [step for segment in plan for step in (*segment.untimed, *segment.timed)]
    assert run == sorted(set(run))
    assert set(run) <= set(range(ar_steps))
    for segment in plan:
        assert len(segment.timed) >= 1
        assert all(step == segment.timed[0] - 1 for step in segment.untimed)
    if full or ar_steps < 12:
        assert [step for segment in plan for step in segment.timed] == list(range(ar_steps))


def test_segments_of_the_presets_are_short_and_central() -> None:
    assert segments(SamplingConfig(64)) == [
        Segment(range(s + 6, s + 7), range(s + 7, s + 9), 16) for s in (0, 16, 32, 48)
    ]
    assert segments(SamplingConfig(256)) == [
        Segment(range(s + 27, s + 28), range(s + 28, s + 36), 64) for s in (0, 64, 128, 192)
    ]


@pytest.mark.parametrize("ar_steps", [16, 24, 30, 32, 64])
@pytest.mark.parametrize(("refresh", "guidance"), [(2, 1), (4, 1), (1, 4), (4, 4), (2, 3)])
def test_segments_hold_whole_periods(ar_steps: int, refresh: int, guidance: int) -> None:
    plan = segments(SamplingConfig(ar_steps, refresh_every=refresh, guidance_every=guidance))
    assert sum(segment.stands_for for segment in plan) == ar_steps
    run = [step for segment in plan for step in segment.timed]
    assert run == sorted(set(run))
    if len(plan) == 1:
        assert run == list(range(ar_steps))
        return
    period = math.lcm(refresh, guidance)
    assert all(
        not segment.untimed and segment.timed[0] % period == len(segment.timed) % period == 0
        for segment in plan
    )
    assert run[-1] < ar_steps


@pytest.mark.skipif(no_int8() is not None, reason="this build of torch has no 8-bit matrix products")
def test_eight_bit_weights_and_products_are_counted() -> None:
    layer = Int8Linear(torch.nn.Linear(96, 80))
    assert weight_bytes(torch.nn.Sequential(layer)) == 96 * 80 + 4 * 80 + 4 * 80
    with flop_counter() as counter:
        layer(torch.randn(3, 5, 96))
    assert counter.get_total_flops() == linear(15, 96, 80)


@each_backbone
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_watched_generation_of_all_steps_draws_the_same_latents(backbone: str, dtype: str) -> None:
    watched_model = model(backbone, dtype)
    labels, config = torch.tensor([0, 2]), SamplingConfig(16, 2, 2.0)

    def draw(drawn_model: FAR) -> torch.Tensor:
        return sample(drawn_model, labels, SeededNoise([3, 4], torch.device("cpu")), config)

    plain = draw(watched_model)
    assert torch.equal(draw(Watch(watched_model, range(16), lambda: 0.0).model), plain)
    assert not torch.equal(draw(Watch(watched_model, range(8), lambda: 0.0).model), plain)
    assert torch.equal(draw(watched_model), plain), "the model has changed"


def test_model_is_not_watched_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    broken, readings = pipeline("masked"), []

    def fail(self: MaskedBackbone, *values: object) -> None:
        raise RuntimeError

    def reading() -> float:
        readings.append(1)
        return 0.0

    row, plan = Row("x", SamplingConfig(2, 1), "float32", 1), segments(SamplingConfig(2))
    with monkeypatch.context() as patch:
        patch.setattr(MaskedBackbone, "decode", fail)
        with pytest.raises(RuntimeError):
            generate(broken, row, plan, reading)
    readings.clear()
    sample(broken.model, torch.tensor([0]), SeededNoise([0], torch.device("cpu")), row.sampling)
    assert not readings


@each_backbone
def test_skipped_steps_call_no_network(backbone: str) -> None:
    watched_pipeline = pipeline(backbone)
    counts: Counter = Counter()
    network = watched_pipeline.model.backbone
    assert isinstance(network.blocks if backbone == "causal" else network.decoder_blocks, nn.ModuleList)
    count_calls(counts, "backbone", (network.blocks if backbone == "causal" else network.decoder_blocks)[0])
    count_calls(counts, "head", watched_pipeline.model.head.network.output)
    generate(
        watched_pipeline,
        Row("x", SamplingConfig(16, 3, 2.0), "float32", 2),
        segments(SamplingConfig(16)),
        lambda: 0.0,
    )
    assert counts == {"backbone": 12, "head": 12 * 3}  # 4 stretches of 1 + 2 steps
    counts.clear()
    generate(
        watched_pipeline,
        Row("x", SamplingConfig(16, 3, 2.0), "float32", 2),
        segments(SamplingConfig(16), full=True),
        lambda: 0.0,
    )
    assert counts == {"backbone": 16, "head": 16 * 3}


@each_backbone
def test_skipped_step_returns_zeros_of_the_right_dtype(backbone: str) -> None:
    skipping = model(backbone, "bfloat16")
    tokens, query = torch.zeros(2, 16, 8), torch.zeros(2, 3, dtype=torch.long)
    watch = Watch(skipping, range(0), lambda: 0.0)
    z = watch.model.backbone(tokens, query[:, :0], query, torch.tensor([0, 1]))
    drawn = watch.model.head.sampler(1, tokens)(Condition(z), lambda: torch.ones(2, 3, 8), 1.0)
    assert torch.equal(drawn, torch.ones(2, 3, 8))
    assert z.dtype == torch.bfloat16
    assert torch.equal(z, torch.zeros(2, 3, 32, dtype=torch.bfloat16))


def test_cache_catches_up_with_skipped_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    causal = pipeline("causal")
    network = causal.model.backbone
    forward = type(network).forward
    errors = []

    def compared(self, tokens, known, query, labels, cache):  # type: ignore[no-untyped-def]
        z = forward(self, tokens, known, query, labels, cache)
        errors.append((z - forward(self, tokens, known, query, labels)).abs().max().item())
        return z

    monkeypatch.setattr(type(network), "forward", compared)
    generate(
        causal, Row("x", SamplingConfig(16, 1, 2.0), "float32", 2), segments(SamplingConfig(16)), lambda: 0.0
    )
    assert len(errors) == 12
    assert max(errors) < 1e-5


class Ticks:
    """A clock that only the networks advance: 3 per encoding, 5 per decoding, 7 per token of the head."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, masked: MaskedBackbone, head: Head) -> None:
        self.now, self.head_calls = 0.0, 0
        encode, decode, sampler = type(masked).encode, type(masked).decode, type(head).sampler

        def encoding(*values):  # type: ignore[no-untyped-def]
            self.now += 3
            return encode(*values)

        def decoding(*values):  # type: ignore[no-untyped-def]
            self.now += 5
            return decode(*values)

        def sampling(head, steps, like):  # type: ignore[no-untyped-def]
            draw = sampler(head, steps, like)

            def drawing(condition, normal, temperature):  # type: ignore[no-untyped-def]
                self.now += 7 * condition.z.shape[1]
                return draw(condition, normal, temperature)

            return drawing

        monkeypatch.setattr(type(masked), "encode", encoding)
        monkeypatch.setattr(type(masked), "decode", decoding)
        monkeypatch.setattr(type(head), "sampler", sampling)


@pytest.mark.parametrize("full", [False, True])
def test_timed_steps_give_the_time_of_all(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    masked = pipeline("masked")
    ticks = Ticks(monkeypatch, masked.model.backbone, masked.model.head)  # type: ignore[arg-type]
    row = Row("x", SamplingConfig(16, 1), "float32", 1)  # one token per step
    found = generate(masked, row, segments(SamplingConfig(16), full=full), lambda: ticks.now)
    assert found == {"encoder": 16 * 3, "decoder": 16 * 5, "head": 16 * 7, "autoencoder": 0, "sampler": 0}
    assert tuple(found) == PARTS


def test_time_outside_the_networks_is_the_samplers(monkeypatch: pytest.MonkeyPatch) -> None:
    masked = pipeline("masked")
    ticks = Ticks(monkeypatch, masked.model.backbone, masked.model.head)  # type: ignore[arg-type]
    constrain = FAR.constrain

    def slow_constrain(self, tokens):  # type: ignore[no-untyped-def]
        ticks.now += 2
        return constrain(self, tokens)

    monkeypatch.setattr(FAR, "constrain", slow_constrain)
    found = generate(
        masked, Row("x", SamplingConfig(16, 1), "float32", 1), segments(SamplingConfig(16)), lambda: ticks.now
    )
    assert found["sampler"] == 16 * 2
    assert found["head"] == 16 * 7


def test_estimate_of_growing_work_is_exact() -> None:
    """Step k takes k: the middles of the quarters give the exact sum."""
    watch = Watch(model("masked"), range(0), lambda: 64 * 63 / 2)
    watch.starts = [float(step * (step - 1) / 2) for step in range(64)]
    watch.begin = 0.0
    watch.inside = [{"encoder": 0.0, "backbone": 0.0, "head": 0.0} for _ in range(64)]
    assert watch.parts(segments(SamplingConfig(64)))["sampler"] == 64 * 63 / 2
    assert watch.parts([Segment(range(0), range(0, 2), 64)])["sampler"] == 64 * 0.5


def linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("queries", [1, 5])
def test_counted_operations_of_a_block_equal_the_formula(dtype: str, queries: int) -> None:
    rows, length, width = 3, 40, 32
    block = prepare(nn.ModuleList([Block(width, heads=2)]).eval(), dtype, "cpu")[0]  # type: ignore[index]
    x = torch.randn(rows, length, width).to(next(block.norm1.parameters()).dtype)
    with flop_counter() as counter, torch.no_grad():
        block(x, torch.arange(queries).expand(rows, -1))
    products = linear(rows * length, width, 3 * width) + linear(rows * queries, width, 9 * width)
    assert counter.get_total_flops() == products + 2 * 2 * rows * queries * length * width


@each_backbone
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_operations_by_part_add_up_to_those_of_a_plain_generation(
    backbone: str, dtype: str, guidance: float
) -> None:
    measured, config = pipeline(backbone, dtype), SamplingConfig(16, 3, guidance, "constant")
    plan = segments(config, full=True)
    with flop_counter() as counter:
        found = generate(measured, Row("x", config, dtype, 2), plan, counter.get_total_flops)
    network, head = measured.model.backbone, measured.model.head
    with flop_counter() as plain, torch.no_grad():
        sample(measured.model, torch.tensor([0, 1]), SeededNoise([0, 1], torch.device("cpu")), config)
    with flop_counter() as before_the_steps, torch.no_grad():
        head.sampler(3, torch.zeros(2, 16, 8))
    of_module = {name: sum(counts.values()) for name, counts in plain.get_flop_counts().items()}
    encoder = 0
    if backbone != "causal":
        parts = (
            "token_projection",
            *(f"encoder_blocks.{index}" for index in range(len(network.encoder_blocks))),
        )
        encoder = sum(of_module[f"{type(network).__name__}.{part}"] for part in parts)
    assert found["encoder"] == encoder
    assert found["encoder"] + found["decoder"] == of_module[type(network).__name__]
    assert found["sampler"] == before_the_steps.get_total_flops()
    assert sum(found.values()) == plain.get_total_flops()


@each_backbone
@pytest.mark.parametrize(
    ("kind", "options", "steps"),
    [
        ("shortcut", {}, (5, 2)),
        ("diffusion", {}, (5, 2)),
        ("flow", {}, (5, 2)),
        ("flow", {"solver": "heun"}, (5, 2)),
        ("flow_map", {}, (5, 2)),
        ("flow_map", {"max_guidance": 4.0}, (5, 2)),
        ("energy", {}, (1,)),
    ],
)
def test_weights_read_equal_those_of_the_passes(
    backbone: str,
    kind: str,
    options: dict[str, Any],
    steps: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("far.heads.network._ROWS", 4)  # some products of modulations serve several steps
    watched_model = model(backbone, kind=kind, **options)
    parts = [
        (name, part)
        for name, part in watched_model.head.named_modules()
        if next(part.parameters(recurse=False), None) is not None
    ]
    counts: Counter = Counter()
    for name, part in parts:
        count_calls(counts, name, part)
    config = SamplingConfig(16, steps, guidance=2.0, guidance_interval=(0.3, 1.0))
    sample(watched_model, torch.tensor([0]), SeededNoise([0], torch.device("cpu")), config)
    for name in counts:  # conditions with and without the class are embedded one after the other
        if "condition_embedding" in name or "guidance_embedding" in name:
            assert 16 <= counts[name] <= 32
            counts[name] = 16
    expected = 16 * weight_bytes(watched_model.backbone)
    expected += sum(counts[name] * weight_bytes(part) for name, part in parts)
    assert weights_read(watched_model, Row("x", config, "float32")) == expected


def test_head_without_the_usual_network_is_read_as_a_whole_in_each_head_step() -> None:
    watched_model = model("masked")
    watched_model.head = nn.Linear(3, 5)
    config = SamplingConfig(16, 2)
    expected = 16 * weight_bytes(watched_model.backbone) + 32 * weight_bytes(watched_model.head)
    assert weights_read(watched_model, Row("x", config, "float32")) == expected


def test_size_is_in_bytes() -> None:
    assert weight_bytes(nn.Linear(3, 5)) == 4 * (15 + 5)
    assert weight_bytes(nn.Linear(3, 5, dtype=torch.bfloat16)) == 2 * (15 + 5)


def test_peak_memory_is_that_of_the_call_alone() -> None:
    def use(megabytes: int) -> None:
        torch.ones(megabytes * 2**18)

    kept = torch.ones(32 * 2**18)
    use(400)
    found = peak_memory(lambda: use(100))
    if found is None:
        pytest.skip("the system reports no peak")
    assert 95 * 2**20 <= found <= 130 * 2**20
    assert (peak_memory(lambda: None) or 0) < 20 * 2**20
    assert len(kept)


def result(batch: int, seconds: list[float]) -> RowResult:
    rounds = [{**dict.fromkeys(PARTS, 0.0), "encoder": value / 4, "head": value * 3 / 4} for value in seconds]
    return RowResult(
        Row("x", SamplingConfig(16), "float32", batch), 8, 0, None, None, None, {}, 1.0, 2.0, rounds
    )


def test_figures_of_a_row_are_medians_of_its_rounds() -> None:
    base, other = result(1, [10.0, 20.0, 60.0]), result(4, [20.0, 10.0, 40.0])
    assert other.image_seconds == [5.0, 2.5, 10.0]
    assert other.shares == {"encoder": 0.25, "decoder": 0, "head": 0.75, "autoencoder": 0, "sampler": 0}
    assert other.share_of_time(other.reading) == 2.0 / 20.0
    assert other.estimated
    # Round by round 2, 8 and 6 times; the ratio of the medians would be 4.
    assert Report([base, other], 1.0, {}).times_faster(other) == 6.0


def test_rows_are_all_combinations_and_causal_models_have_fixed_ar_steps() -> None:
    rows = rows_of(
        ["far-b", "far-causal-b"],
        batches=[1, 2],
        ar_steps=[8, 32],
        head_steps=[1, 4],
        dtypes=["float32", "bfloat16"],
    )
    assert len(rows) == 2 * 2 * 2 * 2 + 2 * 2 * 2
    assert rows[0] == Row("far-b", SamplingConfig(8, 1, 2.9), "float32", 1)
    assert {row.sampling.ar_steps for row in rows if row.model == "far-causal-b"} == {256}
    assert rows_of(["mar-b"]) == [Row("mar-b", SamplingConfig(64, 100, 2.9), "float32", 1)]


def test_folder_has_its_own_sampling(pipeline_folder: Path) -> None:
    (row,) = rows_of([str(pipeline_folder)], guidance=1.5)
    assert row == Row(str(pipeline_folder), SamplingConfig(4, 2, 1.5), "float32", 1)


def test_default_rows_start_with_mar_as_released() -> None:
    rows = default_rows(batches=[2], guidance=3.0)
    assert rows[0] == Row("mar-b", SamplingConfig(64, 100, 3.0), "float32", 2)
    assert [row.model for row in rows].count("far-causal-b") == 4
    assert {row.dtype for row in rows} == {"float32", "bfloat16", "int8"}
    assert default_rows()[0].sampling.guidance == 2.9
    with pytest.raises(InputError, match="batch 0"):
        default_rows(batches=[0])


def test_default_rows_of_cuda_start_with_mars_plain_path_and_have_no_int8() -> None:
    rows = default_rows(batches=[1, 8], cuda=True)
    assert rows[:2] == [
        Row("mar-b", SamplingConfig(64, 100, 2.9), "float32", batch, plain=True) for batch in (1, 8)
    ]
    assert not any(row.plain for row in rows[2:])
    assert len(set(rows)) == len(rows)
    assert {row.dtype for row in rows} == {"float32", "bfloat16"}
    assert {row.sampling for row in rows} == {row.sampling for row in default_rows()}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """Add a small preset and autoencoder, and shorten the measurement of the machine."""
    monkeypatch.setitem(
        PRESETS, "tiny", NetworkConfig(MaskedConfig(16, 1, 2, 16, 1, 2, 2), DiffusionConfig(16, 1))
    )
    monkeypatch.setattr(
        "far.benchmark.rows.AutoencoderConfig", lambda: AutoencoderConfig(width=8, blocks=1, norm_groups=4)
    )
    monkeypatch.setattr("far.benchmark.hardware._BANDWIDTH_BYTES", {"cpu": 2**16})
    monkeypatch.setattr("far.benchmark.hardware._PRODUCT_SIDE", {"cpu": 32})
    return "tiny"


def test_presets_have_the_same_weights_each_time_and_leave_random_states_alone(tiny: str) -> None:
    rows = rows_of([tiny], dtypes=["float32", "bfloat16"], head_steps=[1, 2])
    state = torch.get_rng_state()
    first = load_models(rows, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12345)
    second = load_models(rows, "cpu")
    assert list(first) == [(tiny, "float32"), (tiny, "bfloat16")]
    a, b = (found[tiny, "float32"].model.backbone.token_projection.weight for found in (first, second))
    assert torch.equal(a, b)
    assert first[tiny, "bfloat16"].model.backbone.class_embedding.weight.dtype == torch.bfloat16


@each_backbone
def test_memory_is_that_of_the_last_steps_or_of_a_cache_that_grows_as_in_use(
    backbone: str, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []
    monkeypatch.setattr(
        "far.benchmark.results.generate", lambda *values: plans.append(values[2]) or generate(*values)
    )
    models = {("x", "float32"): pipeline(backbone)}
    monkeypatch.setattr("far.benchmark.results.load_models", lambda rows, device: models)
    (found,) = measure([Row("x", SamplingConfig(16, 1), "float32")], rounds=1, device="cpu").results
    assert plans[:2] == (
        [segments(SamplingConfig(16), full=True)] * 2
        if backbone != "masked"
        else [segments(SamplingConfig(16)), segments(SamplingConfig(16))[-1:]]
    )
    assert found.timed_steps == 8


def test_operations_of_mars_plain_path_add_up_to_those_of_a_whole_generation(tiny: str) -> None:
    (row,) = rows_of([tiny], batches=[2], ar_steps=[12], head_steps=[3])
    row = dataclasses.replace(row, plain=True)
    drawn = load_models([row], "cpu")[tiny, "float32"]
    with flop_counter() as counter:
        found = watched_seconds(drawn, row, segments(row.sampling, full=True), counter.get_total_flops)
    with flop_counter() as plain:
        draw_plain(drawn, row)
    of_module = {name: sum(counts.values()) for name, counts in plain.get_flop_counts().items()}
    assert sum(found.values()) == plain.get_total_flops()
    assert found["head"] == of_module["HeadNetwork"]
    with flop_counter() as decoding:
        drawn.decode(torch.zeros(2, 16, 16, 16))
    assert found["autoencoder"] == decoding.get_total_flops()
    assert found["decoder"] > found["encoder"] > found["sampler"] == 0
    with flop_counter() as counter:
        estimate = watched_seconds(drawn, row, segments(row.sampling), counter.get_total_flops)
    assert sum(estimate.values()) == pytest.approx(sum(found.values()), rel=0.1)


@pytest.mark.parametrize("plain", [False, True])
def test_whole_generation_is_timed_without_readings_inside(plain: bool, tiny: str) -> None:
    """Each reading takes a second, as waiting for a GPU takes time, and all else takes none."""
    (row,) = rows_of([tiny], ar_steps=[4], head_steps=[2])
    row = dataclasses.replace(row, plain=plain)
    drawn, readings = load_models([row], "cpu")[tiny, "float32"], itertools.count()
    plan = segments(row.sampling, full=True)
    draws: list[int] = []
    draw = drawn.draw
    drawn.draw = lambda *values, **options: draws.append(1) or draw(*values, **options)  # type: ignore[method-assign]
    whole = whole_seconds(drawn, row, plan, lambda: float(next(readings)))
    assert len(draws) == (0 if plain else 3), "the third generation of a shape replays a recording"
    watched = watched_seconds(drawn, row, plan, lambda: float(next(readings)))
    assert sum(whole.values()) == pytest.approx(1)
    assert sum(watched.values()) > 10
    assert whole == pytest.approx({part: value / sum(watched.values()) for part, value in watched.items()})


def test_table_of_a_gpu_has_its_name_memory_and_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    settings = {"cuda": "13", "cudnn": 9, "tf32 products": True, "tf32 convolutions": False}
    monkeypatch.setattr(report, "cuda_settings", lambda: settings)
    device = torch.device("cuda")
    measured = result(1, [2.0])
    measured.device_peak, measured.flop = 3 * 2**30, dict.fromkeys(PARTS, 1.0)
    measured.row = dataclasses.replace(measured.row, plain=True)
    found = Report([measured], 1.0, {}, device)
    heading, lines = report.heading(found, device), report.table(found).splitlines()
    assert "NVIDIA X" in heading
    assert "TF32 in products" in heading
    cells = dict(zip(*([cell.strip() for cell in lines[place].strip("|").split("|")] for place in (0, 2))))
    assert (cells["GPU memory"], cells["dtype"]) == ("3 GB", "float16 autocast")
    recorded = report.record(found, device)
    assert settings.items() <= recorded["machine"].items()
    assert recorded["rows"][0]["GPU memory bytes"] == 3 * 2**30
    on_cpu = report.table(Report([measured], 1.0, {}))
    assert "GPU" not in on_cpu


def test_peak_memory_calls_once_if_the_system_reports_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    calls = []
    monkeypatch.setattr(Path, "write_text", refuse)
    assert peak_memory(lambda: calls.append(1)) is None
    assert calls == [1]


def test_rows_take_turns_after_a_warm_up(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of([tiny], head_steps=[2, 3])
    order = []

    def recorded(pipeline, row, plan, reading):  # type: ignore[no-untyped-def]
        order.append((row.sampling.head_steps, sum(len(segment.timed) for segment in plan)))
        return generate(pipeline, row, plan, reading)

    monkeypatch.setattr("far.benchmark.results.generate", recorded)
    measured = measure(rows, rounds=2)
    assert order == [(2, 8), (2, 2), (3, 8), (3, 2), *[(2, 8), (3, 8)] * 2]
    assert [len(found.rounds) for found in measured.results] == [2, 2]
    assert measured.peaks.keys() == {"float32"}
    assert measured.times_faster(measured.results[0]) == 1.0
    for found in measured.results:
        assert found.flop["autoencoder"] > 0
        assert found.rounds[0]["autoencoder"] > 0
        operations = sum(found.flop.values())
        assert found.fastest == pytest.approx(operations / measured.peaks["float32"])
        pipeline = load_models(rows, "cpu")[tiny, "float32"]
        assert pipeline.autoencoder is not None
        autoencoder = pipeline.autoencoder
        decoder = weight_bytes(autoencoder.decoder) + weight_bytes(autoencoder.post_quant_conv)
        assert found.reading == pytest.approx(
            (weights_read(pipeline.model, found.row) + decoder) / measured.bandwidth
        )
        assert found.weights == weight_bytes(pipeline.model) + weight_bytes(pipeline.autoencoder)


@pytest.mark.skipif(no_int8() is not None, reason="this build of torch has no 8-bit matrix products")
@pytest.mark.usefixtures("tiny")
def test_peak_of_eight_bit_products_is_that_of_an_eight_bit_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = [], Int8Linear.forward
    monkeypatch.setattr(Int8Linear, "forward", lambda *values: calls.append(1) or forward(*values))
    assert product_peak(torch.int8) > 0
    assert len(calls) == 6  # five of them are timed
