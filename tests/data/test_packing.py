"""Packing an image folder: every readable file once, an even split, resuming an interrupted run."""

import contextlib
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from far.cli.main import main
from far.data import packing
from far.data.image_folders import class_folder_source
from far.data.image_sets import Summary
from far.data.packing import Preparation, write_images
from far.data.shards import ShardReader
from tests.refusals import refused


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """25 images in two classes, each of one color that identifies the file."""
    folder = tmp_path / "photos"
    for index in range(25):
        path = folder / ("cats" if index < 5 else "dogs") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 12), (index, 2 * index, 3 * index)).save(path)
    return folder


def write_folder(source: Path, folder: Path, size: int, **options: Any) -> Summary:
    return write_images(class_folder_source(source), folder, Preparation(size, **options))


def contents(folder: Path) -> list[tuple[int, int]]:
    reader = ShardReader(folder, "images", verify=True)
    images = reader.all("images")
    assert (images == images[:, :1, :1]).all()
    assert (images[:, 0, 0, 1] == 2 * images[:, 0, 0, 0]).all()
    return list(zip(images[:, 0, 0, 0].tolist(), reader.all("labels").tolist()))


def test_every_image_is_in_one_part(photos: Path, tmp_path: Path) -> None:
    counts = write_folder(photos, tmp_path / "set", 8, held_out_share=0.2)
    train, held_out = contents(tmp_path / "set/train"), contents(tmp_path / "set/held-out")
    assert sorted(train + held_out) == [(index, int(index >= 5)) for index in range(25)]
    assert sorted(held_out) == [(0, 0), (5, 1), (10, 1), (15, 1), (20, 1)]
    assert (counts.train, counts.held_out, counts.classes, counts.left_out) == (20, 5, ["cats", "dogs"], {})
    assert ShardReader(tmp_path / "set/train", "images").meta["classes"] == ["cats", "dogs"]
    # Classes are mixed.
    assert [label for _, label in train] != sorted(label for _, label in train)


def test_interrupted_run_resumes_to_the_same_result(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_SHARD_BYTES", 3 * 8 * 8 * 4)  # four images per shard
    write_folder(photos, tmp_path / "whole", 8)
    calls = 0
    original = packing.prepare_image

    def interrupted(*arguments: Any, **settings: Any) -> tuple[np.ndarray, bool]:
        nonlocal calls
        calls += 1
        if calls == 20:  # the first four check the classes, two are held out, the rest is for training
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    monkeypatch.setattr(packing, "prepare_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(photos, tmp_path / "parts", 8)
    assert len(list((tmp_path / "parts/train").glob("*.safetensors"))) >= 2
    write_folder(photos, tmp_path / "parts", 8)
    for part in ("train", "held-out"):
        assert contents(tmp_path / "parts" / part) == contents(tmp_path / "whole" / part)


def test_broken_files_are_named_and_counted(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (photos / "dogs" / "99.png").write_text("no image")
    summary = write_folder(photos, tmp_path / "set", 8)
    assert summary.left_out == {"broken": 1}
    assert summary.train + summary.held_out == 25
    assert "99.png" in capsys.readouterr().err
    again = write_folder(photos, tmp_path / "set", 8)
    assert again == dataclasses.replace(summary, already_complete=True)
    with refused("99.png"):
        write_folder(photos, tmp_path / "strict", 8, strict=True)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.35, 0.4, 0.45, 0.5])
def test_held_out_count_of_each_class_is_rounded_to_the_nearest_whole_number(
    share: float, photos: Path, tmp_path: Path
) -> None:
    write_folder(photos, tmp_path / "set", 8, held_out_share=share)
    labels = [label for _, label in contents(tmp_path / "set/held-out")]
    for label, count in ((0, 5), (1, 20)):
        expected = [k for k in range(1, count) if abs(k - share * count) <= 0.5 + 1e-9] or [1]
        assert labels.count(label) in expected


@pytest.mark.parametrize("broken", [[0], [0, 1], [0, 2], [0, 1, 2], [1, 2], [5, 6], [10], [24, 0]])
def test_next_readable_file_replaces_a_broken_held_out_one(
    broken: list[int], photos: Path, tmp_path: Path
) -> None:
    for path in photos.rglob("*.png"):
        if int(path.stem) in broken:
            path.write_bytes(path.read_bytes()[:40])
    summary = write_folder(photos, tmp_path / "set", 8, held_out_share=0.2)
    train, held_out = contents(tmp_path / "set/train"), contents(tmp_path / "set/held-out")
    readable = [(index, int(index >= 5)) for index in range(25) if index not in broken]
    assert sorted(train + held_out) == readable
    assert summary.left_out == {"broken": len(broken)}

    def instead(index: int) -> int:
        while index in broken:
            index += 1
        return index

    assert sorted(index for index, _ in held_out) == [instead(index) for index in (0, 5, 10, 15, 20)]


@pytest.mark.parametrize("readable", [(0, 1), (0, 2), (2, 4), (3, 4), (0, 4)])
def test_two_readable_files_of_a_class_are_split_between_both_parts(
    readable: tuple[int, int], photos: Path, tmp_path: Path
) -> None:
    for index in set(range(5)) - set(readable):
        (photos / "cats" / f"{index:02d}.png").write_text("no image")
    write_folder(photos, tmp_path / "set", 8, held_out_share=0.5)
    parts = [
        [index for index, label in contents(tmp_path / "set" / part) if label == 0]
        for part in ("held-out", "train")
    ]
    assert [len(part) for part in parts] == [1, 1]
    assert sorted(parts[0] + parts[1]) == list(readable)


def test_resuming_after_a_replacement_gives_the_same_set(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_SHARD_BYTES", 3 * 8 * 8 * 2)  # two images per shard
    for index in (0, 5, 6, 15):
        (photos / ("cats" if index < 5 else "dogs") / f"{index:02d}.png").write_text("no image")
    whole = write_folder(photos, tmp_path / "whole", 8, held_out_share=0.4)
    original = packing.ShardWriter.write
    for stop in range(1, 13, 3):
        writes = 0

        def stopping(self: packing.ShardWriter, tensors: dict, cursor: int) -> None:
            nonlocal writes
            writes += 1
            if writes == stop:
                raise KeyboardInterrupt
            original(self, tensors, cursor)

        monkeypatch.setattr(packing.ShardWriter, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            write_folder(photos, tmp_path / f"parts-{stop}", 8, held_out_share=0.4)
        monkeypatch.setattr(packing.ShardWriter, "write", original)
        assert write_folder(photos, tmp_path / f"parts-{stop}", 8, held_out_share=0.4) == whole
        for part in ("train", "held-out"):
            assert contents(tmp_path / f"parts-{stop}" / part) == contents(tmp_path / "whole" / part)


def test_names_are_printed_with_escapes(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name = b"x\x1b]0;title\x07\n\xc2\x9by\xff.png"
    escaped = r"x\x1b]0;title\x07\n\x9by\udcff.png"
    with open(os.path.join(os.fsencode(photos), b"dogs", name), "w") as file:
        file.write("no image")
    assert write_folder(photos, tmp_path / "set", 8).left_out == {"broken": 1}
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert escaped in line
    assert main(["data", "folder", str(photos), str(tmp_path / "strict"), "--size", "8", "--strict"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("far:")]
    assert escaped in line


@pytest.mark.parametrize("readable", [0, 1])
def test_class_without_two_readable_images_is_refused_before_anything_is_written(
    readable: int, photos: Path, tmp_path: Path
) -> None:
    for path in sorted((photos / "cats").iterdir())[readable:]:
        path.write_text("no image")
    with refused("'cats'"):
        write_folder(photos, tmp_path / "set", 8)
    assert not (tmp_path / "set").exists()


def recolor(path: Path) -> None:
    """Change the image in a file, but not its name, size and times."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change", ["new", "gone", "renamed", "content", "moved to another class", "moved in the same order"]
)
@pytest.mark.parametrize("stopped", [False, True])
def test_set_of_a_changed_folder_is_refused(
    change: str, stopped: bool, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        if stopped:
            patch.setattr(packing.ShardWriter, "finish", lambda self: exit())
        with contextlib.suppress(SystemExit):
            write_folder(photos, tmp_path / "set", 8)
    before = {path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()}
    assert before
    path = photos / "dogs" / "07.png"
    if change == "new":
        shutil.copy(path, photos / "dogs" / "new.png")
    elif change == "gone":
        path.unlink()
    elif change == "content":
        recolor(path)
    elif change == "moved in the same order":
        (photos / "dogs" / "05.png").rename(photos / "cats" / "05.png")
    else:
        path.rename(photos / ("cats" if change.startswith("moved") else "dogs") / "a.png")
    with refused(str(tmp_path / "set")):
        write_folder(photos, tmp_path / "set", 8)
    assert before == {path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()}


@pytest.mark.parametrize("options", [{"size": 12}, {"held_out_share": 0.4}, {"keep_colors": True}])
def test_set_made_with_other_options_is_refused(options: dict, photos: Path, tmp_path: Path) -> None:
    write_folder(photos, tmp_path / "set", 8)
    with refused(str(tmp_path / "set")):
        write_folder(photos, tmp_path / "set", **{"size": 8, **options})


def test_copied_folder_counts_as_the_same_source(photos: Path, tmp_path: Path) -> None:
    first = write_folder(photos, tmp_path / "set", 8)
    shutil.copytree(photos, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(tmp_path / "copy/cats/00.png", (1, 1))
    assert write_folder(tmp_path / "copy", tmp_path / "set", 8) == dataclasses.replace(
        first, already_complete=True
    )


def test_last_line_names_classes_and_skipped_files(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    Image.new("RGB", (9, 9)).save(photos / "cats" / "a.tif")
    Image.new("RGB", (9, 9)).save(photos / "cats" / "really.png", format="GIF")
    (photos / "cats" / "empty.png").touch()
    (photos / "cats" / "lost.png").symlink_to("/nowhere.png")
    for name in (
        ".ipynb_checkpoints/x.png",
        "__MACOSX/._y.png",
        "._z.png",
        "@eaDir/a.png",
        ".Trash-1000/files/b.png",
        "Thumbs.db",
    ):
        (photos / "dogs" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / "dogs" / "05.png", photos / "dogs" / name)
    (photos / "notes.txt").touch()
    command = ["data", "folder", str(photos), str(tmp_path / "set"), "--size", "8"]
    assert main(command) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    for part in (
        "2 classes",
        "cats, dogs",
        "23 train",
        "2 held-out",
        "6 hidden",
        "1 .tif",
        "1 dead link",
        "1 broken",
        "1 outside",
        "1 in other",
    ):
        assert part in line
    assert main(command) == 0
    again = capsys.readouterr().out.splitlines()[-1]
    assert "already complete" in again
    assert line.partition(": ")[2] in again


def test_classes_that_look_like_parts_or_nested_folders_give_a_hint(photos: Path, tmp_path: Path) -> None:
    def hints(name: str) -> str:
        return "\n".join(write_folder(tmp_path / name, tmp_path / f"set of {name}", 8).hints)

    assert not write_folder(photos, tmp_path / "set", 8).hints
    for name in ("train2017", "val"):
        shutil.copytree(photos, tmp_path / "parts" / name)
        shutil.copytree(photos, tmp_path / "nested" / f"x{name}")
        shutil.copytree(photos / "dogs", tmp_path / "flat" / name)
    for name, first in (("parts", "train2017"), ("nested", "xtrain2017"), ("flat", "train2017")):
        assert f"{tmp_path / name / first}" in hints(name)
    shutil.copytree(tmp_path / "parts", tmp_path / "my parts")
    assert f"'{tmp_path / 'my parts' / 'train2017'}'" in hints("my parts")  # quoted for a shell


def test_image_set_inside_its_own_source_is_refused(photos: Path) -> None:
    with refused(str(photos / "set")):
        write_folder(photos, photos / "set", 8)
    assert not (photos / "set").exists()


def test_unusable_profiles_are_counted(photos: Path, tmp_path: Path) -> None:
    for index in range(7, 10):
        Image.new("RGB", (20, 12), (index, 2 * index, 3 * index)).save(
            photos / f"dogs/{index:02d}.png", icc_profile=b"nonsense"
        )
    (hint,) = write_folder(photos, tmp_path / "set", 8).hints
    assert hint.startswith("3 color profiles")
    assert len(contents(tmp_path / "set/train")) == 23
    assert not write_folder(photos, tmp_path / "kept", 8, keep_colors=True).hints


@pytest.mark.parametrize("share", [0.0, -1.0, 0.9])
def test_held_out_fraction_out_of_range_is_refused(share: float, photos: Path, tmp_path: Path) -> None:
    with refused("held-out-share"):
        write_folder(photos, tmp_path / "set", 8, held_out_share=share)
