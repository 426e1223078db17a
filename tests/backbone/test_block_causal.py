"""The block-causal backbone against a plain recomputation, and the dependencies of each ``z``."""

import copy
import math

import pytest
import torch
from torch import Tensor

from far.backbone import BlockCausalBackbone, BlockCausalConfig, CausalBackbone, CausalConfig
from tests.backbone.test_causal import rms_norm, turned
from tests.refusals import refused

ROWS, COLUMNS = 3, 4
TOKENS, CHANNELS, CLASSES, BATCH = ROWS * COLUMNS, 5, 3, 4
LABELS = torch.arange(BATCH)
SIZES = {"width": 16, "encoder_depth": 2, "decoder_depth": 2, "heads": 2, "buffer": 2, "dropout": 0.0}


def build(**values: object) -> BlockCausalBackbone:
    torch.manual_seed(0)
    config = BlockCausalConfig(**{**SIZES, "input_noise": 0.0, **values})  # type: ignore[arg-type]
    backbone = BlockCausalBackbone(config, (ROWS, COLUMNS), CHANNELS, CLASSES).eval()
    with torch.no_grad():  # freshly initialized, branches hardly count
        for parameter in backbone.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return backbone


BACKBONE = build()
TOKEN_VALUES = torch.randn(BATCH, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(1))
ORDERS = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(2)).argsort(dim=1)


@torch.no_grad()
def teacher_forced(tokens: Tensor, orders: Tensor = ORDERS) -> Tensor:
    """Return ``z`` of every token of an order from those before it, in one pass."""
    return BACKBONE(tokens, orders[:, :-1], orders, LABELS)


# --- Values ------------------------------------------------------------------------------------------


class Plain:
    """``z`` of one image, computed vector by vector."""

    def __init__(self, backbone: BlockCausalBackbone) -> None:
        self.config, self.state = backbone.config, backbone.state_dict()
        self.width = self.config.width // self.config.heads

    def angles(self, position: int | None) -> list[float]:
        """Return the rotary angles of a position of the grid, or of the class."""
        places = (0, 0) if position is None else (1 + position // COLUMNS, 1 + position % COLUMNS)
        pairs = self.width // 4
        return [place * 10_000 ** (-i / pairs) for place in places for i in range(pairs)]

    def attention(self, query: Tensor, keys: list[Tensor], values: list[Tensor], *angles: list) -> Tensor:  # type: ignore[type-arg]
        parts = []
        for head in range(self.config.heads):
            cut = slice(head * self.width, (head + 1) * self.width)
            turned_query = turned(query[cut], angles[0])
            scores = torch.stack(
                [turned_query @ turned(key[cut], angle) for key, angle in zip(keys, angles[1])]
            )
            parts.append(
                (scores / math.sqrt(self.width)).softmax(dim=0) @ torch.stack([v[cut] for v in values])
            )
        return torch.cat(parts)

    def feed_forward(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        gate, up = weights["feed_forward.gate_up.weight"].chunk(2)
        (normed,) = rms_norm([x], weights["feed_forward_norm.weight"])
        hidden = gate @ normed
        return x + weights["feed_forward.down.weight"] @ (hidden * hidden.sigmoid() * (up @ normed))

    def block(self, name: str) -> dict[str, Tensor]:
        return {key.removeprefix(name): value for key, value in self.state.items() if key.startswith(name)}

    def condition(self, tokens: Tensor, known: list[int], query: int, label: int) -> Tensor:
        config, state = self.config, self.state
        x = [state["class_embedding.weight"][label] + copy for copy in state["class_positions"][0]]
        x += [
            state["token_projection.weight"] @ tokens[position] + state["token_positions.weight"][position]
            for position in known
        ]
        angles = [self.angles(position) for position in [None] * config.buffer + known]  # type: ignore[list-item]
        for index in range(config.encoder_depth):
            weights = self.block(f"encoder_blocks.{index}.")
            normed = rms_norm(x, weights["attention_norm.weight"])
            q, k, v = zip(*((weights["attention.query_key_value.weight"] @ n).chunk(3) for n in normed))
            for i in range(len(x)):
                seen = list(k[: i + 1]), list(v[: i + 1]), angles[i], angles[: i + 1]
                x[i] = x[i] + weights["attention.project.weight"] @ self.attention(q[i], *seen)
            x = [self.feed_forward(vector, weights) for vector in x]
        memory = rms_norm(x, state["encoder_norm.weight"])
        y = state["query_embedding.weight"][query]
        for index in range(config.decoder_depth):
            weights = self.block(f"decoder_blocks.{index}.")
            (normed_query,) = rms_norm([y], weights["attention_norm.weight"])
            k, v = zip(*((weights["key_value.weight"] @ vector).chunk(2) for vector in memory))
            seen = list(k), list(v), self.angles(query), angles
            y = y + weights["project.weight"] @ self.attention(weights["query.weight"] @ normed_query, *seen)
            y = self.feed_forward(y, weights)
        return rms_norm([y], state["decoder_norm.weight"])[0]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_values_equal_a_plain_computation(count: int) -> None:
    known, query = ORDERS[:, :count], ORDERS[:, count : count + 3]
    with torch.no_grad():
        z = BACKBONE(TOKEN_VALUES, known, query, LABELS)
    plain = Plain(BACKBONE)
    for image in (0, 3):
        expected = [
            plain.condition(TOKEN_VALUES[image], known[image].tolist(), position, image)
            for position in query[image].tolist()
        ]
        torch.testing.assert_close(z[image], torch.stack(expected), rtol=1e-4, atol=1e-4)


# --- What z depends on -------------------------------------------------------------------------------


def test_one_pass_gives_the_conditions_of_every_prefix() -> None:
    z = teacher_forced(TOKEN_VALUES)
    for count in range(TOKENS):
        with torch.no_grad():
            alone = BACKBONE(TOKEN_VALUES, ORDERS[:, :count], ORDERS[:, count : count + 1], LABELS)
        torch.testing.assert_close(z[:, count : count + 1], alone, rtol=0, atol=1e-5)


def test_z_depends_on_tokens_earlier_in_the_order_only() -> None:
    z = teacher_forced(TOKEN_VALUES)
    for place in range(TOKENS):
        changed = TOKEN_VALUES.clone()
        changed[torch.arange(BATCH), ORDERS[:, place]] += 1
        difference = (teacher_forced(changed) - z).abs().amax(dim=-1)
        assert difference[:, : place + 1].max() == 0, "a token reached its own or an earlier z"
        assert (difference[:, place + 1 :] > 1e-4).all(), "a token did not reach every later z"


@torch.no_grad()
def test_query_positions_do_not_depend_on_each_other() -> None:
    known, query = ORDERS[:, :4], ORDERS[:, 4:9]
    z = BACKBONE(TOKEN_VALUES, known, query, LABELS)
    for index in range(5):
        alone = BACKBONE(TOKEN_VALUES, known, query[:, index : index + 1], LABELS)
        torch.testing.assert_close(z[:, index : index + 1], alone, rtol=0, atol=1e-5)
    assert torch.cdist(z[0], z[0]).add(torch.eye(5)).min() > 1e-2, "two positions have the same z"


@torch.no_grad()
def test_z_depends_on_label_and_on_positions_of_known_tokens() -> None:
    same, known = TOKEN_VALUES[:1, :1].expand(BATCH, TOKENS, -1), torch.arange(BATCH).view(BATCH, 1)
    query = torch.full((BATCH, 1), TOKENS - 1)
    z = BACKBONE(same, known, query, torch.zeros_like(LABELS))[:, 0]
    assert torch.cdist(z, z).add(torch.eye(BATCH)).min() > 1e-3
    z = BACKBONE(same, known[:1].expand(BATCH, 1), query, LABELS)[:, 0]
    assert torch.cdist(z, z).add(torch.eye(BATCH)).min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
def test_cached_conditions_equal_uncached_ones(seed: int) -> None:
    """They do at every unknown position, for random batches, orders, kept tokens and tokens per step.

    In float64, because rounding of float32 reaches 1e-5 on some processors.
    """
    backbone = copy.deepcopy(BACKBONE).double()
    generator = torch.Generator().manual_seed(seed)
    batch = 1 + int(torch.randint(BATCH, (), generator=generator))
    tokens = torch.randn(batch, TOKENS, CHANNELS, generator=generator).double()
    orders = torch.rand(batch, TOKENS, generator=generator).argsort(dim=1)
    labels = torch.randint(CLASSES + 1, (batch,), generator=generator)
    cuts = (torch.rand(TOKENS, generator=generator) < torch.rand((), generator=generator)).tolist()
    cache = backbone.new_cache(batch)
    for known in [number for number, cut in enumerate(cuts) if cut] or [3]:
        inputs = tokens, orders[:, :known], orders[:, known:], labels
        z, expected = backbone(*inputs, cache), backbone(*inputs)
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_later_tokens_leave_cached_keys_and_values_as_they_were() -> None:
    held = []
    for change in (0.0, 1.0):
        tokens, cache = TOKEN_VALUES.clone(), BACKBONE.new_cache(BATCH)
        tokens.scatter_add_(1, ORDERS[:, 5:, None].expand(-1, -1, CHANNELS), torch.full_like(tokens, change))
        for known in (2, 5, 6, 9):
            BACKBONE(tokens, ORDERS[:, :known], ORDERS[:, known : known + 2], LABELS, cache)
        held.append((cache.keys, cache.values))
    first = BACKBONE.config.buffer + 5
    for before, after in zip(*held):
        assert torch.equal(before[..., :first, :], after[..., :first, :])
        assert not torch.equal(before[..., first : first + 1, :], after[..., first : first + 1, :])


@torch.no_grad()
def test_encoder_in_raster_order_equals_a_causal_model_of_the_same_weights() -> None:
    backbone, found = build(), []
    backbone.token_positions.weight.zero_()  # only the rotary positions, as in a causal model
    config = CausalConfig(width=16, depth=2, heads=2, buffer=2, dropout=0.0)
    causal = CausalBackbone(config, (ROWS, COLUMNS), CHANNELS, CLASSES).eval()
    state = {name.removeprefix("encoder_"): value for name, value in backbone.state_dict().items()}
    causal.load_state_dict({name: state[name] for name in causal.state_dict()})
    backbone.encoder_norm.register_forward_hook(lambda module, inputs, output: found.append(output))
    raster = torch.arange(TOKENS).expand(BATCH, -1)
    cache = backbone.new_cache(BATCH)
    for known in range(TOKENS):
        backbone(TOKEN_VALUES, raster[:, :known], raster[:, known : known + 1], LABELS, cache)
    expected = causal(TOKEN_VALUES, raster[:, :-1], raster, LABELS)
    torch.testing.assert_close(torch.cat(found, dim=1)[:, 1:], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_cache_continues_with_its_first_rows() -> None:
    cache = BACKBONE.new_cache(BATCH)
    BACKBONE(TOKEN_VALUES, ORDERS[:, :2], ORDERS[:, 2:4], LABELS, cache)
    inputs = TOKEN_VALUES[:2], ORDERS[:2, :4], ORDERS[:2, 4:6], LABELS[:2]
    torch.testing.assert_close(BACKBONE(*inputs, cache), BACKBONE(*inputs), rtol=0, atol=1e-5)


# --- Training and configuration ----------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_training_takes_raster_order_for_a_fraction_of_the_images(fraction: float) -> None:
    orders = build(raster_fraction=fraction).training_inputs(
        torch.zeros(2000, TOKENS, CHANNELS), torch.Generator().manual_seed(0)
    )[2]
    raster = (orders == torch.arange(TOKENS)).all(dim=1).float().mean()
    assert abs(float(raster) - fraction) < 0.04
    assert len(orders.unique(dim=0)) == 2000 - 2000 * raster + (raster > 0)


def test_training_draws_an_order_per_image_and_noise_from_the_generator() -> None:
    backbone = build(input_noise=0.5, raster_fraction=0.0)
    tokens = torch.zeros(2000, TOKENS, CHANNELS)
    fed, known, query = backbone.training_inputs(tokens, torch.Generator().manual_seed(3))
    assert torch.equal(query.sort(dim=1).values, torch.arange(TOKENS).expand(2000, -1))
    assert torch.equal(known, query[:, :-1])
    assert abs(float(fed.std()) - 0.5) < 0.01
    firsts = query[:, 0].bincount(minlength=TOKENS)
    assert firsts.min() > 2000 / TOKENS / 2, "some positions hardly come first"
    again = backbone.training_inputs(tokens, torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(again, (fed, known, query)))


def test_dropout_acts_in_training_only() -> None:
    backbone = build(dropout=0.5)
    inputs = TOKEN_VALUES, ORDERS[:, :4], ORDERS[:, 4:], LABELS
    assert torch.equal(backbone(*inputs), backbone(*inputs))
    backbone.train()
    assert not torch.equal(backbone(*inputs), backbone(*inputs))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"width": 100}, ["width 100", "heads 12"]),
        ({"width": 24}, ["width 24", "heads 12"]),  # two channels per head cannot rotate along two axes
        ({"heads": 0}, ["heads 0"]),
        ({"encoder_depth": 0}, ["encoder_depth 0"]),
        ({"decoder_depth": 0}, ["decoder_depth 0"]),
        ({"buffer": 0}, ["buffer 0"]),
        ({"raster_fraction": 1.5}, ["raster_fraction 1.5"]),
        ({"dropout": 1.0}, ["dropout 1.0"]),
        ({"input_noise": -0.1}, ["input_noise -0.1"]),
    ],
)
def test_impossible_sizes_are_refused(values: dict, named: list[str]) -> None:
    with refused(*named):
        BlockCausalConfig(**values)
