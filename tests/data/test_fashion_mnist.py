"""Fashion-MNIST: files are written here in the published format and read back."""

import gzip
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from far.data.fashion_mnist import CLASSES, write_fashion_mnist
from far.data.shards import ShardReader
from far.files import sole_use
from tests.refusals import refused


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    folder = tmp_path / "idx"
    folder.mkdir()
    for prefix, count in (("train", 30), ("t10k", 10)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))  # not gzipped: both forms are read
    return folder


def test_images_are_padded_and_gray(files: Path, tmp_path: Path) -> None:
    summary = write_fashion_mnist(files, tmp_path / "set")
    assert (summary.train, summary.held_out, summary.already_complete) == (30, 10, False)
    raw = gzip.decompress((files / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    expected = np.frombuffer(raw, np.uint8).reshape(10, 28, 28)
    reader = ShardReader(tmp_path / "set/held-out", "images", verify=True)
    images = reader.all("images").numpy()
    assert images.shape == (10, 32, 32, 3)
    for channel in range(3):
        assert np.array_equal(images[:, 2:30, 2:30, channel], expected)
    assert images.sum(dtype=np.int64) == 3 * expected.sum(dtype=np.int64)  # the border is black
    assert reader.all("labels").tolist() == list(range(10))
    assert reader.meta["classes"] == list(CLASSES)


def test_finished_set_is_reported_and_other_files_are_refused(files: Path, tmp_path: Path) -> None:
    write_fashion_mnist(files, tmp_path / "set")
    shutil.copytree(files, tmp_path / "copy")
    assert write_fashion_mnist(tmp_path / "copy", tmp_path / "set").already_complete
    (files / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(10, dtype=np.uint8)[::-1]))
    with refused("held-out"):
        write_fashion_mnist(files, tmp_path / "set")


@pytest.mark.parametrize("damage", ["missing", "cut", "magic", "count", "label", "shape", "garbage"])
def test_damaged_files_are_named(damage: str, files: Path, tmp_path: Path) -> None:
    images, labels = files / "train-images-idx3-ubyte.gz", files / "train-labels-idx1-ubyte"
    if damage == "missing":
        images.unlink()
    elif damage == "cut":
        images.write_bytes(images.read_bytes()[:5000])
    elif damage == "magic":
        labels.write_bytes(b"\x00\x01" + labels.read_bytes()[2:])
    elif damage == "count":
        labels.write_bytes(idx(np.zeros(29, np.uint8)))
    elif damage == "label":
        labels.write_bytes(idx(np.full(30, 10, np.uint8)))
    elif damage == "shape":
        images.write_bytes(gzip.compress(idx(np.zeros((30, 14, 56), np.uint8))))
    else:
        images.write_bytes(b"not gzip")
    with refused("train"):
        write_fashion_mnist(files, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_folder_that_another_command_fills_is_refused(files: Path, tmp_path: Path) -> None:
    with sole_use(tmp_path / "set"), refused(tmp_path / "set"):
        write_fashion_mnist(files, tmp_path / "set")
