"""What a head is distilled from: conditions of a teacher's backbone, and its head's deterministic trajectories over them.

The backbone runs once an image (twice for guidance), whatever the number of head steps, and the result stays on disk.
How a student learns from it is in ``far.training.distillation``.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from far.autoencoder import Autoencoder, Posterior
from far.classes import check_same_classes
from far.config import to_dict
from far.data.image_sets import check_meta
from far.data.latents import open_latents
from far.data.shards import Pieces, ShardReader, ShardWriter
from far.errors import InputError
from far.files import sha256
from far.heads.flow import heun
from far.model import FAR
from far.pipeline import Pipeline
from far.processes import Processes
from far.progress import ImageBar
from far.sampling import Progress, SeededNoise, sample
from far.seeds import seeded_generator
from far.tokens import cosine_token_counts, raster_orders
from far.training.config import GROUP, TrajectoryConfig

# A trajectory is kept at 0, 1/8 … 1, and integrated by this many Heun steps from one point to the next.
POINTS = 9
SUBSTEPS = 2
# What an interruption can lose: few groups, and one where the teacher draws it, which takes far longer.
_SHARD_GROUPS = 16


def load_teacher(folder: Path, config: TrajectoryConfig, device: str | torch.device) -> Pipeline:
    """The model to be distilled, its head's predicted tokens limited."""
    teacher = Pipeline.from_pretrained(folder, device=device)
    if teacher.model.head.config.token_limit is None:
        teacher.model.head.config = dataclasses.replace(
            teacher.model.head.config, token_limit=config.token_limit
        )
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
    """Fill ``folder``, each of several ``processes`` a part; continues where it stopped.

    Rows are images: ``tokens [n, channels]``, ``labels``, ``order [n]`` of positions, of which the first ``known`` are known,
    ``query [m]`` positions, their ``z [m, width]``, guidance ``scale [m]``, and ``paths [m, 9, channels]``.

    Args:
        weights: the teacher's folder, whose fingerprint is kept with the rows.
        latents: a latent cache; without it, the teacher draws the images itself, as its default sampling values say.

    Raises:
        InputError: the teacher's head has no velocity, the latents are not the teacher's, or the folder holds other trajectories.
    """
    source = "drawn by the teacher" if latents is None else _of_its_classes(latents, teacher).digest
    meta = {
        "kind": "trajectories", "teacher": sha256(weights / "model.safetensors"), "classes": teacher.classes,
        "sampling": to_dict(teacher.defaults), "latents": source, **dataclasses.asdict(config),
    }  # fmt: skip
    writer = ShardWriter(folder, meta, processes)
    if writer.complete:
        return
    images = _open(teacher, latents, config.seed)
    groups = -(-config.images // GROUP)
    bar = ImageBar(
        groups,
        "teacher's trajectories",
        group=GROUP,
        initial=writer.cursor,
        smoothing=0,
        disable=processes.rank > 0,
    )

    def pieces(numbers: range) -> Pieces:
        start = round(bar.n)
        for done, group in enumerate(numbers, start=1):
            generator = seeded_generator(group, config.seed)
            drawn = images(group, generator, bar.ar_step)
            rows = group_rows(teacher.model, *drawn, config, teacher.defaults.ar_steps, generator)
            yield 1, {name: tensor.cpu() for name, tensor in rows.items()}
            bar.move_to(start + done)

    with bar:
        writer.fill(groups, 1 if latents is None else _SHARD_GROUPS, pieces, bar)


# A group's number and its generator → latents and labels. The last argument is called after each AR step, if there are any.
Images = Callable[[int, torch.Generator, Callable[[Progress], None]], tuple[Tensor, Tensor]]


def _open(teacher: Pipeline, latents: Path | None, seed: int) -> Images:
    """The source of images, once it is sure that the head has a velocity (if not, asking for one is an error)."""
    model = teacher.model
    like = next(model.parameters())
    model.head.velocity(
        like.new_zeros(1, model.config.token_channels),
        like.new_zeros(1),
        like.new_zeros(1, model.backbone.width),
    )
    return _drawn(teacher, seed) if latents is None else _cached(teacher, latents, seed)


def _of_its_classes(folder: Path, teacher: Pipeline) -> ShardReader:
    """Open the index of a latent cache whose classes are the teacher's, also if its trajectories are there already."""
    reader = ShardReader(folder, "moments", index_only=True)
    check_meta(reader)
    check_same_classes(
        reader.meta["classes"],
        str(folder),
        teacher.classes,
        "the teacher",
        "give latents of the teacher's own data",
    )
    return reader


def _cached(teacher: Pipeline, folder: Path, seed: int) -> Images:
    """Latents ``[64, c, h, w]`` and labels of a group, drawn from a latent cache: another part of a permutation each, and flips."""
    autoencoder = _autoencoder(teacher)
    reader = open_latents(folder, autoencoder)
    size, expected = (
        reader.meta["size"],
        [side * autoencoder.config.stride for side in teacher.model.config.grid],
    )
    if [size, size] != expected:
        raise InputError(
            f"{folder} is of images of {size}×{size} pixels, the teacher's are {expected[0]}×{expected[1]}; give latents of such"
        )
    order, labels = torch.randperm(len(reader), generator=seeded_generator(seed)), reader.all("labels")

    def read(
        group: int, generator: torch.Generator, step: Callable[[Progress], None]
    ) -> tuple[Tensor, Tensor]:
        rows = order[torch.arange(group * GROUP, (group + 1) * GROUP) % len(order)]
        flips = torch.randint(0, 2, (GROUP,), generator=generator)
        posterior = Posterior(reader.rows("moments", rows)[torch.arange(GROUP), flips].float())
        noise = torch.randn(posterior.mean.shape, generator=generator)
        return autoencoder.normalize(posterior.sample(noise).to(teacher.device)), labels[rows].to(
            teacher.device
        )

    return read


def _autoencoder(teacher: Pipeline) -> Autoencoder:
    if teacher.autoencoder is None:
        raise InputError(
            "the teacher has no autoencoder to read latents with; add one with: far convert kl16 KL16.ckpt THE_SAME_FOLDER"
        )
    return teacher.autoencoder


def _drawn(teacher: Pipeline, seed: int) -> Images:
    """Latents ``[64, c, h, w]`` and labels of a group that the teacher draws, every class equally often."""

    def draw(
        group: int, generator: torch.Generator, step: Callable[[Progress], None]
    ) -> tuple[Tensor, Tensor]:
        numbers = range(group * GROUP, (group + 1) * GROUP)
        labels = torch.tensor([number % len(teacher.classes) for number in numbers], device=teacher.device)
        noise = SeededNoise(numbers, teacher.device, seed)
        return sample(teacher.model, labels, noise, teacher.defaults, callback=step), labels

    return draw


def group_rows(
    model: FAR,
    latents: Tensor,
    labels: Tensor,
    config: TrajectoryConfig,
    ar_steps: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The rows of one group; see :func:`write_trajectories`."""
    tokens = model.constrain(model.tokens(latents))
    order, known, query = draw_positions(model, len(tokens), config.tokens_per_image, ar_steps, generator)
    dropped = (torch.rand(len(labels), generator=generator) < config.label_drop).to(labels.device)
    labels = torch.where(dropped, model.null_label, labels)
    z = model.backbone(tokens, order[:, :known], query, labels)
    z_uncond = model.backbone(tokens, order[:, :known], query, torch.full_like(labels, model.null_label))
    scale = 1 + (config.max_guidance - 1) * torch.rand(query.shape, generator=generator).to(labels.device)
    noise = torch.randn(*query.shape, tokens.shape[-1], generator=generator).to(labels.device)
    paths = trajectories(
        lambda x, t: model.head.velocity(x, x.new_full(x.shape[:-1], t), z, z_uncond, scale.unsqueeze(-1)),
        noise,
        POINTS,
        SUBSTEPS,
    )
    half = {
        name: tensor.to(torch.float16)
        for name, tensor in (("tokens", tokens), ("z", z), ("scale", scale), ("paths", paths))
    }
    if not torch.isfinite(half["paths"]).all():
        raise InputError(
            "the teacher's trajectories leave the range of numbers; bound them, such as by trajectories.token_limit=5.0"
        )
    return {
        **half,
        "labels": labels, "order": order, "query": query, "known": torch.full_like(labels, known),
    }  # fmt: skip


def draw_positions(
    model: FAR, batch: int, count: int, ar_steps: int, generator: torch.Generator
) -> tuple[Tensor, int, Tensor]:
    """Draw orders ``[batch, n]``, how many of their first positions are known, and query positions ``[batch, count]``.

    As in sampling, the known tokens precede the AR step that draws a random token. In causal models, all tokens
    but the last are known.
    """
    device, tokens = next(model.parameters()).device, model.config.tokens
    count = min(count, tokens)
    if not model.backbone.any_order:
        # Teacher forcing: one pass gives z of every token from those before it, so all are equally likely.
        positions = torch.rand(batch, tokens, generator=generator).argsort(dim=1)[:, :count]
        return raster_orders(tokens, batch).to(device), tokens - 1, positions.to(device)
    chosen = int(torch.randint(0, tokens, (), generator=generator))
    order = torch.rand(batch, tokens, generator=generator).argsort(dim=1).to(device)
    starts = itertools.accumulate(cosine_token_counts(tokens, min(ar_steps, tokens)), initial=0)
    known = min(max(start for start in starts if start <= chosen), tokens - count)
    return order, known, order[:, known : known + count]


def trajectories(
    velocity: Callable[[Tensor, float], Tensor], noise: Tensor, points: int, substeps: int
) -> Tensor:
    """Where the flow of ``velocity`` takes ``noise […, channels]`` at ``points`` equal times from 0 to 1: ``[…, points, channels]``."""
    step = 1 / (points - 1)
    path = [noise]
    for point in range(points - 1):
        # The solver's own time runs from 0 to 1 within the step.
        start = point * step
        path.append(heun(lambda x, u: step * velocity(x, start + u * step), path[-1], substeps))
    return torch.stack(path, dim=-2)
