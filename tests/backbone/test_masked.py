"""What ``z`` depends on, and what it must not depend on. Its values are compared in tests/reference."""

import math

import pytest
import torch
from torch import Tensor

from far.backbone.masked import MaskedBackbone, MaskedConfig
from far.errors import InputError

TOKENS, CHANNELS, CLASSES, BATCH = 12, 5, 3, 4
NULL = CLASSES


@pytest.fixture(scope="module")
def backbone() -> MaskedBackbone:
    torch.manual_seed(0)
    config = MaskedConfig(
        encoder_width=16, encoder_depth=2, encoder_heads=4, decoder_width=24, decoder_depth=2, decoder_heads=2, buffer=3, dropout=0.0
    )
    backbone = MaskedBackbone(config, TOKENS, CHANNELS, CLASSES).eval()
    with torch.no_grad():  # freshly initialised, positions and classes hardly count
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
def test_unknown_tokens_do_not_count(backbone: MaskedBackbone, tokens: Tensor, count: int) -> None:
    known = orders()[:, :count]
    z = backbone.condition(tokens, known, EVERYWHERE, LABELS)
    others = torch.full_like(tokens, float("nan")).scatter(
        1, known.unsqueeze(-1).expand(-1, -1, CHANNELS), tokens.gather(1, known.unsqueeze(-1).expand(-1, -1, CHANNELS))
    )
    assert torch.equal(backbone.condition(others, known, EVERYWHERE, LABELS), z)


@torch.no_grad()
def test_every_known_token_counts_everywhere(backbone: MaskedBackbone, tokens: Tensor) -> None:
    known = orders()[:, :7]
    z = backbone.condition(tokens, known, EVERYWHERE, LABELS)
    for index in range(7):
        changed = tokens.clone()
        changed[torch.arange(BATCH), known[:, index]] += 1
        difference = (backbone.condition(changed, known, EVERYWHERE, LABELS) - z).abs().amax(dim=-1)
        assert difference.min() > 1e-4, index


@torch.no_grad()
def test_order_of_known_positions_does_not_matter(backbone: MaskedBackbone, tokens: Tensor) -> None:
    known = orders()[:, :7]
    z = backbone.condition(tokens, known, EVERYWHERE, LABELS)
    torch.testing.assert_close(backbone.condition(tokens, known.flip(1), EVERYWHERE, LABELS), z, rtol=0, atol=1e-5)


@torch.no_grad()
def test_wanted_positions_are_a_choice_of_all(backbone: MaskedBackbone, tokens: Tensor) -> None:
    known, wanted = orders()[:, :7], orders()[:, 7:10]
    z = backbone.condition(tokens, known, EVERYWHERE, LABELS)
    chosen = backbone.condition(tokens, known, wanted, LABELS)
    assert chosen.shape == (BATCH, 3, backbone.width)
    for sample in range(BATCH):
        torch.testing.assert_close(chosen[sample], z[sample, wanted[sample]], rtol=0, atol=1e-5)


@torch.no_grad()
def test_label_counts(backbone: MaskedBackbone, tokens: Tensor) -> None:
    known = orders()[:1, :5].expand(BATCH, -1)
    z = backbone.condition(tokens[:1].expand(BATCH, -1, -1), known, EVERYWHERE, LABELS)
    for a in range(BATCH):
        for b in range(a):
            assert (z[a] - z[b]).abs().amax(dim=-1).min() > 1e-3, f"labels {LABELS[a]} and {LABELS[b]} give the same z"


@torch.no_grad()
def test_positions_count(backbone: MaskedBackbone, tokens: Tensor) -> None:
    """The same token at another position is something else, and unknown positions differ from one another."""
    same = tokens[:1, :1].expand(BATCH, TOKENS, -1)
    known = torch.arange(BATCH).view(BATCH, 1)
    z = backbone.condition(same, known, EVERYWHERE, torch.zeros(BATCH, dtype=torch.long))
    assert (z[0] - z[1]).abs().amax(dim=-1).min() > 1e-4
    assert torch.cdist(z[0], z[0]).add(torch.eye(TOKENS)).min() > 1e-2


@torch.no_grad()
def test_samples_of_a_batch_are_independent(backbone: MaskedBackbone, tokens: Tensor) -> None:
    known, wanted = orders()[:, :4], orders()[:, 4:]
    z = backbone.condition(tokens, known, wanted, LABELS)
    for sample in range(BATCH):
        alone = backbone.condition(*(part[sample : sample + 1] for part in (tokens, known, wanted, LABELS)))
        torch.testing.assert_close(alone[0], z[sample], rtol=0, atol=1e-5)


@torch.no_grad()
def test_training_conditions(backbone: MaskedBackbone, tokens: Tensor) -> None:
    counts = set()
    for seed in range(40):
        z, wanted = backbone.training_conditions(tokens, LABELS, torch.Generator().manual_seed(seed))
        count = wanted.shape[1]
        counts.add(count)
        assert z.shape == (BATCH, count, backbone.width)
        assert all(len(set(row)) == count for row in wanted.tolist())
        # z is that of the other positions' tokens, and of nothing else.
        known = torch.tensor([sorted(set(range(TOKENS)) - set(row)) for row in wanted.tolist()], dtype=torch.long).view(BATCH, -1)
        torch.testing.assert_close(z, backbone.condition(tokens, known, wanted, LABELS), rtol=0, atol=1e-5)
    # Shares of 0.7 to 1 of 12 tokens, rounded up.
    assert counts == {math.ceil(0.7 * TOKENS), 10, 11, 12}


@torch.no_grad()
def test_training_masks_differ_between_samples_and_repeat_with_the_seed(backbone: MaskedBackbone, tokens: Tensor) -> None:
    first, second = (backbone.training_conditions(tokens, LABELS, torch.Generator().manual_seed(5))[1] for _ in range(2))
    assert torch.equal(first, second)
    assert len({tuple(sorted(row)) for row in first.tolist()}) == BATCH


def test_dropout_acts_in_training_only(tokens: Tensor) -> None:
    torch.manual_seed(0)
    backbone = MaskedBackbone(MaskedConfig(16, 1, 2, 16, 1, 2, 2, dropout=0.5), TOKENS, CHANNELS, CLASSES)
    known = orders()[:, :4]
    assert not torch.equal(*(backbone.condition(tokens, known, EVERYWHERE, LABELS) for _ in range(2)))
    backbone.eval()
    assert torch.equal(*(backbone.condition(tokens, known, EVERYWHERE, LABELS) for _ in range(2)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder_width": 100}, "encoder_width 100 must be a positive multiple of encoder_heads 12"),
        ({"decoder_heads": 0}, "decoder_heads 0"),
        ({"decoder_width": -12}, "decoder_width -12"),
        ({"encoder_depth": 0}, "encoder_depth 0 must be positive"),
        ({"buffer": 0}, "buffer 0 must be positive"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"dropout": -0.1}, "dropout -0.1"),
    ],
)
def test_impossible_sizes(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        MaskedConfig(**values)
