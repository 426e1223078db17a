"""What a training checkpoint holds, put together."""

from pathlib import Path
from typing import Any

import torch

from far.training.checkpoint import list_checkpoints, open_checkpoint


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Its step, plain values, and whole tensors by name, of however many processes."""
    saved = open_checkpoint(path)
    tensors = {name: torch.full(shape, torch.nan) for name, shape in saved.shapes.items()}
    saved.fill(tensors)
    return {"step": saved.step, "values": saved.values, "tensors": tensors}


def newest(folder: Path) -> dict[str, Any]:
    """The same of the newest one of a run's folder."""
    return read_checkpoint(list_checkpoints(folder / "checkpoints")[-1][1])


def write_file_of_0_1(
    path: Path, step: int, module: torch.nn.Module, optimizer: torch.optim.Optimizer, **more: Any
) -> None:
    """A checkpoint as version 0.1 wrote it, or with ``more``; the EMA is the module itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "module": module.state_dict(),
        "ema": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        **more,
    }
    torch.save(state, path)


def assert_close_checkpoints(
    found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5
) -> None:
    """Assert the same step and names, and weights and averages within ``tolerance`` of each tensor's size (at least 1).

    The bias of attention's keys is left out. It adds the same to all scores of a query, so the loss does not depend on
    it, its gradient is rounding noise, and Adam divides noise by its own size: steps of the learning rate at random.
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
