"""Contact sheets, images that are enlarged, and the settings within a PNG."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from far.pictures import contact_sheet, encode_png, enlarge, grid, to_uint8


def images(count: int, height: int = 5, width: int = 6) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def shrunk(sheet: np.ndarray) -> np.ndarray:
    """Return the sheet before pixels were repeated; fail if the factor is too large or pixels changed."""
    factors = [f for f in range(1, 1001) if sheet.shape[0] % f == 0 and sheet.shape[1] % f == 0]
    for factor in sorted(factors, reverse=True):
        small = sheet[::factor, ::factor]
        if np.array_equal(small.repeat(factor, axis=0).repeat(factor, axis=1), sheet):
            assert sheet.shape[1] >= 1000
            assert factor == 1 or sheet.shape[1] - small.shape[1] < 1000
            return small
    raise AssertionError


def lay_out(labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    drawn = images(len(labels))
    return shrunk(np.asarray(contact_sheet(drawn, labels))), to_uint8(drawn)


def test_each_class_takes_one_row() -> None:
    sheet, pictures = lay_out([2, 2, 2, 0, 0, 7])
    assert sheet.shape == (3 * 5, 3 * 6, 3)
    white = np.full((5, 6, 3), 255)
    expected = [
        [pictures[0], pictures[1], pictures[2]],
        [pictures[3], pictures[4], white],
        [pictures[5], white, white],
    ]
    assert np.array_equal(sheet, np.concatenate([np.concatenate(row, axis=1) for row in expected]))


def test_scattered_images_of_a_class_share_a_row() -> None:
    sheet, pictures = lay_out([0, 1, 0, 1])
    rows = [
        np.concatenate([pictures[0], pictures[2]], axis=1),
        np.concatenate([pictures[1], pictures[3]], axis=1),
    ]
    assert np.array_equal(sheet, np.concatenate(rows))


def test_long_class_takes_rows_of_equal_length() -> None:
    sheet, pictures = lay_out([5] * 10)
    rows = [np.concatenate(list(pictures[start : start + 5]), axis=1) for start in (0, 5)]
    assert np.array_equal(sheet, np.concatenate(rows))


def test_many_classes_take_two_columns_with_a_gap() -> None:
    sheet, pictures = lay_out([index // 2 for index in range(20)])
    # 10 rows of 10 × 12 pixels would be over four times as high as wide.
    assert sheet.shape == (5 * 5, 2 * 12 + 1, 3)
    assert (sheet[:, 12] == 255).all()
    for label in range(10):
        top, left = label // 2 * 5, label % 2 * 13
        row = np.concatenate([pictures[2 * label], pictures[2 * label + 1]], axis=1)
        assert np.array_equal(sheet[top : top + 5, left : left + 12], row), label


def test_one_image_of_each_class_makes_a_square_without_gaps() -> None:
    drawn = images(16, 6, 6)
    sheet = shrunk(np.asarray(contact_sheet(drawn, range(16))))
    assert np.array_equal(sheet, np.asarray(grid(drawn, columns=4)))


def test_one_image_is_not_enlarged() -> None:
    drawn = images(1)
    assert np.array_equal(np.asarray(contact_sheet(drawn, [3])), to_uint8(drawn)[0])


@pytest.mark.parametrize(("width", "factor"), [(1, 1000), (999, 2), (1000, 1), (1400, 1), (256, 4)])
def test_images_are_enlarged_to_a_thousand_pixels(width: int, factor: int) -> None:
    picture = grid(images(1, 2, width))
    large = enlarge(picture)
    assert large.size == (width * factor, 2 * factor)
    assert np.array_equal(np.asarray(large)[::factor, ::factor], np.asarray(picture))


def test_settings_that_are_not_text_are_escaped_in_a_png() -> None:
    settings = {"class": "größe 大", "weights": "models/\udcff"}  # a name that is not UTF-8
    with Image.open(io.BytesIO(encode_png(Image.new("RGB", (1, 1)), settings))) as picture:
        assert picture.info == {"class": "größe 大", "weights": r"models/\udcff"}
