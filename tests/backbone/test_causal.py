"""The causal backbone against a plain recomputation, and the dependencies of each ``z``."""

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from far.backbone import CausalBackbone, CausalConfig
from tests.refusals import refused

ROWS, COLUMNS = 3, 4
TOKENS, CHANNELS, CLASSES, BATCH = ROWS * COLUMNS, 5, 3, 4
LABELS = torch.arange(BATCH)
ORDER = torch.arange(TOKENS)


def build(grid: tuple[int, int] = (ROWS, COLUMNS), **values: object) -> CausalBackbone:
    torch.manual_seed(0)
    settings = {
        "width": 16,
        "depth": 2,
        "heads": 2,
        "buffer": 2,
        "dropout": 0.0,
        "input_noise": 0.0,
        **values,
    }
    backbone = CausalBackbone(CausalConfig(**settings), grid, CHANNELS, CLASSES).eval()  # type: ignore[arg-type]
    with torch.no_grad():  # freshly initialized, branches hardly count
        for parameter in backbone.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return backbone


BACKBONES = {positions: build(positions=positions) for positions in ("grid", "sequence")}
POSITIONS = list(BACKBONES)


def make_tokens(batch: int = BATCH, tokens: int = TOKENS, seed: int = 1) -> Tensor:
    return torch.randn(batch, tokens, CHANNELS, generator=torch.Generator().manual_seed(seed))


def teacher_forced(backbone: CausalBackbone, tokens: Tensor, labels: Tensor = LABELS) -> Tensor:
    with torch.no_grad():
        return backbone(*backbone.training_inputs(tokens, torch.Generator()), labels)


# --- Values ------------------------------------------------------------------------------------------


def rms_norm(x: list[Tensor], weight: Tensor) -> list[Tensor]:
    return [vector / math.sqrt(float(vector.square().mean()) + 1e-6) * weight for vector in x]


def turned(vector: Tensor, angles: list[float]) -> Tensor:
    """Rotate pairs (i, i + half) as complex numbers, multiplied by exp(i · angle)."""
    half = len(vector) // 2
    numbers = [complex(vector[i], vector[i + half]) * cmath.exp(1j * angles[i]) for i in range(half)]
    return torch.tensor([number.real for number in numbers] + [number.imag for number in numbers])


def plain(
    backbone: CausalBackbone, tokens: Tensor, label: int, places: list[tuple[float, ...]]
) -> list[Tensor]:
    """Compute ``z`` of one image position by position; ``places`` are its rotary positions."""
    config, state = backbone.config, backbone.state_dict()
    x = [state["class_embedding.weight"][label] + copy for copy in state["class_positions"][0]]
    x += [state["token_projection.weight"] @ token for token in tokens[:-1]]
    width = config.width // config.heads
    pairs = width // 2 // len(places[0])
    angles = [[p * 10_000 ** (-i / pairs) for p in place for i in range(pairs)] for place in places]
    for block in range(config.depth):
        weights = {
            name.removeprefix(f"blocks.{block}."): value
            for name, value in state.items()
            if name.startswith(f"blocks.{block}.")
        }
        joint = [
            weights["attention.query_key_value.weight"] @ v
            for v in rms_norm(x, weights["attention_norm.weight"])
        ]
        mixed = []
        for place in range(len(x)):
            parts = []
            for head in range(config.heads):
                cut = slice(head * width, (head + 1) * width)
                query = turned(joint[place][: config.width][cut], angles[place])
                keys = [
                    turned(joint[j][config.width : 2 * config.width][cut], angles[j])
                    for j in range(place + 1)
                ]
                scores = torch.stack([query @ key for key in keys]) / math.sqrt(width)
                values = torch.stack([joint[j][2 * config.width :][cut] for j in range(place + 1)])
                parts.append(scores.softmax(dim=0) @ values)
            mixed.append(weights["attention.project.weight"] @ torch.cat(parts))
        x = [a + b for a, b in zip(x, mixed)]
        gate, up = weights["feed_forward.gate_up.weight"].chunk(2)
        hidden = rms_norm(x, weights["feed_forward_norm.weight"])
        x = [
            a + weights["feed_forward.down.weight"] @ ((g := gate @ h) * g.sigmoid() * (up @ h))
            for a, h in zip(x, hidden)
        ]
    return rms_norm(x, state["norm.weight"])[config.buffer - 1 :]


@pytest.mark.parametrize("positions", POSITIONS)
def test_values_equal_a_plain_computation(positions: str) -> None:
    backbone, tokens = BACKBONES[positions], make_tokens()
    grid: list[tuple[float, ...]] = [(1 + i // COLUMNS, 1 + i % COLUMNS) for i in range(TOKENS - 1)]
    places = [(0, 0), (0, 0), *grid] if positions == "grid" else [(i,) for i in range(TOKENS + 1)]
    z = teacher_forced(backbone, tokens)
    assert z.shape == (BATCH, TOKENS, backbone.width)
    for image in (0, 3):
        torch.testing.assert_close(
            z[image], torch.stack(plain(backbone, tokens[image], image, places)), rtol=1e-4, atol=1e-4
        )


def test_feed_forward_width_is_llamas() -> None:
    assert [CausalConfig(width=width, heads=1).hidden_width for width in (768, 1024, 1280, 4096)] == [
        2048,
        2816,
        3584,
        11008,
    ]


# --- What z depends on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
def test_z_depends_on_earlier_tokens_only(positions: str) -> None:
    backbone, tokens = BACKBONES[positions], make_tokens()
    z = teacher_forced(backbone, tokens)
    for place in range(TOKENS):
        changed = tokens.clone()
        changed[:, place] += 1
        difference = (teacher_forced(backbone, changed) - z).abs().amax(dim=(0, 2))
        assert difference[: place + 1].max() == 0, (
            f"a change of token {place} reached its own or an earlier z"
        )
        assert (difference[place + 1 :] > 1e-4).all(), (
            f"a change of token {place} did not reach every later z"
        )


def test_z_does_not_depend_on_unknown_tokens() -> None:
    backbone, tokens = BACKBONES["grid"], make_tokens()
    hidden = tokens.clone()
    hidden[:, 5:] = float("nan")
    with torch.no_grad():
        z = backbone(hidden, ORDER[:5].expand(BATCH, -1), ORDER[5:6].expand(BATCH, -1), LABELS)
    torch.testing.assert_close(z[:, 0], teacher_forced(backbone, tokens)[:, 5], rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
def test_z_depends_on_positions_and_labels(positions: str) -> None:
    backbone = BACKBONES[positions]
    same = make_tokens()[:1, :1].expand(BATCH, TOKENS, -1)
    z = teacher_forced(backbone, same)
    assert torch.cdist(z[0], z[0]).add(torch.eye(TOKENS)).min() > 1e-3, (
        "two places of equal tokens give the same z"
    )
    for a in range(BATCH):
        for b in range(a):
            assert (z[a] - z[b]).abs().amax(dim=-1).min() > 1e-3, f"labels {a} and {b} give the same z"


def test_grid_positions_depend_on_the_shape_of_the_grid() -> None:
    """Sequence positions do not."""
    for positions in POSITIONS:
        a, b = build((3, 4), positions=positions), build((2, 6), positions=positions)
        difference = (teacher_forced(a, make_tokens()) - teacher_forced(b, make_tokens())).abs().max()
        assert difference > 1e-3 if positions == "grid" else difference == 0


# --- The cache -------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 3), columns=st.integers(1, 5), batch=st.integers(1, 5), buffer=st.integers(1, 3),
    positions=st.sampled_from(POSITIONS), data=st.data(),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_cached_z_equals_uncached_z(
    rows: int, columns: int, batch: int, buffer: int, positions: str, data: st.DataObject
) -> None:
    """Token by token and in larger strides, within 1e-5 at every position."""
    backbone = build((rows, columns), buffer=buffer, positions=positions)
    count = rows * columns
    tokens, labels, order = (
        make_tokens(batch, count),
        torch.arange(batch) % (CLASSES + 1),
        torch.arange(count).expand(batch, -1),
    )
    full = teacher_forced(backbone, tokens, labels)
    cache = backbone.new_cache(batch)
    known = 0
    while known < count:
        with torch.no_grad():
            z = backbone(tokens, order[:, :known], order[:, known : known + 1], labels, cache)
        torch.testing.assert_close(z[:, 0], full[:, known], rtol=0, atol=1e-5)
        known += data.draw(st.integers(1, 3))


def test_cache_of_more_rows_continues_with_the_first_ones() -> None:
    backbone, tokens = BACKBONES["grid"], make_tokens()
    cache = backbone.new_cache(BATCH)
    full = teacher_forced(backbone, tokens)
    for known in range(TOKENS):
        rows = BATCH if known < 5 else 2
        order = ORDER.expand(rows, -1)
        with torch.no_grad():
            z = backbone(tokens[:rows], order[:, :known], order[:, known : known + 1], LABELS[:rows], cache)
        torch.testing.assert_close(z[:, 0], full[:rows, known], rtol=0, atol=1e-5)


def test_cache_is_allocated_once_and_filled_exactly() -> None:
    backbone, tokens = BACKBONES["grid"], make_tokens()
    cache = backbone.new_cache(BATCH)
    memory = {(cache.keys.data_ptr(), cache.values.data_ptr())}
    for known in range(TOKENS):
        with torch.no_grad():
            backbone(
                tokens,
                ORDER[:known].expand(BATCH, -1),
                ORDER[known : known + 1].expand(BATCH, -1),
                LABELS,
                cache,
            )
        memory.add((cache.keys.data_ptr(), cache.values.data_ptr()))
        assert (cache.keys[..., : cache.length, :] != 0).any(dim=-1).all()
        assert not cache.keys[..., cache.length :, :].any()
    assert len(memory) == 1
    assert cache.length == cache.keys.shape[3] == backbone.config.buffer + backbone.tokens - 1


# --- Training --------------------------------------------------------------------------------------------


def test_input_noise_is_added_to_input_tokens_only() -> None:
    tokens = make_tokens()
    z = teacher_forced(build(), tokens)
    noisy = build(input_noise=0.5)
    inputs = [noisy.training_inputs(tokens, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    draws = [noisy(*arguments, LABELS) for arguments in inputs]
    assert torch.equal(draws[0], draws[1])
    assert not torch.isclose(draws[0], draws[2])[:, 1:].all(dim=-1).any()
    torch.testing.assert_close(draws[0][:, 0], z[:, 0], rtol=0, atol=1e-5)
    expected = tokens + 0.5 * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws[0], teacher_forced(build(), expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("silent", ["attention.project", "feed_forward.down"])
def test_dropout_acts_on_both_branches_in_training_only(silent: str) -> None:
    backbone, tokens = build(dropout=0.5), make_tokens()
    torch.testing.assert_close(
        teacher_forced(backbone, tokens), teacher_forced(build(), tokens), rtol=0, atol=0
    )
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if silent in name:
                parameter.zero_()
    backbone.train()
    assert not torch.equal(*(teacher_forced(backbone, tokens) for _ in range(2)))


def test_branches_start_small_and_the_rotary_table_is_not_a_weight() -> None:
    torch.manual_seed(0)
    backbone = CausalBackbone(CausalConfig(width=64, depth=8, heads=4), (3, 4), CHANNELS, CLASSES)
    assert set(backbone.state_dict()) == {name for name, _ in backbone.named_parameters()}
    for name, parameter in backbone.named_parameters():
        if name.startswith("blocks") and parameter.dim() == 2:
            expected = parameter.shape[1] ** -0.5 / (
                4 if name.endswith(("project.weight", "down.weight")) else 1
            )
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.05), name
    assert float(backbone.token_projection.weight.detach().std()) == pytest.approx(CHANNELS**-0.5, rel=0.1)
    assert float(backbone.class_embedding.weight.detach().std()) == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"width": 100}, ["width 100", "heads 12"]),
        ({"heads": 0}, ["heads 0"]),
        (
            {"width": 36, "heads": 6},
            ["width 36", "heads 6", "grid"],
        ),
        (
            {"width": 15, "heads": 3, "positions": "sequence"},
            ["width 15", "heads 3", "sequence"],
        ),
        ({"depth": 0}, ["depth 0"]),
        ({"buffer": 0}, ["buffer 0"]),
        ({"dropout": 1.0}, ["dropout 1.0"]),
        ({"input_noise": -0.1}, ["input_noise -0.1"]),
        ({"input_noise": math.inf}, ["input_noise inf"]),
    ],
)
def test_impossible_sizes_are_refused(values: dict, named: list[str]) -> None:
    with refused(*named):
        CausalConfig(**values)
