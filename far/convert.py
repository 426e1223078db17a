"""Published checkpoints of MAR and of its autoencoder (KL-16) → folders that ``far.load`` reads.

Only this module contains the originals' tensor names and how their configuration follows from tensor shapes.
Folders are written by ``far.folder``.
"""

import argparse
import contextlib
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from far.autoencoder import Autoencoder, AutoencoderConfig
from far.backbone.masked import MaskedConfig
from far.classes import imagenet_classes
from far.errors import InputError, prefix_errors
from far.folder import add_part, config_without
from far.heads import DiffusionConfig
from far.model import FAR, ModelConfig, NetworkConfig
from far.pickles import is_held, read_pickle
from far.sampling import SamplingConfig
from far.weights import FLOATS

# Our names (as patterns; the rest of a name is kept) and MAR's. The class embedding is assembled below.
_MAR_NAMES = (
    (r"backbone\.encoder_positions", "encoder_pos_embed_learned"),
    (r"backbone\.decoder_positions", "decoder_pos_embed_learned"),
    (r"backbone\.condition_positions", "diffusion_pos_embed_learned"),
    (r"backbone\.token_projection", "z_proj"),
    (r"backbone\.token_norm", "z_proj_ln"),
    (r"backbone\.decoder_projection", "decoder_embed"),
    (r"backbone\.(mask_token|encoder_blocks|encoder_norm|decoder_blocks|decoder_norm)", r"\1"),
    (r"head\.network\.time_embeddings\.0\.linear_in", "diffloss.net.time_embed.mlp.0"),
    (r"head\.network\.time_embeddings\.0\.linear_out", "diffloss.net.time_embed.mlp.2"),
    (r"head\.network\.condition_embedding", "diffloss.net.cond_embed"),
    (r"head\.network\.input_projection", "diffloss.net.input_proj"),
    (r"head\.network\.blocks\.(\d+)\.norm", r"diffloss.net.res_blocks.\1.in_ln"),
    (r"head\.network\.blocks\.(\d+)\.linear_in", r"diffloss.net.res_blocks.\1.mlp.0"),
    (r"head\.network\.blocks\.(\d+)\.linear_out", r"diffloss.net.res_blocks.\1.mlp.2"),
    (r"head\.network\.blocks\.(\d+)\.modulation", r"diffloss.net.res_blocks.\1.adaLN_modulation.1"),
    (r"head\.network\.output\.modulation", "diffloss.net.final_layer.adaLN_modulation.1"),
    (r"head\.network\.output\.linear", "diffloss.net.final_layer.linear"),
)
_CLASS_EMBEDDING = "backbone.class_embedding.weight"

# By width: attention heads of MAR-B, -L and -H, and the guidance of their published figures.
_MAR_HEADS = {768: 12, 1024: 16, 1280: 16}
_MAR_GUIDANCE = {768: 2.9, 1024: 3.0, 1280: 3.2}


def convert_mar(source: Path, folder: Path, *, ema: bool = True) -> None:
    """Write a published MAR checkpoint as a model's folder.

    Sizes come from the tensors. What they cannot determine (attention heads, patch size) comes from the
    checkpoint's ``args``, else from MAR's published models. 1,000 classes get ImageNet's names, others are
    named "0", "1", …. Default sampling values are ``num_iter`` and ``num_sampling_steps`` of the ``args``
    (else 64 and 100), and linear guidance with the scale of the published evaluation (2.9, 3.0 and 3.2 for
    MAR-B, -L and -H, else 3.0).

    An autoencoder in the folder is kept, and a generator is never overwritten: this and
    :func:`convert_kl16`, in either order, make a complete model.

    Args:
        source: the ``.pth`` file. Nothing in it is executed: only tensors, plain values and
            ``argparse.Namespace`` are read, and anything else is refused.
        folder: made if missing. Nothing is written unless the whole conversion succeeds.
        ema: take the averaged weights (``model_ema``), which the published figures come from.

    Raises:
        InputError: the file is missing, damaged, hostile or of another model, or the folder holds a
            generator, an autoencoder with other latent channels, or a foreign ``config.json``.
    """
    config_without(folder, "model")  # refused before minutes of work
    checkpoint = _read_pickle(source)
    part = "model_ema" if ema else "model"
    if not isinstance(checkpoint, Mapping) or checkpoint.get(part) is None:
        remedy = "take the raw weights (--no-ema, or ema=False)" if ema else "take the EMA weights (ema=True)"
        raise InputError(f"{source} holds no {part!r}. Give a MAR checkpoint, or {remedy}")
    arguments = checkpoint.get("args")
    settings = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    with _converting(source):
        weights = _state_dict(checkpoint[part])
        backbone, config = _mar_config(weights, settings)
        embedding = _class_embedding(weights, backbone.encoder_width, config.classes)
        with torch.device("meta"):
            expected = FAR(config).state_dict()
        del expected[_CLASS_EMBEDDING]
        tensors = {_CLASS_EMBEDDING: embedding, **_renamed(expected, weights, mar_name)}
    defaults = SamplingConfig(
        ar_steps=min(_number(settings, "num_iter", 64), config.tokens),
        head_steps=min(_number(settings, "num_sampling_steps", 100), 1000),
        guidance=_MAR_GUIDANCE.get(backbone.encoder_width, 3.0),
    )
    words = imagenet_classes().values()
    classes = tuple(words if config.classes == len(words) else map(str, range(config.classes)))
    add_part(folder, tensors, model=config, classes=classes, defaults=defaults)


def convert_kl16(source: Path, folder: Path) -> None:
    """Write MAR's autoencoder (``kl16.ckpt``) into a folder, with MAR's latent scale of 0.2325.

    Sizes come from the tensors. A generator in the folder is kept, and an autoencoder is never overwritten.

    Args:
        source: the ``.ckpt`` file: a state dict, or one under the key ``model``.
        folder: made if missing. Nothing is written unless the whole conversion succeeds.

    Raises:
        InputError: as in :func:`convert_mar`.
    """
    checkpoint = _read_pickle(source)
    nested = isinstance(checkpoint, Mapping) and "model" in checkpoint
    with _converting(source):
        weights = _state_dict(checkpoint["model"] if nested else checkpoint)
        config = _autoencoder_config(weights)
    add_autoencoder(folder, config, weights, str, source)


def add_autoencoder(
    folder: Path,
    config: AutoencoderConfig,
    weights: dict[str, Tensor],
    published_name: Callable[[str], str],
    source: Path,
) -> None:
    """Write an autoencoder into a folder, beside a generator that it may hold already.

    Args:
        folder: made if missing. Nothing is written if anything is wrong.
        weights: tensors in our shapes, under the names that ``published_name`` returns.
        published_name: returns the published name for one of ours.
        source: the file, for errors.

    Raises:
        InputError: a tensor is missing, left over or of another shape, or the folder holds an autoencoder, a
            generator with other latent channels, or a foreign ``config.json``.
    """
    config_without(folder, "autoencoder")
    with torch.device("meta"):
        expected = Autoencoder(config).state_dict()
    with _converting(source):
        tensors = _renamed(expected, weights, published_name)
    add_part(folder, tensors, autoencoder=config)


def _converting(source: Path) -> contextlib.AbstractContextManager[None]:
    """Name the file, and the remedy, in errors about its content."""
    return prefix_errors(f"{source} cannot be converted: ", ". Give the published checkpoint")


def _read_pickle(source: Path) -> Any:
    """Return the checkpoint's content without executing anything in it."""
    if source.is_dir():
        raise InputError(f"{source} is a folder. Give the checkpoint file in it")
    try:
        # Memory-mapped: the optimizer's state and the other set of weights take no memory.
        return read_pickle(source, argparse.Namespace, mapped=True)
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror or error}. Check the path") from error
    except Exception as error:  # a damaged or hostile pickle can raise anything
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            problem = f"its pickle requires {named[1]!r}, not only tensors and plain values"
            raise InputError(f"{source} is refused: {problem}. Give the published checkpoint") from error
        raise InputError(f"{source} is damaged or not a PyTorch checkpoint. Copy it again") from error


def _state_dict(weights: Any) -> dict[str, Tensor]:
    """Return the state dict after checking that it maps names to dense floating point tensors only."""
    if not isinstance(weights, Mapping):
        raise InputError("it holds no state dict in the place of its weights")
    for name, tensor in weights.items():
        if not (isinstance(name, str) and is_held(tensor) and tensor.dtype in FLOATS):
            raise InputError(f"the entry {reprlib.repr(name)} of its weights is not a floating point tensor")
    return dict(weights)


def _mar_config(weights: dict[str, Tensor], settings: dict[str, Any]) -> tuple[MaskedConfig, ModelConfig]:
    """Return the sizes of the backbone and of the whole model."""

    def blocks(part: str, width: int) -> tuple[int, int, int]:
        heads = _number(settings, f"{part}_num_heads", _MAR_HEADS.get(width, 0))
        if not heads:
            raise InputError(f"its args lack {part}_num_heads, which its {part} of width {width} requires")
        return width, _count(weights, f"{part}_blocks"), heads

    buffer_and_tokens, encoder_width = _shape(weights, "encoder_pos_embed_learned", 3)[1:]
    tokens, decoder_width = _shape(weights, "diffusion_pos_embed_learned", 3)[1:]
    channels = _shape(weights, "z_proj.weight", 2)[1]
    rows = _shape(weights, "class_emb.weight", 2)[0]
    head_width = _shape(weights, "diffloss.net.input_proj.weight", 2)[0]
    side, latent_channels = math.isqrt(tokens), _number(settings, "vae_embed_dim", 16)
    patch = _number(settings, "patch_size", math.isqrt(channels // latent_channels) or 1)
    if side**2 != tokens or latent_channels * patch**2 != channels:
        grid = f"a square grid of {patch}×{patch} patches of {latent_channels} channels"
        raise InputError(f"{tokens} tokens of {channels} values do not form {grid}")
    encoder, decoder = blocks("encoder", encoder_width), blocks("decoder", decoder_width)
    backbone = MaskedConfig(*encoder, *decoder, buffer_and_tokens - tokens)
    draws = _number(settings, "diffusion_batch_mul", 4)
    head = DiffusionConfig(head_width, _count(weights, "diffloss.net.res_blocks"), draws)
    # Releases of MAR differ in whether the embedding has class_num rows or always 1000.
    classes = min(_number(settings, "class_num", rows), rows)
    network, latents = NetworkConfig(backbone, head, patch), (side * patch, side * patch)
    return backbone, ModelConfig(network, classes, latent_channels, latents)


def _autoencoder_config(weights: dict[str, Tensor]) -> AutoencoderConfig:
    width = _shape(weights, "encoder.conv_in.weight", 4)[0]
    levels = range(_count(weights, "encoder.down"))
    widths = [_shape(weights, f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in levels]
    if width < 1 or any(level % width for level in widths):
        raise InputError(f"the widths {widths} of its levels are not multiples of its first, {width}")
    return AutoencoderConfig(
        width=width,
        width_multipliers=tuple(level // width for level in widths),
        blocks=_count(weights, "encoder.down.0.block"),
        latent_channels=_shape(weights, "post_quant_conv.weight", 4)[0],
    )


def _shape(weights: dict[str, Tensor], name: str, dimensions: int) -> torch.Size:
    if name not in weights:
        raise InputError(f"it lacks the tensor {name}")
    if weights[name].dim() != dimensions:
        raise InputError(f"{name} has shape {list(weights[name].shape)}, not {dimensions} dimensions")
    return weights[name].shape


def _count(weights: dict[str, Tensor], prefix: str) -> int:
    """Return how many different numbers follow ``prefix`` in the names."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match[1] for name in weights if (match := pattern.match(name))})


def _number(settings: dict[str, Any], name: str, default: int) -> int:
    """Return a positive integer of the checkpoint's ``args`` (some are stored as text), else ``default``."""
    value = settings.get(name)
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value, re.ASCII):
        value = int(value)
    # Exactly an int: neither True nor, in a hostile file, a list whose text is infinite.
    return value if type(value) is int and 0 < value < 10**9 else default


def _class_embedding(weights: dict[str, Tensor], width: int, classes: int) -> Tensor:
    """Take the class embedding out of ``weights``, with the vector for "no class" as its last row."""
    embedding, null = weights.pop("class_emb.weight"), weights.pop("fake_latent", None)
    if embedding.shape[1] != width:
        raise InputError(f"class_emb.weight has shape {list(embedding.shape)}, not [classes, {width}]")
    if null is None or null.shape != (1, width):
        raise InputError(f"fake_latent is missing or its shape is not {[1, width]}")
    return torch.cat([embedding[:classes], null])


def mar_name(ours: str) -> str:
    """Return MAR's name of one of our tensors, except the class embedding, which is two tensors there."""
    for pattern, theirs in _MAR_NAMES:
        name, replaced = re.subn(rf"^{pattern}(?=\.|$)", theirs, ours)
        if replaced:
            return name
    raise AssertionError(f"MAR has no name for {ours}")


def _renamed(
    expected: dict[str, Tensor], weights: dict[str, Tensor], published_name: Callable[[str], str]
) -> dict[str, Tensor]:
    """Return ``weights`` under our names after checking that none is missing, left over or misshapen."""
    names = {ours: published_name(ours) for ours in expected}
    for ours, theirs in names.items():
        shape = list(expected[ours].shape)
        if list(_shape(weights, theirs, len(shape))) != shape:
            raise InputError(f"{theirs} has shape {list(weights[theirs].shape)}, but others require {shape}")
        if weights[theirs].dtype not in FLOATS:
            raise InputError(f"{theirs} is of {weights[theirs].dtype}, which weights cannot have")
    if left_over := sorted(weights.keys() - set(names.values())):
        raise InputError(f"the published model does not have its tensor {left_over[0]!r}")
    return {ours: weights[theirs] for ours, theirs in names.items()}
