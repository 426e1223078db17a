"""Editor of the demo's page: a picture whose tokens are marked with the pointer or the keyboard.

Its value is a dictionary that travels with each click, so the server keeps nothing:

- ``picture``: a PNG as a data URL, or ``""``; ``download``: a name for this file, or ``""``;
- ``whole``: the last finished picture, from which redrawing starts: ``picture``, or the one before it while
  that is unfinished; ``""`` if there is none;
- ``marked``: numbers of tokens; ``drawn``: whether to outline them only, so that the result is seen;
- ``status``: HTML; ``width`` and ``height`` in pixels; ``rows`` and ``columns`` in tokens.

``editor.js`` changes it in the browser.
"""

import base64
import binascii
import io
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from far.demo.drawing import Model
from far.editing import image_pixels
from far.errors import InputError

PNG_ADDRESS = "data:image/png;base64,"

# A template string of JavaScript, which gradio fills in with the value.
TEMPLATE = """<div class="editor">
<div class="canvas" style="aspect-ratio: ${value.width} / ${value.height}">
${value.picture ? `<img src="${value.picture}" alt="picture to edit">`
  : '<div class="empty">Draw a new picture, or open one.</div>'}
<div class="tokens ${value.drawn ? "drawn" : ""}" role="group" aria-label="parts to redraw"
  style="grid-template-columns: repeat(${value.columns}, 1fr)">
${Array.from({length: value.rows * value.columns}, (_, token) => `<button type="button" data-token="${token}"
  aria-pressed="${value.marked.includes(token)}" aria-label="row ${Math.floor(token / value.columns) + 1},
  column ${token % value.columns + 1}"></button>`).join("")}
</div></div>
<div class="tools">
<label class="tool">Open an image<input type="file" accept="image/*"></label>
<button type="button" class="tool" data-mark="all">Mark all</button>
<button type="button" class="tool" data-mark="none">Unmark all</button>
${value.download ? `<a download="${value.download}" href="${value.picture}">↓ PNG</a>` : ""}
</div>
<div role="status">${value.status}</div></div>"""
SCRIPT = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")


def editor(model: Model) -> gr.HTML:
    """Return an editor without a picture, for the sizes of a model."""
    return gr.HTML(empty(model), html_template=TEMPLATE, js_on_load=SCRIPT, elem_id="editor")


def empty(model: Model) -> dict[str, Any]:
    """Return the value of an editor without a picture."""
    height, width = model.pipeline.image_size
    rows, columns = model.pipeline.model.config.token_grid
    sizes = {"width": width, "height": height, "rows": rows, "columns": columns}
    texts = dict.fromkeys(("picture", "whole", "download", "status"), "")
    return {**texts, "marked": [], "drawn": False, **sizes}


def opened(value: Any, model: Model) -> tuple[Tensor, list[int]]:
    """Return the picture ``[3, H, W]`` in [0, 1] and the marked tokens of an editor's value.

    Raises:
        InputError: there is no picture, it is not a PNG of the model's size, or no token is marked.
    """
    given = value if isinstance(value, dict) else {}
    picture, marked = given.get("whole"), given.get("marked")
    if not isinstance(picture, str) or not picture.startswith(PNG_ADDRESS):
        raise InputError("there is no finished picture yet. Draw a new one, or open an image")
    tokens = range(model.pipeline.model.config.tokens)
    if not isinstance(marked, list) or not all(type(token) is int and token in tokens for token in marked):
        raise InputError(
            f"the marked parts are not numbers of tokens within 0 … {tokens[-1]}. Mark them again"
        )
    if not marked:
        raise InputError("no part is marked. Mark the parts to redraw on the picture")
    height, width = model.pipeline.image_size
    try:
        data = base64.b64decode(picture[len(PNG_ADDRESS) :], validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.size != (width, height):  # checked before the pixels are decoded
                raise InputError(f"the picture is not of {width}×{height} pixels. Draw or open it again")
            return image_pixels(image, (height, width)), sorted(set(marked))
    except (binascii.Error, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError("the picture is not a PNG that can be read. Open another one") from error
