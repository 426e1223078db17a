"""Interface of the pipeline: its repr, moving to devices and dtypes, and the forms of its output."""

from pathlib import Path

import numpy as np
import pytest
import torch

import far
from far import InputError, Pipeline
from far.kernels import bfloat16_fault, no_int8
from far.packing import PackedLinear


@pytest.fixture
def pipeline(pipeline_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(pipeline_folder)


def test_outputs_are_the_same_images_in_three_forms(pipeline: Pipeline) -> None:
    tensor = pipeline.generate([0, 1], output="tensor")
    array = pipeline.generate([0, 1], output="np")
    pictures = pipeline.generate([0, 1])
    assert array.dtype == np.uint8
    assert array.shape == (2, 16, 16, 3)
    assert np.array_equal(array, (tensor * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    assert all(np.array_equal(array[number], np.asarray(picture)) for number, picture in enumerate(pictures))
    mask = np.zeros((16, 16), dtype=bool)
    mask[8:] = True
    edited = pipeline.edit(array[0], mask, 1, output="np")
    assert edited.dtype == np.uint8
    assert np.array_equal(edited[0, :4], array[0, :4])  # the seam blends


@pytest.mark.parametrize("output", ["jpeg", "PIL", None])
def test_unknown_output_is_refused(pipeline: Pipeline, output: str) -> None:
    with pytest.raises(InputError, match=str(output)):
        pipeline.generate([0], output=output)  # type: ignore[call-overload]


def test_unknown_sampling_value_is_refused_with_the_known_ones(pipeline: Pipeline) -> None:
    mask = torch.zeros(16, 16)
    mask[8:] = 1
    for value in (2.0, None):
        for call in (
            lambda value=value: pipeline.generate([0], cfg=value),
            lambda value=value: pipeline.edit(torch.zeros(3, 16, 16), mask, 1, cfg=value),
        ):
            with pytest.raises(InputError) as error:
                call()
            for name in ("'cfg'", "guidance", "ar_steps", "head_steps"):
                assert name in str(error.value)


def test_sampling_value_of_none_is_the_models_default(pipeline: Pipeline) -> None:
    expected = pipeline.generate([0], output="tensor")
    assert torch.equal(pipeline.generate([0], output="tensor", guidance=None, ar_steps=None), expected)


def test_repr_names_backbone_head_classes_size_parameters_dtype_and_device(pipeline: Pipeline) -> None:
    count = sum(parameter.numel() for parameter in pipeline.model.parameters())
    text = repr(pipeline)
    for part in ("masked", "shortcut", "3 classes", "16×16", f"{count:,}", "float32", "cpu"):
        assert part in text
    pipeline.autoencoder = None
    assert "autoencoder" in repr(pipeline)


def test_moving_to_another_dtype_equals_loading_in_it(pipeline_folder: Path, one_thread: None) -> None:
    expected = far.load(pipeline_folder, dtype="bfloat16", device="cpu").generate([0, 1], output="tensor")
    moved = far.load(pipeline_folder, device="cpu").to(torch.device("cpu"), "bfloat16")
    assert moved.dtype == "bfloat16"
    assert any(isinstance(module, PackedLinear) for module in moved.model.modules()) == (
        bfloat16_fault() is None
    )
    assert torch.equal(moved.generate([0, 1], output="tensor"), expected)


def test_dtypes_are_given_as_names_or_as_those_of_torch(pipeline_folder: Path, tmp_path: Path) -> None:
    loaded = far.load(pipeline_folder, dtype=torch.float16, device="cpu")
    assert loaded.dtype == far.load(pipeline_folder, device="cpu").to(torch.float16).dtype == "float16"
    for name, dtype in (("by-name", "float16"), ("of-torch", torch.float16)):
        loaded.save_pretrained(tmp_path / name, dtype)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("by-name", "of-torch")]
    assert written[0] == written[1]
    for wrong in ("int64", "float17"):
        with pytest.raises(InputError, match=wrong):
            loaded.save_pretrained(tmp_path / "wrong", wrong)


def test_moving_back_unpacks_the_rounded_weights(pipeline: Pipeline) -> None:
    rounded = {
        name: tensor.to(torch.bfloat16).float() for name, tensor in pipeline.model.state_dict().items()
    }
    back = pipeline.to(dtype="bfloat16").to("cpu", "float32")
    assert back is pipeline
    assert back.dtype == "float32"
    assert not any(isinstance(module, PackedLinear) for module in back.model.modules())
    weights = back.model.state_dict()
    assert weights.keys() == rounded.keys()
    assert all(torch.equal(weights[name], rounded[name]) for name in weights)
    back.generate([0])


def test_moving_nowhere_changes_nothing(pipeline: Pipeline) -> None:
    expected = pipeline.generate([0], output="tensor")
    assert torch.equal(pipeline.to().generate([0], output="tensor"), expected)


@pytest.mark.skipif(no_int8() is not None, reason="no kernel multiplies 8-bit integers exactly here")
def test_int8_weights_cannot_be_converted_back() -> None:
    pipeline = far.load("avatars-64", device="cpu")
    count, expected = repr(pipeline), far.load("avatars-64", dtype="int8", device="cpu")
    assert pipeline.to(dtype="int8").dtype == "int8"
    assert repr(pipeline) == count.replace("float32", "int8") == repr(expected)
    assert pipeline.to("cpu") is pipeline
    with pytest.raises(InputError, match="int8"):
        pipeline.to(dtype="float32")
    options = {"ar_steps": 2, "head_steps": 1, "output": "tensor"}
    assert torch.equal(pipeline.generate([3], **options), expected.generate([3], **options))


@pytest.mark.parametrize(
    ("device", "dtype"), [("cuda:7", None), ("tpu", None), (None, "half"), (None, "float64")]
)
def test_unknown_device_or_dtype_is_refused_and_nothing_moves(
    pipeline: Pipeline, device: str | None, dtype: str | None
) -> None:
    before = repr(pipeline)
    with pytest.raises(InputError, match=str(device or dtype)):
        pipeline.to(device, dtype)
    assert repr(pipeline) == before
