"""A small model and its export, and every backbone and head as ONNX files, made once for all tests here."""

from pathlib import Path

import pytest
import torch
from made_once import made_once
from onnx_parts import CLASSES, Parts, config_of, random_model

from far.autoencoder import Autoencoder, AutoencoderConfig
from far.cli.main import main
from far.pipeline import Pipeline
from far.sampling import SamplingConfig


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small random model with an autoencoder."""
    return made_once(tmp_path_factory, "whole", save_whole)


def save_whole(folder: Path) -> None:
    statistics = {"scale": (0.5, 1.0, 2.0, 3.0), "shift": (0.1, 0.2, -0.3, 0.0)}
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(8, (1, 1, 2), 1, 4, norm_groups=4, **statistics)).eval()
    model, defaults = random_model(config_of("causal", "energy")), SamplingConfig(12, 1, guidance=2.0)
    Pipeline(model, autoencoder, CLASSES, defaults, results={"loss": 1.5}).save_pretrained(folder)


@pytest.fixture(scope="session")
def exported(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def export(folder: Path) -> None:
        assert main(["export", "onnx", str(whole), str(folder)]) == 0

    return made_once(tmp_path_factory, "exported", export)


@pytest.fixture(scope="session")
def parts(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return Parts(exported, tmp_path_factory)
