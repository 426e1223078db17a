"""Micro-batches prepared ahead by a thread: the same values, in time, with their errors in place."""

import threading
from pathlib import Path

import pytest
import torch

from far.errors import InputError
from far.folder import load_autoencoder
from far.recipe import load_recipe
from far.training import loop
from far.training.generator import GeneratorTask
from far.training.log import Meter
from far.training.loop import Trainer
from far.training.prefetch import micro_batches

CPU = torch.device("cpu")


def draw(number: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(3, generator=generator) + number


@pytest.mark.parametrize("numbers", [[], [4], [3, 5, 4]])
def test_batches_and_generators_are_the_same_ahead_or_not(numbers: list[int]) -> None:
    found = [
        [(batch, torch.rand(2, generator=generator)) for batch, generator in batches]
        for batches in (micro_batches(draw, numbers, 7, CPU, ahead=ahead) for ahead in (False, True))
    ]
    assert len(found[0]) == len(found[1]) == len(numbers)
    for (batch, noise), (other_batch, other_noise) in zip(*found):
        assert torch.equal(batch, other_batch)
        assert torch.equal(noise, other_noise)


def test_next_batch_is_prepared_while_the_current_one_trains() -> None:
    started = [threading.Event() for _ in range(3)]

    def read(number: int, generator: torch.Generator) -> int:
        started[number].set()
        return threading.get_ident()

    batches = micro_batches(read, range(3), 0, CPU, ahead=True)
    thread, _ = next(batches)
    assert started[1].wait(timeout=10)
    assert not started[2].is_set(), "more than one batch is held"
    assert thread != threading.get_ident()


def test_error_of_the_thread_is_raised_at_its_batch() -> None:
    def read(number: int, generator: torch.Generator) -> int:
        if number == 1:
            raise InputError("no row 1")
        return number

    batches = micro_batches(read, range(3), 0, CPU, ahead=True)
    assert next(batches)[0] == 0
    with pytest.raises(InputError, match="no row 1"):
        next(batches)


def test_thread_ends_with_its_batches() -> None:
    before = threading.active_count()
    batches = micro_batches(draw, range(9), 0, CPU, ahead=True)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


def test_training_with_batches_ahead_resumes_to_the_same_bits(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run without a thread is not interrupted. The recipe uses dropout and two micro-batches per step."""
    values = load_recipe(recipe, ["generator.training.micro_batches=2"])
    autoencoder = load_autoencoder(values.autoencoder_folder)

    def trainer() -> Trainer:
        task = GeneratorTask(values.generator, Path(values.data), values.latents_folder, autoencoder)
        return Trainer(task, values.generator.training, tmp_path / "model")

    plain = trainer()
    for _ in range(6):
        plain.train_step(Meter())
    # Trainers take the function from their module.
    monkeypatch.setattr(loop, "micro_batches", lambda *values, ahead: micro_batches(*values, ahead=True))
    first, second = trainer(), trainer()
    for _ in range(3):
        first.train_step(Meter())
    assert threading.active_count() > 1
    first.save()
    second.restore(resume=True)
    for _ in range(3):
        second.train_step(Meter())
    expected, found = plain._tensors(), second._tensors()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
