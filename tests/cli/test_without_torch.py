"""Help texts, errors and recipes need no torch, whose import alone takes seconds."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = "avatars-32"
HEAVY = {"torch", "numpy", "PIL", "huggingface_hub"}
PROGRAM = """
import contextlib, io, json, sys
from far.cli.main import main

for arguments in json.load(sys.stdin):
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            status = main(arguments)
        except SystemExit as ended:  # after --version and --help
            status = ended.code or 0
    print(json.dumps([arguments, status, out.getvalue(), error.getvalue(), [*sys.modules]]), flush=True)
"""

GOOD = [
    ["--version"],
    ["--help"],
    ["generate", "--help"],
    ["data", "avatars", "--help"],
    ["data", "--help"],
    ["distill", "--help"],
    ["benchmark", "--help"],
]
REFUSED = [
    [],
    ["genrate"],
    ["generate", "--lables", "3"],
    ["generate", "--weights", "nowhere"],
    ["generate", "--count", "0"],
    ["generate", "--batch-size", "0"],
    ["generate", "--out", "/dev/null/samples.png"],
    ["edit", "nowhere.png", "--label", "3", "--redraw", "0", "0", "8", "8"],
    ["evaluate", "--weights", "nowhere", "--reference", "docs"],
    ["evaluate", "--images", "nowhere", "--reference", "docs"],
    ["evaluate", "--images", "docs"],
    ["train", "nowhere.yaml"],
    ["train", RECIPE, "generator.training.setps=3"],
    ["train", RECIPE, "generator.training.steps=0"],
    ["train", RECIPE, "generator.network.head.kind=floe"],
    ["train-autoencoder", RECIPE, "autoencoder.model.width=-1"],
    ["cache", RECIPE, "=3"],
    ["train-autoencoder", RECIPE],
    ["cache", RECIPE],
    ["train", RECIPE],
    ["recipe", "new"],
    ["recipe", "new", "--data", "nowhere", "--minutes", "5"],
    ["recipe", "new", "--data", "nowhere", "--minutes", "0"],
    ["recipe", RECIPE, "--minutes", "5"],
    ["distill", "avatars-64-mar", "out", "--latents", "nowhere"],
    ["distill", "nowhere", "out"],
    ["distill", "avatars-64-mar", "out", "training.stesp=3"],
    ["convert", "mar", "nowhere.pth", "out"],
    ["convert", "to-diffusers", "nowhere", "out"],
    ["export", "diffusers", "nowhere", "out"],
    ["export", "diffusers", "avatars-64", "/dev/null"],
    ["export", "onnx", "nowhere", "out"],
    ["export", "web", "nowhere", "out"],
    ["demo", "--static", "nowhere"],
    ["export", "onnx", "avatars-64", "/dev/null"],
    ["data", "folder", "nowhere", "out"],
    ["data", "nowhere", "out"],
    ["data", "nowhere-{0..9}.tar", "out"],
    ["data", "fashion-mnist", "out", "--from", "nowhere"],
    ["data", "avatars", "out", "--per-class", "many"],
    ["benchmark", "--rounds", "0"],
    ["benchmark", "--order", "halton"],
    ["demo", "--weights", "nowhere"],
    ["demo", "--port", "0"],
    ["push", "nowhere", "me/model", "--license", "mit"],
]


def run(commands: list[list[str]], folder: Path) -> list[list[Any]]:
    """Run commands in one new process; yield arguments, status, stdout, stderr and loaded modules of each."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(commands),
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_versions_and_help_need_no_torch(tmp_path: Path) -> None:
    found = run(GOOD, tmp_path)
    assert [arguments for arguments, *_ in found] == GOOD
    for arguments, status, out, error, modules in found:
        assert not HEAVY & set(modules), arguments
        assert (status, error) == (0, ""), arguments
        assert out, arguments


def test_errors_need_no_torch(tmp_path: Path) -> None:
    found = run(REFUSED, tmp_path)
    assert [arguments for arguments, *_ in found] == REFUSED
    for arguments, status, out, error, modules in found:
        assert not HEAVY & set(modules), (arguments, error)
        assert (status, out) == (2, ""), (arguments, error)
        assert error.startswith("far: error: "), arguments
        assert error.count("\n") == 1, arguments
    assert not list(tmp_path.iterdir())


def made(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_error_of_a_missing_file_names_the_command_that_writes_it(tmp_path: Path) -> None:
    same = f"{RECIPE} data=images run=my-run autoencoder_from=null"
    options = same.split()

    def errors_of(*commands: str) -> list[str]:
        """The errors of commands, each of which names one command to run."""
        found = run([[*command.split(), *options] for command in commands], tmp_path)
        assert all(status == 2 and not HEAVY & set(modules) for _, status, _, _, modules in found), found
        return [error for *_, error, _ in found]

    every = ("train-autoencoder", "cache", "train")
    assert all("images" in error and "far data" in error for error in errors_of(*every))
    made(tmp_path, "images/train/index.json")
    assert all("images" in error and "far data" in error for error in errors_of(*every))  # no held-out part
    made(tmp_path, "images/held-out/index.json")
    assert all(f"far train-autoencoder {same}" in error for error in errors_of("cache", "train"))
    made(tmp_path, "my-run/autoencoder/config.json")
    [error] = errors_of("train")
    assert f"far cache {same}" in error
    assert "my-run/latents" in error
    made(tmp_path, "my-run/latents/index.json", "my-run/model/checkpoints/step-00000007/index.json")
    [error] = errors_of("train")
    assert "my-run/model" in error
    assert "--resume" in error
    made(tmp_path, "my-run/autoencoder/checkpoints/step-00000009/index.json")
    [error] = errors_of("train-autoencoder")
    assert "--resume" in error


def test_error_of_a_folder_without_a_model_names_the_commands_that_write_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    commands = [
        ["generate", "--weights", "empty"],
        ["push", "empty", "me/model", "--license", "mit"],
        ["distill", "empty", "out"],
    ]
    for _, status, _, error, modules in run(commands, tmp_path):
        assert status == 2
        assert not HEAVY & set(modules)
        assert "empty" in error
        assert "far train" in error
        assert error.count("\n") == 1


def test_keys_of_recipes_and_distillation_need_no_torch(tmp_path: Path) -> None:
    program = "import sys, far.recipe, far.training.config, far.names; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_packages_import_their_names_on_first_use() -> None:
    import far
    import far.backbone
    import far.heads

    for package in (far, far.backbone, far.heads):
        assert set(package.__all__) <= set(dir(package))
        for name in package.__all__:
            assert getattr(package, name) is not None
        with pytest.raises(AttributeError, match="nothing_of_that_name"):
            getattr(package, "nothing_of_that_name")  # noqa: B009 (mypy knows that there is none)


def test_kinds_known_without_torch_are_those_of_the_registry() -> None:
    from far.heads import HEADS, HeadConfig

    assert {kind: head.config_class for kind, head in HEADS.items()} == HeadConfig.kinds
