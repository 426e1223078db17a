"""Deterministic algorithms for the duration of a training."""

import contextlib
import os
from collections.abc import Iterator

import torch

from far.errors import InputError

# Memory of cuBLAS. torch refuses matrix products on CUDA unless its size is fixed.
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextlib.contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Let torch use only deterministic algorithms within the block, if ``enabled``, and restore its settings.

    Raises:
        InputError: an operation has no deterministic algorithm on its device.
    """
    if not enabled:
        yield
        return
    mode, benchmark = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    workspace = os.environ.get(_WORKSPACE)
    torch.set_deterministic_debug_mode("error")
    torch.backends.cudnn.benchmark = False
    os.environ[_WORKSPACE] = ":4096:8"
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        problem = f"training.deterministic: torch has no deterministic {operation} on this device"
        raise InputError(f"{problem}. Set it to false, or train on a CPU") from error
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            del os.environ[_WORKSPACE]
        else:
            os.environ[_WORKSPACE] = workspace
