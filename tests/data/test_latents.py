"""Latent cache: moments of both flips, bound to one autoencoder and one image set."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import scipy.stats
import torch
from torchrun import kill_one, run, start, wait_for

from far.autoencoder import Autoencoder
from far.cli.main import main
from far.data import latents
from far.data.image_sets import fingerprint, read_images
from far.data.latents import LatentCache, open_latents, write_latents
from far.data.shards import ShardReader, ShardWriter
from far.errors import InputError
from far.files import json_digest, read_json, write_json
from far.folder import load_autoencoder


def test_cache_has_the_moments_of_both_flips(
    image_set: Path, latents_folder: Path, autoencoder_folder: Path
) -> None:
    autoencoder = load_autoencoder(autoencoder_folder)
    reader = open_latents(latents_folder, autoencoder)
    source = ShardReader(image_set / "train", "images")
    rows = torch.tensor([0, 59, 17])
    images = read_images(source, rows)
    assert torch.equal(images, source.rows("images", rows).permute(0, 3, 1, 2) / 127.5 - 1)
    moments = reader.rows("moments", rows).float()
    with torch.no_grad():
        for flip, variant in enumerate((images, images.flip(-1))):
            torch.testing.assert_close(moments[:, flip], autoencoder.moments(variant), atol=2e-3, rtol=2e-3)
    assert reader.rows("labels", rows).tolist() == source.rows("labels", rows).tolist()


def test_latents_are_drawn_from_the_posterior_of_a_random_flip_and_normalized(
    latents_folder: Path, autoencoder_folder: Path, tmp_path: Path
) -> None:
    """The posteriors are narrow and far apart, so that each latent shows its row and flip."""
    autoencoder, generator = load_autoencoder(autoencoder_folder), torch.Generator().manual_seed(0)
    scale, shift = (4.0, 0.5), (0.5, -2.0)
    autoencoder.config = dataclasses.replace(autoencoder.config, scale=scale, shift=shift)
    means = 3 * torch.randn(60, 2, 2, 4, 4, generator=generator)
    deviations = 0.01 + 0.04 * torch.rand(60, 2, 2, 4, 4, generator=generator)
    moments = torch.cat([means, 2 * deviations.log()], dim=2)
    writer = ShardWriter(tmp_path / "cache", read_json(latents_folder / "index.json")["meta"])
    writer.write({"moments": moments.half(), "labels": torch.arange(60) % 3}, cursor=60)
    writer.finish()
    cache = LatentCache(tmp_path / "cache", autoencoder)
    assert len(cache) == 60
    assert cache.labels.tolist() == [0, 1, 2] * 20

    rows = torch.tensor([41, 3, 3, 17])
    drawn = torch.stack([cache.draw(rows, generator) for _ in range(400)])
    latents = drawn / torch.tensor(scale).view(2, 1, 1) + torch.tensor(shift).view(2, 1, 1)
    scores = (latents.unsqueeze(2) - means[rows]) / deviations[rows]  # [draws, rows, flips, channels, h, w]
    flips = scores.square().mean(dim=(3, 4, 5)).argmin(dim=2)
    for row in range(4):
        assert scipy.stats.binomtest(int(flips[:, row].sum()), 400).pvalue > 0.01
    assert not torch.equal(flips[:, 1], flips[:, 2]), "each occurrence of a row has a flip of its own"
    noise = torch.take_along_dim(scores, flips.view(400, 4, 1, 1, 1, 1), dim=2).flatten()
    assert scipy.stats.kstest(noise[::10].numpy(), "norm").pvalue > 0.01
    first, again = (cache.draw(rows, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)


def test_cache_without_flips_has_only_the_images_themselves(
    image_set: Path, latents_folder: Path, autoencoder_folder: Path, tmp_path: Path
) -> None:
    autoencoder = load_autoencoder(autoencoder_folder)
    write_latents(image_set, autoencoder, tmp_path / "cache", flip=False)
    both, one = (open_latents(folder, autoencoder) for folder in (latents_folder, tmp_path / "cache"))
    assert torch.equal(one.all("moments"), both.all("moments")[:, :1])

    rows = torch.arange(60)
    reader = ShardWriter(tmp_path / "narrow", one.meta)
    means, logvars = one.all("moments").chunk(2, dim=2)
    moments = torch.cat([means, torch.full_like(logvars, -20)], dim=2)
    reader.write({"moments": moments, "labels": one.all("labels")}, cursor=60)
    reader.finish()
    cache = LatentCache(tmp_path / "narrow", autoencoder)
    assert not cache.flip
    expected = autoencoder.normalize(means[:, 0].float())
    for seed in range(3):
        drawn = cache.draw(rows, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(drawn, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("command", ["cache", "train"])
@pytest.mark.parametrize("flip", ["true", "false"])
def test_cache_made_with_the_other_flip_is_refused(
    command: str, flip: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = f"run={tmp_path / 'other'}", {"true": "false", "false": "true"}[flip]
    assert main(["cache", str(recipe), run, f"generator.flip={flip}"]) == 0
    before = files(tmp_path / "other")
    assert main([command, str(recipe), run, f"generator.flip={other}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert str(tmp_path / "other" / "latents") in line
    assert "flip" in line
    assert files(tmp_path / "other") == before


def test_other_autoencoder_is_refused_but_another_scale_is_not(
    latents_folder: Path, autoencoder_folder: Path
) -> None:
    autoencoder = load_autoencoder(autoencoder_folder)
    rescaled = Autoencoder(dataclasses.replace(autoencoder.config, scale=9.0))
    rescaled.load_state_dict(autoencoder.state_dict())
    open_latents(latents_folder, rescaled)
    with torch.no_grad():
        autoencoder.encoder.conv_in.bias[0] += 1e-3
    with pytest.raises(InputError, match="fingerprint"):
        open_latents(latents_folder, autoencoder)


def test_interrupted_cache_resumes(
    image_set: Path, latents_folder: Path, autoencoder_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(latents, "SHARD_ROWS", 16)
    autoencoder = load_autoencoder(autoencoder_folder)
    original, calls = latents._moments, 0

    def stop(*arguments):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(latents, "_moments", stop)
    with pytest.raises(KeyboardInterrupt):
        write_latents(image_set, autoencoder, tmp_path)
    with pytest.raises(InputError, match="unfinished"):
        open_latents(tmp_path, autoencoder)
    monkeypatch.setattr(latents, "_moments", original)
    write_latents(image_set, autoencoder, tmp_path)
    a, b = open_latents(tmp_path, autoencoder), open_latents(latents_folder, autoencoder)
    torch.testing.assert_close(a.all("moments"), b.all("moments"), atol=1e-3, rtol=1e-3)
    assert a.all("labels").tolist() == b.all("labels").tolist()


def test_interrupted_cache_keeps_every_encoded_batch(
    image_set: Path,
    latents_folder: Path,
    autoencoder_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    autoencoder = load_autoencoder(autoencoder_folder)
    original, encoded = latents._moments, []

    def stop(*arguments):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(len(arguments[1]))
        return original(*arguments)

    monkeypatch.setattr(latents, "_moments", stop)
    with pytest.raises(KeyboardInterrupt):
        write_latents(image_set, autoencoder, tmp_path, batch_size=7)
    assert encoded == [7, 7]
    encoded = [0] * 3
    monkeypatch.setattr(
        latents, "_moments", lambda *arguments: (encoded.append(len(arguments[1])), original(*arguments))[1]
    )
    write_latents(image_set, autoencoder, tmp_path, batch_size=7)
    a, b = open_latents(tmp_path, autoencoder), open_latents(latents_folder, autoencoder)
    assert sum(encoded) == len(a) - 14
    torch.testing.assert_close(a.all("moments"), b.all("moments"), atol=1e-3, rtol=1e-3)
    assert a.all("labels").tolist() == b.all("labels").tolist()


def test_second_command_does_not_change_a_cache_that_another_fills(
    image_set: Path, autoencoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    autoencoder, original, refused = load_autoencoder(autoencoder_folder), latents._moments, []

    def start_another(*arguments):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError) as error:
            write_latents(image_set, autoencoder, tmp_path / "latents")
        assert sorted(tmp_path.rglob("*")) == before
        refused.append(str(error.value))
        return original(*arguments)

    monkeypatch.setattr(latents, "_moments", start_another)
    write_latents(image_set, autoencoder, tmp_path / "latents")
    assert refused
    assert all(str(tmp_path / "latents") in line and "\n" not in line for line in refused)
    write_latents(image_set, autoencoder, tmp_path / "latents")  # complete now, and not in use


def set_of(images: Path, folder: Path, *, inverted: bool = False) -> Path:
    """Write a copy of an image set, or one of other images with the same shape."""
    shutil.copytree(images, folder)
    if inverted:
        rows, meta = (
            ShardReader(images / "train", "images"),
            read_json(images / "train" / "index.json")["meta"],
        )
        shutil.rmtree(folder / "train")
        writer = ShardWriter(folder / "train", meta)
        writer.write({"images": 255 - rows.all("images"), "labels": rows.all("labels")}, cursor=len(rows))
        writer.finish()
    return folder


@pytest.mark.parametrize("finished", [False, True])
def test_cache_does_not_continue_with_other_images_at_the_same_path(
    finished: bool, image_set: Path, autoencoder_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(latents, "SHARD_ROWS", 16)
    autoencoder = load_autoencoder(autoencoder_folder)
    write_latents(set_of(image_set, tmp_path / "images"), autoencoder, tmp_path / "cache")
    if not finished:
        change_index(
            tmp_path / "cache",
            lambda index: index.update(complete=False, cursor=16, shards=index["shards"][:1]),
        )
    shutil.rmtree(tmp_path / "images")
    set_of(image_set, tmp_path / "images", inverted=True)
    with pytest.raises(InputError, match="other settings"):
        write_latents(tmp_path / "images", autoencoder, tmp_path / "cache")
    shutil.rmtree(tmp_path / "images")
    set_of(image_set, tmp_path / "images")
    write_latents(tmp_path / "images", autoencoder, tmp_path / "cache")
    assert len(open_latents(tmp_path / "cache", autoencoder)) == 60


def test_finished_cache_without_the_checksum_of_its_images_is_refused(
    image_set: Path, autoencoder_folder: Path, tmp_path: Path
) -> None:
    autoencoder = load_autoencoder(autoencoder_folder)
    write_latents(image_set, autoencoder, tmp_path)
    change_index(tmp_path, lambda index: index["meta"].pop("images_fingerprint"))
    before = files(tmp_path)
    with pytest.raises(InputError, match=str(tmp_path)):
        write_latents(image_set, autoencoder, tmp_path)
    with pytest.raises(InputError, match=str(tmp_path)):
        open_latents(tmp_path, autoencoder, ShardReader(image_set / "train", "images"))
    assert files(tmp_path) == before


def test_cache_is_tied_to_the_content_of_its_images_not_to_their_path(
    image_set: Path, autoencoder_folder: Path, latents_folder: Path, tmp_path: Path
) -> None:
    autoencoder = load_autoencoder(autoencoder_folder)
    shutil.copytree(image_set, tmp_path / "moved")
    change_index(tmp_path / "moved/train", lambda index: index["meta"].update(source="/elsewhere"))
    moved = ShardReader(tmp_path / "moved/train", "images")
    assert fingerprint(moved) == fingerprint(ShardReader(image_set / "train", "images"))
    open_latents(latents_folder, autoencoder, moved)
    write_latents(tmp_path / "moved", autoencoder, latents_folder)  # it is complete
    # The index identifies the images. Their pixels are not needed after encoding.
    for shard in (tmp_path / "moved/train").glob("*.safetensors"):
        shard.unlink()
    open_latents(
        latents_folder, autoencoder, ShardReader(tmp_path / "moved/train", "images", index_only=True)
    )
    for change in (
        lambda index: index["meta"].update(classes=["circle", "square", "rings"]),
        lambda index: index["shards"][0].update(sha256="0" * 64),
    ):
        shutil.copy(image_set / "train/index.json", tmp_path / "moved/train/index.json")
        change_index(tmp_path / "moved/train", change)
        other = ShardReader(tmp_path / "moved/train", "images", index_only=True)
        assert fingerprint(other) != fingerprint(moved)
        with pytest.raises(InputError) as error:
            open_latents(latents_folder, autoencoder, other)
        for part in (str(latents_folder), str(other.folder), "far cache"):
            assert part in str(error.value)


def test_fingerprint_of_an_autoencoder_ignores_rounding(autoencoder_folder: Path) -> None:
    autoencoder, other = load_autoencoder(autoencoder_folder), load_autoencoder(autoencoder_folder)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert autoencoder.same_latents(load_autoencoder(autoencoder_folder).to(dtype))
    with torch.no_grad():
        other.decoder.conv_in.weight.add_(1)  # it does not affect the latents
        assert autoencoder.same_latents(other)
        other.encoder.conv_in.weight[0, 0, 0, 0] += 1e-2
    assert not autoencoder.same_latents(other)
    rescaled = Autoencoder(dataclasses.replace(autoencoder.config, scale=9.0))
    rescaled.load_state_dict(autoencoder.state_dict())
    assert not autoencoder.same_latents(rescaled)


def change_index(folder: Path, change: Callable[[dict], None]) -> None:
    index = read_json(folder / "index.json")
    change(index)
    index["sha256"] = json_digest({name: value for name, value in index.items() if name != "sha256"})
    write_json(folder / "index.json", index)


def test_moments_beyond_float16_are_refused(
    image_set: Path, autoencoder_folder: Path, tmp_path: Path
) -> None:
    autoencoder = load_autoencoder(autoencoder_folder)
    with torch.no_grad():
        autoencoder.quant_conv.bias.fill_(1e6)
    with pytest.raises(InputError, match="float16"):
        write_latents(image_set, autoencoder, tmp_path)


# One shard per image, so that kills fall between many shards.
SCRIPT = """
import sys
import far.data.latents
from far.cli.main import main
far.data.latents.SHARD_ROWS = 1
sys.exit(main())
"""


@pytest.mark.usefixtures("one_thread")
def test_two_processes_write_the_files_of_one_also_after_a_kill(
    recipe: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(latents, "SHARD_ROWS", 1)
    script, killed = tmp_path / "cache.py", tmp_path / "killed"
    script.write_text(SCRIPT)
    assert main(["cache", str(recipe), f"run={tmp_path / 'alone'}"]) == 0
    process = start(2, script, "cache", recipe, f"run={killed}")
    index = killed / "latents" / "index.json"
    wait_for(lambda: index.exists() and read_json(index)["cursor"] >= 10)
    kill_one(process)
    done = read_json(index)["cursor"]
    assert done < 60
    # Shards that are not listed may have any content.
    (killed / "latents" / f"shard-{done:05d}.safetensors").write_bytes(b"left")
    shutil.copytree(killed, tmp_path / "on")
    assert main(["cache", str(recipe), f"run={tmp_path / 'on'}"]) == 0
    assert run(2, script, "cache", recipe, f"run={killed}").count("both flips") == 1
    expected = files(tmp_path / "alone")
    assert len(expected) == 61
    assert files(tmp_path / "on") == expected
    assert files(killed) == expected


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
