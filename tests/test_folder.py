"""A model's folder: each file is opened and hashed once, and damaged or foreign ones are named."""

import collections
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import far
from far import InputError, Pipeline
from far.folder import ModelFolder
from far.names import BUNDLED
from tests.refusals import refused

_OPENED: collections.Counter[str] = collections.Counter()
_WATCHING = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _WATCHING and event == "open" and str(arguments[0]).endswith((".json", ".safetensors")):
        _OPENED[str(arguments[0])] += 1


sys.addaudithook(_watch)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """Number of times that Python or safetensors opened each file of a model."""

    def counted(path: Path, *arguments: Any) -> Any:
        _OPENED[str(path)] += 1
        return safe_open(path, *arguments)

    _OPENED.clear()
    monkeypatch.setattr("far.weights.safe_open", counted)
    monkeypatch.setattr(sys.modules[__name__], "_WATCHING", True)
    return _OPENED


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of everything that has been hashed, in bytes."""
    sizes: list[int] = []
    original = hashlib.sha256

    class Counted:
        def __init__(self, data: bytes = b"") -> None:
            self.digest = original()
            self.update(data)

        def update(self, data: Any) -> None:
            sizes.append(len(data))
            self.digest.update(data)

        def hexdigest(self) -> str:
            return self.digest.hexdigest()

    monkeypatch.setattr(hashlib, "sha256", Counted)
    return sizes


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("avatars-64", ["avatars-64/autoencoder", "avatars-64/model"]),
        ("avatars-64-causal", ["avatars-64-causal/model", "avatars-64/autoencoder"]),
        ("avatars-64-mar", ["avatars-64-mar/model", "avatars-64/autoencoder", "avatars-64/model"]),
    ],
)
def test_each_file_of_a_model_is_opened_and_hashed_once(
    name: str, files: list[str], opened: collections.Counter[str], hashed: list[int]
) -> None:
    Pipeline.from_pretrained(name, device="cpu")
    configs = {file.split("/")[0] for file in files}
    expected = [BUNDLED / f"{file}.safetensors" for file in files] + [
        BUNDLED / f"{one}/config.json" for one in configs
    ]
    assert opened == {str(path): 1 for path in expected}
    weights = sum((BUNDLED / f"{file}.safetensors").stat().st_size for file in files)
    assert 0.95 * weights < sum(hashed) < 1.01 * weights


def test_saved_folder_is_opened_and_hashed_once(
    pipeline_folder: Path, opened: collections.Counter[str], hashed: list[int]
) -> None:
    Pipeline.from_pretrained(pipeline_folder)
    assert sorted(opened.values()) == [1, 1, 1]
    assert sum(hashed) < 1.1 * sum(path.stat().st_size for path in pipeline_folder.glob("*.safetensors"))


def test_opening_a_folder_checks_its_config_and_reads_no_weights(
    pipeline_folder: Path, opened: collections.Counter[str]
) -> None:
    folder = ModelFolder.open(pipeline_folder)
    assert folder.config.model is not None
    assert folder.config.classes == ("circle", "square", "stripes")
    assert folder.has_autoencoder
    assert list(opened) == [str(pipeline_folder / "config.json")]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"classes": ["a", "b"]}, "classes"),
        ({"classes": ["a", "b", "c\n"]}, "classes"),
        ({"classes": 3}, "classes"),
        ({"results": []}, "results"),
        ({"surprise": 1}, "surprise"),
        ({"model": {"grid": "4"}}, "grid"),
        ({"model": None, "autoencoder": None}, "config.json"),
    ],
)
def test_wrong_config_is_refused_with_its_path_and_key(
    change: dict[str, Any], named: str, pipeline_folder: Path, tmp_path: Path
) -> None:
    config = {**json.loads((pipeline_folder / "config.json").read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as error:
        ModelFolder.open(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_folder_of_version_0_1_is_refused_by_its_version(pipeline_folder: Path, tmp_path: Path) -> None:
    config = {"format": 1, **json.loads((pipeline_folder / "config.json").read_text())}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(tmp_path / "config.json", "0.1"):
        far.load(tmp_path)
    with refused(tmp_path / "config.json", "0.1"):
        far.load_autoencoder(tmp_path)


def test_model_and_autoencoder_with_other_latent_channels_are_refused(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    config = json.loads((pipeline_folder / "config.json").read_text())
    config["autoencoder"]["latent_channels"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json.* 2 .* 3"):
        ModelFolder.open(tmp_path)


def test_decoder_of_a_model_without_autoencoder_is_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    pipeline = far.load(pipeline_folder)
    pipeline.autoencoder = None
    pipeline.save_pretrained(tmp_path)
    assert far.load(tmp_path).autoencoder is None
    with refused(tmp_path, "'small'"):
        far.load(tmp_path, decoder="small")


def test_base_with_other_weights_is_refused(tmp_path: Path) -> None:
    shutil.copytree(BUNDLED / "avatars-64-mar", tmp_path / "mar")
    config = json.loads((tmp_path / "mar" / "config.json").read_text())
    config["base"]["sha256"]["model.safetensors"] = "0" * 64
    (tmp_path / "mar" / "config.json").write_text(json.dumps(config))
    folder = ModelFolder.open(tmp_path / "mar")
    folder.load_autoencoder()
    with pytest.raises(InputError, match="'avatars-64'"):
        folder.load_model()
    del config["base"]["sha256"]["autoencoder.safetensors"]
    (tmp_path / "mar" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="'avatars-64'"):
        far.load_autoencoder(tmp_path / "mar")


def test_autoencoder_is_loaded_alone_from_a_whole_model(
    pipeline_folder: Path, autoencoder_folder: Path
) -> None:
    whole, alone = far.load_autoencoder(pipeline_folder), far.load_autoencoder(autoencoder_folder)
    assert isinstance(whole, far.Autoencoder)
    assert not whole.training
    assert all(torch.equal(tensor, alone.state_dict()[name]) for name, tensor in whole.state_dict().items())
    assert next(far.load_autoencoder(pipeline_folder, dtype="bfloat16").parameters()).dtype == torch.bfloat16
    for dtype in ("int8", "half"):
        with pytest.raises(InputError, match=dtype):
            far.load_autoencoder(pipeline_folder, dtype=dtype)


def test_model_without_an_autoencoder_is_refused_by_load_autoencoder(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    pipeline = far.load(pipeline_folder)
    pipeline.autoencoder = None
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=str(tmp_path)):
        far.load_autoencoder(tmp_path)


def test_folder_of_an_autoencoder_is_refused_by_load(autoencoder_folder: Path) -> None:
    with pytest.raises(InputError, match="load_autoencoder"):
        far.load(autoencoder_folder)
