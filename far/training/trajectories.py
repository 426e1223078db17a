"""Training data of distillation: conditions of a teacher's backbone, and trajectories of its head.

The backbone runs once per image (twice for guidance), whatever the number of head steps, and the result is
kept on disk. ``far.training.distillation`` trains a student on it.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from far.classes import check_same_classes
from far.config import to_dict
from far.data.image_sets import check_meta
from far.data.images import sides
from far.data.latents import LatentCache
from far.data.shards import Piece, Pieces, ShardReader, ShardWriter
from far.errors import InputError
from far.files import sha256
from far.heads import Condition
from far.heads.diffusion import DiffusionHead
from far.heads.flow import heun
from far.model import FAR
from far.pipeline import Pipeline
from far.processes import Processes
from far.progress import ImageBar
from far.sampling import Progress, SamplingConfig, SeededNoise, generation_orders, sample
from far.seeds import seeded_generator
from far.tokens import cosine_token_counts
from far.training.config import GROUP, TrajectoryConfig

# Trajectories are kept at times 0, 1/8 … 1, with this many Heun steps from one point to the next.
POINTS = 9
SUBSTEPS = 2
# Groups per shard, i.e. work lost on interruption, from a cache; 1 if the teacher must draw the images.
_SHARD_GROUPS = 16

Callback = Callable[[Progress], None]
# Group number, generator and a callback for each AR step → latents [64, c, h, w] and labels [64].
GroupReader = Callable[[int, torch.Generator, Callback], tuple[Tensor, Tensor]]


def load_teacher(folder: Path, config: TrajectoryConfig, device: str | torch.device) -> Pipeline:
    """Load the model to distill. A diffusion head without a token limit gets the limit of ``config``."""
    teacher = Pipeline.from_pretrained(folder, device=device)
    head = teacher.model.head
    if isinstance(head, DiffusionHead) and head.config.token_limit is None:
        teacher.model.head = head.limited(config.token_limit)
    return teacher


@torch.no_grad()
def write_trajectories(
    teacher: Pipeline,
    weights: Path,
    config: TrajectoryConfig,
    folder: Path,
    latents: Path | None,
    processes: Processes = Processes(),
) -> None:
    """Fill ``folder`` with trajectories, shared among ``processes``. Resumes an interrupted call.

    Rows are images: ``tokens [n, channels]``, ``labels``, ``order [n]`` of positions, the first ``known`` of
    which are known, ``query [m]`` positions, their ``z [m, width]``, guidance ``scale [m]`` and ``paths [m,
    9, channels]``.

    Args:
        teacher: the model to distill.
        weights: the teacher's folder. The checksum of its weights is kept with the rows.
        config: number of images, guidance and seed.
        folder: receives the trajectories.
        latents: a latent cache; ``None`` lets the teacher draw the images with its default sampling values.
        processes: ranks that share the work.

    Raises:
        InputError: the teacher's head has no velocity, the latents are not the teacher's, or the folder holds
            other trajectories.
    """
    source = "drawn by the teacher" if latents is None else _check_latents(latents, teacher).digest
    meta = {
        "kind": "trajectories", "teacher": sha256(weights / "model.safetensors"), "classes": teacher.classes,
        "sampling": to_dict(teacher.defaults), "latents": source, **dataclasses.asdict(config),
    }  # fmt: skip
    writer = ShardWriter(folder, meta, processes)
    if writer.complete:
        return
    _check_velocity(teacher.model)
    images = _drawn(teacher, config.seed) if latents is None else _cached(teacher, latents, config.seed)
    groups = -(-config.images // GROUP)
    bar = ImageBar(
        groups, "teacher's trajectories", group=GROUP, initial=writer.cursor, smoothing=0,
        disable=processes.rank > 0,
    )  # fmt: skip

    def pieces(numbers: range) -> Pieces:
        start = round(bar.n)
        for done, group in enumerate(numbers, start=1):
            generator = seeded_generator(group, config.seed)
            drawn = images(group, generator, bar.ar_step)
            rows = group_rows(teacher.model, *drawn, config, teacher.defaults, generator)
            yield Piece(1, {name: tensor.cpu() for name, tensor in rows.items()})
            bar.move_to(start + done)

    with bar:
        writer.fill(groups, 1 if latents is None else _SHARD_GROUPS, pieces, bar)


def _check_velocity(model: FAR) -> None:
    like = next(model.parameters())
    token, z = like.new_zeros(1, model.config.token_channels), like.new_zeros(1, model.backbone.width)
    model.head.velocity(token, like.new_zeros(1), Condition(z))


def _check_latents(folder: Path, teacher: Pipeline) -> ShardReader:
    """Return the index of a latent cache, after checking that the teacher can draw such images."""
    reader = ShardReader(folder, "moments", index_only=True)
    check_meta(reader)
    remedy = "Give latents of the teacher's own data"
    check_same_classes(reader.meta["classes"], str(folder), teacher.classes, "the teacher", remedy)
    return reader


def _cached(teacher: Pipeline, folder: Path, seed: int) -> GroupReader:
    """Read the images of a group from a latent cache: the next rows of a permutation, with random flips."""
    cache = LatentCache(folder, teacher.require_autoencoder())
    size, drawn = sides(cache.meta["size"]), teacher.image_size
    if size != drawn:
        held = f"{folder} holds {size[1]}×{size[0]} images"
        raise InputError(f"{held}. Give {drawn[1]}×{drawn[0]}, as the teacher draws")
    order = torch.randperm(len(cache), generator=seeded_generator(seed))

    def read(group: int, generator: torch.Generator, callback: Callback) -> tuple[Tensor, Tensor]:
        rows = order[torch.arange(group * GROUP, (group + 1) * GROUP) % len(order)]
        return cache.draw(rows, generator), cache.labels[rows].to(teacher.device)

    return read


def _drawn(teacher: Pipeline, seed: int) -> GroupReader:
    """Let the teacher draw the images of a group, every class equally often."""

    def draw(group: int, generator: torch.Generator, callback: Callback) -> tuple[Tensor, Tensor]:
        numbers = range(group * GROUP, (group + 1) * GROUP)
        labels = torch.tensor([number % len(teacher.classes) for number in numbers], device=teacher.device)
        noise = SeededNoise(numbers, teacher.device, seed)
        return sample(teacher.model, labels, noise, teacher.defaults, callback=callback), labels

    return draw


def group_rows(
    model: FAR,
    latents: Tensor,
    labels: Tensor,
    config: TrajectoryConfig,
    sampling: SamplingConfig,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return the rows of one group; see :func:`write_trajectories`."""
    tokens = model.constrain(model.tokens(latents))
    order, known, query = draw_positions(model, len(tokens), config.tokens_per_image, sampling, generator)
    dropped = (torch.rand(len(labels), generator=generator) < config.label_drop).to(labels.device)
    labels = torch.where(dropped, model.null_label, labels)
    z = model.backbone(tokens, order[:, :known], query, labels)
    uncond = model.backbone(tokens, order[:, :known], query, torch.full_like(labels, model.null_label))
    scale = 1 + (config.max_guidance - 1) * torch.rand(query.shape, generator=generator).to(labels.device)
    noise = torch.randn(*query.shape, tokens.shape[-1], generator=generator).to(labels.device)
    condition = Condition(z, uncond, scale.unsqueeze(-1))

    def velocity(x: Tensor, t: float) -> Tensor:
        return model.head.velocity(x, x.new_full(x.shape[:-1], t), condition)

    paths = trajectories(velocity, noise, POINTS, SUBSTEPS).half()
    if not torch.isfinite(paths).all():
        raise InputError("trajectories exceed float16's range. Limit them by trajectories.token_limit=5.0")
    return {
        "tokens": tokens.half(), "z": z.half(), "scale": scale.half(), "paths": paths,
        "labels": labels, "order": order, "query": query, "known": torch.full_like(labels, known),
    }  # fmt: skip


def draw_positions(
    model: FAR, batch: int, count: int, sampling: SamplingConfig, generator: torch.Generator
) -> tuple[Tensor, int, Tensor]:
    """Draw orders ``[batch, n]``, the number of known positions, and query positions ``[batch, count]``.

    As in sampling, the known tokens precede the AR step that draws a random token. If that step may draw
    fewer than ``count`` positions, these repeat, and each repetition later gets noise of its own. If the
    backbone has an exact cache and tokens are drawn one by one, all tokens but the last are known.
    """
    device, tokens = next(model.parameters()).device, model.config.tokens

    def random() -> Tensor:
        return torch.rand(batch, tokens, generator=generator).argsort(dim=1)

    count, ar_steps = min(count, tokens), min(sampling.ar_steps, tokens)
    if model.backbone.exact_cache and ar_steps == tokens:
        # Teacher forcing: one pass gives z of every token from those before it, so all are equally likely.
        positions = random()[:, :count].to(device)
        return generation_orders(model, sampling.order, batch, random).to(device), tokens - 1, positions
    chosen = int(torch.randint(0, tokens, (), generator=generator))
    order = generation_orders(model, sampling.order, batch, random).to(device)
    counts = cosine_token_counts(tokens, ar_steps)
    starts = [0, *itertools.accumulate(counts[:-1])]
    known, drawn = max(step for step in zip(starts, counts) if step[0] <= chosen)
    if sampling.order == "random":  # every unknown position may be the next
        drawn = tokens - known
    return order, known, order[:, known + torch.arange(count, device=device) % drawn]


def trajectories(
    velocity: Callable[[Tensor, float], Tensor], noise: Tensor, points: int, substeps: int
) -> Tensor:
    """Integrate ``velocity``, of tokens and a time, from ``noise […, channels]`` at time 0 to time 1.

    Return the path ``[…, points, channels]`` at equal intervals of ``substeps`` Heun steps each.
    """
    step = 1 / (points - 1)
    path = [noise]
    for point in range(points - 1):
        # The solver's time runs from 0 to 1 within the interval.
        start = point * step
        path.append(heun(lambda x, u: step * velocity(x, start + u * step), path[-1], substeps))
    return torch.stack(path, dim=-2)
