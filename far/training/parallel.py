"""Training by several processes with torch's own engines: replicas (DDP) or shards (FSDP2) of a module.

A checkpoint does not depend on either (``far.training.checkpoint``), so a run resumes with the other engine
and with any number of processes.
"""

import copy
from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from far.errors import InputError
from far.model import FAR


def replicate(losses: nn.Module) -> nn.Module:
    """Return a module of losses that averages gradients over all processes."""
    # Some heads do not use all parameters in every step.
    return DistributedDataParallel(losses, find_unused_parameters=True)


def shard(losses: nn.Module, module: nn.Module, ema: nn.Module) -> nn.Module:
    """Return a module of losses with parameters, gradients, optimizer state and EMA sharded over processes.

    Blocks of the backbone are gathered one by one when they are computed, all other parameters for a whole
    step: heads are small, and some need forward-mode derivatives, which shards do not support. The EMA's head
    stays whole. Only generators can be sharded.
    """
    if not isinstance(module, FAR) or not isinstance(ema, FAR):
        raise InputError("parallel fsdp is for generators. Use ddp for an autoencoder")
    mesh = init_device_mesh(next(module.parameters()).device.type, (dist.get_world_size(),))
    for blocks in module.backbone.modules():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                fully_shard(block, mesh=mesh)
    fully_shard(losses, mesh=mesh)
    _shard_as(ema.backbone, module.backbone)
    return losses


def gradients_together(losses: nn.Module, together: bool) -> AbstractContextManager[None]:
    """Average gradients over processes in backward passes within the block only if ``together``.

    Shards always average: gradients kept for a later pass would be whole and take the memory shards save.
    """
    if isinstance(losses, DistributedDataParallel) and not together:
        return losses.no_sync()
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from its shards, which all processes call at once, or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard_as(module: nn.Module, like: nn.Module) -> None:
    """Shard the whole, frozen parameters of ``module`` as those of ``like``."""
    for name, parameter in like.named_parameters():
        owner, _, leaf = name.rpartition(".")
        tensor: Tensor = module.get_parameter(name)
        if isinstance(parameter, DTensor):
            tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def whole_copy(module: nn.Module, *, kept: bool) -> nn.Module:
    """Return a copy of a module gathered from its shards, which all processes call at once.

    A module without shards is returned itself. So is one that is not ``kept``, which needs the memory of a
    single whole parameter only.
    """
    wholes = {}
    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            together = nn.Parameter(parameter.full_tensor(), requires_grad=False)
            if kept:
                wholes[id(parameter)] = together
    return copy.deepcopy(module, wholes) if wholes else module
