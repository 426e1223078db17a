"""Seconds of a masked training step of mar-b, and of the same arithmetic written plainly.

The plain version follows the order of work of MAR's released training: boolean masks, every token through the
last norm and the head, and the masked loss at the end. Both compute the same loss from the same weights,
which is checked first. Prints a Markdown table; takes about three minutes on 2 cores.
"""

import argparse
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from far.backbone import MaskedBackbone
from far.benchmark import machine, median_ratio, paired, summary
from far.heads.diffusion import DiffusionHead
from far.layers import Block
from far.model import FAR, ModelConfig, preset


def plain_block(block: Block, x: Tensor) -> Tensor:
    batch, count, width = x.shape
    y = F.layer_norm(x, (width,), block.norm1.weight, block.norm1.bias, 1e-6)
    q, k, v = F.linear(y, block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, dim=-1)
    q, k, v = (part.view(batch, count, block.attn.heads, -1).transpose(1, 2) for part in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, width)
    x = x + F.linear(y, block.attn.proj.weight, block.attn.proj.bias)
    y = F.layer_norm(x, (width,), block.norm2.weight, block.norm2.bias, 1e-6)
    y = F.gelu(F.linear(y, block.mlp.fc1.weight, block.mlp.fc1.bias))
    return x + F.linear(y, block.mlp.fc2.weight, block.mlp.fc2.bias)


def plain_loss(model: FAR, tokens: Tensor, labels: Tensor, mask: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return the mean loss of the masked tokens (``mask [b, n]``); ``t`` and ``noise`` are per token."""
    backbone, head = model.backbone, model.head
    assert isinstance(backbone, MaskedBackbone)
    assert isinstance(head, DiffusionHead)
    batch, count, _ = tokens.shape
    buffer = backbone.config.buffer
    x = backbone.token_projection(tokens)
    x = (
        torch.cat([backbone.class_embedding(labels).unsqueeze(1).expand(-1, buffer, -1), x], dim=1)
        + backbone.encoder_positions
    )
    kept = torch.cat([torch.ones(batch, buffer, dtype=torch.bool), ~mask], dim=1)
    x = backbone.token_norm(x)[kept].view(batch, -1, x.shape[-1])
    for block in backbone.encoder_blocks:
        assert isinstance(block, Block)
        x = plain_block(block, x)
    x = backbone.decoder_projection(backbone.encoder_norm(x))
    full = backbone.mask_token.expand(batch, buffer + count, -1).clone().to(x.dtype)
    full[kept] = x.reshape(-1, x.shape[-1])
    x = full + backbone.decoder_positions
    for block in backbone.decoder_blocks:
        assert isinstance(block, Block)
        x = plain_block(block, x)
    z = backbone.decoder_norm(x)[:, buffer:] + backbone.condition_positions
    samples = len(t)
    repeated = z.reshape(1, batch * count, -1).repeat(samples, 1, 1)
    mse, bound = head.loss_terms(
        tokens.reshape(1, batch * count, -1).expand(samples, -1, -1), repeated, t, noise
    )
    weight = mask.reshape(-1).float()
    return ((mse + bound) * weight).sum() / (weight.sum() * samples)


def ours_loss(model: FAR, tokens: Tensor, labels: Tensor, mask: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    backbone, head = model.backbone, model.head
    assert isinstance(head, DiffusionHead)
    batch, count, channels = tokens.shape
    order = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    masked = int(mask[0].sum())
    query, known = order[:, :masked], order[:, masked:]
    z = backbone(tokens, known, query, labels)
    rows = (query + count * torch.arange(batch).unsqueeze(1)).flatten()
    mse, bound = head.loss_terms(
        tokens.reshape(-1, channels)[rows], z.flatten(0, 1), t[:, rows], noise[:, rows]
    )
    return (mse + bound).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    torch.default_generator.manual_seed(0)
    model = FAR(ModelConfig(preset("mar-b"))).eval()  # without dropout, so that both compute the same loss
    tokens = torch.randn(arguments.batch_size, 256, 16, generator=generator)
    labels = torch.randint(0, 1000, (arguments.batch_size,), generator=generator)
    print(f"mar-b, batch {arguments.batch_size}, seed 0, {machine()}\n")
    print("| dtype | masked | far | plain | far / plain |\n|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for ratio in (0.7, 0.9):
            masked = math.ceil(256 * ratio)
            mask = torch.rand(arguments.batch_size, 256, generator=generator).argsort(dim=1) < masked
            t = torch.randint(0, 1000, (4, arguments.batch_size * 256), generator=generator)
            noise = torch.randn(4, arguments.batch_size * 256, 16, generator=generator)
            draws = (model, tokens, labels, mask, t, noise)

            def step(loss: Callable[..., Tensor]) -> float:
                model.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    value = loss(*draws)
                value.backward()
                return value.item()

            a, b = step(ours_loss), step(plain_loss)
            tolerance = 1e-4 if dtype == torch.float32 else 2e-2
            if abs(a - b) > tolerance * abs(b):
                raise SystemExit(f"The two losses differ: {a} and {b}.")
            seconds = paired(
                {"far": lambda: step(ours_loss), "plain": lambda: step(plain_loss)}, arguments.rounds
            )
            print(
                f"| {str(dtype)[6:]} | {ratio:.0%} | {summary(seconds['far'])} | {summary(seconds['plain'])} "
                f"| {median_ratio(seconds['far'], seconds['plain']):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
