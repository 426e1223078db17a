"""The model card: the ``README.md`` of a saved folder, made from the folder alone.

It states what ``config.json`` and the headers of the weights hold, and leaves out the rest. A card that
somebody wrote is never overwritten.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors import safe_open

from far.classes import class_number
from far.config import to_dict
from far.diffusers_config import DiffusersConfig
from far.errors import InputError
from far.files import atomic_path
from far.folder_config import FolderConfig

_MARK = (
    "<!-- far writes this card again whenever the model is saved. Delete this line to keep your edits. -->"
)
_CLASSES_SHOWN = 20
# Libraries that load a folder, with the files of generator and autoencoder in it.
Library = Literal["far", "diffusers"]
_WEIGHTS: dict[Library, tuple[str, str]] = {
    "far": ("model.safetensors", "autoencoder.safetensors"),
    "diffusers": (
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ),
}
_CITATION = (
    "The method is Hang et al., *Fast Autoregressive Models for Continuous Latent Generation*, "
    "[arXiv 2504.18391](https://arxiv.org/abs/2504.18391) (2025). It builds on Li et al., "
    "*Autoregressive Image Generation without Vector Quantization*, "
    "[arXiv 2406.11838](https://arxiv.org/abs/2406.11838) (2024)."
)


def write_card(folder: Path, config: FolderConfig) -> None:
    """Write ``README.md`` into a generator's folder, unless somebody wrote one (see :func:`may_replace`).

    Raises:
        InputError: the card cannot be written.
    """
    path = folder / "README.md"
    if path.is_file() and not may_replace(path.read_text(encoding="utf-8", errors="replace")):
        return
    with atomic_path(path) as temporary:
        temporary.write_text(model_card(folder, config), encoding="utf-8")


def may_replace(card: str) -> bool:
    """Return whether a card is marked as generated, or has no text besides the entries for the hub."""
    text = re.sub(r"\A---\n.*?^---$", "", card, flags=re.DOTALL | re.MULTILINE)
    return not text.strip() or _MARK in card.splitlines()


def model_card(
    folder: Path,
    config: FolderConfig,
    name: str | None = None,
    license: str | None = None,
    *,
    library: Library = "far",
) -> str:
    """Return the card of a generator's folder as Markdown, beginning with the entries that the hub reads.

    Args:
        folder: holds the weights, whose headers are read.
        config: the content of its ``config.json``.
        name: ``OWNER/NAME`` from which the model will be loaded; None is the folder itself.
        license: the hub's identifier of the license of the weights, such as ``"mit"``; None leaves it out.
        library: the library that loads the folder.
    """
    from huggingface_hub import ModelCardData

    assert config.model is not None
    network, classes = config.model.network, config.classes
    kinds = network.backbone.kind, network.head.kind
    entries = ModelCardData(
        license=license,
        library_name=library,
        # The hub has no task for images from class labels. It files such models here.
        pipeline_tag="unconditional-image-generation",
        tags=["image-generation", "class-conditional", "autoregressive", *kinds],
    )
    defaults = [(key, value) for key, value in to_dict(config.defaults).items() if value is not None]
    shown = ", ".join(classes[:_CLASSES_SHOWN])
    if len(classes) > _CLASSES_SHOWN:
        shown += " … (all in `config.json`)"
    sections = [
        f"---\n{entries.to_yaml()}\n---",
        _MARK,
        "# Image generator" if name is None else f"# {name.rpartition('/')[2].partition('@')[0]}",
        "An image generator that predicts continuous latent tokens, several at a time. "
        f"{len(classes)} {'class' if len(classes) == 1 else 'classes'}: {shown}.",
        _use(config, name) if library == "far" else _use_diffusers(config, name),
        "## Sizes\n\n" + _table(("property", "value"), _sizes(config, folder, *_WEIGHTS[library])),
        "## Sampling\n\nDefault values:\n\n" + _table(("option", "value"), defaults),
        _training(config.training),
        _results(config.results),
        f"## Citation\n\n{_CITATION}",
        "" if license is None else f"## License\n\nThe license of the weights: `{license}`.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _use(config: FolderConfig, name: str | None) -> str:
    if config.autoencoder is None:
        return "It has no autoencoder. `far convert kl16 kl16.ckpt FOLDER` adds MAR's to a copy of it."
    extra, source = "", config.autoencoder
    package = "Python package `far-image`"
    if isinstance(source, DiffusersConfig):
        package = "Python package `far-image[diffusers]`"
        if not source.included:
            extra = f"\n\nIts autoencoder is read from `{source.source}`, which must not change."
    load = 'far.load(".")  # this folder' if name is None else f'far.load("{name}")'
    return (
        f"## Use\n\nWith the {package} installed:\n\n```python\nimport far\n\n"
        f"pipeline = {load}\n"
        f"images = pipeline.generate(labels=[{_example(config.classes)}], seed=0)  # Pillow images\n"
        'images[0].save("image.png")\n```' + extra
    )


def _use_diffusers(config: FolderConfig, name: str | None) -> str:
    repository, _, revision = (name or ".").partition("@")
    source = f'"{repository}"' + (f', revision="{revision}"' if revision else "")
    return (
        "## Use\n\nWith the Python package `far-image[diffusers]` installed, which the pipeline's code calls:"
        "\n\n```python\nimport torch\nfrom diffusers import DiffusionPipeline\n\n"
        f"pipeline = DiffusionPipeline.from_pretrained({source}, trust_remote_code=True)\n"
        "generator = torch.Generator().manual_seed(0)\n"
        f"images = pipeline(class_labels=[{_example(config.classes)}], generator=generator).images\n"
        'images[0].save("image.png")\n```'
    )


def _example(classes: tuple[str, ...]) -> str:
    """Return the first class as a label in Python: its name, unless that could mean another class too."""
    with contextlib.suppress(InputError):
        if class_number(classes, classes[0]) == 0:
            return json.dumps(classes[0], ensure_ascii=False)
    return "0"


def _sizes(
    config: FolderConfig, folder: Path, generator: str, autoencoder_file: str
) -> Iterable[tuple[str, object]]:
    model, autoencoder = config.model, config.autoencoder
    assert model is not None
    if autoencoder is not None:
        rows, columns = model.grid
        yield "images", f"{columns * autoencoder.stride} × {rows * autoencoder.stride} pixels"
    yield "tokens", f"{model.tokens} of {model.token_channels} channels"
    yield "backbone, head", f"{model.network.backbone.kind}, {model.network.head.kind}"
    yield "parameters of the generator", f"{_parameters(folder / generator):,}"
    if isinstance(autoencoder, DiffusersConfig):
        yield "autoencoder", f"`{autoencoder.class_name}` of diffusers, from `{autoencoder.source}`"
    if autoencoder is not None and (folder / autoencoder_file).exists():
        yield "parameters of the autoencoder", f"{_parameters(folder / autoencoder_file):,}"


def _parameters(path: Path) -> int:
    """Return the number of values in a safetensors file, from its header alone."""
    with safe_open(path, "numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _training(facts: dict[str, Any], heading: str = "## Training") -> str:
    """Return the facts that the trainer stored, followed by those of the models that it started from."""
    if not facts:
        return ""
    sources = ("backbone", "teacher", "model")
    plain = [(key, value) for key, value in facts.items() if key not in ("recipe", *sources)]
    parts = [heading, _table(("fact", "value"), plain)]
    if "recipe" in facts:
        recipe = yaml.safe_dump(facts["recipe"], sort_keys=False, allow_unicode=True)
        parts.append(f"Every value of the recipe:\n\n```yaml\n{recipe}```")
    for key in sources:
        if isinstance(facts.get(key), dict):
            level = heading.partition(" ")[0]
            parts.append(_training(facts[key], f"#{level} Training of the {key} that it started from"))
    return "\n\n".join(parts)


def _results(results: dict[str, Any]) -> str:
    if not results:
        return ""
    return "## Results\n\nMeasured while training:\n\n" + _table(("figure", "value"), results.items())


def _table(titles: tuple[str, str], rows: Iterable[tuple[str, object]]) -> str:
    shown = [(key, f"{value:.5g}" if isinstance(value, float) else str(value)) for key, value in rows]
    return "\n".join(f"| {key} | {value} |" for key, value in [titles, ("---", "---"), *shown])
