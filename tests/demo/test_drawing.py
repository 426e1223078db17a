"""Orders of the demo: entries, frames that end on the pipeline's images, and the model's own seconds."""

import base64
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from refusals import refused

from far.autoencoder import Autoencoder
from far.autoencoder_config import SmallDecoderConfig
from far.demo import drawing
from far.demo.drawing import Model, Order, draw, load_models, redraw
from far.demo.editor import PNG_ADDRESS, empty, opened
from far.demo.page import Demo
from far.errors import InputError
from far.pictures import encode_png, to_pictures
from far.pipeline import load
from far.sampling import Progress, SamplingConfig


@pytest.fixture(scope="module")
def model(pipeline_folder: Path) -> Model:
    return load_models([str(pipeline_folder), str(pipeline_folder)], "float32", "cpu")[0]


def test_models_are_loaded_once_each(pipeline_folder: Path, diffusion_folder: Path) -> None:
    names = [str(pipeline_folder), str(diffusion_folder), str(pipeline_folder)]
    models = load_models(names, "auto", "cpu")
    assert [model.name for model in models] == names[:2]
    assert [model.head for model in models] == ["shortcut", "diffusion"]
    assert models[0].dtype in ("float32", "bfloat16")


def test_small_decoder_draws_and_is_recorded(pipeline_folder: Path, tmp_path: Path) -> None:
    full = load(pipeline_folder, device="cpu")
    assert isinstance(full.autoencoder, Autoencoder)
    full.autoencoder.set_small_decoder(SmallDecoderConfig(8, 1))
    full.save_pretrained(tmp_path / "model")
    (model,) = load_models([str(tmp_path / "model")], "float32", "cpu", decoder="small")
    order = Order.of_entries(model, "circle", "1")
    assert order.settings(1)["decoder"] == "small"
    *_, last = draw(order)
    small = load(tmp_path / "model", device="cpu", decoder="small")
    expected = small.generate(["circle"], seed=1, output="tensor")
    torch.testing.assert_close(last.images, expected)
    assert not torch.allclose(expected, full.generate(["circle"], seed=1, output="tensor"), atol=0.01)


def test_order_has_the_entered_values(model: Model) -> None:
    order = Order.of_entries(model, "stripes", str(2**63 - 2), 2, guidance=2.5, ar_steps=3, head_steps=1)
    assert (order.label, order.seeds) == (2, [2**63 - 2, 2**63 - 1])
    assert order.config == SamplingConfig(ar_steps=3, head_steps=1, guidance=2.5)
    assert Order.of_entries(model, "1", " 0 ").class_name == "square"


def test_options_without_a_field_are_the_models_own(model: Model) -> None:
    assert Order.of_entries(model, "circle", "5").config == model.pipeline.defaults


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"seed": "-1"}, "seed -1"),
        ({"seed": str(2**63)}, f"seed {2**63}"),
        ({"seed": str(2**63 - 1), "count": 2}, f"seed {2**63}"),
        ({"seed": ""}, "seed is empty"),
        ({"seed": None}, "seed is empty"),
        ({"seed": "seven"}, "'seven'"),
        ({"seed": "9" * 5000}, f"seed is '{'9' * 40}'"),
        ({"count": 0}, "images 0"),
        ({"count": 17}, "images 17"),
        ({"count": 1.5}, "images is '1.5'"),
        ({"guidance": None}, "guidance is empty"),
        ({"guidance": "much"}, "guidance is 'much'"),
        ({"guidance": math.nan}, "guidance is nan"),
        ({"ar_steps": 5}, "ar_steps 5"),
        ({"ar_steps": 0}, "ar_steps 0"),
        ({"head_steps": 2.5}, "head_steps is '2.5'"),
        ({"head_steps": 129}, "head_steps 129"),
        ({"label": "hexagon"}, "'hexagon'"),
        ({"label": None}, "class ''"),
    ],
)
def test_bad_entries_are_errors_before_anything_is_drawn(
    model: Model, entries: dict[str, object], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence.replace("(", r"\(")):
        next(draw(Order.of_entries(model, **{"label": "circle", "seed": "0", **entries})))


def test_frames_end_on_the_images_of_the_pipeline(model: Model) -> None:
    order = Order.of_entries(model, "square", "3", 2, guidance=2.0)
    frames = list(draw(order))
    assert [frame.progress.step for frame in frames] == [0, 1, 2, 3]
    assert [frame.finished for frame in frames] == [False, False, False, True]
    assert torch.equal(frames[-1].images, model.pipeline.draw(["square"] * 2, [3, 4], order.config))
    gray = [float((frame.images == 0.5).all(dim=1).float().mean()) for frame in frames]
    assert gray[0] >= 0.5
    assert gray == sorted(gray, reverse=True)
    assert gray[-1] < 0.05


def test_seconds_include_drawing_only(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def passing(seconds: float, result: object) -> object:
        nonlocal now
        now += seconds
        return result

    def stream(*arguments: object) -> Iterator[Progress]:
        for progress in steps(*arguments):
            yield passing(1.0, progress)  # type: ignore[misc]

    steps, decode, preview = model.pipeline.stream, model.pipeline.decode, model.pipeline.preview
    monkeypatch.setattr(drawing.time, "perf_counter", lambda: now)
    monkeypatch.setattr(model.pipeline, "stream", stream)
    monkeypatch.setattr(model.pipeline, "decode", lambda latents: passing(10.0, decode(latents)))
    monkeypatch.setattr(model.pipeline, "preview", lambda progress: passing(100.0, preview(progress)))
    seconds = [passing(1000.0, frame.seconds) for frame in draw(Order.of_entries(model, "circle", "0"))]
    assert seconds == [1.0, 2.0, 3.0, 14.0]


def test_redrawn_frames_end_on_the_edit_of_the_pipeline(model: Model) -> None:
    image = model.pipeline.generate(["circle"], seed=1, output="tensor")[0]
    mask = torch.zeros(16, 16)
    mask[:8] = 1  # tokens 0 and 1 of four
    order, frames = redraw(Order.of_entries(model, "square", "3", guidance=2.0), image, [0, 1])
    *_, before, last = frames
    assert order.config.ar_steps == 2
    expected = model.pipeline.edit(image, mask, "square", seed=3, guidance=2.0, output="tensor")
    assert torch.equal(last.images, expected)
    assert torch.equal(before.images[0, :, 12:], image[:, 12:])
    drawn = before.images[0, :, :8].reshape(3, 8, 2, 8)
    assert (drawn == 0.5).all(dim=0).all(dim=0).all(
        dim=-1
    ).sum() == 1  # the missing one of two tokens is gray


def test_image_whose_parts_are_all_marked_is_drawn_anew(model: Model) -> None:
    order = Order.of_entries(model, "square", "3")
    _, frames = redraw(order, torch.rand(3, 16, 16), range(4))
    *_, last = frames
    torch.testing.assert_close(last.images, model.pipeline.draw(["square"], [3], order.config))


def png_address(size: tuple[int, int]) -> str:
    picture = to_pictures(torch.zeros(1, 3, *size))[0]
    return PNG_ADDRESS + base64.b64encode(encode_png(picture)).decode()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"whole": ""}, "picture"),
        ({"whole": None}, "picture"),
        ({"whole": "data:image/svg+xml,<svg/>"}, "picture"),
        ({"whole": PNG_ADDRESS + "not base64!"}, "PNG"),
        ({"whole": PNG_ADDRESS + base64.b64encode(b"GIF89a").decode()}, "PNG"),
        ({"whole": png_address((16, 16))[:80]}, "PNG"),
        ({"whole": png_address((16, 17))}, "16×16"),
        ({"marked": []}, "no part"),
        ({"marked": [4]}, "0 … 3"),
        ({"marked": [-1]}, "0 … 3"),
        ({"marked": [True]}, "0 … 3"),
        ({"marked": "5"}, "0 … 3"),
        ({"marked": None}, "0 … 3"),
    ],
)
def test_unusable_values_of_the_editor_are_errors(model: Model, changes: dict, sentence: str) -> None:
    value = {**empty(model), "whole": png_address((16, 16)), "marked": [2, 0, 2]}
    image, marked = opened(value, model)
    assert (image.shape, marked) == ((3, 16, 16), [0, 2])
    with refused(sentence):
        opened({**value, **changes}, model)
    with refused("picture"):
        opened("", model)


def test_stopped_drawing_is_not_redrawn_but_the_picture_before_it(model: Model) -> None:
    demo = Demo([model])
    started, *_, finished = demo.new_picture(model.name, "circle", "0", 1.0, 2)
    assert (started["whole"], finished["whole"]) == ("", finished["picture"])
    with refused("picture"):
        opened({**started, "marked": [0]}, model)
    value = {**finished, "marked": [0, 1]}
    stopped, *_, changed = demo.redraw(model.name, "square", "3", 1.0, 2, value)
    assert torch.equal(opened(stopped, model)[0], opened(value, model)[0])
    assert changed["whole"] == changed["picture"] != value["whole"]


def test_settings_have_the_seed_of_each_image(model: Model) -> None:
    order = Order.of_entries(model, "stripes", "8", 2, head_steps=1)
    settings = order.settings(9)
    assert (settings["seed"], settings["label"], settings["class"], settings["head_steps"]) == (
        9,
        "2",
        "stripes",
        1,
    )
    assert (settings["weights"], settings["dtype"]) == (model.name, "float32")
