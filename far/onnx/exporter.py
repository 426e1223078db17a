"""Export of a model's networks to ONNX files, beside a ``config.json`` that specifies the loop."""

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from far.autoencoder_config import DecoderName
from far.diffusers_config import DiffusersConfig
from far.errors import InputError
from far.files import atomic_folder, check_empty_folder, sha256, write_json
from far.folder import ModelFolder
from far.onnx.config import CONFIG, DTYPES, OnnxConfig, OnnxFile, export_values
from far.onnx.graphs import BACKBONE, ENCODER, HEAD, Graph, graphs_of
from far.onnx.loop import loop

if TYPE_CHECKING:
    import onnx

# Files whose products of matrices take most of the time, and that int8 quantizes.
_MATRICES = (BACKBONE, HEAD)


def export(
    name: Path | str,
    out: Path | str,
    *,
    dtype: str = "float32",
    encoder: bool = True,
    decoder: DecoderName = "full",
) -> None:
    """Write a model as ONNX files into the folder ``out``, all of them or none.

    Args:
        name: a folder, a bundled model or a model of the hub, as :func:`far.load` takes.
        out: a folder that does not exist or is empty.
        dtype: ``float32``; ``float16``, which halves the files and is computed in float32; or ``int8``, which
            also quantizes the matrix products of backbone and head.
        encoder: export the encoder too, which only edits need.
        decoder: ``"small"`` exports the autoencoder's small decoder, if it has one, instead of the full one.

    Raises:
        InputError: the model does not exist, its kind cannot be exported, ``out`` is not empty or cannot be
            written, or the extra ``onnx`` is not installed.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} cannot be exported. Choose one of {', '.join(DTYPES)}")
    out = Path(out)
    check_empty_folder(out)
    folder = ModelFolder.open(name)
    model = folder.load_model()
    autoencoder = folder.optional_autoencoder(decoder)
    graphs = graphs_of(model, autoencoder)
    if not encoder:
        graphs.pop(ENCODER, None)
    with atomic_folder(out) as temporary:
        files = write_graphs(graphs, temporary, dtype)
        # Exports have no approximate cache. One with an exact cache has this default already.
        defaults = dataclasses.replace(folder.config.defaults, refresh_every=1)
        tokenizer = None if autoencoder is None else autoencoder.config
        if isinstance(tokenizer, DiffusersConfig):
            tokenizer = tokenizer.including_weights()
        # int8 and a small decoder draw other images.
        changes: dict[str, Any] = {"results": {}} if dtype == "int8" or decoder == "small" else {}
        config = dataclasses.replace(
            folder.config, defaults=defaults, autoencoder=tokenizer, base=None, sha256={}, **changes
        )
        onnx = OnnxConfig(dtype, files, loop(model), decoder)  # type: ignore[arg-type]
        write_json(temporary / CONFIG, export_values(config, onnx))


def write_graphs(graphs: dict[str, Graph], folder: Path, dtype: str) -> dict[str, OnnxFile]:
    """Write each graph as an ONNX file of its name into ``folder``, and return their descriptions.

    Raises:
        InputError: as :func:`export`.
    """
    with needs_extra():
        import onnxscript  # noqa: F401 (torch's exporter needs it)

        from far.onnx.stored import store
    files = {}
    with needs_extra(), _quiet():  # int8 needs onnxruntime too
        for file, graph in graphs.items():
            store(_traced(graph, file), dtype, folder / file, matrices=file in _MATRICES)
            files[file] = OnnxFile(sha256(folder / file), graph.inputs, graph.outputs)
    return files


@contextlib.contextmanager
def needs_extra() -> Iterator[None]:
    """Turn a missing package of the extra ``onnx`` into an :class:`InputError`."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("far."):
            raise
        raise InputError(f"ONNX needs {error.name}. Run pip install 'far-image[onnx]'") from error


def _traced(graph: Graph, file: str) -> "onnx.ModelProto":
    """Return a graph as an ONNX model.

    Gradients stay enabled: without them, autoencoders take a path that cannot be traced.

    Raises:
        InputError: an operation has no ONNX counterpart.
    """
    with needs_extra(), _FourAxes():
        try:
            program = torch.onnx.export(
                graph.module.eval(),
                kwargs=graph.examples(),
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                dynamic_shapes=graph.dynamic_shapes(),
                dynamo=True,
                optimize=graph.simplify,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = next(iter(str(error.__cause__ or error).strip().splitlines()), "unknown")
            raise InputError(f"{file} cannot be exported ({reason}). Use another model") from error
    assert program is not None
    return program.model_proto


class _FourAxes(TorchFunctionMode):
    """Gives attention of three axes, as autoencoders have it, the axis of heads that the exporter expects."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention and args[0].dim() == 3:
            return function(*(x.unsqueeze(1) for x in args), **(kwargs or {})).squeeze(1)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of the exporter and of the quantization, which users cannot act on."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
