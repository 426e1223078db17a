"""Watch a generation: how much a clock or a counter grows in each network, and which AR steps run."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Container, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from far.backbone import BlockCausalBackbone, MaskedBackbone
from far.benchmark.rows import SEED, Row
from far.heads import Condition, Draw, Normal
from far.model import FAR
from far.pipeline import Pipeline
from far.sampling import SamplingConfig, SeededNoise, sample

# All parts of a generation. "sampler" is the rest without the networks.
PARTS = ("encoder", "decoder", "head", "autoencoder", "sampler")
_SEGMENTS = 4


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive AR steps that run: first the ``untimed`` ones, then the ``timed`` ones.

    The mean of the timed steps represents ``stands_for`` steps.
    """

    untimed: range
    timed: range
    stands_for: int


def segments(sampling: SamplingConfig, *, full: bool = False) -> list[Segment]:
    """Return the AR steps of a generation to run: all of them if ``full`` or few, else four segments.

    Timed steps lie in the middle of their quarter, since work grows with the known tokens. A segment has
    whole periods of reuse. Without reuse, an untimed step lets a cache catch up with the skipped steps.
    """
    ar_steps, period = sampling.ar_steps, math.lcm(sampling.refresh_every, sampling.guidance_every)
    untimed = 1 if period == 1 else 0
    timed = -(-max(2, ar_steps // 32) // period) * period
    if full or ar_steps < _SEGMENTS * (timed + untimed):
        return [Segment(range(0), range(ar_steps), ar_steps)]
    borders = [index * ar_steps // _SEGMENTS for index in range(_SEGMENTS + 1)]
    plan = []
    for start, end in itertools.pairwise(borders):
        first = max(start + untimed, (start + end - timed) // 2) // period * period
        plan.append(Segment(range(first - untimed, first), range(first, first + timed), end - start))
    return plan


class _StandIn:
    """A module with some of its attributes replaced; the module itself does not change."""

    def __init__(self, module: nn.Module, **replaced: Any) -> None:
        self.__dict__.update(replaced, module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __call__(self, *values: Any) -> Any:
        return self.forward(*values)


class Watch:
    """Growth of a reading, such as a clock or a counter of operations, by AR step and network.

    Attributes:
        model: replaces the watched model in one generation. AR steps outside of ``run`` are skipped: the
            backbone returns zeros and the head noise.
    """

    def __init__(self, model: FAR, run: Container[int], reading: Callable[[], float]) -> None:
        self.run, self.reading = run, reading
        self.step = 0
        self.starts: list[float] = []
        self.inside: list[dict[str, float]] = []
        self.dtype = next(filter(Tensor.is_floating_point, model.backbone.parameters())).dtype
        backbone = _StandIn(model.backbone, forward=self._backbone)
        head = _StandIn(model.head, sampler=self._sampler)
        self.model = cast(FAR, _StandIn(model, backbone=backbone, head=head))
        self.begin = reading()

    def _backbone(self, tokens: Tensor, known: Tensor, query: Tensor, *rest: Any) -> Tensor:
        """Return ``z`` at ``query``. The first call of an AR step begins the step."""
        if self.step == len(self.starts):
            self.starts.append(self.reading())
            self.inside.append({"encoder": 0.0, "backbone": 0.0, "head": 0.0})
        backbone: Any = self.model.backbone
        if self.step not in self.run:
            return torch.zeros(*query.shape, backbone.width, dtype=self.dtype, device=query.device)
        start = self.reading()
        module = backbone.module
        hook: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if isinstance(module, MaskedBackbone | BlockCausalBackbone):  # the encoder ends with its norm
            hook = module.encoder_norm.register_forward_hook(lambda *_: self._add("encoder", start))
        with hook:
            z: Tensor = module(tokens, known, query, *rest)
        self._add("backbone", start)
        return z

    def _add(self, network: str, start: float) -> None:
        self.inside[-1][network] += self.reading() - start

    def _sampler(self, steps: int, like: Tensor) -> Draw:
        head: Any = self.model.head
        draw: Draw = head.module.sampler(steps, like)

        def watched_draw(condition: Condition, normal: Normal, temperature: float) -> Tensor:
            if self.step in self.run:
                start = self.reading()
                drawn = draw(condition, normal, temperature)
                self._add("head", start)
            else:
                drawn = normal()
            self.step += 1
            return drawn

        return watched_draw

    def parts(self, plan: Sequence[Segment]) -> dict[str, float]:
        """Return the growth in a generation that just ended, estimated from the timed steps of ``plan``."""
        starts = [*self.starts, self.reading()]
        totals = dict.fromkeys(PARTS, 0.0)
        totals["sampler"] = starts[0] - self.begin
        for segment in plan:
            weight = segment.stands_for / len(segment.timed)
            for step in segment.timed:
                encoder, backbone, head = self.inside[step].values()
                totals["encoder"] += weight * encoder
                totals["decoder"] += weight * (backbone - encoder)  # a causal backbone only decodes
                totals["head"] += weight * head
                totals["sampler"] += weight * (starts[step + 1] - starts[step] - backbone - head)
        return totals


def generate(
    pipeline: Pipeline, row: Row, plan: Sequence[Segment], reading: Callable[[], float]
) -> dict[str, float]:
    """Draw and decode a row's batch, and return how much ``reading`` grows in each of :data:`PARTS`.

    Only the AR steps of ``plan`` run, and the growth is estimated from them.
    """
    labels = torch.arange(row.batch, device=pipeline.device) % pipeline.model.config.classes
    noise = SeededNoise(range(SEED, SEED + row.batch), pipeline.device)
    run = {step for segment in plan for step in (*segment.untimed, *segment.timed)}
    watch = Watch(pipeline.model, run, reading)
    latents = sample(watch.model, labels, noise, row.sampling)
    parts = watch.parts(plan)
    if pipeline.autoencoder is not None:
        start = reading()
        pipeline.decode(latents)
        parts["autoencoder"] = reading() - start
    return parts
