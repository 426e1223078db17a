"""Packing an image folder: every readable file once, a fair split, continuing after a stop."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from far.cli.main import main
from far.data import folders
from far.data.folders import write_folder
from far.data.shards import ShardReader
from far.errors import InputError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """25 one-coloured images in two classes; the colour tells the file."""
    folder = tmp_path / "photos"
    for index in range(25):
        path = folder / ("cats" if index < 5 else "dogs") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 12), (index, 2 * index, 3 * index)).save(path)
    return folder


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
    assert counts == {"train": 20, "held-out": 5, "broken files skipped": 0}
    assert ShardReader(tmp_path / "set/train", "images").meta["classes"] == ["cats", "dogs"]
    # Mixed, not class after class.
    assert [label for _, label in train] != sorted(label for _, label in train)


def test_a_stopped_run_goes_on_to_the_same_result(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_SHARD_BYTES", 3 * 8 * 8 * 4)  # four images a shard
    write_folder(photos, tmp_path / "whole", 8)
    calls = 0
    original = folders.read_image

    def interrupted(path: Path, size: int) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 14:
            raise KeyboardInterrupt
        return original(path, size)

    monkeypatch.setattr(folders, "read_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(photos, tmp_path / "parts", 8)
    assert len(list((tmp_path / "parts/train").glob("*.safetensors"))) >= 2
    write_folder(photos, tmp_path / "parts", 8)
    for part in ("train", "held-out"):
        assert contents(tmp_path / "parts" / part) == contents(tmp_path / "whole" / part)


def test_broken_files_are_skipped_named_and_counted(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (photos / "dogs" / "99.png").write_text("no image")
    counts = write_folder(photos, tmp_path / "set", 8)
    assert counts["broken files skipped"] == 1
    assert counts["train"] + counts["held-out"] == 25
    assert "99.png" in capsys.readouterr().err
    assert write_folder(photos, tmp_path / "set", 8) == counts  # finished: the same answer
    with pytest.raises(InputError, match=r"99\.png"):
        write_folder(photos, tmp_path / "strict", 8, strict=True)


def test_names_reach_the_terminal_escaped(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name = b"x\x1b]0;title\x07\n\xc2\x9by\xff.png"
    with open(os.path.join(os.fsencode(photos), b"dogs", name), "w") as file:
        file.write("no image")
    assert write_folder(photos, tmp_path / "set", 8)["broken files skipped"] == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert r"x\x1b]0;title\x07\n\x9by\udcff.png is no readable image" in line
    assert main(["data", "folder", str(photos), str(tmp_path / "strict"), "--size", "8", "--strict"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("far:")]
    assert r"x\x1b]0;title\x07\n\x9by\udcff.png is no readable image" in line


def test_a_class_without_a_readable_image_is_refused(photos: Path, tmp_path: Path) -> None:
    for path in (photos / "cats").iterdir():
        path.write_text("no image")
    with pytest.raises(InputError, match="'cats'"):
        write_folder(photos, tmp_path / "set", 8)


def test_a_changed_folder_is_not_mixed_in(photos: Path, tmp_path: Path) -> None:
    write_folder(photos, tmp_path / "set", 8)
    Image.new("RGB", (9, 9)).save(photos / "cats" / "new.png")
    with pytest.raises(InputError, match="other settings"):
        write_folder(photos, tmp_path / "set", 8)


@pytest.mark.parametrize("share", [0.0, -1.0, 0.9])
def test_shares_out_of_range(share: float, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="held-out-share"):
        write_folder(photos, tmp_path / "set", 8, held_out_share=share)
