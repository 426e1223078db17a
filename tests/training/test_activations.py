"""Activation checkpointing: the same gradients to the bit, from far fewer tensors kept."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from slope import Slope, loop
from torch import Tensor
from torchrun import run

from far import compiling
from far.backbone import BlockCausalConfig, CausalConfig, MaskedConfig
from far.compiling import compile_blocks
from far.errors import InputError
from far.heads import DiffusionConfig, FlowMapConfig, ShortcutConfig
from far.model import FAR, ModelConfig, NetworkConfig
from far.training.activations import checkpoint_activations
from far.training.loop import Trainer

# Dropout is on, whose random numbers must repeat. Each depth counts blocks of one width.
BACKBONES: dict[str, Any] = {
    "masked": MaskedConfig(16, 1, 2, 16, 2, 2, buffer=2, mask_ratio_min=0.99),
    "causal": CausalConfig(width=16, depth=2, heads=2, buffer=2),
    "block_causal": BlockCausalConfig(
        "block_causal", width=16, encoder_depth=2, decoder_depth=2, heads=2, buffer=2, dropout=0.1
    ),
}
HEADS = {
    "shortcut": ShortcutConfig(16, 2, samples_per_token=2),
    "diffusion": DiffusionConfig(16, 2, samples_per_token=2),
    # Forward-mode derivatives of the head, and a second pass of the backbone without gradient.
    "lagrangian": FlowMapConfig(16, 2, objective="lagrangian", max_guidance=3.0),
    "mean_flow": FlowMapConfig(16, 2, objective="mean_flow"),
}
BATCH, GRID = 3, (4, 4)


def model(backbone: Any, head: Any) -> FAR:
    torch.manual_seed(0)
    network = FAR(ModelConfig(NetworkConfig(backbone, head), 3, 4, GRID))
    # A new head's modulations and outputs are zero, and with them most gradients.
    for parameter in network.head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def loss(network: FAR, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    latents, labels = torch.randn(BATCH, 4, *GRID, generator=generator), torch.arange(BATCH)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return network.loss(latents, labels, generator, label_drop=0.1, step=10**6).value.mean()


CASES = [(backbone, "shortcut", dtype) for backbone in BACKBONES for dtype in ("float32", "bfloat16")]
CASES += [("causal", head, "bfloat16") for head in HEADS if head != "shortcut"]


@pytest.mark.parametrize(("backbone", "head", "dtype"), CASES)
def test_gradients_are_the_same_to_the_bit(backbone: str, head: str, dtype: str) -> None:
    plain = model(BACKBONES[backbone], HEADS[head])
    recomputing = copy.deepcopy(plain)
    checkpoint_activations(recomputing)
    assert recomputing.state_dict().keys() == plain.state_dict().keys()
    found, expected = (loss(network, getattr(torch, dtype)) for network in (recomputing, plain))
    assert torch.equal(found, expected)
    for value in (found, expected):
        value.backward()
    for (name, ours), theirs in zip(recomputing.named_parameters(), plain.parameters()):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and theirs.grad is not None:
            assert torch.equal(ours.grad, theirs.grad), name


def kept_bytes(network: FAR) -> int:
    """Return the bytes of the tensors that the forward pass keeps, without parameters."""
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = loss(network)
    assert value.isfinite()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    return sum(storage.nbytes() for place, storage in kept.items() if place not in parameters)


@pytest.mark.parametrize("deeper", ["backbone", "head"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_another_block_keeps_only_its_input(backbone: str, deeper: str) -> None:
    config, head = BACKBONES[backbone], HEADS["shortcut"]
    sizes = []
    for more in (0, 1):
        if deeper == "head":
            head = dataclasses.replace(head, depth=2 + more)
        else:
            depth = "depth" if backbone == "causal" else "decoder_depth"
            config = dataclasses.replace(config, **{depth: 2 + more})
        network = model(config, head)
        plain = kept_bytes(network)
        checkpoint_activations(network)
        sizes.append((plain, kept_bytes(network)))
    plain, checkpointed = (after - before for before, after in zip(*sizes))
    tokens = GRID[0] * GRID[1]
    # Queries of the block-causal decoder have no class copies, and the last causal token is not an input.
    positions = {"masked": tokens + 2, "causal": tokens + 2 - 1, "block_causal": tokens}[backbone]
    values = BATCH * (2 * tokens if deeper == "head" else positions) * 16
    assert checkpointed == 4 * values
    assert plain > 5 * checkpointed


def test_blocks_that_cannot_be_compiled_have_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The captured graphs run, with dropout. Copies have their own weights."""
    graphs: list[torch.fx.GraphModule] = []

    def capture(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiling, "_inductor", capture)
    plain = model(BACKBONES["causal"], HEADS["shortcut"])
    both = copy.deepcopy(plain)
    compile_blocks(both, checkpointed=True)
    checkpoint_activations(both)
    assert both.state_dict().keys() == plain.state_dict().keys()
    copied = copy.deepcopy(both)
    for parameter in both.parameters():
        parameter.data.mul_(2)
    found, expected = loss(copied), loss(plain)
    assert graphs
    assert torch.equal(found, expected)
    for value in (found, expected):
        value.backward()
    for (name, ours), theirs in zip(copied.named_parameters(), plain.parameters()):
        if ours.grad is not None and theirs.grad is not None:
            assert torch.equal(ours.grad, theirs.grad), name
    assert kept_bytes(both) < kept_bytes(plain) / 2


# Prints the engines and backbones whose weights after two steps do not depend on checkpointing.
TWO_PROCESSES = """
import torch
from pathlib import Path
from training.test_activations import BACKBONES, HEADS
from test_cluster import Task
from far.model import ModelConfig, NetworkConfig
from far.processes import joined, leave
from far.training.config import LoopConfig
from far.training.log import Meter
from far.training.loop import Trainer
from far.training.parallel import own

def weights(backbone, parallel, checkpointed, processes):
    torch.manual_seed(0)
    task = Task(ModelConfig(NetworkConfig(BACKBONES[backbone], HEADS["shortcut"]), 3, 4, (4, 4)))
    config = LoopConfig(batch_size=8, micro_batches=4, parallel=parallel, checkpoint_activations=checkpointed)
    trainer = Trainer(task, config, Path("nowhere"), processes)
    start = [own(parameter).clone() for parameter in trainer.module.parameters()]
    for _ in range(2):
        trainer.train_step(Meter())
    assert any((own(now) != then).any() for now, then in zip(trainer.module.parameters(), start))
    return [own(parameter) for parameter in trainer.module.parameters()]

with joined() as processes:
    for parallel in ("ddp", "fsdp"):
        for backbone in BACKBONES:
            pair = [weights(backbone, parallel, checkpointed, processes) for checkpointed in (False, True)]
            same = all(torch.equal(*both) for both in zip(*pair, strict=True))
            if not processes.any(not same) and processes.rank == 0:
                print("same", parallel, backbone)
leave()
"""


def test_two_processes_train_the_same_with_replicas_and_shards(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    found = {line for line in run(2, script).splitlines() if line.startswith("same")}
    assert found == {f"same {parallel} {backbone}" for parallel in ("ddp", "fsdp") for backbone in BACKBONES}


def test_autoencoder_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        Trainer(Slope(), loop(checkpoint_activations=True), tmp_path)
    assert "checkpoint_activations" in str(caught.value)
    assert "\n" not in str(caught.value)
