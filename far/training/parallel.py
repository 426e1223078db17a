"""How a module is trained by several processes, with torch's own engines: copied in each (DDP) or cut in shards (FSDP2).

What is saved is whole, as of one process alone; so a run goes on with either, at any number of processes.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from far.errors import InputError
from far.model import FAR


def replicate(losses: nn.Module) -> nn.Module:
    """A module of losses that averages gradients over all processes."""
    # Some heads leave parameters out in some steps.
    return DistributedDataParallel(losses, broadcast_buffers=False, find_unused_parameters=True)


def shard(losses: nn.Module, module: nn.Module) -> nn.Module:
    """The same, each process with its part of parameters, gradients and optimizer state.

    A backbone's blocks are put together one by one when they are computed, all else of ``module`` for the whole of a step
    (heads are small, and some are differentiated forwards, which shards do not allow).

    Raises:
        InputError: the module is no generator.
    """
    if not isinstance(module, FAR):
        raise InputError("parallel fsdp is for generators; an autoencoder fits on one device, so take ddp")
    for blocks in module.backbone.modules():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                fully_shard(block)
    fully_shard(losses)
    return losses


@contextlib.contextmanager
def gradients_together(losses: nn.Module, together: bool) -> Iterator[None]:
    """Within it, a backward pass averages gradients over all processes, or leaves them to a later one."""
    if isinstance(losses, FSDPModule):
        losses.set_requires_gradient_sync(together)
        yield
    elif isinstance(losses, DistributedDataParallel) and not together:
        with losses.no_sync():
            yield
    else:
        yield


def whole(value: Any) -> Any:
    """A tensor, or a dictionary or list of them at any depth, with shards put together; in every process at once."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: whole(one) for key, one in value.items()}
    return [whole(one) for one in value] if isinstance(value, list) else value


def shards_like(like: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor as ``like`` is: this process's shard of it, or as it is."""
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def load_whole(module: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Load what :func:`whole` gave of both state dictionaries.

    Raises:
        KeyError, IndexError, RuntimeError, ValueError: they are of another module.
    """
    own = module.state_dict()
    module.load_state_dict({name: shards_like(own.get(name, tensor), tensor) for name, tensor in weights.items()})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = {
        index: {name: shards_like(parameters[index], one) if one.dim() else one for name, one in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": found})
