"""Our autoencoder ↔ the folder of an ``AutoencoderKL`` of diffusers, which need not be installed.

If only the coarsest level has attention, both do the same arithmetic, and results agree to float precision.
Tensor names, shapes and the config's entries differ; only this module has both.
"""

import dataclasses
import re
from pathlib import Path

from far.autoencoder_config import AutoencoderConfig
from far.config import from_dict, to_dict
from far.convert import add_autoencoder
from far.diffusers_config import scale_and_shift
from far.diffusers_files import find_weights, read_diffusers_config, read_weights
from far.errors import InputError, prefix_errors
from far.files import write_json
from far.tokenizer import Tokenizer
from far.weights import save_tensors

_CLASS = "AutoencoderKL"
_WEIGHTS = "diffusion_pytorch_model.safetensors"

# Our names and those of diffusers. All patterns that fit are applied in order, after the decoder's levels.
_NAMES = (
    (r"\.down\.(\d+)\.", r".down_blocks.\1."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
)


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """Entries of an ``AutoencoderKL``'s ``config.json``, with the defaults of diffusers."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


# Hints for tiling and float16, which change no value, and entries that are converted separately.
_SKIPPED = {"sample_size", "force_upcast", "scaling_factor", "shift_factor", "latents_mean", "latents_std"}


def to_diffusers(autoencoder: Tokenizer, folder: Path) -> None:
    """Write an autoencoder as a folder for ``diffusers.AutoencoderKL.from_pretrained``; no small decoder.

    Its latents become ours by ``(latent − mean) · scaling_factor / std``, with ``latents_mean`` and
    ``latents_std`` if scale or shift has one value per channel, else with ``shift_factor`` and 1. One scale
    per channel becomes ``latents_std``, with a ``scaling_factor`` of 1.

    Args:
        autoencoder: in float32 on any device.
        folder: made if missing. It must hold no ``config.json``.

    Raises:
        InputError: an ``AutoencoderKL`` cannot represent it (latents on a sphere, a first level that is wider
            than the first convolution), it is one of diffusers already, or the folder holds another model.
    """
    config = autoencoder.config
    if not isinstance(config, AutoencoderConfig):
        raise InputError(f"{config.source} is an autoencoder of diffusers already. Use it as it is")
    if config.spherical:
        raise InputError(f"a spherical autoencoder cannot become an {_CLASS}. Convert another one")
    multipliers = list(config.width_multipliers)
    if multipliers[0] != 1:
        raise InputError(f"width_multipliers {multipliers} must begin with 1. Convert another autoencoder")
    if (folder / "config.json").exists():
        raise InputError(f"{folder} already holds a model. Choose another folder")
    tensors = {
        _name(ours, len(multipliers)): tensor.flatten(1) if ".attn" in ours and tensor.dim() == 4 else tensor
        for ours, tensor in autoencoder.state_dict().items()
        if not ours.startswith("small_decoder.")
    }
    save_tensors(folder / _WEIGHTS, tensors)
    write_json(folder / "config.json", {"_class_name": _CLASS, **to_dict(_theirs(config))})


def from_diffusers(source: Path, folder: Path) -> str:
    """Add the autoencoder of an ``AutoencoderKL`` folder to one of ours, and return which files were read.

    A generator in the folder is kept, and an autoencoder is never overwritten. Weights may be in one file or
    in shards, under the attention's older names, or a variant such as ``fp16``; plain ones come first.

    Args:
        source: holds ``config.json`` and ``diffusion_pytorch_model.safetensors``; for a whole diffusers
            pipeline, its ``vae``.
        folder: made if missing. Nothing is written unless the whole conversion succeeds.

    Raises:
        InputError: a file is missing or damaged, an entry of the config requires arithmetic that ours lacks,
            a tensor does not fit, or the folder holds an autoencoder or a generator with other channels.
    """
    path, values = source / "config.json", read_diffusers_config(source)
    if values.pop("_class_name", None) != _CLASS:
        raise InputError(f"{path}: _class_name is not {_CLASS!r}. Give the folder of an {_CLASS}")
    config = _ours(from_dict(AutoencoderKLConfig, values, str(path)), path)
    weights, *others = find_weights(source)
    # Their linear layers are 1 × 1 convolutions here.
    tensors = {
        name: tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        for name, tensor in read_weights(weights).items()
    }
    levels = len(config.width_multipliers)
    add_autoencoder(folder, config, tensors, lambda ours: _name(ours, levels), weights)
    return weights.name + (f", not {', '.join(path.name for path in others)}" if others else "")


def _name(ours: str, levels: int) -> str:
    # There, levels of the decoder count from the coarsest.
    name = re.sub(r"\.up\.(\d+)\.", lambda match: f".up_blocks.{levels - 1 - int(match[1])}.", ours)
    for pattern, theirs in _NAMES:
        name = re.sub(pattern, theirs, name)
    return name


def _theirs(config: AutoencoderConfig) -> AutoencoderKLConfig:
    levels, channels = len(config.width_multipliers), config.latent_channels
    scale, shift, mean, std = config.scale, config.shift, None, None
    if isinstance(scale, tuple) or isinstance(shift, tuple):
        mean = shift if isinstance(shift, tuple) else (shift,) * channels
        std = tuple(1 / value for value in scale) if isinstance(scale, tuple) else (1.0,) * channels
    return AutoencoderKLConfig(
        down_block_types=("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.widths),
        layers_per_block=config.blocks,
        latent_channels=channels,
        norm_num_groups=config.norm_groups,
        scaling_factor=1.0 if isinstance(scale, tuple) else scale,
        shift_factor=None if mean is not None or isinstance(shift, tuple) else shift,
        latents_mean=mean,
        latents_std=std,
    )


def _ours(theirs: AutoencoderKLConfig, path: Path) -> AutoencoderConfig:
    widths = theirs.block_out_channels
    if not widths or min(widths) < 1 or any(width % widths[0] for width in widths):
        raise InputError(f"{path}: block_out_channels {list(widths)} must be multiples of the first")
    with prefix_errors(f"{path}: "):
        statistics = theirs.shift_factor, theirs.latents_mean, theirs.latents_std
        scale, shift = scale_and_shift(theirs.latent_channels, theirs.scaling_factor, *statistics)
    with prefix_errors(f"{path} cannot be converted: "):
        config = AutoencoderConfig(
            width=widths[0],
            width_multipliers=tuple(width // widths[0] for width in widths),
            blocks=theirs.layers_per_block,
            latent_channels=theirs.latent_channels,
            norm_groups=theirs.norm_num_groups,
            scale=scale,
            shift=shift,
        )
    values = to_dict(theirs)
    for name, expected in to_dict(_theirs(config)).items():
        if name not in _SKIPPED and values[name] != expected:
            raise InputError(f"{path}: {name} is {values[name]!r}, but far requires {expected!r}")
    return config
