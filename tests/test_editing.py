"""Masks, and the pixels that an edit changes or keeps; the loop itself is tested in test_sampling.py."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from far.editing import blend_kept, box_mask, paste_kept, place, touched_tokens
from far.errors import InputError
from far.pictures import to_pictures, to_tensor
from far.pipeline import Pipeline
from far.sampling import Kept, Progress, SamplingConfig

# --- Masks -------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 9), st.integers(1, 9))
def test_box_mask_is_true_between_its_sides(data: st.DataObject, height: int, width: int) -> None:
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    mask = box_mask((height, width), (left, top, right, bottom))
    assert mask.tolist() == [
        [left <= x < right and top <= y < bottom for x in range(width)] for y in range(height)
    ]


@pytest.mark.parametrize("box", [(0, 0, 7, 4), (0, 0, 6, 5), (-1, 0, 3, 3), (2, 0, 2, 3), (0, 3, 3, 2)])
def test_box_that_is_empty_or_outside_the_image_is_refused(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(InputError, match="0 0 6 4"):
        box_mask((4, 6), box)


@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_token_is_touched_by_any_pixel_of_its_cell(
    data: st.DataObject, rows: int, columns: int, cell: int
) -> None:
    pixels = data.draw(
        st.lists(st.booleans(), min_size=rows * columns * cell**2, max_size=rows * columns * cell**2)
    )
    mask = torch.tensor(pixels).view(rows * cell, columns * cell)
    expected = [
        any(mask[y, x] for y in range(r * cell, r * cell + cell) for x in range(c * cell, c * cell + cell))
        for r in range(rows)
        for c in range(columns)
    ]
    if all(expected) or not any(expected):
        with pytest.raises(InputError, match="the mask"):
            touched_tokens(mask, (rows, columns))
    else:
        assert touched_tokens(mask, (rows, columns)).tolist() == expected


def test_pasting_changes_kept_cells_only() -> None:
    drawn, image = torch.zeros(2, 3, 4, 8), torch.ones(3, 4, 8)
    redrawn = torch.tensor([True, False, False, False, False, True, False, False])
    result = paste_kept(drawn, image, redrawn, (2, 4))
    cells = result.view(2, 3, 2, 2, 4, 2).permute(0, 1, 2, 4, 3, 5).flatten(2, 3)
    assert (cells[:, :, redrawn] == 0).all()
    assert (cells[:, :, ~redrawn] == 1).all()


def test_blending_fades_over_a_quarter_of_a_token_beside_the_seam() -> None:
    drawn, image = torch.zeros(2, 3, 32, 48), torch.ones(3, 32, 48)
    redrawn = torch.tensor([False, True, False, False, True, False])  # the middle column of tokens
    result = blend_kept(drawn, image, redrawn, (2, 3))
    fading = [0.2, 0.4, 0.6, 0.8]
    line = torch.tensor([1.0] * 12 + fading[::-1] + [0.0] * 16 + fading + [1.0] * 12)
    torch.testing.assert_close(result, line.expand(2, 3, 32, 48))
    beyond = (line == 0) | (line == 1)
    assert torch.equal(result[..., beyond], line[beyond].expand(2, 3, 32, -1))  # to the last bit
    same = blend_kept(image.expand(1, -1, -1, -1), image, redrawn, (2, 3))
    torch.testing.assert_close(same[0], image)


def test_small_image_is_placed_and_its_border_is_repeated() -> None:
    picture = Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3))
    canvas, mask = place(picture, (5, 6), 1, 2)
    pixels = np.asarray(canvas)
    assert pixels.shape == (5, 6, 3)
    for y in range(5):
        for x in range(6):
            inside = 1 <= x < 4 and 2 <= y < 4
            assert mask[y, x] == (not inside)
            assert (
                pixels[y, x].tolist()
                == np.asarray(picture)[min(max(y - 2, 0), 1), min(max(x - 1, 0), 2)].tolist()
            )


@pytest.mark.parametrize("corner", [(4, 0), (0, 4), (-1, 0), (0, -1)])
def test_image_that_leaves_the_canvas_is_refused(corner: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="6×5"):
        place(Image.new("RGB", (3, 2)), (5, 6), *corner)


# --- Pipeline.edit, of the bundled model -------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_pretrained("avatars-64")


@pytest.fixture(scope="module")
def planet(pipeline: Pipeline) -> Image.Image:
    pictures = pipeline.generate(["planets"], seed=3)
    assert isinstance(pictures[0], Image.Image)
    return pictures[0]


MASK = torch.zeros(64, 64)
MASK[20:40, 33:50] = 1  # touches rows 1 and 2, columns 2 and 3 of the 4 × 4 tokens
TOUCHED = np.zeros((64, 64), dtype=bool)
TOUCHED[16:48, 32:64] = True
BLENDED = np.zeros((64, 64), dtype=bool)
BLENDED[12:52, 28:64] = True  # and a quarter of a token around them


def test_pixels_of_kept_tokens_stay_and_others_change(pipeline: Pipeline, planet: Image.Image) -> None:
    versions = pipeline.edit(planet, Image.fromarray(np.uint8(MASK * 255)), "planets", seed=[1, 2])
    before = np.asarray(planet)
    drawn = [np.asarray(version)[TOUCHED] for version in versions]
    for version in versions:
        assert isinstance(version, Image.Image)
        assert np.array_equal(np.asarray(version)[~BLENDED], before[~BLENDED])
    assert (drawn[0] != before[TOUCHED]).mean() > 0.5
    assert (drawn[0] != drawn[1]).mean() > 0.5
    again = pipeline.edit(planet, MASK, 1, seed=2)
    assert np.abs(np.asarray(again[0]).astype(int) - np.asarray(versions[1])).max() <= 1, (
        "a version depends on its seed alone"
    )


@pytest.mark.parametrize("seeds", [range(1, 3), np.arange(1, 3), torch.arange(1, 3), [np.int64(1), 2]])
def test_seeds_can_be_any_whole_numbers(
    pipeline: Pipeline, planet: Image.Image, seeds: Sequence[int]
) -> None:
    expected = pipeline.edit(planet, MASK, 1, seed=[1, 2], output="tensor")
    assert torch.equal(
        pipeline.edit(planet, MASK, 1, seed=seeds, output="tensor"),
        torch.as_tensor(expected),
    )
    alone = [pipeline.edit(planet, MASK, 1, seed=seed, output="tensor") for seed in (2, np.int64(2))]
    assert torch.equal(torch.as_tensor(alone[0]), torch.as_tensor(alone[1]))


def test_transparency_is_white_in_an_image_and_kept_in_a_mask(
    pipeline: Pipeline, planet: Image.Image
) -> None:
    image, mask = planet.convert("RGBA"), Image.new("RGBA", planet.size, (255, 255, 255, 0))
    image.putalpha(Image.fromarray(np.uint8(np.arange(64 * 64).reshape(64, 64) % 256)))
    mask.paste("white", (33, 20, 50, 40))
    on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    found, expected = (
        pipeline.edit(*given, 1, output="tensor") for given in ((image, mask), (on_white, MASK))
    )
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


def test_kept_tokens_are_those_of_the_encoded_image(pipeline: Pipeline, planet: Image.Image) -> None:
    seen: list[Progress] = []
    unpasted = pipeline.edit(to_tensor(planet), MASK, 1, paste=False, output="tensor", callback=seen.append)
    encoded = pipeline.model.tokens(pipeline.encode(to_tensor(planet).unsqueeze(0)))[0]
    redrawn = torch.tensor(TOUCHED[8::16, 8::16]).flatten()
    final = pipeline.model.tokens(seen[-1].latents)[0]
    assert torch.equal(final[~redrawn], encoded[~redrawn])
    assert (final[redrawn] != encoded[redrawn]).all()
    assert len(seen) == 4, "a quarter of the tokens takes a quarter of the model's 16 AR steps"
    torch.testing.assert_close(torch.as_tensor(unpasted), pipeline.decode(seen[-1].latents))
    assert len(pipeline.edit(planet, MASK, 1, ar_steps=2, callback=seen.append)) == 1
    assert len(seen) == 6


def test_many_versions_are_drawn_in_batches(pipeline: Pipeline, planet: Image.Image) -> None:
    options = dict(output="tensor", ar_steps=1, head_steps=1)
    steps: list[Progress] = []
    found = torch.as_tensor(pipeline.edit(planet, MASK, 1, seed=range(66), callback=steps.append, **options))
    assert [len(progress.latents) for progress in steps] == [64, 2]
    last = torch.as_tensor(pipeline.edit(planet, MASK, 1, seed=65, **options))
    torch.testing.assert_close(found[65:], last, rtol=0, atol=1e-3)


def test_edit_has_no_step_at_its_seam(pipeline: Pipeline, planet: Image.Image) -> None:
    """Where the planet meets a face drawn into it, the step is about that of decoding everything."""
    middle = box_mask((64, 64), (16, 16, 48, 48))

    def step(edited: torch.Tensor) -> float:
        steps = [(edited[..., y, 16:48] - edited[..., y + 1, 16:48]).abs() for y in (15, 47)]
        steps += [(edited[..., 16:48, x] - edited[..., 16:48, x + 1]).abs() for x in (15, 47)]
        return float(torch.stack(steps).mean())

    versions = dict(seed=range(4), output="tensor")
    blended = pipeline.edit(planet, middle, "moods", **versions)
    decoded = pipeline.edit(planet, middle, "moods", paste=False, **versions)
    pasted = torch.where(middle, decoded, to_tensor(planet))
    assert step(blended) < (step(decoded) + step(pasted)) / 2


def test_redrawn_part_fits_the_kept_part(pipeline: Pipeline) -> None:
    """The redrawn half is much nearer to the hidden one than the same half of another image of the class."""
    mask = torch.zeros(64, 64)
    mask[32:] = 1
    labels = ["planets", "moods", "voxel-bot", "clay"]
    originals = pipeline.generate(labels * 2, seed=100, output="tensor")
    others = pipeline.generate(labels * 2, seed=200, output="tensor")
    errors, errors_of_others = [], []
    for label, original, other in zip(labels * 2, originals, others):
        edited = pipeline.edit(original, mask, label, output="tensor")[0]
        errors.append(float((edited - original)[:, 32:].pow(2).mean()))
        errors_of_others.append(float((other - original)[:, 32:].pow(2).mean()))
    assert sum(errors) < 0.5 * sum(errors_of_others)


def test_label_decides_what_is_drawn(pipeline: Pipeline, planet: Image.Image) -> None:
    one, other = (
        pipeline.edit(planet, MASK, label, seed=5, output="tensor") for label in ("planets", "moods")
    )
    assert (one - other).abs().max() > 0.2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"image": Image.new("RGB", (63, 64))}, "[3, 64, 63]"),
        ({"image": torch.zeros(1, 64, 64)}, "[1, 64, 64]"),
        ({"image": torch.full((3, 64, 64), 255, dtype=torch.uint8)}, "torch.uint8"),
        ({"image": torch.full((3, 64, 64), 1.5)}, "1.5"),
        ({"image": torch.full((3, 64, 64), torch.nan)}, "nan"),
        ({"mask": torch.zeros(32, 32)}, "[32, 32]"),
        ({"mask": torch.zeros(64, 64)}, "mask"),
        ({"mask": torch.ones(64, 64)}, "4×4"),
        ({"label": "hexagon"}, "'hexagon'"),
        ({"seed": -1}, "seed -1"),
        ({"seed": []}, "seed"),
        ({"ar_steps": 5}, "ar_steps 5"),
        ({"output": "jpeg"}, "output 'jpeg'"),
    ],
)
def test_unusable_values_are_named(
    pipeline: Pipeline, planet: Image.Image, values: dict, expected: str
) -> None:
    arguments = {"image": planet, "mask": MASK, "label": 1, **values}
    with pytest.raises(InputError) as error:
        pipeline.edit(**arguments)
    assert expected in str(error.value)


def test_causal_model_can_only_redraw_to_the_end() -> None:
    causal = Pipeline.from_pretrained("avatars-64-causal")
    image = causal.generate(["moods"], seed=1, output="tensor")[0]
    lower = torch.zeros(64, 64)
    lower[40:] = 1
    edited = causal.edit(image, lower, "moods", output="tensor")[0]
    assert torch.equal(edited[:, :28], image[:, :28])
    assert (edited - image)[:, 32:].abs().max() > 0.05
    with pytest.raises(InputError, match="causal"):
        causal.edit(image, lower.flip(0), "moods")


# --- Streaming, and the encoder ----------------------------------------------------------------------------


def test_stream_shows_gray_at_unknown_tokens_and_ends_with_the_image(pipeline: Pipeline) -> None:
    config = SamplingConfig(5, 1, 2.0)
    steps = list(pipeline.stream(["moods", 3], [7, 8], config))
    assert [progress.step for progress in steps] == list(range(5))
    for progress in steps[:-1]:
        known = (
            progress.known.view(2, 1, 4, 4)
            .repeat_interleave(16, 2)
            .repeat_interleave(16, 3)
            .expand(-1, 3, -1, -1)
        )
        preview = pipeline.preview(progress)
        assert (preview[~known] == 0.5).all()
        assert torch.equal(preview[known], pipeline.decode(progress.latents)[known])
    torch.testing.assert_close(pipeline.preview(steps[-1]), pipeline.draw(["moods", 3], [7, 8], config))


def test_decoding_inverts_encoding(pipeline: Pipeline) -> None:
    images = pipeline.generate(["planets", "moods"], seed=3, output="tensor")
    latents = pipeline.encode(images)
    assert latents.shape == (2, 12, 8, 8)
    assert (pipeline.decode(latents) - images).pow(2).mean() < 0.003
    kept = Kept(latents, torch.arange(15))
    for progress in pipeline.stream([1, 10], [1, 2], SamplingConfig(1, 1), kept=kept):
        assert torch.equal(
            pipeline.model.tokens(progress.latents)[:, :15], pipeline.model.tokens(latents)[:, :15]
        )


def test_images_convert_to_tensors_and_back() -> None:
    pixels = torch.randint(0, 256, (1, 3, 5, 4), generator=torch.Generator().manual_seed(0)) / 255
    torch.testing.assert_close(to_tensor(to_pictures(pixels)[0]), pixels[0])
