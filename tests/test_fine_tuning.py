"""``benchmarks.fine_tuning``: the two image sets, the commands of a row, and rows that are kept."""

from pathlib import Path

import pytest
import torch
from conftest import CLASSES

from benchmarks import fine_tuning
from benchmarks.recorded import Measurements
from far.cli.main import parse
from far.data.image_sets import open_image_set
from far.files import write_json
from far.recipe import load_recipe

PER_CLASS = 5


@pytest.fixture
def work(image_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fine_tuning, "NEW_CLASSES", 1)
    monkeypatch.setattr(fine_tuning, "PER_CLASS", PER_CLASS)
    fine_tuning.split(image_set, tmp_path / "work")
    return tmp_path / "work"


def test_image_set_is_split_by_class(image_set: Path, work: Path) -> None:
    for part in ("train", "held-out"):
        whole = open_image_set(image_set / part)
        labels = whole.all("labels")
        for name, classes in (("old", CLASSES[:2]), ("new", CLASSES[2:])):
            found = open_image_set(work / f"{name}-images" / part)
            assert found.meta["classes"] == classes
            for label, own in enumerate(classes):
                ours = found.all("images")[found.all("labels") == label]
                theirs = whole.all("images")[labels == CLASSES.index(own)]
                if part == "train":
                    theirs = theirs[:PER_CLASS]
                assert torch.equal(ours, theirs)


def test_row_trains_the_old_classes_first_and_is_kept(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def far(arguments: list[str]) -> int:
        commands.append(arguments)
        parsed = parse(arguments)
        if parsed.command == "train":
            folder = load_recipe(parsed.recipe, parsed.overrides).model_folder
            write_json(folder / "config.json", {"steps": len(commands)})
        if parsed.command == "evaluate":
            write_json(Path(parsed.out) / "result.json", {"figures": {"FD (network)": 12.5}})
        return 0

    monkeypatch.setattr(fine_tuning, "far", far)
    recorded = Measurements(work / "rows.json")
    fine_tuning.measure("adapters-quarter", work, recorded)
    trainings = [load_recipe(c[1], [a for a in c[2:] if "=" in a]) for c in commands if c[0] == "train"]
    base, tuned = (training.generator for training in trainings)
    assert [Path(training.data).name for training in trainings] == ["old-images", "new-images"]
    assert tuned.start_from == str(trainings[0].model_folder)
    assert (base.adapter_rank, tuned.adapter_rank) == (0, 8)
    assert base.training.steps == fine_tuning.BASE_STEPS
    assert tuned.training.steps == fine_tuning.STEPS / 4
    assert base.network == tuned.network
    assert "12.5" in fine_tuning.table(recorded.values["rows"])
    # The same weights are not evaluated again.
    count = sum(command[0] == "evaluate" for command in commands)
    monkeypatch.setattr(fine_tuning, "train", lambda *_: trainings[1].model_folder)
    fine_tuning.measure("adapters-quarter", work, recorded)
    assert sum(command[0] == "evaluate" for command in commands) == count == 1
