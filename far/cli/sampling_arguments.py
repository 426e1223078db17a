"""The sampling options that every command that draws images shares."""

import argparse
from typing import Any

# Of one call; a number beyond any use would fill the memory before the first is drawn.
MOST_IMAGES = 10_000_000


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--guidance", type=float, help="guidance scale; 1 is off (default: the model's)")
    parser.add_argument(
        "--guidance-schedule",
        choices=["linear", "constant"],
        help="over the known tokens (default: the model's)",
    )
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("START", "END"),
        help="shares of known tokens with guidance",
    )
    parser.add_argument("--ar-steps", type=int, help="autoregressive steps (default: the model's)")
    parser.add_argument(
        "--head-steps",
        type=int,
        nargs="+",
        metavar="N",
        help="steps of the head; two numbers: from first to last AR step",
    )
    parser.add_argument(
        "--order", choices=["random", "halton"], help="of positions, of masked models (default: the model's)"
    )
    parser.add_argument(
        "--refresh-every",
        type=int,
        metavar="N",
        help="masked models: all positions at every N-th AR step only; 1 is exact",
    )
    parser.add_argument(
        "--guidance-every",
        type=int,
        metavar="N",
        help="masked models: no-class half at every N-th AR step only; 1 is exact",
    )
    parser.add_argument(
        "--guidance-passes",
        type=int,
        choices=[1, 2],
        help="of the backbone; 1 if the head has learnt guidance (default: 1 where it has)",
    )
    parser.add_argument("--temperature", type=float, help="factor of the head's noise (default: the model's)")


def sampling_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The given values by their names in :class:`far.sampling.SamplingConfig`; ``None`` where not given."""
    steps = arguments.head_steps
    return {
        "guidance": arguments.guidance,
        "guidance_schedule": arguments.guidance_schedule,
        "guidance_interval": tuple(arguments.guidance_interval) if arguments.guidance_interval else None,
        "ar_steps": arguments.ar_steps,
        "head_steps": steps[0] if steps and len(steps) == 1 else tuple(steps) if steps else None,
        "order": arguments.order,
        "refresh_every": arguments.refresh_every,
        "guidance_every": arguments.guidance_every,
        "guidance_passes": arguments.guidance_passes,
        "temperature": arguments.temperature,
    }
