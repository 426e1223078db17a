"""Names of models → folders. Needs no torch: a misspelt name is refused without it.

The one place where names become folders; see :meth:`far.Pipeline.from_pretrained` for what they may be.
"""

import difflib
from pathlib import Path

from far.errors import InputError
from far.hub import download, is_hub_name

BUNDLED = Path(__file__).parent / "bundled"
_WRITERS = "far train, far distill, far train-autoencoder or far convert"


def find_folder(name: Path | str, *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The folder of a path, of a bundled model's name, or of a model of the hub, which is downloaded where missing.

    Raises:
        InputError: none of them exists, or the hub cannot be reached.
    """
    if not isinstance(name, str | Path):
        raise InputError(
            f"weights {name!r}: give a folder, the name of a bundled model, or OWNER/NAME of the hub"
        )
    bundled = bundled_names()
    if (name != "" and Path(name).is_dir()) or (isinstance(name, str) and name in bundled):
        if revision is not None:
            raise InputError(
                f"weights {str(name)!r} are a folder here, which has no revision {revision!r}; leave it out"
            )
        folder = Path(name) if Path(name).is_dir() else BUNDLED / name
        if not (folder / "config.json").exists():
            raise InputError(f"{folder} holds no model (no config.json). Give a folder that {_WRITERS} wrote")
        return folder
    if isinstance(name, str) and is_hub_name(name) and not name.startswith(("./", "../")):
        try:
            return download(name, revision, local_files_only=local_files_only)
        except InputError as error:
            raise InputError(
                f"weights {name!r}: no such folder{_beside(name)}; taken for a name on the hub, {error}"
            ) from error
    raise InputError(
        f"weights {str(name)!r}: no such folder or bundled model. Give one of {', '.join(bundled)}, "
        f"a folder that {_WRITERS} wrote, or OWNER/NAME of the hub"
    )


def _beside(name: str) -> str:
    """What a name that could be a path may have been meant to be, for an error."""
    parent = Path(name).parent
    if not parent.is_dir():
        return ""
    found = sorted(path.name for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
    near = difflib.get_close_matches(Path(name).name, found, n=3, cutoff=0.0)
    return f" ({parent} holds {', '.join(near) or 'no folder'})"


def bundled_names() -> list[str]:
    """The models that come with the library, in alphabetical order."""
    return sorted(path.name for path in BUNDLED.iterdir() if path.is_dir())
