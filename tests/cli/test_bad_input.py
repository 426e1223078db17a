"""Every bad input ends in one line that names it and its remedy, exit status 2, and nothing half-written."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from far.autoencoder import Autoencoder, AutoencoderConfig
from far.cli.main import main
from far.folder import save_autoencoder
from far.heads import Head
from far.heads.shortcut import ShortcutHead
from far.pipeline import Pipeline
from far.training.checkpoint import save_checkpoint


def refused(capsys: pytest.CaptureFixture, arguments: list, *expected: str) -> str:
    """Run ``far``; it must exit with 2 and print exactly one line that contains ``expected``."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("far:") or "Traceback" in line
    ]
    assert len(lines) == 1, lines
    assert lines[0].startswith("far: error: ")
    for text in expected:
        assert text in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--labels", "hexagon"], ["'hexagon'", "circle"]),
        (["--labels", "3"], ["label 3"]),
        (["--labels", "-1"], ["label -1"]),
        (["--count", "0"], ["--count 0"]),
        (["--count", "-4"], ["--count -4"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--head-steps", "0"], ["head_steps 0", "1 to 128"]),
        (["--head-steps", "-2"], ["head_steps -2", "1 to 128"]),
        (["--head-steps", "129"], ["head_steps 129", "1 to 128"]),
        (["--head-steps", "2.5"], ["2.5", "--head-steps"]),
        (["--head-steps", "4", "2", "1"], ["head_steps [4, 2, 1]"]),
        (["--ar-steps", "0"], ["ar_steps 0", "1 to 4"]),
        (["--ar-steps", "5"], ["ar_steps 5", "1 to 4"]),
        (["--guidance", "nan"], ["guidance", "nan"]),
        (["--guidance", "-1"], ["guidance -1"]),
        (["--guidance-interval", "0.9", "0.1"], ["guidance_interval"]),
        (["--temperature", "0"], ["temperature 0"]),
        (["--seed", "-1"], ["-1"]),
        (["--device", "nonsense"], ["nonsense"]),
        (["--dtype", "int3"], ["int3", "bfloat16"]),
        (["--gudance", "2"], ["--gudance", "--guidance"]),
    ],
)
def test_generate_rejects_bad_values(
    options: list[str],
    expected: list[str],
    pipeline_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "out.png"
    refused(capsys, ["generate", "--weights", pipeline_folder, "--out", out, *options], *expected)
    assert list(tmp_path.iterdir()) == []


def test_generate_rejects_unknown_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    refused(
        capsys,
        ["generate", "--weights", "no-such-model", "--out", tmp_path / "a.png"],
        "'no-such-model'",
        "bundled",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.png", "a.npz", "folder"])
def test_generate_rejects_an_unwritable_path_before_it_starts(
    name: str, pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    # Nobody can write into a file instead of a folder, not even root included.
    (tmp_path / "file").write_text("kept")
    refused(
        capsys,
        ["generate", "--weights", pipeline_folder, "--out", tmp_path / "file" / name],
        str(tmp_path / "file" / name),
    )
    assert (tmp_path / "file").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_generate_rejects_a_folder_with_the_name_of_an_image(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.png").mkdir()
    refused(
        capsys,
        ["generate", "--weights", pipeline_folder, "--out", tmp_path / "a.png"],
        str(tmp_path / "a.png"),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("file", ["model.safetensors", "autoencoder.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "garbage"])
def test_generate_rejects_damaged_weights(
    file: str, damage: str, pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in pipeline_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = (folder / file).read_bytes()
    if damage == "missing":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content[: len(content) // 2] if damage == "cut" else b"\x80\x02garbage")
    refused(capsys, ["generate", "--weights", folder, "--out", tmp_path / "a.png"], file)
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--models", "mar-c"], ["'mar-c'", "mar-b", "avatars-64"]),
        (["--models", "mar-b", "--head-steps", "0"], ["head_steps 0", "1 to 1000"]),
        (["--models", "mar-b", "far-b", "--head-steps", "129"], ["head_steps 129", "1 to 128"]),
        (["--models", "mar-b", "--ar-steps", "257"], ["ar_steps 257", "1 to 256"]),
        (["--models", "mar-b", "--dtypes", "int3"], ["int3", "bfloat16"]),
        (["--models", "mar-b", "--device", "nonsense"], ["nonsense"]),
        (["--models", "mar-b", "--batch", "1", "0"], ["batch 0"]),
        (["--batch", "-1"], ["batch -1"]),
        (["--guidance", "nan"], ["guidance", "nan"]),
        (["--rounds", "0"], ["--rounds 0"]),
        (["--head-steps", "4"], ["--head-steps", "--models"]),
        (["--plot", "a.jpg"], ["a.jpg", ".png"]),
        (["--json", "file/a.json"], ["file/a.json"]),
    ],
)
def test_benchmark_rejects_bad_values_before_it_starts(
    options: list[str],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr("far.benchmark.results.read_bandwidth", lambda device: pytest.fail("it started"))
    refused(capsys, ["benchmark", *options], *expected)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_benchmark_names_the_package_that_a_plot_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(capsys, ["benchmark", "--plot", "a.png"], "matplotlib", "pip install")


def test_error_of_a_misspelled_recipe_key_names_the_right_key(
    recipe: Path, capsys: pytest.CaptureFixture
) -> None:
    refused(
        capsys, ["train", recipe, "generator.training.learning_rat=0.1"], "'learning_rat'", "'learning_rate'"
    )
    recipe.write_text(
        recipe.read_text().replace("label_drop", "label_drp").replace("generator:", "generatr:")
    )
    refused(capsys, ["train", recipe], "'generatr'", "'generator'", str(recipe))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("generator.training.steps=many", "steps"),
        ("generator.training.steps=0", "steps 0"),
        ("generator.training.batch_size=-1", "batch_size -1"),
        ("generator.network.head.kind=gan", "'gan'"),
        ("generator.network.backbone.encoder_heads=3", "encoder_width 16"),
        ("generator.network.patch=3", "patch 3"),
        ("generator.label_drop=1.5", "label_drop 1.5"),
        ("generator.sampling.ar_steps=64", "ar_steps 64"),
        ("generator.training", "key=value"),
    ],
)
def test_train_rejects_bad_values(
    override: str, expected: str, recipe: Path, capsys: pytest.CaptureFixture
) -> None:
    refused(capsys, ["train", recipe, override], expected)
    assert not (recipe.parent / "run" / "model").exists()


def test_train_rejects_a_missing_recipe_and_one_that_is_not_yaml(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    refused(capsys, ["train", tmp_path / "none.yaml"], "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,")
    refused(capsys, ["train", tmp_path / "broken.yaml"], "broken.yaml", "YAML")


def test_train_rejects_the_cache_of_another_autoencoder(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.manual_seed(1)
    config = AutoencoderConfig(
        width=8, width_multipliers=(1, 1, 2), blocks=1, latent_channels=2, norm_groups=4, scale=2.0
    )
    save_autoencoder(Autoencoder(config), tmp_path / "other")
    refused(capsys, ["train", recipe, f"autoencoder_from={tmp_path / 'other'}"], "fingerprint", "far cache")


def test_error_of_a_missing_cache_names_the_command(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    refused(capsys, ["train", recipe, f"run={tmp_path / 'elsewhere'}"], "far cache")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["training.batch_size=100"], ["100", "64"]),
        (["trajectories.images=64"], ["trajectories.images 64"]),
        (["trajectories.images=0"], ["images 0"]),
        (["trajectories.max_guidance=1"], ["max_guidance 1"]),
        (["trajectories.label_drop=1.5"], ["label_drop 1.5"]),
        (["trajectories.token_limit=0"], ["token_limit 0"]),
        (["samples_per_token=0"], ["samples_per_token 0"]),
        (["adapter_rank=-1"], ["adapter_rank -1"]),
        (["training.step=5"], ["'step'", "'steps'"]),
        (["trajectory.images=128"], ["'trajectory'", "'trajectories'"]),
        (["128"], ["'128'", "key=value"]),
        (["--latents", "nowhere"], ["nowhere", "far cache"]),
        (["training.device=nonsense"], ["nonsense"]),
    ],
)
def test_distill_rejects_bad_values_before_it_starts(
    options: list[str],
    expected: list[str],
    pipeline_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    refused(capsys, ["distill", pipeline_folder, tmp_path / "out", *options], *expected)
    assert list(tmp_path.iterdir()) == []


def test_distill_rejects_unsuitable_teachers_and_folders(
    pipeline_folder: Path,
    latents_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr("far.training.trajectories.group_rows", lambda *arguments: pytest.fail("it started"))
    refused(capsys, ["distill", "no-such-model", tmp_path / "out"], "'no-such-model'", "bundled")
    refused(capsys, ["distill", pipeline_folder, pipeline_folder], str(pipeline_folder))
    teacher = Pipeline.from_pretrained(pipeline_folder)
    teacher.autoencoder = None
    teacher.save_pretrained(tmp_path / "bare")
    refused(capsys, ["distill", pipeline_folder, tmp_path / "bare"], str(tmp_path / "bare"))
    refused(
        capsys,
        ["distill", tmp_path / "bare", tmp_path / "out", "--latents", latents_folder],
        "far convert kl16",
    )
    with monkeypatch.context() as patch:
        patch.setattr(ShortcutHead, "velocity", Head.velocity)
        refused(capsys, ["distill", pipeline_folder, tmp_path / "out"], "shortcut")
    assert not (tmp_path / "out").exists()
    save_checkpoint(tmp_path / "out" / "checkpoints", 7, {}, {})
    refused(capsys, ["distill", pipeline_folder, tmp_path / "out"], "7", "--resume")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoints"]


def image(path: Path, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(len(str(path))).integers(
        0, 256, (size[1], size[0], channels), dtype=np.uint8
    )
    Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels, mode).save(path)


def test_data_rejects_a_folder_without_classes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    image(tmp_path / "photos" / "a.png")
    refused(
        capsys,
        ["data", "folder", tmp_path / "photos", tmp_path / "set", "--size", "16"],
        "photos",
        "subfolder",
    )
    refused(capsys, ["data", "folder", tmp_path / "nowhere", tmp_path / "set", "--size", "16"], "nowhere")
    assert not (tmp_path / "set").exists()


def test_data_rejects_a_class_with_one_image(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("cats/a.png", "cats/b.png", "dogs/a.png"):
        image(tmp_path / "photos" / name)
    refused(capsys, ["data", "folder", tmp_path / "photos", tmp_path / "set", "--size", "16"], "dogs")
    assert not (tmp_path / "set").exists()


def test_data_reads_gray_cmyk_and_alpha_and_names_unreadable_files(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    photos = tmp_path / "photos"
    image(photos / "a" / "gray.png", "L")
    image(photos / "a" / "alpha.png", "RGBA")
    image(photos / "a" / "cmyk.jpg", "CMYK")
    image(photos / "a" / "plain.webp")
    image(photos / "a" / "pixel.png", size=(1, 1))
    (photos / "a" / "text.png").write_text("no image")
    for name in ("x.png", "y.png", "z.png"):
        image(photos / "b" / name)
    assert main(["data", "folder", str(photos), str(tmp_path / "set"), "--size", "16"]) == 0
    captured = capsys.readouterr()
    assert "pixel.png" in captured.err
    assert "text.png" in captured.err
    assert re.search(r"\b2\b", captured.out), captured.out
    refused(capsys, ["data", "folder", photos, tmp_path / "strict", "--size", "16", "--strict"], ".png")


@pytest.mark.parametrize("size", ["0", "-8", "13"])
def test_data_rejects_impossible_sizes(size: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("a/x.png", "a/y.png"):
        image(tmp_path / "photos" / name)
    refused(capsys, ["data", "folder", tmp_path / "photos", tmp_path / "set", "--size", size], size)
    refused(capsys, ["data", "avatars", tmp_path / "set", "--size", size], size)
    assert not (tmp_path / "set").exists()


def test_missing_and_unknown_commands_are_one_line(capsys: pytest.CaptureFixture) -> None:
    refused(capsys, [], "COMMAND")
    refused(capsys, ["genrate"], "genrate")


def test_program_exits_with_status_2_and_no_traceback(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "far", "generate", "--weights", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_demo_rejects_bad_values(pipeline_folder: Path, capsys: pytest.CaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(capsys, ["demo", "--weights", pipeline_folder, "--port", port], "127.0.0.1", str(port))
    refused(capsys, ["demo", "--weights", pipeline_folder, "--port", "0"], "--port 0")
    refused(
        capsys, ["demo", "--weights", pipeline_folder, "--host", "192.0.2.1", "--port", port], "192.0.2.1"
    )
    long = "ö" * 64  # longer than the part of a host name may be
    refused(capsys, ["demo", "--weights", pipeline_folder, "--host", long], long)
    refused(capsys, ["demo", "--weights", "no-such-model", "--port", port], "'no-such-model'", "bundled")


def test_demo_without_gradio_names_the_package_to_install(
    pipeline_folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "far.demo.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    refused(capsys, ["demo", "--weights", pipeline_folder], "gradio", "pip install 'far-image[demo]'")


# --- Recipes by name ----------------------------------------------------------------------------------


def test_error_of_an_unknown_recipe_names_the_packaged_recipes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, ["train", tmp_path / "none.yaml"], "none.yaml", "avatars-32", "imagenet-256")
    refused(capsys, ["train", "avatars-46"], "avatars-46", "avatars-64")


def test_file_with_the_name_of_a_packaged_recipe_is_read_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("avatars-64").write_text("data: mine\n")
    refused(capsys, ["train", "avatars-64"], "avatars-64", "'run'")


def test_autoencoder_of_another_run_is_not_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(
        capsys,
        ["train-autoencoder", "avatars-64-causal", f"run={tmp_path}"],
        "avatars-64-causal",
        "autoencoder_from=null",
    )
    assert not list(tmp_path.iterdir())


def test_error_of_a_missing_autoencoder_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(
        capsys,
        ["cache", "avatars-64", "autoencoder_from=nowhere", f"run={tmp_path}"],
        "'nowhere'",
        "avatars-64",
    )
