"""Compiled blocks compute what plain ones do. Most tests capture graphs with torch and run them as they are,
because generating code takes seconds per graph."""

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import far
from far import compiling
from far.autoencoder import Autoencoder, AutoencoderConfig
from far.backbone import MaskedConfig
from far.cli.main import main
from far.compiling import compile_blocks
from far.heads import Condition, ShortcutConfig, build_head
from far.heads.config import HeadConfig
from far.heads.network import HeadNetwork
from far.model import FAR, ModelConfig, NetworkConfig
from far.packing import quantize_linear_layers
from far.recording import Recordings
from far.sampling import SamplingConfig, SeededNoise, sample, sampling_steps
from far.training.activations import checkpoint_activations
from tests.recorded_graphs import Recorder
from tests.refusals import refused
from tests.test_recording import assert_equal, sampling, tiny, values_of
from tests.torchrun import run

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))),
    reason="torch compiles for CPUs with a C++ compiler",
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what was compiled before and after the test, and faults."""
    monkeypatch.setattr(compiling, "_faults", [])
    compiling._print_once.cache_clear()
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.optimize_ddp
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit, torch._dynamo.config.optimize_ddp = limits


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Capture graphs instead of compiling them, and return the list that receives them."""
    captured: list[torch.fx.GraphModule] = []

    def capture(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        captured.append(graph)
        return graph.forward

    monkeypatch.setattr(compiling, "_inductor", capture)
    return captured


def network(width: int = 16) -> HeadNetwork:
    """Return a network with two blocks, without zero weights."""
    torch.manual_seed(0)
    made = HeadNetwork(3, 3, 4, width, depth=2)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def inputs(count: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(count)
    return tuple(torch.randn(count, *shape, generator=generator) for shape in ((3,), (4,), ()))


def check_gradients(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Check that gradients of two copies of a module agree within 1e-5 of the largest value of each."""
    for (name, found), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None), name
        if expected.grad is not None:
            assert (found.grad - expected.grad).abs().max() <= 1e-5 * expected.grad.abs().max(), name


@pytest.mark.parametrize(
    ("backbone", "head", "values"),
    [
        ("masked", "shortcut", {}),
        ("masked", "flow", {"refresh_every": 2, "guidance_every": 2}),
        ("causal", "diffusion", {}),
        ("block_causal", "flow_map", {}),
    ],
)
def test_compiled_generation_equals_the_plain_one_also_recorded(
    backbone: str,
    head: str,
    values: dict[str, Any],
    graphs: list[torch.fx.GraphModule],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("far.recording.recorder", Recorder())
    monkeypatch.setattr("far.recording.can_record", lambda device: True)
    model, plain = tiny(backbone, kind=head), tiny(backbone, kind=head)
    compile_blocks(model)
    config, recordings, captured = sampling(model, **values), Recordings(), 0
    for seed in range(3):  # run, recorded and replayed
        found = list(recordings.sampling_steps(model, *values_of(seed), config))
        assert_equal(found, list(sampling_steps(plain, *values_of(seed), config)))
        captured = captured or len(graphs)
    assert 0 < captured <= 16
    assert len(graphs) == captured, "later generations compile nothing"


def test_generation_of_16_steps_needs_few_variants_and_later_ones_none(
    graphs: list[torch.fx.GraphModule],
) -> None:
    backbone = MaskedConfig(32, 3, 2, 32, 3, 2, buffer=2)
    network = NetworkConfig(backbone, ShortcutConfig(16, 3), patch=1)
    model = FAR(ModelConfig(network, 3, 4, (8, 8))).eval()
    compile_blocks(model)
    config, captured = SamplingConfig(ar_steps=16, head_steps=4, guidance=2.0), []
    for batch in (4, 4, 8):
        labels = torch.zeros(batch, dtype=torch.long)
        sample(model, labels, SeededNoise(list(range(batch)), torch.device("cpu")), config)
        captured.append(len(graphs))
    assert 0 < captured[0] <= 8
    assert captured == captured[:1] * 3


def test_block_is_compiled_once_for_all_lengths(graphs: list[torch.fx.GraphModule]) -> None:
    made = network()
    plain = copy.deepcopy(made)
    compile_blocks(made)
    for count in (3, 2, 5, 40):
        assert torch.equal(made(*inputs(count)), plain(*inputs(count)))
    assert len(graphs) == 1


def test_load_and_commands_compile_blocks_on_request(
    graphs: list[torch.fx.GraphModule], pipeline_folder: Path, tmp_path: Path
) -> None:
    images = [
        far.load(pipeline_folder, device="cpu", compile=compile).generate([0, 2], output="tensor")
        for compile in (False, True)
    ]
    assert torch.equal(*images)
    assert graphs
    captured, options = len(graphs), ["--weights", str(pipeline_folder)]
    options += ["--device", "cpu", "--dtype", "float32"]
    assert main(["generate", *options, "--out", str(tmp_path / "plain.png")]) == 0
    assert len(graphs) == captured
    torch._dynamo.reset()
    assert main(["generate", *options, "--compile", "--out", str(tmp_path / "compiled.png")]) == 0
    assert len(graphs) > captured


def test_copies_are_plain_and_parameters_keep_their_names(graphs: list[torch.fx.GraphModule]) -> None:
    made = network()
    names = list(made.state_dict())
    compile_blocks(made)
    assert list(made.state_dict()) == names
    copied = copy.deepcopy(made)
    copied(*inputs(3))
    assert not graphs
    with torch.no_grad():
        copied.blocks[0].linear_in.weight.zero_()
    assert torch.equal(made(*inputs(3)), network()(*inputs(3)))
    assert len(graphs) == 1


def test_failed_compilation_prints_one_line_and_runs_plain_blocks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        raise RuntimeError("no working C++ compiler\nmore")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: without_compiler)
    for width in (16, 24):
        made = network(width)
        compile_blocks(made)
        for count in (2, 5):
            assert torch.equal(made(*inputs(count)), network(width)(*inputs(count)))
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "no working C++ compiler" in line] == lines[1:]
    assert len(lines) == 2, "and one that announces the compilation"


def test_8_bit_blocks_stay_plain_with_one_line(
    graphs: list[torch.fx.GraphModule], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        made = network(64)
        quantize_linear_layers(made, "paired")
        compile_blocks(made)
        made(*inputs(3))
    assert not graphs
    assert capsys.readouterr().err.count("\n") == 1


def test_autoencoder_is_refused() -> None:
    sizes = AutoencoderConfig(width=16, width_multipliers=(1, 1, 2), blocks=1, norm_groups=4)
    with refused("Autoencoder"):
        compile_blocks(Autoencoder(sizes))


def test_forward_mode_derivatives_of_a_head_run_plain_blocks(graphs: list[torch.fx.GraphModule]) -> None:
    config = HeadConfig.kinds["flow_map"](16, 1, flow_steps=0)
    torch.manual_seed(0)
    head = build_head(config, 3, 4)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    plain = copy.deepcopy(head)
    compile_blocks(head)
    x, z = torch.randn(6, 3), torch.randn(6, 4)
    for each in (head, plain):
        loss = each.loss(x, Condition(z), torch.Generator().manual_seed(0), each)
        loss.value.mean().backward()
    assert graphs, "the other passes are compiled"
    check_gradients(head, plain)


@needs_compiler
def test_compiled_training_step_agrees_with_the_plain_one() -> None:
    model, plain = tiny("causal", kind="flow"), tiny("causal", kind="flow")
    compile_blocks(model)
    generator = torch.Generator().manual_seed(1)
    latents, labels = torch.randn(2, 3, 3, 4, generator=generator), torch.tensor([0, 3])
    losses = []
    for each in (model, plain):
        loss = each.loss(latents, labels, torch.Generator().manual_seed(0), label_drop=0.1).value.mean()
        loss.backward()
        losses.append(loss.detach())
    assert not compiling._faults
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    check_gradients(model, plain)


def test_checkpointed_compiled_blocks_have_the_gradients_of_plain_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of torch's default compiler runs, but for its generated code."""
    monkeypatch.setattr(compiling, "_inductor", torch._dynamo.lookup_backend("aot_eager_decomp_partition"))
    made = network()
    plain = copy.deepcopy(made)
    compile_blocks(made, checkpointed=True)
    checkpoint_activations(made)
    for each in (made, plain):
        each(*inputs(5)).square().mean().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    check_gradients(made, plain)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_replicas_and_shards_of_compiled_blocks_have_the_gradients_of_plain_ones(parallel: str) -> None:
    script = Path(__file__).parent / "training/compiled_blocks.py"
    assert run(2, script, parallel).count("2 graphs") == 2
