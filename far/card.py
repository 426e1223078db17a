"""The model card: the ``README.md`` of a saved folder, made from the folder alone.

It says what ``config.json`` and the weights' headers say, and leaves out what they do not. A card that somebody wrote or
changed is theirs: it is not written again.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from far.classes import class_number
from far.errors import InputError
from far.files import atomic_path, read_json

_SEAL = "<!-- far wrote this card and renews it; once changed, it is kept as it is: {} -->\n"
_CLASSES_SHOWN = 20
_CITATION = (
    "The method is Hang et al., *Fast Autoregressive Models for Continuous Latent Generation*, "
    "[arXiv 2504.18391](https://arxiv.org/abs/2504.18391) (2025), on the foundation of Li et al., *Autoregressive Image Generation "
    "without Vector Quantization*, [arXiv 2406.11838](https://arxiv.org/abs/2406.11838) (2024)."
)


def write_card(folder: Path, name: str | None = None, license: str | None = None) -> None:
    """Write ``README.md`` into a pipeline's folder, unless there is one that somebody wrote or changed.

    Args:
        folder: holds ``config.json`` and the weights.
        name: under which the model is loaded; ``None`` is the folder itself.
        license: the hub's identifier of the weights' licence, such as ``"mit"``; ``None`` leaves it out.

    Raises:
        InputError: the card cannot be written.
    """
    path = folder / "README.md"
    if path.is_file() and not may_replace(path.read_text(encoding="utf-8", errors="replace")):
        return
    text = model_card(folder, name, license)
    with atomic_path(path) as temporary:
        temporary.write_text(text + _SEAL.format(_digest(text)), encoding="utf-8")


def may_replace(card: str) -> bool:
    """Whether a card holds nothing that somebody wrote: it is as :func:`write_card` left it, or has no text."""
    text, _, seal = card.rpartition("<!--")
    written_here = "<!--" + seal == _SEAL.format(_digest(text))
    return written_here or not re.sub(r"\A---\n.*?^---$", "", card, flags=re.DOTALL | re.MULTILINE).strip()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_card(folder: Path, name: str | None = None, license: str | None = None) -> str:
    """The card of a pipeline's folder as Markdown, with the entries that the hub reads before it."""
    config = read_json(folder / "config.json")
    network, classes = config["model"]["network"], config["classes"]
    head = {
        **({} if license is None else {"license": license}),
        "library_name": "far",
        # The hub's list of tasks has none with classes; this is where it keeps such models.
        "pipeline_tag": "unconditional-image-generation",
        "tags": [
            "image-generation",
            "class-conditional",
            "autoregressive",
            network["backbone"]["kind"],
            network["head"]["kind"],
        ],
    }
    shown = ", ".join(classes[:_CLASSES_SHOWN]) + (
        " … (all in `config.json`)" if len(classes) > _CLASSES_SHOWN else ""
    )
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        "# Image generator" if name is None else f"# {name.rpartition('/')[2].partition('@')[0]}",
        "An image generator that predicts continuous latent tokens, a group at a time. "
        f"{len(classes)} {'class' if len(classes) == 1 else 'classes'}: {shown}.",
        _use(config, name),
        "## Sizes\n\n" + _table(("what", "value"), _sizes(config, folder)),
        "## Sampling\n\nWhat is used where nothing else is asked for:\n\n"
        + _table(("setting", "value"), config["defaults"].items()),
        _training(config["training"]),
        _results(config["results"]),
        f"## Citation\n\n{_CITATION}",
        "" if license is None else f"## Licence\n\nOf the weights: `{license}`.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n\n"


def _use(config: dict[str, Any], name: str | None) -> str:
    if "autoencoder" not in config:
        return (
            "It has no autoencoder: `far convert kl16 kl16.ckpt FOLDER` adds MAR's to a copy of this folder."
        )
    load = 'far.load(".")  # this folder' if name is None else f'far.load("{name}")'
    return (
        "## Use\n\nWith the Python package `far-image` installed:\n\n```python\nimport far\n\n"
        f"pipeline = {load}\npictures = pipeline.generate(labels=[{_example(config['classes'])}], seed=0)  # Pillow images\n"
        'pictures[0].save("picture.png")\n```'
    )


def _example(classes: list[str]) -> str:
    """Return the first class as a label in Python: its name, unless that could mean another class too."""
    with contextlib.suppress(InputError):
        if class_number(classes, classes[0]) == 0:
            return json.dumps(classes[0], ensure_ascii=False)
    return "0"


def _sizes(config: dict[str, Any], folder: Path) -> Iterable[tuple[str, object]]:
    model, autoencoder = config["model"], config.get("autoencoder")
    network, (rows, columns) = model["network"], model["grid"]
    stride = 1 if autoencoder is None else 2 ** (len(autoencoder["width_multipliers"]) - 1)
    if autoencoder is not None:
        yield "images", f"{columns * stride} × {rows * stride} pixels"
    yield (
        "tokens",
        f"{rows * columns // network['patch'] ** 2} of {model['latent_channels'] * network['patch'] ** 2} channels",
    )
    yield "backbone, head", f"{network['backbone']['kind']}, {network['head']['kind']}"
    yield "parameters of the generator", f"{_parameters(folder / 'model.safetensors'):,}"
    if autoencoder is not None:
        yield "parameters of the autoencoder", f"{_parameters(folder / 'autoencoder.safetensors'):,}"


def _parameters(path: Path) -> int:
    """Of a safetensors file, whose header alone is read."""
    count = 0
    with safe_open(path, "numpy") as file:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            size = 1
            for side in file.get_slice(key).get_shape():
                size *= side
            count += size
    return count


def _training(facts: dict[str, Any], heading: str = "## Training") -> str:
    """What the trainer wrote, with the training of the models that it began from."""
    if not facts:
        return ""
    plain = [(key, value) for key, value in facts.items() if key not in ("recipe", "backbone", "teacher")]
    parts = [heading, _table(("what", "value"), plain)]
    if "recipe" in facts:
        parts.append(
            f"Every value of the recipe:\n\n```yaml\n{yaml.safe_dump(facts['recipe'], sort_keys=False, allow_unicode=True)}```"
        )
    for key in ("backbone", "teacher"):
        if isinstance(facts.get(key), dict):
            parts.append(
                _training(facts[key], f"#{heading.partition(' of ')[0]} of the {key} that it began from")
            )
    return "\n\n".join(parts)


def _results(results: dict[str, Any]) -> str:
    return (
        "## Results\n\nMeasured while training:\n\n" + _table(("figure", "value"), results.items())
        if results
        else ""
    )


def _table(titles: tuple[str, str], rows: Iterable[tuple[str, object]]) -> str:
    lines = [
        titles,
        ("---", "---"),
        *((key, f"{value:.5g}" if isinstance(value, float) else str(value)) for key, value in rows),
    ]
    return "\n".join(f"| {key} | {value} |" for key, value in lines)
