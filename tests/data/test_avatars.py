"""Avatar set: determinism, balance, no image in both parts, resuming an interrupted rendering."""

import dataclasses
import hashlib
import multiprocessing.dummy
import multiprocessing.pool  # takes the original get_context before a test replaces it
from pathlib import Path

import numpy as np
import pytest

from far.data import avatars
from far.data.avatars import HELD_OUT_SEED, STYLES, render_avatar, write_avatars
from far.data.shards import ShardReader
from tests.refusals import refused


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Render in threads: a new process loads every style, which takes seconds."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: multiprocessing.dummy)


def test_every_style_has_the_cc0_license() -> None:
    import json

    import dicebear_styles

    folder = Path(next(iter(dicebear_styles.__path__)))
    for name in STYLES:
        assert json.loads((folder / f"{name}.json").read_text())["meta"]["license"]["name"] == "CC0 1.0", name


def test_image_depends_on_style_and_seed_only() -> None:
    a = render_avatar((3, 5), size=32)
    assert a.shape == (32, 32, 3)
    assert a.dtype == np.uint8
    assert np.array_equal(a, render_avatar((3, 5), size=32))
    assert not np.array_equal(a, render_avatar((3, 6), size=32))
    assert not np.array_equal(a, render_avatar((4, 5), size=32))
    # A box filter: the smaller size is the mean of the larger one.
    large = render_avatar((3, 5), size=64).astype(float).reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(large - a).max() <= 1


def test_processes_render_the_images_of_this_one(tmp_path: Path) -> None:
    avatars._render(tmp_path, 8, 5, 1, None)
    rendered = [render_avatar((label, 5), size=8) for label in range(16)]
    assert np.array_equal(ShardReader(tmp_path, "images").all("images").numpy(), np.stack(rendered))


@pytest.mark.usefixtures("in_threads")
def test_parts_are_balanced_and_share_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Seeds 0 and 1 are for training, 2 and 3 are held out. At 8 pixels, simple styles repeat images.
    monkeypatch.setattr(avatars, "HELD_OUT_SEED", 2)
    counts = write_avatars(tmp_path, 8, per_class=2, held_out_per_class=2)
    train, held_out = (ShardReader(tmp_path / part, "images", verify=True) for part in ("train", "held-out"))
    assert held_out.all("labels").tolist() == [*range(16)] * 2
    held = {picture.numpy().tobytes() for picture in held_out.all("images")}
    rendered = [render_avatar((label, seed), size=8) for seed in range(2) for label in range(16)]
    kept = [picture for picture in rendered if picture.tobytes() not in held]
    assert np.array_equal(train.all("images").numpy(), np.stack(kept))
    assert (counts.train, counts.held_out, counts.already_complete) == (len(kept), 32, False)
    assert sum(counts.left_out.values()) == 32 - len(kept)
    monkeypatch.setattr(
        avatars, "render_avatar", lambda *arguments: pytest.fail("images were rendered again")
    )
    assert write_avatars(tmp_path, 8, per_class=2, held_out_per_class=2) == dataclasses.replace(
        counts, already_complete=True
    )
    monkeypatch.setattr(avatars, "renderer_digest", lambda: "another")
    with refused(tmp_path / "held-out"):
        write_avatars(tmp_path, 8, per_class=2, held_out_per_class=2)


@pytest.mark.usefixtures("in_threads")
def test_images_of_the_reference_are_removed_from_training(tmp_path: Path) -> None:
    pictures = {seed: render_avatar((0, seed), size=8) for seed in range(3)}
    exclude = frozenset({hashlib.sha256(pictures[1].tobytes()).hexdigest()[:16]})
    writer = avatars._render(tmp_path, 8, 0, 3, exclude)
    found = ShardReader(tmp_path, "images").all("images").numpy()
    assert len(found) == 3 * 16 - 1
    assert writer.report["duplicates removed"] == 1
    assert not any(np.array_equal(picture, pictures[1]) for picture in found)


@pytest.mark.usefixtures("in_threads")
def test_stopped_rendering_resumes_to_the_same_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(avatars, "SHARD_ROWS", 7)
    write_avatars(tmp_path / "whole", 8, per_class=2, held_out_per_class=1)
    original = avatars.ShardWriter.write

    def stop_after_two(self, tensors, cursor):
        if cursor > 20:
            raise KeyboardInterrupt
        original(self, tensors, cursor)

    monkeypatch.setattr(avatars.ShardWriter, "write", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        write_avatars(tmp_path / "parts", 8, per_class=2, held_out_per_class=1)
    monkeypatch.setattr(avatars.ShardWriter, "write", original)
    write_avatars(tmp_path / "parts", 8, per_class=2, held_out_per_class=1)
    for part in ("train", "held-out"):
        whole, parts = (
            ShardReader(tmp_path / name / part, "images", verify=True) for name in ("whole", "parts")
        )
        assert (whole.all("images") == parts.all("images")).all()
        assert whole.all("labels").tolist() == parts.all("labels").tolist()


@pytest.mark.parametrize(
    ("size", "per_class", "held_out"),
    [(48, 1, 1), (4, 1, 1), (32, 0, 1), (32, HELD_OUT_SEED + 1, 1), (32, 1, 0)],
)
def test_values_out_of_range_are_refused_before_a_folder_is_created(
    size: int, per_class: int, held_out: int, tmp_path: Path
) -> None:
    with refused():
        write_avatars(tmp_path / "set", size, per_class, held_out)
    assert not (tmp_path / "set").exists()
