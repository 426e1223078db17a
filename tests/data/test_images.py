"""Decoding images: color modes, orientation, cropping, and files that are not images."""

import os
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from image_sources import find_images, read_image
from PIL import EpsImagePlugin, Image

from far.data import images
from far.data.images import center_crop, decode_image
from far.errors import InputError
from far.pictures import to_rgb
from tests.refusals import refused


def gradient(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack(
        [255 * x // max(1, width - 1), 255 * y // max(1, height - 1), np.full_like(x, 90)], axis=-1
    ).astype(np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_lossless_files_keep_their_pixels(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(gradient(16, 16)).save(tmp_path / f"a{suffix}", lossless=True)
    assert np.array_equal(read_image(tmp_path / f"a{suffix}", 16), gradient(16, 16))


def test_every_color_mode_becomes_rgb(tmp_path: Path) -> None:
    rgb = Image.fromarray(gradient(16, 16))
    gray = np.asarray(rgb.convert("L"))
    rgb.convert("L").save(tmp_path / "gray.png")
    assert np.array_equal(read_image(tmp_path / "gray.png", 16), np.repeat(gray[..., None], 3, axis=-1))
    rgb.convert("1").save(tmp_path / "bits.png")
    assert set(np.unique(read_image(tmp_path / "bits.png", 16))) == {0, 255}
    rgb.quantize(256).save(tmp_path / "palette.png")
    assert np.abs(read_image(tmp_path / "palette.png", 16).astype(int) - gradient(16, 16)).mean() < 12
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "cmyk.jpg", 16).astype(int) - gradient(16, 16)).mean() < 12
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(read_image(tmp_path / "deep.png", 16)[..., 0], gray)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_blended_with_white(mode: str, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 4, 8))
    picture.paste((0, 0, 0, 127), (4, 0, 6, 8))
    picture.convert(mode).save(tmp_path / "a.png")
    row = read_image(tmp_path / "a.png", 8)[0, :, 0]
    assert row.tolist() == [0, 0, 0, 0, 128, 128, 255, 255]


def test_orientation_is_applied(tmp_path: Path) -> None:
    picture = Image.fromarray(gradient(16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # upright after a clockwise rotation by 90°
    picture.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png", 16), np.rot90(gradient(16, 16), k=-1))


def test_crop_is_the_averaged_center() -> None:
    assert center_crop(Image.fromarray(gradient(40, 16)), 16).size == (16, 16)
    # Both sides are multiples of 16, so the crop is the mean over 4×4 boxes of the central square.
    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    expected = pixels[:, 32:96].reshape(16, 4, 16, 4, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(np.asarray(center_crop(Image.fromarray(pixels), 16)) - expected).max() <= 2  # two roundings


@pytest.mark.parametrize("size", [(9, 200), (200, 9), (2, 2), (17, 31), (33, 16)])
def test_image_of_any_shape_is_read_at_the_requested_size(size: tuple[int, int], tmp_path: Path) -> None:
    Image.fromarray(gradient(*size)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 16).shape == (16, 16, 3)


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "pixel", "thin", "missing", "bomb"])
def test_error_names_the_broken_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "broken.png"
    if kind == "text":
        path.write_text("hello")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind in ("cut", "bomb"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        if kind == "cut":
            path.write_bytes(path.read_bytes()[:3000])
        else:
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    elif kind != "missing":
        Image.new("RGB", (1, 1) if kind == "pixel" else (50, 1)).save(path)
    with refused("broken.png"):
        read_image(path, 16)


@pytest.mark.parametrize("form", ["EPS", "TIFF", "GIF", "BMP", "PPM", "ICO"])
def test_other_formats_are_refused_whatever_their_name(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *arguments: pytest.fail("Ghostscript was started")
    )
    Image.fromarray(gradient(16, 16)).save(tmp_path / "a.png", format=form)
    for read in (decode_image, lambda path: read_image(path, 16)):
        with refused("a.png"):
            read(tmp_path / "a.png")


def test_jpeg_with_photographs_of_two_lenses_is_read(tmp_path: Path) -> None:
    picture = Image.fromarray(gradient(16, 16))
    picture.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[picture], quality=95)
    with Image.open(tmp_path / "a.jpg") as opened:
        assert opened.format == "MPO"
    assert np.abs(read_image(tmp_path / "a.jpg", 16).astype(int) - gradient(16, 16)).mean() < 3


def test_image_of_too_many_pixels_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 108_000_000 <= images._MOST_PIXELS <= 2 * Image.MAX_IMAGE_PIXELS, (
        "phones take images of 108 megapixels"
    )
    monkeypatch.setattr(images, "_MOST_PIXELS", 16 * 16)
    for name, height in (("most.png", 16), ("more.png", 17)):
        Image.fromarray(gradient(16, height)).save(tmp_path / name)
    assert read_image(tmp_path / "most.png", 16).shape == (16, 16, 3)
    monkeypatch.setattr(Image.Image, "load", lambda *arguments: pytest.fail("the image was decoded"))
    for read in (decode_image, lambda path: read_image(path, 16)):
        with refused("more.png", "16×17"):
            read(tmp_path / "more.png")


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for side in (16, 17):
        Image.fromarray(gradient(side, side)).save(tmp_path / f"{side}.png")
    busy, most, lock = 0, 0, threading.Lock()
    original = images.center_crop

    def slow(picture: Image.Image, size: int) -> Image.Image:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.05)
        with lock:
            busy -= 1
        return original(picture, size)

    monkeypatch.setattr(images, "center_crop", slow)
    monkeypatch.setattr(images, "_MANY_PIXELS", 16 * 16)
    for side, expected in ((16, 4), (17, 1)):
        most = 0
        with ThreadPoolExecutor(4) as pool:
            assert len(list(pool.map(lambda path: read_image(path, 8), [tmp_path / f"{side}.png"] * 4))) == 4
        assert most == expected


@pytest.mark.parametrize(
    ("mode", "dtype"), [("I;16", "<u2"), ("I;16B", ">u2"), ("I", np.int32), ("F", np.float32)]
)
def test_images_of_more_than_8_bits_are_scaled_in_little_memory(
    mode: str, dtype: str, tmp_path: Path
) -> None:
    deep = np.arange(65536).reshape(256, 256)
    for values in (
        deep,
        deep % 256,
        (deep - 200) if mode in ("I", "F") else deep,
        deep * 3 if mode in ("I", "F") else deep,
    ):
        picture = Image.frombytes(mode, (256, 256), values.astype(dtype).tobytes())
        expected = np.clip(values / (257 if values.max() > 255 else 1), 0, 255).round()
        assert np.array_equal(np.asarray(to_rgb(picture))[..., 1], expected)
    picture = Image.frombytes(mode, (2048, 2048), np.zeros((2048, 2048), dtype).tobytes())
    tracemalloc.start()
    to_rgb(picture)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2048**2, "one float64 per pixel, its quotient and its clipped copy are 24 bytes"


def test_pipes_devices_and_links_to_parents_are_not_read(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in "ab":
        Image.fromarray(gradient(16, 16)).save(elsewhere / f"{name}.png")
    folder = tmp_path / "photos"
    (folder / "real").mkdir(parents=True)
    for name in "ab":
        (folder / "real" / f"{name}.png").symlink_to(elsewhere / f"{name}.png")
    os.mkfifo(folder / "real" / "pipe.png")
    (folder / "real" / "zero.png").symlink_to("/dev/zero")
    (folder / "real" / "nothing.png").symlink_to("/nowhere")
    (folder / "real" / "all").symlink_to("/")
    (folder / "linked").symlink_to(elsewhere)
    classes, files, _ = find_images(folder)
    assert classes == ["linked", "real"]
    assert [(path.parent.name, path.name) for path, _ in files] == [
        (name, f"{x}.png") for name in classes for x in "ab"
    ]
    (folder / "also").symlink_to(folder / "real")
    with refused("'real'"):
        find_images(folder)
    (folder / "also").unlink()
    for above in (Path("/"), tmp_path, folder):
        (folder / "up").symlink_to(above)
        with refused(str(folder / "up")):
            find_images(folder)
        (folder / "up").unlink()


def test_classes_are_the_subfolders_in_natural_order(tmp_path: Path) -> None:
    names = ["0", "1", "2", "9", "10", "11", "a2", "a10b", "a10c", "b"]
    for name in names:
        for file in ("x.png", "deep/y.JPG"):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
    (tmp_path / ".hidden").mkdir()
    classes, files, _ = find_images(tmp_path)
    assert classes == names
    assert [path.relative_to(tmp_path).as_posix() for path, _ in files] == [
        f"{n}/{f}" for n in names for f in ("deep/y.JPG", "x.png")
    ]
    assert [label for _, label in files] == [index for index in range(10) for _ in "ab"]


def test_every_suffix_of_the_three_formats_is_read(tmp_path: Path) -> None:
    for suffix, form in (
        (".png", "PNG"),
        (".jpe", "JPEG"),
        (".jfif", "JPEG"),
        (".JPEG", "JPEG"),
        (".webp", "WEBP"),
        (".jpg", "PNG"),
    ):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(gradient(16, 16)).save(tmp_path / "a" / f"{form}{suffix}", format=form)
    _, files, _ = find_images(tmp_path)
    assert len(files) == 6
    for path, _ in files:
        assert np.abs(read_image(path, 16).astype(int) - gradient(16, 16)).mean() < 12


def test_skipped_files_are_counted_by_reason(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    for name in (
        *(
            "x.png",
            "y.png",
            "b.bmp",
            "c.TIF",
            "d.tif",
            "noun",
            ".DS_Store",
            "._x.png",
            "Thumbs.db",
            "desktop.ini",
        ),
        *(
            ".Trash-1000/files/x.png",
            "__MACOSX/._x.png",
            "more/@eaDir/x.png/SYNOPHOTO.jpg",
            "$RECYCLE.BIN/x.png",
            "x.png~",
        ),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / ".empty").mkdir()
    (folder / "dead.png").symlink_to("/nowhere")
    (folder / "round.png").symlink_to("round.png")
    (folder / "elsewhere").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.png")
    (tmp_path / "loose.png").touch()
    (tmp_path / "README").touch()
    classes, files, left_out = find_images(tmp_path)
    assert classes == ["a"]
    assert [path.name for path, _ in files] == ["x.png", "y.png"]
    assert left_out == {
        "hidden": 8, ".bmp": 1, ".tif": 2, "without a suffix": 1, ".png~": 1, "dead links": 2,
        "links to folders": 1, "pipes or devices": 1, "outside the class folders": 2,
    }  # fmt: skip


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_unreadable_files_are_counted_and_an_unreadable_class_is_refused(tmp_path: Path) -> None:
    for name in ("a/x.png", "a/y.png", "a/z.png", "a/deep/w.png", "b/x.png", "b/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a/z.png").chmod(0)
    (tmp_path / "a/deep").chmod(0)
    *_, left_out = find_images(tmp_path)
    assert left_out == {"that cannot be read": 1, "folders that cannot be read": 1}
    (tmp_path / "b").chmod(0)
    with refused("'b'"):
        find_images(tmp_path)


@pytest.mark.parametrize("kind", ["empty", "bmp", "dead links", "hidden", "one"])
def test_class_without_images_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    for name in ("ant/x.png", "ant/y.png", "cow/x.png", "cow/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "bee").mkdir()
    files = {"bmp": ["x.bmp", "y.bmp"], "hidden": [".x.png", ".y.png"], "one": ["x.png"]}
    for name in files.get(kind, ()):
        (tmp_path / "bee" / name).touch()
    if kind == "dead links":
        for name in "xy":
            (tmp_path / "bee" / f"{name}.png").symlink_to(f"/nowhere/{name}.png")
    with pytest.raises(InputError) as error:
        find_images(tmp_path)
    message = str(error.value)
    assert "'bee'" in message
    assert "ant" not in message
    assert "\n" not in message


def test_class_folder_that_is_a_dead_link_is_refused(tmp_path: Path) -> None:
    for name in ("ant/x.png", "ant/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "bee").symlink_to("/not-mounted/bee")
    with refused("bee"):
        find_images(tmp_path)


@pytest.mark.parametrize("names", [("Cat", "cat"), ("caf\u00e9", "cafe\u0301"), ("cat", "cat ")])
def test_classes_that_look_the_same_are_refused(names: tuple[str, str], tmp_path: Path) -> None:
    for name in names:
        for file in "xy":
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{file}.png").touch()
    with refused(*names):
        find_images(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jpg", b"GIF89a"),
        ("a.png", b"<!DOCTYPE html>"),
        ("a.png", b"version https://git-lfs.github.com/spec/v1\n"),
        ("a.jpg", b"\0\0\0\x20ftypheic"),
    ],
)
def test_error_for_a_file_of_another_format_names_the_file(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content + bytes(100))
    with refused(name, error=images.OtherFormat):
        read_image(tmp_path / name, 16)
