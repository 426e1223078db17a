"""A web page that draws with a model: ONNX files, ONNX Runtime Web and a page, for any static web server."""

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from far.autoencoder_config import DecoderName
from far.errors import InputError
from far.files import atomic_folder, check_empty_folder, read_json, write_json
from far.folder import ModelFolder
from far.onnx.config import CONFIG
from far.onnx.exporter import export

_PAGE = Path(__file__).parent / "page"
# Files of the npm package onnxruntime-web, and the release that the page is tested with.
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
_PACKAGE = "onnxruntime-web@1.22.0"
_SHA512 = "Ud/+EBo6mhuaQWt/OjaOk0iNWjXqJoeeMFr6xQEERZdIZH2OWpGzuujz7lfuOBjUa6TEE/sc4nb7Da5dNL34fg=="
# Heads whose steps the page's JavaScript has.
_HEADS = ("shortcut", "flow_map")


def export_web(
    name: Path | str,
    out: Path | str,
    *,
    dtype: str = "int8",
    runtime_files: Path | None = None,
    decoder: DecoderName = "full",
) -> None:
    """Write a folder that any static web server can serve, all of it or nothing.

    Args:
        name: a folder, a bundled model or a model of the hub, with an autoencoder.
        out: a folder that does not exist or is empty.
        dtype: dtype of the weights, as :func:`far.onnx.export` takes.
        runtime_files: a folder with the files of ONNX Runtime Web, such as ``dist`` of its npm package. By
            default, npm downloads the release that the page is tested with.
        decoder: as :func:`far.onnx.export` takes.

    Raises:
        InputError: as :func:`far.onnx.export`, the page cannot draw with the model's head, or the files of
            ONNX Runtime Web cannot be had.
    """
    out = Path(out)
    check_empty_folder(out)
    model = ModelFolder.open(name)
    if model.config.model is None or not model.has_autoencoder:
        raise InputError(f"{name} has no autoencoder or no generator. Give a whole model")
    if (kind := model.config.model.network.head.kind) not in _HEADS:
        raise InputError(f"the page cannot draw with a head of kind {kind!r}. Use {' or '.join(_HEADS)}")
    with tempfile.TemporaryDirectory() as temporary:
        runtime = _downloaded(Path(temporary)) if runtime_files is None else runtime_files
        check_runtime(runtime)
        with atomic_folder(out) as folder:
            export(name, folder, dtype=dtype, encoder=False, decoder=decoder)  # the page does not edit
            config = read_json(folder / CONFIG)
            config["defaults"]["guidance_every"] = 1  # the page computes guidance at every step
            write_json(folder / CONFIG, config)
            for part in _PAGE.iterdir():
                shutil.copy(part, folder)
            (folder / "runtime").mkdir()
            for file in RUNTIME_FILES:
                # Many web servers have no MIME type for .mjs, and browsers then refuse the script.
                shutil.copy(runtime / file, folder / "runtime" / file.replace(".mjs", ".js"))


def check_runtime(folder: Path) -> None:
    """Raise an :class:`InputError` unless ``folder`` holds the files of ONNX Runtime Web."""
    for file in RUNTIME_FILES:
        if not (folder / file).is_file():
            raise InputError(f"{folder} lacks {file}. Give the folder dist of the npm package {_PACKAGE}")


def _downloaded(folder: Path) -> Path:
    """Download ONNX Runtime Web by npm, check it, and return a folder with its files."""
    remedy = f"Install npm, or give --runtime-files with the folder dist of {_PACKAGE}"
    npm = shutil.which("npm") or "npm"  # npm.cmd on Windows
    command = [npm, "pack", "--silent", "--pack-destination", str(folder), _PACKAGE]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
    except FileNotFoundError as error:
        raise InputError(f"npm is not installed, and the page needs {_PACKAGE}. {remedy}") from error
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split())[:200]
        raise InputError(f"npm cannot download {_PACKAGE} ({reason}). {remedy}") from error
    (archive,) = folder.glob("*.tgz")
    if base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() != _SHA512:
        raise InputError(f"npm's {_PACKAGE} is not the release that far expects (SHA-512 differs). {remedy}")
    with tarfile.open(archive) as tar:
        for file in RUNTIME_FILES:
            member = tar.extractfile(f"package/dist/{file}")
            assert member is not None
            (folder / file).write_bytes(member.read())
    return folder
