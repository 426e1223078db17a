"""Plain mistakes in Python: accepted values give the right images, refused ones are named in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import far
from far.editing import box_mask, place
from far.errors import InputError, NotFiniteError, prefix_errors
from far.pictures import to_uint8
from far.pipeline import Pipeline


@pytest.fixture
def pipeline(pipeline_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(pipeline_folder)


def refusal(call: Any) -> str:
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "labels",
    [
        ["square", "circle"],
        (1, 0),
        np.array([1, 0]),
        torch.tensor([1, 0]),
        [np.int64(1), torch.tensor(0)],
        range(1, -1, -1),
        iter([1, 0]),
    ],
)
def test_labels_of_any_sequence_draw_the_same_images(pipeline: Pipeline, labels: Any) -> None:
    expected = pipeline.generate([1, 0], output="tensor")
    assert torch.equal(pipeline.generate(labels, output="tensor"), expected)


@pytest.mark.parametrize(
    "seed", [5, np.int32(5), torch.tensor(5), [5, 6], np.array([5, 6]), torch.tensor([5, 6]), range(5, 7)]
)
def test_seeds_of_any_integer_type_draw_the_same_images(pipeline: Pipeline, seed: Any) -> None:
    expected = pipeline.draw([1, 0], [5, 6])
    assert torch.equal(pipeline.generate([1, 0], seed=seed, output="tensor"), expected)


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ([1.9], "1.9"),
        ([True], "True"),
        (3, "3"),
        ("circle", "circle"),
        (b"01", "01"),
        (None, "None"),
        ([None], "None"),
        ([[1]], "[1]"),
        ([], ""),
    ],
)
def test_wrong_labels_are_named(pipeline: Pipeline, labels: Any, named: str) -> None:
    assert named in refusal(lambda: pipeline.generate(labels))
    assert named in refusal(lambda: pipeline.draw(labels, [0]))


@pytest.mark.parametrize("seed", [1.5, True, "7", None, [1.5], [True], -1, 2**63, b"7", [[1]]])
def test_wrong_seeds_are_named(pipeline: Pipeline, seed: Any) -> None:
    assert str(seed).strip("[]b'") in refusal(lambda: pipeline.generate([0], seed=seed))


def test_seed_too_large_for_the_next_image_is_refused(pipeline: Pipeline) -> None:
    pipeline.generate([0], seed=2**63 - 1)
    assert str(2**63) in refusal(lambda: pipeline.generate([0, 1], seed=2**63 - 1))


@pytest.mark.parametrize(
    "values",
    [
        {"ar_steps": 2.5},
        {"head_steps": "4"},
        {"guidance": "2"},
        {"order": 3},
        {"refresh_every": True},
        {"batch_size": 1.5},
        {"batch_size": 0},
    ],
)
def test_sampling_value_of_another_type_is_named(pipeline: Pipeline, values: dict[str, Any]) -> None:
    ((name, value),) = values.items()
    for part in (name, str(value)):
        assert part in refusal(lambda: pipeline.generate([0], **values))
    if name != "batch_size":
        assert name in refusal(lambda: pipeline.draw([0], [0], far.SamplingConfig(**values)))


def test_sampling_values_of_numpy_and_tensors_work(pipeline: Pipeline) -> None:
    expected = pipeline.generate([0], ar_steps=2, guidance=2.0, head_steps=(2, 1), output="tensor")
    given = {"ar_steps": np.int64(2), "guidance": torch.tensor(2.0)}
    for head_steps in ([2, 1], np.array([2, 1]), torch.tensor([2, 1])):
        drawn = pipeline.generate([0], output="tensor", head_steps=head_steps, **given)
        assert torch.equal(drawn, expected)


def test_edit_takes_images_and_masks_of_pillow_numpy_and_torch_alike(pipeline: Pipeline) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16), dtype=bool)
    mask[:8] = True
    floats = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    expected = pipeline.edit(floats, torch.from_numpy(mask), 1, output="tensor")
    white = Image.fromarray(mask.astype(np.uint8) * 255)
    for image in (Image.fromarray(pixels), pixels, floats.numpy(), floats.double()):
        for painted in (
            white, mask, mask.astype(np.float32), mask.astype(np.uint8) * 255,
            np.asarray(white.convert("RGB")),
            mask[..., None], mask[None], mask[..., None].astype(np.int64),
        ):  # fmt: skip
            assert torch.equal(pipeline.edit(image, painted, 1, output="tensor"), expected)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("picture.png", np.ones((16, 16))),
        ([[0.0]], np.ones((16, 16))),
        (np.full((3, 16, 16), np.nan), np.ones((16, 16))),
        (np.zeros((3, 16, 16)), None),
        (np.zeros((3, 16, 16)), np.full((16, 16), np.nan)),
        (np.zeros((3, 16, 16), dtype=object), np.ones((16, 16))),
        (np.zeros((3, 16, 16), dtype=np.uint32), np.eye(16)),
        (np.zeros((3, 16, 16), dtype=np.dtype(float).newbyteorder()), np.eye(16)),
        (np.zeros((3, 16, 16)), np.eye(16, dtype=np.longdouble)),
        (np.zeros((3, 16, 16)), np.zeros((16, 16, 3))),
        (Image.fromarray(np.full((16, 16), np.nan, np.float32)), np.eye(16)),
    ],
)
def test_edit_refuses_values_that_are_not_images_or_masks(pipeline: Pipeline, image: Any, mask: Any) -> None:
    refusal(lambda: pipeline.edit(image, mask, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_never_become_images(pipeline: Pipeline, value: float) -> None:
    assert pipeline.autoencoder is not None
    with torch.no_grad():
        pipeline.autoencoder.decoder.conv_out.bias[1] = value
    image, mask = np.zeros((3, 16, 16)), np.eye(16)[:, ::-1].copy()
    mask[:, 8:] = 0
    for call in (
        lambda: pipeline.generate([0, 1]),
        lambda: pipeline.generate([0], output="tensor"),
        lambda: pipeline.edit(image, mask, 1),
        lambda: pipeline.preview(next(pipeline.stream([0], [0]))),
    ):
        with pytest.raises(NotFiniteError):
            call()


def test_error_with_a_prefix_keeps_its_class() -> None:
    with pytest.raises(NotFiniteError, match=r"^model: image 1$"), prefix_errors("model: "):
        raise NotFiniteError("image 1")


def test_one_value_of_one_image_is_found_and_named() -> None:
    images = torch.rand(3, 3, 4, 4)
    to_uint8(images)
    images[1, 2, 3, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="1"):
        to_uint8(images)


@pytest.mark.parametrize("name", [3, None, "", "./nothing", "avatars-46", "a/b/c", "x\0y"])
def test_unknown_model_is_named(name: Any) -> None:
    assert str(name).strip("x\0y") in refusal(lambda: far.load(name))


def test_misspelled_folder_is_refused_with_the_nearest_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "runs" / "model").mkdir(parents=True)
    message = refusal(lambda: far.load("runs/modle", local_files_only=True))
    assert "'runs/modle'" in message
    assert "model" in message.replace("modle", "")


@pytest.mark.parametrize("dtype", ["int64", torch.int8, 16])
def test_dtype_to_save_in_must_be_a_floating_point_dtype(
    pipeline: Pipeline, tmp_path: Path, dtype: Any
) -> None:
    assert str(dtype) in refusal(lambda: pipeline.save_pretrained(tmp_path / "model", dtype))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("box", "named"),
    [
        ((0, 0, 8), "[0, 0, 8]"),
        ((0, 0, 1.5, 8), "1.5"),
        (("a", 0, 8, 8), "'a'"),
        (None, "None"),
        ((0, 0, True, 8), "True"),
    ],
)
def test_box_of_anything_but_four_whole_numbers_is_named(box: Any, named: str) -> None:
    assert named in refusal(lambda: box_mask((16, 16), box))


@pytest.mark.parametrize("left", [0.5, None, "1"])
def test_place_of_anything_but_whole_numbers_is_named(left: Any) -> None:
    assert str(left) in refusal(lambda: place(Image.new("RGB", (8, 8)), (16, 16), left, 0))
