"""A trained model that a training starts from: what is copied, what is frozen, what is adapted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from far.classes import check_same_classes, matched_classes, shown_names
from far.config import to_dict
from far.errors import InputError, prefix_errors
from far.folder import ModelFolder
from far.heads import Head
from far.hub import is_hub_name
from far.model import FAR
from far.names import bundled_names
from far.pipeline import Pipeline
from far.tokenizer import Tokenizer
from far.training.adapters import add_adapters
from far.training.runs import checkpoints_folder, list_checkpoints

# Keys of a backbone that change its training only, not what its weights compute.
_TRAINING_ONLY = {"dropout", "mask_ratio_min", "mask_ratio_std", "raster_fraction", "input_noise"}
# Training facts of a model that started from another one.
_FACTS = ("started from", "model")


def copy_backbone(
    module: FAR, weights: str, autoencoder: Tokenizer, classes: list[str], latents: Path
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
    module: FAR,
    weights: str,
    autoencoder: Tokenizer,
    classes: list[str],
    latents: Path,
    frozen: Sequence[str] = (),
) -> tuple[dict[str, Any], bool]:
    """Copy a trained model's backbone, and its head if that fits, into ``module``.

    Return the facts, and whether the head was copied. Class embeddings are matched by name. New classes
    start from the mean of the trained ones. The parameters and errors are those of :func:`copy_backbone`, but
    the classes may differ. Parts that will be ``frozen`` (see :func:`freeze_parts`) must not be new.
    """
    pipeline = _open_fitting(module, weights, autoencoder, latents)
    trained, size = pipeline.model, pipeline.model.config.network.head
    with prefix_errors(f"the model {weights}: "):
        numbers = matched_classes(pipeline.classes, classes)
    new = [name for name, number in zip(classes, numbers) if number is None]
    dropped = [name for number, name in enumerate(pipeline.classes) if number not in numbers]
    if "class_embedding" in frozen and new:
        problem = f"the model {weights} has no class {new[0]!r}, so class_embedding must be trained"
        raise InputError(f"{problem}. Remove it from freeze")
    state = trained.backbone.state_dict()
    state["class_embedding.weight"] = match_embeddings(state["class_embedding.weight"], numbers)
    module.backbone.load_state_dict(state)
    fits = _same_shapes(trained.head, module.head)
    head = "head copied" if fits else f"new head (theirs is {size.kind}, {size.depth} blocks of {size.width})"
    if fits:
        module.head.load_state_dict(trained.head.state_dict())
    elif "head" in frozen:
        raise InputError(f"the model {weights} gives a {head}, to be trained. Remove head from freeze")
    facts = [f"{len(classes) - len(new)} classes matched"]
    for kind, names in (("new", new), ("dropped", dropped)):
        facts += [f"{len(names)} {kind} ({shown_names(names)})"] if names else []
    started = f"{local_name(weights)}: {', '.join([*facts, head])}"
    return {"started from": started, "model": pipeline.training}, fits


def freeze_parts(module: FAR, parts: Sequence[str], adapter_rank: int = 0) -> None:
    """Freeze parts of a model in place: ``class_embedding``, the rest of the ``backbone``, ``head``.

    With an ``adapter_rank``, low-rank adapters are added to the frozen backbone and trained.
    """
    if adapter_rank:
        add_adapters(module.backbone, adapter_rank)
    elif "backbone" in parts:
        module.backbone.requires_grad_(False)
    embedding = module.backbone.get_parameter("class_embedding.weight")
    embedding.requires_grad_("class_embedding" not in parts)
    module.head.requires_grad_("head" not in parts)


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


def match_embeddings(trained: Tensor, numbers: Sequence[int | None]) -> Tensor:
    """Return class embeddings ``[len(numbers) + 1, width]`` from ``trained [classes + 1, width]``.

    ``numbers`` are those of the trained classes. A new class (None) gets their mean. The last row, of "no
    class", is kept.
    """
    mean = trained[:-1].mean(dim=0)
    return torch.stack([*(mean if number is None else trained[number] for number in numbers), trained[-1]])


def _open_fitting(module: FAR, weights: str, autoencoder: Tokenizer, latents: Path) -> Pipeline:
    """Load a trained model whose backbone, grid and autoencoder are those of this training."""
    pipeline, source = Pipeline.from_pretrained(weights, device="cpu"), f"the model {weights}"
    theirs, ours = (_sizes(model) for model in (pipeline.model, module))
    keys = [key for key in theirs | ours if theirs.get(key) != ours.get(key)]
    if keys:
        if keys[0].endswith("kind"):  # then all of its values are others
            keys = [key for key in theirs if key.startswith("network.backbone.")]
        here = {key: f" (here {ours[key]})" for key in keys if key in ours}
        differences = ", ".join(f"{key}={theirs.get(key)}{here.get(key, '')}" for key in keys)
        raise InputError(f"{source} has {differences}. Give both the same values")
    grids = [list(model.config.grid) for model in (pipeline.model, module)]
    if grids[0] != grids[1]:
        raise InputError(
            f"{source} was trained on {grids[0]} latents per image, but {latents} has {grids[1]}. "
            "Train on images of the same size"
        )
    if pipeline.autoencoder is not None and not pipeline.autoencoder.same_latents(autoencoder):
        one, two = (model.config.latent_settings for model in (pipeline.autoencoder, autoencoder))
        which = ", ".join(key for key in one | two if one.get(key) != two.get(key))
        which = which or "the encoder's weights"
        problem = f"{source} is of another autoencoder than {latents} (different: {which})"
        raise InputError(f"{problem}. Set autoencoder_from={weights} and make the latents again")
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
