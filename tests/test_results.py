"""Recorded rows of the comparison: each names its weights, and rows of different weights are never mixed."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import recorded, results

ROOT = Path(__file__).parents[1]
FILES = ("avatars-64", "fashion-mnist", "savings", "causal-ablation")
MODEL_FILES = ("autoencoder.safetensors", "config.json", "model.safetensors")


def rows_of(name: str) -> dict[str, dict[str, Any]]:
    values = json.loads((ROOT / "docs/results" / f"{name}.json").read_text())
    return {key: row for kind in ("rows", "sweeps") for key, row in values.get(kind, {}).items()}


@pytest.mark.parametrize("name", FILES)
def test_each_recorded_row_names_its_commit_and_the_checksums_of_its_weights(name: str) -> None:
    for key, row in rows_of(name).items():
        assert re.fullmatch("[0-9a-f]{12}", row["commit"]), key
        if key == "real":  # training images: no weights
            continue
        assert row["weights"].startswith("runs/"), key
        assert {"autoencoder.safetensors"} <= row["sha256"].keys() <= set(MODEL_FILES), key
        assert all(re.fullmatch("[0-9a-f]{64}", value) for value in row["sha256"].values()), key


@pytest.mark.parametrize("name", FILES)
def test_all_recorded_rows_of_a_model_come_from_the_same_weights(name: str) -> None:
    checksums: dict[tuple[str, str], str] = {}
    for row in rows_of(name).values():
        for file, value in row.get("sha256", {}).items():
            assert checksums.setdefault((row["weights"], file), value) == value


def write_model(folder: Path, content: str) -> dict[str, str]:
    """Write a model's files and return their SHA-256, computed here."""
    folder.mkdir(parents=True)
    for name in MODEL_FILES:
        (folder / name).write_text("shared" if name.startswith("auto") else content)
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in MODEL_FILES}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rows of models a and b, whose weights are present, and of c, whose weights are missing."""
    monkeypatch.chdir(tmp_path)
    a, b = (write_model(Path("weights") / name, name) for name in "ab")
    c = {"autoencoder.safetensors": a["autoencoder.safetensors"], "model.safetensors": "0" * 64}
    store = recorded.Measurements(Path("rows.json"))
    store.keep("rows", "real", {"distance": 1})
    for name, sha256 in (("a", a), ("b", b), ("c", c)):
        for kind in ("rows", "sweeps"):
            store.keep(kind, f"{name} 1", {"weights": f"weights/{name}", "sha256": sha256, "distance": 2})
    return store


def test_rows_of_unchanged_and_of_missing_weights_are_kept(store: Any) -> None:
    before = store.path.read_bytes()
    store.drop_other_weights()
    assert store.path.read_bytes() == before


def test_rows_of_a_model_with_other_weights_are_dropped_with_a_message(
    store: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path("weights/b") / "model.safetensors").write_text("trained again")
    store.drop_other_weights()
    left = recorded.Measurements(store.path).values
    assert set(left["rows"]) == {"real", "a 1", "c 1"}
    assert set(left["sweeps"]) == {"a 1", "c 1"}
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    assert "rows.json" in output


def test_other_shared_autoencoder_drops_the_rows_of_all_models(store: Any) -> None:
    store.drop_other_weights("1" * 64)
    left = recorded.Measurements(store.path).values
    assert (set(left["rows"]), set(left["sweeps"])) == ({"real"}, set())


@pytest.mark.parametrize("name", ["avatars-64", "fashion-mnist"])
def test_without_weights_recorded_rows_are_kept_and_one_line_names_the_command(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Images and weights are not needed: the working folder has only the recorded rows."""
    monkeypatch.chdir(tmp_path)
    Path("docs/results").mkdir(parents=True)
    rows = ROOT / "docs/results" / f"{name}.json"
    (tmp_path / "docs/results" / f"{name}.json").write_bytes(rows.read_bytes())
    results.measure(results.SETS[name], list(results.MODELS), [0, 1, 2])
    assert (tmp_path / "docs/results" / f"{name}.json").read_bytes() == rows.read_bytes()
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    assert "make results TRAIN=1" in output


def test_error_for_a_missing_guidance_sweep_names_the_model(store: Any) -> None:
    with pytest.raises(SystemExit, match=r"^rows\.json[^\n]*\bflow\b[^\n]*$"):
        results.best_guidance(store, "frozen-flow")
