"""The training loop: exact resuming, interruption, divergence, damaged checkpoints, schedules, data order."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import VALUES, newest, read_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from far.cli.main import main
from far.errors import InputError
from far.folder import load_autoencoder
from far.processes import Processes
from far.recipe import load_recipe
from far.training import checkpoint
from far.training.checkpoint import list_checkpoints, save_checkpoint
from far.training.config import LoopConfig
from far.training.ema import Ema
from far.training.epochs import epoch_rows
from far.training.generator import GeneratorTask
from far.training.log import Meter, TrainingLog
from far.training.loop import Trainer
from far.training.schedule import learning_rate_scale

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def make_task(path: Path, *overrides: str) -> tuple[GeneratorTask, LoopConfig, Path]:
    recipe = load_recipe(path, overrides)
    config = recipe.generator
    task = GeneratorTask(
        config, Path(recipe.data), recipe.latents_folder, load_autoencoder(recipe.autoencoder_folder)
    )
    return task, config.training, recipe.model_folder


def assert_same(a: dict, b: dict) -> None:
    assert a["step"] == b["step"]
    assert a["tensors"].keys() == b["tensors"].keys()
    assert {name.partition(".")[0] for name in a["tensors"]} == {"module", "ema", "optimizer"}
    for name, tensor in a["tensors"].items():
        assert torch.equal(tensor, b["tensors"][name]), name


# A head whose loss changes after the run is resumed, and which learns guidance.
FLOW_MAP = ["kind=flow_map", "max_guidance=3.0", "flow_steps=15"]


@pytest.mark.parametrize(
    "head", [[], FLOW_MAP, [*FLOW_MAP, "objective=mean_flow"]], ids=["shortcut", "lagrangian", "mean_flow"]
)
def test_run_resumed_after_ten_steps_equals_an_uninterrupted_one(
    recipe: Path, tmp_path: Path, head: list[str]
) -> None:
    overrides = [f"generator.network.head.{override}" for override in head]
    # The recipe uses dropout, whose random numbers must resume too.
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run in (whole, parts):
        run.mkdir()
        (run / "latents").symlink_to((tmp_path / "run" / "latents").resolve())
    # The schedule depends on the number of steps, so the first half is run step by step.
    task, config, folder = make_task(recipe, f"run={whole}", *overrides)
    trainer = Trainer(task, config, folder)
    trainer.run()
    task, config, folder = make_task(recipe, f"run={parts}", *overrides)
    first = Trainer(task, config, folder)
    for _ in range(10):
        first.train_step(Meter())
    first.save()
    task, config, folder = make_task(recipe, f"run={parts}", *overrides)
    second = Trainer(task, config, folder)
    second.restore(resume=True)
    assert second.step == 10
    second.run()
    assert_same(newest(whole / "model"), newest(parts / "model"))


def test_training_lowers_the_logged_loss(recipe: Path, tmp_path: Path) -> None:
    values = ["steps=150", "learning_rate=0.003", "checkpoint_every=150", "evaluate_every=75"]
    assert main(["train", str(recipe), *(f"generator.training.{value}" for value in values)]) == 0
    entries = [json.loads(line) for line in (tmp_path / "run/model/log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    for name in (
        "loss_flow",
        "loss_consistency",
        "loss_t0.00",
        "loss_t0.75",
        "images_per_second",
        "loader_share",
        "learning_rate",
    ):
        assert all(math.isfinite(entry[name]) for entry in entries if "loss" in entry), name
    for name in ("FD", "KID", "recall"):
        assert any(f"quick {name} (EfficientNet-Lite0)" in entry for entry in entries), name
    assert sorted(path.name for path in (tmp_path / "run/model/samples").iterdir())[-1] == "step-00000150.png"


def test_run_is_neither_overwritten_nor_continued_after_its_last_step(
    recipe: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train", str(recipe)]) == 0
    before = newest(recipe.parent / "run" / "model")
    capsys.readouterr()
    assert main(["train", str(recipe)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert str(recipe.parent / "run" / "model") in line
    assert "20" in line
    assert main(["train", str(recipe), "--resume"]) == 0
    assert_same(newest(recipe.parent / "run" / "model"), before)


@pytest.mark.parametrize("options", [[], ["--resume"]], ids=["new", "resumed"])
def test_run_of_version_01_is_not_started_again(
    options: list[str], recipe: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = recipe.parent / "run" / "model"
    (folder / "checkpoints").mkdir(parents=True)
    old = folder / "checkpoints" / "step-00000010.pt"
    old.write_bytes(b"saved by torch")
    assert main(["train", str(recipe), *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert str(old) in line
    assert [path for path in folder.rglob("*") if path.is_file()] == [old]


def test_second_training_in_a_folder_is_rejected_and_changes_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    step, outcomes = Trainer.train_step, []

    def start_another(trainer: Trainer, meter: Meter) -> None:
        monkeypatch.setattr(Trainer, "train_step", step)
        (folder / ".model.safetensors.abcdefgh.far").mkdir()  # as while saving
        before = sorted(folder.rglob("*"))
        status = main(["train", str(recipe), "--resume"])
        outcomes.append(
            (status, capsys.readouterr().err.splitlines()[-1], sorted(folder.rglob("*")) == before)
        )
        step(trainer, meter)

    folder = tmp_path / "run" / "model"
    monkeypatch.setattr(Trainer, "train_step", start_another)
    assert main(["train", str(recipe)]) == 0
    [(status, line, unchanged)] = outcomes
    assert (status, unchanged) == (2, True)
    assert "far: error: " in line  # after the first one's progress bar
    assert str(folder) in line
    assert main(["train", str(recipe), "generator.training.steps=21", "--resume"]) == 0


@pytest.mark.usefixtures("one_thread")
def test_interrupted_run_is_saved_and_resumes_to_the_uninterrupted_weights(
    recipe: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    signals = {signal.SIGINT: tmp_path / "SIGINT", signal.SIGTERM: tmp_path / "SIGTERM"}
    for run in (whole, *signals.values()):
        run.mkdir()
        (run / "latents").symlink_to((tmp_path / "run" / "latents").resolve())
    names = ("steps=200", "log_every=1", "checkpoint_every=1000", "evaluate_every=1000")
    steps = [f"generator.training.{name}" for name in names]
    assert main(["train", str(recipe), f"run={whole}", *steps]) == 0
    for signum, cut in signals.items():
        command = [sys.executable, "-m", "far", "train", str(recipe), f"run={cut}", *steps]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE, env=ONE_THREAD
        )
        log = cut / "model" / "log.jsonl"
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signum)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + signum
        [acknowledgment] = [line for line in errors.splitlines() if line.startswith("far: ")]
        assert "Ctrl-C" in acknowledgment
        step = list_checkpoints(cut / "model" / "checkpoints")[-1][0]
        assert str(step) in output.splitlines()[-1]
        assert 0 < step < 200
        assert main(["train", str(recipe), f"run={cut}", *steps, "--resume"]) == 0
        assert_same(newest(whole / "model"), newest(cut / "model"))


def test_second_ctrl_c_stops_at_once_and_keeps_saved_checkpoints(recipe: Path, tmp_path: Path) -> None:
    few = [
        "generator.training.steps=10",
        "generator.training.checkpoint_every=1",
        "generator.training.evaluate_every=5",
    ]
    # The evaluation after step 5 takes hours.
    endless = [*few, "generator.evaluation.images=1000000", "generator.evaluation.references=12"]
    command = [sys.executable, "-m", "far", "train", str(recipe), *endless]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE, env=ONE_THREAD
    )
    checkpoints = tmp_path / "run/model/checkpoints"
    deadline = time.monotonic() + 120
    while not (checkpoints / "step-00000004").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1)  # until evaluation has started
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None, "the first Ctrl-C waits"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("far: interrupted")
    assert "--resume" in errors.splitlines()[-1]
    assert [step for step, _ in list_checkpoints(checkpoints)] == [3, 4]
    assert main(["train", str(recipe), *few, "--resume"]) == 0
    assert newest(tmp_path / "run/model")["step"] == 10


def test_diverging_run_ends_with_an_error_that_names_its_last_good_checkpoint(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train", str(recipe)]) == 0
    checkpoint = list_checkpoints(tmp_path / "run/model/checkpoints")[-1][1]
    # A huge learning rate makes the weights, and so all later losses, not finite.
    overrides = [
        "generator.training.steps=60",
        "generator.training.learning_rate=1.0e+38",
        "generator.training.schedule=constant",
    ]
    assert main(["train", str(recipe), *overrides, "--resume"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("far: error: ")
    for value in ("20", "1e+38", str(checkpoint)):
        assert value in line
    assert all(torch.isfinite(value).all() for value in newest(tmp_path / "run/model")["tensors"].values())


def test_incomplete_checkpoint_is_rejected_and_the_one_before_resumes(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train", str(recipe)]) == 0
    last = list_checkpoints(tmp_path / "run/model/checkpoints")[-1][1]
    [file] = last.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    capsys.readouterr()
    assert main(["train", str(recipe), "--resume"]) == 2
    message = capsys.readouterr().err
    assert str(last) in message
    assert message.count("\n") == 1
    shutil.rmtree(last)
    assert main(["train", str(recipe), "--resume"]) == 0
    assert newest(tmp_path / "run/model")["step"] == 20


@pytest.mark.parametrize("dies", ["evaluate", "publish"])
def test_run_that_dies_after_its_last_step_is_resumed_at_that_step(
    dies: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(task: GeneratorTask, *arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GeneratorTask, dies, die)
        assert main(["train", str(recipe), "generator.training.checkpoint_every=20"]) == 130
    assert main(["train", str(recipe), "--resume"]) == 0
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["training"]["finished steps"] == config["results"]["step"] == 20
    assert (tmp_path / "run/model/samples/step-00000020.png").exists()


def test_resumed_run_publishes_the_figures_of_its_last_evaluation(recipe: Path, tmp_path: Path) -> None:
    often = ["generator.training.evaluate_every=5", "generator.training.checkpoint_every=5"]
    assert main(["train", str(recipe), *often, "generator.training.steps=5"]) == 0
    longer = [often[1], "generator.training.steps=20", "generator.training.evaluate_every=20"]
    published: list[int] = []

    def publish(self: GeneratorTask, ema: object, folder: Path, step: int, results: dict) -> None:
        published.append(results["step"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GeneratorTask, "publish", publish)
        assert main(["train", str(recipe), *longer, "--resume"]) == 0
    assert published == [5, 5, 20]


def test_resumed_log_continues_at_the_checkpoint(recipe: Path, tmp_path: Path) -> None:
    def entries() -> list[tuple[int, bool]]:
        lines = [json.loads(line) for line in (tmp_path / "run/model/log.jsonl").read_text().splitlines()]
        return [(entry["step"], "loss" in entry) for entry in lines]

    assert main(["train", str(recipe)]) == 0
    whole = entries()
    assert whole == [(5, True), (10, True), (15, True), (20, True), (20, False)]
    shutil.rmtree(
        list_checkpoints(tmp_path / "run/model/checkpoints")[-1][1]
    )  # as if the run was killed before writing it
    with (tmp_path / "run/model/log.jsonl").open("a") as file:
        file.write('{"time": 1.0, "step": 2')  # an incomplete line
    assert main(["train", str(recipe), "--resume"]) == 0
    assert entries() == whole


def test_line_after_an_evaluation_averages_all_steps_since_the_last(recipe: Path, tmp_path: Path) -> None:
    def losses(every: int) -> list[float]:
        values = ["steps=8", f"log_every={every}", "evaluate_every=3", "checkpoint_every=8"]
        options = [f"generator.training.{value}" for value in values]
        assert main(["train", str(recipe), f"model=every-{every}", *options]) == 0
        lines = (tmp_path / f"run/every-{every}/log.jsonl").read_text().splitlines()
        return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]

    single = losses(1)
    assert losses(4) == pytest.approx([sum(single[:4]) / 4, sum(single[4:]) / 4], rel=1e-5)


def test_log_continues_after_a_full_disk(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = tmp_path / "run/model/log.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # in bytes; the first line is longer
    try:
        assert main(["train", str(recipe)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(log) in capsys.readouterr().err.splitlines()[-1]
    assert log.stat().st_size == 100
    assert main(["train", str(recipe), "--resume"]) == 0
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [5, 10, 15, 20, 20]


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1' + "0" * 400 + "}",
        "[" * 100_000,
        '{"step": "x"}',
        '{"step": null}',
        "3",
        "{}",
        '{"step": 3',
    ],
)
def test_damaged_and_later_lines_are_removed_from_a_resumed_log(line: str, tmp_path: Path) -> None:
    kept = '{"step": 12, "loss": 0.5}\n'
    (tmp_path / "log.jsonl").write_text(f'{kept}{line}\n{{"step": 21}}\n{kept.rstrip()}')
    with TrainingLog(tmp_path, LoopConfig(steps=30), 20, Processes()):
        assert (tmp_path / "log.jsonl").read_text() == kept


def test_run_is_not_resumed_with_another_network(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", str(recipe)]) == 0
    assert (
        main(
            [
                "train",
                str(recipe),
                "generator.network.head.depth=2",
                "generator.training.steps=30",
                "--resume",
            ]
        )
        == 2
    )
    line = capsys.readouterr().err.splitlines()[-1]
    assert "step-00000020" in line
    assert "head" in line  # the name of the first tensor that differs


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, {"value": torch.tensor(step)}, VALUES)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 10]
    assert len(list(tmp_path.iterdir())) == 2


def test_large_checkpoint_consists_of_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_FILE_BYTES", 1000)
    tensors = {f"{number}": torch.randn(100) for number in range(10)}
    path = save_checkpoint(tmp_path, 1, tensors, VALUES)
    sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
    assert len(sizes) == 4
    found = read_checkpoint(path)["tensors"]
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_learning_rate_and_weight_decay_depend_on_the_part_of_the_model(recipe: Path) -> None:
    task, config, folder = make_task(recipe, "generator.training.head_learning_rate=2.5e-4")
    trainer = Trainer(task, config, folder)
    names = {id(parameter): name for name, parameter in task.module.named_parameters()}
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }
    assert set(found) == set(names.values())
    for name, (rate, decay) in found.items():
        assert rate == (2.5e-4 if name.startswith("head.") else 1e-3)
        plain = name.endswith("bias") or "norm" in name or name.startswith("head.")
        assert decay == (0.0 if plain else 0.02), name


def rates(**values: object) -> list[float]:
    config = LoopConfig(warmup_steps=5, **values)
    return [learning_rate_scale(config, step) for step in range(config.steps + 1)]


def test_cosine_rises_in_the_warmup_and_falls_along_a_half_cosine() -> None:
    scales = rates(steps=25, schedule="cosine")
    assert scales[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    for step in range(5, 26):
        assert scales[step] == pytest.approx(math.cos(math.pi / 2 * (step - 5) / 20) ** 2)


def test_wsd_keeps_its_rate_until_the_last_steps_whatever_their_number() -> None:
    for steps in (25, 100, 1000):
        scales, decay = rates(steps=steps, schedule="wsd", decay_fraction=0.4), 2 * steps // 5
        assert scales[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
        assert set(scales[5 : steps - decay + 1]) == {1.0}
        for left in range(decay):
            expected = 1 - math.sqrt((decay - left) / decay)
            assert scales[steps - left] == pytest.approx(expected)
    # A decay over all steps begins after the warmup.
    assert rates(steps=25, schedule="wsd", decay_fraction=1.0)[4:6] == [1.0, 1.0]


def test_wsd_run_whose_steps_are_raised_before_its_decay_equals_one_of_that_length(
    recipe: Path, tmp_path: Path
) -> None:
    names = ("schedule=wsd", "decay_fraction=0.25", "checkpoint_every=15", "evaluate_every=1000")
    wsd = [f"generator.training.{name}" for name in names]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run in (whole, parts):
        run.mkdir()
        (run / "latents").symlink_to((tmp_path / "run" / "latents").resolve())
    assert main(["train", str(recipe), f"run={whole}", *wsd, "generator.training.steps=40"]) == 0
    task, config, folder = make_task(recipe, f"run={parts}", *wsd)
    first = Trainer(task, config, folder)
    for _ in range(15):
        first.train_step(Meter())
    first.save()
    longer = [*wsd, "generator.training.steps=40", "--resume"]
    assert main(["train", str(recipe), f"run={parts}", *longer]) == 0
    assert_same(newest(whole / "model"), newest(parts / "model"))


def test_gradient_clipping_bounds_the_gradient(recipe: Path) -> None:
    task, config, folder = make_task(recipe, "generator.training.gradient_clip=1.0e-3")
    trainer = Trainer(task, config, folder)
    trainer.train_step(Meter())
    gradients = [p.grad.flatten() for p in task.module.parameters() if p.grad is not None]
    assert torch.cat(gradients).norm() <= 1.001e-3


def test_ema_follows_the_closed_form() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(module.weight, 1.0)
    ema = Ema(module, 0.5)
    expected = 1.0
    for step, value in enumerate([2.0, -1.0, 4.0, 0.5]):
        torch.nn.init.constant_(module.weight, value)
        ema.update(module, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert ema.module.weight.item() == pytest.approx(expected)
    assert module.weight.item() == 0.5
    assert not ema.module.weight.requires_grad


@given(rows=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 3))
def test_every_epoch_visits_every_row_once(rows: int, batch: int, seed: int) -> None:
    steps = -(-3 * rows // batch)
    stream = torch.cat([epoch_rows(step, batch, rows, seed) for step in range(steps)])
    assert len(stream) == steps * batch
    for epoch in range(3):
        assert stream[epoch * rows : (epoch + 1) * rows].sort().values.tolist() == list(range(rows))


def test_invalid_loop_settings_are_rejected() -> None:
    for values in (
        {"steps": 0},
        {"batch_size": -1},
        {"ema_decay": 1.0},
        {"learning_rate": 0.0},
        {"decay_fraction": 0.0},
    ):
        with pytest.raises(InputError, match=next(iter(values))):
            LoopConfig(**values)
