"""Replacement of CUDA graphs on the CPU: operations that are recorded, and run again in the same memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that need or make host values, or random numbers, which a graph would freeze.
FROZEN = ("_local_scalar_dense", "lift_fresh", "nonzero", "normal_", "uniform_", "bernoulli_", "randperm")


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class Graph(TorchDispatchMode):
    """Operations of the calls within ``with graph:``. :meth:`replay` runs them on the same tensors.

    As a CUDA graph, it keeps shapes, numbers and addresses, and reads whatever the memory holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(index.dtype == torch.bool for index in tensors(args[1:2]))
        assert name not in FROZEN, f"{name} cannot be recorded"
        assert not by_mask, f"{name} by a mask cannot be recorded"
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, result in self.operations:
            read = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
            written = tensors(result)
            if func._schema.is_mutable:
                func(*args, **kwargs)
            elif not all(tensor.untyped_storage().data_ptr() in read for tensor in written):  # not a view
                for memory, tensor in zip(written, tensors(func(*args, **kwargs)), strict=True):
                    memory.copy_(tensor)


class Recorder:
    """Replacement of :func:`far.recording.recorder` that counts the recordings it made."""

    def __init__(self) -> None:
        self.recordings: list[list[Graph]] = []

    def __call__(
        self, device: torch.device, warm_up: Callable[[], Any]
    ) -> Callable[[Callable[[], None]], Any]:
        warm_up()
        graphs: list[Graph] = []
        self.recordings.append(graphs)

        def record(call: Callable[[], None]) -> Graph:
            graphs.append(Graph())
            with graphs[-1]:
                call()
            return graphs[-1]

        return record
