"""Sources of images in every form that far data reads. Image ``i`` has the color ``color(i)``."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image

from far.data.image_folders import class_folder_source
from far.data.images import prepare_image


def color(index: int) -> tuple[int, int, int]:
    return index, 2 * index, 3 * index


def png(index: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 12), color(index)).save(file, "PNG")
    return file.getvalue()


def write_pngs(folder: Path, indices: Iterable[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in indices:
        (folder / f"{index:02d}.png").write_bytes(png(index))


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(labels: Sequence[object], ending: str = "cls", first: int = 0) -> list[tuple[str, bytes]]:
    """Members of a WebDataset tar: images ``first`` and on, each with its label."""
    return [
        member
        for index, label in enumerate(labels, first)
        for member in ((f"{index:02d}.png", png(index)), (f"{index:02d}.{ending}", str(label).encode()))
    ]


def write_lines(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def image_table(labels: Sequence[object], names: list[str] | None = None) -> pyarrow.Table:
    """A table of images as the library datasets writes it."""
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    images = [{"bytes": png(index), "path": None} for index in range(len(labels))]
    table = pyarrow.table({"image": pyarrow.array(images, kind), "label": labels})
    label = {"_type": "ClassLabel", "names": names}
    features = {"image": {"_type": "Image"}, "label": label if names else {"_type": "Value"}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def read_image(path: Path, size: int, **options: bool) -> np.ndarray:
    """Pixels ``[size, size, 3]`` of an image file, as far data stores them."""
    return prepare_image(lambda: path.open("rb"), path, size, **options)[0]


def find_images(folder: Path) -> tuple[list[str], list[tuple[Path, int]], Counter[str]]:
    """Classes, (path, label) of every image, and skipped files by reason, of a folder with class folders."""
    source = class_folder_source(folder)
    files = [(source.root / record.key, record.label) for record in source.records]
    return list(source.classes), files, source.left_out
