"""Trajectories against closed forms and finer integration; each row against a recomputation."""

import json
import math
import shutil
from pathlib import Path

import pytest
import scipy.stats
import torch
from torch import Tensor

from far.backbone import BlockCausalConfig, CausalConfig, MaskedConfig
from far.data.shards import ShardReader, ShardWriter
from far.errors import InputError
from far.files import json_digest, read_json, write_json
from far.heads import Condition, DiffusionConfig, FlowConfig, Head
from far.heads.diffusion import DiffusionHead
from far.model import FAR, ModelConfig, NetworkConfig
from far.pipeline import Pipeline
from far.sampling import SamplingConfig, SeededNoise, sample
from far.tokens import cosine_token_counts, halton_orders, raster_orders
from far.training import trajectories as module
from far.training.trajectories import (
    GROUP,
    POINTS,
    SUBSTEPS,
    TrajectoryConfig,
    draw_positions,
    group_rows,
    load_teacher,
    trajectories,
    write_trajectories,
)

DEVIATION = 0.5
MEANS = torch.linspace(-1, 1, 200, dtype=torch.float64).unsqueeze(-1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


# --- The integration -------------------------------------------------------------------------------


def exact_velocity(x: Tensor, t: float) -> Tensor:
    return MEANS + (t * DEVIATION**2 - (1 - t)) / ((1 - t) ** 2 + (t * DEVIATION) ** 2) * (x - t * MEANS)


def exact_path(noise: Tensor, points: int) -> Tensor:
    """Return the path for Gaussian data: a point keeps its distance to the mean in standard deviations."""
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    return (t * MEANS + ((1 - t) ** 2 + (t * DEVIATION) ** 2).sqrt() * noise).unsqueeze(-1)


def test_trajectories_of_gaussian_data_follow_the_closed_form() -> None:
    noise = torch.randn(200, 1, generator=generator(), dtype=torch.float64)
    for points in (2, 5, POINTS):
        path = trajectories(exact_velocity, noise, points, 64)
        assert path.shape == (200, points, 1)
        torch.testing.assert_close(path, exact_path(noise, points), rtol=0, atol=2e-4)
    kept = trajectories(exact_velocity, noise, POINTS, SUBSTEPS)
    assert float((kept - exact_path(noise, POINTS)).abs().max()) < 0.02
    assert torch.equal(kept[:, 0], noise)


def test_trajectories_converge_with_the_second_order() -> None:
    noise = torch.randn(200, 1, generator=generator(), dtype=torch.float64)
    errors = [
        rms(trajectories(exact_velocity, noise, 5, substeps) - exact_path(noise, 5))
        for substeps in (8, 16, 32)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


@pytest.fixture(scope="module")
def trained() -> DiffusionHead:
    """Train a small diffusion head briefly on Gaussian tokens, whose mean is a multiple of ``z``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = DiffusionHead(DiffusionConfig(32, 1, 4, token_limit=3.0), 2, 2)
    optimizer, draws = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0.0), generator()
    for _ in range(120):
        z = torch.randn(64, 2, generator=draws)
        optimizer.zero_grad()
        head.loss(
            0.7 * z + 0.3 * torch.randn(64, 2, generator=draws), Condition(z), draws, head
        ).value.mean().backward()
        optimizer.step()
    return head


@torch.no_grad()
def test_trajectories_of_a_trained_teacher_are_close_to_a_fine_integration(trained: DiffusionHead) -> None:
    """They are within 0.05 standard deviations of 32 Heun steps per interval; a straight line is not."""
    z, noise = torch.randn(200, 2, generator=generator(1)), torch.randn(200, 2, generator=generator(2))
    scale = 1 + 3 * torch.rand(200, 1, generator=generator(3))

    def velocity(x: Tensor, t: float) -> Tensor:
        return trained.velocity(x, x.new_full(x.shape[:-1], t), Condition(z, torch.zeros_like(z), scale))

    kept, fine = trajectories(velocity, noise, POINTS, SUBSTEPS), trajectories(velocity, noise, POINTS, 32)
    errors = [rms(kept[:, point] - fine[:, point]) for point in range(POINTS)]
    assert max(errors) < 0.05, errors
    assert rms(fine[:, -1] - noise) > 0.5
    assert rms(fine[:, 4] - (fine[:, 0] + fine[:, -1]) / 2) > 3 * errors[4]


# --- Positions ---------------------------------------------------------------------------------------


BACKBONES = {
    "masked": MaskedConfig(16, 1, 2, 16, 1, 2, 2, 0.1),
    "block_causal": BlockCausalConfig(width=16, encoder_depth=2, decoder_depth=1, heads=2),
    "causal": CausalConfig(width=16, depth=1, heads=2),
}


def small_model(backbone: str = "masked") -> FAR:
    """Return an untrained model of 4 × 4 tokens."""
    network = NetworkConfig(BACKBONES[backbone], FlowConfig(8, 1), patch=2)
    return FAR(ModelConfig(network, 3, 2, (8, 8))).eval()


@pytest.mark.parametrize("queries", [1, 5, 16, 40])
def test_positions_of_a_masked_model_are_those_of_sampling(queries: int) -> None:
    """Every token of an image is equally likely, so an AR step is as likely as its number of tokens."""
    model, draws, tokens, steps = small_model(), generator(queries), 16, 6
    kept, counts = min(queries, tokens), cosine_token_counts(tokens, steps)
    found = {sum(counts[:step]): 0 for step in range(steps)}
    for _ in range(1500):
        order, known, positions = draw_positions(model, 3, queries, SamplingConfig(steps), draws)
        assert torch.equal(order.sort(dim=1).values, torch.arange(tokens).expand(3, -1))
        assert positions.shape == (3, kept)
        unknown = tokens - known
        for row, chosen in zip(order, positions):
            assert not set(row[:known].tolist()) & set(chosen.tolist()), "known positions are not drawn"
            times = chosen.bincount(minlength=tokens)
            assert (times > 0).sum() == min(kept, unknown)
            assert times.max() == -(-kept // unknown), "positions repeat equally often, at most one more"
        found[known] += 1
    expected = 1500 / tokens * torch.tensor(counts).double()
    assert scipy.stats.chisquare(list(found.values()), expected.numpy()).pvalue > 0.01


def test_orders_of_a_masked_model_are_random() -> None:
    model, draws = small_model(), generator()
    first = torch.cat([draw_positions(model, 8, 2, SamplingConfig(6), draws)[0][:, 0] for _ in range(200)])
    assert scipy.stats.chisquare(first.bincount(minlength=16).numpy()).pvalue > 0.01


def test_more_ar_steps_than_tokens_leave_tokens_to_draw() -> None:
    assert draw_positions(small_model(), 2, 2, SamplingConfig(64), generator())[1] < 16


@pytest.mark.parametrize("queries", [1, 5, 16, 40])
def test_positions_of_a_causal_model_are_uniform(queries: int) -> None:
    model, draws, kept = small_model("causal"), generator(queries), min(queries, 16)
    found = []
    for _ in range(400):
        order, known, positions = draw_positions(model, 3, queries, SamplingConfig(16), draws)
        assert torch.equal(order, torch.arange(16).expand(3, -1))
        assert known == 15
        assert positions.shape == (3, kept)
        assert all(len(row.unique()) == kept for row in positions)
        found.append(positions)
    # All positions are equally frequent, including the first and the last.
    assert scipy.stats.chisquare(torch.cat(found).flatten().bincount(minlength=16).numpy()).pvalue > 0.01


@pytest.mark.parametrize("backbone", ["masked", "block_causal"])
@pytest.mark.parametrize("kind", ["raster", "halton"])
def test_positions_are_those_of_an_ar_step_in_the_order_of_sampling(backbone: str, kind: str) -> None:
    model, draws, counts = small_model(backbone), generator(), cosine_token_counts(16, 6)
    sampling, seen = SamplingConfig(6, order=kind), set()  # type: ignore[arg-type]
    for _ in range(100):
        order, known, positions = draw_positions(model, 3, 5, sampling, draws)
        expected = raster_orders(16, 3) if kind == "raster" else halton_orders(4, 4, order[:, 0])
        assert torch.equal(order, expected)
        drawn = counts[[sum(counts[:step]) for step in range(6)].index(known)]
        assert drawn <= 5
        for row, chosen in zip(order, positions):
            assert set(chosen.tolist()) == set(row[known : known + drawn].tolist())
        seen.add(known)
    assert len(seen) == 6, "every AR step occurs"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["random", "raster", "halton"])
def test_tokens_of_a_block_causal_model_drawn_one_by_one_depend_on_those_before(kind: str) -> None:
    torch.manual_seed(0)
    model, latents = small_model("block_causal"), torch.randn(4, 2, 8, 8, generator=generator(1))
    config, labels = TrajectoryConfig(tokens_per_image=6, label_drop=0.0), torch.tensor([0, 1, 2, 0])
    sampling = SamplingConfig(16, order=kind)  # type: ignore[arg-type]
    rows = group_rows(model, latents, labels, config, sampling, generator())
    assert (rows["order"] == torch.arange(16)).all() == (kind == "raster")
    for image, (order, query) in enumerate(zip(rows["order"], rows["query"])):
        assert len(query.unique()) == 6
        for position, z in zip(query, rows["z"][image]):
            before = order[: int((order == position).nonzero())]
            tokens = model.tokens(latents[image : image + 1])
            only = model.backbone(tokens, before[None], position.view(1, 1), labels[image : image + 1])
            torch.testing.assert_close(z.float(), only[0, 0], rtol=1e-2, atol=1e-2)


# --- Rows ----------------------------------------------------------------------------------------------

CONFIG = TrajectoryConfig(images=100, tokens_per_image=2, label_drop=0.3, seed=5)


@pytest.fixture
def rows(
    request: pytest.FixtureRequest, tmp_path: Path, latents_folder: Path
) -> tuple[Pipeline, ShardReader]:
    """Return a teacher, whose fixture is the parameter, and its trajectories from the cache."""
    teacher_folder = request.getfixturevalue(request.param)
    teacher = load_teacher(teacher_folder, CONFIG, "cpu")
    write_trajectories(teacher, teacher_folder, CONFIG, tmp_path / "rows", latents_folder)
    return teacher, ShardReader(tmp_path / "rows", "trajectories", verify=True)


both = pytest.mark.parametrize("rows", ["diffusion_folder", "causal_diffusion_folder"], indirect=True)


@torch.no_grad()
@both
def test_rows_equal_a_recomputation_by_the_teacher(rows: tuple[Pipeline, ShardReader]) -> None:
    """Each image alone: ``z`` of its tokens, class and positions, and the path at its guidance scales."""
    teacher, reader = rows
    model, null = teacher.model, teacher.model.null_label
    assert len(reader) == 2 * GROUP
    names = ("tokens", "labels", "order", "known", "query", "z", "scale", "paths")
    found = {name: reader.all(name) for name in names}
    for row in range(0, 2 * GROUP, 9):
        tokens, label, order, known, query, z, scale, paths = (found[name][row] for name in names)
        tokens, order, query = (
            tokens.float().unsqueeze(0),
            order[: int(known)].unsqueeze(0),
            query.unsqueeze(0),
        )
        expected = model.backbone(tokens, order, query, label.view(1))[0]
        torch.testing.assert_close(z.float(), expected, rtol=2e-3, atol=5e-3)
        uncond = model.backbone(tokens, order, query, torch.tensor([null]))[0]
        for token in range(2):
            guidance = float(scale[token])

            def velocity(x: Tensor, t: float) -> Tensor:
                return model.head.velocity(
                    x, torch.tensor(t), Condition(expected[token], uncond[token], guidance)
                )

            path = trajectories(velocity, paths[token, 0].float(), POINTS, SUBSTEPS)
            torch.testing.assert_close(paths[token].float(), path, rtol=0.01, atol=0.05)


@both
def test_random_values_of_rows_have_their_distributions(rows: tuple[Pipeline, ShardReader]) -> None:
    teacher, reader = rows
    paths, scale, labels, known = (reader.all(name) for name in ("paths", "scale", "labels", "known"))
    assert paths.shape == (2 * GROUP, 2, POINTS, 8)
    assert scipy.stats.kstest(paths[..., 0, :].float().flatten().numpy(), "norm").pvalue > 0.01
    assert scipy.stats.kstest(scale.float().flatten().numpy(), scipy.stats.uniform(1, 3).cdf).pvalue > 0.01
    dropped = int((labels == teacher.model.null_label).sum())
    assert scipy.stats.binomtest(dropped, 2 * GROUP, 0.3).pvalue > 0.01
    assert set(labels.tolist()) == {0, 1, 2, 3}
    assert all(len(group.unique()) == 1 for group in known.split(GROUP)), (
        "the images of a group have equally many known tokens"
    )
    assert not torch.equal(paths[:GROUP], paths[GROUP:])


def test_images_of_a_cache_appear_once_per_epoch_with_label_and_random_flip(
    diffusion_folder: Path, latents_folder: Path, tmp_path: Path
) -> None:
    # Each image and flip has a mean of its own and a standard deviation of 0.01.
    means = 3 * torch.randn(60, 2, 2, 4, 4, generator=generator())
    labels = torch.randint(0, 3, (60,), generator=generator())
    writer = ShardWriter(tmp_path / "cache", json.loads((latents_folder / "index.json").read_text())["meta"])
    moments = torch.cat([means, torch.full_like(means, 2 * math.log(0.01))], dim=2)
    writer.write({"moments": moments.to(torch.float16), "labels": labels}, cursor=60)
    writer.finish()

    config = TrajectoryConfig(images=GROUP, tokens_per_image=1, label_drop=0.0)
    teacher = load_teacher(diffusion_folder, config, "cpu")
    assert teacher.autoencoder is not None
    write_trajectories(teacher, diffusion_folder, config, tmp_path / "rows", tmp_path / "cache")
    reader = ShardReader(tmp_path / "rows", "trajectories")
    latents = teacher.autoencoder.denormalize(teacher.model.latents(reader.all("tokens").float()))
    off = (latents[:, None, None] - means).square().mean(dim=(-3, -2, -1)).sqrt().flatten(1)
    nearest, found = off.min(dim=1)
    assert 0.005 < float(nearest.min()) < float(nearest.max()) < 0.03
    image, flip = found // 2, found % 2
    assert torch.equal(reader.all("labels"), labels[image])
    assert image[:60].sort().values.tolist() == list(range(60))
    assert torch.equal(image[60:], image[:4])
    assert image[:60].tolist() != list(range(60))
    assert 15 < int(flip.sum()) < GROUP - 15


def test_teacher_draws_the_images_without_a_cache(diffusion_folder: Path, tmp_path: Path) -> None:
    config = TrajectoryConfig(images=GROUP + 1, tokens_per_image=1, label_drop=0.0, seed=2)
    teacher = load_teacher(diffusion_folder, config, "cpu")
    write_trajectories(teacher, diffusion_folder, config, tmp_path / "rows", None)
    reader = ShardReader(tmp_path / "rows", "trajectories")
    labels = reader.all("labels")
    assert labels.tolist() == [number % 3 for number in range(2 * GROUP)]
    noise = SeededNoise(range(60, 70), teacher.device, run=2)
    drawn = teacher.decode(sample(teacher.model, labels[60:70], noise, teacher.defaults))
    found = teacher.decode(teacher.model.latents(reader.all("tokens")[60:70].float()))
    torch.testing.assert_close(found, drawn, rtol=0, atol=5e-3)
    assert float((drawn[0] - drawn[3]).abs().max()) > 0.02


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("cached", [True, False])
def test_interrupted_writing_resumes_to_the_same_files(
    cached: bool,
    diffusion_folder: Path,
    latents_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = TrajectoryConfig(images=4 * GROUP, tokens_per_image=1)
    teacher = load_teacher(diffusion_folder, config, "cpu")
    monkeypatch.setattr(module, "_SHARD_GROUPS", 1)
    whole, cut, latents = tmp_path / "whole", tmp_path / "cut", latents_folder if cached else None
    write_trajectories(teacher, diffusion_folder, config, whole, latents)
    original, calls = module.group_rows, []

    def interrupted(*arguments: object) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "group_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_trajectories(teacher, diffusion_folder, config, cut, latents)
    with pytest.raises(InputError, match="cut"):
        ShardReader(cut, "trajectories")
    write_trajectories(teacher, diffusion_folder, config, cut, latents)
    assert len(calls) == 5, "finished groups are not computed again"
    assert files(cut) == files(whole)
    assert len(files(whole)) == 5
    noise = ShardReader(whole, "trajectories").all("paths")[:, 0, 0].split(GROUP)
    assert len({tuple(group.flatten().tolist()) for group in noise}) == 4, "every group has noise of its own"
    monkeypatch.setattr(
        module, "LatentCache", lambda *arguments: pytest.fail("a finished folder needs no latents")
    )
    write_trajectories(teacher, diffusion_folder, config, cut, latents)
    assert len(calls) == 5


def test_folder_with_trajectories_of_another_teacher_or_config_is_rejected(
    diffusion_folder: Path, pipeline_folder: Path, tmp_path: Path
) -> None:
    config = TrajectoryConfig(images=GROUP, tokens_per_image=1)
    write_trajectories(
        load_teacher(diffusion_folder, config, "cpu"), diffusion_folder, config, tmp_path / "rows", None
    )
    before = files(tmp_path / "rows")
    others = [
        (pipeline_folder, config),
        (diffusion_folder, TrajectoryConfig(images=GROUP, tokens_per_image=1, max_guidance=2.0)),
    ]
    for folder, other in others:
        with pytest.raises(InputError, match=r"^\S*rows "):
            write_trajectories(load_teacher(folder, other, "cpu"), folder, other, tmp_path / "rows", None)
    assert files(tmp_path / "rows") == before


def test_rejected_settings_leave_no_folder(
    diffusion_folder: Path, latents_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with settings that do not work would reject those that do."""
    config = TrajectoryConfig(images=GROUP, tokens_per_image=1)
    teacher = load_teacher(diffusion_folder, config, "cpu")

    def refusal(latents: Path | None) -> str:
        with pytest.raises(InputError) as caught:
            write_trajectories(teacher, diffusion_folder, config, tmp_path / "rows", latents)
        assert not (tmp_path / "rows").exists()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert str(tmp_path) in refusal(tmp_path)
    other = json.loads((latents_folder / "index.json").read_text())["meta"]
    renamed = {**other, "classes": ["circle", "rings", "stripes"]}
    for name, meta, side in (
        ("other", {**other, "classes": ["a", "b"]}, 4),
        ("renamed", renamed, 4),
        ("large", {**other, "size": 32}, 8),
    ):
        writer = ShardWriter(tmp_path / name, meta)
        writer.write(
            {
                "moments": torch.zeros(1, 2, 4, side, side, dtype=torch.float16),
                "labels": torch.zeros(1, dtype=torch.int64),
            },
            1,
        )
        writer.finish()
    for name, values in (
        ("renamed", ("'square'", "'rings'")),
        ("other", ("(a, b)", "(circle, square, stripes)")),
        ("large", ("32×32", "16×16")),
    ):
        line = refusal(tmp_path / name)
        assert all(value in line for value in (str(tmp_path / name), *values))
    autoencoder, teacher.autoencoder = teacher.autoencoder, None
    assert "autoencoder" in refusal(latents_folder)
    teacher.autoencoder = autoencoder
    monkeypatch.setattr(DiffusionHead, "velocity", Head.velocity)
    monkeypatch.setattr(module, "sample", lambda *arguments: pytest.fail("the teacher drew images first"))
    assert "diffusion" in refusal(None)


def test_latents_of_other_class_names_are_rejected_although_trajectories_are_finished(
    diffusion_folder: Path, latents_folder: Path, tmp_path: Path
) -> None:
    config = TrajectoryConfig(images=GROUP, tokens_per_image=1)
    teacher = load_teacher(diffusion_folder, config, "cpu")
    write_trajectories(teacher, diffusion_folder, config, tmp_path / "rows", latents_folder)
    shutil.copytree(latents_folder, tmp_path / "renamed")
    index = json.loads((latents_folder / "index.json").read_text())
    index["meta"]["classes"] = ["circle", "rings", "stripes"]
    del index["sha256"]
    index["sha256"] = json_digest(index)
    (tmp_path / "renamed" / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError) as caught:
        write_trajectories(teacher, diffusion_folder, config, tmp_path / "rows", tmp_path / "renamed")
    assert all(part in str(caught.value) for part in (str(tmp_path / "renamed"), "'square'", "'rings'"))


def test_trajectories_beyond_float16_are_rejected(diffusion_folder: Path, tmp_path: Path) -> None:
    """Without its limit, the untrained teacher predicts tokens in the thousands near the noise."""
    config = TrajectoryConfig(images=GROUP, tokens_per_image=1)
    teacher = load_teacher(diffusion_folder, config, "cpu")
    assert isinstance(teacher.model.head, DiffusionHead)
    teacher.model.head = teacher.model.head.limited(None)
    with torch.no_grad():
        teacher.model.head.network.output.linear.weight.mul_(100)  # type: ignore[union-attr, operator]
    latents = torch.randn(GROUP, 2, 4, 4, generator=generator())
    labels, sampling = torch.zeros(GROUP, dtype=torch.long), SamplingConfig(4)
    with torch.no_grad(), pytest.raises(InputError, match="token_limit"):
        group_rows(teacher.model, latents, labels, config, sampling, generator())


def test_only_a_teacher_without_a_token_limit_gets_the_configured_one(
    tmp_path: Path, diffusion_folder: Path
) -> None:
    assert (
        load_teacher(diffusion_folder, TrajectoryConfig(token_limit=1.5), "cpu").model.head.config.token_limit
        == 3.0
    )
    values = read_json(diffusion_folder / "config.json")
    values["model"]["network"]["head"]["token_limit"] = None
    shutil.copytree(diffusion_folder, tmp_path / "unlimited")
    write_json(tmp_path / "unlimited" / "config.json", values)
    assert (
        load_teacher(tmp_path / "unlimited", TrajectoryConfig(), "cpu").model.head.config.token_limit == 5.0
    )
    assert (
        load_teacher(
            tmp_path / "unlimited", TrajectoryConfig(token_limit=None), "cpu"
        ).model.head.config.token_limit
        is None
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", 0),
        ("tokens_per_image", 0),
        ("label_drop", 1.0),
        ("label_drop", -0.1),
        ("max_guidance", 1.0),
        ("max_guidance", math.nan),
    ],
)
def test_invalid_settings_are_rejected(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        TrajectoryConfig(**{name: value})
