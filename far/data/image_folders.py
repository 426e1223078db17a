"""Read folders of image files: one subfolder per class, or no classes; alone or in parts such as train/."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from far.data.listing import SUFFIXES, class_folders, describe, images_in, images_within
from far.data.records import Item, Items, Record
from far.data.sources import File, Found, Source, make_source
from far.errors import InputError
from far.files import is_plain


def class_folder_source(folder: Path) -> Source:
    """Return the images of a folder with one subfolder per class.

    Raises:
        InputError: ``folder`` is not a folder or has no class folders; or a class has fewer than two images,
            is a dead link or a link to a parent folder or another class, or has a name that cannot be printed
            or differs from another only in case.
    """
    left_out: Counter[str] = Counter()
    return _source(folder, "class folders", _class_items(folder, folder, left_out, 2), left_out)


def image_folder_source(folder: Path) -> Source:
    """Return the images of a folder without class folders, as one class.

    Raises:
        InputError: the folder has fewer than two images.
    """
    left_out: Counter[str] = Counter()
    items = (Item(None, str(path.relative_to(folder))) for path in images_within(folder, left_out))
    return _source(folder, "a folder of images without classes", items, left_out)


def parts_source(root: Path, parts: Sequence[File], others: Sequence[Path]) -> Source:
    """Return the images of a folder with parts, such as train/ and val/, each as one of the sources above.

    Args:
        others: parts that are left out, and counted.

    Raises:
        InputError: the parts have different classes, or one cannot be read.
    """
    left_out: Counter[str] = Counter()
    items = Items()
    labeled = any(has_class_folders(part.path) for part in parts)
    for part in parts:
        found: Iterable[Item]
        if labeled:
            found = _class_items(part.path, root, left_out, 1)
        else:
            found = (Item(None, str(path.relative_to(root))) for path in images_within(part.path, left_out))
        items.extend(item._replace(held_out=part.held_out) for item in found)
    for path in others:
        left_out[f"in {path.name}/"] += len(images_within(path, left_out))
    held_out = " and ".join(f"{part.path.name}/" for part in parts if part.held_out)
    what = "class folders" if labeled else "folders of images without classes"
    return _source(root, f"{what}, {held_out} held out", items, left_out)


def has_class_folders(folder: Path) -> bool:
    """Return whether a subfolder of ``folder`` has images."""
    return any(images_within(subfolder, Counter()) for subfolder in class_folders(folder, Counter()))


def _source(root: Path, kind: str, items: Iterable[Item], left_out: Counter[str]) -> Source:
    def open_file(record: Record) -> IO[bytes]:
        return (root / record.key).open("rb")

    return make_source(str(root), root, Found(kind, Items(items), open_file, left_out, walked=True))


def _class_items(folder: Path, root: Path, left_out: Counter[str], least: int) -> Iterator[Item]:
    for name, paths in _images_by_class(folder, left_out, least):
        for path in paths:
            yield Item(name, str(path.relative_to(root)))


def _images_by_class(folder: Path, left_out: Counter[str], least: int) -> Iterator[tuple[str, list[Path]]]:
    """Yield the name and the images of each class. An error about too few images comes at the end."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Give a folder with one subfolder of images per class")
    subfolders = class_folders(folder, left_out)
    _check_names(subfolders)
    others: Counter[str] = Counter()
    if outside := len(images_in(folder, others)) + others.total():
        left_out["outside the class folders"] += outside
    too_few: list[str] = []
    for subfolder in subfolders:
        others = Counter()
        images = images_within(subfolder, others)
        if len(images) < least:
            has = f"1 image, {describe(others)}" if images else describe(others)
            too_few.append(f"{subfolder.name!r} ({has.removesuffix(', ') or 'empty'})")
        left_out.update(others)
        yield subfolder.name, images
    if not subfolders:
        names = ", ".join(SUFFIXES)
        raise InputError(f"{folder} has no class folders. Put images ({names}) into one subfolder per class")
    if too_few:
        raise InputError(few_images(folder, too_few, least))


def few_images(folder: object, classes: list[str], least: int = 2) -> str:
    """Return the error message for described classes with fewer than ``least`` images."""
    shown = ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")
    count = f"{len(classes)} {'class has' if len(classes) == 1 else 'classes have'}"
    fewer = "fewer than two" if least == 2 else "no"
    return f"{folder}: {count} {fewer} readable images: {shown}. Add PNG, JPEG or WebP files"


def _check_names(subfolders: list[Path]) -> None:
    seen: dict[str | Path, Path] = {}
    for path in subfolders:
        if not is_plain(path.name):
            raise InputError(f"The name of the class {str(path)!r} cannot be printed. Rename the folder")
        name = unicodedata.normalize("NFC", path.name).strip().casefold()
        for key, problem in (
            (name, "differ only in case or spaces. Rename or merge the folders"),
            (path.resolve(), "are the same folder. Remove the link"),
        ):
            if (other := seen.setdefault(key, path)) is not path:
                raise InputError(f"The classes {str(other)!r} and {path.name!r} {problem}")
