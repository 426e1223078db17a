"""The scripts in ``benchmarks/`` as modules."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load_script(name: str) -> ModuleType:
    """Import ``benchmarks/NAME.py``, which can import its neighbors; leave no short names behind for other tests."""
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        for other in names:
            patch.delitem(sys.modules, other, raising=False)
        try:
            return importlib.import_module(name)
        finally:
            for other in names:
                sys.modules.pop(other, None)
