"""``Pipeline``: class labels in, images out; and the folder that a pipeline is saved in.

A folder holds ``config.json``, ``model.safetensors``, ``autoencoder.safetensors`` and a model card. The loop itself
is in ``far.sampling``.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from far.autoencoder import Autoencoder
from far.card import write_card
from far.classes import class_number
from far.config import check_count, check_seed, from_dict, listed, to_dict, whole_number
from far.devices import resolve_device, resolve_training_dtype
from far.editing import paste_kept, touched_tokens
from far.errors import InputError
from far.files import is_plain, read_json, write_json
from far.hub import upload
from far.kernels import no_int8
from far.model import FAR, ModelConfig
from far.packing import Int8Linear, pack_linear_layers, quantize_linear_layers
from far.pictures import check_finite, to_pictures, to_tensor
from far.precision import DTYPES
from far.sampling import Kept, Progress, SamplingConfig, SeededNoise, sampling_steps
from far.weights import (
    BUNDLED,
    changed_tensors,
    describe_base,
    find_base,
    find_folder,
    load_autoencoder,
    load_module,
    save_tensors,
)

# On a CPU, few images at a time and channels last stay in the caches: twice as fast at 64 × 64 pixels.
_CPU_DECODE_CHUNK = 16
# Of "int8" models, all but the wide linear layers.
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.float32,
}


class Pipeline:
    """A generator, its autoencoder, the class names and the default sampling values.

    ``results`` are figures and ``training`` facts that stay with the weights, in ``config.json`` and the model card.

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
        self.classes, self.defaults, self.results, self.training = (
            list(classes),
            defaults,
            results or {},
            training or {},
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

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
                "this model has no autoencoder; add one with: far convert kl16 KL16.ckpt THE_SAME_FOLDER"
            )
        return self.autoencoder

    def label(self, name: int | str) -> int:
        """Return the number of a class from its number or name; see :func:`far.classes.class_number`.

        Raises:
            InputError: no such class, or a text that is the name of one class and the number of another.
        """
        return class_number(self.classes, name)

    def generate(
        self,
        labels: Sequence[int | str],
        *,
        seed: int | Sequence[int] = 0,
        guidance: float | None = None,
        ar_steps: int | None = None,
        head_steps: int | tuple[int, ...] | None = None,
        temperature: float | None = None,
        guidance_schedule: Literal["linear", "constant"] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        order: Literal["random", "halton"] | None = None,
        refresh_every: int | None = None,
        guidance_every: int | None = None,
        guidance_passes: int | None = None,
        batch_size: int = 64,
        output: Literal["pil", "tensor"] = "pil",
        callback: Callable[[Progress], None] | None = None,
    ) -> list[Image.Image] | Tensor:
        """Draw one image a label.

        Args:
            labels: class numbers or names.
            seed: of the first image, the next ones counting up; or one seed an image. An image depends
                on its seed and label only, not on the others.
            guidance: this and the next nine are those of :class:`far.sampling.SamplingConfig`; ``None`` takes the model's default.
            ar_steps: autoregressive steps.
            head_steps: steps of the head; or the first and the last AR step's.
            temperature: factor of the head's noise.
            guidance_schedule: over the known tokens.
            guidance_interval: shares of known tokens with guidance.
            order: of positions.
            refresh_every: AR steps between passes over all positions.
            guidance_every: AR steps between passes without the class.
            guidance_passes: of the backbone.
            batch_size: images drawn together.
            output: ``"pil"`` for pictures, ``"tensor"`` for ``[n, 3, h, w]`` in [0, 1].
            callback: called after each AR step of each batch.

        Raises:
            InputError: an unknown class, or a value out of range.
        """
        check_output(output)
        labels = listed("labels", labels)
        seeds = _seeds(seed, len(labels))
        config = self.sampling_config(
            guidance=guidance, ar_steps=ar_steps, head_steps=head_steps, temperature=temperature,
            guidance_schedule=guidance_schedule, guidance_interval=guidance_interval, order=order, refresh_every=refresh_every,
            guidance_every=guidance_every, guidance_passes=guidance_passes,
        )  # fmt: skip
        images = self.draw(labels, seeds, config, batch_size=batch_size, callback=callback)
        return images if output == "tensor" else to_pictures(images)

    def draw(
        self,
        labels: Sequence[int | str],
        seeds: Sequence[int],
        config: SamplingConfig | None = None,
        *,
        batch_size: int = 64,
        callback: Callable[[Progress], None] | None = None,
    ) -> Tensor:
        """What :meth:`generate` does, with one seed a label and a whole config: ``[n, 3, h, w]`` in [0, 1]."""
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
        """Draw one batch an AR step at a time; :meth:`preview` shows each step, :meth:`decode` the last one's latents.

        Args:
            labels: class numbers or names, one an image.
            seeds: one an image.
            config: ``None`` takes the model's default.
            kept: tokens that are given, not drawn.

        Raises:
            InputError: an unknown class, or a value out of range; by the call itself, before any step.
        """
        numbers, seeds = self._numbers(labels, seeds)
        noise = SeededNoise(seeds, self.device)
        return sampling_steps(
            self.model, torch.tensor(numbers, device=self.device), noise, config or self.defaults, kept=kept
        )

    def _numbers(self, labels: Sequence[int | str], seeds: Sequence[int]) -> tuple[list[int], list[int]]:
        """Class numbers and seeds; an :class:`InputError` if there are none, or not one good seed each."""
        numbers, seeds = [self.label(name) for name in listed("labels", labels)], _seeds(seeds, 1)
        if not numbers:
            raise InputError("no labels were given; give at least one class")
        if len(seeds) != len(numbers):
            raise InputError(f"{len(seeds)} seeds for {len(numbers)} labels; give one seed, or one a label")
        for seed in (min(seeds), max(seeds)):
            check_seed("seed", seed)
        return numbers, seeds

    def preview(self, progress: Progress) -> Tensor:
        """Images so far ``[b, 3, H, W]`` in [0, 1], mid-grey where no token is known yet."""
        images = self.decode(progress.latents)
        mask = progress.known.view(-1, 1, *self.model.config.token_grid).float()
        mask = F.interpolate(mask, size=images.shape[-2:], mode="nearest")
        return images * mask + 0.5 * (1 - mask)

    def edit(
        self,
        image: Image.Image | Tensor,
        mask: Image.Image | Tensor,
        label: int | str,
        *,
        seed: int | Sequence[int] = 0,
        paste: bool = True,
        output: Literal["pil", "tensor"] = "pil",
        callback: Callable[[Progress], None] | None = None,
        **sampling: Any,
    ) -> list[Image.Image] | Tensor:
        """Redraw a part of an image: in it (inpainting), around it (outpainting), or as another class.

        The tokens that the mask does not touch stay exactly as the autoencoder encodes them, and those that it touches
        are drawn anew as wholes, given the kept ones. A causal backbone can redraw from one token to the end only.

        Args:
            image: of the model's size (:attr:`image_size`): a picture, 8-bit pixels ``[H, W, 3]`` of numpy, or ``[3, H, W]``
                in [0, 1].
            mask: of the same size; white, or above 0.5 of a tensor or array ``[H, W]``, where the image is to be redrawn, not
                where it is transparent.
            label: the class, number or name, of what is drawn.
            seed: one seed; or several, for as many versions.
            paste: put the pixels of ``image`` back where tokens were kept; else these are decoded from the tokens.
            output: ``"pil"`` for pictures, ``"tensor"`` for ``[n, 3, H, W]`` in [0, 1].
            callback: called after each AR step.
            sampling: values of :class:`far.sampling.SamplingConfig`, such as ``guidance``. Without ``ar_steps``, these are the
                default's share of redrawn tokens.

        Raises:
            InputError: the image or the mask has another size, the image is not within [0, 1], the mask marks nothing or touches
                every token, the class is unknown, a value is out of range, or a causal backbone cannot redraw there.
        """
        check_output(output)
        seeds = _seeds(seed, 1)
        if not seeds:
            raise InputError("no seeds were given; give one, or one a version")
        image, mask = self._checked_image(image), self._checked_mask(mask)
        redrawn = touched_tokens(mask, self.model.config.token_grid)
        config = self._edit_config(int(redrawn.sum()), sampling)
        latents = self.encode(image.unsqueeze(0)).expand(len(seeds), -1, -1, -1)
        for progress in self.stream(
            [label] * len(seeds), seeds, config, kept=Kept(latents, (~redrawn).nonzero().flatten())
        ):
            if callback is not None:
                callback(progress)
        images = self.decode(progress.latents)
        if paste:
            images = paste_kept(images, image, redrawn, self.model.config.token_grid)
        return images if output == "tensor" else to_pictures(images)

    def _checked_image(self, image: Image.Image | Tensor) -> Tensor:
        tensor = _pixels("image", image, "white")
        if tensor.shape != (3, *self.image_size):
            raise InputError(
                f"image of shape {list(tensor.shape)}: this model's are {[3, *self.image_size]}; crop or resize it"
            )
        low, high = tensor.float().aminmax()  # NaN if any value is
        if not (tensor.is_floating_point() and low >= 0 and high <= 1):
            raise InputError(
                f"image of {tensor.dtype} from {low:g} to {high:g}: give floats within 0 … 1, as bytes / 255"
            )
        return tensor

    def _checked_mask(self, mask: Image.Image | Tensor) -> Tensor:
        tensor = _pixels("mask", mask, "black")
        if tensor.dim() == 3 and not isinstance(mask, Tensor):
            # Of a picture, or an array with an axis for channels.
            tensor = tensor[..., 0] if tensor.shape[-1] == 1 else tensor.float().mean(dim=0)
        if tensor.shape != self.image_size:
            raise InputError(
                f"mask of shape {list(tensor.shape)}: it must be the image's, {list(self.image_size)}"
            )
        if not tensor.isfinite().all():
            raise InputError(
                "mask holds values that are not finite numbers; give 1 where to redraw, and 0 elsewhere"
            )
        return tensor > 0.5

    def _edit_config(self, tokens: int, sampling: dict[str, Any]) -> SamplingConfig:
        """The sampling of an edit that redraws so many tokens."""
        steps = round(self.defaults.ar_steps * tokens / self.model.config.tokens)
        return self.sampling_config(
            **{"ar_steps": max(1, steps), **{k: v for k, v in sampling.items() if v is not None}}
        )

    def sampling_config(self, **given: Any) -> SamplingConfig:
        """The model's default sampling values with those of ``given`` that are not ``None``.

        Raises:
            InputError: a name that :class:`far.sampling.SamplingConfig` does not have, or a value of another type.
        """
        values = {
            field.name: getattr(self.defaults, field.name) for field in dataclasses.fields(self.defaults)
        }
        values |= {name: _plain(value) for name, value in given.items() if value is not None}
        return from_dict(SamplingConfig, values, "sampling values")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[b, 3, H, W]`` in [0, 1] from latents of deviation 1.

        Raises:
            InputError: the pipeline has no autoencoder, or (:class:`far.errors.NotFiniteError`) an image has values that are
                not finite.
        """
        autoencoder = self._autoencoder()
        latents = autoencoder.denormalize(latents.to(next(autoencoder.parameters()).dtype))
        chunk = _CPU_DECODE_CHUNK if latents.device.type == "cpu" else len(latents)
        parts = [
            autoencoder.decode(part.contiguous(memory_format=torch.channels_last)).float() / 2 + 0.5
            for part in latents.split(chunk)
        ]
        # The one place where images leave a model, so the one where NaN has to be found: a picture would show it as black.
        return check_finite(torch.cat(parts)).clamp(0, 1).contiguous()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents ``[b, c, h, w]`` of deviation 1 from images ``[b, 3, H, W]`` in [0, 1]: the mean of each posterior.

        Raises:
            InputError: the pipeline has no autoencoder, or H or W is no multiple of its stride.
        """
        autoencoder = self._autoencoder()
        weight = next(autoencoder.parameters())
        images = (images * 2 - 1).to(weight.device, weight.dtype, memory_format=torch.channels_last)
        return autoencoder.normalize(autoencoder.encode(images).mean.float())

    def save_pretrained(
        self, folder: Path | str, dtype: torch.dtype | None = None, *, base: str | None = None
    ) -> None:
        """Write the folder; weights as ``dtype`` where given. ``config.json`` is written after them.

        ``README.md`` is the model card of what is known: classes, sizes, sampling values, results and, of models trained
        here, data and recipe. One that somebody wrote or changed is kept as it is.

        Args:
            base: the name of a bundled model. What is equal in it, such as the backbone under another head, is not written again
                but taken from there in loading; there is no model card then.

        Raises:
            InputError: the weights are 8-bit integers, of which there is no way back; or no whole model ``base`` is bundled.
        """
        folder = Path(folder)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InputError(f"dtype {dtype!r}: give a floating point dtype of torch, such as torch.float16")
        if any(isinstance(module, Int8Linear) for module in self.model.modules()):
            raise InputError(
                f"{folder}: int8 weights are for running only; load the model in another dtype to save it"
            )
        tensors, autoencoder, described = self.model.state_dict(), self.autoencoder, {}
        if base is not None:
            described = {"base": describe_base(base)}
            other = Pipeline.from_pretrained(BUNDLED / base, device="cpu")
            tensors = changed_tensors(self.model, other.model)
            if (
                autoencoder is not None
                and other.autoencoder is not None
                and not changed_tensors(autoencoder, other.autoencoder)
            ):
                autoencoder = None
        save_tensors(folder / "model.safetensors", tensors, dtype)
        config: dict[str, Any] = {
            "format": 1,
            **described,
            "model": to_dict(self.model.config),
            "classes": self.classes,
            "defaults": to_dict(self.defaults),
            "results": self.results,
            "training": self.training,
        }
        if autoencoder is not None:
            save_tensors(folder / "autoencoder.safetensors", autoencoder.state_dict(), dtype)
            config["autoencoder"] = to_dict(autoencoder.config)
        write_json(folder / "config.json", config)
        if base is None:
            write_card(folder)

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
            name: ``OWNER/NAME``, or ``OWNER/NAME@BRANCH``; made where missing.
            license: of the weights, as the hub abbreviates it (``"mit"``, ``"cc-by-nc-4.0"``, ``"other"`` …). Only who
                publishes knows it: it depends on the training images.
            private: of a new repository; ``None`` is the owner's default, usually public.
            revision: a branch, made where missing; ``None`` is the one in the name, else main.
            commit_message: the commit's first line.
            dtype: of the published weights; ``None`` keeps theirs.
            token: instead of the one of ``hf auth login`` or HF_TOKEN.

        Raises:
            InputError: int8 weights; nobody is logged in, or not one who may write there; the hub cannot be reached, or
                refuses the licence.
        """
        with tempfile.TemporaryDirectory() as temporary:
            self.save_pretrained(temporary, dtype)
            write_card(Path(temporary), name, license)
            return upload(
                Path(temporary), name, revision, private=private, message=commit_message, token=token
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
                ``OWNER/NAME@REVISION`` of the hub, in this order. A :class:`~pathlib.Path` is a folder, never a name.
            dtype: of the generator's weights: float32; bfloat16; float16; int8, an approximation for CPUs; or auto, which is
                bfloat16 where the device has the instructions and else float32. The autoencoder is bfloat16 with bfloat16 and
                with int8 where the device has the instructions, and float32 otherwise.
            device: such as ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or a ``torch.device``; ``"auto"`` takes a GPU if there is one, see
                :func:`far.devices.resolve_device`.
            revision: a branch, tag or commit on the hub; ``None`` is the one in the name, else the main branch.
            local_files_only: take a model of the hub from the local cache alone, as HF_HUB_OFFLINE=1 does.

        Raises:
            InputError: no such folder, name or revision, no such device or dtype here, the hub cannot be reached, or the files
                are damaged or do not fit together (the file is named, and the first tensor or key that differs).
        """
        device = resolve_device(device)  # refused before anything is read, and so is the dtype
        dtype = resolve_dtype(dtype, device)
        folder = find_folder(name, revision=revision, local_files_only=local_files_only)
        source = str(folder / "config.json")
        values = read_json(folder / "config.json")
        if not isinstance(values, dict) or "model" not in values:
            raise InputError(f"{source} describes no generator; give a folder with a 'model' entry")
        config = from_dict(ModelConfig, values["model"], source)
        defaults = from_dict(SamplingConfig, values.get("defaults", {}), source)
        classes = values.get("classes", [])
        if not isinstance(classes, list) or not all(
            isinstance(name, str) and is_plain(name) for name in classes
        ):
            raise InputError(
                f"{source}: classes are {classes!r}, expected a list of names without control characters"
            )
        for key in ("results", "training"):
            if not isinstance(values.get(key, {}), dict):
                raise InputError(f"{source}: {key} is {values[key]!r}, expected keys and values")
        if len(classes) != config.classes:
            raise InputError(
                f"{source} names {len(classes)} classes for a model of {config.classes}; name them all"
            )
        base = find_base(values["base"], source) if "base" in values else None
        weights = base and base / "model.safetensors"
        model = load_module(
            lambda: FAR(config), folder / "model.safetensors", weights, listed=values.get("sha256")
        )
        model = prepare(model, dtype, device)
        has_autoencoder = "autoencoder" in values or base is not None
        autoencoder = (
            prepare_autoencoder(load_autoencoder(folder), dtype, device) if has_autoencoder else None
        )
        return cls(model, autoencoder, classes, defaults, values.get("results"), values.get("training"))


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """The seeds that were given; or of one seed, it and the next ones."""
    if isinstance(seed, Iterable) and not isinstance(seed, str | bytes) and getattr(seed, "ndim", None) != 0:
        return [whole_number("seed", one) for one in seed]
    return [whole_number("seed", seed) + index for index in range(count)]


def _plain(value: Any) -> Any:
    """A number of numpy, or in a tensor, as Python's own; anything else as it is."""
    return value.item() if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0 else value


def _pixels(name: str, given: Any, background: str) -> Tensor:
    """A picture of Pillow, or an array of 8-bit pixels as Pillow makes them, as ``[3, H, W]`` in [0, 1]; a tensor as it is."""
    if (
        isinstance(given, np.ndarray)
        and given.dtype == np.uint8
        and given.ndim == 3
        and given.shape[-1] in (3, 4)
    ):
        given = Image.fromarray(given)
    if isinstance(given, Image.Image):
        return to_tensor(given, background)
    if isinstance(given, np.ndarray):
        try:
            given = torch.from_numpy(given.copy())
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{name} of dtype {given.dtype}: give another, such as uint8 or float32"
            ) from error
    if isinstance(given, Tensor) and not given.is_complex():
        return given
    raise InputError(
        f"{name} is {type(given).__name__}; give a picture of Pillow, an array of numpy or a tensor"
    )


def check_output(output: str) -> None:
    """Raise an :class:`InputError` unless ``output`` is ``"pil"`` or ``"tensor"``."""
    if output not in ("pil", "tensor"):
        raise InputError(f"output {output!r}: choose 'pil' or 'tensor'")


def load(
    name: Path | str,
    *,
    dtype: str = "float32",
    device: str | torch.device = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
) -> Pipeline | Autoencoder:
    """:meth:`Pipeline.from_pretrained`; of a folder that holds an autoencoder alone, that autoencoder."""
    device = resolve_device(device)
    folder = find_folder(name, revision=revision, local_files_only=local_files_only)
    values = read_json(folder / "config.json")
    if isinstance(values, dict) and "autoencoder" in values and "model" not in values:
        if dtype == "int8":
            raise InputError(
                f"dtype int8 is for generators; {folder} holds an autoencoder alone, so take another dtype"
            )
        return load_autoencoder(folder).to(device, _DTYPES[resolve_dtype(dtype, device)])
    return Pipeline.from_pretrained(folder, dtype=dtype, device=device)


def prepare(model: FAR, dtype: str, device: str | torch.device) -> FAR:
    """``model`` as a pipeline runs it, changed in place: on a device, its weights in a dtype, laid out for inference.

    Raises:
        InputError: there is no such dtype, or no such device here.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    model = model.to(device, _DTYPES[dtype])
    if dtype == "int8":
        quantize_linear_layers(model)
    pack_linear_layers(model)
    return model


def prepare_autoencoder(autoencoder: Autoencoder, dtype: str, device: str | torch.device) -> Autoencoder:
    """The same for the autoencoder of a generator in a dtype. In float16 its values can leave the range."""
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    low = dtype == "bfloat16" or (dtype == "int8" and resolve_dtype("auto", device) == "bfloat16")
    autoencoder = autoencoder.to(device, torch.bfloat16 if low else torch.float32)
    return autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def resolve_dtype(name: str, device: str | torch.device) -> str:
    """Return the dtype that ``auto`` stands for on a device: bfloat16 if it has instructions for it, else float32.

    Any other name is returned as it is.

    Raises:
        InputError: there is no such dtype or device, or the dtype cannot be used on this device.
    """
    if name not in DTYPES:
        raise InputError(f"dtype {name!r}: choose one of {', '.join(DTYPES)}")
    device = resolve_device(device)
    if name == "int8" and device.type != "cpu":
        raise InputError(f"dtype int8 is for CPUs, not for device {str(device)!r}; try auto")
    if name == "int8" and (reason := no_int8()):
        raise InputError(f"dtype int8 cannot be used here: {reason}; try auto")
    return resolve_training_dtype("auto", device) if name == "auto" else name
