"""Progress bars and notices."""

import contextlib
import io
import re
import time
from pathlib import Path

import pytest
import torch

from far import notices
from far.cli.main import main
from far.notices import noticed
from far.pipeline import Pipeline
from far.progress import ImageBar
from far.sampling import Progress


def steps(batch: int, count: int) -> list[Progress]:
    return [
        Progress(step, count, torch.zeros(batch, 1, 1, 1), torch.zeros(batch, 1)) for step in range(count)
    ]


def state(bar: ImageBar) -> tuple[float, int, int]:
    """Return position, finished images and total images, as the bar shows them."""
    return bar.n, bar.format_dict["finished"], bar.format_dict["images"]


def test_bar_moves_with_every_ar_step_and_counts_whole_images() -> None:
    bar = ImageBar(10, "drawing", file=io.StringIO())
    for batch, before in ((4, 0), (4, 4), (2, 8)):
        for progress in steps(batch, 5):
            bar.ar_step(progress)
            done = progress.step + 1
            position, finished, images = state(bar)
            assert position == pytest.approx(before + batch * done / 5)
            assert (finished, images) == (before + batch if done == 5 else before, 10)


def test_bar_of_groups_counts_images() -> None:
    bar = ImageBar(3, "drawing", group=64, initial=1, file=io.StringIO())
    assert state(bar) == (1, 64, 192)
    for progress in steps(64, 4)[:2]:
        bar.ar_step(progress)
    assert state(bar) == (1.5, 64, 192)
    bar.move_to(2)
    assert state(bar) == (2, 128, 192)
    bar.move_to(2)
    assert state(bar) == (2, 128, 192)


def test_bar_shows_images_ar_step_and_rate() -> None:
    file = io.StringIO()
    with ImageBar(8, "drawing", file=file) as bar:
        for progress in steps(8, 3):
            time.sleep(0.01)
            bar.ar_step(progress)
    last = file.getvalue().split("\r")[-1]
    assert re.search(r"drawing: 100%.*8/8 images .*img/s, AR step 3/3", last)


def test_every_command_that_draws_moves_its_bar_with_ar_steps(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []
    whole = ImageBar.ar_step
    monkeypatch.setattr(
        ImageBar,
        "ar_step",
        lambda bar, progress: (seen.append((bar.desc, progress.step)), whole(bar, progress))[1],
    )
    Pipeline.from_pretrained(pipeline_folder).generate([0])[0].resize((16, 16)).save(tmp_path / "image.png")
    weights = ["--weights", str(pipeline_folder), "--ar-steps", "3"]
    batches = ["--count", "5", "--batch-size", "3"]
    assert main(["generate", *weights, *batches, "--out", str(tmp_path / "a.png")]) == 0
    assert seen == [("generating", step) for step in (0, 1, 2)] * 2
    seen.clear()
    edit = ["edit", str(tmp_path / "image.png"), "--label", "0", "--redraw", "0", "0", "16", "8"]
    assert main([*edit, *weights[:2], "--ar-steps", "2", "--out", str(tmp_path / "b.png")]) == 0
    assert seen == [("editing", 0), ("editing", 1)]
    seen.clear()
    evaluate = [
        "evaluate",
        *weights,
        *batches,
        "--save-statistics",
        str(tmp_path / "c.npz"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(evaluate) == 0
    assert seen == [("generating", step) for step in (0, 1, 2)] * 2


def test_training_shows_the_work_after_the_last_step(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, int]] = []
    whole = ImageBar.ar_step
    monkeypatch.setattr(
        ImageBar,
        "ar_step",
        lambda bar, progress: (seen.append((bar.desc, progress.step)), whole(bar, progress))[1],
    )
    assert main(["train", str(recipe)]) == 0
    assert [step for _, step in seen] == [0, 1] * 2  # two batches of two AR steps
    assert len({description for description, _ in seen}) == 2
    shown = capsys.readouterr().err
    after = shown[shown.index("20/20") :]
    assert after.index("evaluating") < after.index("features of held-out images") < after.index("saving")
    assert re.search(r"20/20 \[[^]]*loss \d[^]]*\]\s*$", shown)  # the final figures


def test_notice_appears_only_if_the_block_is_slow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notices, "_SECONDS", 0.05)
    with noticed("loading it all"):
        time.sleep(0.3)
    assert capsys.readouterr().err == "far: loading it all …\n"
    monkeypatch.setattr(notices, "_SECONDS", 0.5)
    with noticed("loading it all"):
        pass
    with contextlib.suppress(ValueError), noticed("loading it all"):
        raise ValueError
    time.sleep(0.8)
    assert capsys.readouterr().err == ""


def test_only_the_first_process_gives_notice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notices, "_SECONDS", 0.0)
    monkeypatch.setenv("RANK", "1")
    with noticed("loading it all"):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
