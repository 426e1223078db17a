"""Estimated time and memory of a training against closed forms."""

import re
import types
from pathlib import Path

import pytest
from torch import nn

from far.processes import Processes
from far.training import log
from far.training.config import LoopConfig
from far.training.estimate import TimeLeft, duration, size_line, times_left
from far.training.log import TrainingLog


def test_remaining_evaluations_are_those_that_the_loop_makes() -> None:
    for steps in range(1, 30):
        for every in range(1, 12):
            due = [step for step in range(1, steps + 1) if step % every == 0 or step == steps]
            for done in range(steps + 1):
                assert times_left(done, steps, every) == sum(step > done for step in due)


def test_time_left_counts_steps_evaluations_and_checkpoints() -> None:
    left = TimeLeft(LoopConfig(steps=100, evaluate_every=30, checkpoint_every=50))
    assert left.seconds(0) is None
    left.add_step(60.0)  # the first step, which allocates memory
    for _ in range(9):
        left.add_step(2.0)
    assert left.measured
    assert left.seconds(10) == pytest.approx(90 * 2.0)
    left.add_pause("evaluating", 7.0)
    left.add_pause("saving", 0.5)
    # Evaluations after steps 60, 90, 100, checkpoints after 50 and 100.
    assert left.seconds(40) == pytest.approx(60 * 2.0 + 3 * 7.0 + 2 * 0.5)
    assert left.seconds(100) == 0
    for _ in range(50):
        left.add_step(4.0)  # slower from now on
    assert left.seconds(60) == pytest.approx(40 * 4.0 + 2 * 7.0 + 1 * 0.5)


def test_time_is_announced_after_a_short_measurement_and_kept_in_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = types.SimpleNamespace(now=0.0, perf_counter=lambda: clock.now, time=lambda: 0.0)
    monkeypatch.setattr(log, "time", clock)
    config = LoopConfig(steps=1000, evaluate_every=600, checkpoint_every=1000)
    with TrainingLog(tmp_path / "run", config, 0, Processes()) as training_log:
        for step in range(600):
            clock.now += 3.0 if step else 90.0
            training_log.advance()
        with training_log.doing("evaluating"):
            clock.now += 100.0
        values, bar = training_log.bar.format_dict, str(training_log.bar)
        clock.now += 3.0
        training_log.advance()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if str(tmp_path / "run") in line]
    minutes = re.search(r"(\d+) minutes", line)
    assert minutes is not None
    assert int(minutes[1]) == pytest.approx(997 * 3 / 60, abs=1)
    assert "2 evaluations" in line
    # 400 steps of 3 seconds, and the last evaluation.
    assert values["left"] == "21:40"
    assert values["rate"] == pytest.approx(1 / 3)
    assert "21:40" in str(bar)


def test_announced_time_counts_evaluations_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = types.SimpleNamespace(now=0.0, perf_counter=lambda: clock.now, time=lambda: 0.0)
    monkeypatch.setattr(log, "time", clock)
    config = LoopConfig(steps=100, evaluate_every=2, checkpoint_every=100)
    with TrainingLog(tmp_path / "run", config, 0, Processes()) as training_log:
        for step in range(1, 5):
            clock.now += 3.0
            training_log.advance()
            if step == 2:
                with training_log.doing("evaluating"):
                    clock.now += 300.0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if str(tmp_path / "run") in line]
    # 96 steps of 3 seconds and 48 evaluations.
    assert "4.1 hours" in line
    assert "evaluation" not in line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(40, "40 seconds"), (119, "119 seconds"), (150, "2 minutes"), (31 * 60, "31 minutes"),
     (2.3 * 3600, "2.3 hours"), (3.1 * 86400, "3.1 days")],
)  # fmt: skip
def test_durations_have_readable_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_memory_is_that_of_weights_average_gradients_and_moments() -> None:
    """Matrices of 4 MiB: one trained, one frozen, both with an average; a discriminator without one."""
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 1024, bias=False))
    average = nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 1024, bias=False))
    discriminator = nn.Linear(1024, 1024, bias=False)
    line = size_line([model], average, model[0].parameters())
    assert re.findall(r"\d[\d.]*", line)[:3] == ["1.05", "2.1", f"{(2 + 2 + 3) * 4}"]
    line = size_line([model, discriminator], average, [*model.parameters(), *discriminator.parameters()])
    assert re.findall(r"\d[\d.]*", line)[:3] == ["3.15", "3.15", f"{(3 + 2 + 9) * 4}"]
