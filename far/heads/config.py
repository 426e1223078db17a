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
    """Kind and size of a head. ``kind`` is a name in :data:`far.heads.HEADS`.

    ``samples_per_token`` noise samples share each ``z`` in training (MAR's ``diffusion_batch_mul``);
    ``solver`` is the flow head's only. ``token_limit`` is the diffusion head's: in sampling, the token that each
    step predicts is clipped to it, in deviations of the latents. MAR has none, and needs long training for that;
    a causal backbone, which feeds every token back, needs it longest.
    The flow-map head's are ``objective``; ``flow_steps``, the training steps of plain flow matching before it begins; and
    ``max_guidance``, up to which scale the head learns the guided field (without it, guidance takes two passes).
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
            raise InputError(f"head kind {self.kind!r}: choose one of {choices}, or register a head of your own")
        for name, most in (("width", 2**16), ("depth", 2**10), ("samples_per_token", 2**16)):
            check_count(f"head {name}", getattr(self, name), most)
        if self.token_limit is not None and not self.token_limit > 0:
            raise InputError(f"head token_limit {self.token_limit} must be positive; leave it out for none")
        if self.flow_steps < 0:
            raise InputError(f"head flow_steps {self.flow_steps} must be at least 0")
        if self.max_guidance is not None and not (math.isfinite(self.max_guidance) and self.max_guidance > 1):
            raise InputError(f"head max_guidance {self.max_guidance} must be a number above 1; leave it out for none")
        if self.max_guidance is not None and self.kind != "flow_map":
            raise InputError(
                f"head max_guidance {self.max_guidance}: only a flow_map head learns guidance; choose kind flow_map, or leave it out"
            )
