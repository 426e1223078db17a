"""Weights of an ONNX model in fewer bytes: stored as float16, or matrices quantized to 8 bits."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from far.errors import InputError

# Smaller tensors, such as biases, keep their dtype.
_LEAST_VALUES = 1024
# Protocol buffers, and so ONNX files, hold less than 2 GiB. The graph beside the weights is small.
_MOST_BYTES = 2**31 - 2**24


def store(model: onnx.ModelProto, dtype: str, path: Path, *, matrices: bool) -> None:
    """Write a model whose weights are stored in ``dtype``.

    With float16, weights are converted back to float32 when the file is loaded, and all arithmetic is in
    float32. With int8 and ``matrices``, matrix products are computed in 8 bits: weights have one scale per
    output channel, inputs one per call. All other weights are then stored as float16.

    Raises:
        InputError: the file, or that of float32 weights to be quantized, would be too large.
    """
    if dtype == "int8" and matrices:
        _check_size(model, path, "Give --dtype float16")  # quantization writes the float32 model
        model = _quantized(model)
    if dtype != "float32":
        _store_as_float16(model)
    _check_size(model, path, "Give --dtype float16" if dtype == "float32" else "Export a smaller model")
    onnx.save(model, path)


def _check_size(model: onnx.ModelProto, path: Path, remedy: str) -> None:
    # The size of the whole model cannot be computed once it is too large.
    size = sum(tensor.ByteSize() for tensor in model.graph.initializer)
    if size > _MOST_BYTES:
        most = "an ONNX file holds less than 2 GiB"
        raise InputError(f"{path.name} would have {size / 2**30:.1f} GiB: {most}. {remedy}")


def _store_as_float16(model: onnx.ModelProto) -> None:
    """Replace large float32 weights by float16 ones and a cast, in place, unless they overflow."""
    casts = []
    for weights in model.graph.initializer:
        values = numpy_helper.to_array(weights)
        if weights.data_type != TensorProto.FLOAT or values.size < _LEAST_VALUES:
            continue
        if np.abs(values).max() > np.finfo(np.float16).max:
            continue
        name, stored = weights.name, f"{weights.name}_float16"
        weights.CopyFrom(numpy_helper.from_array(values.astype(np.float16), stored))
        casts.append(helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _quantized(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with products by constant matrices in 8 bits, by ONNX Runtime's own quantization.

    Weights use 7 of the 8 bits: without VNNI instructions, sums of two products of 8 bits overflow.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.onnx"
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(path)
