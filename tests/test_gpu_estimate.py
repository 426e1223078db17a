"""Computed figures of ``benchmarks.gpu_estimate``: they equal those of the same work on a CPU."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from benchmarks import gpu_estimate
from benchmarks.gpu_estimate import META, account, peak, pipeline_of, work
from far.autoencoder import AutoencoderConfig, Upsample
from far.backbone import BlockCausalConfig, CausalConfig, MaskedConfig
from far.benchmark.cost import flop_counter
from far.benchmark.rows import Row
from far.benchmark.watch import generate, segments
from far.heads import ShortcutConfig
from far.model import FAR, PRESETS, ModelConfig, NetworkConfig
from far.pipeline import Pipeline
from far.sampling import SamplingConfig

BACKBONES = {
    "masked": MaskedConfig(16, 1, 2, 24, 1, 2, buffer=2),
    "block_causal": BlockCausalConfig(width=16, encoder_depth=1, decoder_depth=2, heads=2, buffer=2),
    "causal": CausalConfig(width=16, depth=1, heads=2, buffer=2),
}
AR_STEPS = {"masked": 4, "block_causal": 64, "causal": 256}


def test_live_bytes_and_operations_of_a_known_sequence() -> None:
    x = torch.empty(1000, device=META)
    with account() as counted:
        a = torch.empty(1000, device=META)
        b = a + 1
        del a
        view = b.view(10, 100).t()
        del b
        c = view * 2
        del view
        c.add_(x.view(100, 10))
        d = c.to(torch.bfloat16)
    assert counted.peak == 2 * 4000
    assert counted.live == 4000 + 2000
    assert counted.operations == 4
    assert d.nbytes == 2000


def test_attention_is_one_operation_without_scores() -> None:
    query, keys = torch.empty(2, 3, 5, 8, device=META), torch.empty(2, 3, 700, 8, device=META)
    with account() as counted:
        F.scaled_dot_product_attention(query, keys, keys)
    assert (counted.operations, counted.peak) == (1, query.nbytes)
    assert counted.flop == 2 * 2 * 2 * 3 * 5 * 700 * 8


@pytest.fixture(params=BACKBONES)
def row(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Row:
    """A tiny preset with its sampling."""
    network = NetworkConfig(BACKBONES[request.param], ShortcutConfig(16, 1))
    monkeypatch.setitem(PRESETS, "tiny", network)
    monkeypatch.setattr(
        gpu_estimate, "AutoencoderConfig", lambda: AutoencoderConfig(width=8, blocks=1, norm_groups=4)
    )
    return Row("tiny", SamplingConfig(AR_STEPS[request.param], 2, 2.9), "float32", 2)


def test_arithmetic_equals_that_on_a_cpu(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    flop, _ = work(pipeline_of("tiny"), row)
    # Only a CPU upsamples with less arithmetic.
    monkeypatch.setattr(Upsample, "forward", lambda self, x: self.conv(F.interpolate(x, scale_factor=2.0)))
    monkeypatch.setattr(gpu_estimate, "META", torch.device("cpu"))
    pipeline = pipeline_of("tiny").to(dtype="float32")
    with flop_counter() as counter:
        found = generate(pipeline, row, segments(row.sampling), counter.get_total_flops)
    assert flop == pytest.approx(sum(found.values()))


@pytest.mark.parametrize("row", ["masked"], indirect=True)
def test_memory_grows_by_the_image(row: Row) -> None:
    pipeline = pipeline_of("tiny")
    one, two, four = (peak(pipeline, dataclasses.replace(row, batch=batch)) for batch in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)


def test_block_causal_preset_draws_eight_guided_images_within_a_gigabyte() -> None:
    with META:
        model = FAR(ModelConfig(PRESETS["far-bc-b"])).eval()
    pipeline = Pipeline(model, None, [str(label) for label in range(1000)], SamplingConfig())
    row = Row("far-bc-b", SamplingConfig(64, 4, 2.9), "float32", 8)
    with META:
        cache = model.backbone.new_cache(16)
    held = cache.keys.nbytes + cache.values.nbytes
    assert held == 2 * 4 * 12 * 16 * 257 * 768, "keys and values of 12 blocks, 16 rows, 257 positions"
    assert held < peak(pipeline, row) < 10**9
