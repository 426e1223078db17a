"""Styles of the avatar set and rendering of one image, without torch so that processes start quickly."""

import functools
import importlib
import importlib.metadata
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from far.errors import InputError
from far.files import json_digest, sha256

if TYPE_CHECKING:
    import numpy as np

STYLES = (
    "critters", "planets", "sprouts", "landscape", "pixel-art", "thumbs", "voxel-art", "voxel-bot",
    "cutouts", "clay", "moods", "open-peeps", "lorelei", "patchwork", "shapes", "stack",
)  # fmt: skip
# Seeds below this are for training, all others for the held-out reference.
HELD_OUT_SEED = 3000
# Images are rendered at this size and then reduced.
RENDER_SIZE = 128


def render_avatar(job: tuple[int, int], size: int) -> "np.ndarray":
    """Return an image ``[size, size, 3]`` uint8 on white; ``job`` is (class, seed)."""
    import numpy as np
    import resvg_py
    from dicebear import Avatar
    from PIL import Image

    label, seed = job
    name = STYLES[label]
    svg = Avatar(_style(name), {"seed": f"{name}-{seed}", "size": RENDER_SIZE}).to_string()
    with Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg))), formats=("PNG",)) as picture:
        rgba = picture.convert("RGBA")
    rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return np.asarray(rgb.resize((size, size), Image.Resampling.BOX))


def renderer_digest() -> str:
    """Return a SHA-256 of the styles and of the versions of the packages that render them."""
    versions = [importlib.metadata.version(name) for name in ("dicebear-core", "resvg_py")]
    return json_digest([versions, [sha256(_style_file(name)) for name in STYLES]])


def check_packages() -> None:
    """Raise an :class:`InputError` if a package of the ``data`` extra is missing."""
    for name in ("dicebear", "dicebear_styles", "resvg_py"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"avatars need {name}. Run: pip install 'far-image[data]'") from error


def _style_file(name: str) -> Path:
    return Path(next(iter(importlib.import_module("dicebear_styles").__path__))) / f"{name}.json"


@functools.cache
def _style(name: str) -> Any:
    """Load a style. Its validation takes a third of a second."""
    from dicebear import Style

    return Style(json.loads(_style_file(name).read_text(encoding="utf-8")))
