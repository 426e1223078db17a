"""Names of models → folders. Needs no torch: a misspelled name is refused without it."""

import difflib
from pathlib import Path

from far.errors import InputError, prefix_errors
from far.hub import download, is_hub_name

BUNDLED = Path(__file__).parent / "bundled"
_OURS = "a folder that far train, far distill, far train-autoencoder or far convert wrote"


def find_folder(name: Path | str, *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """Return the folder of a path, a bundled model or a model of the hub, tried in this order.

    A model of the hub is downloaded if missing. A :class:`~pathlib.Path` is a folder, never a name.

    Raises:
        InputError: none of them exists, or the hub cannot be reached.
    """
    if not isinstance(name, str | Path):
        raise InputError(f"weights {name!r} is not a name. Give a folder, a bundled model or OWNER/NAME")
    bundled = bundled_names()
    if (name != "" and Path(name).is_dir()) or (isinstance(name, str) and name in bundled):
        if revision is not None:
            raise InputError(f"weights {str(name)!r} is a folder. Leave out the revision {revision!r}")
        folder = Path(name) if Path(name).is_dir() else BUNDLED / name
        if not (folder / "config.json").exists():
            raise InputError(f"{folder} holds no model (no config.json). Give {_OURS}")
        return folder
    if isinstance(name, str) and is_hub_name(name) and not name.startswith(("./", "../")):
        with prefix_errors(f"weights {name!r}: no such folder{_beside(name)}. As a name on the hub: "):
            return download(name, revision, local_files_only=local_files_only)
    raise InputError(
        f"weights {str(name)!r}: no such folder or bundled model. Give one of {', '.join(bundled)}, "
        f"{_OURS}, or OWNER/NAME of the hub"
    )


def _beside(name: str) -> str:
    """Return the folders that a misspelled path may have meant, for an error."""
    parent = Path(name).parent
    if not parent.is_dir():
        return ""
    folders = sorted(path.name for path in parent.glob("[!.]*") if path.is_dir())
    near = difflib.get_close_matches(Path(name).name, folders, n=3, cutoff=0.0)
    return f" ({parent} holds {', '.join(near) or 'no folder'})"


def bundled_names() -> list[str]:
    """Return the names of the models that come with the library, in alphabetical order."""
    return sorted(path.name for path in BUNDLED.iterdir() if path.is_dir())
