"""Numbers of the original MAR code, with the raw weights and with a converted checkpoint."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import far
from far.backbone.masked import MaskedConfig
from far.convert import convert_mar
from far.heads import DiffusionConfig
from far.heads.diffusion import DiffusionHead, Schedule, train_alphas_cumprod
from far.model import FAR, ModelConfig, NetworkConfig
from far.sampling import SamplingConfig, sample

FIXTURES = Path(__file__).parent / "fixtures"
BATCH, TOKENS, CHANNELS = 3, 16, 16


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    with safe_open(FIXTURES / "mar_reference.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — not a mapping


@pytest.fixture(scope="module")
def metadata() -> dict[str, str]:
    with safe_open(FIXTURES / "mar_reference.safetensors", "pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FAR:
    """The raw weights of the published form, converted, written, and loaded as a user does."""
    folder = tmp_path_factory.mktemp("converted")
    convert_mar(FIXTURES / "mar_reference_checkpoint.pth", folder, ema=False)
    pipeline = far.load(folder)
    return pipeline.model


@pytest.fixture(scope="module")
def direct(reference: dict[str, Tensor]) -> FAR:
    """The fixture's own weights, put into our modules by a renaming written for this test alone."""
    renaming = [
        ("encoder_pos_embed_learned", "backbone.encoder_positions"),
        ("decoder_pos_embed_learned", "backbone.decoder_positions"),
        ("diffusion_pos_embed_learned", "backbone.condition_positions"),
        ("mask_token", "backbone.mask_token"),
        ("encoder_blocks", "backbone.encoder_blocks"), ("decoder_blocks", "backbone.decoder_blocks"),
        ("encoder_norm", "backbone.encoder_norm"), ("decoder_norm", "backbone.decoder_norm"),
        ("decoder_embed", "backbone.decoder_projection"), ("z_proj_ln", "backbone.token_norm"),
        ("z_proj", "backbone.token_projection"),
        ("diffloss.net", "head.network"), ("time_embed.mlp.0", "time_embeddings.0.linear_in"),
        ("time_embed.mlp.2", "time_embeddings.0.linear_out"), ("cond_embed", "condition_embedding"),
        ("input_proj", "input_projection"), ("res_blocks", "blocks"), ("in_ln", "norm"),
        ("mlp.0", "linear_in"),
        ("mlp.2", "linear_out"), ("final_layer", "output"), ("adaLN_modulation.1", "modulation"),
    ]  # fmt: skip
    weights = {
        name.removeprefix("weights."): tensor
        for name, tensor in reference.items()
        if name.startswith("weights.")
    }
    embedding = torch.cat([weights.pop("class_emb.weight"), weights.pop("fake_latent")])
    renamed = {"backbone.class_embedding.weight": embedding}
    for name, tensor in weights.items():
        for theirs, ours in renaming:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    model = FAR(expected_config())
    model.load_state_dict(renamed)
    return model.eval()


def expected_config() -> ModelConfig:
    backbone = MaskedConfig(
        encoder_width=32,
        encoder_depth=2,
        encoder_heads=4,
        decoder_width=48,
        decoder_depth=2,
        decoder_heads=4,
        buffer=8,
    )
    return ModelConfig(
        NetworkConfig(backbone, DiffusionConfig(40, 2, samples_per_token=4), patch=1), 10, 16, (4, 4)
    )


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def known_positions(reference: dict[str, Tensor]) -> Tensor:
    return (reference["forward.mask"] == 0).nonzero()[:, 1].view(BATCH, -1)


@pytest.fixture(params=["converted", "direct"])
def any_model(request: pytest.FixtureRequest) -> FAR:
    return request.getfixturevalue("model" if request.param == "converted" else "direct")


def test_configuration_is_inferred(model: FAR, metadata: dict[str, str]) -> None:
    assert model.config == expected_config()
    assert json.loads(metadata["config"])["buffer_size"] == model.config.network.backbone.buffer


def test_tokens_and_latents(any_model: FAR, reference: dict[str, Tensor]) -> None:
    assert torch.equal(any_model.tokens(reference["forward.latents"]), reference["forward.tokens"])
    assert torch.equal(any_model.latents(reference["forward.tokens"]), reference["forward.latents"])


@torch.no_grad()
def test_encoder_and_conditions(any_model: FAR, reference: dict[str, Tensor]) -> None:
    backbone, known = any_model.backbone, known_positions(reference)
    everywhere = torch.arange(TOKENS).expand(BATCH, TOKENS)
    encoded = backbone.encode(reference["forward.tokens"], known, reference["forward.labels"])
    assert relative(encoded, reference["forward.encoder_out"]) < 1e-5
    assert relative(backbone.decode(encoded, known, everywhere), reference["forward.z"]) < 1e-5
    z = backbone(reference["forward.tokens"], known, everywhere, reference["forward.labels"])
    assert relative(z, reference["forward.z"]) < 1e-5


@torch.no_grad()
def test_head_loss(any_model: FAR, reference: dict[str, Tensor]) -> None:
    head = any_model.head
    assert isinstance(head, DiffusionHead)
    x, z, t = (
        reference["forward.tokens"].flatten(0, 1),
        reference["forward.z"].flatten(0, 1),
        reference["head.t"],
    )
    assert (
        relative(Schedule.respaced(1000).noisy(x, reference["head.noise"], t), reference["head.x_t"]) < 1e-6
    )
    assert relative(head.network(reference["head.x_t"], z, t), reference["head.net_out"]) < 1e-5
    mse, bound = head.loss_terms(x, z, t, reference["head.noise"])
    assert relative(mse, reference["head.mse"]) < 1e-4
    assert relative(bound, reference["head.vb"]) < 1e-4
    assert relative(mse + bound, reference["head.loss_per_token"]) < 1e-4
    mask = reference["forward.mask"].flatten()
    assert (
        relative(
            (((mse + bound) * mask).sum() / mask.sum()).view(-1), reference["head.loss_masked_mean"].view(-1)
        )
        < 1e-4
    )


def test_schedule(reference: dict[str, Tensor]) -> None:
    schedule = Schedule.respaced(10)
    assert schedule.timesteps == reference["diffusion.gen_timesteps"].tolist()
    assert relative(schedule.betas, reference["diffusion.gen_betas"].double()) < 1e-6
    assert relative(train_alphas_cumprod(), reference["diffusion.train_alphas_cumprod"].double()) < 1e-6


class RecordedNoise:
    """The random numbers of a recorded generation, in the sequence in which they were drawn."""

    def __init__(self, reference: dict[str, Tensor], kind: str) -> None:
        prefix = f"sample.{kind}.noise."
        self.draws = [
            reference[name] for name in sorted(name for name in reference if name.startswith(prefix))
        ]
        self.reference_orders = reference[f"sample.{kind}.orders"]

    def orders(self, tokens: int) -> Tensor:
        assert tokens == TOKENS
        return self.reference_orders.flip(1)

    def normals(self, counts: list[int], channels: int) -> list[Tensor]:
        # A guided generation also drew noise for its unconditional rows, which nothing depends on.
        return [self.draws.pop(0)[: BATCH * count].view(BATCH, count, channels) for count in counts]


@pytest.mark.parametrize("kind", ["plain", "guided"])
def test_whole_sampling(
    any_model: FAR, reference: dict[str, Tensor], metadata: dict[str, str], kind: str
) -> None:
    noise = RecordedNoise(reference, kind)
    settings = (float(metadata["cfg"]), float(metadata["temperature"])) if kind == "guided" else (1.0, 1.0)
    config = SamplingConfig(
        int(metadata["num_iter"]), head_steps=10, guidance=settings[0], temperature=settings[1]
    )
    labels = reference.get(f"sample.{kind}.labels", reference["forward.labels"])
    latents = sample(any_model, labels, noise, config)
    assert not noise.draws, "the recorded generation drew more noise"
    assert relative(latents, reference[f"sample.{kind}.latents"]) < 1e-3


def test_averaged_weights_are_taken(tmp_path: Path, model: FAR, reference: dict[str, Tensor]) -> None:
    convert_mar(FIXTURES / "mar_reference_checkpoint.pth", tmp_path)
    pipeline = far.load(tmp_path)
    raw = model.state_dict()
    for name, averaged in pipeline.model.state_dict().items():
        torch.testing.assert_close(averaged, raw[name] + 0.01)
    torch.testing.assert_close(
        pipeline.model.backbone.class_embedding.weight[-1], reference["weights.fake_latent"][0] + 0.01
    )


def test_checkpoint_is_of_the_published_form() -> None:
    """The checkpoint that the conversion reads above needs the allowed pickle classes."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(FIXTURES / "mar_reference_checkpoint.pth", weights_only=True)
    assert checkpoint.keys() == {"model", "model_ema", "optimizer", "epoch", "scaler", "args"}
    assert isinstance(checkpoint["args"], argparse.Namespace)
