"""Compare gradients of compiled blocks, as replicas or shards, with those of plain blocks in one process."""

import copy
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from far import compiling
from far.compiling import compile_blocks
from far.model import FAR
from far.training.parallel import replicate, shard, whole
from tests.test_recording import tiny

captured: list[torch.fx.GraphModule] = []


def capture(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    captured.append(graph)
    return graph.forward


class Loss(nn.Module):
    """The same loss in all processes."""

    def __init__(self, module: FAR) -> None:
        super().__init__()
        self.module = module

    def forward(self) -> Tensor:
        latents = torch.randn(2, 3, 3, 4, generator=torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(0)
        loss = self.module.loss(latents, torch.tensor([0, 3]), generator, label_drop=0.1)
        return loss.value.mean()


def main(parallel: str) -> None:
    dist.init_process_group("gloo")
    compiling._inductor = capture
    model, plain = tiny("causal", kind="flow"), tiny("causal", kind="flow")
    average = copy.deepcopy(model).requires_grad_(False)
    compile_blocks(model)  # first, as in training
    loss = Loss(model)
    together = shard(loss, model, average) if parallel == "fsdp" else replicate(loss)
    together().backward()
    Loss(plain)().backward()
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(found.grad), expected.grad, msg=name)
    print(f"{len(captured)} graphs")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
