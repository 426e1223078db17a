"""Values that are not finite: skipped steps, float16's loss scale, all backbones and heads in all dtypes."""

import copy
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import newest
from conftest import CLASSES, draw_images
from slope import Slope, infinite_gradient, infinite_loss, loop, nan_loss, run_steps
from torch import Tensor, nn

from far.backbone import BlockCausalConfig, CausalConfig, MaskedConfig
from far.errors import InputError
from far.heads import DiffusionConfig, EnergyConfig, FlowConfig, FlowMapConfig, ShortcutConfig
from far.interrupt import Interrupted
from far.model import FAR, ModelConfig, NetworkConfig
from far.precision import prepare
from far.recipe import from_overrides
from far.sampling import SamplingConfig, SeededNoise, sample
from far.training.checkpoint import list_checkpoints
from far.training.config import LoopConfig
from far.training.epochs import epoch_rows
from far.training.loop import Trainer, train


def state(trainer: Trainer) -> dict[str, Any]:
    """Copy all state that a step may change."""
    parts = {"module": trainer.module, "ema": trainer.ema.module, "optimizer": trainer.optimizer}
    return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})


def assert_equal(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# --- Skipped steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fault", [nan_loss, infinite_loss, infinite_gradient])
def test_step_that_is_not_finite_changes_nothing_and_the_next_one_succeeds(
    tmp_path: Path, fault: Callable, dtype: str
) -> None:
    trainer = Trainer(Slope({3: fault}), loop(dtype=dtype), tmp_path)
    run_steps(trainer, 3)
    before = state(trainer)
    run_steps(trainer, 1)
    assert_equal(state(trainer), before)
    assert (trainer.step, trainer.skipped_steps, trainer.skipped_in_a_row) == (4, 1, 1)
    run_steps(trainer, 1)
    assert (trainer.step, trainer.skipped_steps, trainer.skipped_in_a_row) == (5, 1, 0)
    after = state(trainer)
    for part in ("module", "ema"):
        assert all(
            (after[part][name] != before[part][name]).any() and after[part][name].isfinite().all()
            for name in after[part]
        )
    assert int(after["optimizer"]["state"][0]["step"]) == 4


def test_log_and_progress_bar_count_skipped_steps(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    faults = dict.fromkeys([1, 3, *range(5, 10)], nan_loss)
    train(Slope(faults), loop(), tmp_path)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    entries = [entry for entry in entries if "images_per_second" in entry]
    assert [(entry["step"], entry["skipped_steps"]) for entry in entries] == [(5, 2), (10, 7), (12, 7)]
    # Means cover the steps that were not skipped. Between the first two lines all were.
    assert [
        "loss" in entry and abs(entry["loss"]) < 10 and entry["loss"] == entry["copy"] for entry in entries
    ] == [True, False, True]
    assert "skipped 7" in capsys.readouterr().err


def test_progress_bar_omits_the_count_without_skipped_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(Slope(), loop(), tmp_path)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["skipped_steps"] == 0
    assert ", skipped" not in capsys.readouterr().err


def test_skipped_steps_in_a_row_end_the_run_without_saving(tmp_path: Path) -> None:
    task = Slope(dict.fromkeys([2, 7, 8, 9], nan_loss))
    with pytest.raises(InputError, match="step-00000006") as caught:
        train(task, loop(max_skipped_steps=3, checkpoint_every=3, evaluate_every=3), tmp_path)
    assert "\n" not in str(caught.value)
    # Saving is due after step 3, which is skipped, and waits for step 4. After step 9 it waits in vain.
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [4, 6]
    assert task.evaluated == [4, 6]


def test_run_whose_last_step_is_skipped_is_saved(tmp_path: Path) -> None:
    task = Slope({11: nan_loss})
    train(task, loop(), tmp_path)
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [12]
    assert task.evaluated == [12]


def test_checkpoint_is_written_after_publishing(tmp_path: Path) -> None:
    class Full(Slope):
        def publish(self, ema: nn.Module, folder: Path, step: int, results: dict[str, Any]) -> None:
            assert not list_checkpoints(folder / "checkpoints")
            raise InputError("the disk is full")

    with pytest.raises(InputError, match="the disk is full"):
        train(Full(), loop(), tmp_path)
    assert not list_checkpoints(tmp_path / "checkpoints")


WRONG = [
    "steps=0", "steps=1e400", "batch_size=1048577", "learning_rate=.nan", "learning_rate=.inf",
    "head_learning_rate=-1.0", "weight_decay=-1.0", "weight_decay=.nan", "warmup_steps=-3",
    "gradient_clip=0.0",
    "max_skipped_steps=0", "log_every=-1",
    "micro_batches=3", "seed=-1", "ema_decay=1.0",
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_invalid_setting_is_rejected_in_one_line(wrong: str) -> None:
    name = wrong.partition("=")[0]
    with pytest.raises(InputError, match=name) as caught:
        from_overrides(LoopConfig(batch_size=8), [wrong])
    assert "\n" not in str(caught.value)


def test_interruption_waits_until_a_step_succeeds(tmp_path: Path) -> None:
    def interrupted(loss: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return nan_loss(loss)

    with pytest.raises(Interrupted) as caught:
        train(Slope({2: interrupted, 3: nan_loss}), loop(), tmp_path)
    assert caught.value.status == 130
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [5]


# --- float16's scale ---------------------------------------------------------------------------------


def test_gradients_that_underflow_in_float16_equal_those_of_float32(tmp_path: Path) -> None:
    """Each of eight rows contributes 1.25e-8, below float16's smallest number 6e-8."""
    gradients = {}
    for dtype in ("float32", "float16"):
        trainer = Trainer(Slope(factor=1e-7), loop(dtype=dtype), tmp_path)
        run_steps(trainer, 1)
        gradients[dtype] = trainer.module.weight.grad
    assert (gradients["float32"] != 0).all()
    torch.testing.assert_close(gradients["float16"], gradients["float32"], rtol=0.01, atol=0)


def test_skipped_steps_lower_the_scale_until_gradients_fit(tmp_path: Path) -> None:
    trainer = Trainer(Slope(factor=100.0), loop(dtype="float16"), tmp_path)
    before = state(trainer)
    run_steps(trainer, 7)
    assert_equal(state(trainer), before)
    run_steps(trainer, 1)
    # 100 · 512 is below float16's largest number, 65504, and 100 · 1024 above.
    assert (trainer.scaler.get_scale(), trainer.skipped_steps, trainer.skipped_in_a_row) == (512, 7, 0)
    assert (state(trainer)["module"]["weight"] != before["module"]["weight"]).any()


def test_default_limit_of_skipped_steps_lets_the_scale_fall_to_one(tmp_path: Path) -> None:
    """The gradient's factor barely fits into float16 without a scale."""
    trainer = Trainer(Slope(factor=60_000.0), loop(dtype="float16"), tmp_path)
    run_steps(trainer, 17)
    assert (trainer.scaler.get_scale(), trainer.skipped_steps, trainer.skipped_in_a_row) == (1, 16, 0)


def test_repeated_overflows_end_the_run_and_the_error_suggests_bfloat16(tmp_path: Path) -> None:
    trainer = Trainer(Slope(dict.fromkeys(range(50), infinite_gradient)), loop(dtype="float16"), tmp_path)
    with pytest.raises(InputError, match=r"20.*bfloat16"):
        run_steps(trainer, 50)


# --- Resuming ----------------------------------------------------------------------------------------

# The first seven steps are skipped to lower the scale, and two more later.
FAULTS = {9: nan_loss, 10: infinite_gradient}


@pytest.mark.parametrize("cut", [3, 8, 10])
def test_resumed_run_repeats_an_uninterrupted_one_with_skipped_steps(tmp_path: Path, cut: int) -> None:
    config = loop(dtype="float16")
    whole = Trainer(Slope(FAULTS, factor=100.0), config, tmp_path / "whole")
    run_steps(whole, 15)
    whole.save()
    first = Trainer(Slope(FAULTS, factor=100.0), config, tmp_path / "parts")
    run_steps(first, cut)
    first.save()
    second = Trainer(Slope(FAULTS, factor=100.0), config, tmp_path / "parts")
    second.restore(resume=True)
    run_steps(second, 15 - cut)
    second.save()
    saved = [newest(tmp_path / run) for run in ("whole", "parts")]
    assert saved[0]["values"]["scaler"]["scale"] == 128
    assert saved[0]["values"]["scaler"]["_growth_tracker"] == 4
    assert saved[0]["values"]["skipped"] == [9, 0]
    assert [checkpoint["values"].pop("dtype") for checkpoint in saved] == ["float16", "float16"]
    assert_equal(*saved)


def test_resumed_run_keeps_counting_skipped_steps_in_a_row(tmp_path: Path) -> None:
    faults, config = dict.fromkeys(range(2, 12), nan_loss), loop(max_skipped_steps=4)
    first = Trainer(Slope(faults), config, tmp_path)
    run_steps(first, 4)
    first.save()
    second = Trainer(Slope(faults), config, tmp_path)
    second.restore(resume=True)
    with pytest.raises(InputError):
        run_steps(second, 8)
    assert second.step == 6


def test_run_in_bfloat16_resumes_in_float16(tmp_path: Path) -> None:
    first = Trainer(Slope(), loop(dtype="bfloat16"), tmp_path)
    run_steps(first, 2)
    first.save()
    second = Trainer(Slope(), loop(dtype="float16"), tmp_path)
    second.restore(resume=True)
    assert_equal(second.module.state_dict(), first.module.state_dict())
    assert_equal(second.optimizer.state_dict()["state"], first.optimizer.state_dict()["state"])
    run_steps(second, 1)
    assert (second.step, second.skipped_steps, second.scaler.get_scale()) == (3, 0, 65536)


# --- Every backbone and head in every dtype ----------------------------------------------------------

BACKBONES = {
    "masked": MaskedConfig(16, 1, 2, 16, 1, 2, buffer=2, mask_ratio_min=0.1),
    "causal": CausalConfig(width=16, depth=1, heads=2),
    "block_causal": BlockCausalConfig("block_causal", 16, 1, 1, 2),
}
HEADS = {
    "diffusion": DiffusionConfig(32, 2, token_limit=5.0),
    "flow": FlowConfig(32, 2),
    "shortcut": ShortcutConfig(32, 2),
    "flow_map": FlowMapConfig(32, 2, max_guidance=3.0),
    "energy": EnergyConfig(32, 2),
}


class Shapes:
    """Task that trains a tiny model on drawn shapes; colors averaged over 4 × 4 pixels are the latents."""

    discriminator = None

    def __init__(self, network: NetworkConfig, loop: LoopConfig) -> None:
        images, self.labels = draw_images(60, seed=0)
        latents = F.avg_pool2d(images.permute(0, 3, 1, 2).float(), 4)
        self.latents = (latents - latents.mean()) / latents.std()
        self.loop = loop
        torch.manual_seed(0)
        self.module = FAR(ModelConfig(network, len(CLASSES), 3, (4, 4)))
        self.identity: dict[str, Any] = {}

    def parameter_groups(self, config: LoopConfig) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters()), "lr": config.learning_rate, "weight_decay": 0.0}]

    def batch(self, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = epoch_rows(step, self.loop.batch_size, len(self.latents), self.loop.seed)
        return self.latents[rows], self.labels[rows]

    def loss(
        self, step: int, batch: tuple[Tensor, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.module.loss(*batch, generator, label_drop=0.1, step=step)
        return loss.value.mean(), {}

    def evaluate(self, ema: nn.Module, folder: Path, step: int) -> dict[str, float]:
        raise AssertionError("the tests take single steps only")

    def publish(self, ema: nn.Module, folder: Path, step: int, results: dict[str, Any]) -> None:
        raise AssertionError("the tests take single steps only")


@pytest.mark.parametrize("size", [1.0, 2e3, 1e5])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_large_tokens_give_the_same_results_in_float16_as_in_float32(backbone: str, size: float) -> None:
    """Squares of 2000 and 100,000 exceed float16, and barely trained diffusion heads draw such tokens."""
    torch.manual_seed(0)
    model = FAR(
        ModelConfig(NetworkConfig(BACKBONES[backbone], HEADS["diffusion"], patch=2), len(CLASSES), 3, (4, 4))
    ).eval()
    nn.init.normal_(model.head.network.output.linear.weight)  # type: ignore[union-attr, arg-type]
    tokens, labels = size * torch.randn(8, 4, 12), torch.arange(8) % len(CLASSES)
    places = torch.arange(4).expand(8, -1)
    found = []
    for dtype in ("float32", "float16"):
        model = prepare(model, dtype, "cpu")
        with torch.no_grad():
            z = model.backbone(tokens, places[:, :3], places[:, 3:], labels)
            found.append((z.float(), model.head.network(tokens[:, 3:], z, torch.tensor(500.0)).float()))  # type: ignore[operator]
    for exact, low in zip(*found):
        assert (low - exact).abs().max() < 0.02 * exact.std()


@pytest.mark.parametrize("steps", [50, pytest.param(400, marks=pytest.mark.soak)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_training_and_sampling_stay_in_range(
    tmp_path: Path, backbone: str, head: str, dtype: str, steps: int
) -> None:
    config = loop(steps=steps, batch_size=8, learning_rate=5e-3, warmup_steps=5, ema_decay=0.95, dtype=dtype)
    trainer = Trainer(
        Shapes(NetworkConfig(BACKBONES[backbone], HEADS[head], patch=2), config), config, tmp_path
    )
    values = run_steps(trainer, steps).values
    losses = torch.stack(values["loss"])
    assert losses.isfinite().all()
    assert losses[-20:].mean() < 0.9 * losses[:5].mean()
    assert trainer.skipped_steps <= (5 if dtype == "float16" else 0)
    model = prepare(trainer.ema.module, dtype, "cpu")
    assert isinstance(model, FAR)
    labels = torch.arange(24) % len(CLASSES)
    settings = SamplingConfig(ar_steps=4, head_steps=min(10, model.head.max_steps), guidance=2.0)
    drawn = sample(model, labels, SeededNoise(range(24), torch.device("cpu")), settings)
    assert drawn.isfinite().all()
    assert drawn.abs().max() < 8
    assert 0.5 < drawn.std() < 3
