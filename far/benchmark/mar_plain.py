"""MAR's plain path, the baseline of FAR's speed on GPUs: sampling and loss as in MAR's released code.

Written from the paper (arXiv 2406.11838) and the published algorithm, with the same costs: guided batches are
doubled through backbone, noise and head; the decoder computes ``z`` for all tokens; boolean masks select
tokens; every denoising step moves the schedule's tables from the CPU; weights are float32 under float16
autocast. Nothing is slower than in MAR's code, and attention is torch's fused one.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from far.backbone import MaskedBackbone
from far.benchmark.rows import SEED, Row
from far.benchmark.watch import PARTS, Segment
from far.heads.diffusion import DiffusionHead, Schedule
from far.layers import Block
from far.model import FAR
from far.pipeline import Pipeline
from far.sampling import SamplingConfig
from far.seeds import seeded_generator
from far.tokens import cosine_token_counts, random_orders


class PlainMar:
    """A masked model with a diffusion head, computed as in MAR's code.

    Args:
        model: masked backbone and diffusion head.
        normal: (rows, channels) → standard normal noise of an AR step's tokens, image after image.
        temperature: factor of the noise in denoising steps.
    """

    def __init__(
        self, model: FAR, normal: Callable[[int, int], Tensor] | None = None, temperature: float = 1.0
    ) -> None:
        assert isinstance(model.backbone, MaskedBackbone)
        assert isinstance(model.head, DiffusionHead)
        self.model, self.backbone, self.head = model, model.backbone, model.head
        self.temperature = temperature
        self.buffer = model.config.network.backbone.buffer
        self.tokens, self.channels = model.config.tokens, model.config.token_channels
        self.device = model.backbone.mask_token.device
        self.normal = normal or (lambda rows, channels: torch.randn(rows, channels, device=self.device))

    @torch.no_grad()
    def sample(
        self, labels: Tensor, orders: Tensor, ar_steps: int, head_steps: int, guidance: float
    ) -> Tensor:
        """Return latents ``[b, c, h, w]`` of ``labels [b]``; ``orders [b, n]`` start with the last tokens."""
        config = SamplingConfig(ar_steps=ar_steps, head_steps=head_steps, guidance=guidance)
        tokens = torch.zeros(len(labels), self.tokens, self.channels, device=self.device)
        mask = torch.ones(len(labels), self.tokens, device=self.device)
        for step in range(ar_steps):
            tokens, mask = self.ar_step(tokens, mask, labels, orders, step, config)
        return self.model.latents(tokens)

    def ar_step(
        self,
        tokens: Tensor,
        mask: Tensor,
        labels: Tensor,
        orders: Tensor,
        step: int,
        config: SamplingConfig,
    ) -> tuple[Tensor, Tensor]:
        """Return tokens ``[b, n, c]`` and mask ``[b, n]`` (1 = unknown) after an AR step."""
        batch, guided = len(labels), config.guidance != 1.0
        current = tokens.clone()
        embedding = self.backbone.class_embedding(labels)
        if guided:
            none = self.backbone.class_embedding(torch.full_like(labels, self.model.null_label))
            tokens, embedding, mask = (
                torch.cat([tokens, tokens]),
                torch.cat([embedding, none]),
                torch.cat([mask, mask]),
            )
        z = self.decode(self.encode(tokens, mask, embedding), mask)
        left = torch.tensor(
            [math.floor(self.tokens * math.cos(math.pi / 2 * (step + 1) / config.ar_steps))],
            device=self.device,
        )
        left = torch.maximum(
            torch.tensor([1], device=self.device), torch.minimum(mask.sum(dim=-1, keepdim=True) - 1, left)
        )
        count = int(left[0])
        later = torch.zeros(batch, self.tokens, device=self.device)
        later.scatter_(-1, orders[:, :count], torch.ones(batch, self.tokens, device=self.device))
        query = (
            mask[:batch].bool()
            if step >= config.ar_steps - 1
            else torch.logical_xor(mask[:batch].bool(), later.bool())
        )
        pairs = torch.cat([query, query]) if guided else query
        scale = 1 + (config.guidance - 1) * (self.tokens - count) / self.tokens
        assert isinstance(config.head_steps, int)
        drawn = self.draw(z[pairs.nonzero(as_tuple=True)], config.head_steps, scale, guided)
        current[query.nonzero(as_tuple=True)] = drawn.chunk(2)[0] if guided else drawn
        return current, later

    def encode(self, tokens: Tensor, mask: Tensor, embedding: Tensor) -> Tensor:
        """Return the encoder's output for the buffer and the known tokens, ``[b, buffer + k, width]``."""
        backbone = self.backbone
        x = backbone.token_projection(tokens)
        x = torch.cat([x.new_zeros(len(x), self.buffer, x.shape[-1]), x], dim=1)
        x[:, : self.buffer] = embedding.unsqueeze(1).to(x.dtype)
        x = backbone.token_norm(x + backbone.encoder_positions)
        x = x[(1 - self._with_buffer(mask)).nonzero(as_tuple=True)].reshape(len(x), -1, x.shape[-1])
        return backbone.encoder_norm(_through(x, backbone.encoder_blocks))

    def decode(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return ``z [b, n, width]`` for all tokens."""
        backbone = self.backbone
        x = backbone.decoder_projection(x)
        padded = backbone.mask_token.to(x.dtype).repeat(len(x), self.buffer + self.tokens, 1)
        padded[(1 - self._with_buffer(mask)).nonzero(as_tuple=True)] = x.reshape(-1, x.shape[-1])
        x = backbone.decoder_norm(_through(padded + backbone.decoder_positions, backbone.decoder_blocks))
        return x[:, self.buffer :] + backbone.condition_positions

    def _with_buffer(self, mask: Tensor) -> Tensor:
        return torch.cat([torch.zeros(len(mask), self.buffer, device=mask.device), mask], dim=1)

    def draw(self, z: Tensor, steps: int, scale: float, guided: bool) -> Tensor:
        """Return tokens ``[rows, c]`` by ancestral sampling; guided rows are twice the same."""
        rows = len(z) // 2 if guided else len(z)

        def noise() -> Tensor:
            drawn = self.normal(rows, self.channels)
            return torch.cat([drawn, drawn]) if guided else drawn

        schedule, x = Schedule.respaced(steps), noise()
        for index in reversed(range(steps)):
            t = torch.tensor([index] * len(z), device=self.device)
            epsilon, fraction = self._predict(x, z, t, schedule, scale, guided)
            # Each coefficient is a table on the CPU, moved to the device and indexed.
            x = self._ancestral(x, epsilon, fraction, t, schedule, noise())
        return x

    def _predict(
        self, x: Tensor, z: Tensor, t: Tensor, schedule: Schedule, scale: float, guided: bool
    ) -> tuple[Tensor, Tensor]:
        times = torch.tensor(schedule.timesteps, device=self.device)[t]
        x = torch.cat([x.chunk(2)[0]] * 2) if guided else x
        epsilon, fraction = self.head.network(x, z, times).float().chunk(2, dim=1)
        if guided:
            cond, uncond = epsilon.chunk(2)
            epsilon = torch.cat([uncond + scale * (cond - uncond)] * 2)
        return epsilon, fraction

    def _ancestral(
        self, x: Tensor, epsilon: Tensor, fraction: Tensor, t: Tensor, schedule: Schedule, noise: Tensor
    ) -> Tensor:
        def at(table: Tensor) -> Tensor:
            return table.to(self.device)[t].float().unsqueeze(-1).expand(x.shape)

        signal, betas = schedule.alphas_cumprod, schedule.betas
        before = torch.cat([signal.new_ones(1), signal[:-1]])
        weight = (fraction + 1) / 2
        logvar = weight * at(betas.log()) + (1 - weight) * at(schedule.posterior_logvar)
        token = at((1 / signal).sqrt()) * x - at((1 / signal - 1).sqrt()) * epsilon
        mean = (
            at(betas * before.sqrt() / (1 - signal)) * token
            + at((1 - before) * (1 - betas).sqrt() / (1 - signal)) * x
        )
        moves = (t != 0).float().unsqueeze(-1)
        return mean + moves * (0.5 * logvar).exp() * noise * self.temperature

    def loss(self, latents: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Return the training loss: the head computes all tokens, and the masked ones count."""
        tokens = self.model.tokens(latents)
        z = self.decode(self.encode(tokens, mask, self.backbone.class_embedding(labels)), mask)
        samples = self.head.config.samples_per_token
        x, z = tokens.flatten(0, 1).repeat(samples, 1), z.flatten(0, 1).repeat(samples, 1)
        weights = mask.flatten().repeat(samples)
        t = torch.randint(0, 1000, (len(x),), device=self.device)
        mse, bound = self.head.loss_terms(x, z, t, torch.randn_like(x))
        return ((mse + bound) * weights).sum() / weights.sum()


def draw_plain(pipeline: Pipeline, row: Row) -> None:
    """Draw and decode a row's batch as MAR's code does."""
    plain, labels, orders = _start(pipeline, row)
    config = row.sampling
    assert isinstance(config.head_steps, int)
    with _autocast(pipeline.device):
        latents = plain.sample(labels, orders, config.ar_steps, config.head_steps, config.guidance)
        _decode(pipeline, latents)


def generate_plain(
    pipeline: Pipeline, row: Row, plan: Sequence[Segment], reading: Callable[[], float]
) -> dict[str, float]:
    """Return how much ``reading`` grows by part, as :func:`far.benchmark.watch.generate` does."""
    plain, labels, orders = _start(pipeline, row)
    totals, grown = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)

    def watched(part: str, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*values: Any) -> Tensor:
            start = reading()
            result = method(*values)
            grown[part] += reading() - start
            return result

        return call

    for part, name in {"encoder": "encode", "decoder": "decode", "head": "draw"}.items():
        setattr(plain, name, watched(part, getattr(plain, name)))
    counts = cosine_token_counts(plain.tokens, row.sampling.ar_steps)
    tokens = torch.zeros(row.batch, plain.tokens, plain.channels, device=pipeline.device)
    with torch.no_grad(), _autocast(pipeline.device):
        for segment in plan:
            for step in segment.timed:
                grown = dict.fromkeys(PARTS, 0.0)
                mask = torch.zeros_like(tokens[..., 0]).scatter(1, orders[:, : sum(counts[step:])], 1.0)
                start = reading()
                tokens, _ = plain.ar_step(tokens, mask, labels, orders, step, row.sampling)
                grown["sampler"] = reading() - start - sum(grown.values())
                for part, value in grown.items():
                    totals[part] += value * segment.stands_for / len(segment.timed)
        start = reading()
        _decode(pipeline, pipeline.model.latents(tokens))
        totals["autoencoder"] = reading() - start
    return totals


def _start(pipeline: Pipeline, row: Row) -> tuple[PlainMar, Tensor, Tensor]:
    """Return the plain model, labels ``[b]`` and orders ``[b, n]``, from the benchmark's seed."""
    device, config = pipeline.device, pipeline.model.config
    generator = torch.Generator(device).manual_seed(SEED)
    plain = PlainMar(
        pipeline.model,
        lambda rows, channels: torch.randn(rows, channels, generator=generator, device=device),
        row.sampling.temperature,
    )
    labels = torch.arange(row.batch, device=device) % config.classes
    generators = [seeded_generator(seed) for seed in range(SEED, SEED + row.batch)]
    return plain, labels, random_orders(config.tokens, generators).to(device)


def _decode(pipeline: Pipeline, latents: Tensor) -> None:
    """Decode latents whose values are replaced: untrained heads draw some that float16 cannot hold."""
    pipeline.decode(latents.nan_to_num().clamp(-3, 3))


def _autocast(device: torch.device) -> torch.autocast:
    """Return MAR's number format on a GPU: float16 under autocast."""
    return torch.autocast(device.type, torch.float16, enabled=device.type == "cuda")


def _through(x: Tensor, blocks: "torch.nn.ModuleList") -> Tensor:
    """Apply pre-norm blocks to all positions, as timm's."""
    for block in blocks:
        assert isinstance(block, Block)
        batch, count, width = x.shape
        qkv = (
            block.attn.qkv(block.norm1(x))
            .reshape(batch, count, 3, block.attn.heads, -1)
            .permute(2, 0, 3, 1, 4)
        )
        y = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).reshape(batch, count, width)
        x = x + block.attn.proj(y)
        x = x + block.mlp(block.norm2(x))
    return x
