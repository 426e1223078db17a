"""Reading and comparing training checkpoints."""

from pathlib import Path
from typing import Any

import torch

from far.training.checkpoint import list_checkpoints, open_checkpoint

# Values of a run in float16 of which one step was skipped.
VALUES = {"identity": {}, "dtype": "float16", "scaler": {"scale": 65536.0}, "skipped": [1, 0]}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return step, plain values and whole tensors by name, written by any number of processes."""
    saved = open_checkpoint(path)
    tensors = {name: torch.full(shape, torch.nan) for name, shape in saved.shapes.items()}
    saved.fill(tensors)
    return {"step": saved.step, "values": saved.values, "tensors": tensors}


def newest(folder: Path) -> dict[str, Any]:
    """Read the newest checkpoint of a run's folder."""
    return read_checkpoint(list_checkpoints(folder / "checkpoints")[-1][1])


def assert_close_checkpoints(
    found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5
) -> None:
    """Assert equal steps and names, and weights within ``tolerance`` of each tensor's size (≥ 1).

    The bias of attention's keys is left out. It adds the same value to all scores of a query, so the loss
    does not depend on it and its gradient is rounding noise. Adam divides noise by its own size: random steps
    of the learning rate.
    """
    assert found["step"] == expected["step"]
    assert found["tensors"].keys() == expected["tensors"].keys()
    assert not any(tensor.isnan().any() for tensor in found["tensors"].values())
    for name, tensor in expected["tensors"].items():
        if not name.startswith("optimizer."):
            ours = found["tensors"][name]
            if name.endswith("attn.qkv.bias"):
                ours, tensor = (bias.unflatten(0, (3, -1))[[0, 2]] for bias in (ours, tensor))
            size = max(1.0, float(tensor.abs().max()))
            torch.testing.assert_close(ours, tensor, rtol=0, atol=tolerance * size, msg=name)
