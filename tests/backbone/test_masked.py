"""Dependencies of ``z``, and its cache. tests/reference compares its values."""

import math

import pytest
import torch
from torch import Tensor

from far.backbone.masked import MaskedBackbone, MaskedConfig
from tests.refusals import refused

TOKENS, CHANNELS, CLASSES, BATCH = 12, 5, 3, 4
NULL = CLASSES


@pytest.fixture(scope="module")
def backbone() -> MaskedBackbone:
    torch.manual_seed(0)
    config = MaskedConfig(
        encoder_width=16,
        encoder_depth=2,
        encoder_heads=4,
        decoder_width=24,
        decoder_depth=2,
        decoder_heads=2,
        buffer=3,
        dropout=0.0,
    )
    backbone = MaskedBackbone(config, TOKENS, CHANNELS, CLASSES).eval()
    with torch.no_grad():  # freshly initialized, positions and classes hardly count
        for parameter in backbone.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return backbone


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(BATCH, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 1, 2, NULL])
EVERYWHERE = torch.arange(TOKENS).expand(BATCH, TOKENS)


def orders(seed: int = 2) -> Tensor:
    return torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 7])
def test_z_does_not_depend_on_unknown_tokens(backbone: MaskedBackbone, tokens: Tensor, count: int) -> None:
    known = orders()[:, :count]
    z = backbone(tokens, known, EVERYWHERE, LABELS)
    others = torch.full_like(tokens, float("nan")).scatter(
        1,
        known.unsqueeze(-1).expand(-1, -1, CHANNELS),
        tokens.gather(1, known.unsqueeze(-1).expand(-1, -1, CHANNELS)),
    )
    assert torch.equal(backbone(others, known, EVERYWHERE, LABELS), z)


@torch.no_grad()
def test_z_depends_on_every_known_token_everywhere(backbone: MaskedBackbone, tokens: Tensor) -> None:
    known = orders()[:, :7]
    z = backbone(tokens, known, EVERYWHERE, LABELS)
    for index in range(7):
        changed = tokens.clone()
        changed[torch.arange(BATCH), known[:, index]] += 1
        difference = (backbone(changed, known, EVERYWHERE, LABELS) - z).abs().amax(dim=-1)
        assert difference.min() > 1e-4, index


@torch.no_grad()
def test_z_does_not_depend_on_the_order_of_known_positions(backbone: MaskedBackbone, tokens: Tensor) -> None:
    known = orders()[:, :7]
    z = backbone(tokens, known, EVERYWHERE, LABELS)
    torch.testing.assert_close(backbone(tokens, known.flip(1), EVERYWHERE, LABELS), z, rtol=0, atol=1e-5)


@torch.no_grad()
def test_query_positions_select_rows_of_all_positions(backbone: MaskedBackbone, tokens: Tensor) -> None:
    known, query = orders()[:, :7], orders()[:, 7:10]
    z = backbone(tokens, known, EVERYWHERE, LABELS)
    chosen = backbone(tokens, known, query, LABELS)
    assert chosen.shape == (BATCH, 3, backbone.width)
    for sample in range(BATCH):
        torch.testing.assert_close(chosen[sample], z[sample, query[sample]], rtol=0, atol=1e-5)


@torch.no_grad()
def test_z_depends_on_the_label(backbone: MaskedBackbone, tokens: Tensor) -> None:
    known = orders()[:1, :5].expand(BATCH, -1)
    z = backbone(tokens[:1].expand(BATCH, -1, -1), known, EVERYWHERE, LABELS)
    for a in range(BATCH):
        for b in range(a):
            assert (z[a] - z[b]).abs().amax(dim=-1).min() > 1e-3, (
                f"labels {LABELS[a]} and {LABELS[b]} give the same z"
            )


@torch.no_grad()
def test_z_depends_on_positions(backbone: MaskedBackbone, tokens: Tensor) -> None:
    """Moving a token changes ``z``, and unknown positions have different ``z``."""
    same = tokens[:1, :1].expand(BATCH, TOKENS, -1)
    known = torch.arange(BATCH).view(BATCH, 1)
    z = backbone(same, known, EVERYWHERE, torch.zeros(BATCH, dtype=torch.long))
    assert (z[0] - z[1]).abs().amax(dim=-1).min() > 1e-4
    assert torch.cdist(z[0], z[0]).add(torch.eye(TOKENS)).min() > 1e-2


@torch.no_grad()
def test_samples_of_a_batch_are_independent(backbone: MaskedBackbone, tokens: Tensor) -> None:
    known, query = orders()[:, :4], orders()[:, 4:]
    z = backbone(tokens, known, query, LABELS)
    for sample in range(BATCH):
        alone = backbone(*(part[sample : sample + 1] for part in (tokens, known, query, LABELS)))
        torch.testing.assert_close(alone[0], z[sample], rtol=0, atol=1e-5)


def test_training_inputs_partition_the_positions(backbone: MaskedBackbone, tokens: Tensor) -> None:
    counts = set()
    for seed in range(40):
        fed, known, query = backbone.training_inputs(tokens, torch.Generator().manual_seed(seed))
        assert torch.equal(fed, tokens)
        counts.add(query.shape[1])
        for row in torch.cat([known, query], dim=1).tolist():
            assert sorted(row) == list(range(TOKENS))
    # Fractions of 0.7 to 1 of 12 tokens, rounded up.
    assert counts == {math.ceil(0.7 * TOKENS), 10, 11, 12}


def test_training_masks_differ_between_samples_and_repeat_with_the_seed(
    backbone: MaskedBackbone, tokens: Tensor
) -> None:
    first, second = (backbone.training_inputs(tokens, torch.Generator().manual_seed(5))[2] for _ in range(2))
    assert torch.equal(first, second)
    assert len({tuple(sorted(row)) for row in first.tolist()}) == BATCH


def test_dropout_acts_in_training_only(tokens: Tensor) -> None:
    torch.manual_seed(0)
    backbone = MaskedBackbone(MaskedConfig(16, 1, 2, 16, 1, 2, 2, dropout=0.5), TOKENS, CHANNELS, CLASSES)
    known = orders()[:, :4]
    assert not torch.equal(*(backbone(tokens, known, EVERYWHERE, LABELS) for _ in range(2)))
    backbone.eval()
    assert torch.equal(*(backbone(tokens, known, EVERYWHERE, LABELS) for _ in range(2)))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"encoder_width": 100}, ["encoder_width 100", "encoder_heads 12"]),
        ({"decoder_heads": 0}, ["decoder_heads 0"]),
        ({"decoder_width": -12}, ["decoder_width -12"]),
        ({"encoder_depth": 0}, ["encoder_depth 0"]),
        ({"buffer": 0}, ["buffer 0"]),
        ({"dropout": 1.0}, ["dropout 1.0"]),
        ({"dropout": -0.1}, ["dropout -0.1"]),
    ],
)
def test_impossible_sizes_are_refused(values: dict, named: list[str]) -> None:
    with refused(*named):
        MaskedConfig(**values)


# --- Keys and values kept between AR steps ------------------------------------------------------------------

STEPS = [0, 2, 5, 6]  # known tokens at each of some steps; queries follow


class Remembering:
    """The network computed position by position, with keys and values of each block in a dictionary."""

    def __init__(self, backbone: MaskedBackbone) -> None:
        self.backbone = backbone
        self.held: dict[tuple[str, int], dict[int, tuple[Tensor, Tensor]]] = {}

    def attend(self, part: str, index: int, places: list[int], x: Tensor) -> Tensor:
        block = getattr(self.backbone, f"{part}_blocks")[index]
        heads = block.attn.heads
        q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
        held = self.held.setdefault((part, index), {})
        held.update({place: (k[row], v[row]) for row, place in enumerate(places)})
        keys, values = (torch.stack(list(column)) for column in zip(*held.values()))
        y = torch.cat(
            [
                (a @ b.T / a.shape[-1] ** 0.5).softmax(dim=-1) @ c
                for a, b, c in zip(q.chunk(heads, -1), keys.chunk(heads, -1), values.chunk(heads, -1))
            ],
            dim=-1,
        )
        x = x + block.attn.proj(y)
        return x + block.mlp(block.norm2(x))

    def condition(
        self, tokens: Tensor, known: list[int], new: list[int], query: list[int], label: int, whole: bool
    ) -> Tensor:
        """``z`` of one sample; places of the buffer are negative."""
        net, buffer = self.backbone, self.backbone.config.buffer
        copies = list(range(-buffer, 0))
        x = net.token_projection(tokens[new]) + net.encoder_positions[0, buffer:][new]
        places = new
        if whole:
            self.held.clear()
            x = torch.cat([net.class_embedding.weight[label] + net.encoder_positions[0, :buffer], x])
            places = copies + new
        x = net.token_norm(x)
        for index in range(net.config.encoder_depth):
            x = self.attend("encoder", index, places, x)
        x = net.decoder_projection(net.encoder_norm(x))
        masked = [place for place in range(TOKENS) if place not in known] if whole else query
        x = torch.cat([x, net.mask_token[0].expand(len(masked), -1)])
        places = places + masked
        x = x + net.decoder_positions[0][[place + buffer for place in places]]
        for index in range(net.config.decoder_depth):
            x = self.attend("decoder", index, places, x)
        return (
            net.decoder_norm(x[[places.index(place) for place in query]]) + net.condition_positions[0][query]
        )


@torch.no_grad()
@pytest.mark.parametrize("refresh", [1, 2, 4])
def test_cached_conditions_equal_those_of_a_network_with_a_dictionary(
    backbone: MaskedBackbone, tokens: Tensor, refresh: int
) -> None:
    order = orders(4)
    plain = [Remembering(backbone) for _ in range(BATCH)]
    cache = backbone.new_cache(BATCH)
    before = 0
    for step, count in enumerate(STEPS):
        known, query = order[:, :count], order[:, count : count + 3]
        whole = step % refresh == 0
        if whole:
            cache.clear()
        z = backbone(tokens, known, query, LABELS, cache)
        for sample in range(BATCH):
            places = known[sample].tolist()
            new = places if whole else places[before:]
            expected = plain[sample].condition(
                tokens[sample], places, new, query[sample].tolist(), int(LABELS[sample]), whole
            )
            torch.testing.assert_close(z[sample], expected, rtol=0, atol=1e-5)
        exact = backbone(tokens, known, query, LABELS)
        if whole:
            torch.testing.assert_close(z, exact, rtol=0, atol=1e-5)
        else:
            assert (z - exact).abs().max() > 1e-3, "the cache has no effect"
        before = count


@torch.no_grad()
def test_cache_continues_with_its_first_rows_until_it_is_cleared(
    backbone: MaskedBackbone, tokens: Tensor
) -> None:
    order, cache = orders(4), backbone.new_cache(BATCH)
    backbone(tokens, order[:, :2], order[:, 2:4], LABELS, cache)
    alone = backbone.new_cache(2)
    backbone(tokens[:2], order[:2, :2], order[:2, 2:4], LABELS[:2], alone)
    both = [backbone(tokens[:2], order[:2, :4], order[:2, 4:6], LABELS[:2], kept) for kept in (cache, alone)]
    torch.testing.assert_close(*both, rtol=0, atol=1e-5)
    with pytest.raises(AssertionError):
        backbone(tokens, order[:, :6], order[:, 6:8], LABELS, cache)
    cache.clear()
    backbone(tokens, order[:, :6], order[:, 6:8], LABELS, cache)
