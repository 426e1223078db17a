"""Functions of a model that become one ONNX file each, with examples and named axes of their inputs.

The loop around them (orders, guidance, the steps of the head) stays outside, so that one file serves any
number of images, AR steps and head steps.
"""

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from far.backbone import Backbone, BlockCausalBackbone, CausalBackbone, MaskedBackbone
from far.diffusers_config import DiffusersConfig
from far.errors import InputError
from far.heads import Head
from far.heads.diffusion import DiffusionHead
from far.heads.energy import EnergyHead
from far.heads.flow import FlowHead
from far.heads.flow_map import FlowMapHead
from far.heads.network import HeadNetwork
from far.heads.shortcut import ShortcutHead
from far.model import FAR
from far.tokenizer import Tokenizer

BACKBONE, DECODER, ENCODER = "backbone.onnx", "decoder.onnx", "encoder.onnx"
HEAD, HEAD_CONDITION = "head.onnx", "head_condition.onnx"
HEAD_GUIDANCE, HEAD_TIME = "head_guidance.onnx", "head_time.onnx"

# Heads whose sampler calls nothing but the functions below.
_HEADS = (ShortcutHead, FlowHead, DiffusionHead, FlowMapHead, EnergyHead)
# Sizes of the examples by axis. Each is above 1 and differs from the others, so that no axis is taken for a
# constant or for another axis.
_EXAMPLE = {"batch": 2, "known": 3, "new": 5, "queries": 4, "cached": 6, "rows": 7, "times": 3}

Axes = tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class Graph:
    """A function of tensors.

    Attributes:
        module: computes it.
        inputs: axes of each input by name: a size, or the name of an axis of any size.
        outputs: the same for outputs.
        integers: upper bounds of the inputs that hold integers.
        simplify: let the exporter simplify it. It drops summands of 1e-8 and less, also from denominators.
    """

    module: nn.Module
    inputs: dict[str, Axes]
    outputs: dict[str, Axes]
    integers: dict[str, int] = dataclasses.field(default_factory=dict)
    simplify: bool = True

    def examples(self) -> dict[str, Tensor]:
        """Return an example of every input."""
        generator = torch.Generator().manual_seed(0)
        examples = {}
        for name, axes in self.inputs.items():
            shape = [axis if isinstance(axis, int) else _EXAMPLE[axis] for axis in axes]
            if name in self.integers:
                examples[name] = torch.randint(self.integers[name], shape, generator=generator)
            else:
                examples[name] = torch.randn(shape, generator=generator)
        return examples

    def dynamic_shapes(self) -> dict[str, Any]:
        """Return the axes of any size, as ``torch.onnx.export`` takes them."""
        return {
            name: {place: axis for place, axis in enumerate(axes) if isinstance(axis, str)}
            for name, axes in self.inputs.items()
        }


def graphs_of(model: FAR, autoencoder: Tokenizer | None) -> dict[str, Graph]:
    """Return the graphs of a model by file name.

    Raises:
        InputError: the kind of the backbone or of the head cannot be exported.
    """
    graphs = {BACKBONE: _backbone(model.backbone, model.config.token_channels)}
    graphs |= _head(model.head)
    if autoencoder is not None:
        channels, stride = model.config.latent_channels, autoencoder.config.stride
        latents: Axes = ("batch", channels, *model.config.grid)
        images: Axes = ("batch", 3, *(side * stride for side in model.config.grid))
        # DC-AE divides by sums that may be 0 and adds 1e-15 to them.
        simplify = not isinstance(autoencoder.config, DiffusersConfig)
        made = functools.partial(Graph, simplify=simplify)
        graphs[DECODER] = made(_Decoder(autoencoder), {"latents": latents}, {"images": images})
        graphs[ENCODER] = made(_Encoder(autoencoder), {"images": images}, {"latents": latents})
    return graphs


def _backbone(backbone: Backbone, channels: int) -> Graph:
    width, classes = backbone.width, 2  # labels of the example
    if isinstance(backbone, MaskedBackbone):
        inputs: dict[str, Axes] = {
            "tokens": ("batch", backbone.tokens, channels),
            "known": ("batch", "known"),
            "query": ("batch", "queries"),
            "labels": ("batch",),
        }
        integers = {"known": backbone.tokens, "query": backbone.tokens, "labels": classes}
        return Graph(_Masked(backbone), inputs, {"z": ("batch", "queries", width)}, integers)
    if not isinstance(backbone, CausalBackbone | BlockCausalBackbone):
        raise InputError(f"a backbone of kind {backbone.config.kind!r} cannot be exported. Use another model")
    cache = backbone.new_cache(1).keys
    depth, _, heads, _, head_width = cache.shape
    inputs = {
        "tokens": ("batch", "new", channels),
        "places": ("batch", "new"),
        "labels": ("batch",),
        "keys": (depth, "batch", heads, "cached", head_width),
        "values": (depth, "batch", heads, "cached", head_width),
    }
    caches: dict[str, Axes] = dict.fromkeys(("new_keys", "new_values"), inputs["keys"])
    integers = {"places": backbone.config.buffer + backbone.tokens - 1, "labels": classes}
    if isinstance(backbone, CausalBackbone):
        return Graph(_Causal(backbone), inputs, {"z": ("batch", 1, width), **caches}, integers)
    inputs["query"] = ("batch", "queries")
    integers["query"] = backbone.tokens
    outputs: dict[str, Axes] = {"z": ("batch", "queries", width), **caches}
    return Graph(_BlockCausal(backbone), inputs, outputs, integers)


def _head(head: Head) -> dict[str, Graph]:
    if type(head) not in _HEADS:
        raise InputError(f"a head of kind {head.config.kind!r} cannot be exported. Use another model")
    network: HeadNetwork = head.network  # type: ignore[assignment]
    width, outputs = head.config.width, network.output.linear.out_features
    x, modulation = network.input_projection.in_features, network.condition_embedding.in_features
    step: dict[str, Axes] = {"x": ("rows", x), "condition": ("rows", width)}
    graphs = {HEAD_CONDITION: Graph(
        network.condition_embedding, {"input": ("rows", modulation)}, {"condition": ("rows", width)}
    )}  # fmt: skip
    times = len(network.time_embeddings)
    if times:
        step["time"] = (width,)
        inputs: dict[str, Axes] = {"times": ("times", times)}
        graphs[HEAD_TIME] = Graph(_Times(network), inputs, {"time": ("times", width)})
    if isinstance(head, FlowMapHead) and head.guidance_embedding is not None:
        guidance = _Guidance(head.guidance_embedding)
        graphs[HEAD_GUIDANCE] = Graph(guidance, {"guidance": ("times",)}, {"condition": ("times", width)})
    graphs[HEAD] = Graph(_Step(network), step, {"output": ("rows", outputs)})
    return graphs


class _Masked(nn.Module):
    """Conditions of a masked backbone, without a cache."""

    def __init__(self, backbone: MaskedBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, tokens: Tensor, known: Tensor, query: Tensor, labels: Tensor) -> Tensor:
        return self.backbone(tokens, known, query, labels)  # type: ignore[no-any-return]


class _GraphCache:
    """Cache of one block whose memory is an input of the graph, as :class:`far.layers.BlockCache`."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, None]:
        self.keys = torch.cat([self.keys, keys], dim=2)
        self.values = torch.cat([self.values, values], dim=2)
        return self.keys, self.values, None


def _caches(keys: Tensor, values: Tensor) -> list[_GraphCache]:
    return [_GraphCache(*pair) for pair in zip(keys, values)]


def _joined(caches: list[_GraphCache]) -> tuple[Tensor, Tensor]:
    return torch.stack([cache.keys for cache in caches]), torch.stack([cache.values for cache in caches])


def _mask(places: Tensor, keys: Tensor) -> Tensor:
    """Return which positions, held ones first, each of ``places [b, m]`` sees."""
    count, held = places.shape[1], keys.shape[3]
    return torch.ones(count, held + count, dtype=torch.bool, device=keys.device).tril(held)


def _inputs(
    backbone: CausalBackbone | BlockCausalBackbone, x: Tensor, places: Tensor, labels: Tensor
) -> Tensor:
    """Return embedded tokens ``x``, replaced by copies of the class at places within the buffer."""
    buffer = backbone.config.buffer
    copies = F.embedding(places.clamp(max=buffer - 1), backbone.class_positions[0])
    copies = copies + backbone.class_embedding(labels).unsqueeze(1)
    return torch.where((places < buffer).unsqueeze(-1), copies, x)


def _rotary(backbone: CausalBackbone | BlockCausalBackbone, places: Tensor) -> Tensor:
    """Return rotary tables ``[2, b, 1, m, head_width]`` of ``places [b, m]``."""
    return torch.stack([F.embedding(places, table) for table in backbone.rotary]).unsqueeze(2)


class _Causal(nn.Module):
    """Condition of the token after the last place, from new places and a cache of those before."""

    def __init__(self, backbone: CausalBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self, tokens: Tensor, places: Tensor, labels: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``z [b, 1, width]``, keys and values. Places are class copies, then tokens."""
        backbone, caches = self.backbone, _caches(keys, values)
        x = _inputs(backbone, backbone.token_projection(tokens), places, labels)
        rotary = _rotary(backbone, places)
        mask = _mask(places, keys)
        for block, cache in zip(backbone.blocks, caches, strict=True):
            x = block(x, rotary, mask, cache)
        return backbone.norm(x[:, -1:]), *_joined(caches)


class _BlockCausal(nn.Module):
    """Conditions at query positions, from new places and a cache of those before."""

    def __init__(self, backbone: BlockCausalBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self, tokens: Tensor, places: Tensor, labels: Tensor, keys: Tensor, values: Tensor, query: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``z [b, queries, width]``, keys and values. Places are class copies, then tokens."""
        backbone, caches = self.backbone, _caches(keys, values)
        buffer = backbone.config.buffer
        x = backbone.token_projection(tokens)
        x = x + F.embedding((places - buffer).clamp(min=0), backbone.token_positions.weight)
        x = _inputs(backbone, x, places, labels)
        rotary = _rotary(backbone, places)
        mask, left = _mask(places, keys), iter(caches)
        for block in backbone.encoder_blocks:
            x = block(x, rotary, mask, next(left))
        memory = backbone.encoder_norm(x)
        x = F.embedding(query, backbone.query_embedding.weight)
        tables = _rotary(backbone, query + buffer), rotary
        for block in backbone.decoder_blocks:
            x = block(x, memory, tables, None, next(left))
        return backbone.decoder_norm(x), *_joined(caches)


class _Times(nn.Module):
    """Summed embeddings of the times of head steps."""

    def __init__(self, network: HeadNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, times: Tensor) -> Tensor:
        return self.network.embed_times(*times.unbind(dim=-1))


class _Guidance(nn.Module):
    """Embedding of a guidance scale, in the unit of the head, to add to that of a condition."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, guidance: Tensor) -> Tensor:
        return self.embedding(guidance, torch.float32)  # type: ignore[no-any-return]


class _Step(nn.Module):
    """One evaluation of the head's network."""

    def __init__(self, network: HeadNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, condition: Tensor, time: Tensor | None = None) -> Tensor:
        zero = condition.new_zeros(()) if time is None else time
        return self.network.conditioned(x, condition, zero)


class _Decoder(nn.Module):
    """Unit-variance latents → images, about 0 … 1."""

    def __init__(self, autoencoder: Tokenizer) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(self.autoencoder.denormalize(latents)) / 2 + 0.5


class _Encoder(nn.Module):
    """Images, 0 … 1 → unit-variance latents, the means of the posteriors."""

    def __init__(self, autoencoder: Tokenizer) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor) -> Tensor:
        return self.autoencoder.normalize(self.autoencoder.encode(images * 2 - 1).mean)
