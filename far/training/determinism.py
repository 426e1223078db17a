"""Deterministic algorithms for the duration of a training."""

import contextlib
from collections.abc import Iterator

import torch

from far.errors import InputError


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
    torch.set_deterministic_debug_mode("error")
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "CUBLAS_WORKSPACE_CONFIG" in str(error):  # far.devices sets it, unless it is set
            problem = "training.deterministic: CUBLAS_WORKSPACE_CONFIG has another value, or was set too late"
            raise InputError(f"{problem}. Set it to :4096:8 before the process starts") from error
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        problem = f"training.deterministic: torch has no deterministic {operation} on this device"
        raise InputError(f"{problem}. Set it to false, or train on a CPU") from error
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.benchmark = benchmark
