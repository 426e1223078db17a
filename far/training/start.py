"""A trained model that a training starts from: all of it, or its backbone alone, frozen."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from far.autoencoder import Autoencoder
from far.classes import check_same_classes
from far.config import to_dict
from far.errors import InputError
from far.folder import ModelFolder
from far.heads import Head
from far.hub import is_hub_name
from far.model import FAR
from far.names import bundled_names
from far.pipeline import Pipeline
from far.training.runs import checkpoints_folder, list_checkpoints

# Keys of a backbone that change its training only, not what its weights compute.
_TRAINING_ONLY = {"dropout", "mask_ratio_min", "mask_ratio_std", "raster_fraction", "input_noise"}
# Training facts of a model that started from another one.
_FACTS = ("started from", "model")


def copy_backbone(
    module: FAR, weights: str, autoencoder: Autoencoder, classes: list[str], latents: Path
) -> dict[str, Any]:
    """Copy a trained model's backbone into ``module``, freeze it, and return that model's training facts.

    Args:
        module: the model to train.
        weights: the trained model: a folder, a bundled name or ``OWNER/NAME``.
        autoencoder: the one that made the latents.
        classes: class names of the latents.
        latents: folder of the latents, for errors.

    Raises:
        InputError: the trained model has another backbone, other classes or another autoencoder.
    """
    pipeline = _open_fitting(module, weights, autoencoder, latents)
    remedy = "Train on the same classes, or use start_from to train the backbone too"
    check_same_classes(pipeline.classes, f"the model {weights}", classes, str(latents), remedy)
    module.backbone.load_state_dict(pipeline.model.backbone.state_dict())
    module.backbone.requires_grad_(False)
    return pipeline.training


def copy_model(
    module: FAR, weights: str, autoencoder: Autoencoder, classes: list[str], latents: Path
) -> dict[str, Any]:
    """Copy a trained model's backbone, and its head if that fits, into ``module``, and return facts.

    Class embeddings are matched by name. New classes start from the mean of the trained ones. The parameters
    and errors are those of :func:`copy_backbone`, but the classes may differ.
    """
    pipeline = _open_fitting(module, weights, autoencoder, latents)
    trained, theirs = pipeline.model, pipeline.classes
    state = trained.backbone.state_dict()
    state["class_embedding.weight"] = match_classes(state["class_embedding.weight"], theirs, classes)
    module.backbone.load_state_dict(state)
    fits = _same_shapes(trained.head, module.head)
    if fits:
        module.head.load_state_dict(trained.head.state_dict())
    size = trained.config.network.head
    head = "head copied" if fits else f"new head (theirs is {size.kind}, {size.depth} blocks of {size.width})"
    return {
        "started from": f"{local_name(weights)}: {_matched(theirs, classes)}, {head}",
        "model": pipeline.training,
    }


def _matched(theirs: list[str], ours: list[str]) -> str:
    """Return how many classes two models share, and the names of the others."""
    new, dropped = (
        [name for name in names if name not in others] for names, others in ((ours, theirs), (theirs, ours))
    )
    parts = [f"{len(ours) - len(new)} classes matched"]
    for kind, names in (("new", new), ("dropped", dropped)):
        if names:
            parts.append(f"{len(names)} {kind} ({', '.join(names)})")
    return ", ".join(parts)


def recorded_start(run: Path) -> dict[str, Any] | None:
    """Return the facts that :func:`copy_model` gave a run's first step; None before its first checkpoint."""
    if not list_checkpoints(checkpoints_folder(run)):
        return None
    facts = ModelFolder.open(run).config.training
    return {name: facts[name] for name in _FACTS if name in facts}


def local_name(weights: str) -> str:
    """Return the name of a bundled or hub model, or a folder's last part: a model does not reveal paths."""
    if Path(weights).is_dir() or not (is_hub_name(weights) or weights in bundled_names()):
        return Path(weights).resolve().name
    return weights


def match_classes(trained: Tensor, theirs: list[str], ours: list[str]) -> Tensor:
    """Return class embeddings ``[len(ours) + 1, width]`` from ``trained [len(theirs) + 1, width]``.

    Classes are matched by name, other classes get the mean. The last row, of "no class", is kept.
    """
    if ours == theirs:  # names can occur twice
        return trained
    by_name, mean = dict(zip(theirs, trained)), trained[:-1].mean(dim=0)
    return torch.stack([*(by_name.get(name, mean) for name in ours), trained[-1]])


def _open_fitting(module: FAR, weights: str, autoencoder: Autoencoder, latents: Path) -> Pipeline:
    """Load a trained model whose backbone, grid and autoencoder are those of this training."""
    pipeline, source = Pipeline.from_pretrained(weights, device="cpu"), f"the model {weights}"
    theirs, ours = (_sizes(model) for model in (pipeline.model, module))
    for key in [*theirs, *ours]:
        if theirs.get(key) != (value := ours.get(key)):
            raise InputError(f"{source} has {key} {theirs.get(key)}, not {value}. Give both the same {key}")
    grids = [list(model.config.grid) for model in (pipeline.model, module)]
    if grids[0] != grids[1]:
        raise InputError(
            f"{source} was trained on {grids[0]} latents per image, but {latents} has {grids[1]}. "
            "Train on images of the same size"
        )
    if pipeline.autoencoder is not None and not pipeline.autoencoder.same_latents(autoencoder):
        raise InputError(f"{source} is of another autoencoder than {latents}. Set the same autoencoder_from")
    return pipeline


def _sizes(model: FAR) -> dict[str, Any]:
    """Return what a backbone's weights depend on, by recipe key."""
    network = model.config.network
    backbone = {key: value for key, value in to_dict(network.backbone).items() if key not in _TRAINING_ONLY}
    return {
        "network.backbone.kind": backbone.pop("kind"),
        **{f"network.backbone.{key}": value for key, value in backbone.items()},
        "network.patch": network.patch,
        "network.spherical": network.spherical,
        "latent_channels": model.config.latent_channels,
    }


def _same_shapes(theirs: Head, ours: Head) -> bool:
    """Return whether two heads are of one kind and their tensors have equal names and shapes."""
    shapes = [{name: tensor.shape for name, tensor in head.state_dict().items()} for head in (theirs, ours)]
    return theirs.config.kind == ours.config.kind and shapes[0] == shapes[1]
