"""Linear classifier on features, to measure how often a generated image shows the requested class."""

import torch
import torch.nn.functional as F
from torch import Tensor


class LinearClassifier:
    """Multinomial logistic regression on standardized features, fitted to all at once, without randomness.

    Args:
        features: ``[n, d]`` of the training images.
        labels: ``[n]``.
        weight_decay: factor of the sum of squared weights in the loss.
        iterations: of L-BFGS, at most.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, *, weight_decay: float = 1e-3, iterations: int = 100
    ) -> None:
        self.mean, self.std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
        inputs = self._standardized(features)
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

    def _standardized(self, features: Tensor) -> Tensor:
        return (features.float() - self.mean) / self.std

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Return the fraction of ``features [n, d]`` whose most probable class is that of ``labels [n]``."""
        predicted = F.linear(self._standardized(features), self.weight, self.bias).argmax(dim=1)
        return float((predicted == labels).double().mean())
