"""Measured rows in docs/results/*.json, and the trained weights in runs/ that they come from.

Every row records the SHA-256 of its weights, the machine and the commit. The repository does not contain the
weights: ``make results TRAIN=1`` trains them again.
"""

import contextlib
import copy
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from far.benchmark import machine
from far.files import read_json, sha256, write_json

# One folder per image set and model.
WEIGHTS = Path("runs/results/weights")
TRAIN = "make results TRAIN=1"


class Measurements:
    """Rows of one JSON file, read and written at each change, so that several processes can use it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.load()

    def load(self) -> None:
        self.values: dict[str, Any] = (
            read_json(self.path) if self.path.exists() else {"rows": {}, "sweeps": {}}
        )

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Load the file, and write it after the block if its values changed. Other processes wait."""
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            self.load()
            before = copy.deepcopy(self.values)
            yield
            if self.values != before:
                write_json(self.path, self.values)
        finally:
            os.close(folder)

    def keep(self, kind: str, key: str, value: Any) -> None:
        with self.changing():
            self.values.setdefault(kind, {})[key] = value

    def replace(self, kind: str, values: dict[str, Any]) -> None:
        with self.changing():
            self.values[kind] = values

    def drop_other_weights(
        self, autoencoder: str | None = None, common: dict[str, Any] | None = None, within: Path = Path()
    ) -> None:
        """Drop rows of models whose present weights differ from the recorded ones: tables mix no weights.

        Args:
            autoencoder: SHA-256 of the models' common autoencoder. Rows with another one are dropped too.
            common: values that all rows of a model have in common, such as their dtype. Rows with others are
                dropped too.
            within: folder of the weights whose rows are checked.
        """
        with self.changing():
            dropped = self._drop(autoencoder, common or {}, within)
        if dropped:
            print(
                f"{self.path}: {dropped} rows have other weights, training or dtype than those in {WEIGHTS}."
                " They are measured again."
            )

    def _drop(self, autoencoder: str | None, common: dict[str, Any], within: Path) -> int:
        """Drop rows as :meth:`drop_other_weights` does, and return their number."""
        at_hand: dict[str, dict[str, str]] = {}
        dropped = 0
        for kind in ("rows", "sweeps"):
            for key, row in list(self.values.get(kind, {}).items()):
                if "sha256" not in row or not Path(row["weights"]).is_relative_to(within):
                    continue
                folder = row["weights"]
                if folder not in at_hand:
                    at_hand[folder] = checksums(Path(folder))
                found, recorded = at_hand[folder], row["sha256"]
                changed = any(found.get(name, value) != value for name, value in recorded.items())
                changed |= autoencoder not in (None, recorded["autoencoder.safetensors"])
                if "model.safetensors" in recorded:  # not a row of reconstructions
                    changed |= any(row.get(name) != value for name, value in common.items())
                if changed:
                    del self.values[kind][key]
                    dropped += 1
        return dropped


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a model's folder by name; empty if the folder is missing."""
    return {
        path.name: sha256(path)
        for path in sorted(folder.glob("*"))
        if path.suffix in (".json", ".safetensors")
    }


def made() -> dict[str, str | None]:
    """Return the machine and the current commit (``None`` outside a clone), as rows record them."""
    done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    return {"machine": machine(), "commit": done.stdout.strip() if done.returncode == 0 else None}


def tell_missing(images: str, folders: list[Path]) -> None:
    """Print one line with the models whose weights are missing and the command that trains them."""
    missing = list(dict.fromkeys(folder.name for folder in folders if not folder.is_dir()))
    if missing:
        print(
            f"{images}: no weights of {', '.join(missing)} in {WEIGHTS / images}. Recorded rows are kept."
            f" {TRAIN} trains them."
        )
