"""Our autoencoder ↔ the folder of an ``AutoencoderKL`` of diffusers, which need not be installed.

If only the coarsest level has attention, both do the same arithmetic, and results agree to float precision.
Tensor names, shapes and the config's entries differ; only this module has both.
"""

import dataclasses
import re
from pathlib import Path

from torch import Tensor

from far.autoencoder import Autoencoder, AutoencoderConfig
from far.config import from_dict, to_dict
from far.convert import add_autoencoder
from far.errors import InputError, prefix_errors
from far.files import read_json, write_json
from far.weights import read_tensors, save_tensors

_CLASS = "AutoencoderKL"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
# Weights in one file or, listed by an index, in several; plain, or a variant such as fp16.
_FILE = re.compile(r"diffusion_pytorch_model(?:\.(\w+))?\.safetensors", re.ASCII)
_SHARDS = re.compile(r"diffusion_pytorch_model\.safetensors\.index(?:\.(\w+))?\.json", re.ASCII)
# Attention's tensors as older versions of diffusers saved them, and their names today.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

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


def to_diffusers(autoencoder: Autoencoder, folder: Path) -> None:
    """Write an autoencoder as a folder for ``diffusers.AutoencoderKL.from_pretrained``.

    Its latents become ours by ``(latent − mean) · scaling_factor / std``, with ``latents_mean`` and
    ``latents_std`` if scale or shift has one value per channel, else with ``shift_factor`` and 1. One scale
    per channel becomes ``latents_std``, with a ``scaling_factor`` of 1.

    Args:
        autoencoder: in float32 on any device.
        folder: made if missing. It must hold no ``config.json``.

    Raises:
        InputError: an ``AutoencoderKL`` cannot represent it (latents on a sphere, a first level that is wider
            than the first convolution), or the folder holds another model.
    """
    config = autoencoder.config
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
    path = source / "config.json"
    if not path.exists():
        raise InputError(f"{path} does not exist. Give an {_CLASS}'s folder (in a pipeline, its vae)")
    values = read_json(path)
    if not isinstance(values, dict) or values.get("_class_name") != _CLASS:
        raise InputError(f"{path}: _class_name is not {_CLASS!r}. Give the folder of an {_CLASS}")
    entries = {key: value for key, value in values.items() if not key.startswith("_")}
    config = _ours(from_dict(AutoencoderKLConfig, entries, str(path)), path)
    weights, *others = _weights(source)
    found = read_tensors(weights) if weights.suffix == ".safetensors" else _read_shards(weights)
    # Their linear layers are 1 × 1 convolutions here.
    tensors = {
        name: tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        for name, tensor in _with_new_names(found, weights).items()
    }
    levels = len(config.width_multipliers)
    add_autoencoder(folder, config, tensors, lambda ours: _name(ours, levels), weights)
    return weights.name + (f", not {', '.join(path.name for path in others)}" if others else "")


def _weights(source: Path) -> list[Path]:
    """Return the files and indices of weights, best first: plain before variants, one file before shards."""
    ranked = []
    for path in source.iterdir():
        for sharded, pattern in enumerate((_FILE, _SHARDS)):
            if match := pattern.fullmatch(path.name):
                ranked.append((match[1] or "", sharded, path))
    if not ranked:
        raise InputError(f"{source / _WEIGHTS} does not exist. Save the model as safetensors")
    return [path for _, _, path in sorted(ranked)]


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Return the tensors of all files that an index lists."""
    listed = read_json(index)
    files = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise InputError(f"{index} has no weight_map from tensors to files. Copy or save the weights again")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        if not re.fullmatch(r"[\w.-]+\.safetensors", file, re.ASCII):
            raise InputError(f"{index} lists {file[:80]!r}, not a safetensors file. Save the weights again")
        shard = read_tensors(index.parent / file)
        if shard.keys() != {name for name, place in files.items() if place == file}:
            raise InputError(f"{index.parent / file} and {index.name} differ. Save the weights again")
        tensors |= shard
    return tensors


def _with_new_names(tensors: dict[str, Tensor], weights: Path) -> dict[str, Tensor]:
    """Return tensors under the names that diffusers uses today."""
    old = re.compile(rf"(?<=\.attentions\.)(\d+)\.({'|'.join(_OLD_NAMES)})(?=\.)")
    renamed = {
        old.sub(lambda match: f"{match[1]}.{_OLD_NAMES[match[2]]}", name): tensor
        for name, tensor in tensors.items()
    }
    if len(renamed) < len(tensors):
        raise InputError(f"{weights} holds attention tensors under older and newer names. Save it again")
    return renamed


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
    scale, shift = _scale_and_shift(theirs, path)
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


def _scale_and_shift(
    theirs: AutoencoderKLConfig, path: Path
) -> tuple[float | tuple[float, ...], float | tuple[float, ...]]:
    mean, std = theirs.latents_mean, theirs.latents_std
    if mean is None and std is None:
        return theirs.scaling_factor, theirs.shift_factor or 0.0
    if mean is None or std is None or theirs.shift_factor:
        raise InputError(f"{path}: give both latents_mean and latents_std, without shift_factor, or neither")
    if len(std) != theirs.latent_channels or min(std) <= 0:
        raise InputError(f"{path}: latents_std {list(std)} must be one positive value per channel")
    scale = tuple(theirs.scaling_factor / value for value in std)
    return scale if len(set(std)) > 1 else scale[0], mean
