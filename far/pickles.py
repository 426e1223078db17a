"""The one place where pickles are read: PyTorch's older files, with nothing in them executed, and nothing made that they do not hold.

What the files are to hold is known to those who ask: ``far.convert``, ``far.evaluation.inception``, ``far.training.checkpoint``.
"""

import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from far.files import check_zip

# What weights and plain values need. torch allows more, some of which makes gigabytes of a few bytes.
_NEEDED = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch(\.cuda|\.storage)?\.\w+Storage"
    r"|torch\.(Size|device|bool|b?float\d+|u?int\d+)"
)
# Of a tuple, those within it counted too. A tuple of tuples of … that is a key is hashed in full, for ever if they repeat.
_MOST_ITEMS = 10_000
# Before the zip format: two magic numbers, the machine's sizes, the content, and the names of what follows.
_PICKLES_OF_OLD = 5


def read_pickle(path: Path, *allowed: type, mapped: bool = False) -> Any:
    """The content of a file of ``torch.save`` on the CPU, of tensors, plain values and the types ``allowed``.

    ``mapped`` leaves tensors in the file until they are used, where its format allows.

    Raises:
        OSError: the file cannot be read.
        Exception: it is damaged or hostile, and there is no telling how it fails then. Of a type that is not allowed, the message
            names it after ``GLOBAL``.
    """
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in allowed}
    if zipped := zipfile.is_zipfile(path):
        check_zip(path)
    for file in _pickles(path, zipped):
        _check(file, names)
    with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and mapped)


def is_held(value: Any) -> bool:
    """Whether it is a tensor whose numbers the file held; one that repeats them could ask for any amount of memory."""
    return isinstance(value, Tensor) and value.nbytes <= value.untyped_storage().nbytes()


def _pickles(path: Path, zipped: bool) -> Iterator[IO[bytes]]:
    """Every pickle in the file, at its beginning."""
    if zipped:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.lower().endswith(".pkl"):  # torch looks names up without regard to case
                    with archive.open(name) as file:
                        yield file
    else:
        with path.open("rb") as file:
            for _ in range(_PICKLES_OF_OLD):
                yield file


def _check(file: IO[bytes], allowed: set[str]) -> None:
    """Go through a pickle without making anything, and raise an :class:`pickle.UnpicklingError` if it asks for what is not needed.

    Of each object on the stack only the number of items is known, which is 1 unless it is a tuple or made from one.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    opcodes: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(file)
    for opcode, argument, _ in opcodes:
        if opcode.name == "GLOBAL":
            name = argument.replace(" ", ".")
            if name not in allowed and not _NEEDED.fullmatch(name):
                raise pickle.UnpicklingError(f"GLOBAL {name} is not allowed")
        if opcode.name == "MARK":
            marks.append(len(stack))
        elif "PUT" in opcode.name:
            memo[argument] = stack[-1]
        elif "GET" in opcode.name:
            stack.append(memo[argument])
        else:
            wanted = opcode.stack_before
            # What an opcode takes is one object each, or all since the last mark and what stands before it.
            count = (
                len(stack) - marks.pop() + wanted.index(pickletools.markobject)
                if pickletools.markobject in wanted
                else len(wanted)
            )
            start = len(stack) - count
            items = stack[start:]
            del stack[start:]
            whole = 1 + sum(items) if "TUPLE" in opcode.name or opcode.name in ("REDUCE", "NEWOBJ") else 1
            if whole > _MOST_ITEMS:
                raise pickle.UnpicklingError(f"it holds a tuple of more than {_MOST_ITEMS} items")
            stack += [whole] * len(opcode.stack_after)
