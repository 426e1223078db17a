"""Image sets without a copy of the pixels: the training images are read from their source."""

import io
import shutil
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sources import write_tar
from PIL import Image
from torchrun import kill_one, run, start, wait_for

from far.cli.main import main
from far.data import latents
from far.data.image_sets import scaled
from far.data.latents import LatentCache
from far.data.shards import ShardReader
from far.data.training_images import Batch, open_training_images, read_ahead, read_full
from far.files import read_json
from far.folder import load_autoencoder
from far.training.trial import write_sample

# Of three in a row, two fall into one round of two processes.
COUNT, BROKEN = 30, (3, 17, 18, 19, 29)


def pixels(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def members(broken: tuple[int, ...] = BROKEN) -> list[tuple[str, bytes]]:
    """Images 0 to 29 of a tar, of classes a and b by turns. Broken ones are cut."""
    found = []
    for index in range(COUNT):
        file = io.BytesIO()
        Image.fromarray(pixels(index)).save(file, "PNG")
        content = file.getvalue()[: 300 if index in broken else None]
        found += [(f"{index:02d}.png", content), (f"{index:02d}.cls", b"ab"[index % 2 :][:1])]
    return found


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    write_tar(tmp_path / "set.tar", members())
    command = ["data", str(tmp_path / "set.tar"), str(tmp_path / "linked"), "--size", "16", "--no-copy"]
    assert main(command) == 0
    return tmp_path / "linked"


def held_out_indices(folder: Path) -> set[int]:
    images = ShardReader(folder / "held-out", "images").all("images").numpy()
    return {index for index in range(COUNT) if (images == pixels(index)).all(axis=(1, 2, 3)).any()}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_cache_has_the_moments_of_every_readable_training_image(
    linked: Path, recipe: Path, autoencoder_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stored = ShardReader(linked / "train", "records")
    assert sum(stored.all(name).nbytes for name in ("labels", "numbers", "digests")) == 48 * len(stored)
    assert main(["cache", str(recipe), f"data={linked}", f"run={tmp_path / 'own'}"]) == 0
    out, error = capsys.readouterr()
    assert "5 broken" in out.splitlines()[-1]
    assert all(f"set.tar/{index:02d}.png" in error for index in BROKEN)
    autoencoder = load_autoencoder(autoencoder_folder)
    cache = LatentCache(tmp_path / "own/latents", autoencoder)
    kept = [index for index in range(COUNT) if index not in {*BROKEN, *held_out_indices(linked)}]
    assert len(kept) == COUNT - len(BROKEN) - 2
    assert cache.labels.tolist() == [index % 2 for index in kept]
    images = torch.from_numpy(np.stack([pixels(index) for index in kept])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = autoencoder.moments(images)
    torch.testing.assert_close(cache.reader.all("moments")[:, 0].float(), expected, atol=2e-3, rtol=2e-3)


def test_generator_trains_on_the_cache_without_the_source(linked: Path, recipe: Path, tmp_path: Path) -> None:
    run = [f"data={linked}", f"run={tmp_path / 'own'}"]
    assert main(["cache", str(recipe), *run]) == 0
    short = ["generator.training.steps=2", "generator.training.evaluate_every=2"]
    few = ["generator.evaluation.images=2", "generator.evaluation.references=2"]
    (tmp_path / "set.tar").unlink()
    assert main(["train", str(recipe), *run, *short, *few]) == 0


def test_read_full_replaces_unreadable_images_by_the_next(linked: Path) -> None:
    reader, read = open_training_images(linked / "train")
    kept = [index for index in range(COUNT) if index not in held_out_indices(linked)]
    readable = [index for index in kept if index not in BROKEN]
    images = read_full(read, len(reader), torch.arange(len(reader)))
    assert len(images) == len(reader)
    found = {image.numpy().tobytes() for image in images}
    assert found == {scaled(torch.from_numpy(pixels(index)[None])).numpy().tobytes() for index in readable}
    alone = read_full(read, len(reader), torch.tensor([kept.index(17)]))  # 17, 18 and 19 are broken
    assert torch.equal(alone, scaled(torch.from_numpy(pixels(20)[None])))


def test_autoencoder_trained_from_the_source_is_the_same_when_resumed(
    linked: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "recipe.yaml").write_text(f"""
data: {linked}
run: {tmp_path}
autoencoder:
  model: {{width: 8, width_multipliers: [1, 1, 2], blocks: 1, latent_channels: 2, norm_groups: 4}}
  loss: {{perceptual_weight: 0.0, evaluation_images: 2}}
  training: {{steps: 4, batch_size: 8, checkpoint_every: 2, evaluate_every: 4, dtype: float32, device: cpu}}
""")
    command = ["train-autoencoder", str(tmp_path / "recipe.yaml")]
    assert main([*command, f"run={tmp_path / 'whole'}"]) == 0
    error = capsys.readouterr().err
    assert [error.count(f"set.tar/{index:02d}.png") for index in BROKEN] == [1] * len(BROKEN)
    stopped = [*command, f"run={tmp_path / 'stopped'}"]
    assert main([*stopped, "autoencoder.training.steps=2"]) == 0
    assert main([*stopped, "--resume"]) == 0
    name = "autoencoder/autoencoder.safetensors"
    assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    (tmp_path / "set.tar").unlink()
    assert main([*command, f"run={tmp_path / 'other'}"]) == 2
    assert str(linked) in capsys.readouterr().err.splitlines()[-1]


def test_sample_of_a_trial_has_the_pixels_of_the_source(linked: Path, tmp_path: Path) -> None:
    assert write_sample(linked, tmp_path / "sample") > 0
    images = ShardReader(tmp_path / "sample/train", "images").all("images").numpy()
    labels = ShardReader(tmp_path / "sample/train", "images").all("labels").tolist()
    kept = [index for index in range(COUNT) if index not in held_out_indices(linked)]
    rows = [kept[row % len(kept)] for row in range(256)]
    rows = [index for index in rows if index not in BROKEN]
    assert np.array_equal(images, np.stack([pixels(index) for index in rows]))
    assert labels == [index % 2 for index in rows]


@pytest.mark.parametrize("change", ["content", "label", "fewer", "missing", "repaired"])
def test_changed_source_is_refused(
    change: str, linked: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    changed = members()
    if change == "content":
        changed[10] = (changed[10][0], changed[12][1])
    elif change == "label":
        changed[11], changed[9] = (changed[11][0], b"a"), (changed[9][0], b"b")
    elif change == "repaired":
        changed = members(BROKEN[1:])
    write_tar(tmp_path / "set.tar", changed[: 20 if change == "fewer" else None])
    if change == "missing":
        (tmp_path / "set.tar").unlink()
    capsys.readouterr()
    assert main(["cache", str(recipe), f"data={linked}", f"run={tmp_path / 'own'}"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("far: error")]
    assert len(lines) == 1
    assert "set.tar" in lines[0]
    assert not list((tmp_path / "own").glob("latents/*.safetensors"))


def test_resumed_image_set_without_pixels_is_the_same(linked: Path, tmp_path: Path) -> None:
    command = ["data", str(tmp_path / "set.tar"), str(tmp_path / "again"), "--size", "16"]
    assert main([*command, "--no-copy"]) == 0
    assert files(tmp_path / "again") == files(linked)
    shutil.rmtree(tmp_path / "again/train")
    assert main([*command, "--no-copy"]) == 0
    assert files(tmp_path / "again") == files(linked)
    assert main(command) == 2  # the set has no pixels


def test_cache_finds_the_source_from_another_folder_and_after_a_move(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "set.tar", members())
    assert main(["data", "set.tar", "linked", "--size", "16", "--no-copy"]) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    cache = ["cache", str(recipe), f"data={tmp_path / 'linked'}"]
    assert main([*cache, f"run={tmp_path / 'one'}"]) == 0
    (tmp_path / "set.tar").rename("set.tar")
    assert main([*cache, f"run={tmp_path / 'two'}"]) == 2
    assert str(tmp_path / "linked") in capsys.readouterr().err.splitlines()[-1]
    assert main(["data", "set.tar", str(tmp_path / "linked"), "--size", "16", "--no-copy"]) == 0
    assert main([*cache, f"run={tmp_path / 'two'}"]) == 0
    assert files(tmp_path / "two/latents") == files(tmp_path / "one/latents")


# One image per shard: every broken image is a part without a shard.
SCRIPT = """
import sys
import far.data.latents
from far.cli.main import main
far.data.latents.SHARD_ROWS = 1
sys.exit(main())
"""


@pytest.mark.usefixtures("one_thread")
def test_two_processes_write_the_files_of_one_also_after_a_kill(
    linked: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents, "SHARD_ROWS", 1)
    script, killed = tmp_path / "cache.py", tmp_path / "killed"
    script.write_text(SCRIPT)
    assert main(["cache", str(recipe), f"data={linked}", f"run={tmp_path / 'alone'}"]) == 0
    process = start(2, script, "cache", recipe, f"data={linked}", f"run={killed}")
    index = killed / "latents" / "index.json"
    wait_for(lambda: index.exists() and read_json(index)["cursor"] >= 6)
    kill_one(process)
    shutil.copytree(killed, tmp_path / "on")
    assert main(["cache", str(recipe), f"data={linked}", f"run={tmp_path / 'on'}"]) == 0
    assert "left out: 5 broken" in run(2, script, "cache", recipe, f"data={linked}", f"run={killed}")
    expected = files(tmp_path / "alone")
    assert len(expected) == COUNT - len(BROKEN) - 2 + 1
    assert files(tmp_path / "on") == expected
    assert files(killed) == expected


def test_batches_are_read_while_those_before_them_are_used() -> None:
    reading, used = ([threading.Event() for _ in range(4)] for _ in range(2))

    def read(rows: torch.Tensor) -> Batch:
        row = int(rows)
        reading[row].set()
        assert row == 0 or used[row - 1].wait(10), "the batch before is not used meanwhile"
        return Batch(rows.float(), rows, Counter())

    seen = []
    for rows, batch in read_ahead(read, torch.arange(4).split(1)):
        row = int(rows)
        used[row].set()
        assert row == 3 or reading[row + 1].wait(10), "the next batch is not read meanwhile"
        assert row > 1 or not reading[3].is_set(), "reading runs far ahead"
        seen.append(int(batch.labels))
    assert seen == [0, 1, 2, 3]
