"""``Pipeline``: class labels in, images out. The sampling loop is in ``far.sampling``, the saved folder in ``far.folder``."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from far.autoencoder import Autoencoder
from far.classes import class_number
from far.config import check_count, check_seed, from_dict, listed, whole_number
from far.devices import resolve_device
from far.editing import image_pixels, mask_pixels, paste_kept, touched_tokens
from far.errors import InputError
from far.folder import ModelFolder
from far.folder_config import FolderConfig
from far.model import FAR
from far.packing import has_int8, parameter_count, unpack_linear_layers
from far.pictures import check_finite, to_pictures, to_uint8
from far.precision import prepare, prepare_autoencoder, resolve_dtype
from far.sampling import Kept, Progress, SamplingConfig, SeededNoise, sampling_steps

Callback: TypeAlias = Callable[[Progress], None] | None
Images: TypeAlias = list[Image.Image] | Tensor | np.ndarray
_OUTPUTS = ("pil", "tensor", "np")
# On a CPU, few images at a time with channels last stay in the caches: twice as fast at 64 × 64 pixels.
_CPU_DECODE_CHUNK = 16


class Pipeline:
    """A generator, its autoencoder, the class names and the default sampling values.

    ``results`` (figures) and ``training`` (facts) stay with the weights, in ``config.json`` and the model card.

    Examples:
        >>> import far
        >>> pictures = far.load("avatars-64").generate(labels=["planets", 5], guidance=2.0, seed=0)
    """

    def __init__(
        self,
        model: FAR,
        autoencoder: Autoencoder | None,
        classes: Sequence[str],
        defaults: SamplingConfig,
        results: dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.autoencoder = model.eval(), autoencoder
        self.classes, self.defaults = list(classes), defaults
        self.results, self.training = results or {}, training or {}

    def __repr__(self) -> str:
        network, (rows, columns) = self.model.config.network, self.model.config.grid
        stride = None if self.autoencoder is None else self.autoencoder.config.stride
        size = "no autoencoder" if stride is None else f"{columns * stride}×{rows * stride} pixels"
        return (
            f"Pipeline({network.backbone.kind} backbone, {network.head.kind} head, {len(self.classes)} classes, {size}, "
            f"{parameter_count(self.model):,} parameters, {self.dtype}, {self.device})"
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> str:
        """The dtype of the generator's weights, such as ``"bfloat16"`` or ``"int8"``."""
        return (
            "int8"
            if has_int8(self.model)
            else str(next(self.model.parameters()).dtype).removeprefix("torch.")
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels.

        Raises:
            InputError: the pipeline has no autoencoder.
        """
        stride = self._autoencoder().config.stride
        rows, columns = self.model.config.grid
        return rows * stride, columns * stride

    def _autoencoder(self) -> Autoencoder:
        if self.autoencoder is None:
            raise InputError(
                "this model has no autoencoder. Add one with: far convert kl16 KL16.ckpt ITS_FOLDER"
            )
        return self.autoencoder

    def to(self, device: str | torch.device | None = None, dtype: str | None = None) -> "Pipeline":
        """Move the pipeline to a device and a dtype, in place, and return it.

        A lower precision is not undone by a higher one: load the model again for its original weights.

        Args:
            device: as in :meth:`from_pretrained`; None keeps it.
            dtype: as in :meth:`from_pretrained`; None keeps it.

        Raises:
            InputError: there is no such device or dtype here, or int8 weights would have to be converted back.
        """
        device = self.device if device is None else resolve_device(device)
        dtype = self.dtype if dtype is None else resolve_dtype(dtype, device)
        if self.dtype == "int8" and (dtype, device) != ("int8", self.device):
            raise InputError(
                f"int8 weights cannot be converted to {dtype} on {device}. Load the model again with far.load."
            )
        if self.dtype != "int8":
            unpack_linear_layers(self.model)
            prepare(self.model, dtype, device)
        if self.autoencoder is not None:
            prepare_autoencoder(self.autoencoder, dtype, device)
        return self

    def label(self, name: int | str) -> int:
        """Return the number of a class from its number or name; see :func:`far.classes.class_number`.

        Raises:
            InputError: there is no such class, or a text is the name of one class and the number of another.
        """
        return class_number(self.classes, name)

    @overload
    def generate(
        self, labels: Sequence[int | str], *, seed: int | Sequence[int] = 0, batch_size: int = 64,
        output: Literal["pil"] = "pil", callback: Callback = None, **sampling: Any,
    ) -> list[Image.Image]: ...  # fmt: skip
    @overload
    def generate(
        self, labels: Sequence[int | str], *, seed: int | Sequence[int] = 0, batch_size: int = 64,
        output: Literal["tensor"], callback: Callback = None, **sampling: Any,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def generate(
        self, labels: Sequence[int | str], *, seed: int | Sequence[int] = 0, batch_size: int = 64,
        output: Literal["np"], callback: Callback = None, **sampling: Any,
    ) -> np.ndarray: ...  # fmt: skip
    def generate(
        self,
        labels: Sequence[int | str],
        *,
        seed: int | Sequence[int] = 0,
        batch_size: int = 64,
        output: Literal["pil", "tensor", "np"] = "pil",
        callback: Callback = None,
        **sampling: Any,
    ) -> Images:
        """Draw one image per label.

        Args:
            labels: class numbers or names.
            seed: the seed of the first image, counting up for the next ones; or one seed per image. An image
                depends on its seed and label only, not on the others in its batch.
            batch_size: images drawn together.
            output: ``"pil"`` for a list of pictures, ``"tensor"`` for ``[n, 3, h, w]`` in [0, 1], ``"np"`` for
                ``[n, h, w, 3]`` uint8.
            callback: called after each AR step of each batch.
            sampling: values of :class:`far.SamplingConfig` by name, such as ``guidance=2.0``; ``None`` takes the
                model's default.

        Raises:
            InputError: an unknown class, an unknown name, or a value out of range.
        """
        _check_output(output)
        labels = listed("labels", labels)
        seeds = _seeds(seed, len(labels))
        config = self.sampling_config(**sampling)
        return _as_output(self.draw(labels, seeds, config, batch_size=batch_size, callback=callback), output)

    def draw(
        self,
        labels: Sequence[int | str],
        seeds: Sequence[int],
        config: SamplingConfig | None = None,
        *,
        batch_size: int = 64,
        callback: Callback = None,
    ) -> Tensor:
        """Draw ``[n, 3, h, w]`` in [0, 1] as :meth:`generate` does, from one seed per label and a whole config."""
        check_count("batch_size", whole_number("batch_size", batch_size), 2**40)
        numbers, seeds = self._numbers(labels, seeds)
        parts = []
        for start in range(0, len(numbers), batch_size):
            chunk = slice(start, start + batch_size)
            for progress in self.stream(numbers[chunk], seeds[chunk], config):
                if callback is not None:
                    callback(progress)
            parts.append(self.decode(progress.latents))
        return torch.cat(parts)

    def stream(
        self,
        labels: Sequence[int | str],
        seeds: Sequence[int],
        config: SamplingConfig | None = None,
        *,
        kept: Kept | None = None,
    ) -> Iterator[Progress]:
        """Draw one batch, one AR step at a time; :meth:`preview` shows a step, :meth:`decode` the last latents.

        Args:
            labels: class numbers or names, one per image.
            seeds: one per image.
            config: ``None`` takes the model's default.
            kept: tokens that are given, not drawn.

        Raises:
            InputError: an unknown class, or a value out of range; raised by the call itself, before any step.
        """
        numbers, seeds = self._numbers(labels, seeds)
        noise = SeededNoise(seeds, self.device)
        return sampling_steps(
            self.model, torch.tensor(numbers, device=self.device), noise, config or self.defaults, kept=kept
        )

    def _numbers(self, labels: Sequence[int | str], seeds: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return class numbers and seeds, after checking that there are as many of both, and at least one."""
        numbers, seeds = [self.label(name) for name in listed("labels", labels)], _seeds(seeds, 1)
        if not numbers:
            raise InputError("labels is empty. Give at least one class.")
        if len(seeds) != len(numbers):
            raise InputError(
                f"{len(seeds)} seeds for {len(numbers)} labels. Give one seed, or one per label."
            )
        for seed in (min(seeds), max(seeds)):
            check_seed("seed", seed)
        return numbers, seeds

    def preview(self, progress: Progress) -> Tensor:
        """Return the images so far, ``[b, 3, H, W]`` in [0, 1], mid-gray at unknown tokens."""
        images = self.decode(progress.latents)
        mask = progress.known.view(-1, 1, *self.model.config.token_grid).float()
        mask = F.interpolate(mask, size=images.shape[-2:], mode="nearest")
        return images * mask + 0.5 * (1 - mask)

    @overload
    def edit(
        self, image: Image.Image | Tensor | np.ndarray, mask: Image.Image | Tensor | np.ndarray, label: int | str, *,
        seed: int | Sequence[int] = 0, paste: bool = True,
        output: Literal["pil"] = "pil", callback: Callback = None, **sampling: Any,
    ) -> list[Image.Image]: ...  # fmt: skip
    @overload
    def edit(
        self, image: Image.Image | Tensor | np.ndarray, mask: Image.Image | Tensor | np.ndarray, label: int | str, *,
        seed: int | Sequence[int] = 0, paste: bool = True,
        output: Literal["tensor"], callback: Callback = None, **sampling: Any,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def edit(
        self, image: Image.Image | Tensor | np.ndarray, mask: Image.Image | Tensor | np.ndarray, label: int | str, *,
        seed: int | Sequence[int] = 0, paste: bool = True,
        output: Literal["np"], callback: Callback = None, **sampling: Any,
    ) -> np.ndarray: ...  # fmt: skip
    def edit(
        self,
        image: Image.Image | Tensor | np.ndarray,
        mask: Image.Image | Tensor | np.ndarray,
        label: int | str,
        *,
        seed: int | Sequence[int] = 0,
        paste: bool = True,
        output: Literal["pil", "tensor", "np"] = "pil",
        callback: Callback = None,
        **sampling: Any,
    ) -> Images:
        """Redraw a part of an image: inside it (inpainting), around it (outpainting), or as another class.

        Tokens that the mask does not touch stay exactly as the autoencoder encodes them. Touched tokens are drawn
        again as wholes, given the others. A causal backbone can only redraw from one token to the end.

        Args:
            image: of the model's size (:attr:`image_size`): a picture, 8-bit pixels ``[H, W, 3]``, or floats
                ``[3, H, W]`` in [0, 1].
            mask: of the same size: a picture, white where to redraw, or ``[H, W]``, above 0.5 where to redraw.
                Transparent parts are kept.
            label: the class to draw, number or name.
            seed: one seed, or several for as many versions.
            paste: put the pixels of ``image`` back where tokens were kept, instead of decoding those tokens.
            output: ``"pil"`` for a list of pictures, ``"tensor"`` for ``[n, 3, H, W]`` in [0, 1], ``"np"`` for
                ``[n, H, W, 3]`` uint8.
            callback: called after each AR step.
            sampling: values of :class:`far.SamplingConfig` by name. The default of ``ar_steps`` is the model's,
                scaled to the fraction of redrawn tokens.

        Raises:
            InputError: image or mask has another size, the image is not within [0, 1], the mask touches no token
                or every token, the class is unknown, a value is out of range, or a causal backbone cannot redraw
                there.
        """
        _check_output(output)
        seeds = _seeds(seed, 1)
        if not seeds:
            raise InputError("seed is empty. Give one seed, or one per version.")
        grid = self.model.config.token_grid
        pixels = image_pixels(image, self.image_size)
        redrawn = touched_tokens(mask_pixels(mask, self.image_size), grid)
        if sampling.get("ar_steps") is None:
            fraction = int(redrawn.sum()) / self.model.config.tokens
            sampling["ar_steps"] = max(1, round(self.defaults.ar_steps * fraction))
        config = self.sampling_config(**sampling)
        latents = self.encode(pixels.unsqueeze(0)).expand(len(seeds), -1, -1, -1)
        kept = Kept(latents, (~redrawn).nonzero().flatten())
        for progress in self.stream([label] * len(seeds), seeds, config, kept=kept):
            if callback is not None:
                callback(progress)
        images = self.decode(progress.latents)
        return _as_output(paste_kept(images, pixels, redrawn, grid) if paste else images, output)

    def sampling_config(self, **given: Any) -> SamplingConfig:
        """Return the model's default sampling values with those of ``given`` that are not ``None``.

        Raises:
            InputError: :class:`far.SamplingConfig` has no such name, or a value is of another type.
        """
        values = {
            field.name: getattr(self.defaults, field.name) for field in dataclasses.fields(self.defaults)
        }
        values |= {
            name: _plain(value) for name, value in given.items() if value is not None or name not in values
        }
        return from_dict(SamplingConfig, values, "sampling values")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images ``[b, 3, H, W]`` in [0, 1] from unit-variance latents ``[b, c, h, w]``.

        Raises:
            InputError: the pipeline has no autoencoder, or (:class:`far.errors.NotFiniteError`) an image has
                values that are not finite.
        """
        autoencoder = self._autoencoder()
        latents = autoencoder.denormalize(latents.to(next(autoencoder.parameters()).dtype))
        chunk = _CPU_DECODE_CHUNK if latents.device.type == "cpu" else len(latents)
        parts = [
            autoencoder.decode(part.contiguous(memory_format=torch.channels_last)).float() / 2 + 0.5
            for part in latents.split(chunk)
        ]
        # All images leave a model here, so NaN is found here: a picture would show it as black.
        return check_finite(torch.cat(parts)).clamp(0, 1).contiguous()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return unit-variance latents ``[b, c, h, w]``, the means of the posteriors, from images in [0, 1].

        Args:
            images: ``[b, 3, H, W]``.

        Raises:
            InputError: the pipeline has no autoencoder, or H or W is not a multiple of its stride.
        """
        autoencoder = self._autoencoder()
        weight = next(autoencoder.parameters())
        images = (images * 2 - 1).to(weight.device, weight.dtype, memory_format=torch.channels_last)
        return autoencoder.normalize(autoencoder.encode(images).mean.float())

    def save_pretrained(
        self, folder: Path | str, dtype: torch.dtype | None = None, *, base: str | None = None
    ) -> None:
        """Write a folder that :func:`far.load` reads, with a model card in ``README.md``.

        The card lists classes, sizes, sampling values, results and, for models trained here, data and recipe. A
        ``README.md`` that somebody wrote is kept.

        Args:
            folder: made if missing.
            dtype: dtype of the written weights; None keeps theirs.
            base: name of a bundled model. Tensors that are equal in it, such as the backbone under another head,
                are not written but taken from there when loading. Such a folder gets no model card.

        Raises:
            InputError: the weights are int8, which cannot be converted back, or no whole model ``base`` is bundled.
        """
        config = FolderConfig(
            model=self.model.config, classes=tuple(self.classes), defaults=self.defaults, results=self.results,
            training=self.training,
        )  # fmt: skip
        ModelFolder.save(
            Path(folder), config, model=self.model, autoencoder=self.autoencoder, dtype=dtype, base=base
        )

    def push_to_hub(
        self,
        name: str,
        *,
        license: str,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a model of far",
        dtype: torch.dtype | None = None,
        token: str | None = None,
    ) -> str:
        """Publish what :meth:`save_pretrained` writes, in one commit, and return the repository's address.

        Args:
            name: ``OWNER/NAME``, or ``OWNER/NAME@BRANCH``. A missing repository is created.
            license: license of the weights, as the hub abbreviates it (``"mit"``, ``"cc-by-nc-4.0"``, ``"other"``).
                It depends on the training images, so only the publisher knows it.
            private: visibility of a new repository; ``None`` is the owner's default, usually public.
            revision: a branch, created if missing; ``None`` is the one in the name, else main.
            commit_message: the commit's first line.
            dtype: dtype of the published weights; ``None`` keeps theirs.
            token: an access token; ``None`` takes that of ``hf auth login`` or HF_TOKEN.

        Raises:
            InputError: the weights are int8, nobody is logged in, writing there is not allowed, the hub cannot be
                reached, or it refuses the license.
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
        dtype: str = "float32",
        device: str | torch.device = "auto",
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> "Pipeline":
        """Load a folder, a bundled model, or a model of the hub.

        Args:
            name: a folder that :meth:`save_pretrained` wrote, the name of a bundled model, or ``OWNER/NAME`` or
                ``OWNER/NAME@REVISION`` of the hub, tried in this order. A :class:`~pathlib.Path` is always a folder.
            dtype: dtype of the generator's weights: float32, bfloat16, float16, int8 (an approximation for CPUs), or
                auto: bfloat16 if the device has instructions for it, else float32. Beside bfloat16 and int8, the
                autoencoder is bfloat16 if the device has instructions for it; otherwise it is float32.
            device: such as ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or a ``torch.device``; ``"auto"`` takes a GPU if there
                is one, see :func:`far.devices.resolve_device`.
            revision: a branch, tag or commit on the hub; ``None`` is the one in the name, else the main branch.
            local_files_only: take a model of the hub from the local cache alone, as HF_HUB_OFFLINE=1 does.

        Raises:
            InputError: there is no such folder, name, revision, device or dtype, the hub cannot be reached, the
                folder holds an autoencoder alone, or the files are damaged or do not fit together. The message
                names the file and the first tensor or key that differs.
        """
        device = resolve_device(device)  # refused before anything is read, and so is the dtype
        dtype = resolve_dtype(dtype, device)
        folder = ModelFolder.open(name, revision=revision, local_files_only=local_files_only)
        config = folder.config
        model = prepare(folder.load_model(), dtype, device)
        autoencoder = (
            prepare_autoencoder(folder.load_autoencoder(), dtype, device) if folder.has_autoencoder else None
        )
        return cls(model, autoencoder, config.classes, config.defaults, config.results, config.training)


load = Pipeline.from_pretrained


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """Return the given seeds; or from one seed, ``count`` that count up."""
    if isinstance(seed, Iterable) and not isinstance(seed, str | bytes) and getattr(seed, "ndim", None) != 0:
        return [whole_number("seed", one) for one in seed]
    return [whole_number("seed", seed) + index for index in range(count)]


def _plain(value: Any) -> Any:
    """Return a number of numpy, or in a tensor, as Python's own; anything else as it is."""
    return value.item() if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0 else value


def _check_output(output: str) -> None:
    if output not in _OUTPUTS:
        raise InputError(f"output {output!r} does not exist. Choose one of {', '.join(_OUTPUTS)}.")


def _as_output(images: Tensor, output: str) -> Images:
    if output == "pil":
        return to_pictures(images)
    return to_uint8(images) if output == "np" else images
