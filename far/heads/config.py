"""Configurations of the heads, one dataclass per kind, without torch, so that recipes load quickly."""

import dataclasses
import math
from typing import ClassVar, Literal

from far.config import check_count
from far.errors import InputError


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Base class of all head configurations. A subclass sets ``kind`` and adds the keys of its head.

    Attributes:
        width: channels of its blocks.
        depth: number of its blocks.
        samples_per_token: noise samples that share each condition in training (MAR's
            ``diffusion_batch_mul``).
        kind: selects this head.
    """

    width: int = 1024
    depth: int = 6
    samples_per_token: int = 4
    kind: str = ""

    # Configuration classes by kind, the default first. ``far.heads.register`` adds to them.
    kinds: ClassVar[dict[str, type["HeadConfig"]]] = {}
    # Losses that compare the samples of a token need two.
    _fewest_samples: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name, most in (("width", 2**16), ("depth", 2**10), ("samples_per_token", 2**16)):
            check_count(f"head {name}", getattr(self, name), most)
        if (samples := self.samples_per_token) < (least := self._fewest_samples):
            raise InputError(f"head samples_per_token {samples} is too small. Give at least {least}")


@dataclasses.dataclass(frozen=True)
class ShortcutConfig(HeadConfig):
    """Shortcut head (FAR, arXiv 2504.18391): the mean velocity over steps of size 1, 1/2, … 1/128.

    Attributes:
        kind: selects this head; it is the default.
    """

    kind: Literal["shortcut"] = "shortcut"


@dataclasses.dataclass(frozen=True)
class FlowConfig(HeadConfig):
    """Flow-matching head: a velocity field, integrated from noise to token.

    Attributes:
        solver: ``euler``, or ``heun`` with two evaluations per step.
    """

    kind: Literal["flow"] = "flow"
    solver: Literal["euler", "heun"] = "euler"


@dataclasses.dataclass(frozen=True)
class DiffusionConfig(HeadConfig):
    """Diffusion head (MAR, arXiv 2406.11838): a DDPM of one token.

    Attributes:
        token_limit: in sampling, clip the token that each step predicts to this many standard deviations of
            the latents. MAR has no limit, which requires long training, above all with a causal backbone,
            which feeds every token back.
    """

    kind: Literal["diffusion"] = "diffusion"
    token_limit: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.token_limit is not None and not self.token_limit > 0:
            raise InputError(f"head token_limit {self.token_limit} is not positive. Give more, or null")


@dataclasses.dataclass(frozen=True)
class FlowMapConfig(HeadConfig):
    """Flow-map head: the mean velocity between any two times, for tokens in one or two steps.

    Attributes:
        objective: MeanFlow (arXiv 2505.13447), or Lagrangian self-distillation (arXiv 2505.18825).
        time_balance: 0 is the plain mean squared error, in which times with large losses count most. 1
            divides losses by their mean at like times within the micro-batch, so that all times count alike.
        flow_steps: training steps of plain flow matching before its objective begins.
        max_guidance: largest guidance scale that it learns, so that guidance takes one pass of the backbone.
            Without it the head learns no guidance, which then takes two passes.
    """

    _fewest_samples = 2
    kind: Literal["flow_map"] = "flow_map"
    objective: Literal["mean_flow", "lagrangian"] = "mean_flow"
    time_balance: float = 0.0
    flow_steps: int = 0
    max_guidance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.time_balance <= 1:
            raise InputError(f"head time_balance {self.time_balance} is out of range. Give 0 to 1")
        if self.flow_steps < 0:
            raise InputError(f"head flow_steps {self.flow_steps} is negative. Give at least 0")
        if self.max_guidance is not None and not 1 < self.max_guidance < math.inf:
            raise InputError(f"head max_guidance {self.max_guidance} is not above 1. Give more, or null")


@dataclasses.dataclass(frozen=True)
class EnergyConfig(HeadConfig):
    """Energy head (EAR, arXiv 2505.07812): the token in one pass from noise and condition."""

    _fewest_samples = 2
    kind: Literal["energy"] = "energy"


HeadConfig.kinds.update(
    {cls.kind: cls for cls in (ShortcutConfig, FlowConfig, DiffusionConfig, FlowMapConfig, EnergyConfig)}
)
