"""The switch ``deterministic``: torch's settings within a training, and operations that it rules out."""

import os
from pathlib import Path

import pytest
import torch
from slope import Slope, loop
from torch import Tensor

from far.errors import InputError
from far.training.loop import train

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def settings() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        os.environ.get(WORKSPACE),
    )


@pytest.mark.parametrize("workspace", [None, ":0:0"])
def test_settings_hold_during_the_training_only(
    workspace: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    if workspace is None:
        monkeypatch.delenv(WORKSPACE, raising=False)
    else:
        monkeypatch.setenv(WORKSPACE, workspace)
    before, seen = settings(), []

    def note(loss: Tensor) -> Tensor:
        seen.append(settings())
        return loss

    for deterministic in (True, False):
        train(Slope({3: note}), loop(deterministic=deterministic), tmp_path / str(deterministic))
        assert settings() == before
    assert seen == [(True, False, False, ":4096:8"), before]


def test_operation_without_a_deterministic_algorithm_is_named(tmp_path: Path) -> None:
    def scattered(loss: Tensor) -> Tensor:
        return loss + torch.zeros(2).put_(torch.tensor([0]), torch.ones(1)).sum()

    train(Slope({3: scattered}), loop(), tmp_path / "any")
    before = settings()
    with pytest.raises(InputError) as caught:
        train(Slope({3: scattered}), loop(deterministic=True), tmp_path / "deterministic")
    assert "put_" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert settings() == before


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    def fail(loss: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train(Slope({3: fail}), loop(deterministic=True), tmp_path)
    assert not torch.are_deterministic_algorithms_enabled()
