"""Examples to copy: the Space serves its page, the Dockerfile fits the package, the notebook runs."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import nbformat
import numpy as np
import pytest
from huggingface_hub import SpaceCard
from nbclient import NotebookClient
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image

from far.cli.main import parse

ROOT = Path(__file__).parents[1]
SPACE, DOCKER = ROOT / "examples/space", ROOT / "examples/docker/Dockerfile"


def test_space_card_fits_the_package() -> None:
    card = SpaceCard.load(SPACE / "README.md").data
    assert (card.sdk, card.license) == ("gradio", "mit")
    assert (SPACE / card.app_file).is_file()
    (gradio,) = re.findall(r'^demo = \["(gradio.+)"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert Version(card.sdk_version) in Requirement(gradio).specifier
    assert len(card.short_description) <= 60  # the hub's limit
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    names = [Requirement(line) for line in lines if not line.startswith("--")]
    assert [(name.name, name.extras) for name in names] == [("torch", set()), ("far-image", {"demo"})]


def test_space_serves_the_page_of_its_models(pipeline_folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = {"GRADIO_SERVER_PORT": str(port), "FAR_WEIGHTS": str(pipeline_folder)}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **names, "PYTHONPATH": path}
    server = subprocess.Popen([sys.executable, SPACE / "app.py"], env=environment)
    try:
        for _ in range(600):
            assert server.poll() is None, "the server has ended"
            try:
                page = httpx.get(f"http://127.0.0.1:{port}/config", timeout=60)
                break
            except httpx.ConnectError:
                time.sleep(0.2)
        assert str(pipeline_folder) in page.text
    finally:
        server.terminate()
        server.wait(timeout=60)


def test_dockerfile_fits_the_package() -> None:
    text = re.sub(r"\\\n", " ", DOCKER.read_text())
    lines = [line.partition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    (command,) = [json.loads(arguments) for name, _, arguments in lines if name == "CMD"]
    assert parse(command).host == "0.0.0.0"
    port = next(arguments for name, _, arguments in lines if name == "EXPOSE")
    assert int(port) == parse(["demo"]).port
    assert [arguments for name, _, arguments in lines if name == "ENTRYPOINT"] == ['["far"]']
    installs = [shlex.split(arguments) for name, _, arguments in lines if name == "RUN"]
    (pinned,) = re.findall(r"^torch==.+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned in installs[0]
    assert any(word.endswith("[demo]") for word in installs[1])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide a folder to run in, where ``far`` is that of this repository."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "far"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m far "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return tmp_path


def test_notebook_fine_tunes_on_a_folder(here: Path) -> None:
    notebook = nbformat.read(ROOT / "notebooks/fine-tune.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    (settings,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    settings.source = re.sub(r"STEPS = \d+", "STEPS = 2", settings.source)
    for number in range(8):  # in place of those that the model would draw
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        path = here / "my-images" / ("worlds", "clay")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    recipe = next(cell for cell in notebook.cells if "batch_size: 64" in cell.source)
    recipe.source = recipe.source.replace("batch_size: 64", "batch_size: 4")
    recipe.source = recipe.source.replace("images: 100,", "images: 4,")
    options = {"kernel_name": "python3", "resources": {"metadata": {"path": here}}}
    NotebookClient(notebook, timeout=900, **options).execute()
    output = [str(out) for cell in notebook.cells for out in cell.get("outputs", ())]
    assert "worlds" in "".join(output)
    assert "far: error" not in "".join(output)
    assert "image/png" in output[-1]
    assert {path.name for path in (here / "run/tuned").glob("*.safetensors")} == {
        "autoencoder.safetensors",
        "model.safetensors",
    }
