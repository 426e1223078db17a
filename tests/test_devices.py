"""Devices, the dtype that suits each, and threads."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from slope import Slope, loop, run_steps

import far
from far import devices
from far.devices import (
    check_device_name,
    device_title,
    has_fast_bfloat16,
    resolve_device,
    resolve_training_dtype,
    set_threads,
)
from far.errors import InputError
from far.precision import resolve_dtype
from far.processes import Processes
from far.training.config import GeneratorRecipe, LoopConfig
from far.training.loop import Trainer, published, resolve_loop

CPU = torch.device("cpu")
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
UNKNOWN = ["gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cuda:01", " cuda", "cpu:1", "meta", "", "nowhere\n"]


def one_line(error: pytest.ExceptionInfo[InputError], *names: str) -> None:
    assert "\n" not in str(error.value)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_device_names_are_refused(name: str) -> None:
    for call in (check_device_name, resolve_device, far.load, lambda name: LoopConfig(device=name)):
        with pytest.raises(InputError) as error:
            call("avatars-64", device=name) if call is far.load else call(name)
        one_line(error, repr(name))


@pytest.mark.parametrize("name", [None, 3, True, torch.device("meta")])
def test_other_values_than_names_and_devices_are_refused(name: object) -> None:
    with pytest.raises(InputError) as error:
        resolve_device(name)  # type: ignore[arg-type]
    one_line(error, str(name))


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "mps", "xpu", torch.device("cuda", 1)])
def test_devices_that_torch_does_not_find_are_refused(name: str | torch.device) -> None:
    if {"cuda": torch.cuda, "mps": torch.backends.mps, "xpu": torch.xpu}[
        torch.device(name).type
    ].is_available():
        pytest.skip("this machine has one")
    with pytest.raises(InputError) as error:
        resolve_device(name)
    one_line(error, repr(str(name)))


def test_strings_and_devices_are_taken_everywhere(pipeline_folder: Path) -> None:
    assert resolve_device(CPU) == resolve_device("cpu") == CPU
    assert LoopConfig(device=CPU) == LoopConfig(device="cpu")  # type: ignore[arg-type]
    assert resolve_dtype("float16", CPU) == "float16"
    assert far.load(pipeline_folder, device=CPU).device == CPU
    assert device_title(CPU) == "cpu"


def test_auto_prefers_cuda_and_takes_mps_only_if_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for computes, name in ((True, "mps"), (False, "cpu")):
        monkeypatch.setattr(devices, "_computes", lambda name, computes=computes: computes)
        assert resolve_device("auto").type == name
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "_computes", lambda name: True)
    assert resolve_device("auto").type == "cuda"


def test_cuda_device_that_fails_is_an_error_instead_of_a_silent_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> bool:
        raise RuntimeError("no kernel image is available\nand a second line")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "_computes", fail)
    with pytest.raises(InputError) as error:
        resolve_device("auto")
    one_line(error, "'cuda'", "no kernel image is available")


def test_trial_of_a_device_runs_and_sees_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = devices._computes.__wrapped__
    assert trial("cpu")
    attention = torch.nn.functional.scaled_dot_product_attention
    calls = iter((1.1, 1.0))
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *qkv: next(calls) * attention(*qkv)
    )
    assert not trial("cpu")


def test_title_of_a_cuda_device_is_that_of_the_device_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_name", lambda device=None: f"card {0 if device is None else device.index}"
    )
    assert device_title(torch.device("cuda", 1)) == "cuda:1 (card 1)"


def test_number_beyond_the_last_cuda_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "_computes", lambda name: True)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InputError) as error:
        resolve_device("cuda:2")
    one_line(error, "'cuda:2'", "cuda:1")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_gets_its_own_cuda_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "_computes", lambda name: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Processes(5, 8).device(name) == torch.device("cuda", 1)
    assert Processes(5, 8).device("cpu") == CPU
    for local in ("2", "x", None):
        if local is None:
            monkeypatch.delenv("LOCAL_RANK")
        else:
            monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(InputError) as error:
            Processes(5, 8).device(name)
        one_line(error, "LOCAL_RANK")


def test_processes_without_cuda_take_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert Processes(0, 2).device("auto") == CPU


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64",
    reason="reads the flags of Linux on x86",
)
def test_fast_bfloat16_follows_from_what_the_system_reports() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL") != "ALL":
        pytest.skip("instructions are masked")
    assert has_fast_bfloat16(CPU) == (
        "amx_bf16" in flags or ("avx512_bf16" in flags and "GenuineIntel" not in flags)
    )


def test_auto_is_float32_if_the_instructions_are_masked() -> None:
    code = "from far.devices import *; from far.precision import resolve_dtype; d = resolve_device('cpu'); "
    code += "print(has_fast_bfloat16(d), resolve_training_dtype('auto', d), resolve_dtype('auto', 'cpu'))"
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **AVX2}, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["False", "float32", "float32"]


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bfloat16_only_with_instructions_for_it(
    native: bool, monkeypatch: pytest.MonkeyPatch, pipeline_folder: Path
) -> None:
    monkeypatch.setattr(devices, "has_fast_bfloat16", lambda device: native)
    expected = "bfloat16" if native else "float32"
    assert resolve_loop(LoopConfig(dtype="auto")) == resolve_loop(LoopConfig(dtype=expected))  # type: ignore[arg-type]
    assert (
        resolve_training_dtype("auto", CPU)
        == resolve_dtype("auto", "cpu")
        == resolve_loop(LoopConfig()).dtype
        == expected
    )
    assert resolve_training_dtype("float16", CPU) == "float16"
    pipeline = far.load(pipeline_folder, dtype="auto", device="cpu")
    found = {part.dtype for module in (pipeline.model, pipeline.autoencoder) for part in module.parameters()}
    assert found == {getattr(torch, expected)}


def test_dtypes_that_training_does_not_have_are_refused() -> None:
    for dtype in ("bf16", "int8", "half", torch.bfloat16):
        with pytest.raises(InputError) as error:
            LoopConfig(dtype=dtype)  # type: ignore[arg-type]
        one_line(error, repr(dtype))


def test_training_in_auto_equals_training_in_the_chosen_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "has_fast_bfloat16", lambda device: False)
    weights = {}
    for dtype in ("auto", "float32", "bfloat16"):
        trainer = Trainer(Slope(), loop(dtype=dtype), tmp_path / dtype)
        run_steps(trainer, 3)
        weights[dtype] = trainer.module.weight.detach()
    assert trainer.config.device != "auto"
    assert torch.equal(weights["auto"], weights["float32"])
    assert not torch.equal(weights["auto"], weights["bfloat16"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_resumed_run_in_auto_keeps_the_dtype_of_its_checkpoint(dtype: str, tmp_path: Path) -> None:
    first = Trainer(Slope(), loop(dtype=dtype), tmp_path)
    run_steps(first, 2)
    first.save()
    assert resolve_loop(loop(dtype="auto"), tmp_path).dtype == dtype
    second = Trainer(Slope(), loop(dtype="auto"), tmp_path)
    second.restore(True)
    assert second.config.dtype == dtype
    run_steps(first, 3)
    run_steps(second, 3)
    assert torch.equal(first.module.weight, second.module.weight)


def test_resumed_run_reports_that_its_dtype_changes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = Trainer(Slope(), loop(dtype="bfloat16"), tmp_path)
    run_steps(first, 2)
    first.save()
    for dtype, changes in (("float32", True), ("bfloat16", False)):
        second = Trainer(Slope(), loop(dtype=dtype, steps=3 if changes else 4), tmp_path)
        second.restore(True)
        before = second.resumed_dtype
        second.run()
        line = capsys.readouterr().out.splitlines()[0]
        assert dtype in line
        assert (before in line.replace(dtype, "", 1)) == (before != dtype)


def test_slow_bfloat16_is_reported_if_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for native in (True, False):
        monkeypatch.setattr("far.training.loop.has_fast_bfloat16", lambda device, native=native: native)
        Trainer(Slope(), loop(dtype="bfloat16", steps=1), tmp_path / str(native)).run()
        assert ("float32" in capsys.readouterr().out) != native


def test_published_recipe_has_the_kind_of_device_without_its_number() -> None:
    recipe = GeneratorRecipe(training=LoopConfig(device="cuda:3"))
    assert published(recipe)["training"]["device"] == "cuda"


@pytest.mark.parametrize("count", [0, -1, 10**6])
def test_absurd_numbers_of_threads_are_refused(count: int) -> None:
    before = torch.get_num_threads()
    with pytest.raises(InputError) as error:
        set_threads(count)
    one_line(error, str(count))
    assert torch.get_num_threads() == before


def test_threads_are_set() -> None:
    before = torch.get_num_threads()
    set_threads(before + 1)
    assert torch.get_num_threads() == before + 1
    set_threads(before)


def test_first_cuda_device_turns_tf32_off_and_later_ones_keep_what_the_user_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "_computes", lambda name: True)
    devices._turn_tf32_off.cache_clear()
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = True
        resolve_device("cpu")
        assert torch.backends.cudnn.allow_tf32
        resolve_device("cuda:1")
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = True
        resolve_device("cuda:0")
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before
        devices._turn_tf32_off.cache_clear()
