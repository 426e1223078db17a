"""Adversarial term of the autoencoder's loss, as in VQGAN (arXiv 2012.09841) and latent diffusion."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

# Widest layer, as a multiple of the first.
_MOST = 8
# Gradients of a mean over pixels underflow in float16.
_SCALE = 2.0**12


class Discriminator(nn.Module):
    """PatchGAN (pix2pix, arXiv 1611.07004): images ``[b, 3, h, w]`` in [−1, 1] → logits ``[b, 1, i, j]``.

    The convolutions see a patch of 16, 34 or 70 pixels a side per logit with 1, 2 or 3 ``layers``. Group norm
    replaces batch norm, so an image's logits do not depend on its batch.

    Args:
        width: channels of the first layer; each further layer doubles them, up to eight times.
        layers: layers that halve the resolution. Two more keep it.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        widths = [width * min(2**level, _MOST) for level in range(layers + 1)]
        body: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, layers + 1):
            stride = 2 if level < layers else 1
            body.append(nn.Conv2d(widths[level - 1], widths[level], 4, stride, padding=1, bias=False))
            body += [nn.GroupNorm(width // 4, widths[level]), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*body, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


def adversarial_losses(
    discriminator: nn.Module, images: Tensor, reconstructions: Tensor
) -> dict[str, Tensor]:
    """Return hinge losses and mean logits of images and reconstructions, both ``[b, 3, h, w]``.

    ``adversarial`` has gradients in the reconstructions only, ``discriminator`` in the discriminator only, so
    one backward pass of their sum trains both networks.
    """
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    adversarial = -functional_call(discriminator, frozen, reconstructions).float().mean()
    real = discriminator(images).float()
    fake = discriminator(reconstructions.detach()).float()
    return {
        "adversarial": adversarial,
        "discriminator": 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean()),
        "logits_real": real.mean(),
        "logits_fake": fake.mean(),
    }


def adaptive_weight(loss: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Return ``‖∇ loss‖ / ‖∇ adversarial‖`` for the weights of the decoder's last layer, at most 10⁴.

    Multiplied by it, the adversarial term pulls on that layer as strongly as ``loss`` (VQGAN, equation 7).
    """
    norms = [
        torch.autograd.grad(_SCALE * term, last_layer, retain_graph=True)[0].norm() / _SCALE
        for term in (loss, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4)
