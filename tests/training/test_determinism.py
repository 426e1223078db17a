"""The switch ``deterministic``: torch's settings within a training, and operations that it rules out."""

from pathlib import Path

import pytest
import torch
from slope import Slope, loop
from torch import Tensor

from far.errors import InputError
from far.training.loop import train


def settings() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
    )


def test_settings_hold_during_the_training_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before, seen = settings(), []

    def note(loss: Tensor) -> Tensor:
        seen.append(settings())
        return loss

    for deterministic in (True, False):
        train(Slope({3: note}), loop(deterministic=deterministic), tmp_path / str(deterministic))
        assert settings() == before
    assert seen == [(True, False, False), before]


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


def test_cuda_that_was_used_too_early_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    def refuse(loss: Tensor) -> Tensor:  # torch's own words, shortened
        raise RuntimeError("Deterministic behavior was enabled …, set CUBLAS_WORKSPACE_CONFIG=:4096:8. …")

    with pytest.raises(InputError, match="CUBLAS_WORKSPACE_CONFIG"):
        train(Slope({3: refuse}), loop(deterministic=True), tmp_path)


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    def fail(loss: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train(Slope({3: fail}), loop(deterministic=True), tmp_path)
    assert not torch.are_deterministic_algorithms_enabled()
