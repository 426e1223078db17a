"""FID's Inception-v3: the network of TensorFlow's graph of 2015-12-05, with pytorch-fid's parameter names.

It differs from torchvision's: it has 1,008 classes, its average pooling excludes padding, its last block uses
max pooling, and images are resized as in TensorFlow 1. Users supply the weights
(``pt_inception-2015-12-05-6726825d.pth``). The distances are in ``far.evaluation.metrics``.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from far.errors import InputError
from far.evaluation.features import FID_NETWORK, frozen, in_chunks
from far.files import sha256
from far.pickles import is_held, read_pickle

INPUT_SIZE = 299
CLASSES = 1008
_ROW, _COLUMN = (1, 7), (7, 1)


class InceptionV3(nn.Module):
    """Inception-v3 that returns pooled features and class logits; submodules have the published names."""

    name = FID_NETWORK
    dimensions = 2048
    digest = ""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = NormedConv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = NormedConv(32, 32, 3)
        self.Conv2d_2b_3x3 = NormedConv(32, 64, 3, same=True)
        self.Conv2d_3b_1x1 = NormedConv(64, 80, 1)
        self.Conv2d_4a_3x3 = NormedConv(80, 192, 3)
        self.Mixed_5b = InceptionA(192, pool_width=32)
        self.Mixed_5c = InceptionA(256, pool_width=64)
        self.Mixed_5d = InceptionA(288, pool_width=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, width=128)
        self.Mixed_6c = InceptionC(768, width=160)
        self.Mixed_6d = InceptionC(768, width=160)
        self.Mixed_6e = InceptionC(768, width=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, pool=_average_pool)
        self.Mixed_7c = InceptionE(2048, pool=_max_pool)
        self.fc = nn.Linear(self.dimensions, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return pooled features ``[n, 2048]`` of images ``[n, 3, h, w]`` in [0, 1], at 299 pixels."""
        return in_chunks(self._features, images.to(self.fc.weight.device))

    def logits(self, features: Tensor) -> Tensor:
        """Return class logits ``[n, 1008]`` without bias, as the Inception Score on this graph uses them."""
        return F.linear(features.to(self.fc.weight.device), self.fc.weight)

    def _features(self, images: Tensor) -> Tensor:
        x = (tensorflow_resize(images * 255, INPUT_SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))


class NormedConv(nn.Module):
    """Convolution without bias, then batch norm and ReLU. ``same`` padding keeps height and width."""

    def __init__(
        self, channels: int, width: int, kernel: int | tuple[int, int], stride: int = 1, *, same: bool = False
    ) -> None:
        super().__init__()
        rows, columns = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (rows // 2, columns // 2) if same else 0
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class InceptionA(nn.Module):
    """Block at 35 × 35 with branches 1×1, 5×5, two 3×3, and pooling."""

    def __init__(self, channels: int, pool_width: int) -> None:
        super().__init__()
        self.branch1x1 = NormedConv(channels, 64, 1)
        self.branch5x5_1 = NormedConv(channels, 48, 1)
        self.branch5x5_2 = NormedConv(48, 64, 5, same=True)
        self.branch3x3dbl_1 = NormedConv(channels, 64, 1)
        self.branch3x3dbl_2 = NormedConv(64, 96, 3, same=True)
        self.branch3x3dbl_3 = NormedConv(96, 96, 3, same=True)
        self.branch_pool = NormedConv(channels, pool_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average_pool(x))], dim=1)


class InceptionB(nn.Module):
    """Block that reduces 35 × 35 to 17 × 17."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = NormedConv(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = NormedConv(channels, 64, 1)
        self.branch3x3dbl_2 = NormedConv(64, 96, 3, same=True)
        self.branch3x3dbl_3 = NormedConv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionC(nn.Module):
    """Block at 17 × 17 with branches 1×1, one and two 7×7 factored into rows and columns, and pooling."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.branch1x1 = NormedConv(channels, 192, 1)
        self.branch7x7_1 = NormedConv(channels, width, 1)
        self.branch7x7_2 = NormedConv(width, width, _ROW, same=True)
        self.branch7x7_3 = NormedConv(width, 192, _COLUMN, same=True)
        self.branch7x7dbl_1 = NormedConv(channels, width, 1)
        self.branch7x7dbl_2 = NormedConv(width, width, _COLUMN, same=True)
        self.branch7x7dbl_3 = NormedConv(width, width, _ROW, same=True)
        self.branch7x7dbl_4 = NormedConv(width, width, _COLUMN, same=True)
        self.branch7x7dbl_5 = NormedConv(width, 192, _ROW, same=True)
        self.branch_pool = NormedConv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average_pool(x))], dim=1)


class InceptionD(nn.Module):
    """Block that reduces 17 × 17 to 8 × 8."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = NormedConv(channels, 192, 1)
        self.branch3x3_2 = NormedConv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = NormedConv(channels, 192, 1)
        self.branch7x7x3_2 = NormedConv(192, 192, _ROW, same=True)
        self.branch7x7x3_3 = NormedConv(192, 192, _COLUMN, same=True)
        self.branch7x7x3_4 = NormedConv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), long, F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionE(nn.Module):
    """Block at 8 × 8 with branches that end in a row and a column; its two uses differ in ``pool``."""

    def __init__(self, channels: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = NormedConv(channels, 320, 1)
        self.branch3x3_1 = NormedConv(channels, 384, 1)
        self.branch3x3_2a = NormedConv(384, 384, (1, 3), same=True)
        self.branch3x3_2b = NormedConv(384, 384, (3, 1), same=True)
        self.branch3x3dbl_1 = NormedConv(channels, 448, 1)
        self.branch3x3dbl_2 = NormedConv(448, 384, 3, same=True)
        self.branch3x3dbl_3a = NormedConv(384, 384, (1, 3), same=True)
        self.branch3x3dbl_3b = NormedConv(384, 384, (3, 1), same=True)
        self.branch_pool = NormedConv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        forks = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        forks += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *forks, self.branch_pool(self.pool(x))], dim=1)


def tensorflow_resize(images: Tensor, size: int) -> Tensor:
    """Resize ``[n, c, h, w]`` to ``[n, c, size, size]`` bilinearly, as TensorFlow 1 does by default.

    Output pixel i is at i · (input / output), without half-pixel centers and without antialiasing.
    """
    for axis in (2, 3):
        length = images.shape[axis]
        place = torch.arange(size, device=images.device, dtype=torch.float32) * (length / size)
        lower = place.long().clamp(max=length - 1)
        weight = (place - lower).to(images.dtype).view([-1 if other == axis else 1 for other in range(4)])
        low = images.index_select(axis, lower)
        high = images.index_select(axis, (lower + 1).clamp(max=length - 1))
        images = low + weight * (high - low)
    return images


def load_inception(path: Path) -> InceptionV3:
    """Load the network with the published state dict, in evaluation mode, with frozen weights.

    Raises:
        InputError: the file is missing, damaged, or of another network.
    """
    remedy = "Download pt_inception-2015-12-05-6726825d.pth, as published for pytorch-fid"
    try:
        weights = read_pickle(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist. {remedy}") from error
    except Exception as error:  # torch.load raises almost anything on damaged files: IndexError, struct.error
        raise InputError(f"{path} is damaged or has more than tensors. {remedy}") from error
    if not isinstance(weights, dict):
        raise InputError(f"{path} is not a state dict. {remedy}")
    network = InceptionV3()
    expected = network.state_dict()
    # The counters of the batch norms are unused, and may be missing in the file.
    weights = {name: expected[name] for name in expected if name.endswith("num_batches_tracked")} | weights
    differing = sorted(map(str, weights.keys() ^ expected.keys()))
    if differing:
        raise InputError(f"{path} has another network: {differing[0]} is in only one of the two. {remedy}")
    for name, tensor in expected.items():
        if not is_held(weights[name]) or weights[name].is_complex() or weights[name].shape != tensor.shape:
            raise InputError(f"{path} has another network: {name} is not {list(tensor.shape)}. {remedy}")
    network.load_state_dict(weights)
    network.digest = sha256(path)
    # The name of a published file ends with the first digits of its checksum. Its pickle has no other.
    if (named := re.search(r"-([0-9a-f]{8})\.pth$", path.name)) and not network.digest.startswith(named[1]):
        raise InputError(f"{path} is damaged (its checksum differs from the one in its name). {remedy}")
    return frozen(network)
