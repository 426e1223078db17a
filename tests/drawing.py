"""Draw tokens by one call instead of the two calls of a generation."""

from collections.abc import Callable

from torch import Tensor

from far.heads import Condition, Head


def draw(
    head: Head,
    z: Tensor,
    normal: Callable[[], Tensor],
    *,
    steps: int,
    temperature: float = 1.0,
    uncond: Tensor | None = None,
    scale: Tensor | float = 1.0,
) -> Tensor:
    """Return tokens ``[…, channels]`` for conditions ``z […, width]`` in the dtype of the tokens."""
    return head.sampler(steps, z)(Condition(z, uncond, scale), normal, temperature)
