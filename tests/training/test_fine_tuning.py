"""Fine-tuning: frozen parts stay, adapters change plain layers by low rank, parts have rates of their own."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from checkpoints import assert_close_checkpoints, newest
from PIL import Image
from refusals import refused
from safetensors.torch import load_file
from torchrun import run

from far.backbone import BlockCausalConfig, CausalConfig
from far.cli.main import main
from far.config import to_dict
from far.convert import convert_kl16, convert_mar
from far.folder import load_autoencoder
from far.model import FAR
from far.pipeline import Pipeline
from far.recipe import load_recipe
from far.training.generator import GeneratorTask
from far.training.log import Meter
from far.training.loop import Trainer

FIXTURES = Path(__file__).parents[1] / "reference" / "fixtures"
RANK = 2
ADAPTERS = [f"generator.adapter_rank={RANK}"]
# Every linear layer gets a gradient, and changes by more than rounding.
FAST = [
    "generator.network.backbone.mask_ratio_min=0.0",
    "generator.network.backbone.mask_ratio_std=1.0",
    "generator.training.learning_rate=0.02",
    "generator.training.warmup_steps=0",
]
PARTS = ("class_embedding", "backbone", "head")


def part_of(name: str) -> str:
    return "class_embedding" if "class_embedding" in name else name.partition(".")[0]


def task(path: Path, *overrides: str) -> GeneratorTask:
    recipe = load_recipe(path, overrides)
    autoencoder = load_autoencoder(recipe.autoencoder_folder)
    return GeneratorTask(
        recipe.generator, Path(recipe.data), recipe.latents_folder, autoencoder, recipe.model_folder
    )


def trainer(path: Path, *overrides: str) -> Trainer:
    """Return the training of a recipe, to be run step by step."""
    trained, recipe = task(path, *overrides), load_recipe(path, overrides)
    return Trainer(trained, recipe.generator.training, recipe.model_folder)


@pytest.mark.parametrize("frozen", [["backbone"], ["head"], ["class_embedding"], ["backbone", "head"]])
def test_frozen_parts_stay_and_the_others_are_trained(
    frozen: list[str], recipe: Path, pipeline_folder: Path
) -> None:
    before = Pipeline.from_pretrained(pipeline_folder).model.state_dict()
    options = [f"generator.start_from={pipeline_folder}", f"generator.freeze={json.dumps(frozen)}"]
    training = trainer(recipe, *options)
    for _ in range(2):
        training.train_step(Meter())
    for module in (training.module, training.ema.module):
        moved = {
            part_of(name)
            for name, tensor in module.state_dict().items()
            if not torch.equal(tensor, before[name])
        }
        assert moved == {*PARTS} - {*frozen}


def test_averaged_adapters_are_published_as_low_rank_changes_of_plain_layers(
    recipe: Path, pipeline_folder: Path, tmp_path: Path
) -> None:
    source = Pipeline.from_pretrained(pipeline_folder).model
    layers = [name for name, layer in source.named_modules() if isinstance(layer, torch.nn.Linear)]
    training = trainer(recipe, f"generator.start_from={pipeline_folder}", *ADAPTERS, *FAST)
    for _ in range(6):
        training.train_step(Meter())
    training.task.publish(training.ema.module, tmp_path / "tuned", 6, {})
    tuned, before = Pipeline.from_pretrained(tmp_path / "tuned").model.state_dict(), source.state_dict()
    assert tuned.keys() == before.keys()
    for name, tensor in tuned.items():
        change, layer = (tensor - before[name]).double(), name.removesuffix(".weight")
        if part_of(name) != "backbone":
            continue
        if layer not in layers:
            assert not change.any(), name
            continue
        values = torch.linalg.svdvals(change)
        assert values[RANK - 1] > 1e-4, name
        assert values[RANK] < 1e-3 * values[0], name
        averaged, current = (module.state_dict() for module in (training.ema.module, training.module))
        torch.testing.assert_close(
            change.float(), averaged[f"{layer}.up"] @ averaged[f"{layer}.down"], rtol=0, atol=1e-6
        )
        assert not torch.allclose(averaged[f"{layer}.up"], current[f"{layer}.up"], atol=1e-4)
    for part in ("class_embedding", "head"):
        assert any(not torch.equal(tuned[name], before[name]) for name in tuned if part_of(name) == part)


def test_adapter_training_resumes_to_the_bit_without_its_source(
    recipe: Path, pipeline_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(pipeline_folder, tmp_path / "source")
    options = [f"generator.start_from={tmp_path / 'source'}", *ADAPTERS, "generator.freeze=[class_embedding]"]
    whole, half = (trainer(recipe, f"model={name}", *options) for name in ("whole", "half"))
    for training, steps in ((whole, 4), (half, 2)):
        for _ in range(steps):
            training.train_step(Meter())
    half.save()
    shutil.rmtree(tmp_path / "source")
    resumed = trainer(recipe, "model=half", *options)
    resumed.restore(resume=True)
    for _ in range(2):
        resumed.train_step(Meter())
    ours, theirs = resumed._tensors(), whole._tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    for key, change in (("adapter_rank", "3"), ("adapter_rank", "0"), ("freeze", "[]"), ("freeze", "[head]")):
        with refused(recipe.parent / "run" / "half", f"generator.{key}"):
            trainer(recipe, "model=half", *options, f"generator.{key}={change}").restore(resume=True)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_adapters_as_one(
    parallel: str, recipe: Path, pipeline_folder: Path, one_thread: None
) -> None:
    training = ["micro_batches=2", "steps=6", "evaluate_every=6", "checkpoint_every=6"]
    options = [f"generator.start_from={pipeline_folder}", *ADAPTERS]
    options += [f"generator.training.{value}" for value in training]
    alone = trainer(recipe, "model=alone", *options)
    for _ in range(6):
        alone.train_step(Meter())
    alone.save()
    run(2, "-m", "far", "train", recipe, "model=both", *options, f"generator.training.parallel={parallel}")
    folders = [recipe.parent / "run" / name for name in ("both", "alone")]
    assert_close_checkpoints(newest(folders[0]), newest(folders[1]))
    both, one = (Pipeline.from_pretrained(folder).model.state_dict() for folder in folders)
    for name, tensor in one.items():
        torch.testing.assert_close(both[name], tensor, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "backbone",
    [
        CausalConfig(width=16, depth=1, heads=2),
        BlockCausalConfig(width=16, encoder_depth=1, decoder_depth=1, heads=2),
    ],
    ids=type,
)
def test_adapters_fit_every_backbone(
    backbone: CausalConfig | BlockCausalConfig, recipe: Path, pipeline_folder: Path, tmp_path: Path
) -> None:
    """The first step's gradient reaches adapters, class embedding and head, and nothing else."""
    source = Pipeline.from_pretrained(pipeline_folder)
    network = dataclasses.replace(source.model.config.network, backbone=backbone)
    source.model = FAR(dataclasses.replace(source.model.config, network=network)).eval()
    source.save_pretrained(tmp_path / "source")
    options = [f"generator.start_from={tmp_path / 'source'}", *ADAPTERS]
    options += [f"generator.network.backbone={json.dumps(to_dict(backbone))}"]
    options += ["generator.sampling.ar_steps=4"]
    tuned = task(recipe, *options)
    generator = torch.Generator().manual_seed(0)
    loss, _ = tuned.loss(0, tuned.batch(0, generator), generator)
    loss.backward()
    reached = {name for name, p in tuned.module.named_parameters() if p.grad is not None}
    expected = {
        name
        for name, _ in tuned.module.named_parameters()
        if part_of(name) != "backbone" or name.endswith((".up", ".down"))
    }
    assert reached == expected


def test_every_part_may_have_its_own_rate(recipe: Path) -> None:
    rates = ["learning_rate=1.0e-3", "head_learning_rate=2.0e-4", "class_embedding_learning_rate=5.0e-3"]
    module = (trained := task(recipe, *(f"generator.training.{rate}" for rate in rates))).module
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = trained.parameter_groups(trained.config.training)
    found = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    expected = {"backbone": 1e-3, "head": 2e-4, "class_embedding": 5e-3}
    assert found == {name: expected[part_of(name)] for name in names.values()}
    # A resumed run may change its rates: the order of the parameters, and so of a checkpoint, is the same.
    same = task(recipe)
    order = [
        [names[id(p)] for group in groups for p in group["params"]],
        [
            {id(p): name for name, p in same.module.named_parameters()}[id(parameter)]
            for group in same.parameter_groups(same.config.training)
            for parameter in group["params"]
        ],
    ]
    assert order[0] == order[1]


def test_new_parts_cannot_be_frozen(
    recipe: Path, pipeline_folder: Path, diffusion_folder: Path, renamed: list[str]
) -> None:
    with refused(diffusion_folder, "diffusion", "head"):
        task(recipe, f"generator.start_from={diffusion_folder}", "generator.freeze=[head]")
    with refused(pipeline_folder, "'rings'", "class_embedding"):
        task(
            recipe,
            *renamed,
            f"generator.start_from={pipeline_folder}",
            "generator.freeze=[class_embedding]",
        )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["freeze=[backbone]"], ["freeze", "start_from"]),
        (["adapter_rank=2"], ["adapter_rank 2", "start_from"]),
        (["adapter_rank=2", "frozen_backbone=a"], ["adapter_rank 2", "start_from"]),
        (["start_from=a", "freeze=[backbone]", "adapter_rank=2"], ["adapter_rank 2", "freeze"]),
        (["start_from=a", "freeze=[head, class_embedding, backbone]"], ["freeze"]),
        (["start_from=a", "freeze=[decoder]"], ["freeze", "'decoder'", "'backbone'"]),
        (["start_from=a", "adapter_rank=-1"], ["adapter_rank -1"]),
        (["start_from=a", "adapter_rank=1000000"], ["adapter_rank 1000000"]),
        (["training.class_embedding_learning_rate=0"], ["class_embedding_learning_rate"]),
        (["start_from=a", "freeze=[head]", "training.head_learning_rate=0.1"], ["head_learning_rate 0.1"]),
        (
            ["frozen_backbone=a", "training.class_embedding_learning_rate=0.1"],
            ["class_embedding_learning_rate 0.1"],
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    options: list[str], named: list[str], recipe: Path
) -> None:
    with refused(*named):
        load_recipe(recipe, [f"generator.{option}" for option in options])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head_learning_rate", "0.1"),
        ("class_embedding_learning_rate", "0.1"),
        ("compile", "true"),
        ("checkpoint_activations", "true"),
    ],
)
def test_settings_of_generators_are_refused_for_an_autoencoder(name: str, value: str, recipe: Path) -> None:
    with refused(name):
        load_recipe(recipe, [f"autoencoder.training.{name}={value}"])


def test_converted_mar_is_fine_tuned_on_a_folder_of_images(tmp_path: Path) -> None:
    """One class is MAR's seventh, the other is new; adapters leave the rest of the backbone as published."""
    weights = load_file(FIXTURES / "kl16_reference.safetensors")
    weights = {key.removeprefix("weights."): t for key, t in weights.items() if key.startswith("weights.")}
    torch.save({"model": weights}, tmp_path / "kl16.ckpt")
    convert_mar(FIXTURES / "mar_reference_checkpoint.pth", tmp_path / "mar")
    convert_kl16(tmp_path / "kl16.ckpt", tmp_path / "mar")
    for name in ("7", "mine"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    source = Pipeline.from_pretrained(tmp_path / "mar")
    values = {
        "data": str(tmp_path / "data"), "run": str(tmp_path / "run"),
        "autoencoder_from": str(tmp_path / "mar"),
        "generator": {
            "start_from": str(tmp_path / "mar"), "adapter_rank": 2,
            "network": to_dict(source.model.config.network),
            "training": {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0},
            "sampling": {"ar_steps": 2, "head_steps": 2},
            "evaluation": {"images": 2, "references": 2, "grid_per_class": 1},
        },
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    data = ["folder", str(tmp_path / "images"), str(tmp_path / "data"), "--size", "64"]
    assert main(["data", *data, "--held-out-share", "0.25"]) == 0
    assert main(["cache", str(tmp_path / "recipe.yaml")]) == 0
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    tuned = Pipeline.from_pretrained(tmp_path / "run" / "model")
    assert tuned.generate(["mine"], output="tensor").isfinite().all()
    before, after = source.model.backbone.state_dict(), tuned.model.backbone.state_dict()
    assert {name for name in before if before[name].shape != after[name].shape} == {"class_embedding.weight"}
    assert torch.equal(before["encoder_positions"], after["encoder_positions"])
    assert torch.equal(before["encoder_norm.weight"], after["encoder_norm.weight"])
    assert not torch.equal(
        before["encoder_blocks.0.mlp.fc1.weight"], after["encoder_blocks.0.mlp.fc1.weight"]
    )
    seven = after["class_embedding.weight"][0] - before["class_embedding.weight"]
    assert int(seven.norm(dim=1).argmin()) == 7
