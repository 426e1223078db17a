"""Embedded color profiles against closed forms: exchanged primaries, a linear curve, and a table of inks."""

import struct
from pathlib import Path

import numpy as np
import pytest
from image_sources import read_image
from PIL import Image
from profiles import EXCHANGED, GRAY, RGB_TAGS, SRGB, profile

from far.colors import has_unusable_profile, to_srgb
from far.data.images import decode_image
from far.editing import place
from far.errors import InputError
from far.pictures import to_rgb, to_tensor

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)


def encoded(linear: np.ndarray) -> np.ndarray:
    """Return the curve of sRGB, from 0 … 1 to 0 … 255."""
    return 255 * np.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * np.clip(linear, 0, None) ** (1 / 2.4) - 0.055
    ).clip(0, 1)


def picture(mode: str = "RGB", data: bytes | None = EXCHANGED) -> Image.Image:
    made = Image.fromarray(PIXELS).convert(mode)
    if data is not None:
        made.info["icc_profile"] = data
    return made


def test_profile_with_exchanged_primaries_exchanges_channels(tmp_path: Path) -> None:
    for suffix, options in (
        (".png", {}),
        (".webp", {"lossless": True}),
        (".jpg", {"quality": 100, "subsampling": 0}),
    ):
        path = tmp_path / f"a{suffix}"
        picture().save(path, icc_profile=EXCHANGED, **options)
        with Image.open(path) as opened:
            stored = np.asarray(opened.convert("RGB"))
        assert np.abs(np.asarray(decode_image(path)).astype(int) - stored[..., ::-1]).max() <= 1
    Image.fromarray(PIXELS[:6]).save(tmp_path / "square.png", icc_profile=EXCHANGED)
    assert np.abs(read_image(tmp_path / "square.png", 6).astype(int) - PIXELS[:6, :, ::-1]).max() <= 1
    assert np.array_equal(read_image(tmp_path / "square.png", 6, keep_colors=True), PIXELS[:6])


def test_conversion_happens_once_and_leaves_the_given_image(tmp_path: Path) -> None:
    given = picture()
    once = to_rgb(given)
    assert np.array_equal(np.asarray(to_rgb(once)), np.asarray(once))
    assert np.array_equal(np.asarray(given), PIXELS)
    assert given.info["icc_profile"] == EXCHANGED


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1"])
def test_srgb_profile_changes_no_bit(mode: str) -> None:
    with_profile, without = (to_rgb(picture(mode, data)) for data in (SRGB, None))
    assert np.array_equal(np.asarray(with_profile), np.asarray(without))


def test_srgb_profile_with_a_curve_of_points_changes_no_bit() -> None:
    """Cameras and editors embed sRGB as 1,024 rounded points of its curve."""
    at = np.linspace(0, 1, 1024)
    linear = np.where(at <= 0.04045, at / 12.92, ((at + 0.055) / 1.055) ** 2.4)
    curve = b"curv" + bytes(4) + struct.pack(">I", 1024) + (65535 * linear).round().astype(">u2").tobytes()
    points = profile(
        b"RGB ", {name: curve if name.endswith(b"TRC") else tag for name, tag in RGB_TAGS.items()}
    )
    levels = np.arange(256, dtype=np.uint8)
    given = Image.fromarray(np.stack([levels, levels[::-1], np.roll(levels, 77)], axis=-1)[None])
    given.info["icc_profile"] = points
    assert np.array_equal(np.asarray(to_rgb(given)), np.asarray(given))


def test_transparency_is_kept_beside_a_profile() -> None:
    given = picture("RGBA")
    given.putalpha(Image.fromarray(PIXELS[..., 0]))
    converted = to_srgb(given)
    assert np.array_equal(np.asarray(converted.getchannel("A")), PIXELS[..., 0])
    assert np.abs(np.asarray(converted)[..., :3].astype(int) - PIXELS[..., ::-1]).max() <= 1
    palette = picture("P", EXCHANGED)
    palette.info["transparency"] = 0
    assert np.array_equal(
        np.asarray(to_srgb(palette).getchannel("A")), np.where(np.asarray(palette) == 0, 0, 255)
    )


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_gray_profile_applies_its_curve(mode: str) -> None:
    gray = np.arange(0, 256, 5, dtype=np.uint8).reshape(4, 13)
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    given = deep if mode == "I;16" else Image.fromarray(gray).convert(mode)
    given.info["icc_profile"] = GRAY
    expected = np.repeat(encoded(gray / 255)[..., None], 3, axis=-1)
    assert np.abs(np.asarray(to_rgb(given)).astype(float) - expected).max() <= 1
    assert not has_unusable_profile(given)


def test_inks_become_the_colors_of_their_table() -> None:
    rng = np.random.default_rng(1)
    lab = np.stack(
        [rng.integers(90, 170, 16), rng.integers(118, 138, 16), rng.integers(118, 138, 16)], axis=-1
    )  # in gamut
    lab[0], lab[15] = (255, 128, 128), (0, 128, 128)  # paper is white, all inks are black
    identity = bytes(range(256))
    header = (
        b"mft1"
        + bytes(4)
        + bytes([4, 3, 2, 0])
        + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    )
    table = header + 4 * identity + lab.astype(np.uint8).tobytes() + 3 * identity
    inks = profile(b"CMYK", {b"wtpt": RGB_TAGS[b"wtpt"], b"A2B0": table}, b"prtr", b"Lab ")
    corners = np.array([[255 * (i >> shift & 1) for shift in (3, 2, 1, 0)] for i in range(16)], np.uint8)
    given = Image.frombytes("CMYK", (16, 1), corners.tobytes())
    given.info["icc_profile"] = inks
    lightness, a, b = (lab[:, 0] / 255 * 100, lab[:, 1] - 128.0, lab[:, 2] - 128.0)
    fy = (lightness + 16) / 116
    f = np.stack([fy + a / 500, fy, fy - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * np.array([[0.9642], [1], [0.8249]])
    # XYZ of D50 to linear sRGB, adapted by Bradford (B. Lindbloom).
    matrix = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    expected = encoded(np.array(matrix) @ xyz).T
    assert np.abs(np.asarray(to_rgb(given))[0] - expected).max() <= 2


@pytest.mark.parametrize(
    ("mode", "data"),
    [
        ("RGB", b"nonsense"),
        ("RGB", EXCHANGED[:200]),
        ("RGB", GRAY),
        ("CMYK", EXCHANGED),
        ("L", b"\0" * 200),
        ("RGB", b""),
    ],
)
def test_unusable_profile_is_reported_and_colors_stay(mode: str, data: bytes) -> None:
    given = picture(mode, data)
    assert has_unusable_profile(given)
    assert np.array_equal(np.asarray(to_rgb(given)), np.asarray(to_rgb(picture(mode, None))))
    for usable in (picture("RGB", None), picture("RGB", SRGB), picture("P"), picture("L", GRAY)):
        assert not has_unusable_profile(usable)


def test_images_from_python_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        upright = np.rot90(PIXELS, k=-1)
        assert np.array_equal((to_tensor(opened).permute(1, 2, 0) * 255).round().numpy(), upright)
        canvas, mask = place(opened, (6, 8), 0, 0)
        assert np.array_equal(np.asarray(canvas), upright)
        assert not mask.any()
        assert opened.size == (6, 8), "the caller's image is not turned"


def test_damaged_image_from_python_is_one_line(tmp_path: Path) -> None:
    Image.fromarray(np.kron(PIXELS, np.ones((20, 20, 1), np.uint8))).save(tmp_path / "a.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:1500])
    with Image.open(tmp_path / "cut.jpg") as opened, pytest.raises(InputError) as error:
        to_tensor(opened)
    assert "\n" not in str(error.value)
