"""GPUs and Macs, tested without one: no stalls in AR or training steps, no float64, no mixed devices."""

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from other_device import DEVICE, Watch, without_mps_kernel
from slope import Slope, loop
from torch import Tensor, nn

from far.autoencoder import Autoencoder, AutoencoderConfig
from far.backbone import BlockCausalConfig, CausalConfig, MaskedConfig
from far.data.image_sets import open_image_set, read_images
from far.evaluation.features import load_feature_network
from far.heads import HEADS, Condition, HeadConfig
from far.model import FAR, ModelConfig, NetworkConfig
from far.sampling import Kept, SamplingConfig, ar_steps, prepare_start
from far.sampling_config import unused_options
from far.training.autoencoder import latent_statistics
from far.training.generator import means_by_time
from far.training.log import Meter
from far.training.loop import Trainer

BACKBONES = {
    "masked": MaskedConfig(16, 1, 2, 24, 1, 2, buffer=2),
    "causal": CausalConfig(width=16, depth=1, heads=2, buffer=2),
    "block_causal": BlockCausalConfig("block_causal", 16, 1, 1, 2, buffer=2),
}
GRID, BATCH, KEPT = (2, 4), 3, 3
LABELS = torch.zeros(BATCH, dtype=torch.long, device=DEVICE)

HEAD_CASES = [
    *({"kind": kind} for kind in sorted(HEADS)),
    {"kind": "flow_map", "max_guidance": 4.0},
    {"kind": "flow_map", "objective": "lagrangian"},
    {"kind": "flow", "solver": "heun"},
    {"kind": "diffusion", "token_limit": 5.0},
]


def named(values: dict) -> str:
    return "-".join(map(str, values.values())) or "plain"


def model(backbone: str, kind: str, **head: object) -> FAR:
    network = NetworkConfig(BACKBONES[backbone], HeadConfig.kinds[kind](16, 1, **head))
    return FAR(ModelConfig(network, classes=5, latent_channels=3, grid=GRID)).to(DEVICE)


class NoiseOnTheDevice:
    """Noise drawn on the device, so that all remaining copies are the sampler's or the head's."""

    def orders(self, tokens: int) -> Tensor:
        return torch.empty(BATCH, tokens, dtype=torch.long, device=DEVICE)

    def normals(self, counts: Sequence[int], channels: int) -> list[Tensor]:
        return [torch.empty(BATCH, count, channels, device=DEVICE) for count in counts]


def draw(network: FAR, kept: bool, **sampling: object) -> Watch:
    """Generate on the device, and return the record of a second generation's AR steps."""
    known = Kept(torch.zeros(BATCH, 3, *GRID), torch.arange(KEPT)) if kept else None
    tokens = network.config.tokens - (KEPT if kept else 0)
    config = SamplingConfig(ar_steps=4 if network.backbone.any_order else tokens, guidance=3.0, **sampling)
    start = prepare_start(network, LABELS, NoiseOnTheDevice(), config, kept=known)
    list(ar_steps(network, start, config))  # moves a head's tables
    with Watch() as watch:
        *_, last = ar_steps(network, start, config)
    assert last.latents.device == DEVICE
    return watch


@pytest.mark.parametrize("kept", [False, True], ids=["whole", "kept"])
@pytest.mark.parametrize("head", HEAD_CASES, ids=named)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_ar_steps_copy_and_read_nothing(backbone: str, head: dict, kept: bool) -> None:
    network = model(backbone, **head)
    watch = draw(network, kept, head_steps=(min(3, network.head.max_steps), 1))
    assert (watch.copies, watch.reads, watch.float64) == ([], [], [])


APPROXIMATIONS = [
    {"order": "halton"},
    {"order": "raster"},
    {"refresh_every": 2},
    {"guidance_every": 2},
    {"refresh_every": 2, "guidance_every": 2},
    {"guidance_interval": (0.2, 0.8)},
]


@pytest.mark.parametrize("sampling", APPROXIMATIONS, ids=named)
@pytest.mark.parametrize("backbone", ["masked", "block_causal"])
def test_ar_steps_of_approximations_copy_and_read_nothing(backbone: str, sampling: dict) -> None:
    network = model(backbone, kind="shortcut")
    if set(sampling) & set(unused_options(network)):
        pytest.skip("this backbone does not take the option")
    watch = draw(network, False, head_steps=2, **sampling)
    assert (watch.copies, watch.reads, watch.float64) == ([], [], [])


@pytest.mark.parametrize("head", HEAD_CASES, ids=named)
def test_16_bit_models_make_no_float64(head: dict) -> None:
    network = model("masked", **head).to(torch.bfloat16)
    assert draw(network, False, head_steps=min(2, network.head.max_steps)).float64 == []


@pytest.mark.parametrize("head", HEAD_CASES, ids=named)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_training_reads_nothing_and_makes_no_float64(backbone: str, head: dict) -> None:
    network = model(backbone, **head)
    labels = torch.zeros(BATCH, dtype=torch.long, device=DEVICE)
    with Watch() as watch:
        latents = torch.empty(BATCH, 3, *GRID, device=DEVICE)
        loss = network.loss(latents, labels, torch.Generator().manual_seed(0), label_drop=0.1, step=1)
        loss.value.mean().backward()
        means_by_time(loss.samples, loss.t, 4)
        for term in loss.terms.values():
            term.mean()
    assert (watch.reads, watch.float64) == ([], [])
    assert all(parameter.grad is not None for parameter in network.head.parameters())


class SlopeOnTheDevice(Slope):
    def __init__(self, discriminator: nn.Module | None) -> None:
        super().__init__()
        self.module.to_empty(device=DEVICE)
        self.discriminator = discriminator

    def batch(self, step: int, generator: torch.Generator) -> Tensor:
        return super().batch(step, generator).to(DEVICE)


# A discriminator has no gradients before its training starts.
@pytest.mark.parametrize("discriminator", [None, nn.Linear(4, 2, device=DEVICE)], ids=["alone", "idle"])
def test_optimizer_step_reads_one_value(
    discriminator: nn.Module | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = loop(micro_batches=4)
    object.__setattr__(config, "device", "meta")
    monkeypatch.setattr("far.training.loop.resolve_loop", lambda config, *_: config)
    # The meta device has neither autocast nor a fused AdamW.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **_: torch.optim.SGD(groups))
    trainer, meter = Trainer(SlopeOnTheDevice(discriminator), config, tmp_path), Meter()
    with Watch() as watch:
        trainer.train_step(meter)
    assert trainer.skipped_steps == 0
    assert len(meter.values["loss"]) == 4
    assert len(watch.reads) == 1


@pytest.mark.parametrize("kind", [kind for kind in sorted(HEADS) if kind != "energy"])
def test_velocities_make_no_float64(kind: str) -> None:
    head = model("masked", kind=kind).head
    z = torch.empty(5, 24, device=DEVICE)
    head.velocity(
        torch.empty(5, 3, device=DEVICE), torch.empty(5, device=DEVICE), Condition(z)
    )  # tables are moved once
    with Watch() as watch:
        head.velocity(torch.empty(5, 3, device=DEVICE), torch.empty(5, device=DEVICE), Condition(z, z, 2.0))
    assert (watch.copies, watch.reads, watch.float64) == ([], [], [])


@torch.no_grad()
def test_evaluation_of_an_autoencoder_makes_no_float64(image_set: Path) -> None:
    config = AutoencoderConfig(
        width=8, width_multipliers=(1, 1, 2), blocks=1, latent_channels=2, norm_groups=4, scale=2.0
    )
    images, network = open_image_set(image_set / "train"), load_feature_network().to(DEVICE)
    for spherical in (False, True):
        autoencoder = Autoencoder(dataclasses.replace(config, spherical=spherical)).to(DEVICE)
        with Watch() as watch:
            network(
                autoencoder.decode(autoencoder.encode(read_images(images, torch.arange(4)).to(DEVICE)).mean)
                / 2
                + 0.5
            )
            latent_statistics(autoencoder, partial(read_images, images), torch.arange(4))
        assert watch.float64 == []


def test_generation_and_training_use_only_operations_of_mps() -> None:
    used: set[str] = set()
    latents = torch.empty(BATCH, 3, *GRID, device=DEVICE)
    labels = torch.zeros(BATCH, dtype=torch.long, device=DEVICE)
    # Backbones and heads are independent: test every head on one backbone, and every backbone with one head.
    first_backbone, first_head = next(iter(BACKBONES)), HEAD_CASES[0]
    for backbone, head in itertools.product(BACKBONES, HEAD_CASES):
        if backbone != first_backbone and head != first_head:
            continue
        network = model(backbone, **head)
        whole = draw(network, True, head_steps=min(2, network.head.max_steps))
        with Watch() as watch:
            loss = network.loss(latents, labels, torch.Generator().manual_seed(0), label_drop=0.1, step=1)
            loss.value.mean().backward()
        used |= whole.operations | watch.operations
    assert {"addmm", "native_layer_norm_backward"} <= used, "operations are not recorded"
    assert without_mps_kernel(used) == []
    assert without_mps_kernel({"special_ndtri", "addmm"}) == ["special_ndtri"]
