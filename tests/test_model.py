"""The whole model: its sizes, and the training loss through backbone and head."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from far.backbone import BlockCausalConfig, CausalConfig, MaskedConfig
from far.heads import HEADS, Condition, FlowConfig, HeadConfig, ShortcutConfig, TokenLoss
from far.model import FAR, PRESETS, ModelConfig, NetworkConfig, preset
from far.sampling import SamplingConfig, SeededNoise, sample
from tests.refusals import refused

KINDS = sorted(HEADS)
BACKBONE = MaskedConfig(16, 1, 2, 24, 1, 2, buffer=2, dropout=0.0)
CAUSAL = CausalConfig(width=16, depth=2, heads=2, buffer=2, dropout=0.0)
BLOCK_CAUSAL = BlockCausalConfig("block_causal", 16, 1, 1, 2, buffer=2, dropout=0.0)
BACKBONES = {"masked": BACKBONE, "causal": CAUSAL, "block_causal": BLOCK_CAUSAL}


def tiny(
    kind: str,
    patch: int = 1,
    grid: tuple[int, int] = (4, 6),
    backbone: MaskedConfig | CausalConfig | BlockCausalConfig = BACKBONE,
    **head: float,
) -> FAR:
    torch.manual_seed(0)
    network = NetworkConfig(backbone, HeadConfig.kinds[kind](16, 1, 2, **head), patch)  # type: ignore[arg-type]
    model = FAR(ModelConfig(network, 5, 3, grid))
    with torch.no_grad():  # freshly initialized heads give zeros
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(size: int = 4, grid: tuple[int, int] = (4, 6)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, *grid, generator=generator), torch.randint(5, (size,), generator=generator)


def loss(model: FAR, latents: Tensor, labels: Tensor, label_drop: float = 0.1, seed: int = 2) -> Tensor:
    return model.loss(latents, labels, torch.Generator().manual_seed(seed), label_drop=label_drop).value


@pytest.mark.parametrize(
    ("name", "parameters", "millions"),
    [
        ("mar-b", 207_924_768, 208),
        ("mar-l", 478_326_304, 479),
        ("mar-h", 942_403_104, 943),
        ("far-b", 209_221_136, None),
        ("far-l", 480_274_448, None),
        ("far-h", 945_134_096, None),
        ("far-causal-b", 122_781_968, None),
        ("far-causal-l", 383_552_528, None),
        ("far-causal-xl", 886_716_176, None),
        ("far-bc-b", 123_175_952, None),
        ("far-bc-l", 384_077_840, None),
        ("far-bc-xl", 887_372_816, None),
    ],
)
def test_presets_have_the_published_sizes(name: str, parameters: int, millions: int | None) -> None:
    with torch.device("meta"):
        model = FAR(ModelConfig(preset(name)))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    if millions is not None:  # as published
        assert math.ceil(parameters / 1e6) == millions


@pytest.mark.parametrize(
    ("name", "published", "width"), [("b", 111, 768), ("l", 343, 1024), ("xl", 775, 1280)]
)
def test_causal_backbones_are_llamagens_but_for_its_vocabulary(name: str, published: int, width: int) -> None:
    with torch.device("meta"):
        backbone = FAR(ModelConfig(preset(f"far-causal-{name}"))).backbone
    vocabulary = 2 * 16_384 * width  # input table and output layer of a VQ model of 16,384 codes
    assert round(
        (sum(parameter.numel() for parameter in backbone.parameters()) + vocabulary) / 1e6
    ) == pytest.approx(published, abs=1)


@pytest.mark.parametrize("size", ["b", "l", "xl"])
def test_block_causal_presets_are_as_large_as_the_causal_ones(size: str) -> None:
    networks = [preset(f"far-{kind}-{size}") for kind in ("bc", "causal")]
    with torch.device("meta"):
        models = [FAR(ModelConfig(network)) for network in networks]
    any_order, causal = (sum(parameter.numel() for parameter in model.parameters()) for model in models)
    assert any_order == pytest.approx(causal, rel=0.01)
    assert networks[0].head == networks[1].head


def test_every_preset_has_a_size_above() -> None:
    counted = test_presets_have_the_published_sizes.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert {name for name, *_ in counted} == set(PRESETS)


def test_unknown_preset_is_refused() -> None:
    with refused("far-x", "mar-b"):
        preset("far-x")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patch", [1, 2])
def test_loss_has_the_shapes_of_its_tokens(kind: str, patch: int) -> None:
    model, (latents, labels) = tiny(kind, patch), batch()
    result = model.loss(latents, labels, torch.Generator().manual_seed(2), label_drop=0.1)
    tokens = model.config.tokens
    assert tokens == 24 // patch**2
    per_sample, rest = divmod(len(result.value), len(labels))
    assert rest == 0
    assert math.ceil(0.7 * tokens) <= per_sample <= tokens
    assert result.samples.shape == result.t.shape == (2 * len(result.value),)
    assert result.value.isfinite().all()
    assert float(result.t.min()) >= 0
    assert float(result.t.max()) <= 1
    for name, part in result.terms.items():
        assert part.dim() == 1, name
        assert part.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_causal_backbone_has_a_loss_at_every_token(kind: str) -> None:
    model, (latents, labels) = tiny(kind, backbone=CAUSAL), batch()
    result = model.loss(latents, labels, torch.Generator().manual_seed(2), label_drop=0.1)
    assert result.value.shape == (4 * 24,)
    assert result.samples.shape == (2 * 4 * 24,)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_spherical_models_see_directions_only(backbone: str) -> None:
    torch.manual_seed(0)
    network = NetworkConfig(BACKBONES[backbone], FlowConfig(16, 1, 2), 2, spherical=True)
    (latents, labels), model = batch(), FAR(ModelConfig(network, 5, 3, (4, 6)))
    torch.testing.assert_close(
        loss(model, 7 * latents, labels), loss(model, latents, labels), rtol=0, atol=1e-4
    )
    bent = latents * torch.tensor([1.0, 2.0, 1.0]).view(1, 3, 1, 1)
    assert (loss(model, bent, labels) - loss(model, latents, labels)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_loss_repeats_with_the_generator_alone(kind: str, backbone: str) -> None:
    model, (latents, labels) = tiny(kind, backbone=BACKBONES[backbone]), batch()
    state = torch.get_rng_state()
    first = loss(model, latents, labels)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    torch.manual_seed(99)
    assert torch.equal(loss(model, latents, labels), first)
    assert loss(model, latents, labels, seed=3).mean() != first.mean()


def test_loss_does_not_depend_on_dropped_labels() -> None:
    model, (latents, labels) = tiny("flow"), batch()
    others = (labels + 1) % 5
    assert torch.equal(loss(model, latents, labels, 1.0), loss(model, latents, others, 1.0))
    kept, moved = loss(model, latents, labels, 0.0), loss(model, latents, others, 0.0)
    assert (kept - moved).abs().max() > 1e-4
    null = torch.full_like(labels, model.null_label)
    assert torch.equal(loss(model, latents, labels, 1.0), loss(model, latents, null, 0.0))


def test_fraction_of_dropped_labels_is_label_drop() -> None:
    model, (latents, labels) = tiny("flow"), batch(2000)
    seen: list[Tensor] = []
    model.backbone.class_embedding.register_forward_hook(
        lambda module, arguments, output: seen.append(arguments[0])
    )
    loss(model, latents, labels, 0.1)
    dropped = seen[0] == model.null_label
    assert float(dropped.float().mean()) == pytest.approx(0.1, abs=0.03)
    assert torch.equal(seen[0][~dropped], labels[~dropped])


def training_condition(
    model: FAR, latents: Tensor, labels: Tensor, label_drop: float, monkeypatch: pytest.MonkeyPatch
) -> Condition:
    """Return the condition of the head's loss."""
    found: list[Condition] = []
    head = model.head.loss

    def spy(x: Tensor, condition: Condition, *rest: Any) -> TokenLoss:
        found.append(condition)
        return head(x, condition, *rest)

    monkeypatch.setattr(model.head, "loss", spy)
    loss(model, latents, labels, label_drop).mean().backward()
    monkeypatch.undo()
    return found[0]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("size", "half"), [(4, 2), (5, 3), (1, 1)])
def test_head_that_learns_guidance_gets_half_of_the_images_without_class(
    backbone: str, size: int, half: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known tokens are equal in both passes: with all labels dropped, both conditions are equal."""
    model, (latents, labels) = tiny("flow_map", backbone=BACKBONES[backbone], max_guidance=3.0), batch(size)
    condition = training_condition(model, latents, labels, 0.0, monkeypatch)
    dropped = training_condition(model, latents, labels, 1.0, monkeypatch).z
    z, uncond = condition.z, condition.uncond
    assert uncond is not None
    assert z.requires_grad
    assert not uncond.requires_grad
    assert len(uncond) == len(z) // size * half
    torch.testing.assert_close(uncond, dropped[: len(uncond)], rtol=0, atol=1e-5)
    assert (uncond - z[: len(uncond)]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_other_heads_take_one_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = tiny(kind), []
    model.backbone.class_embedding.register_forward_hook(lambda *arguments: passes.append(1))  # type: ignore[union-attr, operator]
    assert training_condition(model, *batch(), 0.1, monkeypatch).uncond is None
    assert len(passes) == 1


@pytest.mark.parametrize(
    ("kind", "head"), [*((kind, {}) for kind in KINDS), ("flow_map", {"max_guidance": 3.0})]
)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_parameter_learns(kind: str, head: dict[str, float], backbone: str) -> None:
    model, (latents, labels) = tiny(kind, backbone=BACKBONES[backbone], **head), batch(32)
    for seed in range(5):  # some masks leave no token known
        loss(model, latents, labels, label_drop=0.5, seed=seed).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "backbone",
    [
        MaskedConfig(32, 1, 4, 32, 1, 4, buffer=1, dropout=0.0),
        CausalConfig(width=32, depth=2, heads=4, dropout=0.0),
        BlockCausalConfig("block_causal", 32, 1, 1, 4, dropout=0.0),
    ],
)
def test_tokens_meet_their_own_conditions(backbone: MaskedConfig | CausalConfig | BlockCausalConfig) -> None:
    """If each position always holds the same token, only a head with the right ``z`` can learn it."""
    torch.manual_seed(0)
    model = FAR(ModelConfig(NetworkConfig(backbone, FlowConfig(64, 2, 4)), 1, 2, (2, 3)))
    latents = torch.randn(1, 2, 2, 3).expand(16, -1, -1, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    generator = torch.Generator().manual_seed(0)
    labels, values = torch.zeros(16, dtype=torch.long), []
    for _ in range(80):
        optimizer.zero_grad()
        value = model.loss(latents, labels, generator, label_drop=0.0).value.mean()
        value.backward()
        optimizer.step()
        values.append(value.item())
    # About 0.06. Conditions of other tokens leave 0.3 (block-causal) to 0.6 (masked) of the initial loss.
    assert sum(values[-15:]) / 15 < 0.2 * values[0]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (
            {"grid": (4, 5), "network": NetworkConfig(patch=2)},
            ["grid [4, 5]", "patch 2"],
        ),
        ({"grid": (4,)}, ["grid [4]"]),
        ({"grid": (0, 4)}, ["grid [0, 4]"]),
        ({"network": NetworkConfig(patch=0)}, ["patch 0"]),
        ({"classes": 0}, ["classes 0"]),
        ({"latent_channels": -1}, ["latent_channels -1"]),
    ],
)
def test_impossible_sizes_are_refused(values: dict, named: list[str]) -> None:
    with refused(*named):
        ModelConfig(**values)


@pytest.mark.parametrize(
    "backbone",
    [
        MaskedConfig(32, 1, 2, 32, 1, 2, 2),
        CausalConfig(width=32, depth=2, heads=2),
        BlockCausalConfig("block_causal", 32, 1, 1, 2),
    ],
    ids=["masked", "causal", "block_causal"],
)
def test_blocks_are_compiled_whole_and_for_few_shapes(
    backbone: MaskedConfig | CausalConfig | BlockCausalConfig,
) -> None:
    """torch.compile has no graph breaks, and does not recompile at each AR step although lengths change."""
    model = FAR(ModelConfig(NetworkConfig(backbone, ShortcutConfig(16, 1), patch=1), 3, 4, (8, 8))).eval()
    config = SamplingConfig(64 if isinstance(backbone, CausalConfig) else 16, 1, 2.0)
    parts = [*model.head.network.blocks]  # type: ignore[union-attr, misc]
    for name in ("blocks", "encoder_blocks", "decoder_blocks"):
        parts += [*getattr(model.backbone, name, [])]

    def draw() -> torch.Tensor:
        return sample(model, torch.tensor([0, 2]), SeededNoise([3, 4], torch.device("cpu")), config)

    plain = draw()
    torch._dynamo.reset()
    counter = CompileCounter()
    for part in parts:
        part.compile(backend=counter, fullgraph=True, dynamic=True)
    torch.testing.assert_close(draw(), plain, rtol=0, atol=1e-5)
    assert len(parts) <= counter.frame_count <= 5 * len(parts)


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_forward_hooks_see_every_pass_of_the_backbone(backbone: str) -> None:
    model, outputs = tiny("flow", backbone=BACKBONES[backbone]), []
    model.backbone.register_forward_hook(lambda module, arguments, z: outputs.append(z.shape[:2]))
    loss(model, *batch())
    assert len(outputs) == 1, "the loss takes one pass"
    outputs.clear()
    steps = 24 if backbone == "causal" else 3
    sample(model, torch.tensor([0, 1]), SeededNoise([0, 1], torch.device("cpu")), SamplingConfig(steps))
    assert len(outputs) == steps, "sampling takes one pass per AR step"
    assert sum(queries for _, queries in outputs) == 24, "each token is queried once"
