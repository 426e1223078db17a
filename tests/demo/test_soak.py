"""Memory of the demo under eight visitors who never pause."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.soak
def test_memory_does_not_grow() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.demo_soak", "--minutes", "10"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    print(found.stdout)
    assert found.returncode == 0, found.stdout + found.stderr
