"""How a module is trained by several processes, with torch's own engines: copied in each (DDP) or cut in shards (FSDP2).

What is saved of either is read by both (``far.training.checkpoint``), so a run goes on with another, at any number of processes.
"""

import contextlib
import copy
from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from far.errors import InputError
from far.model import FAR


def replicate(losses: nn.Module) -> nn.Module:
    """A module of losses that averages gradients over all processes."""
    # Some heads leave parameters out in some steps.
    return DistributedDataParallel(losses, find_unused_parameters=True)


def shard(losses: nn.Module, module: nn.Module, ema: nn.Module) -> nn.Module:
    """The same, each process with its part of parameters, gradients, optimizer state and EMA.

    A backbone's blocks are put together one by one when they are computed, all else of ``module`` for the whole of a step
    (heads are small, and some are differentiated forwards, which shards do not allow). The EMA's head stays whole: it gives
    targets in each step.

    Raises:
        InputError: the module is no generator.
    """
    if not isinstance(module, FAR) or not isinstance(ema, FAR):
        raise InputError("parallel fsdp is for generators; an autoencoder fits on one device, so take ddp")
    mesh = init_device_mesh(next(module.parameters()).device.type, (dist.get_world_size(),))
    for blocks in module.backbone.modules():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                fully_shard(block, mesh=mesh)
    fully_shard(losses, mesh=mesh)
    _shard_as(ema.backbone, module.backbone)
    return losses


@contextlib.contextmanager
def gradients_together(losses: nn.Module, together: bool) -> Iterator[None]:
    """Within it, a backward pass averages gradients over all processes, or leaves them to a later one.

    Shards always do: what is left to a later pass is whole, and would take the memory that they are to save.
    """
    with (
        losses.no_sync()
        if isinstance(losses, DistributedDataParallel) and not together
        else contextlib.nullcontext()
    ):
        yield


def whole(tensor: Tensor) -> Tensor:
    """A tensor with its shards put together, in every process at once, or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shards_like(like: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor as ``like`` is: this process's shard of it, or as it is."""
    return (
        distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor
    )


def _shard_as(module: nn.Module, like: nn.Module) -> None:
    """Cut the parameters of ``module``, which are whole, as those of ``like`` are; they are not trained."""
    for name, parameter in like.named_parameters():
        owner, _, leaf = name.rpartition(".")
        cut = shards_like(parameter, module.get_parameter(name))
        setattr(module.get_submodule(owner), leaf, nn.Parameter(cut, requires_grad=False))


def whole_copy(module: nn.Module, *, kept: bool) -> nn.Module:
    """A module with its shards put together where it is ``kept``, for which all processes call this at once.

    One that has no shards is returned as it is; so is what is not kept, which takes no more memory than a parameter at a time.
    """
    wholes = {}
    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            together = nn.Parameter(parameter.full_tensor(), requires_grad=False)
            if kept:
                wholes[id(parameter)] = together
    return copy.deepcopy(module, wholes) if wholes else module
