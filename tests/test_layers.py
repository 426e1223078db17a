"""Attention and rotation against their definitions in float64."""

import math

import pytest
import torch
from torch import Tensor

from far.layers import attend, rotary_table, rotate


def definition(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("bhmd,bhnd->bhmn", q, k) / q.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias.double()
    return torch.einsum("bhmn,bhnd->bhmd", scores.softmax(dim=-1), v)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize("hidden", [0, 15])
@pytest.mark.parametrize("scores", [1, 2_500_000])
def test_attention_equals_its_definition(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tolerance: float,
    queries: int,
    hidden: int,
    scores: int,
) -> None:
    """It does in one piece and row by row, with and without hidden keys."""
    monkeypatch.setattr("far.layers._SCORES", scores)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, count, 16, generator=generator).to(dtype) for count in (queries, 40, 40))
    bias = None
    if hidden:
        bias = torch.zeros(40, dtype=dtype)
        bias[-hidden:] = -torch.inf
    found = attend(q, k, v, bias)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), definition(q, k, v, bias), rtol=0, atol=tolerance)
    if hidden:
        torch.testing.assert_close(
            found, attend(q, k[:, :, :-hidden], v[:, :, :-hidden]), rtol=0, atol=tolerance
        )


def test_rotation_equals_complex_products() -> None:
    """Pairs are complex numbers, rotated by position times frequency. Each axis rotates its own."""
    positions = torch.tensor([[0, 0], [3, 7], [11, 2]])
    x = torch.randn(2, 3, 8)
    angles = torch.stack(
        [
            torch.stack([p[0] * f for f in (1.0, 0.01)] + [p[1] * f for f in (1.0, 0.01)])
            for p in positions.double()
        ]
    )
    turned = torch.complex(x[..., :4].double(), x[..., 4:].double()) * torch.polar(
        torch.ones_like(angles), angles
    )
    found = rotate(x, rotary_table(positions, 8))
    torch.testing.assert_close(
        found.double(), torch.cat([turned.real, turned.imag], dim=-1), rtol=0, atol=1e-6
    )
    assert math.isclose(float(found.norm()), float(x.norm()), rel_tol=1e-5)
