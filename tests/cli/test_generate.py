"""`far generate`: the files it writes, and that images depend on seed and label alone."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import far
from far import kernels
from far.cli.main import main
from far.kernels import no_int8
from far.pipeline import Pipeline
from far.precision import resolve_dtype

integers = pytest.mark.skipif(
    no_int8() is not None, reason="this build of torch has no 8-bit matrix products"
)


def generate(pipeline_folder: Path, out: Path, *options: str) -> None:
    assert main(["generate", "--weights", str(pipeline_folder), "--out", str(out), *options]) == 0


def test_a_grid_a_folder_and_an_archive_hold_the_same_images(pipeline_folder: Path, tmp_path: Path) -> None:
    options = ["--count", "5", "--seed", "7", "--guidance", "3"]
    generate(pipeline_folder, tmp_path / "grid.png", *options)
    generate(pipeline_folder, tmp_path / "folder", *options)
    generate(pipeline_folder, tmp_path / "a.npz", *options, "--batch-size", "2")
    archive = np.load(tmp_path / "a.npz")
    assert archive["arr_0"].shape == (5, 16, 16, 3)
    assert archive["arr_0"].dtype == np.uint8
    assert archive["arr_1"].tolist() == [0, 0, 1, 1, 2]
    files = sorted((tmp_path / "folder").iterdir())
    assert [path.name for path in files] == [f"{index:06d}.png" for index in range(5)]
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    # Three classes in rows of two, one, and an empty place; every pixel 32 times.
    assert sheet.shape == (3 * 16 * 32, 2 * 16 * 32, 3)
    sheet = sheet[::32, ::32]
    for index, path in enumerate(files):
        pixels = np.asarray(Image.open(path)).astype(int)
        row, column = divmod(index, 2)
        assert np.array_equal(pixels, sheet[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16])
        # Other batch sizes may round the last bit otherwise.
        assert np.abs(pixels - archive["arr_0"][index]).max() <= 1
    assert len(np.unique(archive["arr_0"], axis=0)) == 5


def test_images_carry_their_settings(pipeline_folder: Path, tmp_path: Path) -> None:
    generate(
        pipeline_folder,
        tmp_path / "folder",
        "--labels",
        "square",
        "2",
        "--seed",
        "5",
        "--guidance",
        "2.5",
        "--head-steps",
        "1",
    )
    text = Image.open(tmp_path / "folder" / "000001.png").text
    assert text["seed"] == "6"
    assert text["label"] == "2"
    assert text["class"] == "stripes"
    assert text["guidance"] == "2.5"
    assert text["head_steps"] == "1"
    assert text["weights"] == str(pipeline_folder)


def test_the_written_settings_draw_the_image_again(pipeline_folder: Path, tmp_path: Path) -> None:
    generate(pipeline_folder, tmp_path / "folder", "--count", "6", "--seed", "3")
    picture = Image.open(tmp_path / "folder" / "000004.png")
    pipeline = far.load(pipeline_folder, dtype=picture.text["dtype"])
    (again,) = pipeline.generate([int(picture.text["label"])], seed=int(picture.text["seed"]))
    assert np.abs(np.asarray(again).astype(int) - np.asarray(picture)).max() <= 1


def test_animation_has_one_frame_per_step_and_ends_with_the_images(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    generate(
        pipeline_folder,
        tmp_path / "a.png",
        "--count",
        "2",
        "--ar-steps",
        "3",
        "--gif",
        str(tmp_path / "a.gif"),
    )
    animation = Image.open(tmp_path / "a.gif")
    assert animation.n_frames == 3
    first = np.asarray(animation.convert("RGB")).astype(int)
    animation.seek(2)
    last = np.asarray(animation.convert("RGB")).astype(int)
    final = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    assert (np.abs(first - 128).max(axis=-1) <= 4).mean() > 0.4  # gray before any token is known
    assert np.abs(last - final).mean() < 6  # a GIF has 256 colors
    assert np.abs(first - final).mean() > 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_dtype_draws_nearly_the_same_images(dtype: str, pipeline_folder: Path, tmp_path: Path) -> None:
    generate(pipeline_folder, tmp_path / "a.npz", "--count", "3", "--dtype", dtype)
    generate(pipeline_folder, tmp_path / "b.npz", "--count", "3")
    a, b = np.load(tmp_path / "a.npz")["arr_0"].astype(int), np.load(tmp_path / "b.npz")["arr_0"].astype(int)
    assert np.abs(a - b).mean() < 6


def test_python_interface_draws_the_images_of_the_command(pipeline_folder: Path) -> None:
    pipeline = far.load(pipeline_folder)
    pictures = pipeline.generate(labels=["square", 0], guidance=2.0, seed=0)
    tensor = pipeline.generate(labels=["square", 0], guidance=2.0, seed=[0, 1], output="tensor")
    assert [picture.size for picture in pictures] == [(16, 16)] * 2
    assert tensor.shape == (2, 3, 16, 16)
    assert 0 <= tensor.min() <= tensor.max() <= 1
    for picture, image in zip(pictures, tensor):
        assert np.array_equal(
            np.asarray(picture), (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        )
    with pytest.raises(far.InputError, match="seeds"):
        pipeline.generate(labels=[0, 1], seed=[1])


def test_saving_and_loading_again_gives_the_same_images(pipeline_folder: Path, tmp_path: Path) -> None:
    pipeline = far.load(pipeline_folder)
    pipeline.save_pretrained(tmp_path / "copy")
    again = far.load(tmp_path / "copy")
    assert (pipeline.draw([0, 1], [4, 5]) == again.draw([0, 1], [4, 5])).all()
    assert again.classes == pipeline.classes
    assert again.defaults == pipeline.defaults


@integers
def test_fast_equals_the_options_that_it_sets(pipeline_folder: Path, tmp_path: Path) -> None:
    options = ["--count", "2", "--guidance", "3"]
    generate(pipeline_folder, tmp_path / "fast.png", *options, "--fast")
    generate(
        pipeline_folder,
        tmp_path / "same.png",
        *options,
        "--refresh-every",
        "4",
        "--guidance-every",
        "4",
        "--dtype",
        "int8",
    )
    generate(pipeline_folder, tmp_path / "other.png", *options, "--fast", "--refresh-every", "1")
    fast, same, other = (Image.open(tmp_path / f"{name}.png") for name in ("fast", "same", "other"))
    assert np.array_equal(np.asarray(fast), np.asarray(same))
    assert fast.text == same.text
    assert (fast.text["refresh_every"], fast.text["guidance_every"]) == ("4", "4")
    assert (other.text["refresh_every"], other.text["guidance_every"]) == ("1", "4")


@integers
def test_png_names_the_dtype_of_weights_that_are_too_narrow_for_int8(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    generate(pipeline_folder, tmp_path / "a.png", "--count", "1", "--dtype", "int8")
    assert Image.open(tmp_path / "a.png").text["dtype"] == "float32"


@integers
def test_fast_changes_only_the_weights_of_a_causal_model(tmp_path: Path) -> None:
    assert (
        main(
            [
                "generate",
                "--weights",
                "avatars-64-causal",
                "--labels",
                "1",
                "--fast",
                "--out",
                str(tmp_path / "a.png"),
            ]
        )
        == 0
    )
    text = Image.open(tmp_path / "a.png").text
    assert (text["refresh_every"], text["dtype"]) == ("1", "int8")


def test_fast_prints_one_line_if_int8_is_not_supported(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "int8_fault", lambda kernel: "8-bit products saturate")
    generate(pipeline_folder, tmp_path / "a.png", "--count", "1", "--fast")
    assert Image.open(tmp_path / "a.png").text["dtype"] == resolve_dtype("auto", "cpu")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "--fast" in line]
    assert "8-bit products saturate" in line


def refused(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["generate", *map(str, arguments)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("far: error: ")
    return error


def test_folder_of_an_earlier_run_is_rejected_or_replaced_but_never_mixed(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    generate(pipeline_folder, out, "--labels", "circle", "--count", "4")
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert str(out) in refused(["--weights", pipeline_folder, "--labels", "square", "--out", out], capsys)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    generate(pipeline_folder, out, "--labels", "square", "--count", "2", "--overwrite")
    assert sorted(path.name for path in out.iterdir()) == ["000000.png", "000001.png", "notes.txt"]
    assert {Image.open(path).text["class"] for path in out.glob("*.png")} == {"square"}
    Image.new("RGB", (16, 16)).save(out / "mine.jpg")
    for more in ([], ["--overwrite"]):
        assert "mine.jpg" in refused(["--weights", pipeline_folder, "--out", out, *more], capsys)
    assert len(list(out.iterdir())) == 4


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.webp", "a.gif", "a.tif"])
def test_name_of_another_image_format_does_not_become_a_folder(
    name: str, pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert name in refused(["--weights", pipeline_folder, "--out", tmp_path / name], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.png", "a.mp4", "a"])
def test_animation_needs_a_name_that_ends_in_gif(
    name: str, pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert name in refused(
        ["--weights", pipeline_folder, "--out", tmp_path / "a.png", "--gif", tmp_path / name], capsys
    )
    assert not list(tmp_path.iterdir())


def test_failed_run_does_not_change_the_folder(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = Pipeline.decode, []

    def broken_later(self: Pipeline, latents: torch.Tensor) -> torch.Tensor:
        calls.append(len(latents))
        return decode(self, latents * (float("nan") if len(calls) == 2 else 1))

    out = tmp_path / "out"
    generate(pipeline_folder, out, "--count", "3")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(Pipeline, "decode", broken_later)
    for target in (out, tmp_path / "new", tmp_path / "a.npz", tmp_path / "a.png"):
        calls.clear()
        options = ["--count", 6, "--seed", 9, "--batch-size", 3, "--overwrite"]
        refused(["--weights", pipeline_folder, "--out", target, *options], capsys)
        assert len(calls) == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("names", [["0", "1", "2"], ["1", "2", "3"], ["2", "0", "1"], ["01", "02", "x"]])
def test_label_of_a_png_draws_its_class_again(
    pipeline_folder: Path, tmp_path: Path, names: list[str]
) -> None:
    pipeline = far.load(pipeline_folder)
    pipeline.classes = names
    pipeline.save_pretrained(tmp_path / "model")
    generate(tmp_path / "model", tmp_path / "all")
    for number, name in enumerate(names):
        first = Image.open(tmp_path / "all" / f"{number:06d}.png")
        assert first.text["class"] == name
        out = tmp_path / f"again-{number}"
        generate(tmp_path / "model", out, "--labels", first.text["label"], "--seed", str(number))
        again = Image.open(out / "000000.png")
        assert again.text["class"] == name
        assert np.abs(np.asarray(first).astype(int) - np.asarray(again)).max() <= 1


def test_class_named_all_can_be_drawn_alone(pipeline_folder: Path, tmp_path: Path) -> None:
    pipeline = far.load(pipeline_folder)
    pipeline.classes = ["one", "all", "three"]
    pipeline.save_pretrained(tmp_path / "model")
    generate(tmp_path / "model", tmp_path / "out", "--labels", "all")
    assert [Image.open(path).text["class"] for path in (tmp_path / "out").iterdir()] == ["all"]
    generate(tmp_path / "model", tmp_path / "every")
    assert len(list((tmp_path / "every").iterdir())) == 3


@pytest.mark.parametrize("out", ["a.png", "a.npz", "a"])
def test_interruption_keeps_finished_images_and_prints_a_command_for_the_others(
    out: str,
    pipeline_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--labels", "2", "0", "--count", "6", "--seed", "5", "--batch-size", "2", "--dtype", "float32"]
    generate(pipeline_folder, tmp_path / "whole.npz", *options)
    draw, calls = Pipeline.draw, []

    def interrupted(*arguments, **named):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*arguments, **named)

    monkeypatch.setattr(Pipeline, "draw", interrupted)
    command = ["generate", "--weights", str(pipeline_folder), "--out", str(tmp_path / out), *options]
    assert main(command) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert "4 of 6 images" in line
    (rest,) = printed_commands(line)
    monkeypatch.setattr(Pipeline, "draw", draw)
    assert main(rest) == 0
    whole = np.load(tmp_path / "whole.npz")
    assert np.array_equal(written(Path(rest[rest.index("--out") + 1]), 2, 2), whole["arr_0"][4:])
    assert np.array_equal(written(tmp_path / out, 4, 3), whole["arr_0"][:4])


def printed_commands(line: str) -> list[list[str]]:
    """Return the arguments of each ``far`` command at the end of a line."""
    words = shlex.split(line[line.index("far generate") :])
    ends = [place for place, word in enumerate(words) if word == "&&"]
    return [
        words[start + 1 : end] for start, end in zip([0, *(end + 1 for end in ends)], [*ends, len(words)])
    ]


@pytest.mark.parametrize("labels", [[], ["1", "0", "0", "2"], ["2", "1", "2"]])
def test_printed_commands_draw_exactly_the_other_images(
    labels: list[str],
    pipeline_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drawn: list[tuple[int, int]] = []
    interruptions = [20]

    def draw(self, chunk, seeds, config, **options):  # type: ignore[no-untyped-def]
        if len(drawn) in interruptions:
            raise KeyboardInterrupt
        assert config.guidance == 2
        drawn.extend(zip(chunk, seeds))
        return torch.zeros(len(chunk), 3, 16, 16)

    monkeypatch.setattr(Pipeline, "draw", draw)
    command = ["generate", "--weights", str(pipeline_folder), "--count", "150", "--batch-size", "10"]
    command += [
        "--guidance",
        "2",
        "--out",
        str(tmp_path / "a.npz"),
        *(["--labels", *labels] if labels else []),
    ]
    assert main(command) == 130
    interruptions.clear()
    for command in printed_commands(capsys.readouterr().err.splitlines()[-1]):
        assert main(command) == 0
    expected = [(label, number) for number, label in enumerate(spread(labels or ["0", "1", "2"], 150))]
    assert drawn == expected


def spread(labels: list[str], count: int) -> list[int]:
    """Return ``count`` labels, each equally often."""
    parts = np.array_split(np.arange(count), len(labels))
    return [int(label) for label, part in zip(labels, parts) for _ in part]


def test_interruption_during_writing_keeps_whole_batches(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    save = far.pictures.save_png

    def interrupted(picture: Image.Image, path: Path, *settings: object) -> None:
        save(picture, path, *settings)
        if path.name == "000004.png":
            raise KeyboardInterrupt

    monkeypatch.setattr(far.pictures, "save_png", interrupted)
    out = tmp_path / "out"
    assert (
        main(
            [
                "generate",
                "--weights",
                str(pipeline_folder),
                "--count",
                "6",
                "--batch-size",
                "3",
                "--out",
                str(out),
            ]
        )
        == 130
    )
    assert "3 of 6 images" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["000000.png", "000001.png", "000002.png"]


def written(path: Path, count: int, columns: int) -> np.ndarray:
    """Return the first ``count`` images of a folder, an archive, or a contact sheet of so many columns."""
    if path.suffix == ".npz":
        return np.load(path)["arr_0"]
    if path.is_dir():
        return np.stack([np.asarray(Image.open(file)) for file in sorted(path.iterdir())])
    sheet = np.asarray(Image.open(path))
    factor = sheet.shape[1] // (16 * columns)
    sheet = sheet[::factor, ::factor]
    corners = [(16 * (number // columns), 16 * (number % columns)) for number in range(count)]
    return np.stack([sheet[top : top + 16, left : left + 16] for top, left in corners])
