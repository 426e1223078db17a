"""FID's Inception-v3: names and shapes, resizing, pooling, preprocessing, and errors of loading.

The published weights are not available in tests. Names and shapes are compared with a table written from the
network's description, each peculiarity of the graph with brute force, and the whole network with features
that torch-fidelity computed from the same random weights.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from far.evaluation.inception import InceptionA, InceptionC, InceptionV3, load_inception, tensorflow_resize
from tests.refusals import refused

STEM = """
Conv2d_1a_3x3 32 3 3 3
Conv2d_2a_3x3 32 32 3 3
Conv2d_2b_3x3 64 32 3 3
Conv2d_3b_1x1 80 64 1 1
Conv2d_4a_3x3 192 80 3 3
"""
A = (
    "branch1x1 64 {i} 1 1|branch5x5_1 48 {i} 1 1|branch5x5_2 64 48 5 5|branch3x3dbl_1 64 {i} 1 1|"
    "branch3x3dbl_2 96 64 3 3|branch3x3dbl_3 96 96 3 3|branch_pool {p} {i} 1 1"
)
B = "branch3x3 384 288 3 3|branch3x3dbl_1 64 288 1 1|branch3x3dbl_2 96 64 3 3|branch3x3dbl_3 96 96 3 3"
C = (
    "branch1x1 192 768 1 1|branch7x7_1 {c} 768 1 1|branch7x7_2 {c} {c} 1 7|branch7x7_3 192 {c} 7 1|"
    "branch7x7dbl_1 {c} 768 1 1|branch7x7dbl_2 {c} {c} 7 1|branch7x7dbl_3 {c} {c} 1 7|"
    "branch7x7dbl_4 {c} {c} 7 1|branch7x7dbl_5 192 {c} 1 7|branch_pool 192 768 1 1"
)
D = (
    "branch3x3_1 192 768 1 1|branch3x3_2 320 192 3 3|branch7x7x3_1 192 768 1 1|branch7x7x3_2 192 192 1 7|"
    "branch7x7x3_3 192 192 7 1|branch7x7x3_4 192 192 3 3"
)
E = (
    "branch1x1 320 {i} 1 1|branch3x3_1 384 {i} 1 1|branch3x3_2a 384 384 1 3|branch3x3_2b 384 384 3 1|"
    "branch3x3dbl_1 448 {i} 1 1|branch3x3dbl_2 384 448 3 3|branch3x3dbl_3a 384 384 1 3|"
    "branch3x3dbl_3b 384 384 3 1|branch_pool 192 {i} 1 1"
)
BLOCKS = {
    "Mixed_5b": A.format(i=192, p=32), "Mixed_5c": A.format(i=256, p=64), "Mixed_5d": A.format(i=288, p=64),
    "Mixed_6a": B, "Mixed_6b": C.format(c=128), "Mixed_6c": C.format(c=160), "Mixed_6d": C.format(c=160),
    "Mixed_6e": C.format(c=192), "Mixed_7a": D, "Mixed_7b": E.format(i=1280), "Mixed_7c": E.format(i=2048),
}  # fmt: skip


def published_shapes() -> dict[str, tuple[int, ...]]:
    lines = STEM.split("\n") + [
        f"{block}.{line}" for block, text in BLOCKS.items() for line in text.split("|")
    ]
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, *sizes in (line.split() for line in lines if line.strip()):
        shapes[f"{name}.conv.weight"] = tuple(map(int, sizes))
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = (int(sizes[0]),)
    return shapes


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with the published names, without counters; RandomState's stream never changes."""
    random = np.random.RandomState(0)
    weights = {}
    for name, shape in published_shapes().items():
        normal = torch.from_numpy(random.standard_normal(shape)).float()
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 100
        weights[name] = (
            normal.abs() / 2 + 0.75
            if "running_var" in name or name.endswith("bn.weight")
            else normal * (2 / fan_in) ** 0.5
        )
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    return path


def test_names_and_shapes_are_the_published_ones() -> None:
    found = {
        name: tuple(tensor.shape)
        for name, tensor in InceptionV3().state_dict().items()
        if "num_batches_tracked" not in name
    }
    assert found == published_shapes()
    assert len(found) == 94 * 5 + 2
    # torchvision documents 27,161,264: less its auxiliary head, plus 8 classes.
    assert (
        sum(parameter.numel() for parameter in InceptionV3().parameters())
        == 27_161_264 - 3_326_696 + 8 * 2049
    )


@pytest.mark.parametrize(("height", "width", "size"), [(5, 7, 13), (16, 9, 7), (3, 3, 3), (1, 2, 4)])
def test_resize_equals_brute_force(height: int, width: int, size: int) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    expected = np.empty((2, 3, size, size))
    for row in range(size):
        for column in range(size):
            y, x = row * height / size, column * width / size
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            v, u = y - top, x - left
            pixel = images.double().numpy()
            upper = pixel[:, :, top, left] * (1 - u) + pixel[:, :, top, right] * u
            lower = pixel[:, :, bottom, left] * (1 - u) + pixel[:, :, bottom, right] * u
            expected[:, :, row, column] = upper * (1 - v) + lower * v
    np.testing.assert_allclose(tensorflow_resize(images, size), expected, atol=1e-5)


def brute_pool(x: Tensor, reduce) -> Tensor:  # type: ignore[no-untyped-def]
    result = torch.empty_like(x)
    for row in range(x.shape[2]):
        for column in range(x.shape[3]):
            window = x[:, :, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            result[:, :, row, column] = reduce(window.flatten(2))
    return result


@pytest.mark.parametrize(
    ("block", "reduce"),
    [
        (lambda: InceptionA(8, 4), lambda x: x.mean(dim=2)),
        (lambda: InceptionC(8, 4), lambda x: x.mean(dim=2)),
        (lambda: InceptionV3().Mixed_7b, lambda x: x.mean(dim=2)),
        (lambda: InceptionV3().Mixed_7c, lambda x: x.amax(dim=2)),
    ],
    ids=["A", "C", "first E", "last E"],
)
@torch.no_grad()
def test_pooling_of_the_blocks_equals_brute_force(block, reduce) -> None:  # type: ignore[no-untyped-def]
    block = block().eval()
    channels = block.branch_pool.conv.in_channels
    x = torch.randn(1, channels, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = block.branch_pool(brute_pool(x, reduce))
    torch.testing.assert_close(block(x)[:, -expected.shape[1] :], expected)


@torch.no_grad()
def test_branches_come_in_the_order_of_the_graph() -> None:
    """Features are compared by position, so each branch must have the position that it has in the graph."""
    block = InceptionV3().Mixed_7c.eval()
    x = torch.randn(1, 2048, 3, 3, generator=torch.Generator().manual_seed(0))
    parts = block(x).split([320, 384, 384, 384, 384, 192], dim=1)
    torch.testing.assert_close(parts[0], block.branch1x1(x))
    torch.testing.assert_close(parts[1], block.branch3x3_2a(block.branch3x3_1(x)))
    torch.testing.assert_close(parts[4], block.branch3x3dbl_3b(block.branch3x3dbl_2(block.branch3x3dbl_1(x))))


def test_batch_norms_have_the_epsilon_of_tensorflow() -> None:
    norms = [module for module in InceptionV3().modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 94
    assert all(norm.eps == 1e-3 for norm in norms)


@torch.no_grad()
def test_pixels_are_scaled_as_in_the_graph(weights_file: Path) -> None:
    network = load_inception(weights_file)
    seen: list[Tensor] = []
    network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.stack([torch.full((3, 20, 20), value) for value in (0, 1, 0.3)])
    network(images)
    assert seen[0].shape == (3, 3, 299, 299)
    torch.testing.assert_close(seen[0][0], torch.full((3, 299, 299), -1.0))
    torch.testing.assert_close(seen[0][1], torch.full((3, 299, 299), 127 / 128))
    torch.testing.assert_close(
        seen[0][2], torch.full((3, 299, 299), (76.5 - 128) / 128)
    )  # not rounded to 8 bits


# Features 0, 256, ... of two images (rows) by torch-fidelity 0.4.0, an independent implementation:
# FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights_file)
TORCH_FIDELITY = [
    [0.0, 2.0117, 76.267, 75.8343, 29.1398, 18.4054, 2.681, 25.0439],
    [0.0, 2.0836, 64.3028, 72.2951, 27.4364, 16.836, 3.6011, 27.957],
]


@torch.no_grad()
def test_features_equal_those_of_torch_fidelity(weights_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("far.evaluation.features._CPU_CHUNK", 1)
    pixels = np.random.RandomState(1).randint(0, 256, (2, 3, 40, 56))
    pixels[1] //= 3
    features = load_inception(weights_file)(torch.from_numpy(pixels).float() / 255)
    torch.testing.assert_close(features[:, ::256], torch.tensor(TORCH_FIDELITY), rtol=1e-4, atol=1e-4)


def test_counters_of_batch_norms_are_ignored(tmp_path: Path, weights_file: Path) -> None:
    weights = torch.load(weights_file, weights_only=True)
    norms = [name.removesuffix("running_mean") for name in weights if name.endswith("running_mean")]
    torch.save(
        {**weights, **{f"{norm}num_batches_tracked": torch.tensor(5) for norm in norms}},
        tmp_path / "counters.pth",
    )
    found = load_inception(tmp_path / "counters.pth").state_dict()
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor)


@torch.no_grad()
def test_logits_are_the_features_times_the_weights(weights_file: Path) -> None:
    network = load_inception(weights_file)
    images = torch.rand(3, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    features = network(images)
    assert features.shape == (3, 2048)
    assert features.std(dim=0).max() > 0
    torch.testing.assert_close(network(images[1:2]), features[1:2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        network.logits(features), features @ torch.load(weights_file, weights_only=True)["fc.weight"].T
    )
    assert not any(parameter.requires_grad for parameter in network.parameters())


def change(weights: dict[str, Tensor], kind: str) -> object:
    if kind == "a list":
        return [1, 2]
    if kind == "missing":
        del weights["Mixed_7c.branch1x1.conv.weight"]
    elif kind == "missing norm":
        del weights["Mixed_5b.branch1x1.bn.running_var"]
    elif kind == "unexpected":
        weights["AuxLogits.fc.weight"] = torch.zeros(1)
    elif kind == "torchvision's classes":
        weights["fc.weight"] = torch.zeros(1000, 2048)
    elif kind == "no tensor":
        weights["fc.bias"] = 3.0  # type: ignore[assignment]
    return weights


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("a list", ""),
        ("missing", "Mixed_7c.branch1x1.conv.weight"),
        ("missing norm", "Mixed_5b.branch1x1.bn.running_var"),
        ("unexpected", "AuxLogits.fc.weight"),
        ("torchvision's classes", "[1008, 2048]"),
        ("no tensor", "fc.bias"),
    ],
)
def test_other_networks_are_refused(tmp_path: Path, weights_file: Path, kind: str, named: str) -> None:
    weights = torch.load(weights_file, weights_only=True)
    torch.save(change(weights, kind), tmp_path / "other.pth")
    with refused("other.pth", named, "pt_inception-2015-12-05-6726825d.pth"):
        load_inception(tmp_path / "other.pth")


class Foreign:
    """Not a tensor."""


def test_damaged_and_foreign_files_are_refused(tmp_path: Path, weights_file: Path) -> None:
    with refused("none.pth"):
        load_inception(tmp_path / "none.pth")
    content = weights_file.read_bytes()
    for name, damaged in (("cut", content[: len(content) // 2]), ("empty", b""), ("text", b"not weights")):
        (tmp_path / f"{name}.pth").write_bytes(damaged)
        with refused(f"{name}.pth"):
            load_inception(tmp_path / f"{name}.pth")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "old.pth").read_bytes()
    for length in range(len(content)):  # the format before torch 1.6, where errors differ by length
        (tmp_path / "old.pth").write_bytes(content[:length])
        with refused("old.pth"):
            load_inception(tmp_path / "old.pth")
    torch.save({"fc.weight": Foreign()}, tmp_path / "foreign.pth")
    with refused("foreign.pth"):
        load_inception(tmp_path / "foreign.pth")
