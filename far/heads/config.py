"""Kind and size of a head. Needs no torch: a recipe is checked without it."""

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

from far.config import check_count
from far.errors import InputError

if TYPE_CHECKING:
    from far.heads.head import Head


# The kinds that come with the library. Their classes need torch.
KINDS = ("diffusion", "energy", "flow", "flow_map", "shortcut")
# Heads by kind. ``far.heads`` adds its own on first use; add one of yours to register it.
HEADS: dict[str, type["Head"]] = {}


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Kind and size of a head.

    Attributes:
        kind: ``shortcut``, ``flow``, ``diffusion``, ``flow_map``, ``energy``, or another name in
            :data:`far.heads.HEADS`.
        width: channels of its blocks.
        depth: number of its blocks.
        samples_per_token: noise samples that share each condition in training (MAR's
            ``diffusion_batch_mul``).
        solver: the flow head's: ``euler``, or ``heun`` with two evaluations per step.
        token_limit: the diffusion head's: in sampling, clip the token that each step predicts to this many
            standard deviations of the latents. MAR has none and needs long training for that; a causal
            backbone, which feeds every token back, needs it longest.
        objective: the flow-map head's: MeanFlow, or Lagrangian self-distillation.
        flow_steps: the flow-map head's: training steps of plain flow matching before its objective begins.
        max_guidance: the flow-map head's: up to which scale it learns the guided field, so that guidance
            takes one pass of the backbone; none learns no guidance, which then takes two.
    """

    kind: str = "shortcut"
    width: int = 1024
    depth: int = 6
    samples_per_token: int = 4
    solver: Literal["euler", "heun"] = "euler"
    token_limit: float | None = None
    objective: Literal["mean_flow", "lagrangian"] = "mean_flow"
    flow_steps: int = 0
    max_guidance: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in (kinds := dict.fromkeys((*KINDS, *HEADS))):
            choices = ", ".join(map(repr, kinds))
            raise InputError(
                f"head kind {self.kind!r}: choose one of {choices}, or register a head of your own"
            )
        for name, most in (("width", 2**16), ("depth", 2**10), ("samples_per_token", 2**16)):
            check_count(f"head {name}", getattr(self, name), most)
        if self.token_limit is not None and not self.token_limit > 0:
            raise InputError(f"head token_limit {self.token_limit} must be positive; leave it out for none")
        if self.flow_steps < 0:
            raise InputError(f"head flow_steps {self.flow_steps} must be at least 0")
        if self.max_guidance is not None and not (math.isfinite(self.max_guidance) and self.max_guidance > 1):
            raise InputError(
                f"head max_guidance {self.max_guidance} must be a number above 1; leave it out for none"
            )
        if self.max_guidance is not None and self.kind != "flow_map":
            raise InputError(
                f"head max_guidance {self.max_guidance}: only a flow_map head learns guidance; choose kind flow_map, or leave it out"
            )
