"""``benchmarks.gpu`` without a GPU: checks hold and can fail, deadlines end parts, MAR's path is MAR's."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import far
from benchmarks import gpu, gpu_checks, speed_report
from far.benchmark.mar_plain import PlainMar
from far.convert import convert_mar
from far.pipeline import Pipeline
from tests.refusals import refused

ROOT = Path(__file__).parents[1]


def run(folder: Path, root: Path, *parts: str) -> tuple[dict, subprocess.CompletedProcess]:
    """Return the script's report and its process, started in ``root``, which holds far and the benchmarks."""
    report = folder / "report.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--device",
        "cpu",
        "--out",
        str(report),
        "--parts",
        *parts,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    return json.loads(report.read_text()), done


def test_script_runs_from_a_sparse_checkout_without_a_gpu(tmp_path: Path) -> None:
    root = tmp_path / "sparse"
    for part in ("far", "benchmarks"):
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
    parts = [
        "machine",
        "heads",
        "recordings",
        "training",
        "autoencoder",
        "far-b",
        "far-bc-b",
        "far-causal-b",
        "approximations",
        "MAR's plain path",
        "training speed",
        "compiled blocks",
    ]
    report, done = run(tmp_path, root, *parts)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no GPU" in report["note"]
    assert list(report["parts"]) == parts
    assert report["checks"]["failed"] == []
    assert report["checks"]["held"] > 20
    assert all(part["entries"] for part in report["parts"].values())
    assert report["parts"]["far-b"]["entries"]["4 head steps, batch 1"] == {"ran": True}


def test_bundled_models_are_checked(tmp_path: Path) -> None:
    report, done = run(tmp_path, ROOT, "bundled models")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"avatars-64", "one seed, one image", "edit"} <= report["parts"]["bundled models"][
        "entries"
    ].keys()


def test_wrong_result_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    case = torch.device("cpu"), "masked", {"kind": "shortcut"}, 3.0, 3, (torch.float32,)
    assert gpu_checks.head_case(*case)["float32"]["holds"]
    prepared = gpu_checks.copy.deepcopy

    def slightly_wrong(model: torch.nn.Module) -> torch.nn.Module:
        model = prepared(model)
        model.head.network.output.linear.bias.data += 1e-2
        return model

    monkeypatch.setattr(gpu_checks.copy, "deepcopy", slightly_wrong)
    assert not gpu_checks.head_case(*case)["float32"]["holds"]


def test_recordings_and_compiled_blocks_that_fall_back_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager generations and plain blocks draw the same images, so no comparison of images would notice."""

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr("far.recording.recorder", fail)
    for module in ("far.recording", "benchmarks.gpu_checks"):
        monkeypatch.setattr(f"{module}.can_record", lambda device: True)
    with pytest.raises(RuntimeError, match="not recorded: operation not permitted"):
        gpu_checks.recording_case("avatars-64", torch.device("cpu"), 1, True)
    pipeline = gpu_checks.bundled("avatars-64", "float32", "cpu")
    eager = Pipeline(pipeline.model, None, pipeline.classes, pipeline.defaults, record=False)
    gpu_checks.check_not_plain(eager, compiled=True)
    monkeypatch.setattr("far.compiling._faults", ["no compiler"])
    gpu_checks.check_not_plain(eager, compiled=False)
    with pytest.raises(RuntimeError, match="not compiled: no compiler"):
        gpu_checks.check_not_plain(eager, compiled=True)


def test_16_bit_weights_fail_the_float32_limit() -> None:
    found = gpu_checks.head_case(torch.device("cpu"), "masked", {"kind": "flow"}, 3.0, 0, (torch.float16,))[
        "float16"
    ]
    assert gpu_checks.FLOAT32 < found["found"] <= found["limit"]


def test_steps_of_the_device_continue_from_the_given_tokens() -> None:
    """An error of one step is not carried to the next."""
    model = gpu_checks.tiny("causal", kind="flow")
    config = gpu_checks.SamplingConfig(ar_steps=8, head_steps=2)
    reference = gpu_checks.drawn_tokens(model, config, None)
    other = [reference[0], *(torch.zeros_like(tokens) for tokens in reference[1:])]
    followed = gpu_checks.drawn_tokens(model, config, None, other)
    assert torch.equal(followed[0], reference[0])
    assert torch.equal(followed[1], reference[1])
    assert not torch.equal(followed[2], reference[2])


def test_deadline_skips_entries_that_do_not_fit_and_keeps_the_others() -> None:
    def endless() -> dict:
        while True:
            time.sleep(0.01)

    def broken() -> dict:
        raise MemoryError("no room")

    written: list[dict] = []
    calls = {
        "quick": lambda: {"found": 1},
        "broken": broken,
        "endless": endless,
        "after": lambda: {"found": 2},
    }
    start = time.monotonic()
    gpu.run_part(calls, start + 0.3, lambda part: written.append(json.loads(json.dumps(part))))
    assert time.monotonic() - start < 5
    assert len(written) == len(calls), "the report is written after each entry"
    assert written[-1]["left_out"] == ["endless", "after"]
    assert written[-1]["entries"]["quick"] == {"found": 1}
    assert dict(gpu.checks(written[-1])) == {"entries: broken": False}


def test_parts_fit_into_eight_minutes() -> None:
    assert sum(gpu.PARTS.values()) <= 460
    assert gpu.PARTS.keys() == gpu.CHECKS.keys() | gpu.SPEED.keys()


def test_table_of_a_report_compares_with_mars_plain_path_at_the_same_batch() -> None:
    entry = {"seconds per batch": 1.0, "images/s": 1.0, "GiB": 2.0}
    parts = {
        "MAR's plain path": {
            f"{speed_report.PLAIN}, batch 1": {**entry, "seconds per image": 8.0},
            f"{speed_report.PLAIN}, batch 64": {**entry, "seconds per image": 1.0},
        },
        "far-b": {
            "4 head steps, batch 1": {**entry, "seconds per image": 0.5},
            "4 head steps, batch 64": {"error": "out of memory", "holds": False},
        },
    }
    report = {
        "machine": {"device": "cuda (NVIDIA X)", "torch": "2", "cuda": "13", "commit": "0123456789"},
        "parts": {part: {"entries": entries, "left_out": []} for part, entries in parts.items()},
    }
    text = speed_report.gpu_table(report)
    assert "NVIDIA X" in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    assert [row[-1] for row in rows[2:]] == ["1.0", "1.0", "16.0"]
    assert rows[-1][:4] == ["far-b, 4 head steps", "1", "0.5", "2"]
    with refused("cpu"):
        speed_report.gpu_table({**report, "machine": {"device": "cpu"}})


@pytest.mark.parametrize("kind", ["plain", "guided"])
def test_plain_path_of_mar_draws_the_recorded_images_of_the_original(kind: str, tmp_path: Path) -> None:
    """The recordings of MAR's code have weights, orders, noise and latents."""
    fixtures = Path(__file__).parent / "reference/fixtures"
    convert_mar(fixtures / "mar_reference_checkpoint.pth", tmp_path, ema=False)
    with safe_open(fixtures / "mar_reference.safetensors", "pt") as file:
        recorded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — not a mapping
        settings = file.metadata()
    guidance, temperature = (
        (float(settings["cfg"]), float(settings["temperature"])) if kind == "guided" else (1.0, 1.0)
    )
    noise = iter(
        recorded[name]
        for name in sorted(name for name in recorded if name.startswith(f"sample.{kind}.noise."))
    )
    model = far.load(tmp_path, device="cpu").model
    plain = PlainMar(model, lambda rows, channels: next(noise)[:rows], temperature)
    labels = recorded.get(f"sample.{kind}.labels", recorded["forward.labels"])
    latents = plain.sample(labels, recorded[f"sample.{kind}.orders"], int(settings["num_iter"]), 10, guidance)
    expected = recorded[f"sample.{kind}.latents"]
    assert float((latents - expected).abs().max() / expected.abs().max()) < 1e-3
    assert next(noise, None) is None, "the original used more noise"
