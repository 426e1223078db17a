"""Long commands resume after ``kill -9`` or a full disk and end with the files of an undisturbed run.

`make test` kills each command once at a random moment, `make soak` more than fifty times in all.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from checkpoints import read_checkpoint
from conftest import CLASSES, draw_images, write_recipe
from PIL import Image
from safetensors.torch import load_file

# Runs each command in its own process, forked after all imports, so that kills hit work. No other process
# gets its number until it is waited for. Small shards and parts give many moments between them.
SERVER = f"""
import json, os, resource, subprocess, sys, time
import torch._dynamo
import far.data.packing, far.data.latents, far.evaluation.extraction
from far.cli.main import main
far.data.packing._SHARD_BYTES = 2 * 3 * 16 * 16
far.data.latents.SHARD_ROWS = far.evaluation.extraction.PART = 2
for line in sys.stdin:
    folder, arguments, seconds, largest = json.loads(line)
    # The output goes through another process, which the limit on file sizes does not affect.
    with open(folder + "/../output", "w") as output:
        keeper = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=output)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        os.dup2(keeper.stdin.fileno(), 1)
        os.dup2(keeper.stdin.fileno(), 2)
        if largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        status = main(arguments)
        sys.stdout.flush()
        os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, {int(signal.SIGKILL)})
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    keeper.communicate()
    print(status, flush=True)
"""
KILLED = -signal.SIGKILL
LOOP = [
    "steps=8",
    "batch_size=8",
    "warmup_steps=5",
    "log_every=1",
    "checkpoint_every=2",
    "evaluate_every=8",
    "dtype=float32",
]
AUTOENCODER = ["width=8", "width_multipliers=[1,1,2]", "blocks=1", "latent_channels=2", "norm_groups=4"]


class Undisturbed(NamedTuple):
    """Files, their sizes, and the seconds of a run that is not disturbed."""

    files: dict[str, Any]
    sizes: list[int]
    seconds: float


class Work:
    """All commands that can resume, each in its own folder."""

    def __init__(self, folder: Path, latents: Path, commands: dict[str, list[object]]) -> None:
        self.folder, self.latents, self.commands = folder, latents, commands
        self._undisturbed: dict[str, Undisturbed] = {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def prepare(self, name: str, folder: Path) -> Path:
        """Create the folder in which a command runs, with the files that it reads there."""
        folder.mkdir(parents=True, exist_ok=True)
        if name == "train":
            (folder / "run").mkdir()
            (folder / "run" / "latents").symlink_to(self.latents)
        return folder

    def run(
        self, name: str, folder: Path, *, seconds: float | None = None, largest: int | None = None
    ) -> tuple[int, str]:
        """Return status and output of a command, killed after ``seconds`` or kept from larger files."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        job = [str(folder), list(map(str, self.commands[name])), seconds, largest]
        print(json.dumps(job), file=self.server.stdin, flush=True)
        status = int(self.server.stdout.readline())
        return status, (folder.parent / "output").read_text()

    def undisturbed(self, name: str) -> Undisturbed:
        """Return the results of an undisturbed run, which happens once."""
        if name not in self._undisturbed:
            folder = self.prepare(name, self.folder / name)
            start = time.perf_counter()
            status, output = self.run(name, folder)
            seconds = time.perf_counter() - start
            assert status == 0, output
            sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
            self._undisturbed[name] = Undisturbed(contents(folder), sizes, seconds)
        return self._undisturbed[name]


@pytest.fixture(scope="module")
def work(
    image_set: Path,
    autoencoder_folder: Path,
    latents_folder: Path,
    pipeline_folder: Path,
    diffusion_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Work]:
    folder = tmp_path_factory.mktemp("work")
    pixels, labels = draw_images(60, 2)
    for index, (image, label) in enumerate(zip(pixels, labels)):
        path = folder / "images-to-read" / CLASSES[label] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(path)
    recipe = write_recipe(folder / "recipe.yaml", image_set, Path("run"), autoencoder_folder)
    whole = ["autoencoder_from=null", *(f"autoencoder.model.{value}" for value in AUTOENCODER)]
    autoencoder_loop, loop = (
        [f"{part}.training.{value}" for value in LOOP] for part in ("autoencoder", "generator")
    )
    distill_loop = [f"training.{value}" for value in LOOP] + [
        "training.batch_size=64",
        "trajectories.images=512",
    ]
    work = Work(
        folder,
        latents_folder,
        {
            "data": ["data", "folder", folder / "images-to-read", "set", "--size", 16],
            "train-autoencoder": ["train-autoencoder", recipe, *whole, *autoencoder_loop, "--resume"],
            "cache": ["cache", recipe],
            "train": ["train", recipe, *loop, "--resume"],
            "distill": ["distill", diffusion_folder, "student", *distill_loop, "--resume"],
            "evaluate": [
                *("evaluate", "--weights", pipeline_folder, "--count", 60, "--save-npz", "samples.npz"),
                *("--reference", image_set, "--cache", "cache"),
            ],
            "generate": [
                "generate",
                "--weights",
                pipeline_folder,
                "--count",
                90,
                "--batch-size",
                3,
                "--out",
                "images",
            ],
        },
    )
    with work.server:
        yield work


NAMES = ["data", "train-autoencoder", "cache", "train", "distill", "evaluate", "generate"]


def plain(checkpoint: dict[str, Any]) -> Any:
    """Return a checkpoint with its tensors as bytes, for comparison bit by bit."""
    tensors = {
        name: (tensor.dtype, tensor.shape, tensor.numpy().tobytes())
        for name, tensor in checkpoint["tensors"].items()
    }
    return {**checkpoint, "tensors": tensors}


def read(path: Path) -> Any:
    """Return the content of a file without times. An incomplete file is an error."""
    if path.name == "log.jsonl":
        varying = ("time", "images_per_second", "loader_share")
        return [
            {name: value for name, value in json.loads(line).items() if name not in varying}
            for line in path.read_text().splitlines()
        ]
    if path.name == "result.json":
        found = json.loads(path.read_text())
        return {name: found[name] for name in ("figures", "evaluated", "reference")}
    if path.parent.parent.name == "checkpoints":
        # The metadata of the files have no fixed order.
        return plain(read_checkpoint(path.parent)) if path.name == "index.json" else "compared with the index"
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: arrays[name].tolist() for name in arrays.files}
    if path.suffix == ".json":
        json.loads(path.read_text())
    if path.suffix == ".safetensors":
        load_file(path)
    if path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
    return path.read_bytes()


def contents(folder: Path, *, hidden: bool = True) -> dict[str, Any]:
    """Return the content of every file of a folder, with ``hidden`` also of those in hidden folders."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: read(path) for name, path in files.items() if hidden or "/." not in f"/{name}"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.soak)])
def test_killed_command_resumes_to_the_same_files(kills: int, name: str, work: Work, tmp_path: Path) -> None:
    expected, _, seconds = work.undisturbed(name)
    draw = random.Random(f"{name} {kills}")
    killed, started, finished = 0, 0, True
    while killed < kills or not finished:
        fresh = finished
        if fresh:
            started += 1
            folder = work.prepare(name, tmp_path / f"killed-{started}")
        moment = draw.uniform(0, seconds) if killed < kills else None
        status, output = work.run(name, folder, seconds=moment)
        assert status == 0 or (status == KILLED and moment is not None), output
        finished = status == 0
        if finished:
            assert contents(folder) == expected
            if fresh and moment is not None:
                seconds = moment  # the machine is faster now, so kill earlier
        else:
            killed += 1
            contents(folder, hidden=False)
            for path in folder.rglob("*"):  # the run is resumed a day later
                os.utime(path, (time.time() - 86400,) * 2)
    print(
        f"far {name}: {killed} kills in {started} runs, each with the same {len(expected)} files at its end"
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("disk", ["limited", pytest.param("small", marks=pytest.mark.soak)])
def test_full_disk_is_one_line_and_the_command_resumes_with_more_space(
    disk: str, name: str, work: Work, tmp_path: Path
) -> None:
    expected, sizes, _ = work.undisturbed(name)
    folder = tmp_path / "disk" / "full"
    folder.mkdir(parents=True)
    if disk == "small":
        pages = sum(-(-size // 4096) for size in sizes)
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={pages // 2 * 4096}", "far-test", folder],
            capture_output=True,
        ).returncode:
            pytest.skip("only root can mount a small disk")
    try:
        work.prepare(name, folder)
        # Without a small disk, a limit on file sizes stops the largest file.
        status, output = work.run(name, folder, largest=max(sizes) - 1 if disk == "limited" else None)
        assert status == 2, output
        assert "Traceback" not in output
        (line,) = [line for line in output.splitlines() if line.startswith("far: error")]
        assert "cannot write" in line
        assert "space" in line
        assert not [path for path in contents(folder) if "/." in f"/{path}"]
        if disk == "small":
            subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        status, output = work.run(name, folder)
        assert status == 0, output
        assert contents(folder) == expected
    finally:
        if disk == "small":
            subprocess.run(["umount", folder], check=True)
