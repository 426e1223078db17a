"""``Pipeline``: class labels in, images out. ``far.sampling`` has the loop, ``far.folder`` the files."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

from far.autoencoder_config import DecoderName
from far.classes import class_number
from far.compiling import compile_blocks
from far.config import check_count, counted_seeds, from_dict, listed, plain_value, whole_number
from far.devices import resolve_device
from far.editing import blend_kept, image_pixels, mask_pixels, paste_kept, touched_tokens
from far.errors import InputError
from far.folder import ModelFolder
from far.folder_config import FolderConfig
from far.model import FAR
from far.packing import has_int8, parameter_count, unpack_linear_layers
from far.pictures import Images, Output, Picture, Pictures, check_output, convert_output
from far.precision import prepare, prepare_autoencoder, resolve_dtype
from far.recording import Recordings
from far.sampling import Kept, Progress, SamplingConfig, SeededNoise
from far.tokenizer import Tokenizer

Labels: TypeAlias = Sequence[int | str]
Seeds: TypeAlias = int | Sequence[int]
Callback: TypeAlias = Callable[[Progress], None] | None


class Pipeline:
    """A generator, its autoencoder, the class names and the default sampling values.

    ``results`` (figures) and ``training`` (facts) are saved in ``config.json`` and the model card. With
    ``record``, generations on CUDA are recorded (:mod:`far.recording`), which is faster and takes memory.

    Examples:
        >>> import far
        >>> images = far.load("avatars-64").generate(labels=["planets", 5], guidance=2.0, seed=0)
    """

    def __init__(
        self,
        model: FAR,
        autoencoder: Tokenizer | None,
        classes: Sequence[str],
        defaults: SamplingConfig,
        results: dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
        *,
        record: bool = True,
    ) -> None:
        self.model, self.autoencoder = model.eval(), autoencoder
        self.classes, self.defaults = list(classes), defaults
        self.results, self.training = results or {}, training or {}
        self.recordings = Recordings(enabled=record)

    def __repr__(self) -> str:
        network = self.model.config.network
        size = "no autoencoder" if self.autoencoder is None else "{1}×{0} pixels".format(*self.image_size)
        return (
            f"Pipeline({network.backbone.kind} backbone, {network.head.kind} head, "
            f"{len(self.classes)} classes, {size}, "
            f"{parameter_count(self.model):,} parameters, {self.dtype}, {self.device})"
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> str:
        """The dtype of the generator's weights, such as ``"bfloat16"`` or ``"int8"``."""
        weights = next(self.model.parameters()).dtype
        return "int8" if has_int8(self.model) else str(weights).removeprefix("torch.")

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels; an :class:`InputError` without an autoencoder."""
        stride = self.require_autoencoder().config.stride
        rows, columns = self.model.config.grid
        return rows * stride, columns * stride

    def require_autoencoder(self) -> Tokenizer:
        """Return the autoencoder; an :class:`InputError` if the model has none."""
        if self.autoencoder is None:
            raise InputError("this model has no autoencoder. Add one with: far convert kl16 KL16.ckpt FOLDER")
        return self.autoencoder

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: str | torch.dtype | None = None
    ) -> "Pipeline":
        """Move the pipeline to a device and a dtype, in place, and return it.

        None keeps a value, others are as in :meth:`from_pretrained`. As in torch, a dtype may come first. A
        lower precision is not undone by a higher one: load the model again for its original weights.

        Raises:
            InputError: the device or dtype is not available here, or int8 weights had to be converted back.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        device = self.device if device is None else resolve_device(device)
        dtype = self.dtype if dtype is None else resolve_dtype(dtype, device)
        if self.dtype == "int8" and (dtype, device) != ("int8", self.device):
            raise InputError(f"int8 weights cannot become {dtype} on {device}. Load the model again")
        if self.dtype != "int8":
            unpack_linear_layers(self.model)
            prepare(self.model, dtype, device)
        if self.autoencoder is not None:
            prepare_autoencoder(self.autoencoder, dtype, device)
        return self

    def label(self, name: int | str) -> int:
        """Return the number of a class from its number or name; see :func:`far.classes.class_number`."""
        return class_number(self.classes, name)

    # fmt: off
    @overload
    def generate(self, labels: Labels, *, seed: Seeds = 0, batch_size: int = 64, callback: Callback = None,
                 output: Literal["pil"] = "pil", **sampling: Any) -> Pictures: ...
    @overload
    def generate(self, labels: Labels, *, seed: Seeds = 0, batch_size: int = 64, callback: Callback = None,
                 output: Literal["tensor"], **sampling: Any) -> Tensor: ...
    @overload
    def generate(self, labels: Labels, *, seed: Seeds = 0, batch_size: int = 64, callback: Callback = None,
                 output: Literal["np"], **sampling: Any) -> np.ndarray: ...
    def generate(self, labels: Labels, *, seed: Seeds = 0, batch_size: int = 64, callback: Callback = None,
                 output: Output = "pil", **sampling: Any) -> Images:
        # fmt: on
        """Draw one image per label.

        Args:
            labels: class numbers or names.
            seed: the seed of the first image, counting up for the next ones; or one seed per image. An image
                depends on its seed and label only, not on the others in its batch.
            batch_size: images drawn together.
            callback: called after each AR step of each batch.
            output: ``"pil"`` for a list of Pillow images, ``"tensor"`` for ``[n, 3, h, w]`` in [0, 1],
                ``"np"`` for ``[n, h, w, 3]`` uint8.
            sampling: values of :class:`far.SamplingConfig` by name, such as ``guidance=2.0``; ``None`` takes
                the model's default.

        Raises:
            InputError: an unknown class, an unknown name, or a value out of range.
        """
        check_output(output)
        labels, config = listed("labels", labels), self.sampling_config(**sampling)
        seeds = counted_seeds(seed, len(labels))
        images = self.draw(labels, seeds, config, batch_size=batch_size, callback=callback)
        return convert_output(images, output)

    def draw(
        self,
        labels: Labels,
        seeds: Sequence[int],
        config: SamplingConfig | None = None,
        *,
        batch_size: int = 64,
        callback: Callback = None,
        kept: Kept | None = None,
    ) -> Tensor:
        """Draw ``[n, 3, h, w]`` in [0, 1] as :meth:`generate` does, one seed per label, some tokens kept."""
        check_count("batch_size", whole_number("batch_size", batch_size), 2**40)
        numbers, seeds = self._numbers(labels, seeds)
        parts = []
        for start in range(0, len(numbers), batch_size):
            chunk = slice(start, start + batch_size)
            given = None if kept is None else dataclasses.replace(kept, latents=kept.latents[chunk])
            for progress in self.stream(numbers[chunk], seeds[chunk], config, kept=given):
                if callback is not None:
                    callback(progress)
            parts.append(self.decode(progress.latents))
        return torch.cat(parts)

    def stream(
        self,
        labels: Labels,
        seeds: Sequence[int],
        config: SamplingConfig | None = None,
        *,
        kept: Kept | None = None,
    ) -> Iterator[Progress]:
        """Draw one batch, one AR step at a time; :meth:`decode` turns the last latents into images.

        Labels and seeds are one per image. Tokens that are ``kept`` are given, not drawn.

        Raises:
            InputError: an unknown class, or a value out of range; raised by the call itself, before any step.
        """
        numbers, seeds = self._numbers(labels, seeds)
        classes, noise = torch.tensor(numbers, device=self.device), SeededNoise(seeds, self.device)
        return self.recordings.sampling_steps(self.model, classes, noise, config or self.defaults, kept=kept)

    def _numbers(self, labels: Labels, seeds: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return class numbers and seeds, after checking that there are as many of both, and at least one."""
        numbers, seeds = [self.label(name) for name in listed("labels", labels)], counted_seeds(seeds)
        if not numbers:
            raise InputError("labels is empty. Give at least one class")
        if len(seeds) != len(numbers):
            raise InputError(f"{len(seeds)} seeds for {len(numbers)} labels. Give one seed per label")
        return numbers, seeds

    def preview(self, progress: Progress) -> Tensor:
        """Return the images so far, ``[b, 3, H, W]`` in [0, 1], mid-gray at unknown tokens."""
        images = self.decode(progress.latents)
        gray = images.new_full(images.shape[1:], 0.5)
        return paste_kept(images, gray, progress.known, self.model.config.token_grid)

    # fmt: off
    @overload
    def edit(self, image: Picture, mask: Picture, label: int | str, *, seed: Seeds = 0, paste: bool = True,
             callback: Callback = None, output: Literal["pil"] = "pil", **sampling: Any) -> Pictures: ...
    @overload
    def edit(self, image: Picture, mask: Picture, label: int | str, *, seed: Seeds = 0, paste: bool = True,
             callback: Callback = None, output: Literal["tensor"], **sampling: Any) -> Tensor: ...
    @overload
    def edit(self, image: Picture, mask: Picture, label: int | str, *, seed: Seeds = 0, paste: bool = True,
             callback: Callback = None, output: Literal["np"], **sampling: Any) -> np.ndarray: ...
    def edit(self, image: Picture, mask: Picture, label: int | str, *, seed: Seeds = 0, paste: bool = True,
             callback: Callback = None, output: Output = "pil", **sampling: Any) -> Images:
        # fmt: on
        """Redraw a part of an image: inside it (inpainting), around it (outpainting), or as another class.

        Tokens that the mask does not touch stay exactly as the autoencoder encodes them. Touched tokens are
        drawn again as wholes, given the others. A causal backbone can only redraw from one token to the end.

        Args:
            image: of :attr:`image_size`: a Pillow image, uint8 ``[H, W, 3]``, or floats ``[3, H, W]`` in
                [0, 1].
            mask: Pillow image of the same size, white where to redraw, or ``[H, W]``, above 0.5 where to
                redraw. Transparent parts are kept.
            label: the class to draw, number or name.
            seed: one seed, or several for as many versions.
            paste: put the pixels of ``image`` back where tokens were kept, blended at the seams
                (:func:`far.editing.blend_kept`), instead of decoding those tokens.
            callback: called after each AR step of each 64 versions.
            output: as in :meth:`generate`.
            sampling: as in :meth:`generate`; ``ar_steps`` is by default the model's, scaled to the fraction
                of redrawn tokens.

        Raises:
            InputError: image or mask has another size or range, the mask touches no token or every token, the
                class is unknown, a value is out of range, or a causal backbone cannot redraw there.
        """
        check_output(output)
        if not (seeds := counted_seeds(seed)):
            raise InputError("seed is empty. Give at least one seed")
        grid = self.model.config.token_grid
        pixels = image_pixels(image, self.image_size)
        redrawn = touched_tokens(mask_pixels(mask, self.image_size), grid)
        if sampling.get("ar_steps") is None:
            fraction = int(redrawn.sum()) / self.model.config.tokens
            sampling["ar_steps"] = max(1, round(self.defaults.ar_steps * fraction))
        config = self.sampling_config(**sampling)
        latents = self.encode(pixels.unsqueeze(0)).expand(len(seeds), -1, -1, -1)
        kept = Kept(latents, (~redrawn).nonzero().flatten())
        images = self.draw([label] * len(seeds), seeds, config, callback=callback, kept=kept)
        return convert_output(blend_kept(images, pixels, redrawn, grid) if paste else images, output)

    def sampling_config(self, **given: Any) -> SamplingConfig:
        """Return the model's default sampling values with those of ``given`` that are not ``None``.

        Raises:
            InputError: :class:`far.SamplingConfig` has no such name, or a value is of another type.
        """
        values = dataclasses.asdict(self.defaults)
        for name, value in given.items():
            if value is not None or name not in values:
                values[name] = plain_value(value)
        return from_dict(SamplingConfig, values, "sampling values")

    def decode(self, latents: Tensor) -> Tensor:
        """Return images ``[b, 3, H, W]`` in [0, 1]; see :meth:`far.tokenizer.Tokenizer.to_images`."""
        return self.require_autoencoder().to_images(latents)

    def encode(self, images: Tensor) -> Tensor:
        """Return latents ``[b, c, h, w]``; see :meth:`far.tokenizer.Tokenizer.to_latents`."""
        return self.require_autoencoder().to_latents(images)

    def save_pretrained(
        self, folder: Path | str, dtype: torch.dtype | str | None = None, *, base: str | None = None
    ) -> None:
        """Write a folder that :func:`far.load` reads, with a model card in ``README.md``.

        A ``README.md`` that somebody wrote is kept.

        Args:
            folder: made if missing.
            dtype: floating point dtype of the written weights; None keeps theirs.
            base: name of a bundled model. Tensors that are equal in it, such as the backbone under another
                head, are not written but taken from there when loading. Such a folder gets no model card.

        Raises:
            InputError: the weights are int8, or ``base`` is not a whole bundled model.
        """
        model, autoencoder, classes = self.model, self.autoencoder, tuple(self.classes)
        config = FolderConfig(model.config, None, classes, self.defaults, self.results, self.training)
        ModelFolder.save(Path(folder), config, model=model, autoencoder=autoencoder, dtype=dtype, base=base)

    def push_to_hub(
        self,
        name: str,
        *,
        license: str,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a model of far",
        dtype: torch.dtype | str | None = None,
        token: str | None = None,
    ) -> str:
        """Publish what :meth:`save_pretrained` writes, in one commit, and return the repository's address.

        Args:
            name: ``OWNER/NAME``, or ``OWNER/NAME@BRANCH``. A missing repository is created.
            license: license of the weights, as the hub abbreviates it (``"mit"``, ``"cc-by-nc-4.0"``,
                ``"other"``). It depends on the training images, so the publisher must choose it.
            private: visibility of a new repository; ``None`` is the owner's default, usually public.
            revision: a branch, created if missing; ``None`` is the one in the name, else main.
            commit_message: the commit's first line.
            dtype: dtype of the published weights; ``None`` keeps theirs.
            token: an access token; ``None`` takes that of ``hf auth login`` or HF_TOKEN.

        Raises:
            InputError: weights are int8, the hub cannot be reached, or it refuses the license or the user.
        """
        with tempfile.TemporaryDirectory() as temporary:
            self.save_pretrained(temporary, dtype)
            return ModelFolder.open(Path(temporary)).push(
                name, license=license, private=private, revision=revision, message=commit_message, token=token
            )

    @classmethod
    def from_pretrained(
        cls,
        name: Path | str,
        *,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "auto",
        revision: str | None = None,
        local_files_only: bool = False,
        record: bool = True,
        compile: bool = False,
        decoder: DecoderName = "full",
    ) -> "Pipeline":
        """Load a folder, a bundled model, or a model of the hub.

        Args:
            name: a folder that :meth:`save_pretrained` wrote, the name of a bundled model, or
                ``OWNER/NAME[@REVISION]`` of the hub, tried in this order. A ``Path`` is always a folder.
            dtype: dtype of the generator's weights: float32, bfloat16, float16, int8 (an approximation for
                CPUs), or auto: bfloat16 if the device multiplies it faster, else float32. The autoencoder
                is bfloat16 beside bfloat16, or beside int8 on such a device, else float32.
            device: such as ``"cpu"``, ``"cuda:1"`` or a ``torch.device``; ``"auto"`` takes a GPU if there is
                one, see :func:`far.devices.resolve_device`.
            revision: a branch, tag or commit on the hub; ``None`` is the one in the name, else main.
            local_files_only: take a model of the hub from the local cache alone, as HF_HUB_OFFLINE=1 does.
            record: on CUDA, record generations and replay them as graphs, from the second one of a shape on.
            compile: compile the model's blocks when they first run; see :mod:`far.compiling`.
            decoder: ``"small"`` decodes with the autoencoder's small decoder, if it has one.

        Raises:
            InputError: the folder, name, revision, device, dtype or decoder does not exist, the hub cannot be
                reached, there is no generator, or files are damaged (the first wrong tensor or key is named).
        """
        device = resolve_device(device)  # refused before anything is read, and so is the dtype
        dtype = resolve_dtype(dtype, device)
        folder = ModelFolder.open(name, revision=revision, local_files_only=local_files_only)
        config = folder.config
        model = prepare(folder.load_model(), dtype, device)
        if compile:
            compile_blocks(model)
        autoencoder = folder.optional_autoencoder(decoder)
        if autoencoder is not None:
            autoencoder = prepare_autoencoder(autoencoder, dtype, device)
        facts = config.classes, config.defaults, config.results, config.training
        return cls(model, autoencoder, *facts, record=record)


def load(
    name: Path | str,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    record: bool = True,
    compile: bool = False,
    decoder: DecoderName = "full",
) -> Pipeline:
    """Load a folder, a bundled model, or a model of the hub, as :meth:`Pipeline.from_pretrained` does."""
    return Pipeline.from_pretrained(
        name, dtype=dtype, device=device, revision=revision, local_files_only=local_files_only,
        record=record, compile=compile, decoder=decoder,
    )  # fmt: skip
