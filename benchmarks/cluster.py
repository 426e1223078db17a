"""Memory and time of training the presets on GPUs; writes the tables of docs/cluster.md.

    python -m benchmarks.cluster              # computed tables: a minute, no weights are created
    python -m benchmarks.cluster --measure    # also measures training steps on this CPU: 15 minutes, 16 GB

Run it in the repository's folder. Steps are those of ImageNet at 256 × 256: 16 × 16 tokens of 16 channels, in
bfloat16.
"""

import argparse
import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.results_report import replace_block
from far.backbone import MaskedConfig
from far.files import atomic_path
from far.heads import DiffusionConfig, ShortcutConfig
from far.model import FAR, PRESETS, ModelConfig, NetworkConfig
from far.tokens import sample_mask_ratio
from far.training.activations import checkpoint_activations

DOCUMENT = Path("docs/cluster.md")
GB = 10**9
EPOCHS, IMAGES = 400, 1_281_167
GPUS = (24, 40, 80)
# The rest is for the CUDA context, the libraries' workspaces and gaps between tensors: a guess, without a
# GPU.
USABLE = 0.9
# Operations per second of dense products in bfloat16, from NVIDIA's data sheets.
PEAKS = {"A100": 312e12, "H100": 989e12}
NODES = {"A100": (1, 2, 4, 8), "H100": (1, 2, 4, 8)}
GPUS_PER_NODE = 8
TINY = ModelConfig(NetworkConfig(MaskedConfig(32, 1, 2, 32, 1, 2, 1), ShortcutConfig(32, 1)), 2, 4, (2, 2))
# MAR's README: MAR-L with a head of 3 blocks of 1024, 400 epochs, 16 H100, cached latents.
MAR = NetworkConfig(PRESETS["mar-l"].backbone, DiffusionConfig(1024, 3))
MAR_SECONDS, MAR_GPUS = 35 * 3600, 16


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Parameter counts: all, the backbone's blocks, its largest block, and the head."""

    all: int
    blocks: int
    block: int
    head: int


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes that the forward pass keeps for the backward pass: fixed, and per image."""

    fixed: int
    image: int


def at_rest(sizes: Sizes, parallel: str = "ddp", processes: int = 1) -> float:
    """Return the bytes that each process holds between steps.

    Weights, gradients and EMA take 4 bytes per parameter each, Adam's two averages 8. With DDP (``ddp``)
    every process holds all of them. FSDP2 (``fsdp``) shards all but the EMA of the head.
    """
    if parallel == "ddp":
        return 20.0 * sizes.all
    return 20 * sizes.all / processes + 4 * sizes.head * (1 - 1 / processes)


def memory(
    sizes: Sizes, kept: Kept, images: int, parallel: str = "ddp", processes: int = 1, micro_batches: int = 1
) -> float:
    """Return the bytes of a process at the peak of a training step: the end of its last forward pass.

    The sum has what the process holds at rest and what the forward pass keeps: activations of every image,
    and a copy of every weight in bfloat16. With several micro-batches, DDP's buckets exist beside the
    gradients, which the last micro-batch copies into them; with one, the two never exist together with the
    activations. FSDP2 adds gathered weights and gradients: of everything outside the backbone's blocks (head,
    embeddings), and of two blocks, the current one and the next.

    Args:
        images: per micro-batch.
        micro_batches: per process and step. With one, gradients are created after this peak, so the sum is a
            bound.
    """
    total = at_rest(sizes, parallel, processes) + kept.fixed + images * kept.image
    if parallel == "fsdp":
        total += 8 * (sizes.all - sizes.blocks + 2 * sizes.block) * (1 - 1 / processes)
    elif processes > 1 and micro_batches > 1:
        total += 4 * sizes.all
    return total


def sizes_of(config: ModelConfig) -> Sizes:
    with torch.device("meta"):
        model = FAR(config)
    lists = [part for part in model.backbone.modules() if isinstance(part, torch.nn.ModuleList)]
    blocks = [_parameters(block) for part in lists for block in part]
    return Sizes(_parameters(model), sum(blocks), max(blocks), _parameters(model.head))


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def kept_by(config: ModelConfig, mask_ratio: float, gpu: bool = True, checkpointed: bool = False) -> Kept:
    """Return what the forward pass keeps, from fake tensors: the growth from two images to four.

    With ``checkpointed`` activations, each image keeps the inputs of all blocks, and all of the block that is
    computed again. Autocast's copies of weights last until the forward pass ends.
    """
    two, four = (_saved(config, images, mask_ratio, gpu, checkpointed) for images in (2, 4))
    outside, *blocks = [(more - less) // 2 for less, more in zip(two, four, strict=True)]
    return Kept(sum(two) - 2 * (outside + sum(blocks)), outside + max(blocks, default=0))


Storages = dict[int, torch.UntypedStorage]  # keeps the storages, so that no id is reused


def _saved(config: ModelConfig, images: int, mask_ratio: float, gpu: bool, checkpointed: bool) -> list[int]:
    """Return the bytes of the tensors that the loss keeps: each storage once, without parameters.

    With ``checkpointed`` activations, the bytes of each block that is computed again follow.
    """
    kept: Storages = {}
    blocks: list[Storages] = []

    def block(forward: Callable[..., Tensor], *inputs: Any, use_reentrant: bool) -> Tensor:
        """Replace torch's checkpoint: account for what it keeps and what it computes again."""
        if not torch.is_grad_enabled():
            return forward(*inputs)
        blocks.append({})
        for value in tree_leaves(inputs):
            if isinstance(value, Tensor):
                _note(kept, value)
        with _noting(blocks[-1]):
            return forward(*inputs)

    with contextlib.ExitStack() as stack:
        model = stack.enter_context(_outline(config, mask_ratio))
        if checkpointed:
            checkpoint_activations(model)
        stack.enter_context(mock.patch("far.training.activations.checkpoint", block))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        if gpu:
            stack.enter_context(_kernels_of_a_gpu())
        stack.enter_context(_noting(kept))
        _loss(model, images)
        parameters = {id(parameter.untyped_storage()) for parameter in model.parameters()}
    own = [{key: block[key] for key in block.keys() - kept.keys()} for block in blocks]
    return [sum(part[key].nbytes() for key in part.keys() - parameters) for part in (kept, *own)]


def _note(storages: Storages, tensor: Tensor) -> Tensor:
    storages[id(tensor.untyped_storage())] = tensor.untyped_storage()
    return tensor


def _noting(storages: Storages) -> contextlib.AbstractContextManager[None]:
    """Note the tensors that the block's operations keep for the backward pass."""
    return torch.autograd.graph.saved_tensors_hooks(functools.partial(_note, storages), lambda tensor: tensor)


def flops(config: ModelConfig, checkpointed: bool = False) -> float:
    """Return the FLOP of a training step's matrix products (both passes), per image at the mean mask."""
    with (
        _outline(config, mean_mask_ratio(config)) as model,
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        if checkpointed:
            checkpoint_activations(model)
        _loss(model, 8).backward()
    return counter.get_total_flops() / 8


@contextlib.contextmanager
def _outline(config: ModelConfig, mask_ratio: float) -> Iterator[FAR]:
    """Yield a model of fake tensors that masks every batch alike."""
    with mock.patch("far.backbone.masked.sample_mask_ratio", return_value=mask_ratio):
        # Heads keep tables that later models use, so real tensors must fill them first.
        head = dataclasses.replace(config.network.head, width=32, depth=1)
        _loss(FAR(dataclasses.replace(TINY, network=dataclasses.replace(TINY.network, head=head))), 1)
        with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
            yield FAR(config)


def _loss(model: FAR, images: int) -> Tensor:
    config = model.config
    latents, labels = (
        torch.randn(images, config.latent_channels, *config.grid),
        torch.zeros(images, dtype=torch.long),
    )
    # The step only has to be past any flow matching before the head's own objective.
    loss = model.loss(latents, labels, torch.Generator(), label_drop=0.1, step=10**9)
    return loss.value.mean()


@contextlib.contextmanager
def _kernels_of_a_gpu() -> Iterator[None]:
    """Keep what a GPU keeps: no attention scores, dropout masks of bytes, norms in float32."""
    attention, layer_norm = F.scaled_dot_product_attention, F.layer_norm
    with contextlib.ExitStack() as stack:
        for name, function in {
            "scaled_dot_product_attention": lambda *args, dropout_p=0.0, **options: attention(
                *args, **options
            ),
            "dropout": lambda x, p, training, inplace: torch.native_dropout(x, p, training)[0],
            "layer_norm": lambda x, *args, **options: layer_norm(x.float(), *args, **options),
        }.items():
            stack.enter_context(mock.patch.object(F, name, function))
        yield


def mean_mask_ratio(config: ModelConfig) -> float:
    """Return the mean masked fraction over 2,000 steps; 1 for backbones that predict every token."""
    backbone, generator = config.network.backbone, torch.Generator().manual_seed(0)
    if not isinstance(backbone, MaskedConfig):
        return 1.0
    return statistics.mean(
        sample_mask_ratio(generator, backbone.mask_ratio_min, backbone.mask_ratio_std) for _ in range(2000)
    )


def largest_kept(config: ModelConfig, gpu: bool = True, checkpointed: bool = False) -> Kept:
    """Return what the largest step keeps: few masks enlarge the encoder's part, many the head's."""
    backbone = config.network.backbone
    ratios = (backbone.mask_ratio_min, 1.0) if isinstance(backbone, MaskedConfig) else (1.0,)
    return max((kept_by(config, ratio, gpu, checkpointed) for ratio in ratios), key=lambda kept: kept.image)


# --- Tables ------------------------------------------------------------------------------------------


def table(heading: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [heading, ["---"] * len(heading), *rows])


def computed_tables() -> dict[str, str]:
    """Return the computed tables by name."""
    of_sizes, of_images, of_hours = [], [], []
    utilization = mar_utilization()
    for name, network in PRESETS.items():
        config = ModelConfig(network)
        sizes, kept, work = sizes_of(config), largest_kept(config), flops(config)
        ways = [("ddp", 8, 2), ("fsdp", 8, 1), ("fsdp", 64, 1)]
        fixed = [f"{memory(sizes, kept, 0, *way) / GB:.1f}" for way in ways]
        of_sizes.append(
            [f"`{name}`", f"{sizes.all:,}", *fixed, f"{kept.image / GB:.3f}", f"{work / 1e9:.0f}"]
        )
        of_images.append(
            [f"`{name}`", *(str(fits(sizes, kept, gpu, *way)) for way in ways[:2] for gpu in GPUS)]
        )
        all_work = work * EPOCHS * IMAGES
        seconds = [
            all_work / (GPUS_PER_NODE * nodes * PEAKS[gpu] * utilization)
            for gpu in NODES
            for nodes in NODES[gpu]
        ]
        of_hours.append([f"`{name}`", f"{all_work / 1e18:.0f}", *(f"{one / 3600:.0f}" for one in seconds)])
        print(name, flush=True)
    return {
        "networks": networks_table(),
        "sizes": table(
            [
                "preset",
                "parameters",
                "GB, DDP",
                "GB, FSDP2, 8 processes",
                "GB, FSDP2, 64 processes",
                "more GB per image",
                "GFLOP per image",
            ],
            of_sizes,
        ),
        "images": table(
            ["preset", *(f"{way}, {gpu} GB" for way in ("DDP", "FSDP2") for gpu in GPUS)], of_images
        ),
        "hours": table(
            ["preset", "EFLOP", *(f"{nodes} × 8 {gpu}" for gpu in NODES for nodes in NODES[gpu])], of_hours
        ),
        "utilization": calibration(utilization),
        "mar-memory": mar_memory(),
        "checkpointed": checkpointed_table(),
    }


def checkpointed_table() -> str:
    """Return memory and arithmetic with checkpointed activations, and the images that then fit."""
    rows = []
    for name, network in PRESETS.items():
        config = ModelConfig(network)
        sizes, kept = sizes_of(config), largest_kept(config, checkpointed=True)
        images = [fits(sizes, kept, gpu, *way) for way in (("ddp", 8, 2), ("fsdp", 8, 1)) for gpu in GPUS]
        work = flops(config, checkpointed=True)
        rows.append([f"`{name}`", f"{kept.image / GB:.3f}", f"{work / 1e9:.0f}", *map(str, images)])
        print(name, "checkpointed", flush=True)
    columns = [f"{way}, {gpu} GB" for way in ("DDP", "FSDP2") for gpu in GPUS]
    return table(["preset", "more GB per image", "GFLOP per image", *columns], rows)


def networks_table() -> str:
    """Return the overrides that replace the recipe's ``network`` for each preset."""
    rows = []
    for name, network in PRESETS.items():
        backbone, head = network.backbone, network.head
        values = ", ".join(
            f"{key}: {value}"
            for key, value in dataclasses.asdict(backbone).items()
            if key.endswith(("width", "depth", "heads")) or (key == "kind" and value != "masked")
        )
        rows.append(
            [
                f"`{name}`",
                f"`{{{values}}}`",
                f"`{{kind: {head.kind}, width: {head.width}, depth: {head.depth}}}`",
            ]
        )
    return table(["preset", "`generator.network.backbone`", "`generator.network.head`"], rows)


def fits(sizes: Sizes, kept: Kept, gpu: int, *way: Any) -> int:
    """Return the largest number of images per micro-batch."""
    return max(0, int((USABLE * gpu * GB - memory(sizes, kept, 0, *way)) // kept.image))


def mar_utilization() -> float:
    """Return the fraction of an H100's peak in MAR's published training, assuming our arithmetic."""
    return flops(ModelConfig(MAR)) * EPOCHS * IMAGES / (MAR_SECONDS * MAR_GPUS * PEAKS["H100"])


def calibration(utilization: float) -> str:
    work = flops(ModelConfig(MAR))
    return (
        f"{work / 1e9:.0f} GFLOP per image × {EPOCHS} × {IMAGES:,} images in {MAR_SECONDS // 3600} hours"
        f" on {MAR_GPUS} GPUs are {utilization * PEAKS['H100'] / 1e12:.0f} TFLOP/s per GPU,"
        f" **{utilization:.1%}** of an H100's {PEAKS['H100'] / 1e12:.0f}.\n"
    )


def mar_memory() -> str:
    """Return the computed memory of the micro-batch that MAR's README names for 80 GB."""
    config = ModelConfig(MAR)
    total = memory(sizes_of(config), largest_kept(config), 128)
    return f"{total / GB:.0f} GB with 128 images, the micro-batch that MAR's README uses on GPUs of 80 GB.\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="also run training steps")
    arguments = parser.parse_args()
    tables = computed_tables()
    if arguments.measure:
        from benchmarks.cluster_measured import measured_tables

        tables |= measured_tables()
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, block in tables.items():
        text = replace_block(text, name, block)
    with atomic_path(DOCUMENT) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
