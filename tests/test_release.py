"""Release: version, changelog, citation and locked requirements agree."""

import re
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import far

ROOT = Path(__file__).parent.parent


def test_version_is_the_same_in_package_changelog_and_citation() -> None:
    released = re.findall(
        r"^## \[(\d.*)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert released[0] == (far.__version__, str(citation["date-released"]))
    assert metadata.version("far-image") == citation["version"] == far.__version__


def locked() -> list[Requirement]:
    lines = (ROOT / "requirements.lock").read_text().replace("\\\n", " ").splitlines()
    return [
        Requirement(line.split("--hash")[0])
        for line in lines
        if line.strip() and not line.strip().startswith("#")
    ]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_lock_satisfies_the_requirements_of_the_package(python: str, system: str) -> None:
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": system,
        "extra": "",
    }
    pins: dict[str, str] = {}
    for pin in locked():
        if pin.marker is None or pin.marker.evaluate(environment):
            assert pin.name not in pins
            pins[pin.name] = str(pin.specifier).removeprefix("==")
    wanted = [Requirement(text) for text in metadata.requires("far-image") or []]
    wanted = [
        requirement
        for requirement in wanted
        if requirement.marker is None or requirement.marker.evaluate(environment)
    ]
    wanted.append(Requirement((ROOT / "constraints.txt").read_text().splitlines()[-1]))
    for requirement in wanted:
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")])


def test_every_locked_requirement_has_a_hash() -> None:
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    assert all("--hash=sha256:" in line for line in text.splitlines() if "==" in line.split("#")[0])
