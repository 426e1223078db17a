"""Leftovers of killed processes, links and mounts, and folders that cannot be written to."""

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file

from far.data.shards import ShardWriter
from far.errors import InputError
from far.files import (
    atomic_folder,
    atomic_path,
    check_empty_folder,
    check_folder,
    check_suffix,
    check_writable,
    files_together,
    remove_folder,
    remove_leftovers,
    sole_use,
)
from far.training.runs import check_unused


def die_within(work: Callable[[], None]) -> None:
    """Do ``work`` in a child process that is expected to die in the middle of it."""
    if (child := os.fork()) == 0:
        work()
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, "it was done to its end"


@contextlib.contextmanager
def another_process(block: contextlib.AbstractContextManager[object]) -> Iterator[None]:
    """Let a child process be within a block, and kill it at the end."""
    ready, entered = os.pipe()
    if (child := os.fork()) == 0:
        with block:
            os.write(entered, b".")
            time.sleep(60)
        os._exit(1)
    os.read(ready, 1)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def age(folder: Path, seconds: float) -> None:
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (time.time() - seconds,) * 2)


def leave(path: Path, seconds: float) -> Path:
    """Create the leftovers of a process that died some time ago."""
    before = set(path.parent.iterdir())

    def work() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            os._exit(0)

    die_within(work)
    (left,) = set(path.parent.iterdir()) - before
    age(left, seconds)
    return left


def test_old_leftovers_are_removed_and_recent_ones_stay(tmp_path: Path) -> None:
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


def test_check_of_a_path_removes_leftovers_beside_it(tmp_path: Path) -> None:
    leave(tmp_path / "samples.png", 7200)
    check_writable(tmp_path / "samples.png")
    assert list(tmp_path.iterdir()) == []


def test_suffixes_are_checked_in_any_case() -> None:
    for path in (None, Path("a.png"), Path("a.PNG")):
        check_suffix("--out", path, ".png")
    for name in ("a.jpg", "a", "png"):
        with refused("--out", name, ".png"):
            check_suffix("--out", Path(name), ".png")


@pytest.mark.parametrize("write", [atomic_path, atomic_folder])
def test_old_folder_of_a_running_process_stays_until_it_dies(
    write: Callable[[Path], contextlib.AbstractContextManager[Path]], tmp_path: Path
) -> None:
    with another_process(write(tmp_path / "page")):
        (used,) = tmp_path.iterdir()
        age(tmp_path, 7200)
        remove_leftovers(tmp_path)
        check_writable(tmp_path / "other")
        assert list(tmp_path.iterdir()) == [used]
    check_writable(tmp_path / "other")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_each_way_to_write_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder() -> None:
        with atomic_folder(tmp_path / "step-00000010") as temporary:
            (temporary / "index.json").write_text("{}")
            os._exit(0)

    def removal() -> None:
        (tmp_path / "step-00000008").mkdir()
        (tmp_path / "step-00000008" / "index.json").write_text("{}")
        monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **options: os._exit(0))
        remove_folder(tmp_path / "step-00000008")

    def probe() -> None:
        monkeypatch.setattr(Path, "write_bytes", lambda *arguments: os._exit(0))
        check_writable(tmp_path / "a.png")

    def empty() -> None:
        with atomic_path(tmp_path / "a.png"):
            os._exit(0)

    for work in (folder, removal, probe, empty):
        die_within(work)
        (left,) = tmp_path.iterdir()
        remove_leftovers(tmp_path)
        assert list(tmp_path.iterdir()) == [left], "it is young"
        age(tmp_path, 7200)
        remove_leftovers(tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_leftovers_of_safetensors_are_removed(tmp_path: Path) -> None:
    left = leave(tmp_path / "model.safetensors", 7200)
    (left / "model.safetensors").unlink()
    # Its temporary file, as it is seen while safetensors writes: a process that is stopped there would leave
    # it.
    seen: set[str] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.update(os.listdir(left))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(20):  # on a busy machine, the watcher can miss a write
        save_file({"a": torch.zeros(20_000_000)}, left / "model.safetensors")
        if seen - {"model.safetensors"}:
            break
    stop.set()
    watcher.join()
    temporary = (seen - {"model.safetensors"}).pop()
    (left / "model.safetensors").rename(left / temporary)
    age(left, 7200)
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "files",
    [
        [".notes.far/diary.txt"],
        [".notes.far/notes"],
        [".notes.old.far/notes"],
        [".notes.abcdefgh.far/diary.txt"],
        [".notes.abcdefgh.far/notes", ".notes.abcdefgh.far/diary.txt"],
        [".notes.abcdefgh.far/.tmp-diary"],
        [".notes.abcdefgh.far.d/notes"],
        [".notes.ABCDEFGH.far/notes"],
        [".abcdefgh.far/abcdefgh"],
    ],
)
def test_similar_folders_of_other_programs_stay(files: list[str], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("of somebody else")
    age(tmp_path, 10**6)
    remove_leftovers(tmp_path, idle_seconds=0)
    check_writable(tmp_path / "notes")
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(files)


def test_impossible_folder_is_refused_before_work_and_nothing_is_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    check_folder(tmp_path)
    check_folder(tmp_path / "new" / "deeper")
    for path in (tmp_path / "file", tmp_path / "file" / "new" / "deeper"):
        with pytest.raises(InputError) as error:
            check_folder(path)
        assert str(tmp_path / "file") in str(error.value)
        assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("below", [".", "train"])
def test_shards_and_runs_below_a_file_are_refused_before_work(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for start in (
        lambda path: ShardWriter(path, {"kind": "images"}),
        lambda path: check_unused(path, resume=False),
    ):
        with pytest.raises(InputError) as error:
            start(tmp_path / "file" / below)
        assert str(tmp_path / "file") in str(error.value)


@pytest.mark.parametrize("resume", [False, True])
def test_a_model_whose_checkpoints_are_gone_is_not_overwritten(resume: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="checkpoints"):
        check_unused(tmp_path, resume=resume)
    (tmp_path / "checkpoints").mkdir()  # removed one by one, or the run was killed while it first saved
    with contextlib.nullcontext() if resume else pytest.raises(InputError, match="checkpoints"):
        check_unused(tmp_path, resume=resume)


def test_folder_in_use_is_refused_until_the_other_command_ends(tmp_path: Path) -> None:
    used, other = tmp_path / "made" / "used", tmp_path / "other"
    with sole_use(used):
        with pytest.raises(InputError) as error, sole_use(used):
            pass
        assert str(used) in str(error.value)
        with sole_use(other):
            pass
    with another_process(sole_use(used)):
        with pytest.raises(InputError), sole_use(used):
            pass
    with sole_use(used):
        pass
    assert not list(used.iterdir())


def test_folder_that_cannot_be_created_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as error, sole_use(tmp_path / "file" / "folder"):
        pass
    assert str(tmp_path / "file" / "folder") in str(error.value)
    assert "\n" not in str(error.value)


# --- Links, mounts, and several files at once
# ----------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_links_stay_and_their_targets_are_written(tmp_path: Path) -> None:
    disk, links = tmp_path / "disk", tmp_path / "links"
    for folder in (disk / "replaced", disk / "filled", links):
        folder.mkdir(parents=True)
    for name in ("file", "replaced/a", "filled/a"):
        (disk / name).write_text("old")
    for name in ("file", "replaced", "filled", "missing"):
        (links / name).symlink_to(Path("../disk") / name)
    with atomic_path(links / "file") as temporary:
        temporary.write_text("new")
    with atomic_folder(links / "replaced") as temporary:
        (temporary / "b").write_text("new")
    for name in ("filled", "missing"):
        with files_together(links / name) as temporary:
            assert temporary.is_relative_to(disk / name), "moving the files could cross disks"
            (temporary / "b").write_text("new")
    new = ("file", "replaced/b", "filled/b", "missing/b")
    assert contents(disk) == {**dict.fromkeys(new, "new"), "filled/a": "old"}
    assert [path.is_symlink() for path in links.iterdir()] == [True] * 4


def test_mounted_folder_is_filled_and_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == disk)
    before = disk.stat().st_ino
    with atomic_folder(disk) as temporary:
        (temporary / "parts").mkdir()
        (temporary / "parts" / "a").write_text("new")
        assert contents(tmp_path) == {str((temporary / "parts" / "a").relative_to(tmp_path)): "new"}
        assert temporary.is_relative_to(disk), "moving the files would cross disks"
    assert contents(disk) == {"parts/a": "new"}
    assert disk.stat().st_ino == before


def test_leftover_in_a_mounted_folder_does_not_fill_it(tmp_path: Path) -> None:
    def die() -> None:
        with files_together(tmp_path / "disk"):  # writes within the folder, as an export to a mount does
            os._exit(0)

    die_within(die)
    check_empty_folder(tmp_path / "disk")
    (tmp_path / "disk" / "other").write_text("of somebody else")
    with refused(tmp_path / "disk"):
        check_empty_folder(tmp_path / "disk")


def test_files_that_cannot_be_moved_cost_no_old_file(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "taken").mkdir()  # a file cannot replace it
    with refused(tmp_path), files_together(tmp_path, lambda: [tmp_path / "old"]) as temporary:
        (temporary / "taken").write_text("new")
    assert contents(tmp_path) == {"old": "old"}


def test_folder_that_another_command_fills_is_refused(tmp_path: Path) -> None:
    with files_together(tmp_path / "out") as temporary:
        (temporary / "a").write_text("new")
        with refused(tmp_path / "out"), files_together(tmp_path / "out"):
            pass
    assert contents(tmp_path) == {"out/a": "new"}


def test_files_that_were_not_finished_leave_no_folder(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), files_together(tmp_path / "out") as temporary:
        (temporary / "a").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [".", ".."])
def test_folder_without_a_name_is_filled(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "within").mkdir()
    monkeypatch.chdir(tmp_path / "within")
    with files_together(Path(name)) as temporary:
        (temporary / "a").write_text("new")
    assert contents(tmp_path) == {"a" if name == ".." else "within/a": "new"}
