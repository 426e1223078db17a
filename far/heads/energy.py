"""EAR's energy head (Shao et al., arXiv 2505.07812): one pass from noise and condition to the token.

Only the data's distribution minimizes its loss, a strictly proper scoring rule. EAR gives the head a quarter
of the backbone's learning rate (``training.head_learning_rate``), and uniform noise. Here noise is normal.
"""

import torch
from torch import Tensor

from far.devices import to_device
from far.heads.config import EnergyConfig
from far.heads.head import Condition, Draw, Head, Normal, TokenLoss
from far.heads.network import HeadNetwork


class EnergyHead(Head):
    """Token as a function of condition and noise.

    As in EAR, the condition is the network's input and the noise modulates the blocks. As an input, the noise
    would lose its size, and so the temperature, in the layer norms.
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
        """Return the energy score of ``samples_per_token`` draws (for two, half of EAR's loss)."""
        noise = torch.randn(self.config.samples_per_token, *x.shape, generator=generator)
        noise = to_device(noise, x.device)
        distance, spread = distance_and_spread(self.network(condition.z, noise).to(x.dtype), x)
        score = distance - spread / 2
        return TokenLoss.mean_of(score, torch.zeros_like(score.detach()), distance=distance, spread=spread)

    def sampler(self, steps: int, like: Tensor) -> Draw:
        def draw(condition: Condition, normal: Normal, temperature: float) -> Tensor:
            noise = normal() * temperature
            return self.network(condition.mix(), noise).to(noise.dtype)  # type: ignore[no-any-return]

        return draw


def distance_and_spread(drawn: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return distances ``[samples, n]`` of draws to targets ``x [n, channels]``, and to the other draws.

    The mean of ``distance − spread / 2`` is the unbiased energy score ``E|X − x| − E|X − X'| / 2``.
    """
    # If draws coincide, as in an untrained network, this norm's gradient is zero and a plain root's is NaN.
    distance = torch.linalg.vector_norm(drawn - x, dim=-1)
    between = torch.linalg.vector_norm(drawn.unsqueeze(1) - drawn, dim=-1)
    return distance, between.sum(dim=1) / (len(drawn) - 1)
