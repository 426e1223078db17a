"""Measured rows in docs/results/*.json, and the trained weights in runs/ that they come from.

Every row records the SHA-256 of its weights, the machine and the commit. The repository does not contain the
weights: ``make results TRAIN=1`` trains them again.
"""

import subprocess
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

    def keep(self, kind: str, key: str, value: Any) -> None:
        self.load()
        self.values.setdefault(kind, {})[key] = value
        write_json(self.path, self.values)

    def replace(self, kind: str, values: dict[str, Any]) -> None:
        self.load()
        self.values[kind] = values
        write_json(self.path, self.values)

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
        self.load()
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
                    changed |= any(row.get(name) != value for name, value in (common or {}).items())
                if changed:
                    del self.values[kind][key]
                    dropped += 1
        if dropped:
            print(
                f"{self.path}: {dropped} rows have other weights, training or dtype than those in {WEIGHTS}."
                " They are measured again."
            )
            write_json(self.path, self.values)


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
