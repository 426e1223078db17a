"""The ways to start ``far`` beside the command itself."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import far


def test_python_module_runs_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["far", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("far", run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().out == f"far {far.__version__}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that takes any name")
def test_file_name_that_is_not_text_is_printed(pipeline_folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "far",
        "generate",
        "--weights",
        str(pipeline_folder),
        "--out",
        os.fsencode(tmp_path) + b"/\xff.png",
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert rb"/\udcff.png" in done.stdout
