"""The autoregressive loop. tests/reference compares its values with MAR's."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from far.backbone import BlockCausalBackbone, BlockCausalConfig, CausalBackbone, CausalConfig, MaskedConfig
from far.errors import InputError
from far.heads import HEADS, Condition, Draw, HeadConfig
from far.model import FAR, ModelConfig, NetworkConfig
from far.sampling import Kept, Progress, SamplingConfig, SeededNoise, sample, sampling_steps
from far.sampling_config import FAST, fast_options
from far.seeds import seeded_generator
from far.tokens import cosine_token_counts, halton_orders
from tests.refusals import refused

KINDS = sorted(HEADS)
CPU = torch.device("cpu")


def tiny(
    kind: str, patch: int = 1, causal: bool = False, spherical: bool = False, **head: float | None
) -> FAR:
    backbone = (
        CausalConfig(width=16, depth=2, heads=2, buffer=2)
        if causal
        else MaskedConfig(16, 2, 2, 24, 1, 2, buffer=2)
    )
    return tiny_with(backbone, kind, patch, spherical, **head)


def tiny_with(
    backbone: MaskedConfig | CausalConfig | BlockCausalConfig,
    kind: str,
    patch: int = 1,
    spherical: bool = False,
    **head: float | None,
) -> FAR:
    torch.manual_seed(0)
    network = NetworkConfig(backbone, HeadConfig.kinds[kind](16, 1, **head), patch, spherical)  # type: ignore[arg-type]
    model = FAR(ModelConfig(network, 5, 3, (4, 6)))
    with torch.no_grad():  # freshly initialized heads give zeros
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if (
            kind == "energy"
        ):  # untrained, its tokens follow z so closely that feeding them back magnifies rounding 1e5 times
            model.head.network.output.linear.weight.mul_(0.2)  # type: ignore[union-attr, operator]
    return model.eval()


MODELS = {kind: tiny(kind) for kind in KINDS}
CAUSAL = {f"causal {kind}": tiny(kind, causal=True) for kind in KINDS}
ALL = {**MODELS, **CAUSAL}
FLOW, CAUSAL_FLOW = MODELS["flow"], CAUSAL["causal flow"]
BLOCK_CAUSAL = tiny_with(BlockCausalConfig("block_causal", 16, 2, 2, 2, buffer=2), "flow")


def ar_steps(name: str, steps: int) -> int:
    """Return AR steps for a model of 24 tokens: a causal model always takes 24."""
    return 24 if name in CAUSAL else steps


def head_steps(name: str, *counts: int) -> tuple[int, ...]:
    """Limit head steps to what the model's head supports."""
    return tuple(min(steps, ALL[name].head.max_steps) for steps in counts)


def draw(model: FAR, labels: list[int], seeds: list[int], config: SamplingConfig, **options: Any) -> Tensor:
    return sample(model, torch.tensor(labels), SeededNoise(seeds, CPU), config, **options)


# --- One seed and label, one image -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_image_does_not_depend_on_its_batch(kind: str, guidance: float) -> None:
    config = SamplingConfig(
        ar_steps=ar_steps(kind, 5), head_steps=head_steps(kind, 4, 2), guidance=guidance, temperature=0.9
    )
    labels, seeds = [0, 3, 3, 1], [11, 12, 13, 14]
    together = draw(ALL[kind], labels, seeds, config)
    assert together.shape == (4, 3, 4, 6)
    # An untrained diffusion head draws values in the hundreds, for which 1e-4 is below float32's precision.
    tolerance = 1e-4 * max(1.0, float(together.abs().max()))
    order = [2, 0, 3, 1]
    permuted = draw(ALL[kind], [labels[place] for place in order], [seeds[place] for place in order], config)
    torch.testing.assert_close(permuted, together[order], rtol=0, atol=tolerance)
    for place in range(4):
        alone = draw(ALL[kind], labels[place : place + 1], seeds[place : place + 1], config)
        torch.testing.assert_close(alone[0], together[place], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ALL)
def test_image_depends_on_seed_and_label(kind: str) -> None:
    images = draw(
        ALL[kind],
        [0, 1, 0, 0],
        [7, 7, 8, 7],
        SamplingConfig(ar_steps=ar_steps(kind, 5), head_steps=head_steps(kind, 2)),
    )
    # The place in the batch can change the rounding; an untrained diffusion head magnifies that.
    torch.testing.assert_close(images[3], images[0], rtol=0, atol=1e-4 * max(1.0, float(images.abs().max())))
    assert (images[0] - images[1]).abs().max() > 1e-3, "the label does not count"
    assert (images[0] - images[2]).abs().max() > 0.02, "the seed does not count"


def test_global_generator_keeps_its_state() -> None:
    state = torch.get_rng_state()
    first = draw(FLOW, [0], [7], SamplingConfig(ar_steps=3, head_steps=2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(draw(FLOW, [0], [7], SamplingConfig(ar_steps=3, head_steps=2)), first)


def test_seeded_noise_is_standard_normal_and_does_not_repeat() -> None:
    noise = SeededNoise(list(range(50)), CPU)
    first, second = noise.normals([30, 30], 4)
    assert not torch.isclose(first, second).any(dim=-1).all()
    assert float(torch.stack([first, second]).mean()) == pytest.approx(0, abs=0.03)
    assert float(torch.stack([first, second]).std()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("channels", [1, 3, 8, 12, 16, 24, 32, 48, 64])
@pytest.mark.parametrize("counts", [[1, 7, 2, 1, 30, 5], [2, 4, 6]])
def test_noise_drawn_at_once_equals_noise_drawn_step_by_step(channels: int, counts: list[int]) -> None:
    seeds = [5, 2**40 + 1]
    generators = [seeded_generator(seed) for seed in seeds]
    for count, drawn in zip(counts, SeededNoise(seeds, CPU).normals(counts, channels), strict=True):
        steps = [torch.randn(count, channels, generator=generator) for generator in generators]
        assert torch.equal(drawn, torch.stack(steps))
        assert drawn.is_contiguous(), "linear layers may round strided inputs in another way"


def test_head_that_draws_more_noise_than_it_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["diffusion"]
    monkeypatch.setattr(type(model.head), "noise_draws", lambda self, steps: steps)
    with refused("noise_draws", 3):
        draw(model, [0], [1], SamplingConfig(ar_steps=2, head_steps=3))


def test_patches_of_several_latents_fill_the_grid() -> None:
    """With patches of 2, six tokens of 12 channels do."""
    assert draw(tiny("flow", patch=2), [0], [7], SamplingConfig(ar_steps=6, head_steps=2)).shape == (
        1,
        3,
        4,
        6,
    )


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_draw_nearly_the_same_latents(kind: str, dtype: torch.dtype) -> None:
    """Tokens and noise stay in float32."""
    config = SamplingConfig(ar_steps=ar_steps(kind, 5), head_steps=head_steps(kind, 2), guidance=2.0)
    # An untrained diffusion head draws values above 10,000, whose projections overflow in float16.
    model = tiny(kind.split()[-1], causal=kind in CAUSAL)
    exact = draw(model, [0, 1], [1, 2], config)
    low = draw(model.to(dtype), [0, 1], [1, 2], config)
    assert low.dtype == torch.float32
    assert (low - exact).abs().mean() < 0.1 * exact.abs().mean()


# --- The loop ----------------------------------------------------------------------------------------


# 13 is one of the counts for which the last cosine rounds to below zero.
@pytest.mark.parametrize(
    ("model", "steps"), [*((FLOW, steps) for steps in (1, 2, 7, 13, 24)), (CAUSAL_FLOW, 24)]
)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_callback_sees_tokens_become_known(model: FAR, steps: int, guidance: float) -> None:
    seen: list[Progress] = []
    config = SamplingConfig(ar_steps=steps, head_steps=2, guidance=guidance)
    result = draw(model, [0, 1], [1, 2], config, callback=seen.append)
    assert [(progress.step, progress.steps) for progress in seen] == [(step, steps) for step in range(steps)]
    counts = torch.tensor(cosine_token_counts(24, steps)).cumsum(0)
    before = torch.zeros(2, 24, dtype=torch.bool)
    values = torch.zeros(2, 24, 3)
    for progress, count in zip(seen, counts, strict=True):
        assert progress.known.sum(dim=1).tolist() == [count, count]
        assert (progress.known | ~before).all(), "a known token was forgotten"
        tokens = model.tokens(progress.latents)
        assert torch.equal(tokens[before], values[before]), "a known token was changed"
        assert torch.equal(tokens[~progress.known], torch.zeros_like(tokens[~progress.known]))
        assert (tokens[progress.known] != 0).any(dim=-1).all()
        before, values = progress.known, tokens
    assert before.all()
    assert torch.equal(seen[-1].latents, result)


def test_order_differs_between_images_of_one_label() -> None:
    seen: list[Progress] = []
    draw(FLOW, [0, 0], [1, 2], SamplingConfig(ar_steps=24, head_steps=1), callback=seen.append)
    assert not torch.equal(*seen[11].known)


def test_causal_order_is_row_by_row() -> None:
    seen: list[Progress] = []
    draw(CAUSAL_FLOW, [0, 1], [1, 2], SamplingConfig(ar_steps=24, head_steps=1), callback=seen.append)
    for progress in seen:
        expected = torch.arange(24) <= progress.step
        assert torch.equal(progress.known, expected.expand(2, -1))


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"guidance": 3.0},
        {"guidance": 3.0, "guidance_schedule": "constant", "guidance_interval": (0.3, 0.7)},
        {"guidance": 3.0, "guidance_interval": (0.0, 0.2)},
        {"guidance": 3.0, "guidance_interval": (0.9, 1.0)},
    ],
)
def test_generation_does_not_depend_on_the_cache(
    kind: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SamplingConfig(ar_steps=24, head_steps=head_steps(kind, 2), **values)
    cached = draw(ALL[kind], [0, 3, 1], [1, 2, 3], config)
    monkeypatch.setattr(CausalBackbone, "new_cache", lambda self, rows: None)
    torch.testing.assert_close(cached, draw(ALL[kind], [0, 3, 1], [1, 2, 3], config), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 7, 24])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"guidance": 3.0, "guidance_interval": (0.2, 0.6)},
        {"guidance": 3.0, "order": "halton"},
    ],
)
def test_block_causal_generation_does_not_depend_on_the_cache(
    steps: int, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    for kept in (None, Kept(latents, torch.tensor([20, 3, 8]))):
        config = SamplingConfig(ar_steps=min(steps, 24 - (3 if kept else 0)), head_steps=2, **values)
        with monkeypatch.context() as patch:
            cached = draw(BLOCK_CAUSAL, [0, 3, 1], [1, 2, 3], config, kept=kept)
            patch.setattr(BlockCausalBackbone, "new_cache", lambda self, rows: None)
            plain = draw(BLOCK_CAUSAL, [0, 3, 1], [1, 2, 3], config, kept=kept)
        torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-4)
        if kept is not None:
            tokens, given = BLOCK_CAUSAL.tokens(cached), BLOCK_CAUSAL.tokens(latents)
            assert torch.equal(tokens[:, kept.positions], given[:, kept.positions])


@pytest.mark.parametrize("name", FAST)
def test_block_causal_models_refuse_approximations_of_masked_ones(name: str) -> None:
    with refused(f"{name} 2", "block_causal"):
        draw(BLOCK_CAUSAL, [0], [1], SamplingConfig(8, 1, **{name: 2}))


def test_fast_adds_no_approximation_beside_an_exact_cache() -> None:
    assert fast_options(FLOW) == FAST
    assert fast_options(BLOCK_CAUSAL) == fast_options(CAUSAL_FLOW) == {}


def test_causal_generation_drops_unconditional_rows_after_guidance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The class is embedded once, and until then the unconditional rows stay in the cache."""
    allocated: list[int] = []
    new_cache = CausalBackbone.new_cache
    monkeypatch.setattr(
        CausalBackbone, "new_cache", lambda self, rows: (allocated.append(rows), new_cache(self, rows))[1]
    )
    assert count_rows(CAUSAL_FLOW, SamplingConfig(ar_steps=24, head_steps=1)) == [[0, 1]]
    assert count_rows(CAUSAL_FLOW, SamplingConfig(ar_steps=24, head_steps=1, guidance=2.0)) == [[0, 1, 5, 5]]
    rows: list[int] = []
    hook = CAUSAL_FLOW.backbone.norm.register_forward_hook(  # type: ignore[union-attr, operator]
        lambda module, arguments, output: rows.append(len(output))
    )
    draw(
        CAUSAL_FLOW,
        [0, 1],
        [1, 2],
        SamplingConfig(ar_steps=24, head_steps=1, guidance=2.0, guidance_interval=(0.25, 0.5)),
    )
    hook.remove()
    assert rows == [4] * 13 + [2] * 11
    assert allocated == [2, 4, 4], "memory for rows that are not needed"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("patch", [1, 2])
def test_spherical_models_draw_on_the_sphere(causal: bool, patch: int) -> None:
    model = tiny("flow", patch, causal, spherical=True)
    config = SamplingConfig(ar_steps=model.config.tokens, head_steps=2, guidance=30.0)
    norms = draw(model, [0, 1], [1, 2], config).norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, math.sqrt(3)))


@pytest.mark.parametrize("steps", [0, 1, 8, 23, 25])
def test_causal_model_draws_one_token_per_step(steps: int) -> None:
    with pytest.raises(InputError, match=rf"ar_steps {steps}\b.*\b24\b") as caught:
        draw(CAUSAL_FLOW, [0], [1], SamplingConfig(ar_steps=steps, head_steps=1))
    assert "\n" not in str(caught.value)


def count_rows(model: FAR, config: SamplingConfig) -> list[list[int]]:
    """Return the labels of each pass of the backbone in a generation of classes 0 and 1."""
    seen: list[list[int]] = []
    hook = model.backbone.class_embedding.register_forward_hook(
        lambda module, arguments, output: seen.append(arguments[0].tolist())
    )
    draw(model, [0, 1], [1, 2], config)
    hook.remove()
    return seen


def test_generation_without_guidance_has_no_unconditional_rows() -> None:
    assert count_rows(FLOW, SamplingConfig(ar_steps=4, head_steps=1)) == [[0, 1]] * 4
    assert count_rows(FLOW, SamplingConfig(ar_steps=4, head_steps=1, guidance=2.0)) == [[0, 1, 5, 5]] * 4


def test_generation_has_unconditional_rows_only_within_the_interval() -> None:
    known = [0, *torch.tensor(cosine_token_counts(24, 4)).cumsum(0).tolist()][:4]
    start, end = known[1] / 24, known[2] / 24
    config = SamplingConfig(ar_steps=4, head_steps=1, guidance=2.0, guidance_interval=(start, end))
    assert [len(labels) for labels in count_rows(FLOW, config)] == [2, 4, 4, 2]


def test_head_steps_follow_the_schedule() -> None:
    calls: list[int] = []
    hook = FLOW.head.network.output.register_forward_hook(lambda *arguments: calls.append(1))  # type: ignore[union-attr]
    config = SamplingConfig(ar_steps=4, head_steps=(7, 1))
    seen = []

    def remember(progress: Progress) -> None:
        seen.append(len(calls))
        calls.clear()

    draw(FLOW, [0], [1], config, callback=remember)
    hook.remove()
    assert seen == [7, 5, 3, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_generation_builds_one_sampler_per_number_of_head_steps(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so before the first AR step, because a sampler copies its tables from the host."""
    model, config = MODELS[kind], SamplingConfig(ar_steps=4, head_steps=head_steps(kind, 7, 2))
    events: list[object] = []
    sampler = model.head.sampler
    monkeypatch.setattr(
        model.head, "sampler", lambda steps, like: (events.append(steps), sampler(steps, like))[1]
    )
    draw(model, [0, 1], [1, 2], config, callback=lambda progress: events.append("AR step"))
    used = [config.head_steps_at(step) for step in range(4)]
    assert events == [*dict.fromkeys(used), *["AR step"] * 4]


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_and_temperature_change_the_image(kind: str) -> None:
    plain = SamplingConfig(ar_steps=4, head_steps=head_steps(kind, 4))
    images = [
        draw(MODELS[kind], [2], [3], config)
        for config in (
            plain,
            dataclasses.replace(plain, guidance=4.0),
            dataclasses.replace(plain, guidance=4.0, guidance_schedule="constant"),
            dataclasses.replace(plain, temperature=0.5),
        )
    ]
    for a in range(4):
        for b in range(a):
            assert (images[a] - images[b]).abs().max() > 1e-3


# --- Guidance that the head has learned -----------------------------------------------------------------


LEARNT = {name: tiny("flow_map", causal=name == "causal", max_guidance=3.0) for name in ("masked", "causal")}


def record_scales(
    model: FAR, config: SamplingConfig, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[float, bool]]:
    """Return the head's guidance scale at each AR step, and whether it has an unconditional half."""
    conditions = record_conditions(model, config, monkeypatch, [0, 1])
    return [(condition.scale, condition.uncond is not None) for condition, _ in conditions]  # type: ignore[misc]


def rows_of_passes(model: FAR, config: SamplingConfig) -> set[int]:
    """Return the number of rows of each pass of the backbone."""
    rows: list[int] = []
    norm = model.backbone.norm if isinstance(model.backbone, CausalBackbone) else model.backbone.decoder_norm
    hook = norm.register_forward_hook(lambda module, arguments, output: rows.append(len(output)))  # type: ignore[union-attr, operator]
    draw(model, [0, 1], [1, 2], config)
    hook.remove()
    return set(rows)


@pytest.mark.parametrize("name", LEARNT)
def test_learned_scale_takes_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = LEARNT[name], SamplingConfig(24, 2, 3.0, "constant")
    rows = {
        passes: rows_of_passes(model, dataclasses.replace(config, guidance_passes=passes))
        for passes in (None, 1, 2)
    }
    assert rows == {None: {2}, 1: {2}, 2: {4}}
    images = {
        passes: draw(model, [0, 1], [1, 2], dataclasses.replace(config, guidance_passes=passes))
        for passes in (None, 1, 2)
    }
    assert torch.equal(images[None], images[1])
    assert not torch.isclose(images[1], images[2]).any(dim=1).all(), "an untrained head's guidance is another"
    assert record_scales(model, config, monkeypatch) == [(3.0, False)] * 24
    assert (
        record_scales(model, dataclasses.replace(config, guidance_passes=2), monkeypatch)
        == [(3.0, True)] * 24
    )


@pytest.mark.parametrize("name", LEARNT)
@pytest.mark.parametrize("scale", [3.1, 0.5])
def test_scale_that_the_head_has_not_learned_takes_two_passes(name: str, scale: float) -> None:
    config = SamplingConfig(24, 1, scale, "constant")
    assert rows_of_passes(LEARNT[name], config) == {4}
    with pytest.raises(InputError, match=rf"guidance_passes 1\b.*{scale}.*\b3\b") as caught:
        draw(LEARNT[name], [0], [1], dataclasses.replace(config, guidance_passes=1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", [MODELS["shortcut"], MODELS["flow_map"], CAUSAL["causal shortcut"]])
def test_one_pass_is_refused_if_the_head_has_not_learned_guidance(model: FAR) -> None:
    config = SamplingConfig(24, 1, 2.0, guidance_passes=1)
    with pytest.raises(InputError, match=r"guidance_passes 1\b") as caught:
        draw(model, [0], [1], config)
    assert "\n" not in str(caught.value)
    plain = dataclasses.replace(config, guidance=1.0)  # nothing to be learnt
    assert torch.equal(
        draw(model, [0], [1], plain), draw(model, [0], [1], dataclasses.replace(plain, guidance_passes=None))
    )


@pytest.mark.parametrize("name", LEARNT)
def test_learned_guidance_follows_schedule_and_interval(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SamplingConfig(24, 1, 3.0, guidance_interval=(0.25, 0.5))
    scales = config.guidance_scales([1] * 24 if name == "causal" else cosine_token_counts(24, 24))
    assert 1.0 in scales
    assert max(scales) > 1.5
    assert record_scales(LEARNT[name], config, monkeypatch) == [(scale, False) for scale in scales]


def test_learned_guidance_works_with_approximations() -> None:
    """Keys and values can be reused. There is no unconditional half to reuse."""
    config = SamplingConfig(8, 1, 2.0, refresh_every=4, guidance_every=4)
    assert rows_of_passes(LEARNT["masked"], config) == {2}
    assert torch.equal(
        draw(LEARNT["masked"], [0], [1], config),
        draw(LEARNT["masked"], [0], [1], dataclasses.replace(config, guidance_every=1)),
    )


# --- Approximations of masked models ---------------------------------------------------------------------


def record_conditions(
    model: FAR, config: SamplingConfig, monkeypatch: pytest.MonkeyPatch, labels: list[int]
) -> list[tuple[Condition, Progress]]:
    """Return the head's condition at each AR step, and the progress after it."""
    found: list[Condition] = []
    after: list[Progress] = []
    sampler = model.head.sampler

    def recording(steps: int, like: Tensor) -> Draw:
        plain = sampler(steps, like)
        return lambda condition, *rest: (found.append(condition), plain(condition, *rest))[1]

    monkeypatch.setattr(model.head, "sampler", recording)
    draw(model, labels, [1, 2], config, callback=after.append)
    monkeypatch.undo()
    return list(zip(found, after, strict=True))


@pytest.mark.parametrize(
    "values", [{"refresh_every": 4}, {"refresh_every": 2, "guidance_every": 4}, {"guidance_every": 4}]
)
def test_recomputed_steps_are_exact_and_others_are_approximate(
    values: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SamplingConfig(8, 2, 3.0, **values)  # type: ignore[arg-type]
    known = torch.zeros(2, 0, dtype=torch.long)
    tokens = torch.zeros(2, 24, 3)
    differences = torch.zeros(2, 24, 1)
    for step, (condition, progress) in enumerate(record_conditions(FLOW, config, monkeypatch, [0, 3])):
        z, z_uncond = condition.z, condition.uncond
        now = torch.stack([row.nonzero()[:, 0] for row in progress.known])
        wanted = torch.stack(
            [torch.tensor(sorted(set(a.tolist()) - set(b.tolist()))) for a, b in zip(now, known)]
        )
        labels, everywhere = torch.tensor([0, 3]), torch.arange(24).expand(2, -1)
        exact, exact_uncond = (
            FLOW.backbone(tokens, known, everywhere, label) for label in (labels, torch.full_like(labels, 5))
        )
        if step % config.guidance_every == 0:
            differences = exact_uncond - exact
        index = wanted.unsqueeze(-1).expand(-1, -1, z.shape[-1])
        assert z_uncond is not None
        if step % config.refresh_every == 0:
            torch.testing.assert_close(z, exact.gather(1, index), rtol=0, atol=1e-4)
        else:
            assert (z - exact.gather(1, index)).abs().max() > 1e-4
        if config.guidance_every > 1:
            torch.testing.assert_close(z_uncond - z, differences.gather(1, index), rtol=0, atol=1e-4)
        elif step % config.refresh_every == 0:
            torch.testing.assert_close(z_uncond, exact_uncond.gather(1, index), rtol=0, atol=1e-4)
        known, tokens = now, FLOW.tokens(progress.latents)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"guidance_every": 4}, [4, 2, 2, 2, 4, 2, 2, 2]),
        ({"refresh_every": 4}, [4] * 8),
        ({"refresh_every": 4, "guidance_every": 4}, [4, 2, 2, 2, 4, 2, 2, 2]),
        ({"refresh_every": 3, "guidance_every": 4}, [4, 2, 2, 2, 4, 2, 2, 2]),
        # The interval holds steps 5 and 6, before which 11 and 15 of 24 tokens are known.
        ({"guidance_every": 4, "guidance_interval": (0.4, 0.65)}, [2, 2, 2, 2, 2, 4, 2, 2]),
        (
            {"refresh_every": 4, "guidance_every": 4, "guidance_interval": (0.4, 0.65)},
            [2, 2, 2, 2, 2, 4, 2, 2],
        ),
        ({"refresh_every": 4, "guidance_interval": (0.4, 0.65)}, [2, 2, 2, 2, 4, 4, 4, 2]),
    ],
)
def test_approximate_generations_compute_fewer_rows(values: dict[str, Any], expected: list[int]) -> None:
    rows: list[int] = []
    hook = FLOW.backbone.decoder_norm.register_forward_hook(  # type: ignore[union-attr, operator]
        lambda module, arguments, output: rows.append(len(output))
    )
    images = draw(FLOW, [0, 1], [1, 2], SamplingConfig(8, 1, 2.0, **values))
    hook.remove()
    assert rows == expected
    assert images.isfinite().all()


def test_approximate_image_under_autocast_is_near_that_in_float32() -> None:
    config = SamplingConfig(8, 2, refresh_every=2)
    expected, other = draw(FLOW, [0, 0], [1, 2], config)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = draw(FLOW, [0], [1], config)
    assert (found - expected).norm() < 0.05 * (other - expected).norm()


@pytest.mark.parametrize(
    "values",
    [
        {"refresh_every": 3},
        {"guidance_every": 2},
        {"order": "halton", "refresh_every": 2, "guidance_every": 3},
    ],
)
def test_approximate_image_does_not_depend_on_its_batch(values: dict[str, Any]) -> None:
    config = SamplingConfig(8, 2, 3.0, **values)
    together = draw(FLOW, [0, 3, 1], [11, 12, 13], config)
    for place, (label, seed) in enumerate(zip([0, 3, 1], [11, 12, 13])):
        torch.testing.assert_close(draw(FLOW, [label], [seed], config)[0], together[place], rtol=0, atol=1e-4)


def test_raster_order_is_that_of_the_positions() -> None:
    for model in (FLOW, BLOCK_CAUSAL):
        seen: list[Progress] = []
        draw(model, [0, 0], [1, 2], SamplingConfig(24, 1, order="raster"), callback=seen.append)
        for count, progress in enumerate(seen, start=1):
            assert torch.equal(progress.known, (torch.arange(24) < count).expand(2, -1))


def test_halton_order_begins_at_the_first_position_of_the_seed() -> None:
    seen: list[Progress] = []
    draw(FLOW, [0, 0], [1, 2], SamplingConfig(24, 1, order="halton"), callback=seen.append)
    firsts = SeededNoise([1, 2], CPU).orders(24)[:, :1]
    assert torch.equal(seen[0].known.nonzero()[:, 1:], firsts)
    expected = halton_orders(4, 6, firsts[:, 0])
    for progress in seen:
        places = progress.known.nonzero()[:, 1].view(2, -1)
        assert torch.equal(places, expected[:, : progress.step + 1].sort(dim=1).values)


# --- Schedules -----------------------------------------------------------------------------------------


def test_linear_guidance_equals_mars() -> None:
    """It is 1 + (scale − 1) · known / tokens. The last step still counts one token as unknown."""
    config = SamplingConfig(guidance=3.0)
    assert config.guidance_at(0, 4, 16) == pytest.approx(1 + 2 * 4 / 16)
    assert config.guidance_at(4, 10, 16) == pytest.approx(1 + 2 * 10 / 16)
    assert config.guidance_at(10, 16, 16) == pytest.approx(1 + 2 * 15 / 16)


def test_constant_guidance_is_one_outside_the_interval() -> None:
    config = SamplingConfig(guidance=3.0, guidance_schedule="constant", guidance_interval=(0.25, 0.75))
    found = [config.guidance_at(known, known + 1, 16) for known in (0, 3, 4, 8, 12, 13, 15)]
    assert found == [1.0, 1.0, 3.0, 3.0, 3.0, 1.0, 1.0]
    assert SamplingConfig(guidance=3.0, guidance_schedule="constant").guidance_at(15, 16, 16) == 3.0
    linear = SamplingConfig(guidance=3.0, guidance_interval=(0.25, 0.75))
    assert linear.guidance_at(0, 2, 16) == 1.0
    assert linear.guidance_at(8, 10, 16) == pytest.approx(1 + 2 * 10 / 16)


def test_annealed_head_steps_change_linearly() -> None:
    assert [SamplingConfig(ar_steps=5, head_steps=8).head_steps_at(step) for step in range(5)] == [8] * 5
    assert [SamplingConfig(ar_steps=5, head_steps=(50, 10)).head_steps_at(step) for step in range(5)] == [
        50,
        40,
        30,
        20,
        10,
    ]
    assert [SamplingConfig(ar_steps=3, head_steps=(1, 8)).head_steps_at(step) for step in range(3)] == [
        1,
        4,
        8,
    ]
    assert SamplingConfig(ar_steps=1, head_steps=(50, 10)).head_steps_at(0) == 50
    assert SamplingConfig(ar_steps=2, head_steps=(6,)).head_steps_at(1) == 6


# --- Bad values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ar_steps": 0}, r"ar_steps 0\b.*\b24\b"),
        ({"ar_steps": -3}, "ar_steps -3"),
        ({"ar_steps": 25}, r"ar_steps 25\b.*\b24\b"),
        ({"head_steps": 0}, "head_steps 0"),
        ({"head_steps": -1}, "head_steps -1"),
        ({"head_steps": 1001}, "head_steps 1001"),
        ({"head_steps": (8, 0)}, "head_steps 0"),
        ({"head_steps": (1001, 8)}, "head_steps 1001"),
        ({"head_steps": (8, 4, 2)}, r"head_steps \[8, 4, 2\]"),
        ({"head_steps": ()}, r"head_steps \[\]"),
        ({"guidance": -1.0}, "guidance -1.0"),
        ({"guidance": math.nan}, "guidance.* nan"),
        ({"guidance": math.inf}, "guidance.* inf"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule.* 'cosine'"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval"),
        ({"guidance_interval": (-0.1, 0.5)}, "guidance_interval"),
        ({"guidance_interval": (0.5, 1.1)}, "guidance_interval"),
        ({"guidance_interval": (0.5,)}, "guidance_interval"),
        ({"guidance_interval": (math.nan, 1.0)}, "guidance_interval"),
        ({"guidance_passes": 0}, "guidance_passes 0"),
        ({"guidance_passes": 3}, "guidance_passes 3"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"order": "checkerboard"}, "order.* 'checkerboard'"),
        ({"refresh_every": 0}, "refresh_every 0"),
        ({"guidance_every": -1}, "guidance_every -1"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": math.nan}, "temperature.* nan"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    config = SamplingConfig(**{"ar_steps": 4, "head_steps": 2, **values})
    with pytest.raises(InputError, match=message) as caught:
        draw(FLOW, [0], [1], config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [{"order": "halton"}, {"refresh_every": 2}, {"guidance_every": 2}])
def test_causal_models_refuse_options_of_masked_models(values: dict[str, Any]) -> None:
    name, value = next(iter(values.items()))
    with pytest.raises(InputError, match=f"{name} {value}") as caught:
        draw(CAUSAL_FLOW, [0], [1], SamplingConfig(24, 1, **values))
    assert "\n" not in str(caught.value)


def test_shortcut_head_refuses_more_than_128_steps() -> None:
    with refused("head_steps 129", 128):
        draw(MODELS["shortcut"], [0], [1], SamplingConfig(ar_steps=1, head_steps=129))


# --- Tokens that are kept ----------------------------------------------------------------------------------


class LaterNoise(SeededNoise):
    """Noise of a generation that continues after ``drawn`` tokens that were drawn one by one."""

    def __init__(self, seeds: list[int], drawn: int, *, ordered: bool) -> None:
        super().__init__(seeds, CPU)
        self.drawn = drawn
        if ordered:
            self.order = super().orders(24)
        super().normals([1] * drawn, 3)

    def orders(self, tokens: int) -> Tensor:
        # Kept positions may be anywhere in an order. Here they are last and must move to the front.
        return torch.cat([self.order[:, self.drawn :], self.order[:, : self.drawn]], dim=1)


@pytest.mark.parametrize("name", ["flow", "shortcut", "flow_map", "causal flow", "causal flow_map"])
@pytest.mark.parametrize("count", [1, 9, 23])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_generation_from_kept_first_tokens_gives_the_same_others(
    name: str, count: int, guidance: float
) -> None:
    config = SamplingConfig(24, 2, guidance)
    seen: list[Progress] = []
    whole = draw(ALL[name], [3], [5], config, callback=seen.append)
    positions = seen[count - 1].known[0].nonzero()[:, 0]
    kept = Kept(whole, positions)
    noise = LaterNoise([5], count, ordered=name in MODELS)
    again = sample(
        ALL[name], torch.tensor([3]), noise, dataclasses.replace(config, ar_steps=24 - count), kept=kept
    )
    tolerance = 1e-4 * max(1.0, float(whole.abs().max()))
    torch.testing.assert_close(again, whole, rtol=0, atol=tolerance)
    tokens, before = ALL[name].tokens(again), ALL[name].tokens(whole)
    assert torch.equal(tokens[:, positions], before[:, positions]), "kept tokens stay exactly"


@pytest.mark.parametrize("values", [{}, {"order": "halton"}, {"refresh_every": 2, "guidance_every": 3}])
def test_kept_tokens_stay_and_each_version_has_its_own_order(values: dict[str, Any]) -> None:
    latents = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    positions = torch.tensor([20, 3, 8, 9, 10])
    seen: list[Progress] = []
    config = SamplingConfig(7, 2, 3.0, **values)
    result = draw(FLOW, [1, 1, 1], [1, 2, 3], config, kept=Kept(latents, positions), callback=seen.append)
    kept = torch.zeros(24, dtype=torch.bool)
    kept[positions] = True
    for progress in seen:
        tokens = FLOW.tokens(progress.latents)
        assert torch.equal(tokens[:, kept], FLOW.tokens(latents)[:, kept])
        assert (tokens[~progress.known] == 0).all()
    assert [int(progress.known[0].sum()) for progress in seen] == [
        5 + n for n in torch.tensor(cosine_token_counts(19, 7)).cumsum(0).tolist()
    ]
    assert not torch.equal(seen[0].known[0], seen[0].known[1])
    assert (FLOW.tokens(result)[:, ~kept] != 0).all()
    for version in range(3):
        alone = draw(FLOW, [1], [version + 1], config, kept=Kept(latents[:1], positions))
        torch.testing.assert_close(alone[0], result[version], rtol=0, atol=1e-4)


def test_kept_tokens_are_scaled_to_the_sphere_of_a_spherical_model() -> None:
    model = tiny("flow", spherical=True)
    latents = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    result = draw(model, [1], [1], SamplingConfig(3, 2), kept=Kept(latents, torch.arange(10)))
    torch.testing.assert_close(result.norm(dim=1), torch.full((1, 4, 6), 3**0.5))
    assert torch.equal(model.tokens(result)[:, :10], model.constrain(model.tokens(latents))[:, :10])


def test_guidance_counts_kept_tokens_as_known() -> None:
    config = SamplingConfig(2, 1, 3.0)
    assert config.guidance_scales([6, 6], kept=12) == [1 + 2 * 18 / 24, 1 + 2 * 23 / 24]


@pytest.mark.parametrize("steps", [0, 20])
def test_steps_are_limited_by_the_tokens_to_draw(steps: int) -> None:
    with pytest.raises(InputError, match=rf"ar_steps {steps}\b.*\b19\b"):
        draw(FLOW, [0], [0], SamplingConfig(steps, 1), kept=Kept(torch.zeros(1, 3, 4, 6), torch.arange(5)))


def test_causal_backbone_refuses_to_keep_other_than_first_tokens() -> None:
    kept = Kept(torch.zeros(1, 3, 4, 6), torch.tensor([0, 1, 3]))
    with refused("causal"):
        draw(CAUSAL_FLOW, [0], [0], SamplingConfig(21, 1), kept=kept)


def test_values_are_checked_before_the_first_step() -> None:
    with pytest.raises(InputError, match="ar_steps"):
        sampling_steps(FLOW, torch.tensor([0]), SeededNoise([0], CPU), SamplingConfig(25, 1))
