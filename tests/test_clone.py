"""Size of a clone."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT = 50 * 2**20


def test_tracked_files_stay_below_50_mib() -> None:
    """A shallow clone downloads all of them."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert len(paths) > 100
    assert sum(path.stat().st_size for path in paths if path.is_file()) < LIMIT
