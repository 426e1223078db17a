"""Models as ONNX files: export from torch, and a pipeline that draws from them with ONNX Runtime.

>>> import far.onnx
>>> images = far.onnx.load("avatars-64-onnx").generate(labels=["planets"], seed=0)
"""

from typing import TYPE_CHECKING

from far.lazy import lazily

if TYPE_CHECKING:
    from far.onnx.exporter import export
    from far.onnx.pipeline import OnnxPipeline, load
else:
    _HOMES = {
        "OnnxPipeline": "far.onnx.pipeline", "export": "far.onnx.exporter", "load": "far.onnx.pipeline",
    }  # fmt: skip
    __getattr__, __dir__ = lazily(__name__, _HOMES)

__all__ = ["OnnxPipeline", "export", "load"]
