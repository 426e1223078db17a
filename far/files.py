"""Write files atomically, lock folders, read JSON with clear errors, and hash files."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from far.errors import InputError

# Folders of _beside, each named after its one file, and temporary files of safetensors.
_LEFTOVER = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.far", re.DOTALL)
_OF_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")


@contextlib.contextmanager
def _beside(path: Path, parent: Path | None = None) -> Iterator[Path]:
    """Yield a path of the same name in a new folder beside ``path``, and remove the folder at the end.

    The new folder lies in ``parent``, which must exist; by default in ``path``'s own parent, which is
    created. It is locked, which tells :func:`remove_leftovers` that it is in use. Errors of the disk become
    :class:`InputError`.
    """
    folder = lock = None
    try:
        if parent is None:
            parent = path.parent
            parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f".{path.name}.", suffix=".far"))
        lock = _lock(folder)
        yield folder / path.name
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own way
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {path}: {reason}. Check permissions and free space") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _target(path: Path) -> Path:
    """Return the target of a link, the real path of ``.`` and the like, or else ``path`` itself."""
    return Path(os.path.realpath(path)) if path.is_symlink() or path.name in ("", "..") else path


def _lock(folder: Path) -> int | None:
    """Return an open handle that locks ``folder``; None where locks are not supported (Windows, some disks).

    Raises:
        BlockingIOError: it is locked already.
    """
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success rename it to ``path``, else remove it.

    It is in its own folder, because safetensors makes temporary files beside the file that it writes. A link
    stays, and its target is written.

    Raises:
        InputError: the folder cannot be created or written, or the disk is full.
    """
    path = _target(path)
    with _beside(path) as temporary:
        if path.is_dir():
            raise InputError(f"{path} is a folder. Give the path of a file")
        yield temporary
        with temporary.open("r+b") as written:  # Windows flushes only what is open for writing
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``. On success it replaces ``path``, else it is removed.

    A link stays, and its target is replaced. A disk's own folder (a mount) cannot be replaced, so it receives
    the files.

    Raises:
        InputError: the folder cannot be created or renamed.
    """
    path = _target(path)
    mounted = os.path.ismount(path)
    with _beside(path, path if mounted else None) as temporary:
        temporary.mkdir()
        yield temporary
        if mounted:
            _move_files(temporary, path)
        else:
            remove_folder(path)
            temporary.replace(path)


@contextlib.contextmanager
def files_together(folder: Path, replaced: Callable[[], Iterable[Path]] = tuple) -> Iterator[Path]:
    """Yield an empty temporary folder inside ``folder``. On success, move its files into ``folder``.

    Args:
        folder: created if missing, and removed again on failure. Its other files stay.
        replaced: called once no other command writes there. Returns files to remove after the new ones have
            arrived, unless they have the same names.

    Raises:
        InputError: the folder cannot be created or written, another command is writing to it, or the disk is
            full.
    """
    folder = _target(folder)
    with sole_use(folder), _beside(folder, folder) as temporary:
        earlier = list(replaced())
        temporary.mkdir()
        yield temporary
        arrived = _move_files(temporary, folder)
        for path in earlier:
            if path.name not in arrived:
                path.unlink(missing_ok=True)


def _move_files(source: Path, folder: Path) -> set[str]:
    """Move all files of ``source`` into ``folder``, which is on the same disk, and return their names."""
    paths = list(source.iterdir())
    for path in paths:
        path.replace(folder / path.name)
    return {path.name for path in paths}


@contextlib.contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Lock ``folder`` against other commands until the block or the process ends.

    A missing folder is created, and removed again if the block leaves it empty. There is no lock if the
    system or the disk does not support it (Windows, some network disks).

    Raises:
        InputError: another command has locked the folder, or it cannot be created.
    """
    missing = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
    except BlockingIOError as error:
        remedy = "Wait until it ends, or choose another folder"
        raise InputError(f"another command is writing to {folder}. {remedy}") from error
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}. Check its permissions") from error
    try:
        yield
    finally:
        if missing:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        if lock is not None:
            os.close(lock)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it exists, so that no reader sees part of it."""
    if path.exists():
        with _beside(path) as doomed:
            path.replace(doomed)


def remove_leftovers(*folders: Path, idle_seconds: float = 3600) -> None:
    """Remove temporary folders that killed processes left in ``folders``; see the atomic functions above.

    Those that contain other files than ours stay. So do those that a process has locked, or that were written
    to within ``idle_seconds``, since not every disk has locks. 0 seconds are for folders that only the caller
    writes to.
    """
    for left in (left for folder in folders for left in folder.glob(".*.far")):
        with contextlib.suppress(OSError):  # removed meanwhile, or not ours
            match, held = _LEFTOVER.fullmatch(left.name), list(left.iterdir())
            if match is None or any(
                path.name != match[1] and not _OF_SAFETENSORS.fullmatch(path.name) for path in held
            ):
                continue
            written = max(path.lstat().st_mtime for path in (left, *held))
            if time.time() - written >= idle_seconds:
                lock = _lock(left)
                shutil.rmtree(left, ignore_errors=True)
                if lock is not None:
                    os.close(lock)


def check_exists(path: Path | None, remedy: str) -> None:
    """Raise an :class:`InputError` that ends with ``remedy`` if ``path`` does not exist; None passes."""
    if path is not None and not path.exists():
        raise InputError(f"{path} does not exist. {remedy}")


def check_suffix(option: str, path: Path | None, suffix: str) -> None:
    """Raise an :class:`InputError` unless the ``path`` of an option ends in ``suffix``; None passes."""
    if path is not None and path.suffix.lower() != suffix:
        raise InputError(f"{option} {path} does not end in {suffix}. Give a name that does")


def check_writable(path: Path) -> None:
    """Raise an :class:`InputError` before long work if ``path`` could not be written, creating no folder.

    Also remove leftovers of killed processes beside it.
    """
    path = _target(path)
    if path.is_file() and not os.access(path, os.W_OK):
        raise InputError(f"cannot write {path}: permission denied. Choose another path")
    with _beside(path, next(folder for folder in path.absolute().parents if folder.exists())) as temporary:
        temporary.write_bytes(b"")
    if path.is_dir():
        raise InputError(f"{path} is a folder. Give the path of a file")
    if path.parent.is_dir():
        remove_leftovers(path.parent)


def check_folder(path: Path) -> None:
    """Raise an :class:`InputError` before long work if ``path``, a folder, could not be written to."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        wrong = "cannot be written to" if there.is_dir() else "is not a folder"
        raise InputError(f"cannot write {path}: {there} {wrong}. Choose another path")


def check_empty_folder(path: Path) -> None:
    """Raise an :class:`InputError` before long work unless ``path`` is an empty folder or can become one."""
    if path.is_dir():  # in a mounted folder, a killed command leaves its temporary folder
        remove_leftovers(path)
        filled = any(not _LEFTOVER.fullmatch(entry.name) for entry in path.iterdir())
    else:
        filled = path.exists()
    if filled:
        raise InputError(f"{path} exists and is not an empty folder. Choose another one")
    if path.absolute() == Path.cwd():
        raise InputError(f"{str(path)!r} is the current folder, which cannot be replaced. Choose another one")
    check_folder(path)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value in hexadecimal, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """Read a JSON file. One that is missing or damaged raises an :class:`InputError`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error}). Restore or remake it") from error


def check_zip(path: Path) -> None:
    """Check all of a zip archive against its CRC-32 checksums, which ``torch.load`` and memory maps ignore.

    Raises:
        zipfile.BadZipFile: a checksum differs, or the archive would unpack to more than 1 GiB and a hundred
            times its size. zipfile raises many other types for damaged archives.
    """
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > max(2**30, 100 * path.stat().st_size):
            raise zipfile.BadZipFile(f"it would unpack to {unpacked} bytes")
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged!r} differs")


def is_plain(name: str) -> bool:
    """Return whether a name can be printed: it has no line ends, other control characters or surrogates."""
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name)


def printable(text: str) -> str:
    """Return ``text`` in one line and safe for a terminal, with other than plain characters escaped."""
    return "".join(character if is_plain(character) else repr(character)[1:-1] for character in text)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return sha256_of(file)


def sha256_of(file: IO[bytes]) -> str:
    """Return the SHA-256 of the rest of an open file in hexadecimal."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
