"""The wheel: its files, and drawing with it in an environment of its declared requirements alone."""

import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

import far

ROOT = Path(__file__).parent.parent


def test_wheel() -> None:
    """One test, because two builds at a time would write to the same folder."""
    # pytest's own folder would keep the last environments.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT, folder=folder)
        wheel = folder / "dist" / f"far_image-{far.__version__}-py3-none-any.whl"
        holds_the_package_and_nothing_else(wheel)
        source_is_what_builds_the_wheel(wheel.with_name(f"far_image-{far.__version__}.tar.gz"))
        draws_with_declared_requirements_alone(wheel, folder)


def holds_the_package_and_nothing_else(wheel: Path) -> None:
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "far").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {
        "far/py.typed",
        "far/bundled/avatars-64/model.safetensors",
        "far/recipes/avatars-64.yaml",
    } <= package
    names = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
    about = {f"far_image-{far.__version__}.dist-info/{name}" for name in names}
    assert set(zipfile.ZipFile(wheel).namelist()) == package | about
    assert wheel.stat().st_size < 100e6  # the limit of PyPI


def source_is_what_builds_the_wheel(source: Path) -> None:
    with tarfile.open(source) as archive:
        names = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    made = {"PKG-INFO", "setup.cfg", "far_image.egg-info"}
    assert names - made == {"LICENSE", "MANIFEST.in", "PYPI.md", "README.md", "far", "pyproject.toml"}


def draws_with_declared_requirements_alone(wheel: Path, folder: Path) -> None:
    """The pixels equal those of the repository's code."""
    environment = folder / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, wheel, folder=folder)
    [packages] = environment.glob("lib/python*/site-packages")
    [installed] = metadata.distributions(path=[str(packages)])
    for distribution in requirements(installed, ""):
        for top in {path.parts[0] for path in distribution.files or [] if path.parts[0] != ".."}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(distribution.locate_file(top))))
    assert run(environment / "bin/far", "--version", folder=folder) == f"far {far.__version__}\n"
    generate = ("generate", "--weights", "avatars-64", "--count", "4", "--out")
    run(environment / "bin/far", *generate, folder / "installed.png", folder=folder)
    run(sys.executable, "-m", "far", *generate, folder / "here.png", folder=ROOT)
    installed, here = (np.asarray(Image.open(folder / name)) for name in ("installed.png", "here.png"))
    assert installed.std() > 30
    np.testing.assert_array_equal(installed, here)
    encodes_a_folder_of_images_by_a_packaged_recipe(environment / "bin/far", folder)


def requirements(distribution: metadata.Distribution, extra: str) -> Iterator[metadata.Distribution]:
    """Yield what a distribution requires, and what this requires, as installed here; versions must fit."""
    for requirement in map(Requirement, distribution.requires or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            required = metadata.distribution(requirement.name)
            assert requirement.specifier.contains(required.version, prereleases=True), requirement
            yield required
            for extra_of_it in ("", *requirement.extras):
                yield from requirements(required, extra_of_it)


def encodes_a_folder_of_images_by_a_packaged_recipe(far: Path, folder: Path) -> None:
    """A recipe by its name and a copy of it both use the bundled autoencoder."""
    (folder / "images" / "noise").mkdir(parents=True)
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / "noise" / f"{number}.png")
    run(far, "data", "folder", folder / "images", folder / "data", "--size", "64", folder=folder)
    listed = run(far, "recipe", folder=folder)
    assert "avatars-64-causal" in listed
    (folder / "mine.yaml").write_text(
        run(far, "recipe", "avatars-64-causal", folder=folder), encoding="utf-8"
    )
    for recipe in ("avatars-64-causal", "mine.yaml"):
        run(far, "cache", recipe, "data=data", f"run=run-{recipe}", folder=folder)
        assert list((folder / f"run-{recipe}" / "latents").glob("*.safetensors")), recipe


def run(*command: Path | str, folder: Path) -> str:
    """Return the output of a command, run in a folder and without a path to this repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        words = shlex.join(str(word) for word in command)
        pytest.fail(
            f"{words} failed; the build needs a package index\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done.stdout
