"""What killed processes leave half-written."""

import os
import time
from pathlib import Path

from far.files import atomic_path, check_writable, remove_leftovers


def leave(path: Path, seconds: float) -> Path:
    """What a process leaves that died so long ago."""
    before = set(path.parent.iterdir())
    if (child := os.fork()) == 0:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            os._exit(0)
    os.waitpid(child, 0)
    (left,) = set(path.parent.iterdir()) - before
    for written in (left / path.name, left):
        os.utime(written, (time.time() - seconds,) * 2)
    return left


def test_leftovers_go_once_nobody_can_be_at_work_on_them(tmp_path: Path) -> None:
    for name in ("config.json", "step-00000010.pt", "a.b.png"):
        leave(tmp_path / name, 7200)
    young = leave(tmp_path / "config.json", 60)
    written = leave(tmp_path / "model.safetensors", 7200)
    os.utime(written / "model.safetensors")  # still growing
    others = [tmp_path / name for name in (".config.json", ".bashrc", ".notes.far", "notes.far")]
    for path in others:
        path.write_text("of somebody else")
        os.utime(path, (0, 0))
    remove_leftovers(tmp_path, tmp_path / "nowhere")
    assert set(tmp_path.iterdir()) == {young, written, *others}
    remove_leftovers(tmp_path, idle_seconds=0)
    assert set(tmp_path.iterdir()) == set(others)


def test_what_is_beside_a_path_goes_when_it_is_probed(tmp_path: Path) -> None:
    leave(tmp_path / "samples.png", 7200)
    check_writable(tmp_path / "samples.png")
    assert list(tmp_path.iterdir()) == []
