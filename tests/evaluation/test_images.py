"""Image sources of an evaluation: folders, .npz files and image sets; and ADM's format."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from far.data.shards import ShardReader
from far.evaluation.images import map_npz_array, open_images, write_npz
from tests.refusals import refused


@pytest.fixture
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 12, 10, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path, pictures: np.ndarray) -> Path:
    folder = tmp_path / "folder"
    for index, picture in enumerate(pictures):
        path = folder / "ab"[index // 4] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return folder


def test_folder_is_read_with_classes_in_turn(folder: Path, pictures: np.ndarray) -> None:
    source = open_images(folder)
    assert (source.count, source.size) == (7, (12, 10))
    # The classes take turns, so that the first images cover all.
    pictures = pictures[[0, 4, 1, 5, 2, 6, 3]]
    np.testing.assert_array_equal(source.read(range(2, 6)), pictures[2:6])
    tensor = source.tensor(range(7))
    assert tensor.shape == (7, 3, 12, 10)
    np.testing.assert_allclose(tensor[3].permute(1, 2, 0), pictures[3] / 255, rtol=1e-6)


def test_folder_without_classes_is_read_in_order(tmp_path: Path, pictures: np.ndarray) -> None:
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
    np.testing.assert_array_equal(open_images(tmp_path).read(range(7)), pictures)


def test_links_are_followed_and_hidden_files_skipped(
    folder: Path, tmp_path: Path, pictures: np.ndarray
) -> None:
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a").symlink_to(folder / "a")
    (tmp_path / "linked" / "a" / "round").symlink_to(tmp_path / "linked")
    (tmp_path / "linked" / ".hidden").mkdir()
    Image.fromarray(pictures[6]).save(tmp_path / "linked" / ".hidden" / "x.png")
    Image.fromarray(pictures[6]).save(tmp_path / "linked" / ".x.png")
    (tmp_path / "linked" / "notes.txt").touch()
    (tmp_path / "linked" / "a" / "x.bmp").touch()
    source = open_images(tmp_path / "linked")
    assert source.left_out == {"hidden": 2, "links to folders": 1, ".txt": 1, ".bmp": 1}
    np.testing.assert_array_equal(source.read(range(source.count)), pictures[:4])


def test_pipes_devices_and_links_to_parents_are_not_read(folder: Path, pictures: np.ndarray) -> None:
    before = open_images(folder)
    for place in (folder, folder / "a"):
        os.mkfifo(place / "pipe.png")
        (place / "zero.png").symlink_to("/dev/zero")
    (folder / "a" / "all").symlink_to("/")
    assert open_images(folder).digest == before.digest
    (folder / "up").symlink_to("/")
    with refused(folder / "up"):
        open_images(folder)


def test_digest_changes_with_the_content(folder: Path, pictures: np.ndarray) -> None:
    before = open_images(folder).digest
    assert open_images(folder).digest == before
    Image.fromarray(pictures[0]).save(folder / "b" / "004.png")
    assert open_images(folder).digest != before


def test_image_set_gives_its_held_out_part(image_set: Path) -> None:
    source = open_images(image_set)
    assert source.count == 12
    expected = ShardReader(image_set / "held-out", "images").all("images").numpy()
    np.testing.assert_array_equal(source.read(range(3, 12)), expected[3:])
    assert open_images(image_set / "train").count == 60
    assert open_images(image_set / "train").digest != source.digest


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_written_by_numpy_is_read(tmp_path: Path, pictures: np.ndarray, save: Callable) -> None:
    save(tmp_path / "a.npz", arr_0=pictures, arr_1=np.arange(7), name=np.array("Σ of a network"))
    source = open_images(tmp_path / "a.npz")
    assert source.count == 7
    np.testing.assert_array_equal(source.read(range(4, 7)), pictures[4:])
    np.testing.assert_array_equal(map_npz_array(tmp_path / "a.npz", "arr_1"), np.arange(7))
    assert str(map_npz_array(tmp_path / "a.npz", "name")) == "Σ of a network"
    assert map_npz_array(tmp_path / "a.npz", "absent") is None


def test_written_npz_is_read_by_numpy(tmp_path: Path, pictures: np.ndarray) -> None:
    path = tmp_path / "b.npz"
    write_npz(path, iter([pictures[:4], pictures[4:]]), 7, [3, 1, 2, 0, 0, 0, 9])
    with np.load(path, allow_pickle=False) as found:
        assert set(found) == {"arr_0", "arr_1"}
        np.testing.assert_array_equal(found["arr_0"], pictures)
        assert found["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(found["arr_1"], [3, 1, 2, 0, 0, 0, 9])
    np.testing.assert_array_equal(open_images(path).read(range(7)), pictures)


def test_interrupted_write_leaves_no_file(tmp_path: Path, pictures: np.ndarray) -> None:
    def batches():  # type: ignore[no-untyped-def]
        yield pictures
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_npz(tmp_path / "c.npz", batches(), 14)
    assert list(tmp_path.iterdir()) == []


def test_error_for_mixed_sizes_names_the_file(folder: Path) -> None:
    Image.new("RGB", (9, 12)).save(folder / "b" / "odd.png")
    source = open_images(folder)
    with refused("odd.png", "9×12", "10×12"):
        source.read(range(source.count))


def test_error_for_a_damaged_image_names_it(folder: Path) -> None:
    path = folder / "a" / "001.png"
    path.write_bytes(path.read_bytes()[:60])
    with refused(path):
        open_images(folder).read(range(7))


def test_error_for_an_empty_class_names_it(folder: Path) -> None:
    (folder / "c").mkdir()
    with refused(folder / "c"):
        open_images(folder)


@pytest.mark.parametrize(
    ("array", "named"),
    [
        (np.zeros((3, 4, 4, 3), np.float32), "float32 [3, 4, 4, 3]"),
        (np.zeros((3, 4, 4), np.uint8), "[3, 4, 4]"),
        (np.zeros((0, 4, 4, 3), np.uint8), "[0, 4, 4, 3]"),
        (np.array([{}], dtype=object), ""),
    ],
)
def test_arrays_that_are_not_images_are_refused(tmp_path: Path, array: np.ndarray, named: str) -> None:
    np.savez(tmp_path / "bad.npz", arr_0=array)
    with refused("bad.npz", named):
        open_images(tmp_path / "bad.npz")


def test_missing_and_damaged_files_are_refused(tmp_path: Path, pictures: np.ndarray) -> None:
    for path in (tmp_path / "none.npz", tmp_path / "none", tmp_path):
        with refused(path):
            open_images(path)
    np.savez(tmp_path / "cut.npz", arr_0=pictures)
    content = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with refused("cut.npz"):
        open_images(tmp_path / "cut.npz")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    with refused("other.npz", "arr_0"):
        open_images(tmp_path / "other.npz")


def test_few_rows_of_a_large_npz_are_read_without_loading_it(tmp_path: Path) -> None:
    images = np.zeros((50, 8, 8, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(50)
    np.savez(tmp_path / "d.npz", arr_0=images)
    assert isinstance(map_npz_array(tmp_path / "d.npz", "arr_0"), np.memmap)
    assert torch.equal(
        open_images(tmp_path / "d.npz").tensor(range(48, 50))[:, 0, 0, 0] * 255, torch.tensor([48.0, 49.0])
    )
