"""``docs/cluster.md``: computed memory, presets as overrides of the recipe, and the script for Slurm."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torchrun import run

from benchmarks import cluster
from far.backbone import BlockCausalConfig, CausalConfig, MaskedConfig
from far.heads import DiffusionConfig, FlowConfig, ShortcutConfig
from far.layers import blocks_of
from far.model import FAR, PRESETS, ModelConfig, NetworkConfig
from far.recipe import load_recipe
from far.training.activations import checkpoint_activations
from far.training.config import LoopConfig
from far.training.generator import GeneratorTask
from far.training.log import Meter
from far.training.loop import Trainer

ROOT = Path(__file__).parents[1]
RECIPE = "imagenet-256"
DOCUMENT = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
SMALL = [
    NetworkConfig(MaskedConfig(32, 2, 2, 64, 3, 2, 2), ShortcutConfig(48, 2)),
    NetworkConfig(CausalConfig(width=32, depth=2, heads=2), DiffusionConfig(32, 1)),
    NetworkConfig(
        BlockCausalConfig(width=32, encoder_depth=2, decoder_depth=1, heads=2), ShortcutConfig(32, 1)
    ),
]
each_network = pytest.mark.parametrize("network", SMALL, ids=["masked", "causal", "block_causal"])


class Task:
    discriminator = None
    parameter_groups = GeneratorTask.parameter_groups

    def __init__(self, config: ModelConfig) -> None:
        self.module = FAR(config)

    def batch(self, number: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.module.config
        return torch.randn(2, config.latent_channels, *config.grid, generator=generator), torch.zeros(
            2, dtype=torch.long
        )

    def loss(self, step: int, batch: tuple, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        return self.module.loss(*batch, generator, label_drop=0.1, step=step).value.mean(), {}


@each_network
def test_computed_memory_at_rest_is_what_a_trainer_holds(network: NetworkConfig, tmp_path: Path) -> None:
    config = ModelConfig(network, 3, 4, (2, 2))
    trainer = Trainer(Task(config), LoopConfig(steps=1, batch_size=2), tmp_path)  # type: ignore[arg-type]
    trainer.train_step(Meter())
    states = [
        tensor for state in trainer.optimizer.state.values() for tensor in state.values() if tensor.dim()
    ]
    gradients = [parameter.grad for parameter in trainer.module.parameters()]
    held = [*trainer.module.parameters(), *trainer.ema.module.parameters(), *gradients, *states]
    assert sum(tensor.nbytes for tensor in held if tensor is not None) == cluster.at_rest(
        cluster.sizes_of(config)
    )


def test_computed_memory_at_rest_is_what_a_shard_holds(tmp_path: Path) -> None:
    program = tmp_path / "shards.py"
    program.write_text(SHARDS)
    found = json.loads(run(2, program).splitlines()[-1])
    config = ModelConfig(SMALL[0], 3, 4, (2, 2))
    # Shards that do not divide evenly are rounded up.
    assert found == pytest.approx(cluster.at_rest(cluster.sizes_of(config), "fsdp", 2), rel=0.01)


# Prints the bytes that rank 0 holds between two steps.
SHARDS = """
import json, sys
from pathlib import Path
from test_cluster import SMALL, Task
from far.model import ModelConfig
from far.processes import joined, leave
from far.training.config import LoopConfig
from far.training.log import Meter
from far.training.loop import Trainer
from far.training.parallel import own

with joined() as processes:
    config = LoopConfig(steps=1, batch_size=4, micro_batches=2, parallel="fsdp")
    trainer = Trainer(Task(ModelConfig(SMALL[0], 3, 4, (2, 2))), config, Path("nowhere"), processes)
    trainer.train_step(Meter())
    states = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    states = [tensor for tensor in states if tensor.dim()]
    gradients = [parameter.grad for parameter in trainer.module.parameters()]
    held = [*trainer.module.parameters(), *trainer.ema.module.parameters(), *gradients, *states]
    if processes.rank == 0:
        print(json.dumps(sum(own(tensor).nbytes for tensor in held)))
leave()
"""


@each_network
def test_computed_activations_are_what_the_forward_pass_keeps(network: NetworkConfig) -> None:
    """Fake tensors give the bytes that real tensors keep, and these grow linearly with the images."""
    config = ModelConfig(network, 3, 4, (4, 4))
    kept = cluster.kept_by(config, 1.0, gpu=False)
    expected, _ = real_bytes(config, 6)
    # With fake tensors, norms of mixed dtypes keep two values per row in the shorter dtype.
    assert 0 <= expected - (kept.fixed + 6 * kept.image) <= 0.0012 * expected


@each_network
def test_computed_checkpoints_are_the_inputs_of_all_blocks_and_the_largest_block(
    network: NetworkConfig,
) -> None:
    config = ModelConfig(network, 3, 4, (4, 4))
    kept = cluster.kept_by(config, 1.0, gpu=False, checkpointed=True)
    inputs = [real_bytes(config, images, checkpointed=True)[0] for images in (2, 6)]
    blocks = zip(*(real_bytes(config, images)[1] for images in (2, 6)))
    expected = (inputs[1] - inputs[0] + max(six - two for two, six in blocks)) / 4
    assert 0 <= expected - kept.image <= 0.0012 * expected


def real_bytes(config: ModelConfig, images: int, checkpointed: bool = False) -> tuple[int, list[int]]:
    """Return what the loss of real tensors keeps, and what each block keeps beside its inputs."""
    torch.manual_seed(0)
    model = FAR(config)
    if checkpointed:
        checkpoint_activations(model)
    storages: dict[int, torch.UntypedStorage] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    before: list[set[int]] = []
    blocks: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    def size(keys: set[int]) -> int:
        return sum(storages[key].nbytes() for key in keys - parameters)

    def before_block(block: torch.nn.Module, inputs: tuple) -> None:
        before.append(set(storages))
        if checkpointed and torch.is_grad_enabled():  # torch's hooks do not see tensors in tuples
            for tensor in tree_leaves(inputs):
                if isinstance(tensor, torch.Tensor):
                    note(tensor)

    def after_block(block: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        given = [value for value in tree_leaves(inputs) if isinstance(value, torch.Tensor)]
        blocks.append(
            size(storages.keys() - before.pop() - {value.untyped_storage().data_ptr() for value in given})
        )

    for block in blocks_of(model):
        block.register_forward_pre_hook(before_block)
        block.register_forward_hook(after_block)
    generator = torch.Generator().manual_seed(0)
    latents, labels = torch.randn(images, 4, *config.grid), torch.zeros(images, dtype=torch.long)
    if isinstance(config.network.backbone, MaskedConfig):
        model.backbone.training_inputs = all_masked  # type: ignore[assignment]
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        loss = model.loss(latents, labels, generator, label_drop=0.1).value.mean()
    assert loss.isfinite()
    return size(set(storages)), blocks


def all_masked(
    tokens: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    orders = torch.rand(tokens.shape[:2], generator=generator).argsort(dim=1)
    return tokens, orders[:, tokens.shape[1] :], orders


def test_computed_arithmetic_of_a_causal_step_has_the_closed_form() -> None:
    """Two operations per weight and token forward, as many for each gradient, and those of attention."""
    network = NetworkConfig(
        CausalConfig(width=64, depth=3, heads=2, dropout=0.0), FlowConfig(64, 2, samples_per_token=1)
    )
    config = ModelConfig(network, 3, 4, (4, 4))
    model, tokens = FAR(config), 16
    weights = {
        name: layer.weight.numel()
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    # Inputs need no gradient.
    fed = ("token_projection", "input_projection", "time_embeddings.0.linear_in")
    first = sum(count for name, count in weights.items() if name.endswith(fed))
    attention = 3 * (2 * 2 * tokens * tokens * 64)
    expected = 3 * (2 * sum(weights.values()) * tokens + attention) - 2 * first * tokens
    assert cluster.flops(config) == pytest.approx(expected, rel=1e-3)


def test_recipe_has_the_sizes_of_far_b() -> None:
    recipe = load_recipe(RECIPE)
    training = recipe.generator.training
    assert recipe.generator.network == PRESETS["far-b"]
    assert training.learning_rate == pytest.approx(1e-4 * training.batch_size / 256)
    assert training.steps * training.batch_size / 1_281_167 == pytest.approx(400, rel=0.01)
    assert training.warmup_steps * 4 == training.steps


def test_each_preset_is_given_by_two_overrides_of_the_recipe() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| `(\{.*?\})` \| `(\{.*?\})` \|$", DOCUMENT, re.MULTILINE)
    overridden = {
        name: load_recipe(
            RECIPE, [f"generator.network.backbone={backbone}", f"generator.network.head={head}"]
        ).generator.network
        for name, backbone, head in rows
    }
    assert overridden == PRESETS


# --- Slurm -------------------------------------------------------------------------------------------

# Two tasks on this machine. As in Slurm, srun kills them at SIGTERM, and scancel signals the tasks of a step.
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] && shift
trap 'kill -KILL $tasks' TERM
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 "$@" & tasks="$tasks $!"
done
echo $tasks > tasks
for task in $tasks; do
    wait $task || exit 1
done
"""
SCANCEL = """#!/bin/bash
[ "$1 $2" = "--signal=TERM 17.0" ] && kill -TERM $(cat tasks)
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" > requeued; fi
"""


@pytest.fixture
def job(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The document's script with a tiny recipe, in a folder with its own ``srun`` and ``scontrol``."""
    for name, text in {
        "srun": SRUN,
        "scancel": SCANCEL,
        "scontrol": SCONTROL,
        "far": f'#!/bin/bash\nexec {sys.executable} -m far "$@"\n',
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    text = re.search(r"```bash\n(.*?)```", DOCUMENT, re.DOTALL)[1]  # type: ignore[index]
    values = {"micro_batches": 2, "log_every": 1, "checkpoint_every": 100000}
    overrides = " ".join(f"generator.training.{name}={value}" for name, value in values.items())
    assert text.count("far train imagenet-256 ") == 1
    text = text.replace("far train imagenet-256 ", f"far train {recipe} {overrides} $MORE ").replace(
        "29500", str(free_port())
    )
    (tmp_path / "job.sh").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    return tmp_path / "job.sh"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def logged_steps(job: Path) -> list[int]:
    log = job.parent / "run" / "model" / "log.jsonl"
    return (
        [json.loads(line)["step"] for line in log.read_text().splitlines() if '"loss"' in line]
        if log.exists()
        else []
    )


def test_slurm_job_saves_before_its_time_limit_and_resumes_after_requeueing(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MORE", "generator.training.steps=100000")
    process = subprocess.Popen(
        ["bash", job], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while not logged_steps(job) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "interrupted at step" in output
    assert (job.parent / "requeued").read_text() == "requeue 17\n"
    (job.parent / "requeued").unlink()
    done = logged_steps(job)[-1]
    monkeypatch.setenv("MORE", f"generator.training.steps={done + 3}")
    subprocess.run(["bash", job], check=True, capture_output=True, timeout=120)
    assert logged_steps(job) == list(range(1, done + 4))
    assert not (job.parent / "requeued").exists()
