"""Content of an export's ``config.json``. Needs no torch: a damaged one is refused without it."""

import dataclasses
from pathlib import Path
from typing import Literal

from far.autoencoder_config import DecoderName
from far.config import from_dict
from far.errors import InputError
from far.files import read_json
from far.folder_config import FolderConfig
from far.names import find_folder

CONFIG = "config.json"
DTYPES = ("float32", "float16", "int8")
# The key that tells an export from a model's folder.
_KEY = "onnx"


@dataclasses.dataclass(frozen=True)
class OnnxFile:
    """One ONNX file.

    Attributes:
        sha256: checksum of the file, in hexadecimal.
        inputs: axes of each input: a size, or the name of an axis of any size.
        outputs: axes of each output.
    """

    sha256: str
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]


@dataclasses.dataclass(frozen=True)
class OnnxConfig:
    """The part of ``config.json`` that a model's own folder does not have.

    Attributes:
        dtype: dtype that the weights are stored in.
        files: the ONNX files by name.
        loop: how to draw images with them, one sentence or formula each.
        decoder: the autoencoder's decoder that is exported.
    """

    dtype: Literal["float32", "float16", "int8"]
    files: dict[str, OnnxFile]
    loop: tuple[str, ...] = ()
    decoder: DecoderName = "full"


def is_export(folder: Path) -> bool:
    """Return whether a folder's ``config.json`` is that of an export."""
    values = read_json(folder / CONFIG)
    return isinstance(values, dict) and _KEY in values


def open_export(name: Path | str) -> tuple[Path, FolderConfig, OnnxConfig]:
    """Find an export, and return its folder and the content of its ``config.json``.

    Raises:
        InputError: the folder does not exist, is not an export, or its ``config.json`` is damaged.
    """
    folder = find_folder(name)
    path = folder / CONFIG
    values = read_json(path)
    if not isinstance(values, dict) or _KEY not in values:
        raise InputError(f"{path} is not that of an export. Make one with: far export onnx {name} FOLDER")
    rest = {key: value for key, value in values.items() if key != _KEY}
    config = from_dict(FolderConfig, rest, str(path))
    if config.model is None:
        raise InputError(f"{path} has no model. Export it again")
    return folder, config, from_dict(OnnxConfig, values[_KEY], f"{path}: {_KEY}")


def export_values(config: FolderConfig, onnx: OnnxConfig) -> dict[str, object]:
    """Return the content of ``config.json``, ready for JSON."""
    return {**config.to_dict(), _KEY: dataclasses.asdict(onnx)}
