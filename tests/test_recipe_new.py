"""``far recipe new``: rules for sizes and steps, the recipe as a file, the command on a tiny image set."""

import json
from pathlib import Path

import pytest

from far.cli.main import main
from far.data.shards import ShardWriter
from far.errors import InputError
from far.model_config import ModelConfig
from far.recipe import Recipe, load_recipe
from far.recipe_new import (
    Images,
    Length,
    Plan,
    autoencoder_width,
    backbone_size,
    check_time,
    length,
    recipe_text,
    stride_and_patch,
)
from far.training import trial
from far.training.config import LoopConfig
from far.training.trial import Speed
from tests.conftest import draw_images

REMARKS = {"file": "mine.yaml", "machine": "cpu", "times": "autoencoder 20 minutes"}
# Two CPU cores, 64 × 64 pixels: seconds of the parts of a training.
SPEED = Speed(step=0.25, saving=6.0, evaluating=3.0, image=0.02)


def images(*size: int, classes: int = 3, folder: str = "data/mine") -> Images:
    return Images(Path(folder), (size[0], size[1]), train=48_000, held_out=900, classes=classes)


def written(tmp_path: Path, found: Images, plan: Plan, device: str = "auto") -> Recipe:
    (tmp_path / "new.yaml").write_text(recipe_text(found, plan, device, REMARKS), encoding="utf-8")
    return load_recipe(tmp_path / "new.yaml")


@pytest.mark.parametrize(
    ("size", "stride", "patch"),
    [((16, 16), 4, 2), ((28, 28), 4, 1), ((32, 32), 4, 2), ((64, 64), 8, 2), ((96, 64), 8, 2),
     ((40, 40), 8, 1), ((36, 64), 4, 1), ((128, 128), 8, 2), ((256, 256), 16, 2), ((512, 512), 16, 2)],
)  # fmt: skip
def test_stride_and_patch_divide_the_images_into_few_tokens(
    size: tuple[int, int], stride: int, patch: int, tmp_path: Path
) -> None:
    found = images(*size)
    assert stride_and_patch(found) == (stride, patch)
    recipe = written(tmp_path, found, Plan(stride, patch))
    autoencoder = recipe.autoencoder.model
    assert autoencoder.stride == stride
    grid = tuple(side // stride for side in size)
    model = ModelConfig(recipe.generator.network, found.classes, autoencoder.latent_channels, grid)
    assert model.tokens == size[0] * size[1] // (stride * patch) ** 2
    assert recipe.generator.sampling.ar_steps == min(64, model.tokens)


@pytest.mark.parametrize("size", [(50, 50), (64, 30), (2, 2), (1024, 1024), (1000, 1000)])
def test_sizes_without_a_stride_are_one_line_with_the_size(size: tuple[int, int]) -> None:
    with pytest.raises(InputError) as error:
        stride_and_patch(images(*size))
    assert f"{size[1]}×{size[0]}" in str(error.value)
    assert "data/mine" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seconds", [150, 1200, 2400, 86_400])
def test_training_fills_its_time(seconds: float) -> None:
    """Count the pauses of the loop step by step."""
    chosen = length(SPEED, seconds)
    config = LoopConfig(
        steps=chosen.steps, checkpoint_every=chosen.checkpoint, evaluate_every=chosen.evaluate
    )
    total = 0.0
    for step in range(1, chosen.steps + 1):
        total += SPEED.step
        if step % chosen.evaluate == 0 or step == chosen.steps:
            total += SPEED.evaluating + chosen.images * SPEED.image
        if step % chosen.checkpoint == 0 or step == chosen.steps:
            total += SPEED.saving
    assert SPEED.seconds(config, chosen.images) == pytest.approx(total)
    assert 0.95 * seconds < total <= seconds


def test_steps_and_evaluated_images_grow_with_the_time() -> None:
    chosen = [length(SPEED, 60 * minutes) for minutes in (5, 10, 30, 60, 120)]
    assert [each.steps for each in chosen] == sorted({each.steps for each in chosen})
    assert [each.images for each in chosen] == sorted(each.images for each in chosen)


def test_sizes_grow_with_time_and_speed() -> None:
    # The smallest generator, 1.7 million parameters, at 16 tokens on two CPU cores.
    tokens_per_second = 16 * 64 / 0.1
    sizes = [backbone_size(1_700_000, tokens_per_second, 40 * minutes) for minutes in (5, 60, 120, 600)]
    assert sizes == sorted(set(sizes))
    # 4.0 and 7.4 million parameters in an hour or two, of which two thirds are the generator's.
    assert sizes[1:3] == [(192, 3), (256, 3)]
    assert backbone_size(1_700_000, 1e7, 86_400) == (768, 6)
    assert backbone_size(1_700_000, tokens_per_second, -5) == sizes[0]
    widths = [autoencoder_width(0.25, 20 * minutes) for minutes in (1, 60, 600, 3000)]
    assert widths == [16, 16, 32, 64]


def test_too_short_a_time_names_one_that_is_enough() -> None:
    found, enough = images(64, 64), 0
    with pytest.raises(InputError) as error:
        check_time(found, 60.0, 100.0, SPEED, SPEED)
    enough = int(str(error.value).rsplit(" ", 1)[1])
    check_time(found, 60.0 * enough, 100.0, SPEED, SPEED)
    with pytest.raises(InputError):
        check_time(found, 60.0 * (enough - 1), 100.0, SPEED, SPEED)


@pytest.mark.parametrize("folder", ["data/mine", "data/a: b # c", "daten/übung", "null", 'a"b\\c', "a\nb"])
def test_any_folder_is_written_as_valid_yaml(folder: str, tmp_path: Path) -> None:
    recipe = written(tmp_path, images(64, 64, folder=folder), Plan(8, 2))
    assert recipe.data == folder
    assert Path(recipe.run) == Path("runs") / Path(folder).name


def test_classes_device_and_long_trainings_are_written(tmp_path: Path) -> None:
    one = written(tmp_path, images(64, 64, classes=1), Plan(8, 2), "cuda:1")
    assert (one.generator.sampling.guidance, one.generator.label_drop) == (1.0, 0.0)
    assert one.generator.training.device == one.autoencoder.training.device == "cuda:1"
    long = Length(10**7, 1000, 10**6, 500)
    many = written(tmp_path, images(64, 64, classes=1000), Plan(8, 2, 64, (768, 6), long, long))
    assert many.generator.sampling.guidance > 1
    assert many.generator.evaluation.grid_per_class == 1
    assert many.generator.training.steps == many.autoencoder.training.steps == 10**7
    assert many.generator.training.ema_decay < 1
    lines = (tmp_path / "new.yaml").read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 110


def test_command_writes_a_recipe_that_trains_to_the_end(
    image_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trial, "_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    new = ["recipe", "new", "--data", str(image_set), "--minutes", "60", "--out", "mine.yaml"]
    assert main(new) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in ("mine.yaml", "autoencoder", "cache", "generator"))
    assert main(new) == 2  # it exists
    assert "mine.yaml" in capsys.readouterr().err
    recipe = load_recipe("mine.yaml")
    assert recipe.generator.training.steps > 100
    sections = ("autoencoder", "generator")
    short = [f"{section}.training.{key}=2" for section in sections for key in ("steps", "evaluate_every")]
    short += [f"{section}.training.warmup_steps=0" for section in sections]
    few = ["autoencoder.loss.evaluation_images=6", "generator.evaluation={images: 6, references: 6}"]
    for command in ("train-autoencoder", "cache", "train"):
        assert main([command, "mine.yaml", *short, *few]) == 0
    run = Path(recipe.run)
    assert json.loads((run / "model" / "config.json").read_text())
    assert main(["generate", "--weights", str(run / "model"), "--count", "3", "--out", "a.png"]) == 0


@pytest.mark.parametrize("minutes", ["0", "-3", "nan", "inf", "1e9"])
def test_minutes_out_of_range_are_one_line(
    minutes: str, image_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe", "new", "--data", str(image_set), f"--minutes={minutes}"]) == 2
    error = capsys.readouterr().err
    assert f"--minutes {float(minutes):g}" in error
    assert error.count("\n") == 1


def test_image_set_that_no_stride_divides_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels, labels = draw_images(6, 0)
    for part in ("train", "held-out"):
        meta = {"kind": "images", "size": [10, 16], "classes": ["a", "b", "c"], "source": "drawn"}
        writer = ShardWriter(tmp_path / part, meta)
        writer.write({"images": pixels[:, :10].contiguous(), "labels": labels}, cursor=6)
        writer.finish()
    assert main(["recipe", "new", "--data", str(tmp_path), "--minutes", "5"]) == 2
    error = capsys.readouterr().err
    assert "16×10" in error
    assert error.count("\n") == 1
