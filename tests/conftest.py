"""A tiny image set, autoencoder, latent cache and model that many tests share; real files, made once."""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from far.autoencoder import Autoencoder, AutoencoderConfig
from far.backbone import BlockCausalConfig, CausalConfig, MaskedConfig
from far.data.latents import write_latents
from far.data.shards import ShardWriter
from far.files import json_digest, read_json, write_json
from far.folder import load_autoencoder, save_autoencoder
from far.heads import DiffusionConfig, ShortcutConfig
from far.model import FAR, ModelConfig, NetworkConfig
from far.pipeline import Pipeline
from far.sampling import SamplingConfig

# The references of the tests are the CPU's; device "auto" would take a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

CLASSES = ["circle", "square", "stripes"]
SIZE = 16


def draw_images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[count, 16, 16, 3]`` uint8 of three kinds of shapes in random colors, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(CLASSES)
    colors = torch.randint(0, 256, (count, 2, 3), generator=generator)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    shapes = torch.stack(
        [(x - 8) ** 2 + (y - 8) ** 2 < 30, (x - 8).abs().maximum((y - 8).abs()) < 5, x % 4 < 2]
    )
    inside = shapes[labels].unsqueeze(-1)
    return torch.where(inside, colors[:, 0, None, None], colors[:, 1, None, None]).to(torch.uint8), labels


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of several threads can be rounded otherwise than those of one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def image_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for split, count, seed in (("train", 60, 0), ("held-out", 12, 1)):
        writer = ShardWriter(
            folder / split,
            {"kind": "images", "size": SIZE, "classes": CLASSES, "source": "drawn by the tests"},
        )
        images, labels = draw_images(count, seed)
        writer.write({"images": images, "labels": labels}, cursor=count)
        writer.finish()
    return folder


@pytest.fixture(scope="session")
def autoencoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoder")
    config = AutoencoderConfig(
        width=8, width_multipliers=(1, 1, 2), blocks=1, latent_channels=2, norm_groups=4, scale=2.0
    )
    save_autoencoder(Autoencoder(config), folder)
    return folder


@pytest.fixture(scope="session")
def latents_folder(
    tmp_path_factory: pytest.TempPathFactory, image_set: Path, autoencoder_folder: Path
) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "latents"
    write_latents(image_set, load_autoencoder(autoencoder_folder), folder)
    return folder


NETWORK = NetworkConfig(MaskedConfig(16, 1, 2, 16, 1, 2, 2, 0.1), ShortcutConfig(16, 1, 2), patch=2)


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory, autoencoder_folder: Path) -> Path:
    """An untrained pipeline of 4 tokens, with random (not zero) outputs so that images differ."""
    torch.manual_seed(0)
    model = FAR(ModelConfig(NETWORK, len(CLASSES), 2, (4, 4)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("pipeline")
    Pipeline(
        model, load_autoencoder(autoencoder_folder), CLASSES, SamplingConfig(ar_steps=4, head_steps=2)
    ).save_pretrained(folder)
    return folder


def save_diffusion_model(network: NetworkConfig, autoencoder: Path, folder: Path) -> Path:
    """An untrained pipeline of 4 tokens with MAR's head, random as the one above."""
    torch.manual_seed(1)
    # The limit keeps what a random ε does at the noisy end from becoming large.
    head = DiffusionConfig(16, 1, 2, token_limit=3.0)
    model = FAR(ModelConfig(dataclasses.replace(network, head=head), len(CLASSES), 2, (4, 4)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    defaults = SamplingConfig(ar_steps=4, head_steps=5, guidance=3.0)
    Pipeline(model, load_autoencoder(autoencoder), CLASSES, defaults).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def diffusion_folder(tmp_path_factory: pytest.TempPathFactory, autoencoder_folder: Path) -> Path:
    return save_diffusion_model(NETWORK, autoencoder_folder, tmp_path_factory.mktemp("diffusion"))


@pytest.fixture(scope="session")
def causal_diffusion_folder(tmp_path_factory: pytest.TempPathFactory, autoencoder_folder: Path) -> Path:
    network = NetworkConfig(CausalConfig(width=16, depth=1, heads=2), patch=2)
    return save_diffusion_model(network, autoencoder_folder, tmp_path_factory.mktemp("causal-diffusion"))


@pytest.fixture(scope="session")
def block_causal_diffusion_folder(tmp_path_factory: pytest.TempPathFactory, autoencoder_folder: Path) -> Path:
    backbone = BlockCausalConfig(width=16, encoder_depth=1, decoder_depth=1, heads=2)
    folder = tmp_path_factory.mktemp("block-causal-diffusion")
    return save_diffusion_model(NetworkConfig(backbone, patch=2), autoencoder_folder, folder)


def write_recipe(path: Path, data: Path, run: Path, autoencoder: Path) -> Path:
    """A recipe that trains the tiny model."""
    path.write_text(f"""
data: {data}
run: {run}
autoencoder_from: {autoencoder}
generator:
  network:
    patch: 2
    backbone: {{encoder_width: 16, encoder_depth: 1, encoder_heads: 2, decoder_width: 16,
               decoder_depth: 1, decoder_heads: 2, buffer: 2}}
    head: {{kind: shortcut, width: 16, depth: 1, samples_per_token: 2}}
  training:
    {{steps: 20, batch_size: 8, learning_rate: 1.0e-3, warmup_steps: 5, log_every: 5, checkpoint_every: 10,
     evaluate_every: 20,
     dtype: float32}}
  sampling: {{ar_steps: 2, head_steps: 2}}
  evaluation: {{images: 6, references: 12, grid_per_class: 1}}
""")
    return path


@pytest.fixture
def recipe(tmp_path: Path, image_set: Path, autoencoder_folder: Path, latents_folder: Path) -> Path:
    """A recipe that trains the tiny model on the shared cache, in a run folder of its own."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "latents").symlink_to(latents_folder)
    return write_recipe(tmp_path / "recipe.yaml", image_set, run, autoencoder_folder)


# As many classes as in the shared image set, but with another second one.
RENAMED = ["circle", "rings", "square"]


@pytest.fixture
def renamed(recipe: Path, image_set: Path, autoencoder_folder: Path, tmp_path: Path) -> list[str]:
    """Return overrides that train on an image set of as many other classes, with a cache of its own."""
    shutil.copytree(image_set, tmp_path / "renamed")
    for part in ("train", "held-out"):
        index = read_json(tmp_path / "renamed" / part / "index.json")
        index["meta"]["classes"] = RENAMED
        index["sha256"] = json_digest({name: value for name, value in index.items() if name != "sha256"})
        write_json(tmp_path / "renamed" / part / "index.json", index)
    write_latents(tmp_path / "renamed", load_autoencoder(autoencoder_folder), tmp_path / "other" / "latents")
    return [f"data={tmp_path / 'renamed'}", f"run={tmp_path / 'other'}"]
