"""Where the images of an evaluation come from (folders, ``.npz`` files, image sets), and ADM's ``.npz`` going out.

Everything is read by row range, so no set has to fit in memory. What is computed from the images is in
``far.evaluation.extraction``.
"""

import dataclasses
import hashlib
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from far.data.images import SUFFIXES
from far.data.shards import INDEX, ShardReader
from far.errors import InputError
from far.files import atomic_path, sha256

# The names under which ADM's evaluation reads samples and labels.
NPZ_IMAGES, NPZ_LABELS = "arr_0", "arr_1"


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """A set of equally large images.

    Attributes:
        name: what the user called it.
        count: number of images.
        digest: of the contents; equal for equal images in equal order.
        read: rows ``range`` → ``[n, h, w, 3]`` uint8.
    """

    name: str
    count: int
    digest: str
    read: Callable[[range], np.ndarray]

    def tensor(self, rows: range) -> Tensor:
        """Rows as ``[n, 3, h, w]`` float32 in [0, 1]."""
        return torch.from_numpy(self.read(rows)).permute(0, 3, 1, 2).float().div(255)


def open_images(path: Path) -> ImageSource:
    """The images of a folder (with or without class subfolders), an ``.npz``, or an image set of ``far data``.

    Of an image set with two parts the held-out one is taken.

    Raises:
        InputError: nothing is there, or it holds no images, an empty class, or images of different sizes.
    """
    if path.suffix.lower() == ".npz":
        return _open_npz(path)
    if not path.is_dir():
        raise InputError(f"{path} does not exist; give a folder of images, an .npz, or an image set that far data made")
    for folder in (path, path / "held-out"):
        if (folder / INDEX).exists():
            return _open_image_set(folder)
    return _open_folder(path)


def _open_image_set(folder: Path) -> ImageSource:
    reader = ShardReader(folder, "images", verify=True)
    return ImageSource(
        str(folder),
        len(reader),
        f"shards-{sha256(folder / INDEX)}",
        lambda rows: reader.rows("images", torch.arange(rows.start, rows.stop)).numpy(),
    )


def _open_folder(folder: Path) -> ImageSource:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise InputError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    for subfolder in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if not any(subfolder in file.parents for file in files):
            raise InputError(f"class {subfolder} is empty; add images to it or remove it")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder)} {sha256(file)}\n".encode())
    size = _decode(files[0]).shape

    def read(rows: range) -> np.ndarray:
        chosen = files[rows.start : rows.stop]
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(_decode, chosen))
        for file, image in zip(chosen, images):
            if image.shape != size:
                raise InputError(
                    f"{file} has {image.shape[1]}×{image.shape[0]} pixels, {files[0].name} {size[1]}×{size[0]}; "
                    "bring all images to one size (far data folder does)"
                )
        return np.stack(images)

    return ImageSource(str(folder), len(files), f"folder-{digest.hexdigest()}", read)


def _decode(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is no readable image ({reason}); replace or remove it") from error


def _open_npz(path: Path) -> ImageSource:
    images = map_npz_array(path, NPZ_IMAGES)
    if images is None:
        raise InputError(f"{path} holds no array {NPZ_IMAGES!r} of images; write it with far generate --out FILE.npz")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise InputError(f"{path}: {NPZ_IMAGES} is {images.dtype} {list(images.shape)}, where uint8 [n, height, width, 3] is needed")
    return ImageSource(str(path), len(images), f"npz-{sha256(path)}", lambda rows: np.array(images[rows.start : rows.stop]))


def map_npz_array(path: Path, name: str) -> np.ndarray | None:
    """Array ``name`` of an ``.npz`` as a memory map, ``None`` if it has none; a compressed one is unpacked to a temporary file.

    Raises:
        InputError: the file is missing, cut off, no ``.npz``, or the array is pickled.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                return None
            entry = archive.getinfo(f"{name}.npy")
            if entry.compress_type == zipfile.ZIP_STORED:
                with path.open("rb") as file:
                    # A local header is 30 bytes, of which the last four hold the lengths of the name and the extra field.
                    file.seek(entry.header_offset + 26)
                    name_length, extra_length = np.frombuffer(file.read(4), "<u2").tolist()
                    file.seek(entry.header_offset + 30 + name_length + extra_length)
                    return _map_npy(file)
            with archive.open(entry) as packed, tempfile.TemporaryFile() as unpacked:
                while chunk := packed.read(1 << 24):
                    unpacked.write(chunk)
                unpacked.seek(0)
                return _map_npy(unpacked)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged or no .npz ({error}); restore or remake it") from error


def _map_npy(file: IO[bytes]) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = reader(file)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which are not loaded")
    if not all(shape):
        return np.empty(shape, dtype)
    return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")  # type: ignore[call-overload, no-any-return]


def write_npz(path: Path, images: Iterable[np.ndarray], count: int, labels: Sequence[int] | None = None) -> None:
    """Write ADM's sample format batch by batch: ``arr_0`` ``[count, h, w, 3]`` uint8, and ``arr_1``, the labels."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open(f"{NPZ_IMAGES}.npy", "w", force_zip64=True) as member:
            written = 0
            for batch in images:
                if written == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *batch.shape[1:])}
                    np.lib.format.write_array_header_1_0(member, header)
                member.write(np.ascontiguousarray(batch).data)
                written += len(batch)
        assert written == count, (written, count)
        if labels is not None:
            with archive.open(f"{NPZ_LABELS}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(labels, dtype=np.int64))
