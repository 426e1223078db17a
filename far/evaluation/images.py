"""Images to evaluate, from folders, ``.npz`` files and image sets; and writing ADM's ``.npz``.

Images are read by row range, so no set has to fit in memory.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from far.data.image_sets import open_image_set
from far.data.images import decode_image, sides
from far.data.listing import SUFFIXES, class_folders, describe, images_in, images_within
from far.data.shards import INDEX
from far.errors import InputError
from far.files import atomic_path, check_zip, sha256
from far.notices import noticed

# Array names of samples and labels in ADM's evaluation.
NPZ_IMAGES, NPZ_LABELS = "arr_0", "arr_1"


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """A set of images of one size.

    Attributes:
        name: path given by the user.
        size: (height, width) in pixels.
        digest: digest of the content, equal for equal images in the same order.
        read: rows ``range`` → ``[n, h, w, 3]`` uint8.
        left_out: number of a folder's other files by reason.
        classes: names of the classes, empty if the images have none.
    """

    name: str
    count: int
    size: tuple[int, int]
    digest: str
    read: Callable[[range], np.ndarray]
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    classes: Sequence[str] = ()

    def tensor(self, rows: range) -> Tensor:
        """Return rows as ``[n, 3, h, w]`` float32 in [0, 1]."""
        return torch.from_numpy(self.read(rows)).permute(0, 3, 1, 2).float().div(255)


def open_images(path: Path) -> ImageSource:
    """Open the images of a folder (with or without class subfolders), an ``.npz``, or an image set.

    An image set with two parts gives its held-out part.

    Raises:
        InputError: ``path`` does not exist, or has no images, an empty class, or images of different sizes.
    """
    if path.suffix.lower() == ".npz" and not path.is_dir():
        return _open_npz(path)
    if not path.is_dir():
        wrong = "is neither a folder nor an .npz" if path.exists() else "does not exist"
        raise InputError(f"{path} {wrong}. Give a folder or .npz of images, or an image set")
    for folder in (path, path / "held-out"):
        if (folder / INDEX).exists():
            return _open_image_set(folder)
    return _open_folder(path)


def _open_image_set(folder: Path) -> ImageSource:
    reader = open_image_set(folder)
    size, digest = sides(reader.meta["size"]), f"shards-{sha256(folder / INDEX)}"

    def read(rows: range) -> np.ndarray:
        return reader.rows("images", torch.arange(rows.start, rows.stop)).numpy()

    return ImageSource(str(folder), len(reader), size, digest, read, classes=reader.meta["classes"])


def _open_folder(folder: Path) -> ImageSource:
    left_out: Counter[str] = Counter()
    files, classes = _image_files(folder, left_out)
    if not files:
        only = f", only {describe(left_out)}" if left_out else ""
        raise InputError(f"{folder} has no images ({', '.join(SUFFIXES)}){only}. Give a folder of images")
    digest = hashlib.sha256(b"sRGB\n")
    for file in tqdm(files, f"checksums of {folder}", unit="file", delay=2, leave=False):
        digest.update(os.fsencode(f"{file.relative_to(folder)} {sha256(file)}\n"))
    height, width, _ = _decode(files[0]).shape

    def read(rows: range) -> np.ndarray:
        chosen = files[rows.start : rows.stop]
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(_decode, chosen))
        for file, image in zip(chosen, images):
            if image.shape[:2] != (height, width):
                sizes = f"{image.shape[1]}×{image.shape[0]} pixels, {files[0].name} {width}×{height}"
                raise InputError(f"{file} has {sizes}. Scale all images to one size with far data folder")
        return np.stack(images)

    content = f"folder-{digest.hexdigest()}"
    return ImageSource(str(folder), len(files), (height, width), content, read, left_out, classes)


def _image_files(folder: Path, left_out: Counter[str]) -> tuple[list[Path], list[str]]:
    """Return all images and the class names. The classes take turns, so that the first images cover all."""
    classes = [images_in(folder, left_out)]
    subfolders = class_folders(folder, left_out)
    for subfolder in subfolders:
        others: Counter[str] = Counter()
        classes.append(images_within(subfolder, others))
        if not classes[-1]:
            held = describe(others) or "empty"
            raise InputError(f"class {subfolder} has no images ({held}). Add some, or remove the folder")
        left_out.update(others)
    files = [file for row in itertools.zip_longest(*classes) for file in row if file is not None]
    # Images outside the subfolders have no class.
    return files, [] if classes[0] else [subfolder.name for subfolder in subfolders]


def _decode(path: Path) -> np.ndarray:
    return np.asarray(decode_image(path))


def _open_npz(path: Path) -> ImageSource:
    check_npz(path)
    images = map_npz_array(path, NPZ_IMAGES)
    if images is None:
        raise InputError(f"{path} has no array {NPZ_IMAGES!r} of images. Give another file")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        form = f"{images.dtype} {list(images.shape)}"
        raise InputError(f"{path}: {NPZ_IMAGES} is {form}. Make it uint8 [n, height, width, 3]")
    size, digest = (images.shape[1], images.shape[2]), f"npz-{sha256(path)}"

    def read(rows: range) -> np.ndarray:
        return np.array(images[rows.start : rows.stop])

    return ImageSource(str(path), len(images), size, digest, read)


def npz_names(path: Path) -> set[str]:
    """Return the names of the arrays of an ``.npz``.

    Raises:
        InputError: the file is missing, truncated, or not an ``.npz``.
    """
    with _readable(path), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def check_npz(path: Path) -> None:
    """Compare an ``.npz`` with its checksums, which a memory map does not check.

    Raises:
        InputError: the file is missing or damaged.
    """
    with _readable(path), noticed(f"checking {path}"):
        check_zip(path)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn errors of reading a damaged archive into an :class:`InputError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist. Give an existing .npz") from error
    except Exception as error:  # zipfile and numpy raise almost anything on damaged archives
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is damaged or not an .npz ({reason}). Make it again") from error


def map_npz_array(path: Path, name: str) -> np.ndarray | None:
    """Return array ``name`` of an ``.npz`` as a memory map, or ``None`` if it is absent.

    A compressed array is unpacked to a temporary file.

    Raises:
        InputError: the file is missing, truncated or not an ``.npz``, or the array is pickled.
    """
    with _readable(path), zipfile.ZipFile(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            return None
        entry = archive.getinfo(f"{name}.npy")
        if entry.compress_type == zipfile.ZIP_STORED:
            with path.open("rb") as file:
                # A local header has 30 bytes. The last four are the lengths of the name and the extra field.
                file.seek(entry.header_offset + 26)
                name_length, extra_length = np.frombuffer(file.read(4), "<u2").tolist()
                file.seek(entry.header_offset + 30 + name_length + extra_length)
                return _map_npy(file)
        with archive.open(entry) as packed, tempfile.TemporaryFile() as unpacked:
            while chunk := packed.read(1 << 24):
                unpacked.write(chunk)
            unpacked.seek(0)
            return _map_npy(unpacked)


def _map_npy(file: IO[bytes]) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = reader(file)
    if dtype.hasobject:
        raise ValueError("it has pickled objects, which are not loaded")
    if not all(shape):
        return np.empty(shape, dtype)
    order = "F" if fortran else "C"
    return np.memmap(file, dtype, "r", file.tell(), shape, order)  # type: ignore[call-overload, no-any-return]


def write_npz(
    path: Path, images: Iterable[np.ndarray], count: int, labels: Sequence[int] | None = None
) -> None:
    """Write ADM's sample format by batches: images ``arr_0`` ``[count, h, w, 3]``, labels ``arr_1``."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:  # uncompressed
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
