"""The only module that reads pickles: files of ``torch.save``, with weights and plain values only.

Nothing in a file is executed: ``torch.load`` runs with ``weights_only=True``. Callers check the content.
"""

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from far.files import check_zip


def read_pickle(path: Path, *allowed: type, mapped: bool = False) -> Any:
    """Read a file of ``torch.save`` onto the CPU: tensors, plain values and the types ``allowed``.

    With ``mapped``, tensors stay in the file until they are used, if its format allows.

    Raises:
        OSError: the file cannot be read.
        Exception: it is damaged or hostile, which torch reports by many types. If the file holds another
            type, the message names it after ``GLOBAL``.
    """
    if zipped := zipfile.is_zipfile(path):
        check_zip(path)
    with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and mapped)


def is_held(value: Any) -> bool:
    """Return whether a value is a dense tensor whose values the file holds.

    A tensor that repeats few values could take any amount of memory when it is copied.
    """
    dense = isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"
    return dense and value.nbytes <= value.untyped_storage().nbytes()
