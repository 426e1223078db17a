"""The options --device, --dtype and --threads of every command that computes."""

import argparse
from pathlib import Path

import pytest
import torch

from far.cli.machine_arguments import add_machine_arguments, with_machine
from far.cli.main import main, parse
from far.devices import TRAINING_DTYPES, resolve_training_dtype
from far.training.config import LoopConfig

COMPUTING = {
    "generate": [], "edit": ["a.png", "--label", "0", "--keep", "0", "0", "1", "1"],
    "evaluate": ["--images", "a", "--reference", "b"],
    "train-autoencoder": ["r.yaml"], "cache": ["r.yaml"], "train": ["r.yaml"],
    "distill": ["a", "b"], "benchmark": [], "demo": [],
}  # fmt: skip
WITHOUT_DTYPE = ("cache", "benchmark")  # the cache is float32, and the benchmark has --dtypes


@pytest.fixture(autouse=True)
def threads_are_kept() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("command", COMPUTING)
def test_every_command_that_computes_takes_device_and_threads(
    command: str, capsys: pytest.CaptureFixture
) -> None:
    arguments = parse([command, *COMPUTING[command], "--device", "cuda:1", "--threads", "3"])
    assert (arguments.device, arguments.threads) == ("cuda:1", 3)
    for option, value in (
        ("--device", "gpu"),
        ("--threads", "0"),
        ("--threads", "many"),
        ("--threads", "1000000"),
        ("--dtype", "int3"),
    ):
        if option == "--dtype" and command in WITHOUT_DTYPE:
            continue
        assert main([command, *COMPUTING[command], option, value]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert option in error
        assert value in error


def test_automatic_choices_are_printed_in_one_line(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    generate = ["generate", "--weights", str(pipeline_folder), "--out", str(tmp_path / "a.png")]
    dtype = resolve_training_dtype("auto", torch.device("cpu"))
    for options, said in (
        ([], ["device cpu", f"dtype {dtype}"]), (["--device", "cpu"], [f"dtype {dtype}"]),
        (["--dtype", "float32"], ["device cpu"]), (["--device", "cpu", "--dtype", "float32"], []),
    ):  # fmt: skip
        assert main([*generate, *options]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("far: ")]
        assert len(lines) == bool(said)
        assert [
            name for name in ("device cpu", f"dtype {dtype}") if any(name in line for line in lines)
        ] == said


def test_edit_prints_nothing_before_an_error(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert (
        main(
            ["generate", "--weights", str(pipeline_folder), "--labels", "0", "--out", str(tmp_path / "a.png")]
        )
        == 0
    )
    capsys.readouterr()
    edit = [
        "edit",
        str(tmp_path / "a.png"),
        "--weights",
        str(pipeline_folder),
        "--label",
        "0",
        "--out",
        str(tmp_path / "b.png"),
    ]
    assert main([*edit, "--redraw", "0", "0", "16", "16"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main([*edit, "--redraw", "0", "0", "3", "3"]) == 0
    assert "device cpu" in capsys.readouterr().err


def test_threads_option_sets_the_number_of_threads(pipeline_folder: Path, tmp_path: Path) -> None:
    for threads in (1, 2):
        assert (
            main(
                [
                    "generate",
                    "--weights",
                    str(pipeline_folder),
                    "--out",
                    str(tmp_path / "a.png"),
                    "--threads",
                    str(threads),
                ]
            )
            == 0
        )
        assert torch.get_num_threads() == threads


def test_options_override_the_recipes_device_and_dtype() -> None:
    parser = argparse.ArgumentParser()
    add_machine_arguments(parser, TRAINING_DTYPES, recipe=True)
    recipe = LoopConfig(device="cuda", dtype="bfloat16", steps=7)
    assert with_machine(recipe, parser.parse_args([])) == recipe
    given = with_machine(
        recipe, parser.parse_args(["--device", "cpu", "--dtype", "float32", "--threads", "1"])
    )
    assert given == LoopConfig(device="cpu", dtype="float32", steps=7)
    assert torch.get_num_threads() == 1


def test_processes_without_a_local_rank_are_an_error_in_one_line(
    pipeline_folder: Path,
    image_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    evaluate = [
        "evaluate",
        "--weights",
        str(pipeline_folder),
        "--reference",
        str(image_set),
        "--out",
        str(tmp_path / "out"),
    ]
    for device in ("cuda", "cpu"):
        assert main([*evaluate, "--count", "6", "--device", device]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert "LOCAL_RANK" in error


def test_out_of_memory_is_one_line_and_other_errors_are_not_hidden(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    generate = ["generate", "--weights", str(pipeline_folder), "--out", str(tmp_path / "a.png")]
    faults = [
        lambda: torch.empty(2**60),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.\nTried 2 GiB")),
    ]
    for fault in faults:
        monkeypatch.setattr("far.pipeline.Pipeline.draw", lambda *values, fault=fault, **options: [*fault()])
        assert main(generate) == 2
        assert [line for line in capsys.readouterr().err.splitlines() if "memory" in line][-1].startswith(
            "far: error: "
        )
        assert not (tmp_path / "a.png").exists()
    monkeypatch.setattr(
        "far.pipeline.Pipeline.draw", lambda *values, **options: torch.ones(2) @ torch.ones(3)
    )
    with pytest.raises(RuntimeError):
        main(generate)
