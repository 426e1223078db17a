"""EAR's energy head (Shao et al., arXiv 2505.07812): one pass of the network from noise and condition to the token.

It is trained by a strictly proper scoring rule, which no other distribution of draws than the data's minimises, and so
needs neither times nor steps. EAR gives the head a quarter of the backbone's learning rate: ``training.head_learning_rate``.
Its noise is uniform, here it is normal as for all heads.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from far.errors import InputError
from far.heads.head import Head, HeadConfig, TokenLoss
from far.heads.network import HeadNetwork


class EnergyHead(Head):
    """The token itself as a function of condition and noise.

    As in EAR, the condition goes in where other heads have the noisy token, and the noise modulates: layer norms would take
    the noise's size away, and with it the temperature.
    """

    default_steps = 1
    max_steps = 1

    def __init__(self, config: HeadConfig, channels: int, condition: int) -> None:
        super().__init__()
        if config.samples_per_token < 2:
            raise InputError(
                "head samples_per_token 1: an energy head needs at least 2, whose distance is scored (EAR takes 2)"
            )
        self.config = config
        self.network = HeadNetwork(condition, channels, channels, config.width, config.depth, times=0)

    def loss(
        self,
        x: Tensor,
        z: Tensor,
        generator: torch.Generator,
        teacher: Head,
        *,
        step: int = 0,
        z_uncond: Tensor | None = None,
    ) -> TokenLoss:
        """The energy score of ``samples_per_token`` draws (half of EAR's loss, for two)."""
        noise = torch.randn(self.config.samples_per_token, *x.shape, generator=generator).to(x.device)
        distance, spread = distance_and_spread(self.network(z, noise).to(x.dtype), x)
        rows = distance - spread / 2
        found = rows.detach().flatten()
        parts = {"distance": distance.detach().flatten(), "spread": spread.detach().flatten()}
        return TokenLoss(rows.mean(dim=0), found, torch.zeros_like(found), parts)

    def sample(
        self,
        z: Tensor,
        normal: Callable[[], Tensor],
        *,
        steps: int,
        temperature: float = 1.0,
        z_uncond: Tensor | None = None,
        guidance: float = 1.0,
        times: Tensor | None = None,
    ) -> Tensor:
        """See :class:`Head`; guidance is of the condition, ``z_uncond + guidance · (z − z_uncond)``, which takes no second pass."""
        self.check_steps(steps)
        noise = normal() * temperature
        if z_uncond is not None:
            z = z_uncond.lerp(z, guidance)
        return self.network(z, noise).to(noise.dtype)  # type: ignore[no-any-return]

    def embed_times(self, steps: int, like: Tensor) -> Tensor:
        """Nothing, ``[steps, 0]``: there is no time."""
        return like.new_zeros(steps, 0)


def distance_and_spread(drawn: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each of ``drawn [samples, n, channels]``, ``[samples, n]``: how far it is from ``x [n, channels]``, and on average from
    the other draws of its token.

    The mean of ``distance − spread / 2`` is the unbiased energy score with exponent 1: ``E|X − x| − E|X − X'| / 2``.
    """
    # Draws may coincide, and in a fresh network all do: this norm's gradient is zero there, that of a plain root is not finite.
    distance = torch.linalg.vector_norm(drawn - x, dim=-1)
    between = torch.linalg.vector_norm(drawn.unsqueeze(1) - drawn, dim=-1)
    return distance, between.sum(dim=1) / (len(drawn) - 1)
