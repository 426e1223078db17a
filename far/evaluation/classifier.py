"""A linear classifier on features: did a generated image come out as the class that was asked for?"""

import torch
import torch.nn.functional as F
from torch import Tensor


class LinearClassifier:
    """Multinomial logistic regression on standardised features, fitted in closed batches without randomness.

    Args:
        features: ``[n, d]`` of the training images.
        labels: ``[n]``.
        weight_decay: of the squared weights, per image.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, *, weight_decay: float = 1e-3, iterations: int = 100
    ) -> None:
        self.mean, self.deviation = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
        inputs = self._standardised(features)
        classes = int(labels.max()) + 1
        self.weight = torch.zeros(classes, features.shape[1], requires_grad=True)
        self.bias = torch.zeros(classes, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [self.weight, self.bias], max_iter=iterations, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = (
                F.cross_entropy(F.linear(inputs, self.weight, self.bias), labels)
                + weight_decay * self.weight.square().sum()
            )
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)  # type: ignore[no-untyped-call]
        self.weight, self.bias = self.weight.detach(), self.bias.detach()

    def _standardised(self, features: Tensor) -> Tensor:
        return (features.float() - self.mean) / self.deviation

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """The share of ``features [n, d]`` whose most probable class is that of ``labels [n]``."""
        predicted = F.linear(self._standardised(features), self.weight, self.bias).argmax(dim=1)
        return float((predicted == labels).double().mean())
