"""EAR's energy head (Shao et al., arXiv 2505.07812): one pass of the network from noise and condition to the token.

It is trained by a strictly proper scoring rule, which no other distribution of draws than the data's minimises, and so
needs neither times nor steps. EAR gives the head a quarter of the backbone's learning rate: ``training.head_learning_rate``.
Its noise is uniform, here it is normal as for all heads.
"""

import torch
from torch import Tensor

from far.heads.config import EnergyConfig
from far.heads.head import Condition, Draw, Head, Normal, TokenLoss
from far.heads.network import HeadNetwork


class EnergyHead(Head):
    """The token itself as a function of condition and noise.

    As in EAR, the condition goes in where other heads have the noisy token, and the noise modulates: layer norms would take
    the noise's size away, and with it the temperature.
    """

    config_class = EnergyConfig
    default_steps = 1
    max_steps = 1
    config: EnergyConfig

    def __init__(self, config: EnergyConfig, channels: int, condition: int) -> None:
        super().__init__(config, channels, condition)
        self.network = HeadNetwork(condition, channels, channels, config.width, config.depth, times=0)

    def loss(
        self, x: Tensor, condition: Condition, generator: torch.Generator, teacher: Head, step: int = 0
    ) -> TokenLoss:
        """The energy score of ``samples_per_token`` draws (half of EAR's loss, for two)."""
        noise = torch.randn(self.config.samples_per_token, *x.shape, generator=generator).to(x.device)
        distance, spread = distance_and_spread(self.network(condition.z, noise).to(x.dtype), x)
        rows = distance - spread / 2
        found = rows.detach().flatten()
        parts = {"distance": distance.detach().flatten(), "spread": spread.detach().flatten()}
        return TokenLoss(rows.mean(dim=0), found, torch.zeros_like(found), parts)

    def sampler(self, steps: int, like: Tensor) -> Draw:
        """See :class:`Head`. Guidance mixes the conditions, ``uncond + scale · (z − uncond)``, in one pass."""
        self.check_steps(steps)

        def draw(condition: Condition, normal: Normal, temperature: float) -> Tensor:
            noise = normal() * temperature
            return self.network(condition.mix(), noise).to(noise.dtype)  # type: ignore[no-any-return]

        return draw


def distance_and_spread(drawn: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each of ``drawn [samples, n, channels]``, ``[samples, n]``: how far it is from ``x [n, channels]``, and on average from
    the other draws of its token.

    The mean of ``distance − spread / 2`` is the unbiased energy score with exponent 1: ``E|X − x| − E|X − X'| / 2``.
    """
    # Draws may coincide, and in a fresh network all do: this norm's gradient is zero there, that of a plain root is not finite.
    distance = torch.linalg.vector_norm(drawn - x, dim=-1)
    between = torch.linalg.vector_norm(drawn.unsqueeze(1) - drawn, dim=-1)
    return distance, between.sum(dim=1) / (len(drawn) - 1)
