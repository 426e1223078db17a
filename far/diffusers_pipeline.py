"""Pipeline of diffusers that draws with a generator of far, and its folder on disk or on the hub.

The folder holds ``model_index.json``, ``transformer/`` (the generator) and ``vae/`` (an autoencoder that
diffusers itself loads). Its Python files only import this module, so they fit any later version of far.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    ConfigMixin,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor

from far.card import model_card
from far.config import from_dict, listed, to_dict
from far.diffusers_autoencoder import DiffusersAutoencoder, network_class
from far.diffusers_config import DiffusersConfig
from far.diffusers_format import to_diffusers
from far.errors import InputError, prefix_errors
from far.files import atomic_folder, check_empty_folder, read_json, write_json
from far.folder_config import FolderConfig
from far.hub import upload
from far.model import FAR, ModelConfig
from far.pictures import check_finite, to_pictures
from far.pipeline import Labels, Pipeline
from far.sampling import Noise, Progress, SamplingConfig, SeededNoise, sampling_steps
from far.weights import dense

_INDEX = "model_index.json"
# importlib, because diffusers reads import statements, and would recommend the unrelated package "far".
_CODE = '''"""Import {name} from the package far-image, which does the work."""

import importlib

try:
    {name} = importlib.import_module("far.diffusers_pipeline").{name}
except ImportError:
    raise ImportError(
        "this model needs far-image, version 0.2 or newer. Run: pip install 'far-image[diffusers]'"
    ) from None
'''
# Module and class of the pipeline and of its generator, as model_index.json names them.
_PIPELINE, _TRANSFORMER = ("pipeline", "FARPipeline"), ("far_model", "FARModel")

Generators = torch.Generator | Sequence[torch.Generator] | None
StepCallback = Callable[[DiffusionPipeline, int, int, dict[str, Tensor]], Any]


@dataclasses.dataclass(frozen=True)
class _IndexEntries:
    """Entries of ``model_index.json`` that are not diffusers' own."""

    id2label: dict[int | str, str]
    sampling: SamplingConfig


class FARModel(ModelMixin, ConfigMixin):
    """Generator of far as a model of diffusers, which loads, saves, moves and converts it.

    Its configuration is that of :class:`far.model_config.ModelConfig`, as a dictionary.

    Raises:
        InputError: the configuration is not valid.
    """

    @register_to_config
    def __init__(
        self,
        network: dict[str, Any] | None = None,
        classes: int | None = None,
        latent_channels: int | None = None,
        grid: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        values = {"network": network, "classes": classes, "latent_channels": latent_channels, "grid": grid}
        # diffusers leaves out the keys that a file lacks. from_dict names them.
        given = {key: value for key, value in values.items() if value is not None}
        self.far = FAR(from_dict(ModelConfig, given, "transformer/config.json"))

    def forward(self, labels: Tensor, noise: Noise, config: SamplingConfig) -> Any:
        """Return an iterator over the AR steps of a generation; see :func:`far.sampling.sampling_steps`.

        The whole generation is one call, because diffusers' offloading moves a model when it is called.
        """
        return sampling_steps(self.far, labels, noise, config)


class FARPipeline(DiffusionPipeline):
    """Class labels in, images out, with the conventions of diffusers.

    Args:
        transformer: the generator.
        vae: the autoencoder, whose configuration has scale and shift of the latents.
        id2label: name of each class by its number.
        sampling: the model's own values of :class:`far.SamplingConfig`.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        transformer: FARModel,
        vae: AutoencoderKL | AutoencoderDC,
        id2label: dict[Any, str] | None = None,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(id2label=id2label, sampling=sampling)
        self._interrupt = False

    @classmethod
    def from_far(cls, pipeline: Pipeline) -> "FARPipeline":
        """Return a pipeline of diffusers with copies of a pipeline's weights, in float32 on the CPU.

        Raises:
            InputError: the model has no autoencoder, int8 weights, or an autoencoder that diffusers cannot
                represent.
        """
        if pipeline.dtype == "int8":
            raise InputError("int8 weights cannot be exported. Load the model in another dtype")
        transformer = FARModel(**to_dict(pipeline.model.config)).eval()
        weights = pipeline.model.state_dict()
        transformer.far.load_state_dict({name: dense(tensor) for name, tensor in weights.items()})
        names = dict(enumerate(pipeline.classes))
        return cls(transformer, _vae(pipeline), names, to_dict(pipeline.defaults))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **sampling: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one image per label, all in one batch.

        Args:
            class_labels: class numbers or names.
            num_inference_steps: AR steps, that is steps of the progress bar. None takes the model's own, as
                it does for the other values. A causal model has one per token.
            guidance_scale: 1 turns guidance off.
            generator: one per image, each of which gives the image that far draws from its seed, if the seed
                is below 2³²; or one for all images. One on a GPU only seeds others on the CPU.
            output_type: ``"pil"``; ``"np"`` for ``[n, h, w, 3]`` or ``"pt"`` for ``[n, 3, h, w]``, both in
                [0, 1]; ``"latent"`` for unit-variance latents ``[n, c, h, w]``.
            return_dict: False returns a tuple.
            callback_on_step_end: called after each AR step with the pipeline, the step (twice, since there
                are no timesteps) and ``{"latents": …}``. Setting ``_interrupt`` of the pipeline ends the
                drawing. What it returns is not used.
            callback_on_step_end_tensor_inputs: ``["latents"]`` or empty: what the callback gets.
            sampling: other values of :class:`far.SamplingConfig` by name, such as ``head_steps=4``.

        Raises:
            InputError: an unknown class or name, a value out of range or given under two names, or another
                number of generators than of labels.
        """
        _check_forms(output_type, callback_on_step_end_tensor_inputs)
        pipeline = self._far_pipeline()
        given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        values = _sampling_values(given, sampling)
        numbers = [pipeline.label(name) for name in listed("class_labels", class_labels)]
        if not numbers:
            raise InputError("class_labels is empty. Give at least one class")
        device, config = self._execution_device, pipeline.sampling_config(**values)
        noise = _GivenNoise(_generators(generator, len(numbers)), device)
        steps = self.transformer(torch.tensor(numbers, device=device), noise, config)
        self._interrupt = False
        with self.progress_bar(total=config.ar_steps) as bar:
            for progress in steps:
                bar.update()
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, progress.latents)
                    callback_on_step_end(self, progress.step, progress.step, tensors)
                if self._interrupt:
                    break
        images = self._output(progress, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _far_pipeline(self) -> Pipeline:
        """Return a pipeline of far with the same generator, for class names and sampling values."""
        network = self.transformer.far
        values = {"id2label": self.config.id2label or {}, "sampling": self.config.sampling or {}}
        entries = from_dict(_IndexEntries, values, _INDEX)
        names = {str(number): name for number, name in entries.id2label.items()}
        classes = tuple(names.get(str(number), str(number)) for number in range(network.config.classes))
        with prefix_errors(f"{_INDEX}: "):
            FolderConfig(network.config, None, classes, entries.sampling)  # checks the names
        return Pipeline(network, None, classes, entries.sampling, record=False)

    def _output(self, progress: Progress, output_type: str) -> list[Image.Image] | Tensor | np.ndarray:
        """Return what was drawn as images or latents; see :meth:`__call__`."""
        if output_type == "latent":
            return progress.latents
        images = check_finite(self._decode(progress.latents)).clamp(0, 1)
        if output_type == "pil":
            return to_pictures(images)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()

    def _decode(self, latents: Tensor) -> Tensor:
        """Return images ``[b, 3, H, W]``, about [0, 1]. In float16, activations of a vae could overflow."""
        dtype = self.vae.dtype
        if dtype == torch.float16:
            self.vae.to(torch.float32)
        config = DiffusersConfig("", "", _entries(self.vae))
        scale, shift = (latents.new_tensor(value).view(-1, 1, 1) for value in (config.scale, config.shift))
        images = self.vae.decode((latents / scale + shift).to(self.vae.dtype)).sample.float() / 2 + 0.5
        if dtype == torch.float16:
            self.vae.to(dtype)
        return images

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **options: Any) -> None:
        """Write ``model_index.json`` and the Python files that it names; ``save_pretrained`` ends so."""
        super().save_config(save_directory, push_to_hub=False, **options)
        folder = Path(save_directory)
        components = {"_class_name": list(_PIPELINE), "transformer": list(_TRANSFORMER)}
        write_json(folder / _INDEX, {**read_json(folder / _INDEX), **components})
        for path, (module, name) in ((folder, _PIPELINE), (folder / "transformer", _TRANSFORMER)):
            (path / f"{module}.py").write_text(_CODE.format(name=name), encoding="utf-8")


def _check_forms(output_type: str, tensor_inputs: Sequence[str]) -> None:
    """Raise an :class:`InputError` for an unknown output type or callback tensor."""
    if output_type not in ("pil", "np", "pt", "latent"):
        raise InputError(f"output_type {output_type!r} does not exist. Choose pil, np, pt or latent")
    if unknown := {*tensor_inputs} - {"latents"}:
        wrong = f"callback_on_step_end_tensor_inputs has {unknown.pop()!r}"
        raise InputError(f"{wrong}. Give ['latents'] or nothing")


def _sampling_values(given: dict[str, Any], sampling: dict[str, Any]) -> dict[str, Any]:
    """Return sampling values by our names, from those with names of diffusers and the others."""
    ours = {"num_inference_steps": "ar_steps", "guidance_scale": "guidance"}
    for name, value in given.items():
        if value is not None and ours[name] in sampling:
            raise InputError(f"{name} and {ours[name]} are the same value. Give one of them")
    return {**{ours[name]: value for name, value in given.items()}, **sampling}


class _GivenNoise(SeededNoise):
    """Noise from CPU generators that the caller holds, one per image."""

    def __init__(self, generators: list[torch.Generator], device: torch.device) -> None:
        self.generators, self.device = generators, device


def _generators(given: Generators, count: int) -> list[torch.Generator]:
    """Return one CPU generator per image. Without any, torch's default one seeds a new one."""
    if given is None:
        return [torch.Generator().manual_seed(int(torch.randint(2**62, ())))] * count
    several = [given] * count if isinstance(given, torch.Generator) else list(given)
    if len(several) != count:
        raise InputError(f"{len(several)} generators for {count} class_labels. Give one, or one per label")
    return [one if one.device.type == "cpu" else _on_cpu(one) for one in several]


def _on_cpu(generator: torch.Generator) -> torch.Generator:
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed))


def _vae(pipeline: Pipeline) -> Any:
    """Return a pipeline's autoencoder as a model of diffusers."""
    autoencoder = pipeline.require_autoencoder()
    if isinstance(autoencoder, DiffusersAutoencoder):
        vae = network_class(autoencoder.config).from_config(autoencoder.config.network)
        vae.load_state_dict(autoencoder.state_dict())
        return vae.eval()
    with tempfile.TemporaryDirectory() as folder:
        to_diffusers(autoencoder, Path(folder))
        return AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)


def _entries(vae: Any) -> dict[str, Any]:
    """Return the entries of a vae's ``config.json``, without private ones."""
    known = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    return {**known, "_class_name": type(vae).__name__}


def export_diffusers(
    pipeline: Pipeline,
    folder: Path | str,
    dtype: torch.dtype = torch.float32,
    *,
    name: str | None = None,
    license: str | None = None,
) -> None:
    """Write a folder that ``diffusers.DiffusionPipeline.from_pretrained`` reads, with a model card.

    Args:
        pipeline: a model with its autoencoder.
        folder: made if missing.
        dtype: floating point dtype of the written weights.
        name: ``OWNER/NAME`` from which the pipeline will be loaded; None is the folder itself.
        license: as in :meth:`far.Pipeline.push_to_hub`.

    Raises:
        InputError: the folder is not empty, or the model cannot be exported; see
            :meth:`FARPipeline.from_far`.
    """
    folder = Path(folder)
    check_empty_folder(folder)
    exported = FARPipeline.from_far(pipeline)
    for part in (exported.transformer, exported.vae):
        torch.nn.Module.to(part, dtype)  # diffusers' own warns of layers to keep in float32, even of none
    autoencoder = pipeline.require_autoencoder().config
    if isinstance(autoencoder, DiffusersConfig):  # the folder holds a copy
        autoencoder = autoencoder.including_weights()
    facts = pipeline.defaults, pipeline.results, pipeline.training
    config = FolderConfig(pipeline.model.config, autoencoder, tuple(pipeline.classes), *facts)
    with atomic_folder(folder) as temporary:
        exported.save_pretrained(temporary)
        for weights in temporary.rglob("*.safetensors"):
            weights.chmod(0o644)  # safetensors makes them readable for their owner only
        card = model_card(temporary, config, name, license, library="diffusers")
        (temporary / "README.md").write_text(card, encoding="utf-8")


def push_diffusers(
    pipeline: Pipeline, name: str, dtype: torch.dtype = torch.float32, *, license: str, **upload_options: Any
) -> str:
    """Publish what :func:`export_diffusers` writes, in one commit, and return the repository's address.

    The other parameters are those of :func:`export_diffusers` and :func:`far.hub.upload`.

    Raises:
        InputError: as there.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pipeline"
        export_diffusers(pipeline, folder, dtype, name=name, license=license)
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        card = files.pop("README.md").read_text(encoding="utf-8")
        return upload(files, card, name, other_form="model.safetensors", **upload_options)
