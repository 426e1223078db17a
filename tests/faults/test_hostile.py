"""Files made to do harm: code in pickles, false headers, huge archives, paths outside the folder."""

import copy
import gzip
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sources import find_images, read_image
from PIL import Image
from refusals import refused
from slope import Slope, loop, run_steps

from far.autoencoder import Autoencoder
from far.cli.main import main
from far.convert import convert_mar
from far.data.fashion_mnist import read_idx
from far.data.image_folders import class_folder_source
from far.data.image_sets import open_image_set
from far.data.latents import open_latents
from far.data.packing import Preparation, write_images
from far.data.shards import ShardReader
from far.evaluation.extraction import part_path, read_parts
from far.evaluation.images import open_images
from far.evaluation.inception import load_inception
from far.files import json_digest
from far.folder import load_autoencoder
from far.names import BUNDLED
from far.pipeline import Pipeline
from far.training.checkpoint import open_checkpoint
from far.training.loop import Trainer
from far.weights import read_tensors, save_tensors

# --- Pickles -----------------------------------------------------------------------------------------------


class RunsACommand:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["zip", "old", "plain"])
@pytest.mark.parametrize("command", ["mar", "kl16", "evaluate"])
def test_no_command_executes_a_pickle(
    command: str,
    form: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    evil = tmp_path / "evil.pth"
    content = {"model": RunsACommand(f"touch {tmp_path / 'executed'}")}
    if form == "plain":
        evil.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, evil, _use_new_zipfile_serialization=form == "zip")
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    arguments = {
        "mar": ["convert", "mar", evil, tmp_path / "out", "--no-ema"],
        "kl16": ["convert", "kl16", evil, tmp_path / "out"],
        "evaluate": [
            "evaluate",
            "--inception",
            evil,
            "--npz",
            tmp_path / "a.npz",
            "--save-statistics",
            tmp_path / "b.npz",
        ],
    }[command]
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert str(evil) in message
    assert message.count("\n") == 1
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(content))
    assert (tmp_path / "executed").exists(), "the pickle can do harm"


# --- Checksums ---------------------------------------------------------------------------------------------


def test_flipped_bit_in_any_file_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step-00000007"
    for path in checkpoint.iterdir():
        whole = path.read_bytes()
        for position in range(0, len(whole), 7):
            data = bytearray(whole)
            data[position] ^= 0x04
            path.write_bytes(data)
            with refused("step-00000007"):
                open_checkpoint(checkpoint)
        path.write_bytes(whole)
    trainer().restore(resume=True)


def write_index(path: Path, index: dict[str, Any]) -> None:
    """Write an index with the checksum of its present content."""
    content = {name: value for name, value in index.items() if name != "sha256"}
    path.write_text(json.dumps({**content, "sha256": json_digest(content)}))


FALSE: dict[str, Callable[[dict[str, Any]], object]] = {
    "negative step": lambda index: index.update(step=-7),
    "other step": lambda index: index.update(step=8),
    "huge step": lambda index: index.update(step=10**30),
    "no step": lambda index: index.pop("step"),
    "skipped is text": lambda index: index["values"].update(skipped="ab"),
    "skipped is null": lambda index: index["values"].update(skipped=None),
    "scale is text": lambda index: index["values"].update(scaler={"scale": "x"}),
    "infinite scale": lambda index: index["values"].update(scaler={"scale": 1e400}),
    "values are a list": lambda index: index.update(values=[]),
    "shapes are numbers": lambda index: index.update(shapes=5),
    "another shape": lambda index: index["shapes"].update({"module.weight": [1, 4]}),
    "no moments": lambda index: index["shapes"].pop("optimizer.0.exp_avg"),
    "no identity": lambda index: index["values"].pop("identity"),
    "unknown dtype": lambda index: index["values"].update(dtype="int4"),
    "files are a list": lambda index: index.update(files=[]),
    "a file elsewhere": lambda index: index["files"].update({"../../other.safetensors": "0" * 64}),
}


@pytest.mark.parametrize("name", list(FALSE))
def test_checkpoint_with_a_false_index_and_a_valid_checksum_is_refused(name: str, tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    path = tmp_path / "checkpoints" / "step-00000007" / "index.json"
    index = json.loads(path.read_text())
    FALSE[name](index)
    write_index(path, index)
    with refused("step-00000007"):
        trainer().restore(resume=True)


def trained(folder: Path) -> Callable[[], Trainer]:
    """Save a checkpoint at step 7 and return a function that makes trainers for its folder."""

    def trainer() -> Trainer:
        return Trainer(Slope(), loop(dtype="float16"), folder)

    first = trainer()
    run_steps(first, 7)
    first.save()
    return trainer


@pytest.mark.parametrize("name", ["model.safetensors", "autoencoder.safetensors"])
def test_flipped_bit_of_weights_is_found(name: str, pipeline_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(pipeline_folder, tmp_path / "model")
    flip_last(tmp_path / "model" / name)
    with refused(name):
        Pipeline.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", ["avatars-64", "avatars-64-causal", "avatars-64-mar"])
def test_flipped_bit_of_bundled_weights_is_found(name: str, tmp_path: Path) -> None:
    shutil.copytree(BUNDLED / name, tmp_path / "model")
    for path in (tmp_path / "model").glob("*.safetensors"):
        flip_last(path)
    with refused("model.safetensors"):
        Pipeline.from_pretrained(tmp_path / "model")
    if name == "avatars-64":  # the others read its autoencoder
        with refused("autoencoder.safetensors"):
            load_autoencoder(tmp_path / "model")


def flip_last(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x01
    path.write_bytes(data)


def test_files_without_a_checksum_still_load(pipeline_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copytree(pipeline_folder, tmp_path / "model")
    for name in ("model.safetensors", "autoencoder.safetensors"):
        save_file(read_tensors(pipeline_folder / name), tmp_path / "model" / name)
    old, new = Pipeline.from_pretrained(tmp_path / "model"), Pipeline.from_pretrained(pipeline_folder)
    assert all(
        torch.equal(a, b)
        for a, b in zip(old.model.state_dict().values(), new.model.state_dict().values(), strict=True)
    )


def test_saved_tensors_of_every_kind_are_read_and_files_are_reproducible(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(2, 3).bfloat16(),
        "number": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "flag": torch.tensor([True]),
    }
    for name in ("a.safetensors", "b.safetensors"):
        save_tensors(tmp_path / name, tensors)
    found = read_tensors(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in tensors.items()
    )
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_inception_file_is_compared_with_the_checksum_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("far.evaluation.inception.InceptionV3", lambda: torch.nn.Linear(2, 2))
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "a.pth")
    digest = load_inception(tmp_path / "a.pth").digest
    shutil.copy(tmp_path / "a.pth", tmp_path / f"inception-{digest[:8]}.pth")
    assert load_inception(tmp_path / f"inception-{digest[:8]}.pth").digest == digest
    shutil.copy(tmp_path / "a.pth", tmp_path / "inception-00000000.pth")
    with refused("inception-00000000.pth"):
        load_inception(tmp_path / "inception-00000000.pth")


# --- Headers of safetensors --------------------------------------------------------------------------------


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS: dict[str, bytes] = {
    "no header": struct.pack("<Q", 2**63) + b"{}",
    "too long": struct.pack("<Q", 2**40) + b"{}",
    "deep": b"[" * 100_000,
    "deep entry": b'{"a":' * 100_000,
    "a list": b"[1, 2]",
    "an entry that is a number": b'{"a": 1}',
    "overlapping": json.dumps({"a": entry(), "b": entry(offsets=(4, 12))}).encode(),
    "beyond the end": json.dumps({"a": entry(shape=(2**20,), offsets=(0, 2**22))}).encode(),
    "absurd shape": json.dumps({"a": entry(shape=(2**62, 2**62))}).encode(),
    "negative shape": json.dumps({"a": entry(shape=(-1, -2))}).encode(),
    "unknown dtype": json.dumps({"a": entry("F1024")}).encode(),
    "wrong dtype": json.dumps({"a": entry("F64")}).encode(),
    "not a number": b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}',
    "infinite": b'{"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 8]}}',
    "twice": b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
    b'"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
    "no text": b'{"\xff\xfe": 1}',
}


@pytest.mark.parametrize("header", HEADERS)
def test_false_headers_are_refused(
    header: str, autoencoder_folder: Path, image_set: Path, tmp_path: Path
) -> None:
    content = HEADERS[header]
    data = (
        content
        if header in ("no header", "too long")
        else struct.pack("<Q", len(content)) + content + bytes(8)
    )
    shutil.copytree(autoencoder_folder, tmp_path / "autoencoder")
    shutil.copytree(image_set / "train", tmp_path / "images")
    (tmp_path / "parts").mkdir()
    for path in (
        tmp_path / "autoencoder" / "autoencoder.safetensors",
        tmp_path / "images" / "shard-00000.safetensors",
        part_path(tmp_path / "parts", range(2)),
    ):
        path.write_bytes(data)
    with refused("autoencoder.safetensors"):
        load_autoencoder(tmp_path / "autoencoder")
    with refused("shard-00000.safetensors"):
        ShardReader(tmp_path / "images", "images")
    with refused("part-00000000-2.safetensors"):
        read_parts(tmp_path / "parts", 2)


def test_weights_of_integers_are_refused(autoencoder_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(autoencoder_folder, tmp_path / "a")
    path = tmp_path / "a" / "autoencoder.safetensors"
    save_tensors(path, {name: tensor.to(torch.int32) for name, tensor in read_tensors(path).items()})
    with refused("int32"):
        load_autoencoder(tmp_path / "a")


@pytest.mark.parametrize(("dtype", "packed"), [("F4", 2), ("F8_E8M0", 1), ("C64", 1), ("U8", 1), ("BOOL", 1)])
def test_weights_of_unsuitable_dtypes_are_refused(
    dtype: str, packed: int, pipeline_folder: Path, tmp_path: Path
) -> None:
    """``packed`` numbers form one element of torch, so the shape looks right."""
    shutil.copytree(pipeline_folder, tmp_path / "p")
    path, header, end = tmp_path / "p" / "model.safetensors", {}, 0
    for name, tensor in read_tensors(path).items():
        size = tensor.numel() * (8 if dtype == "C64" else 1)
        header[name] = entry(dtype, [*tensor.shape[:-1], tensor.shape[-1] * packed], (end, end + size))
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    with refused("model.safetensors"):
        Pipeline.from_pretrained(tmp_path / "p")


def test_config_allocates_no_memory_before_the_shapes_of_weights_match(
    autoencoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(autoencoder_folder, tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    config["autoencoder"]["width"] = 2**14
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    devices = []

    def build(config: Any) -> Autoencoder:
        devices.append(torch.empty(0).device.type)
        return Autoencoder(config)

    monkeypatch.setattr("far.autoencoder.Autoencoder", build)
    with refused("autoencoder.safetensors"):
        load_autoencoder(tmp_path / "a")
    assert devices == ["meta"]


# --- Archives and images that unpack to huge sizes ---------------------------------------------------------


def test_huge_archive_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", bytes(2**24))
        for number in range(100):  # a hundred names of the same bytes
            other = copy.copy(archive.filelist[0])
            other.filename = f"arr_{number + 1}.npy"
            archive.filelist.append(other)
    assert path.stat().st_size < 2**20
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *arguments: pytest.fail("the archive was unpacked"))
    with refused("bomb.npz"):
        open_images(path)
    shutil.copy(path, tmp_path / "mar.pth")
    with refused("mar.pth"):
        convert_mar(tmp_path / "mar.pth", tmp_path / "out")


def test_huge_gzipped_idx_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(struct.pack(">HBBI", 0, 8, 1, 2**26) + bytes(2**26), 1))
    with refused("bomb.gz"):
        read_idx(tmp_path / "bomb.gz")


def test_thin_image_is_not_enlarged(tmp_path: Path) -> None:
    Image.new("RGB", (2, 20_000)).save(tmp_path / "thin.png")
    with refused("thin.png"):
        read_image(tmp_path / "thin.png", 1024)
    Image.new("RGB", (2, 200)).save(tmp_path / "narrow.png")
    assert read_image(tmp_path / "narrow.png", 16).shape == (16, 16, 3)


@pytest.mark.parametrize(
    "text",
    [
        "data: 2020-99-99",
        "data: " + "[" * 5000,
        "data: " + "9" * 5000,
        "run: a\ndata: [&a [x, x, x, x, x, x, x, x, x]"
        + "".join(f", &{b} [{', '.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi"))
        + "]",
        "data: &x {run: *x}\nrun: a",
        "data: a\nrun: b\ngenerator: {training: {learning_rate: .inf}}",
        "data: a\nrun: b\ngenerator: {training: {seed: 36893488147419103232}}",
        "data: a\nrun: b\nautoencoder: {model: {width: 1152921504606846976}}",
    ],
)
def test_harmful_recipes_are_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "evil.yaml").write_text(text)
    assert main(["train", str(tmp_path / "evil.yaml")]) == 2
    message = capsys.readouterr().err
    assert "evil.yaml" in message
    assert message.count("\n") == 1
    assert len(message) < 10_000


# --- Names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../images/shard-00000.safetensors", "/etc/passwd", "shard-00001.safetensors", "", 3, None]
)
def test_index_names_only_its_own_shards(name: object, image_set: Path, tmp_path: Path) -> None:
    shutil.copytree(image_set / "train", tmp_path / "images")
    index = json.loads((tmp_path / "images/index.json").read_text())
    index["shards"][0]["file"] = name
    write_index(tmp_path / "images/index.json", index)
    with refused("index.json"):
        ShardReader(tmp_path / "images", "images")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"size": 2**60}, "no images of uint8"),
        ({"size": "16"}, "size '16'"),
        ({"classes": ["a", "b"]}, "0 to 2"),
        ({"classes": ["a", "b\nc", "d"]}, r"b\nc"),
        ({"classes": ["a", 3, "d"]}, "classes"),
        ({"source": None}, "source None"),
    ],
)
def test_index_that_contradicts_its_shards_is_refused(
    change: dict, expected: str, image_set: Path, tmp_path: Path
) -> None:
    shutil.copytree(image_set / "train", tmp_path / "images")
    index = json.loads((tmp_path / "images/index.json").read_text())
    index["meta"] |= change
    write_index(tmp_path / "images/index.json", index)
    with refused(expected):
        open_image_set(tmp_path / "images")


def test_cache_with_labels_beyond_its_classes_is_refused(
    latents_folder: Path, autoencoder_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(latents_folder, tmp_path / "latents")
    index = json.loads((tmp_path / "latents/index.json").read_text())
    index["meta"]["classes"] = ["a"]
    write_index(tmp_path / "latents/index.json", index)
    with refused("0 to 2"):
        open_latents(tmp_path / "latents", load_autoencoder(autoencoder_folder))


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "\ud800", "a\u2028b"])
def test_unprintable_class_names_are_refused(name: str, pipeline_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(pipeline_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["classes"][0] = name
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with refused("config.json"):
        Pipeline.from_pretrained(tmp_path / "model")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that takes any name")
def test_unprintable_folder_is_refused_and_unprintable_files_are_read(tmp_path: Path) -> None:
    for name in (b"a", b"\xffb"):
        folder = os.path.join(os.fsencode(tmp_path), b"photos", name)
        os.makedirs(folder)
        for file in (b"\xff.png", b"x\ny.png", b"..png.png"):
            with open(os.path.join(folder, file), "wb") as out:
                Image.fromarray(np.full((16, 16, 3), len(file), np.uint8)).save(out, "PNG")
    with refused("photos"):
        find_images(tmp_path / "photos")
    os.rename(os.path.join(os.fsencode(tmp_path), b"photos", b"\xffb"), tmp_path / "photos" / "…b")
    source = class_folder_source(tmp_path / "photos")
    assert write_images(source, tmp_path / "set", Preparation(8, held_out_share=0.5)).train == 2
    assert open_images(tmp_path / "photos").count == 4  # those whose names begin with a dot are hidden
