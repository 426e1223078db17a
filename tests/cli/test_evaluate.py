"""``far evaluate`` end to end: models, folders and .npz files against references, and invalid input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sources import read_image
from PIL import Image

import far
from far.cli.main import main
from far.evaluation.features import load_feature_network
from far.evaluation.images import open_images
from far.evaluation.metrics import FeatureStatistics, frechet_distance
from far.files import sole_use


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight images in two classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        path = tmp_path / "pictures" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "pictures"


def evaluate(tmp_path: Path, *arguments: object) -> dict:
    assert (
        main(
            [
                "evaluate",
                "--out",
                str(tmp_path / "out"),
                "--cache",
                str(tmp_path / "cache"),
                *map(str, arguments),
            ]
        )
        == 0
    )
    return json.loads((tmp_path / "out" / "result.json").read_text())


@pytest.mark.parametrize(
    "options", [["--ar-steps", 2], ["--order", "halton", "--ar-steps", 3, "--guidance", 1]]
)
def test_block_causal_model_is_evaluated_in_fewer_steps_than_tokens(
    options: list[Any], block_causal_diffusion_folder: Path, image_set: Path, tmp_path: Path
) -> None:
    """Its images are those that the pipeline draws with the same values."""
    weights, saved = block_causal_diffusion_folder, tmp_path / "samples.npz"
    settings = [
        "--reference",
        image_set,
        "--count",
        6,
        "--seed",
        5,
        "--dtype",
        "float32",
        "--save-npz",
        saved,
    ]
    result = evaluate(tmp_path, "--weights", weights, *settings, *options)
    names = [name.removeprefix("--").replace("-", "_") for name in options[::2]]
    sampling = dict(zip(names, options[1::2], strict=True))
    assert sampling.items() <= result["evaluated"]["sampling"].items()
    pipeline, seeds = far.load(weights), [5 * 2**32 + number for number in range(6)]
    drawn = pipeline.draw([0, 1, 2] * 2, seeds, pipeline.sampling_config(**sampling))
    pixels = torch.from_numpy(np.load(saved)["arr_0"]).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(pixels, drawn, rtol=0, atol=0.6 / 255)


def test_result_of_a_model_has_figures_settings_and_checksums(
    tmp_path: Path, pipeline_folder: Path, image_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--reference", image_set, "--count", 9, "--head-steps", 1, "--seed", 5]
    result = evaluate(
        tmp_path, "--weights", pipeline_folder, *settings, "--save-npz", tmp_path / "samples.npz"
    )
    output = capsys.readouterr()
    assert "FD (EfficientNet-Lite0)" in output.out
    assert result["figures"]["floor of FD (EfficientNet-Lite0)"] > 0
    # The control's score is next to the model's.
    (line,) = (line for line in output.out.splitlines() if line.startswith("coverage"))
    assert f"flat colors {result['controls']['flat colors']['coverage']:.4f}" in line
    assert "far: warning: 9 images are fewer than the 1280 features" in output.err
    assert result["evaluated"]["count"] == 9
    assert result["evaluated"]["sampling"]["head_steps"] == 1
    assert result["evaluated"]["seed"] == 5 * 2**32
    assert set(result["evaluated"]["sha256"]) == {
        "config.json",
        "model.safetensors",
        "autoencoder.safetensors",
    }
    assert result["reference"]["count"] == 12
    assert result["extractor"] == "EfficientNet-Lite0"
    assert len(result["extractor sha256"]) == 64
    assert result["evaluated"]["size"] == result["reference"]["size"] == [16, 16]
    assert not list((tmp_path / "out").glob("parts-*")), "parts are left behind"
    # The saved images, evaluated as a file, give the same figures.
    with np.load(tmp_path / "samples.npz") as saved:
        assert saved["arr_0"].shape == (9, 16, 16, 3)
        assert saved["arr_1"].tolist() == [0, 1, 2] * 3
    again = evaluate(tmp_path, "--npz", tmp_path / "samples.npz", "--reference", image_set, "--seed", 5)
    assert again["figures"] == pytest.approx(result["figures"])


def test_evaluations_of_two_seeds_share_no_image(
    tmp_path: Path, pipeline_folder: Path, image_set: Path
) -> None:
    found = {}
    for seed in (0, 1):
        saved = tmp_path / f"{seed}.npz"
        evaluate(
            tmp_path,
            "--weights",
            pipeline_folder,
            "--reference",
            image_set,
            "--count",
            9,
            "--seed",
            seed,
            "--save-npz",
            saved,
        )
        with np.load(saved) as arrays:
            found[seed] = arrays["arr_0"]
    distances = np.abs(found[0][:, None].astype(int) - found[1][None]).mean(axis=(2, 3, 4))
    assert distances.min() > 1, "an image of --seed 1 is one of --seed 0"
    # The documented seeds, as far generate takes them.
    command = [
        "generate",
        "--weights",
        str(pipeline_folder),
        "--dtype",
        "float32",
        "--count",
        "3",
        "--seed",
        str(2**32),
    ]
    assert main([*command, "--out", str(tmp_path / "drawn.npz")]) == 0
    with np.load(tmp_path / "drawn.npz") as drawn:
        assert np.abs(drawn["arr_0"].astype(int) - found[1][:3]).max() <= 1


@pytest.mark.parametrize(
    ("options", "name", "title"),
    [
        ((), "efficientnet-lite0", "EfficientNet-Lite0"),
        (("--features", "efficientnet-lite2"), "efficientnet-lite2", "EfficientNet-Lite2"),
    ],
)
def test_distance_equals_that_of_the_features(
    options: tuple[str, ...], name: str, title: str, tmp_path: Path, folder: Path, image_set: Path
) -> None:
    result = evaluate(tmp_path, "--images", folder, "--reference", image_set, *options)
    network = load_feature_network(name)
    with torch.no_grad():
        sets = [
            network(open_images(path).tensor(range(count))) for path, count in ((folder, 8), (image_set, 12))
        ]
    expected = frechet_distance(*(FeatureStatistics.of(features) for features in sets))
    assert result["figures"][f"FD ({title})"] == pytest.approx(expected, rel=1e-6)
    assert (result["extractor"], result["extractor sha256"]) == (title, network.digest)
    assert result["evaluated"]["digest"].startswith("folder-")


def test_saved_statistics_serve_as_a_reference(tmp_path: Path, folder: Path, image_set: Path) -> None:
    cache = ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    assert (
        main(
            [
                "evaluate",
                "--images",
                str(image_set),
                "--save-statistics",
                str(tmp_path / "held-out.npz"),
                *cache,
            ]
        )
        == 0
    )
    direct = evaluate(tmp_path, "--images", folder, "--reference", image_set)
    saved = evaluate(tmp_path, "--images", folder, "--reference", tmp_path / "held-out.npz")
    assert saved["figures"] == pytest.approx(direct["figures"])


def test_other_size_of_the_reference_is_a_warning(
    tmp_path: Path, image_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(
        tmp_path / "larger.npz",
        arr_0=np.random.default_rng(0).integers(0, 256, (5, 20, 24, 3), dtype=np.uint8),
    )
    evaluate(tmp_path, "--npz", tmp_path / "larger.npz", "--reference", image_set)
    assert "24×20 and 16×16 pixels" in capsys.readouterr().err


def test_other_class_names_of_the_reference_are_a_warning(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = shutil.copytree(folder, tmp_path / "reference")
    (reference / "b").rename(reference / "oval")
    (warning,) = (
        text
        for text in evaluate(tmp_path, "--images", folder, "--reference", reference)["warnings"]
        if "oval" in text
    )
    assert warning in capsys.readouterr().err


def test_evaluation_reads_a_folder_as_far_data_does(tmp_path: Path) -> None:
    """Transparent, 16-bit and rotated images of a folder are those of the image set made from it."""
    generator = np.random.default_rng(0)
    for index in range(4):
        path = tmp_path / "pictures" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 4), dtype=np.uint8), "RGBA").save(path)
    Image.fromarray(generator.integers(0, 65536, (16, 16), dtype=np.uint16)).save(
        tmp_path / "pictures" / "a" / "deep.png"
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
        tmp_path / "pictures" / "b" / "turned.png", exif=exif
    )
    folder = open_images(tmp_path / "pictures")
    for index, file in enumerate(["a/0.png", "b/1.png", "a/2.png", "b/3.png", "a/deep.png", "b/turned.png"]):
        np.testing.assert_array_equal(
            folder.read(range(index, index + 1))[0], read_image(tmp_path / "pictures" / file, 16)
        )


@pytest.fixture(scope="module")
def whole_evaluation(
    tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path, image_set: Path
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of an evaluation in three parts, and its result from one process without an interruption."""
    settings = ["--weights", pipeline_folder, "--reference", image_set, "--count", 230]
    settings += ["--head-steps", 1, "--ar-steps", 1]
    return settings, evaluate(tmp_path_factory.mktemp("whole"), *settings)


def test_interrupted_generation_continues(
    tmp_path: Path,
    whole_evaluation: tuple[list[Any], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from far.pipeline import Pipeline

    settings, whole = whole_evaluation
    drawn: list[int] = []
    draw = Pipeline.draw

    def interrupted(self, labels, seeds, config, **options):  # type: ignore[no-untyped-def]
        drawn.append(len(labels))
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw(self, labels, seeds, config, **options)

    monkeypatch.setattr(Pipeline, "draw", interrupted)
    out = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert main(["evaluate", *map(str, settings), *out]) == 130
    assert "interrupted" in capsys.readouterr().err
    resumed = evaluate(tmp_path, *settings)
    assert drawn == [100, 100, 100, 30], "the first part was drawn again, or one was left out"
    assert resumed["figures"] == pytest.approx(whole["figures"])


def test_folder_of_another_running_command_is_refused(
    tmp_path: Path, folder: Path, image_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["evaluate", "--images", folder, "--reference", image_set, "--out", out]
    with sole_use(out):
        assert main([*map(str, command), "--cache", str(tmp_path / "cache")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("far: error:")
    assert str(out) in error
    assert not out.exists()


def test_two_processes_give_the_figures_of_one(
    tmp_path: Path, whole_evaluation: tuple[list[Any], dict[str, Any]]
) -> None:
    settings, single = whole_evaluation
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "-m",
        "far",
        "evaluate",
        *settings,
    ]
    out = ["--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*map(str, command), *map(str, out)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["evaluated"]["processes"] == 2
    assert result["figures"] == pytest.approx(single["figures"], rel=1e-3)


def test_files_that_are_not_images_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    generator = np.random.default_rng(0)
    for folder, others in (("judged", (".hidden.png", "a.gif")), ("reference", ("b.bmp",))):
        (tmp_path / folder).mkdir()
        for index in range(8):
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
                tmp_path / folder / f"{index}.png"
            )
        for name in others:
            (tmp_path / folder / name).touch()
    given = [
        "--images",
        tmp_path / "judged",
        "--reference",
        tmp_path / "reference",
        "--out",
        tmp_path / "out",
        "--cache",
        tmp_path / "cache",
    ]
    assert main(["evaluate", *map(str, given)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert all(count in last for count in ("1 hidden", "1 .gif", "1 .bmp"))
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["evaluated"]["left out"] == {"hidden": 1, ".gif": 1}
    assert result["reference"]["left out"] == {".bmp": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "{model}"], "--reference"),
        (["--reference", "{images}"], "--images"),
        (["--weights", "{model}", "--npz", "a.npz", "--reference", "{images}"], "--npz"),
        (["--images", "{images}", "--reference", "{images}", "--guidance", "2"], "--guidance"),
        (["--images", "{images}", "--reference", "{images}", "--save-npz", "x.npz"], "--save-npz"),
        (["--images", "{images}", "--reference", "{images}", "--count", "99"], "12"),
        (["--weights", "{model}", "--reference", "{images}", "--count", "2"], "count 2"),
        (["--weights", "{model}", "--reference", "{images}", "--count", "0"], "--count 0"),
        (["--weights", "{model}", "--reference", "{images}", "--batch-size", "0"], "--batch-size 0"),
        (["--weights", "{model}", "--reference", "none"], "none"),
        (["--weights", "none", "--reference", "{images}"], "'none'"),
        (["--weights", "{model}", "--reference", "{images}", "--inception", "none.pth"], "none.pth"),
        (["--images", "{mixed}", "--reference", "{images}"], "z.png"),
        (["--images", "{corrupt}", "--reference", "{images}"], "a/0.png"),
        (["--images", "{empty}", "--reference", "{images}"], "/c "),
        (["--images", "{images}", "--reference", "{three}"], "3"),
        (["--weights", "{model}", "--reference", "{three}"], "10000"),
        (["--weights", "{model}", "--reference", "{images}", "--count", "3"], "3"),
        (["--weights", "{model}", "--reference", "{images}", "--seed", "-1"], "--seed -1"),
        (
            ["--images", "{images}", "--reference", "{images}", "--seed", str(10**25)],
            "--seed 10000000000000000000000000",
        ),
        (["--weights", "{model}", "--reference", "{images}", "--seed", str(2**31)], f"--seed {2**31}"),
        (["--weights", "{model}", "--reference", "{images}", "--device", "nowhere"], "device 'nowhere'"),
        (["--images", "{images}", "--save-statistics", "statistics"], "statistics"),
        (["--weights", "{model}", "--reference", "{images}", "--save-npz", "x.npy"], "x.npy"),
        (["--weights", "{model}", "--save-npz", "x.npz", "--save-statistics", "./x.npz"], "x.npz"),
        (["--npz", "{three}", "--save-statistics", "{three}"], "three.npz"),
        (["--weights", "{model}", "--reference", "{three}", "--save-npz", "{three}"], "three.npz"),
        (["--images", "{images}", "--reference", "{file}"], "1.png"),
        (["--npz", "{cut}", "--reference", "{images}"], "cut.npz"),
        (["--npz", "{flipped}", "--reference", "{images}"], "flipped.npz"),
        (["--npz", "{packed}", "--reference", "{images}"], "packed.npz"),
        (["--npz", "{pickled}", "--reference", "{images}"], "pickled.npz"),
        (["--images", "{images}", "--reference", "{nan}"], "nan.npz"),
        (["--images", "{images}", "--reference", "{foreign}"], "foreign.npz"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    folder: Path,
    pipeline_folder: Path,
    image_set: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "{mixed}" in arguments:
        Image.new("RGB", (5, 5)).save(folder / "b" / "z.png")
    if "{corrupt}" in arguments:
        (folder / "a" / "0.png").write_bytes(b"not a picture")
    if "{empty}" in arguments:
        (folder / "c").mkdir()
    np.savez(tmp_path / "three.npz", arr_0=np.zeros((3, 16, 16, 3), np.uint8))
    network = np.array("EfficientNet-Lite0")
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(1280), sigma=np.eye(1280), extractor=np.array("Other"))
    np.savez(
        tmp_path / "nan.npz",
        mu=np.zeros(1280),
        sigma=np.eye(1280),
        extractor=network,
        features=np.full((9, 1280), np.nan),
    )
    np.savez(tmp_path / "pickled.npz", arr_0=np.array([{}], dtype=object))
    whole = (tmp_path / "three.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:1000])
    (tmp_path / "flipped.npz").write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    np.savez_compressed(
        tmp_path / "packed.npz",
        arr_0=np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8),
    )
    packed = (tmp_path / "packed.npz").read_bytes()
    (tmp_path / "packed.npz").write_bytes(packed[:200] + bytes(200) + packed[400:])
    places = {
        "model": pipeline_folder, "images": image_set, "mixed": folder, "corrupt": folder, "empty": folder,
        "file": folder / "b" / "1.png",
        **{path.stem: path for path in tmp_path.glob("*.npz")},
    }  # fmt: skip
    given = [argument.format(**places) for argument in arguments]
    assert main(["evaluate", *given, "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("far: error:")
    assert message in error
    assert not (tmp_path / "out").exists(), "a folder is left behind"
