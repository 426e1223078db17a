"""Replacement of a GPU or a Mac: torch's ``meta`` device, whose tensors have no values, under a watch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchgen
import yaml
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
DEVICE = torch.device("meta")


class Watch(TorchDispatchMode):
    """Record operations that would stall a GPU or that a Mac lacks, and refuse to mix devices.

    Attributes:
        copies: operations that move a tensor from one device to another.
        reads: operations that need a value on the host: ``.item()``, ``bool(tensor)``, indexing by a mask.
        float64: operations with float64 results on the device.
        operations: all operations on the device, as torch's table of kernels names them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers = _Numbers(self)
        self.clear()

    def __enter__(self) -> "Watch":
        self.numbers.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.numbers.__exit__(*error)

    def clear(self) -> None:
        """Forget all records."""
        self.copies: list[str] = []
        self.reads: list[str] = []
        self.float64: list[str] = []
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        name = str(func)
        result = self._run(func, name, inputs, args, kwargs or {})
        outputs = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        if (
            name == "aten.to.dtype_layout"
        ):  # forward-mode derivatives find shapes by the meta device, whatever the tensors' is
            return result
        if any(value.device == DEVICE for value in (*inputs, *outputs)) and func.namespace == "aten":
            self.operations.add(
                func._schema.name.removeprefix("aten::")
                + ("." * bool(func._schema.overload_name))
                + func._schema.overload_name
            )
        self.float64 += [name for value in outputs if value.device == DEVICE and value.dtype == torch.float64]
        return result

    def _run(self, func: Callable[..., Any], name: str, inputs: list[Tensor], args: Any, kwargs: Any) -> Any:
        devices = {value.device for value in inputs if value.dim() or len(inputs) == 1}
        if name.startswith(("aten._to_copy", "aten.copy_")):
            target = (
                inputs[0].device
                if name.startswith("aten.copy_")
                else kwargs.get("device") or inputs[0].device
            )
            if {inputs[-1].device, torch.device(target)} == {DEVICE, torch.device("cpu")}:
                self.copies.append(name)
                if torch.device(target) != DEVICE:  # there are no values to move
                    return torch.zeros(inputs[-1].shape, dtype=kwargs.get("dtype") or inputs[-1].dtype)
        elif len(devices) > 1:
            raise AssertionError(
                f"{name} mixes devices: {[(value.device, tuple(value.shape)) for value in inputs]}"
            )
        elif DEVICE in devices and name.startswith("aten._local_scalar_dense"):
            self.reads.append(name)
            return 1  # true: nothing is wrong
        elif (
            DEVICE in devices
            and name.startswith("aten.index.")
            and any(value.dtype == torch.bool for value in inputs[1:])
        ):
            self.reads.append(name)
            return inputs[0].new_empty(0)
        return func(*args, **kwargs)


def without_mps_kernel(operations: set[str]) -> list[str]:
    """Return the operations without a kernel for Apple's MPS in the table that torch is generated from."""
    path = Path(torchgen.__file__).with_name("packaged") / "ATen/native/native_functions.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    table = {entry["func"].partition("(")[0]: entry for entry in yaml.load(path.read_text(), loader)}

    def runs(name: str) -> bool:
        entry = table[name]
        if "structured_delegate" in entry:
            return runs(entry["structured_delegate"])
        return any("MPS" in keys or "Composite" in keys for keys in entry.get("dispatch", {"Composite": ""}))

    return sorted(name for name in operations if not runs(name))


class _Numbers(TorchFunctionMode):
    """Record tensors made of host values, which are copied to a GPU but not to ``meta``."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and not any(
            isinstance(value, Tensor) for value in args[-1:]
        )
        if made and result.device == DEVICE:
            self.watch.copies.append(func.__name__)
        return result
