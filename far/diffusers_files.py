"""Folder of an autoencoder of diffusers: its configuration and its weights, from safetensors only."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from far.diffusers_autoencoder import DiffusersAutoencoder, network_class
from far.diffusers_config import PREFIX, DiffusersConfig
from far.errors import InputError, prefix_errors
from far.files import json_digest, read_json
from far.hub import download_autoencoder, is_autoencoder_name
from far.weights import build_module, digest, read_tensors

_WEIGHTS = "diffusion_pytorch_model.safetensors"
# Weights in one file or, listed by an index, in several; plain, or a variant such as fp16.
_FILE = re.compile(r"diffusion_pytorch_model(?:\.(\w+))?\.safetensors", re.ASCII)
_SHARDS = re.compile(r"diffusion_pytorch_model\.safetensors\.index(?:\.(\w+))?\.json", re.ASCII)
# Attention's tensors as older versions of diffusers saved them, and their names today.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def open_diffusers(name: str, *, local_files_only: bool = False) -> DiffusersAutoencoder:
    """Load an autoencoder of diffusers, in float32 on the CPU, in evaluation mode.

    Args:
        name: a folder, or ``OWNER/NAME[/SUBFOLDER][@REVISION]`` of the hub, tried in this order; with or
            without ``diffusers:`` before it.
        local_files_only: take a model of the hub from the local cache alone, as HF_HUB_OFFLINE=1 does.

    Raises:
        InputError: it does not exist, has no safetensors, or is damaged, the hub cannot be reached, or
            diffusers is not installed.
    """
    name = name.removeprefix(PREFIX)
    if name != "" and Path(name).is_dir():
        folder = Path(name).resolve()
        return _open_folder(folder, str(folder))
    if is_autoencoder_name(name):
        with prefix_errors(f"{PREFIX}{name}: no such folder. As a name on the hub: "):
            return _open_folder(*download_autoencoder(name, local_files_only=local_files_only))
    raise InputError(
        f"{PREFIX}{name}: no such folder. Give a folder of diffusers, or OWNER/NAME[/SUBFOLDER] of the hub"
    )


def reopen_diffusers(
    config: DiffusersConfig, path: Path, *, local_files_only: bool = False
) -> DiffusersAutoencoder:
    """Load the autoencoder that a model was trained with from its source; see :func:`open_diffusers`.

    Args:
        config: its identity, as ``path`` holds it.
        path: the model's ``config.json``, for errors.
        local_files_only: as there.

    Raises:
        InputError: it is missing or has changed.
    """
    with prefix_errors(f"{path}: the autoencoder "):
        autoencoder = open_diffusers(config.source, local_files_only=local_files_only)
        if autoencoder.config.sha256 != config.sha256:
            digests = f"its sha256 is {autoencoder.config.sha256[:16]}…, not {config.sha256[:16]}…"
            raise InputError(f"{config.source} has changed ({digests}). Restore the one of the training")
    return autoencoder


def _open_folder(folder: Path, source: str) -> DiffusersAutoencoder:
    path = folder / "config.json"
    entries = read_diffusers_config(folder)
    weights, *_ = find_weights(folder)
    tensors = read_weights(weights)
    with prefix_errors(f"{path}: "):
        config = DiffusersConfig(source, json_digest([entries, digest(tensors)]), entries)
        return build_diffusers(config, tensors, weights)


def build_diffusers(config: DiffusersConfig, tensors: dict[str, Tensor], path: Path) -> DiffusersAutoencoder:
    """Return an autoencoder in float32 on the CPU, in evaluation mode.

    Args:
        config: its configuration.
        tensors: its weights, by diffusers' names.
        path: the file that they are from, for errors.

    Raises:
        InputError: diffusers is not installed or cannot build the networks, or a tensor does not fit.
    """
    network_class(config)  # imported here, because build_module changes torch's default device
    return build_module(lambda: DiffusersAutoencoder(config), tensors, path).eval()


def read_diffusers_config(folder: Path) -> dict[str, Any]:
    """Return the entries of a folder's ``config.json``: ``_class_name``, and those that are not private.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"{path} does not exist. Give an autoencoder's folder (in a pipeline, its vae)")
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no keys. Give the folder of an autoencoder of diffusers")
    return {key: value for key, value in values.items() if key == "_class_name" or not key.startswith("_")}


def find_weights(source: Path) -> list[Path]:
    """Return the files and indices of weights, best first: plain before variants, one file before shards.

    Raises:
        InputError: the folder holds none.
    """
    ranked = []
    for path in source.iterdir():
        for sharded, pattern in enumerate((_FILE, _SHARDS)):
            if match := pattern.fullmatch(path.name):
                ranked.append((match[1] or "", sharded, path))
    if not ranked:
        raise InputError(f"{source / _WEIGHTS} does not exist. Save the model as safetensors")
    return [path for _, _, path in sorted(ranked)]


def read_weights(weights: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, or of all files of an index, under the names that diffusers uses today.

    Raises:
        InputError: a file is missing or damaged, or holds tensors under older and newer names.
    """
    tensors = read_tensors(weights) if weights.suffix == ".safetensors" else _read_shards(weights)
    old = re.compile(rf"(?<=\.attentions\.)(\d+)\.({'|'.join(_OLD_NAMES)})(?=\.)")
    renamed = {
        old.sub(lambda match: f"{match[1]}.{_OLD_NAMES[match[2]]}", name): tensor
        for name, tensor in tensors.items()
    }
    if len(renamed) < len(tensors):
        raise InputError(f"{weights} holds attention tensors under older and newer names. Save it again")
    return renamed


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
