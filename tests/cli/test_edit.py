"""`far edit`: each way to choose the redrawn region, and invalid input."""

from pathlib import Path

import numpy as np
import pytest
from conftest import NETWORK
from PIL import Image

from far.backbone import BlockCausalBackbone
from far.cli.main import main
from far.data.images import center_crop
from far.model import FAR, ModelConfig
from far.pipeline import Pipeline
from far.sampling import SamplingConfig

BOX = ["--redraw", "4", "4", "8", "8"]  # one of the four tokens of 8 × 8 pixels


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    return path


def edit(folder: Path, picture: Path, *options: object) -> tuple[np.ndarray, dict]:
    out = picture.with_name("edited.png")
    arguments = [
        "edit",
        picture,
        "--weights",
        folder,
        "--label",
        "square",
        "--dtype",
        "float32",
        "--out",
        out,
        *options,
    ]
    assert main([str(argument) for argument in arguments]) == 0
    with Image.open(out) as edited:
        return np.asarray(edited.convert("RGB")), dict(edited.text)


def changed(before: np.ndarray, after: np.ndarray) -> list[list[bool]]:
    """Return in which tokens of 8 × 8 a pixel differs, without the strip that blends with neighbors."""
    rows, columns = (side // 8 for side in before.shape[:2])
    cells = (before != after).any(axis=2).reshape(rows, 8, columns, 8)[:, 2:6, :, 2:6]
    return cells.any(axis=(1, 3)).tolist()


def test_box_or_mask_selects_the_redrawn_region(pipeline_folder: Path, picture: Path, tmp_path: Path) -> None:
    before = np.asarray(Image.open(picture))
    redrawn, text = edit(pipeline_folder, picture, *BOX)
    assert changed(before, redrawn) == [[True, False], [False, False]]
    assert (text["image"], text["class"], text["label"], text["seed"], text["ar_steps"]) == (
        "picture.png",
        "square",
        "1",
        "0",
        "1",
    )
    kept, _ = edit(pipeline_folder, picture, "--keep", 8, 0, 16, 8)
    assert changed(before, kept) == [[True, False], [True, True]]
    mask = tmp_path / "mask.png"
    Image.fromarray(np.pad(np.full((1, 1), 255, dtype=np.uint8), ((15, 0), (2, 13)))).save(mask)
    painted, text = edit(pipeline_folder, picture, "--mask", mask, "--head-steps", 1, "--guidance", 2.5)
    assert changed(before, painted) == [[False, False], [True, False]]
    assert (text["head_steps"], text["guidance"]) == ("1", "2.5")


def test_transparent_pixels_of_a_mask_are_kept(pipeline_folder: Path, picture: Path, tmp_path: Path) -> None:
    mask = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    mask.paste("white", (8, 0, 16, 8))
    mask.save(tmp_path / "mask.png")
    edited, _ = edit(pipeline_folder, picture, "--mask", tmp_path / "mask.png")
    assert changed(np.asarray(Image.open(picture)), edited) == [[False, True], [False, False]]


def test_surroundings_of_a_smaller_image_are_drawn(pipeline_folder: Path, picture: Path) -> None:
    small = np.asarray(Image.open(picture))[:8, :8]
    Image.fromarray(small).save(picture)
    edited, _ = edit(pipeline_folder, picture, "--place", 8, 0)
    assert np.array_equal(edited[:6, 10:], small[:6, 2:])
    assert not np.array_equal(edited[:8, 8:], small)  # its border blends with what surrounds it
    assert edited.shape == (16, 16, 3)


def test_each_version_has_its_own_seed(pipeline_folder: Path, picture: Path) -> None:
    sheet, _ = edit(pipeline_folder, picture, *BOX, "--count", 3, "--seed", 5)
    second, _ = edit(pipeline_folder, picture, *BOX, "--seed", 6)
    assert sheet.shape == (16 * 21, 3 * 16 * 21, 3)  # one row, every pixel 21 times
    sheet = sheet[::21, ::21]
    assert np.abs(sheet[:16, 16:32].astype(int) - second).max() <= 1
    assert (sheet[:16, :16] != second).any()


def test_a_larger_image_is_scaled_with_its_mask(pipeline_folder: Path, picture: Path, tmp_path: Path) -> None:
    large = np.asarray(Image.open(picture)).repeat(4, axis=0).repeat(4, axis=1)
    Image.fromarray(large).save(picture)
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:30, 34:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    edited, _ = edit(pipeline_folder, picture, "--mask", tmp_path / "mask.png")
    assert changed(large[::4, ::4], edited) == [[False, True], [False, False]]


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 64)])
def test_thin_stroke_redraws_its_tokens_at_any_size_of_the_mask(
    size: tuple[int, int], pipeline_folder: Path, picture: Path, tmp_path: Path
) -> None:
    Image.open(picture).resize((size[1], size[0]), 0).save(picture)
    mask = np.zeros(size, dtype=np.uint8)
    mask[size[0] // 2 + 5, size[1] // 2 - 7 : size[1] // 2 - 3] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    edited, _ = edit(pipeline_folder, picture, "--mask", tmp_path / "mask.png")
    scaled = np.asarray(center_crop(Image.open(picture), 16))
    assert changed(scaled, edited) == [[False, False], [True, False]]


@pytest.mark.parametrize("tokens", [(2, 4), (4, 2)])
def test_image_and_mask_are_cropped_to_the_proportions_of_the_model(
    tokens: tuple[int, int], pipeline_folder: Path, picture: Path, tmp_path: Path
) -> None:
    source, (rows, columns) = Pipeline.from_pretrained(pipeline_folder), tokens
    model = FAR(ModelConfig(NETWORK, 3, 2, (2 * rows, 2 * columns)))
    defaults = SamplingConfig(ar_steps=4, head_steps=2)
    Pipeline(model, source.autoencoder, source.classes, defaults).save_pretrained(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels.repeat(2, axis=0).repeat(2, axis=1)).save(picture)
    top, left = 16 - 4 * rows, 16 - 4 * columns
    cropped = pixels[top : 32 - top, left : 32 - left]
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[2 * (top + 12), 2 * (left + 4)] = 255  # within the second row's first token
    mask[:8, :8] = 255  # cropped away
    Image.fromarray(mask).save(tmp_path / "mask.png")
    edited, _ = edit(tmp_path / "model", picture, "--mask", tmp_path / "mask.png")
    expected = [[(row, column) == (1, 0) for column in range(columns)] for row in range(rows)]
    assert changed(cropped, edited) == expected


def test_kept_tokens_are_decoded_without_pasting(pipeline_folder: Path, picture: Path) -> None:
    edited, _ = edit(pipeline_folder, picture, *BOX, "--no-paste")
    assert changed(np.asarray(Image.open(picture)), edited) == [[True, True], [True, True]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "--redraw"),
        ([*BOX, "--keep", "0", "0", "8", "8"], "--keep"),
        (["--redraw", "0", "0", "17", "8"], "17"),
        (["--redraw", "0", "0", "16", "16"], "mask"),
        (["--place", "0", "1"], "0 1"),
        (["--mask", "absent.png"], "absent.png"),
        ([*BOX, "--count", "0"], "--count 0"),
        ([*BOX, "--count", str(10**12)], str(10**12)),
        ([*BOX, "--out", "edited.jpg"], "edited.jpg"),
        ([*BOX, "--ar-steps", "2"], "ar_steps 2"),
        ([*BOX, "--label", "hexagon"], "hexagon"),
    ],
)
def test_bad_input_is_one_line(
    pipeline_folder: Path, picture: Path, options: list[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    out = picture.with_name("edited.png")
    base = ["edit", str(picture), "--weights", str(pipeline_folder), "--label", "square", "--out", str(out)]
    assert main([*base, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert not out.exists()


def one_line(capsys: pytest.CaptureFixture) -> str:
    """Return the printed error, which must be one line."""
    line, *others = [line for line in capsys.readouterr().err.splitlines() if line.startswith("far: error")]
    assert not others
    return line


def test_error_of_an_unsuitable_size_names_the_image_or_the_mask(
    pipeline_folder: Path, picture: Path, capsys: pytest.CaptureFixture
) -> None:
    mask = picture.with_name("mask.png")
    Image.new("L", (15, 16), 255).save(mask)
    base = ["edit", str(picture), "--weights", str(pipeline_folder), "--label", "square"]
    assert main([*base, "--mask", str(mask)]) == 2
    assert str(mask) in one_line(capsys)
    Image.new("RGB", (9, 12)).save(picture)
    assert main([*base, *BOX]) == 2
    assert str(picture) in one_line(capsys)


def test_edit_by_a_block_causal_model_does_not_depend_on_its_cache(
    block_causal_diffusion_folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = ["--redraw", 0, 4, 8, 12]  # the left two of four tokens, which are not next to each other in raster
    cached, text = edit(block_causal_diffusion_folder, picture, *box, "--order", "raster")
    assert changed(np.asarray(Image.open(picture)), cached) == [[True, False], [True, False]]
    assert text["ar_steps"] == "2"
    monkeypatch.setattr(BlockCausalBackbone, "new_cache", lambda self, rows: None)
    plain, _ = edit(block_causal_diffusion_folder, picture, *box, "--order", "raster")
    assert np.abs(cached.astype(int) - plain).max() <= 1


def test_causal_model_rejects_an_edit_in_the_middle(
    causal_diffusion_folder: Path, picture: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["edit", str(picture), "--weights", str(causal_diffusion_folder), "--label", "square", *BOX]
    assert main(arguments) == 2
    assert "causal" in one_line(capsys)
