"""`far benchmark`: the table, the file of figures and the plot of tiny models. No speed is asserted."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from far.autoencoder import AutoencoderConfig, SmallDecoderConfig
from far.backbone import CausalConfig
from far.benchmark import default_rows, rows_of
from far.cli.main import main
from far.heads import ShortcutConfig
from far.model import PRESETS, NetworkConfig


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        PRESETS, "tiny", NetworkConfig(CausalConfig(width=16, depth=1, heads=2), ShortcutConfig(16, 1))
    )
    monkeypatch.setattr(
        "far.benchmark.rows.AutoencoderConfig", lambda: AutoencoderConfig(width=8, blocks=1, norm_groups=4)
    )
    monkeypatch.setattr("far.benchmark.hardware._BANDWIDTH_BYTES", {"cpu": 2**16})
    monkeypatch.setattr("far.benchmark.hardware._PRODUCT_SIDE", {"cpu": 32})


def table(text: str) -> list[dict[str, str]]:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert all(set(cell) == {"-"} for cell in lines[1])
    assert len({len(line) for line in lines}) == 1
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def test_table_json_and_plot_agree(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    figures, picture = tmp_path / "a.json", tmp_path / "a.png"
    options = [
        "--models",
        str(pipeline_folder),
        "--batch",
        "2",
        "--head-steps",
        "4",
        "1",
        "--dtypes",
        "float32",
        "bfloat16",
    ]
    assert (
        main(
            [
                "benchmark",
                *options,
                "--ar-steps",
                "3",
                "--rounds",
                "2",
                "--json",
                str(figures),
                "--plot",
                str(picture),
            ]
        )
        == 0
    )
    captured = capsys.readouterr()
    rows, found = table(captured.out), json.loads(figures.read_text())
    assert [(row["steps"], row["dtype"]) for row in rows] == [
        (f"3 × {n}", t) for n in (4, 1) for t in ("float32", "bfloat16")
    ]
    assert "--full" not in captured.out
    assert "warm-up" in captured.err
    assert "warm-up" not in captured.out
    assert rows[0]["times faster"] == "1.00"
    assert rows[0]["batch"] == "2"
    assert found["settings"]["seed"] == 0
    assert found["machine"]["threads"] >= 1
    assert found["machine"]["peak flop per second"].keys() == {"float32", "bfloat16"}
    assert len(found["rows"]) == 4
    for row, record in zip(rows, found["rows"]):
        assert row["model"] == record["model"] == str(pipeline_folder)
        assert record["sampling"]["ar_steps"] == 3
        assert not record["estimated"]
        assert len(record["rounds"]) == 2
        assert sum(record["shares"].values()) == pytest.approx(1)
        assert all(share > 0 for share in record["shares"].values())
        seconds = record["seconds per image"]
        assert seconds["minimum"] <= seconds["median"] <= seconds["maximum"]
        assert seconds["minimum"] == pytest.approx(min(sum(parts.values()) for parts in record["rounds"]))
        assert row["seconds per image"].startswith(f"{seconds['median']:.4g} ")
        assert row["head"] == f"{record['shares']['head']:.0%}"
    assert found["rows"][1]["weights bytes"] < found["rows"][0]["weights bytes"]
    assert Image.open(picture).format == "PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png"]


def test_small_decoder_is_a_row_of_its_own(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("far.benchmark.rows._PRESET_SMALL_DECODER", SmallDecoderConfig(2, 1))
    options = ["benchmark", "--models", "tiny", "--head-steps", "1", "--rounds", "1", "--decoders"]
    figures = tmp_path / "a.json"
    assert main([*options, "full", "small", "--json", str(figures)]) == 0
    names = [row["model"] for row in table(capsys.readouterr().out)]
    assert names == ["tiny", "tiny, small decoder"]
    full, small = json.loads(figures.read_text())["rows"]
    assert (full["decoder"], small["decoder"]) == ("full", "small")
    assert 0 < small["flop per image"]["autoencoder"] < full["flop per image"]["autoencoder"] / 3
    assert small["flop per image"]["head"] == full["flop per image"]["head"]
    # A folder without one is refused before anything is drawn.
    options[2] = str(pipeline_folder)
    assert main([*options, "small"]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()[-1:]
    assert str(pipeline_folder) in line


def test_a_causal_preset_is_estimated_unless_full(capsys: pytest.CaptureFixture) -> None:
    options = ["benchmark", "--models", "tiny", "--head-steps", "1", "--ar-steps", "8", "--rounds", "1"]
    assert main(options) == 0
    text = capsys.readouterr().out
    (row,) = table(text)
    assert row["steps"] == "256 × 1"
    assert row["encoder"] == "–"
    assert "32 of 256" in text
    assert "Guidance 2.9" in text
    assert main([*options, "--full"]) == 0
    assert "32 of 256" not in capsys.readouterr().out


def test_default_rows_run_without_models(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def stop(rows, **options):  # type: ignore[no-untyped-def]
        given.update(options, rows=rows)
        raise KeyboardInterrupt

    monkeypatch.setattr("far.benchmark.measure", stop)
    for native in (True, False):
        monkeypatch.setattr("far.benchmark.rows.has_fast_bfloat16", lambda device, native=native: native)
        assert (
            main(
                ["benchmark", "--batch", "2", "--guidance", "1", "--rounds", "5", "--full", "--device", "cpu"]
            )
            == 130
        )
        usual = default_rows(batches=[2], guidance=1.0)
        assert given["rows"] == [row for row in usual if native or row.dtype != "bfloat16"]
        assert {**given, "rows": None} == {
            "rows": None,
            "rounds": 5,
            "full": True,
            "device": torch.device("cpu"),
        }


def test_unsupported_dtypes_and_a_late_second_round_are_left_out_with_a_note(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    usual = rows_of([str(pipeline_folder)], dtypes=["float32", "bfloat16"])
    monkeypatch.setattr("far.benchmark.rows.default_rows", lambda **options: usual)
    for native, seconds in ((False, 0), (True, 1000)):
        monkeypatch.setattr("far.benchmark.rows.has_fast_bfloat16", lambda device, native=native: native)
        monkeypatch.setattr("far.benchmark.results._MOST_SECONDS", seconds)
        assert main(["benchmark", "--device", "cpu", "--json", str(tmp_path / "a.json")]) == 0
        text, found = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
        assert [row["dtype"] for row in table(text)] == ["float32", "bfloat16"][: 1 + native]
        assert {len(row["rounds"]) for row in found["rows"]} == {2 if seconds else 1}
        notes = [line for line in text.splitlines() if "left out" in line.lower()]
        assert len(notes) == 2 * (not native)
        assert list(found["left out"]) == ["bfloat16"] * (not native)
    monkeypatch.setattr("far.benchmark.results._MOST_SECONDS", 0)
    assert main(["benchmark", "--device", "cpu", "--rounds", "2", "--json", str(tmp_path / "a.json")]) == 0
    assert {len(row["rounds"]) for row in json.loads((tmp_path / "a.json").read_text())["rows"]} == {2}
    assert "2 rounds" in capsys.readouterr().out


def test_row_names_sampling_options_that_are_not_default(
    pipeline_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = Path(pipeline_folder)
    config = json.loads((folder / "config.json").read_text())
    config["defaults"]["temperature"] = 0.9
    copy = folder.parent / "warm"
    copy.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "config.json").write_text(json.dumps(config))
    assert main(["benchmark", "--models", str(copy), "--rounds", "1"]) == 0
    assert table(capsys.readouterr().out)[0]["steps"] == "4 × 2, temperature 0.9"
