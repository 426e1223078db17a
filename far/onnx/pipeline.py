"""Pipeline whose networks are ONNX files. Loop, noise and the heads' solvers are the library's own."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from far.autoencoder_config import AutoencoderConfig
from far.backbone import Backbone
from far.diffusers_config import DiffusersConfig
from far.errors import InputError
from far.files import sha256
from far.folder_config import FolderConfig
from far.layers import take
from far.model import FAR
from far.onnx.config import CONFIG, OnnxConfig, OnnxFile, open_export
from far.onnx.exporter import needs_extra
from far.onnx.graphs import (
    BACKBONE,
    DECODER,
    ENCODER,
    HEAD,
    HEAD_CONDITION,
    HEAD_GUIDANCE,
    HEAD_TIME,
)
from far.pictures import check_finite
from far.pipeline import Labels, Pipeline
from far.sampling import Kept, Progress, SamplingConfig
from far.tokenizer import Tokenizer
from far.weights import NoInitialization

# Images that the autoencoder's networks take at once, which bounds their memory.
_CHUNK = 16


def load(name: Path | str) -> "OnnxPipeline":
    """Load a folder that :func:`far.onnx.export` or ``far export onnx`` wrote.

    Raises:
        InputError: the folder does not exist or is not an export, a file is missing or damaged, or the extra
            ``onnx`` is not installed.
    """
    folder, config, onnx = open_export(name)
    assert config.model is not None
    sessions = {file: Session(folder / file, described) for file, described in onnx.files.items()}
    with NoInitialization(), torch.device("meta"):  # no memory: the networks are replaced
        model = FAR(config.model)
    try:
        model.backbone = _OnnxBackbone(model.backbone, sessions[BACKBONE])
        model.head.network = _OnnxNetwork(sessions)
        if getattr(model.head, "guidance_embedding", None) is not None:
            model.head.guidance_embedding = _OnnxGuidance(sessions[HEAD_GUIDANCE])
        autoencoder = None
        if config.autoencoder is not None:
            autoencoder = _OnnxTokenizer(config.autoencoder, sessions[DECODER], sessions.get(ENCODER))
            autoencoder.active_decoder = onnx.decoder
    except KeyError as error:
        missing = f"{folder / CONFIG} names no {error.args[0]}"
        raise InputError(f"{missing}. Export the model again") from None
    return OnnxPipeline(model, autoencoder, config, onnx)


class OnnxPipeline(Pipeline):
    """A :class:`far.Pipeline` that computes with ONNX Runtime, on the CPU; made by :func:`load`.

    It draws the same images from the same seeds, up to rounding. Masked models have no ``refresh_every``.
    In int8, it draws the images of a batch one by one: products in 8 bits have one scale per call, so images
    drawn together would depend on each other.
    """

    def __init__(
        self, model: FAR, autoencoder: Tokenizer | None, config: FolderConfig, onnx: OnnxConfig
    ) -> None:
        facts = config.classes, config.defaults, config.results, config.training
        super().__init__(model, autoencoder, *facts, record=False)
        self._dtype = onnx.dtype

    def __repr__(self) -> str:
        network = self.model.config.network
        kinds = f"{network.backbone.kind} backbone, {network.head.kind} head"
        return f"OnnxPipeline({kinds}, {len(self.classes)} classes, {self.dtype})"

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> str:
        """The dtype that the weights are stored in."""
        return self._dtype

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: str | torch.dtype | None = None
    ) -> NoReturn:
        """Raise an :class:`InputError`: device and dtype of an export are fixed."""
        raise InputError("device and dtype of an export are fixed. Export the model again")

    def save_pretrained(
        self, folder: Path | str, dtype: torch.dtype | str | None = None, *, base: str | None = None
    ) -> NoReturn:
        """Raise an :class:`InputError`: an export cannot become a model's folder again."""
        raise InputError(f"{folder}: an export cannot be saved as a model. Copy its folder instead")

    def stream(
        self,
        labels: Labels,
        seeds: Sequence[int],
        config: SamplingConfig | None = None,
        *,
        kept: Kept | None = None,
    ) -> Iterator[Progress]:
        """Draw one batch, one AR step at a time; see :meth:`far.Pipeline.stream`."""
        if not self.model.backbone.exact_cache and (every := (config or self.defaults).refresh_every) > 1:
            raise InputError(f"refresh_every {every} does not apply to an export. Omit refresh_every")
        numbers, seeds = self._numbers(labels, seeds)
        if self.dtype != "int8" or len(numbers) == 1:
            return super().stream(numbers, seeds, config, kept=kept)
        latents = [None] * len(numbers) if kept is None else kept.latents.split(1)
        singles = []
        for number, seed, given in zip(numbers, seeds, latents):
            one = None if kept is None or given is None else Kept(given, kept.positions)
            singles.append(super().stream([number], [seed], config, kept=one))
        return map(_together, zip(*singles))


def _together(single: Sequence[Progress]) -> Progress:
    """Return the state of a batch from those of its images."""
    latents, known = (torch.cat(parts) for parts in zip(*((one.latents, one.known) for one in single)))
    return Progress(single[0].step, single[0].steps, latents, known)


class Session:
    """An ONNX file, called as a function of tensors by name.

    Raises:
        InputError: the file is missing or damaged, or ONNX Runtime is not installed.
    """

    def __init__(self, path: Path, described: OnnxFile) -> None:
        with needs_extra():
            import onnxruntime
        if not path.is_file() or sha256(path) != described.sha256:
            raise InputError(f"{path} is missing or damaged (its checksum differs). Export the model again")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Idle threads of one network would otherwise keep the cores busy while another one computes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no class
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"ONNX Runtime cannot read {path} ({reason}). Update onnxruntime") from error
        self._path = path

    def axes(self, name: str) -> list[int | str]:
        """Return the axes of an input: sizes, or names of axes of any size."""
        return next(entry.shape for entry in self._session.get_inputs() if entry.name == name)

    def __call__(self, **inputs: Tensor) -> list[Tensor]:
        """Return the outputs for inputs by name.

        Raises:
            InputError: ONNX Runtime fails, as it does if ``config.json`` describes another model.
        """
        given = {name: tensor.detach().contiguous().numpy() for name, tensor in inputs.items()}
        try:
            outputs = self._session.run(None, given)
        except Exception as error:  # ONNX Runtime's errors share no class
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"ONNX Runtime cannot run {self._path} ({reason}). Export it again") from error
        return [torch.from_numpy(output) for output in outputs]


class _Cache:
    """Keys and values of all blocks, ``[depth, rows, heads, length, head_width]`` each."""

    def __init__(self, keys: Tensor) -> None:
        self.keys, self.values = keys, keys

    def clear(self) -> None:
        """Hold nothing."""
        self.keys, self.values = self.keys[:, :, :, :0], self.values[:, :, :, :0]


class _OnnxBackbone(Backbone):
    """A backbone whose answer comes from an ONNX file. ``like`` has its configuration, not its weights."""

    def __init__(self, like: Backbone, session: Session) -> None:
        super().__init__()
        self.any_order, self.exact_cache = like.any_order, like.exact_cache
        self.config, self.tokens, self._width = like.config, like.tokens, like.width
        self._session = session

    @property
    def width(self) -> int:
        return self._width

    def forward(
        self, tokens: Tensor, known: Tensor, query: Tensor, labels: Tensor, cache: Any = None
    ) -> Tensor:
        """Return ``z`` at ``query``; see :meth:`Backbone.forward`. Exact caches are required."""
        if not self.exact_cache:
            return self._session(tokens=tokens, known=known, query=query, labels=labels)[0]
        buffer, rows, held = self.config.buffer, len(tokens), cache.keys.shape[3]
        new = known[:, max(0, held - buffer) :]
        fed, places = take(tokens, new), new + buffer
        if not held:
            copies = torch.arange(buffer).expand(rows, -1)
            fed = torch.cat([fed.new_zeros(rows, buffer, fed.shape[-1]), fed], dim=1)
            places = torch.cat([copies, places], dim=1)
        caches = {"keys": cache.keys[:, :rows], "values": cache.values[:, :rows]}
        queries = {"query": query} if self.any_order else {}
        z, cache.keys, cache.values = self._session(
            tokens=fed, places=places, labels=labels, **caches, **queries
        )
        return z

    def training_inputs(self, tokens: Tensor, generator: torch.Generator) -> NoReturn:
        raise InputError("an export cannot be trained. Train the model that it was made from")

    def new_cache(self, rows: int) -> _Cache:
        """Return an empty cache for ``rows`` sequences."""
        depth, _, heads, _, head_width = self._session.axes("keys")
        return _Cache(torch.zeros(int(depth), rows, int(heads), 0, int(head_width)))


class _OnnxNetwork(nn.Module):
    """The functions of :class:`far.heads.network.HeadNetwork` that samplers call, from ONNX files."""

    dtype = torch.float32

    def __init__(self, sessions: dict[str, Session]) -> None:
        super().__init__()
        self._step, self._condition = sessions[HEAD], sessions[HEAD_CONDITION]
        self._time = sessions.get(HEAD_TIME)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Return outputs of a network without times."""
        return self.conditioned(x, self.embed_condition(z), self.embed_times())

    def embed_condition(self, z: Tensor) -> Tensor:
        (condition,) = self._condition(input=z.flatten(0, -2))
        return condition.unflatten(0, z.shape[:-1])

    def embed_times(self, *times: Tensor) -> Tensor:
        return torch.zeros(()) if self._time is None else self._time(times=torch.stack(times, dim=-1))[0]

    def at_times(self, condition: Tensor, times: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        """Iterate over the network at one of its ``times [steps, width]`` after the other."""
        for time in times:
            yield functools.partial(self.conditioned, condition=condition, time=time)

    def conditioned(self, x: Tensor, condition: Tensor, time: Tensor) -> Tensor:
        """Return outputs for ``x`` and conditions that it broadcasts to, at one embedded time."""
        rows = condition.shape[:-1]
        x, condition = x.expand(*rows, -1).flatten(0, -2), condition.flatten(0, -2)
        times = {} if self._time is None else {"time": time}
        (output,) = self._step(x=x, condition=condition, **times)
        return output.unflatten(0, rows)


class _OnnxGuidance(nn.Module):
    """The embedding of a flow map's guidance scale, from an ONNX file."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def forward(self, guidance: Tensor, dtype: torch.dtype) -> Tensor:
        (embedded,) = self._session(guidance=guidance.reshape(-1))
        return embedded.view(*guidance.shape, -1)


class _OnnxTokenizer(Tokenizer):
    """An autoencoder whose networks are ONNX files, from and to unit-variance latents."""

    def __init__(
        self, config: AutoencoderConfig | DiffusersConfig, decoder: Session, encoder: Session | None
    ) -> None:
        super().__init__()
        self.config, self.small_decoder = config, None
        self._decode, self._encode = decoder, encoder

    def to_images(self, latents: Tensor) -> Tensor:
        """Return images ``[b, 3, H, W]`` in [0, 1]; see :meth:`Tokenizer.to_images`."""
        parts = [self._decode(latents=part)[0] for part in latents.split(_CHUNK)]
        return check_finite(torch.cat(parts)).clamp(0, 1)

    def to_latents(self, images: Tensor) -> Tensor:
        """Return unit-variance latents ``[b, c, h, w]``; see :meth:`Tokenizer.to_latents`.

        Raises:
            InputError: the export has no encoder, like that of a web page.
        """
        if self._encode is None:
            raise InputError(f"this export has no {ENCODER}, which edits need. Use far export onnx")
        return torch.cat([self._encode(images=part)[0] for part in images.split(_CHUNK)])
