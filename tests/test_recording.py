"""Recorded generations equal eager ones to the bit. Emulated graphs replace CUDA's."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from far.backbone import BlockCausalConfig, CausalConfig, MaskedConfig
from far.heads import HEADS, HeadConfig
from far.model import FAR, ModelConfig, NetworkConfig
from far.pipeline import Pipeline
from far.recording import Recordings, can_record
from far.sampling import Kept, Progress, SamplingConfig, SeededNoise, sampling_steps
from far.sampling_config import unused_options
from far.seeds import seeded
from tests.recorded_graphs import Recorder

CPU = torch.device("cpu")
BACKBONES: dict[str, Any] = {
    "masked": MaskedConfig(16, 2, 2, 24, 2, 2, buffer=2),
    "causal": CausalConfig(width=16, depth=2, heads=2, buffer=2),
    "block_causal": BlockCausalConfig("block_causal", 16, 2, 2, 2, buffer=2),
}
HEAD_CASES: list[dict[str, Any]] = [
    *({"kind": kind} for kind in sorted(HEADS)),
    {"kind": "flow_map", "max_guidance": 4.0},
    {"kind": "flow", "solver": "heun"},
    {"kind": "diffusion", "token_limit": 5.0},
]
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"order": "halton"},
    {"order": "raster"},
    {"refresh_every": 2},
    {"guidance_every": 2},
    {"refresh_every": 2, "guidance_every": 3},
    {"guidance_interval": (0.2, 0.8)},
    {"guidance_interval": [0.2, 0.8], "head_steps": [2]},
    {"guidance": 1.0},
]


def tiny(backbone: str, spherical: bool = False, **head: Any) -> FAR:
    """Return a model of 12 tokens without zero weights."""
    with seeded(0), torch.no_grad():
        network = NetworkConfig(
            BACKBONES[backbone], HeadConfig.kinds[head.pop("kind")](16, 1, **head), 1, spherical
        )
        model = FAR(ModelConfig(network, 5, 3, (3, 4)))
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def sampling(model: FAR, kept: int = 0, **values: Any) -> SamplingConfig:
    steps = 5 if model.backbone.any_order else model.config.tokens - kept
    head_steps = min(3, model.head.max_steps), 1
    return SamplingConfig(**{"ar_steps": steps, "head_steps": head_steps, "guidance": 3.0, **values})


def kept_tokens(count: int, seed: int) -> Kept | None:
    latents = torch.randn(2, 3, 3, 4, generator=torch.Generator().manual_seed(seed))
    return Kept(latents, torch.arange(count)) if count else None


def values_of(seed: int) -> tuple[Tensor, SeededNoise]:
    """Return labels and noise of two images."""
    return torch.tensor([seed % 5, 3]), SeededNoise([seed, seed + 100], CPU)


def assert_equal(found: list[Progress], expected: list[Progress]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.step, one.steps) == (other.step, other.steps)
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.known, other.known)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr("far.recording.recorder", made)
    monkeypatch.setattr("far.recording.can_record", lambda device: True)
    return made


def test_nothing_is_recorded_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("current_stream", "default_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    found = []
    for enabled in (False, True):
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind, on=enabled: on and kind == "cuda")
        found.append(can_record(torch.device("cuda")))
    assert found == [True, False]


def check_replays(model: FAR, config: SamplingConfig, recorder: Recorder, kept: int = 0) -> None:
    """Check four generations of other seeds, labels and kept tokens, of which the last three are replayed."""
    recordings = Recordings()
    for seed in range(4):
        given = kept_tokens(kept, seed)
        found = list(recordings.sampling_steps(model, *values_of(seed), config, kept=given))
        assert_equal(found, list(sampling_steps(model, *values_of(seed), config, kept=given)))
    graphs = recorder.recordings[-1]
    assert [graph.replays for graph in graphs] == [3] * config.ar_steps


@pytest.mark.parametrize("kept", [0, 4])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_replay_of_every_head_equals_the_eager_generation(
    backbone: str, kept: int, recorder: Recorder
) -> None:
    for head in HEAD_CASES:
        model = tiny(backbone, **head)
        check_replays(model, sampling(model, kept), recorder, kept)
    assert len(recorder.recordings) == len(HEAD_CASES)


@pytest.mark.parametrize("head", ["shortcut", "diffusion"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_replay_of_every_approximation_equals_the_eager_generation(
    backbone: str, head: str, recorder: Recorder
) -> None:
    model = tiny(backbone, kind=head)
    for values in SAMPLINGS:
        if not set(values) & set(unused_options(model)):
            check_replays(model, sampling(model, **values), recorder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_replay_in_16_bits_equals_the_eager_generation(dtype: torch.dtype, recorder: Recorder) -> None:
    model = tiny("masked", spherical=True, kind="shortcut").to(dtype)
    check_replays(model, sampling(model), recorder)


def drawn(recordings: Recordings, model: FAR, seed: int, **values: Any) -> list[Progress]:
    return list(recordings.sampling_steps(model, *values_of(seed), sampling(model, **values)))


def expected(model: FAR, seed: int, **values: Any) -> list[Progress]:
    return list(sampling_steps(model, *values_of(seed), sampling(model, **values)))


def test_replay_reads_weights_that_were_changed_in_place(recorder: Recorder) -> None:
    for backbone, head in (("causal", "diffusion"), ("masked", "flow_map")):
        model, recordings = tiny(backbone, kind=head), Recordings()
        drawn(recordings, model, 0), drawn(recordings, model, 1)
        count = len(recorder.recordings)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
        assert_equal(drawn(recordings, model, 2), expected(model, 2))
        assert len(recorder.recordings) == count


@pytest.mark.parametrize("change", ["dtype", "head", "weight"])
def test_moved_weights_forget_the_recordings(change: str, recorder: Recorder) -> None:
    model, recordings = tiny("masked", kind="diffusion"), Recordings()
    drawn(recordings, model, 0), drawn(recordings, model, 1)
    old = [parameter.detach() for parameter in model.parameters()]  # keeps their addresses in use
    if change == "dtype":
        model.to(torch.bfloat16)
    elif change == "head":
        model.head = model.head.limited(0.5)  # type: ignore[operator, assignment]
    else:
        model.backbone.mask_token = torch.nn.Parameter(model.backbone.mask_token + 1)  # type: ignore[operator]
    for seed in (2, 3, 4):
        assert_equal(drawn(recordings, model, seed), expected(model, seed))
    assert len(recorder.recordings) == 2
    assert len(old) > 0


def test_two_recordings_are_kept(recorder: Recorder) -> None:
    model, recordings = tiny("masked", kind="energy"), Recordings()
    for temperature in (0.7, 0.8, 0.9):
        for seed in (0, 1):
            drawn(recordings, model, seed, temperature=temperature)
    assert len(recorder.recordings) == 3
    drawn(recordings, model, 2, temperature=0.8)
    drawn(recordings, model, 2, temperature=0.9)
    assert len(recorder.recordings) == 3, "the last two are kept"
    assert_equal(drawn(recordings, model, 2, temperature=0.7), expected(model, 2, temperature=0.7))
    assert len(recorder.recordings) == 4
    drawn(recordings, model, 2, temperature=0.9)
    assert len(recorder.recordings) == 4, "the one used last is kept"


def test_overlapping_generations_do_not_share_memory(recorder: Recorder) -> None:
    model, recordings = tiny("block_causal", kind="flow"), Recordings()
    drawn(recordings, model, 0), drawn(recordings, model, 1)
    config = sampling(model)
    one, other = (recordings.sampling_steps(model, *values_of(seed), config) for seed in (2, 3))
    together = list(zip(one, other, strict=True))
    assert_equal([progress for progress, _ in together], expected(model, 2))
    assert_equal([progress for _, progress in together], expected(model, 3))


def test_abandoned_generation_frees_its_recording(recorder: Recorder) -> None:
    model, recordings = tiny("masked", kind="flow"), Recordings()
    drawn(recordings, model, 0), drawn(recordings, model, 1)
    recordings.sampling_steps(model, *values_of(2), sampling(model))  # never begun
    begun = recordings.sampling_steps(model, *values_of(3), sampling(model))
    next(begun)
    begun.close()  # type: ignore[attr-defined]
    before = recorder.recordings[0][0].replays
    assert_equal(drawn(recordings, model, 4), expected(model, 4))
    assert recorder.recordings[0][0].replays == before + 1


def test_unfinished_generation_is_not_a_first_one(recorder: Recorder) -> None:
    """A later AR step may load kernels, which a recording cannot do."""
    model, recordings = tiny("masked", kind="flow"), Recordings()
    next(recordings.sampling_steps(model, *values_of(0), sampling(model)))
    drawn(recordings, model, 1)
    assert not recorder.recordings
    drawn(recordings, model, 2)
    assert len(recorder.recordings) == 1


def test_generation_that_cannot_be_recorded_runs_eagerly(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")

    monkeypatch.setattr("far.recording.recorder", fail)
    model, recordings = tiny("masked", kind="flow"), Recordings()
    for seed in range(4):
        assert_equal(drawn(recordings, model, seed), expected(model, seed))
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "not permitted when stream is capturing" in printed


def test_recordings_made_in_inference_mode_serve_other_modes(recorder: Recorder) -> None:
    model, recordings = tiny("masked", kind="flow"), Recordings()
    for seed in range(4):
        with torch.inference_mode(seed == 1):
            found = drawn(recordings, model, seed)
        assert_equal(found, expected(model, seed))


def test_pipeline_replays_unless_recording_is_off(recorder: Recorder) -> None:
    model = tiny("masked", kind="shortcut")
    for record in (True, False):
        pipeline = Pipeline(model, None, list("abcde"), sampling(model), record=record)
        for copied in (pipeline, copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline))):
            for seed in range(3):
                [*_, last] = copied.stream([0, 1], [seed, 5])
                [*_, eager] = sampling_steps(
                    model, torch.tensor([0, 1]), SeededNoise([seed, 5], CPU), sampling(model)
                )
                assert torch.equal(last.latents, eager.latents)
        assert len(recorder.recordings) == 3


def test_processors_do_not_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("far.recording.recorder", None)
    model, recordings = tiny("masked", kind="flow"), Recordings()
    for seed in range(3):
        assert_equal(drawn(recordings, model, seed), expected(model, seed))
