"""Images of other sizes than squares: cropped or stretched, and trained on from the files to the samples."""

from pathlib import Path

import numpy as np
import pytest
from image_sources import write_pngs
from PIL import Image

from far.cli.main import main
from far.data.images import center_crop, stretch
from far.data.shards import ShardReader


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def means(pixels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Means over boxes of ``rows`` × ``columns`` pixels."""
    height, width, _ = pixels.shape
    return pixels.reshape(height // rows, rows, width // columns, columns, 3).astype(float).mean(axis=(1, 3))


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ((64, 160), (slice(None), slice(32, 128))),  # wider than 24 × 16: the sides are cut off
        ((80, 96), (slice(8, 72), slice(None))),  # higher
        ((64, 96), (slice(None), slice(None))),
    ],
)
def test_crop_is_the_largest_central_part_of_the_proportions(
    source: tuple[int, int], part: tuple[slice, slice]
) -> None:
    pixels = noise(*source)
    found = np.asarray(center_crop(Image.fromarray(pixels), (16, 24)))
    assert np.abs(found - means(pixels[part], 4, 4)).max() <= 2  # two roundings


def test_stretched_image_is_the_whole_image() -> None:
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:32, :48], pixels[32:, 144:] = 200, 100
    found = np.asarray(stretch(Image.fromarray(pixels), 32)).astype(int)
    inner = found[4:-4, 4:-4]  # bicubic filters spread over edges
    assert (found[2:14, 2:6] == 200).all()
    assert (found[18:30, 26:30] == 100).all()
    assert inner.max() <= 210
    assert (found[2:14, 12:30] == 0).all()
    assert np.array_equal(np.asarray(stretch(Image.fromarray(pixels), (32, 96))), means(pixels, 2, 2))


@pytest.mark.parametrize("size", ["96x64", "64", "8x1024"])
def test_size_is_width_by_height(size: str, tmp_path: Path) -> None:
    write_pngs(tmp_path / "photos", range(4))
    assert main(["data", str(tmp_path / "photos"), str(tmp_path / "set"), "--size", size]) == 0
    width, height = map(int, (size + "x" + size).split("x")[:2])
    reader = ShardReader(tmp_path / "set/train", "images")
    assert reader.all("images").shape == (3, height, width, 3)


@pytest.mark.parametrize("size", ["96x", "x", "64x64x64", "4x64", "64x6", "2048", "-64x64", "1e2", "64×96"])
def test_wrong_size_is_refused(size: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_pngs(tmp_path / "photos", range(4))
    assert main(["data", str(tmp_path / "photos"), str(tmp_path / "set"), f"--size={size}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert repr(size) in error or any(f"size {side} " in error for side in size.split("x"))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("copy", [[], ["--no-copy"]])
def test_stretched_set_differs_from_a_cropped_one(
    copy: list[str], tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture
) -> None:
    """A cache of one is refused for the other, also if the pixels are not stored."""
    write_pngs(tmp_path / "photos", range(4))
    pixels = noise(48, 96)
    for index in range(4):
        Image.fromarray(np.roll(pixels, index)).save(tmp_path / "photos" / f"{index:02d}.png")
    for name, option in (("cropped", []), ("stretched", ["--resize-only"])):
        command = ["data", str(tmp_path / "photos"), str(tmp_path / name), "--size", "16", *copy]
        assert main([*command, *option]) == 0
        run = [f"data={tmp_path / name}", f"run={tmp_path / 'own'}"]
        assert main(["cache", str(recipe), *run]) == (2 if option else 0)
    assert str(tmp_path / "own") in capsys.readouterr().err.splitlines()[-1]
    assert main(command) == 2


def test_rectangular_images_are_trained_on_and_drawn(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_pngs(tmp_path / "photos", range(40))
    data, run = f"data={tmp_path / 'set'}", f"run={tmp_path / 'own'}"
    command = ["data", str(tmp_path / "photos"), str(tmp_path / "set"), "--size", "24x16"]
    assert main([*command, "--held-out-share", "0.25"]) == 0
    for section in ("autoencoder", "generator"):
        training = f"{section}.training"
        steps = [f"{training}.{key}=2" for key in ("steps", "evaluate_every", "checkpoint_every")]
        if section == "autoencoder":
            sizes = "{width: 8, width_multipliers: [1, 1, 2], blocks: 1, latent_channels: 2, norm_groups: 4}"
            small = [f"autoencoder.model={sizes}", f"{training}.batch_size=4", f"{training}.warmup_steps=1"]
            settings = [data, run, "autoencoder_from=null", *small, *steps]
            assert main(["train-autoencoder", str(recipe), *settings]) == 0
        else:
            few = ["generator.evaluation.images=2", "generator.evaluation.references=2"]
            settings = [data, run, "autoencoder_from=null", *steps, *few]
            assert main(["cache", str(recipe), *settings]) == 0
            assert main(["train", str(recipe), *settings]) == 0
    model = str(tmp_path / "own/model")
    assert main(["generate", "--weights", model, "--count", "2", "--out", str(tmp_path / "drawn")]) == 0
    assert {Image.open(path).size for path in (tmp_path / "drawn").glob("*.png")} == {(24, 16)}
    few = ["--reference", str(tmp_path / "set"), "--count", "8", "--out", str(tmp_path / "evaluation")]
    assert main(["evaluate", "--weights", model, *few]) == 0
