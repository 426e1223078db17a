"""Figures of one evaluation: features → a dictionary whose keys name the network."""

import dataclasses
import math

import torch
from torch import Tensor

from far.errors import InputError
from far.evaluation import metrics
from far.evaluation.features import FID_NETWORK, Extractor
from far.evaluation.metrics import LEAST_IMAGES, LEAST_REFERENCES, FeatureStatistics, Overlap
from far.evaluation.references import Reference
from far.seeds import seeded_generator

# Published scores have 10 splits of 50,000 images. Here 10,000 images have 10 splits, fewer have one.
_SPLITS, _SPLIT_IMAGES = 10, 1000
_CONTROLS = 100
# If images without content score above this, a figure means little. Real images score about 0.9 or 1.
_MEANINGLESS = 0.1


@dataclasses.dataclass(frozen=True)
class Report:
    """Figures of one evaluation.

    Attributes:
        figures: values by name, which includes the network.
        controls: precision, recall, density and coverage of each kind of images without content.
        warnings: one line each.
    """

    figures: dict[str, float]
    controls: dict[str, dict[str, float]]
    warnings: list[str]


def distance_name(extractor: Extractor) -> str:
    """Return ``FID`` for FID's network, ``FD (…)`` for any other."""
    return "FID" if extractor.name == FID_NETWORK else f"FD ({extractor.name})"


def report(features: Tensor, reference: Reference, extractor: Extractor, *, seed: int = 0) -> Report:
    """Compute all figures of ``features [n, d]``.

    ``seed`` determines subsets, splits and controls. KID, precision, recall, density and coverage need the
    reference's features.

    Raises:
        InputError: a side has too few images.
    """
    check_counts(len(features), reference)
    generator = seeded_generator(seed)
    name = distance_name(extractor)
    suffix = "" if name == "FID" else f" ({extractor.name})"
    distance = metrics.frechet_distance(FeatureStatistics.of(features), reference.statistics)
    figures = {name: distance, **_biases(name, features, reference, seed)}
    warnings = _bias_warnings(name, figures, len(features), reference, features.shape[1])
    enough = len(features) >= _SPLITS * _SPLIT_IMAGES
    score = metrics.inception_score(
        extractor.logits(features).cpu(), generator, splits=_SPLITS if enough else 1
    )
    figures[f"IS{suffix}"] = score.value
    if score.error is not None:
        figures[f"IS std over splits{suffix}"] = score.error
    if reference.features is None:
        missing = "KID, precision, recall, density and coverage"
        warnings.append(f"{reference.source} has no features, so there is no {missing}")
        return Report(figures, {}, warnings)
    kernel = metrics.kernel_distance(features, reference.features, generator)
    figures[f"KID{suffix}"] = kernel.value
    if kernel.error is not None:
        figures[f"KID standard error{suffix}"] = kernel.error
    neighborhoods = metrics.Neighborhoods(reference.features)
    overlap = neighborhoods.overlap(features)
    figures |= {f"{key}{suffix}": value for key, value in dataclasses.asdict(overlap).items()}
    controls = {
        kind: dataclasses.asdict(neighborhoods.overlap(extractor(images).cpu()))
        for kind, images in _control_images(min(_CONTROLS, len(features)), seed).items()
    }
    warnings += _control_warnings(overlap, controls, len(reference.features))
    return Report(figures, controls, warnings)


def check_counts(count: int, reference: Reference) -> None:
    """Raise an :class:`InputError` if ``count`` images are too few to compare with the reference."""
    if reference.features is None:
        if count < 2:
            raise InputError(f"A Fréchet distance needs two images or more, got {count}. Give more images")
    elif count < LEAST_IMAGES or len(reference.features) < LEAST_REFERENCES:
        few = f"{count} images and {len(reference.features)} of the reference are too few"
        least = f"{LEAST_IMAGES} images and {LEAST_REFERENCES} of the reference"
        raise InputError(f"{few}. Give at least {least}")


def _biases(name: str, features: Tensor, reference: Reference, seed: int) -> dict[str, float]:
    """Return the distance of real images at these counts, and the bias of a small reference."""
    generator = seeded_generator(seed, 1)
    if reference.features is None:
        floor = metrics.frechet_bias(reference.statistics, len(features), generator)
    else:
        references = reference.count or math.inf
        floor = metrics.frechet_floor(reference.features, len(features), references, generator)
    biases = {f"floor of {name}": floor}
    if reference.count is not None and reference.count < features.shape[1]:
        # So few real images do not show their spread, so the spread of the compared images is used.
        bias = metrics.frechet_bias(FeatureStatistics.of(features), reference.count, generator)
        biases[f"bias of {name} by the reference"] = bias
    return biases


def _bias_warnings(
    name: str, figures: dict[str, float], count: int, reference: Reference, dimensions: int
) -> list[str]:
    def part(bias: str) -> str:  # an estimate can exceed the distance
        return f"{min(figures[bias], figures[name]):.1f} of the distance {figures[name]:.1f} is bias"

    warnings = []
    fewer = f"fewer than the {dimensions} features"
    if count < dimensions:
        least = part(f"floor of {name}")
        warnings.append(f"{count} images are {fewer}: at least {least}. Compare equal numbers only.")
    if (bias := f"bias of {name} by the reference") in figures:
        about = ("at least " if count < dimensions else "about ") + part(bias)
        start = f"the reference's {reference.count} images are {fewer}"
        warnings.append(f"{start}: {about} for that reason. Use a larger reference.")
    return warnings


def _control_images(count: int, seed: int) -> dict[str, Tensor]:
    """Return images without content, ``[count, 3, 8, 8]`` in [0, 1], 8 bits. The network enlarges them."""
    generator = seeded_generator(seed, 2)
    flat = torch.rand(count, 3, 1, 1, generator=generator).expand(-1, -1, 8, 8)
    # Noise of every pixel is this faint after so wide a blur.
    noise = 0.5 + 0.1 * (torch.rand(count, 3, 8, 8, generator=generator) - 0.5)
    images = {"flat colors": flat, "blurred noise": noise}
    return {kind: (pixels * 255).round() / 255 for kind, pixels in images.items()}


def _control_warnings(overlap: Overlap, controls: dict[str, dict[str, float]], count: int) -> list[str]:
    """Return one line if images without content score well, so that the figures mean little."""
    shown = []
    for key, value in dataclasses.asdict(overlap).items():
        kind = max(controls, key=lambda kind: controls[kind][key])
        if controls[kind][key] > _MEANINGLESS:
            shown.append(f"{key} {value:.2f} ({kind}: {controls[kind][key]:.2f})")
    start = f"images without content score too, so against {count} images these figures mean little"
    return [f"{start}: {', '.join(shown)}"] if shown else []
