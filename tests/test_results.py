"""Recorded rows of the comparison: each names its weights, and rows of different weights are never mixed."""

import hashlib
import itertools
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    causal_ablation,
    recorded,
    results,
    results_measure,
    results_plot,
    results_report,
    results_rows,
    savings,
)
from benchmarks.comparison import Row

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


@pytest.mark.parametrize("name", ["avatars-64", "fashion-mnist"])
def test_recorded_rows_of_an_image_set_share_autoencoder_training_and_dtype(name: str) -> None:
    rows = [row for row in rows_of(name).values() if "model.safetensors" in row.get("sha256", {})]
    assert len(rows) > 10
    for key in ("training", "dtype", "latent channels"):
        assert {json.dumps(row[key]) for row in rows} == {json.dumps(rows[0][key])}
    assert len({row["sha256"]["autoencoder.safetensors"] for row in rows}) == 1


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


@pytest.mark.parametrize("common", [{"training": {"steps": 2}}, {"dtype": "float32"}])
def test_rows_of_another_training_or_dtype_are_dropped_even_without_weights(
    store: Any, common: dict[str, Any]
) -> None:
    for name in "bc":
        store.keep("rows", f"{name} 1", {**store.values["rows"][f"{name} 1"], **common})
    store.drop_other_weights(common=common)
    assert set(recorded.Measurements(store.path).values["rows"]) == {"real", "b 1", "c 1"}


def test_rows_of_weights_in_other_folders_are_kept(store: Any) -> None:
    store.drop_other_weights("1" * 64, within=Path("weights/a"))
    assert set(recorded.Measurements(store.path).values["rows"]) == {"real", "b 1", "c 1"}


def test_processes_that_keep_rows_at_the_same_time_lose_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    script = (
        "import sys; from pathlib import Path; from benchmarks.recorded import Measurements\n"
        "store = Measurements(Path(sys.argv[1]))\n"
        "for number in range(100): store.keep('rows', f'{sys.argv[2]} {number}', number)\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    writers = [subprocess.Popen([*command, name], cwd=ROOT) for name in "ab"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    assert len(recorded.Measurements(path).values["rows"]) == 200


@pytest.fixture
def documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide a working folder with the recorded rows and the documents, without images and weights."""
    monkeypatch.chdir(tmp_path)
    for path in ("README.md", "docs/results.md", *(f"docs/results/{name}.json" for name in FILES)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes((ROOT / path).read_bytes())
    (tmp_path / "docs/images").mkdir()
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    return tmp_path


def test_without_weights_the_command_keeps_rows_and_documents_and_names_what_trains_them(
    documents: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So every figure of the generated blocks is the recorded one."""
    results.main([])
    for path in ("README.md", "docs/results.md", *(f"docs/results/{name}.json" for name in FILES)):
        assert (documents / path).read_bytes() == (ROOT / path).read_bytes(), path
    assert "make results TRAIN=1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "table"), [("savings", savings.table), ("causal-ablation", causal_ablation.table)]
)
def test_tables_of_savings_and_ablation_have_the_recorded_figures(name: str, table: Any) -> None:
    page = (ROOT / "docs/results.md").read_text()
    values = json.loads((ROOT / "docs/results" / f"{name}.json").read_text())
    assert results_report.replace_block(page, name, table(values)) == page


def recorded_sets() -> dict[str, Any]:
    names = ("avatars-64", "fashion-mnist")
    return {name: json.loads((ROOT / f"docs/results/{name}.json").read_text()) for name in names}


def with_twice_the_rows(values: dict[str, Any]) -> dict[str, Any]:
    """Return recorded measurements with a second row close to each, at three times the head steps."""
    distance, result = values["setting"]["distance"], json.loads(json.dumps(values))
    for key, row in values["rows"].items():
        if (times := values["times"].get(key.removesuffix(" seed 0"))) is not None:
            more = {**row, "steps": 3 * row["steps"], distance: 1.01 * row[distance]}
            result["rows"][f"{key} more"] = more
            result["times"][f"{row['name']} {more['steps']}"] = {**times, "batch 1": 1.06 * times["batch 1"]}
    return result


@pytest.mark.parametrize("twice", [False, True])
def test_labels_of_the_plot_overlap_nothing(twice: bool) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    measured = recorded_sets()
    if twice:
        measured = {name: with_twice_the_rows(values) for name, values in measured.items()}
    figure = results_plot.draw(measured)
    for panel in figure.axes:
        boxes = [label.get_window_extent() for label in panel.texts]
        assert len(boxes) >= (20 if twice else 10)
        assert not [1 for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
        ticks = [label.get_text() for axis in (panel.xaxis, panel.yaxis) for label in axis.get_ticklabels()]
        assert all(re.fullmatch(r"\d+(\.\d+)?", tick) for tick in ticks)
        for axis in (panel.xaxis, panel.yaxis):
            assert len(axis.get_ticklabels()) >= 4


def test_times_of_another_network_or_dtype_are_not_those_of_a_row() -> None:
    values = recorded_sets()["avatars-64"]
    row = values["rows"]["shortcut 8 seed 0"]
    assert results_rows.seconds_of(values, row, 1) == values["times"]["shortcut 8"]["batch 1"]
    for change in ({"backbone": "masked"}, {"latent channels": 8}, {"dtype": "bfloat16"}):
        assert results_rows.seconds_of(values, {**row, **change}, 1) is None


def test_models_of_different_backbones_have_lines_of_their_own_in_the_readme() -> None:
    """The shortcut head is recorded on another backbone on each image set."""
    measured = recorded_sets()
    rows = measured["avatars-64"]["rows"]
    distances = [rows[f"shortcut 8 seed {seed}"]["FD (EfficientNet-Lite0)"] for seed in range(3)]
    seconds = measured["avatars-64"]["times"]["shortcut 8"]["batch 1"]
    lines = results_report.readme_table(measured).splitlines()
    [any_order] = (line for line in lines if line.startswith("| block-causal | shortcut | 8 |"))
    [masked] = (line for line in lines if line.startswith("| masked | shortcut (FAR) | 8 |"))
    assert any_order.split(" | ")[3:] == [
        f"{statistics.mean(distances):.1f} ± {statistics.stdev(distances):.1f}",
        f"{1000 * seconds:.0f}",
        "",
        " |",
    ]
    assert masked.split(" | ")[3:] == ["", "", "180.3", "55 |"]


def test_error_for_a_missing_sweep_names_the_row(store: Any) -> None:
    with pytest.raises(SystemExit, match=r"^rows\.json[^\n]*\bflow 8\b[^\n]*$"):
        results_measure.recorded_choice(store, Row("flow", 8))
