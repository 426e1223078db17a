"""Causal backbones in the commands: training, resuming, generating, and rejected settings."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from far.autoencoder import Autoencoder, AutoencoderConfig
from far.cli.main import main
from far.folder import load_autoencoder, save_autoencoder
from far.pipeline import Pipeline
from far.sampling import SeededNoise, sample

CAUSAL = [
    "generator.network.backbone={kind: causal, width: 16, depth: 1, heads: 2, input_noise: 0.1}",
    "generator.sampling.ar_steps=4",
]


def test_causal_model_trains_resumes_and_generates(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe), *CAUSAL, "model=whole"]) == 0
    assert main(["train", str(recipe), *CAUSAL, "model=half", "generator.training.steps=10"]) == 0
    assert main(["train", str(recipe), *CAUSAL, "model=half", "--resume"]) == 0
    run = recipe.parent / "run"
    whole, half = (Pipeline.from_pretrained(run / name).model.state_dict() for name in ("whole", "half"))
    for name, tensor in whole.items():
        torch.testing.assert_close(half[name], tensor, msg=name)
    losses = [
        entry["loss"]
        for entry in map(json.loads, (run / "whole" / "log.jsonl").read_text().splitlines())
        if "loss" in entry
    ]
    assert losses[-1] < losses[0]

    generate = ["generate", "--weights", str(run / "whole"), "--count", "3"]
    assert main([*generate, "--guidance", "2", "--out", str(tmp_path / "grid.png")]) == 0
    assert (tmp_path / "grid.png").stat().st_size > 100
    capsys.readouterr()
    assert main([*generate, "--ar-steps", "2", "--out", str(tmp_path / "none.png")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "ar_steps 2" in error
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(("head", "steps"), [("diffusion", 2), ("flow", 2), ("flow_map", 2), ("energy", 1)])
def test_causal_backbone_trains_with_any_head(recipe: Path, head: str, steps: int) -> None:
    overrides = [*CAUSAL, f"generator.network.head.kind={head}", f"generator.sampling.head_steps={steps}"]
    assert main(["train", str(recipe), *overrides]) == 0
    pipeline = Pipeline.from_pretrained(recipe.parent / "run" / "model")
    assert pipeline.model.config.network.head.kind == head
    assert pipeline.draw([0, 1], [1, 2]).shape == (2, 3, 16, 16)


def test_frozen_causal_backbone_stays(recipe: Path) -> None:
    assert main(["train", str(recipe), *CAUSAL, "model=joint"]) == 0
    joint = recipe.parent / "run" / "joint"
    assert (
        main(
            [
                "train",
                str(recipe),
                *CAUSAL,
                f"generator.frozen_backbone={joint}",
                "generator.network.head.kind=flow",
            ]
        )
        == 0
    )
    before, after = (
        Pipeline.from_pretrained(folder).model.backbone.state_dict()
        for folder in (joint, joint.parent / "model")
    )
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_too_few_ar_steps_for_a_causal_backbone_are_rejected(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe), CAUSAL[0]]) == 2
    assert "ar_steps 2" in capsys.readouterr().err
    assert not (recipe.parent / "run" / "model").exists()


def test_spherical_model_needs_a_spherical_autoencoder(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spherical = [*CAUSAL, "generator.network.spherical=true"]
    assert main(["train", str(recipe), *spherical]) == 2
    assert "network.spherical" in capsys.readouterr().err.splitlines()[-1]
    torch.manual_seed(0)
    config = AutoencoderConfig(
        width=8,
        width_multipliers=(1, 1, 2),
        blocks=1,
        latent_channels=2,
        norm_groups=4,
        scale=1.0,
        spherical=True,
    )
    save_autoencoder(Autoencoder(config), tmp_path / "sphere")
    place = [f"autoencoder_from={tmp_path / 'sphere'}", f"run={tmp_path / 'spherical'}"]
    assert main(["cache", str(recipe), *place]) == 0
    assert main(["train", str(recipe), *place, *spherical]) == 0
    pipeline = Pipeline.from_pretrained(tmp_path / "spherical" / "model")
    latents = sample(
        pipeline.model, torch.tensor([0, 1]), SeededNoise([1, 2], torch.device("cpu")), pipeline.defaults
    )
    torch.testing.assert_close(latents.norm(dim=1), torch.full((2, 4, 4), 2**0.5))


def test_latent_cache_of_a_plain_autoencoder_is_rejected_by_its_spherical_twin(
    recipe: Path, autoencoder_folder: Path, tmp_path: Path
) -> None:
    """A spherical autoencoder encodes other moments than a plain one with equal weights."""
    plain = load_autoencoder(autoencoder_folder)
    twin = Autoencoder(dataclasses.replace(plain.config, spherical=True))
    twin.load_state_dict(plain.state_dict())
    save_autoencoder(twin, tmp_path / "twin")
    assert main(["train", str(recipe), *CAUSAL, f"autoencoder_from={tmp_path / 'twin'}"]) == 2
