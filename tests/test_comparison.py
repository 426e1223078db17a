"""The comparison of heads: training, sweeps, rows and report, run end to end on tiny models."""

import dataclasses
import itertools
import json
import math
import shutil
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import comparison, distillation, results, results_measure, results_times
from benchmarks.comparison import MODELS, SETS, ImageSet, Row
from benchmarks.results_measure import GUIDANCES, START, TEMPERATURES, descend, guidances_of, sweep_key
from benchmarks.results_rows import distance_ratio, model_rows, ratio
from far.model import FAR, ModelConfig
from far.recipe import load_recipe
from far.training.checkpoint import list_checkpoints
from far.training.log import Meter
from far.training.loop import Trainer

ROOT = Path(__file__).parents[1]

RECIPE = """
data: {data}
run: runs/comparison/tiny
autoencoder:
  model: {{width: 8, width_multipliers: [1, 1, 2], blocks: 1, latent_channels: 2, norm_groups: 4}}
  loss: {{evaluation_images: 4}}
  training: {{steps: 1, batch_size: 4}}
generator:
  network:
    patch: 2
    backbone: {{{backbone}, buffer: 2}}
    head: {{width: 16, depth: 1, samples_per_token: 2}}
  training: {{steps: 4, batch_size: 8, learning_rate: 0.02, checkpoint_every: 2, log_every: 1}}
  sampling: {{ar_steps: {ar_steps}, head_steps: 2}}
  evaluation: {{images: 4, references: 6}}
"""
SIZES = [
    f"{part}_{size}" for part in ("encoder", "decoder") for size in ("width: 16", "depth: 1", "heads: 2")
]
BACKBONES = {
    "block-causal": "kind: block_causal, width: 16, encoder_depth: 1, decoder_depth: 1, heads: 2",
    "causal": "kind: causal, width: 16, depth: 2, heads: 2",
    "masked": ", ".join(SIZES),
}
BLOCKS = ("claim", "sweeps", "tiny", "tiny-samples")
ONLY = ["--train", "--only", "diffusion-100", "shortcut-1", "causal-1", "distilled-1"]


@pytest.fixture
def tiny(tmp_path: Path, image_set: Path, monkeypatch: pytest.MonkeyPatch) -> ImageSet:
    """Provide a folder with one image set of 60 images and 12 held-out ones, and pages to write."""
    monkeypatch.chdir(tmp_path)
    recipes = Path("recipes/comparison")
    recipes.mkdir(parents=True)
    for name, sizes in BACKBONES.items():
        ar_steps = 4 if name == "causal" else 2
        text = RECIPE.format(data=image_set, backbone=sizes, ar_steps=ar_steps)
        (recipes / f"tiny-{name}.yaml").write_text(text)
    Path("docs/images").mkdir(parents=True)
    Path("docs/results").mkdir()
    Path("docs/results.md").write_text(
        "".join(f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in BLOCKS)
    )
    Path("README.md").write_text("<!-- begin results -->\n<!-- end results -->\n")
    recipe = str(recipes / "tiny-block-causal.yaml")
    preparation = (("train-autoencoder", recipe, "--resume"), ("cache", recipe))
    images = ImageSet("tiny", image_set, preparation, count=64, sweep_count=12)
    for name in list(SETS):
        monkeypatch.delitem(SETS, name)
    monkeypatch.setitem(SETS, "tiny", images)
    for name, trainings in (("diffusion", 1), ("shortcut", 2), ("causal", 1)):
        monkeypatch.setitem(MODELS, name, dataclasses.replace(MODELS[name], trainings=trainings))
    options = ["trajectories.images=128", "training.steps=1", "training.batch_size=64"]
    monkeypatch.setattr(distillation, "OPTIONS", options)
    monkeypatch.setattr(distillation, "RESULTS", Path("docs/results/distillation.json"))
    return images


def test_comparison_trains_sweeps_measures_resumes_and_reports(
    tiny: ImageSet, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    train_step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", interrupted_step)
    with pytest.raises(SystemExit):
        results.main(ONLY)
    monkeypatch.setattr(Trainer, "train_step", train_step)
    assert list_checkpoints(tiny.runs / "shortcut-seed-1/checkpoints")[-1][0] == 3
    first = json.loads(tiny.results.read_text())
    expected = {"diffusion 100 seed 0", "shortcut 1 seed 0", "causal 1 seed 0", "distilled 1 seed 0"}
    assert first["rows"].keys() == {"real", "reconstructions", *expected}
    check_report(first["rows"], ["shortcut 1 seed 0"])
    monkeypatch.setattr(results_measure, "measure_point", None)  # no sweep is measured twice
    results.main(ONLY)
    second = json.loads(tiny.results.read_text())
    assert {key: second["rows"][key] for key in first["rows"]} == first["rows"]
    assert second["sweeps"] == first["sweeps"]
    rows = second["rows"]
    assert rows["shortcut 1 seed 1"]["sha256"] != rows["shortcut 1 seed 0"]["sha256"]
    assert rows["shortcut 1 seed 1"]["sampling"] == rows["shortcut 1 seed 0"]["sampling"]
    assert rows["shortcut 1 seed 1"]["seed"] == 64
    steps = [json.loads(line)["step"] for line in (tiny.runs / "shortcut-seed-1/log.jsonl").open()]
    assert sorted(set(steps[:4])) == [1, 2, 3, 4], "resumed at its checkpoint"
    backbones = {row["name"]: row["backbone"] for row in rows.values() if "backbone" in row}
    assert backbones == {name: MODELS[name].backbone for name in backbones}
    check_sweeps(second)
    check_report(rows, ["shortcut 1 seed 0", "shortcut 1 seed 1"])

    results_times.main(["--rounds", "1"])
    times = json.loads(tiny.results.read_text())["times"]
    assert times.keys() == {"diffusion 100", "shortcut 1", "causal 1", "distilled 1"}
    results.main(ONLY)
    assert Path("docs/images/distance-against-seconds.png").exists()

    before = tiny.results.read_bytes(), Path("docs/results.md").read_bytes()
    monkeypatch.setattr(results, "measure_floors", None)  # complete: no image is opened
    capfd.readouterr()
    results.main(ONLY[1:])
    shutil.rmtree("runs/results/weights/tiny/shortcut-seed-1")
    results.main(ONLY)  # recorded rows need no training
    assert (tiny.results.read_bytes(), Path("docs/results.md").read_bytes()) == before
    output = capfd.readouterr().out
    assert output.count("tiny: 0 trainings") == 2
    assert "far train recipes" not in output

    monkeypatch.setattr(results_measure, "DTYPE", "bfloat16")
    assert not model_rows(results_measure.current_rows(tiny).values), "no table mixes dtypes"


def interrupted_step(self: Trainer, meter: Meter, step: Any = Trainer.train_step) -> None:
    """Take a step, and press Ctrl-C in the third one of the second shortcut model."""
    step(self, meter)
    if self.folder.name == "shortcut-seed-1" and self.step == 3:
        signal.raise_signal(signal.SIGINT)


def check_sweeps(values: dict[str, Any]) -> None:
    """Check that each row was sampled at the lowest distance of its sweep, from other seeds."""
    for key, row in values["rows"].items():
        if key in ("real", "reconstructions"):
            continue
        start = f"{row['name']} {row['steps']} guidance"
        points = [point for name, point in values["sweeps"].items() if name.startswith(start)]
        assert 5 <= len(points) <= len(GUIDANCES) * len(TEMPERATURES)
        least = min(point["distance"] for point in points)
        assert row["sampling"] in [point["sampling"] for point in points if point["distance"] == least]
        assert row["seed"] + 64 <= min(point["seed"] for point in points)
        assert all({"KID", "recall"} <= point.keys() for point in points)


def check_report(rows: dict[str, Any], trainings: list[str]) -> None:
    """Check the mean and standard deviation of the trainings of a row in the table, and its images."""
    found = [rows[key]["FD (EfficientNet-Lite0)"] for key in trainings]
    cell = f"{statistics.mean(found):.1f}"
    if len(found) > 1:
        cell += f" ± {statistics.stdev(found):.1f}"
    lines = Path("docs/results.md").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"| block-causal | shortcut | 1 | {len(found)} |"))
    assert f"| {cell} |" in line
    assert Path("docs/images/comparison-tiny.png").exists()
    assert "| block-causal | diffusion | 100 |" in Path("README.md").read_text()


def test_other_training_is_an_error_that_names_the_weights(
    tiny: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison.ImageSet, "trained", lambda *_: True)
    monkeypatch.setattr(results, "training_of", lambda *_: {"steps": 7})
    with pytest.raises(SystemExit, match="runs/results/weights/tiny/shortcut"):
        results.check_trainings(tiny, [Row("shortcut", 1)])


@pytest.mark.parametrize("name", [name for name in MODELS if name != "distilled"])
def test_recipes_accept_the_overrides_of_every_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes").symlink_to(ROOT / "recipes")
    commands: list[list[str]] = []

    def record(*command: str) -> None:
        commands.append(list(command))
        raise InterruptedError

    monkeypatch.setattr(results, "run", record)
    for images in SETS.values():
        with pytest.raises(InterruptedError):
            results.train_model(images, name, 1)
    for _, path, *overrides, _ in commands:
        recipe = load_recipe(path, overrides)
        assert recipe.model == f"{MODELS[name].weights_of or name}-seed-1"
        assert recipe.generator.training.seed == 1
        network = recipe.generator.network
        assert network.head.kind == MODELS[name].head
        assert network.backbone.kind == MODELS[name].backbone.replace("-", "_")


@pytest.mark.parametrize("images", SETS.values(), ids=SETS.keys())
def test_recipes_train_backbones_of_equal_size_in_the_same_way(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipes = [load_recipe(images.recipe(MODELS[name])) for name in ("shortcut", "causal", "masked")]
    first = recipes[0].generator
    sizes = []
    for recipe in recipes:
        assert recipe.autoencoder == recipes[0].autoencoder
        assert recipe.generator.training == first.training
        assert recipe.generator.network.head.width == first.network.head.width
        with torch.device("meta"):
            model = FAR(ModelConfig(recipe.generator.network, 10, 4, (8, 8)))
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    assert max(sizes) < 1.02 * min(sizes)


@pytest.mark.parametrize("best", list(itertools.product(GUIDANCES, TEMPERATURES)))
def test_descent_finds_the_minimum_of_a_convex_distance_and_looks_at_all_its_neighbors(
    best: tuple[float, float],
) -> None:
    points = set()

    def distance(guidance: float, temperature: float) -> float:
        points.add((guidance, temperature))
        return (guidance - best[0]) ** 2 + 100 * (temperature - best[1]) ** 2

    assert descend(distance) == best
    assert len(points) <= 12
    for axis, grid in enumerate((GUIDANCES, TEMPERATURES)):
        near = grid.index(best[axis])
        for value in grid[max(0, near - 1) : near + 2]:
            assert (value, best[1]) in points if axis == 0 else (best[0], value) in points


def test_descent_follows_a_valley_that_no_single_line_crosses() -> None:
    """The best guidance depends on the temperature, so both lines are searched again."""
    table = {point: 10.0 for point in itertools.product(GUIDANCES, TEMPERATURES)}
    table |= {(3.0, 0.8): 5.0, (3.0, 0.6): 4.0, (2.0, 0.6): 3.0, (2.0, 0.4): 2.0, (1.0, 0.4): 1.0}
    assert descend(lambda *point: table[point]) == (1.0, 0.4)


def test_equal_distances_end_the_descent() -> None:
    assert descend(lambda *_: 1.0) == START


def test_heads_with_learned_guidance_are_swept_up_to_what_they_learned() -> None:
    row = Row("flow-map", 2)
    head = load_recipe(ROOT / SETS["avatars-64"].recipe(MODELS["flow-map"]), [
        "generator.network.head.kind=flow_map", *MODELS["flow-map"].overrides,
    ]).generator.network.head  # fmt: skip
    assert descend(lambda guidance, _: -guidance, guidances_of(row))[0] == head.max_guidance  # type: ignore[attr-defined]
    assert descend(lambda guidance, _: -guidance, guidances_of(Row("shortcut", 2)))[0] == GUIDANCES[-1]


def test_keys_of_sweep_points_differ() -> None:
    rows = [row for row in comparison.all_rows() if row.seed == 0]
    keys = [sweep_key(row, *point) for row in rows for point in itertools.product(GUIDANCES, TEMPERATURES)]
    assert len(set(keys)) == len(keys)


def test_selection_takes_models_and_rows_in_order_of_importance() -> None:
    def selected(*names: str) -> set[str]:
        return {row.name for row in comparison.selected_rows([comparison._selected(name) for name in names])}

    assert selected("flow-map-2", "energy") == {"flow-map 2", "energy 1"}
    assert selected("flow-map") == {"flow-map 4", "flow-map 2", "flow-map 1"}
    seeds = [row.seed for row in comparison.selected_rows(None)]
    assert seeds == sorted(seeds)
    with pytest.raises(Exception, match="shortcut-7"):
        comparison._selected("shortcut-7")


def test_error_of_a_ratio_is_that_of_many_simulated_comparisons() -> None:
    """The propagated error agrees with the spread of ratios of means of three normal draws."""
    generator = torch.Generator().manual_seed(0)
    a = 400 + 8 * torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    b = 440 + 5 * torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    simulated = float((a.mean(dim=1) / b.mean(dim=1)).std())
    errors = [ratio(*pair)[1] for pair in zip(a[:2000].tolist(), b[:2000].tolist())]
    propagated = math.sqrt(statistics.fmean(error**2 for error in errors if error is not None))
    assert propagated == pytest.approx(simulated, rel=0.05)
    assert ratio([1.0], [2.0, 3.0]) == (0.4, None)


def test_rows_of_the_same_trainings_are_compared_training_by_training() -> None:
    """Ten steps that are 1 % worse in every training are so without error, however much trainings differ."""

    def rows(model: str, distances: list[float]) -> list[dict[str, Any]]:
        return [{"weights": f"{model}-{seed}", "FD": value} for seed, value in enumerate(distances)]

    values = {"setting": {"distance": "FD"}}
    base = rows("diffusion", [400.0, 440.0, 420.0])
    assert distance_ratio(values, rows("diffusion", [404.0, 444.4, 424.2]), base) == "1.010 ± 0.000"
    assert distance_ratio(values, base, base) == "1.000"
    other = distance_ratio(values, rows("shortcut", [404.0, 444.4, 424.2]), base)
    assert other.startswith("1.010 ± ")
    assert float(other.split()[-1]) > 0.03
