"""Small random backbones and heads, in torch and as ONNX files; see tests/export."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from made_once import made_once
from torch import nn

import far.onnx
from far.backbone import BlockCausalConfig, CausalConfig, MaskedConfig
from far.folder_config import FolderConfig
from far.heads import (
    DiffusionConfig,
    EnergyConfig,
    FlowConfig,
    FlowMapConfig,
    HeadConfig,
    ShortcutConfig,
)
from far.model import FAR, ModelConfig, NetworkConfig
from far.onnx.config import OnnxConfig, OnnxFile, export_values, open_export
from far.onnx.exporter import write_graphs
from far.onnx.graphs import BACKBONE, DECODER, ENCODER, graphs_of
from far.sampling import Kept, SamplingConfig, SeededNoise, sample

CLASSES = ("circle", "square", "stripes & dots")
BACKBONES = {
    "masked": MaskedConfig(32, 1, 2, 32, 1, 2, buffer=2, dropout=0.0),
    "causal": CausalConfig(width=32, depth=1, heads=2, buffer=2),
    "block_causal": BlockCausalConfig(width=32, encoder_depth=1, decoder_depth=1, heads=2, buffer=2),
}
SIZE = {"width": 24, "depth": 1}
HEADS: dict[str, HeadConfig] = {
    "shortcut": ShortcutConfig(**SIZE),
    "flow": FlowConfig(**SIZE, solver="heun"),
    "diffusion": DiffusionConfig(**SIZE, token_limit=3.0),
    "flow_map": FlowMapConfig(**SIZE, max_guidance=3.0),
    "energy": EnergyConfig(**SIZE),
}


def config_of(backbone: str, head: str) -> ModelConfig:
    network = NetworkConfig(BACKBONES[backbone], HEADS[head], spherical=head == "flow")
    return ModelConfig(network, len(CLASSES), latent_channels=4, grid=(3, 4))


def random_model(config: ModelConfig, seed: int = 0) -> FAR:
    """A model none of whose weights is zero, unlike an untrained one's."""
    model, generator = FAR(config), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


class Parts:
    """Every backbone and every head, in torch and as ONNX files. Any two make a model.

    Exporting takes seconds per file, so each part is exported once in a test run: ``causal`` and ``energy``
    by the fixture ``exported``, the others when a test first needs them.
    """

    def __init__(self, exported: Path, factory: pytest.TempPathFactory) -> None:
        self.exported, self.factory = exported, factory
        self.models = {name: random_model(config_of(name, "shortcut")) for name in BACKBONES}
        self.models |= {name: random_model(config_of("masked", name)) for name in HEADS}
        self.models |= dict.fromkeys(("causal", "energy"), random_model(config_of("causal", "energy")))

    def torch(self, backbone: str, head: str) -> FAR:
        model = random_model(config_of(backbone, head))
        model.backbone = copy.deepcopy(self.models[backbone].backbone)
        model.head = copy.deepcopy(self.models[head].head)
        return model

    def onnx(self, backbone: str, head: str, folder: Path) -> far.onnx.OnnxPipeline:
        files = {}
        for name in (backbone, head):
            part = self._exported(name)
            for file, described in open_export(part)[2].files.items():
                if (file == BACKBONE) == (name in BACKBONES) and file not in (DECODER, ENCODER):
                    shutil.copy(part / file, folder)
                    files[file] = described
        _write_config(files, config_of(backbone, head), folder)
        return far.onnx.load(folder)

    def _exported(self, name: str) -> Path:
        if name in ("causal", "energy"):
            return self.exported
        return made_once(self.factory, f"onnx-{name}", lambda folder: self._export(name, folder))

    def _export(self, name: str, folder: Path) -> None:
        graphs = graphs_of(self.models[name], None)
        own = {file: graphs[file] for file in graphs if (file == BACKBONE) == (name in BACKBONES)}
        _write_config(write_graphs(own, folder, "float32"), self.models[name].config, folder)


def _write_config(files: dict[str, OnnxFile], config: ModelConfig, folder: Path) -> None:
    values = export_values(FolderConfig(config, classes=CLASSES), OnnxConfig("float32", files))
    (folder / "config.json").write_text(json.dumps(values))


def latents(model: FAR, config: SamplingConfig, kept: Kept | None = None) -> torch.Tensor:
    return sample(
        model, torch.tensor([2, 0]), SeededNoise([5, 2**40], torch.device("cpu")), config, kept=kept
    )


def sampling(model: FAR, **given: object) -> SamplingConfig:
    steps = 5 if model.backbone.any_order else 12
    head_steps = min(3, model.head.max_steps)
    return dataclasses.replace(
        SamplingConfig(steps, head_steps, guidance=2.0, temperature=0.9),
        **given,  # type: ignore[arg-type]
    )
