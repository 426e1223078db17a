"""Instructions for drawing with an export, for its ``config.json``: the loop of ``far.sampling`` in words."""

from far.heads import EnergyConfig
from far.heads.config import DiffusionConfig, FlowConfig, FlowMapConfig
from far.heads.diffusion import TRAINING_STEPS
from far.heads.flow import TIME_UNIT
from far.heads.flow_map import TIME_UNIT as FLOW_MAP_UNIT
from far.heads.shortcut import FINEST
from far.model import FAR


def loop(model: FAR) -> tuple[str, ...]:
    """Return how to draw images with the files of an export, one sentence or formula per entry."""
    config = model.config
    order = "a permutation of 0 … n−1" if model.backbone.any_order else "0, 1 … n−1, one per AR step"
    return (
        f"n = {config.tokens} tokens of {config.token_channels} channels: [batch, n, channels], first 0.",
        f"order = {order}. Positions count left to right, top to bottom.",
        "AR step k of K (k = 0 …) draws the next positions of the order, until "
        "floor(n · cos(π/2 · (k+1)/K)) are left; at least one, and in the last step all.",
        *_backbone(model),
        f"No class is the label {model.null_label}. With guidance g ≠ 1, z_uncond is z without class, and a "
        "prediction p of the head becomes p_uncond + g · (p − p_uncond).",
        "g = 1 + (guidance − 1) · min(m, n − 1)/n if guidance_schedule is linear, where m tokens are known "
        "after the AR step, else guidance. g = 1 if the fraction known before is outside guidance_interval.",
        "S = head_steps. Two values change linearly from the first AR step to the last, rounded.",
        *_head(model),
        *_constraint(model),
        f"In the end, latents [batch, {config.latent_channels}, {config.grid[0]}, {config.grid[1]}] hold the "
        f"tokens as patches of {config.network.patch}×{config.network.patch}, channel first within a token. "
        "decoder.onnx makes images of them, about 0 … 1.",
    )


def _backbone(model: FAR) -> tuple[str, ...]:
    if not model.backbone.exact_cache:
        return ("z = backbone.onnx(tokens, known, query, labels): known are the drawn positions, query the "
                "next ones.",)  # fmt: skip
    buffer = model.backbone.config.buffer
    query = ", query" if model.backbone.any_order else ""
    return (
        f"z, keys, values = backbone.onnx(tokens, places, labels, keys, values{query}). In the first step, "
        f"keys and values have no cached positions, and places are 0 … {buffer - 1}, copies of the class "
        "whose tokens are zero. In later steps, places and tokens are those drawn in the step before: "
        f"position + {buffer}.",
    )


def _head(model: FAR) -> tuple[str, ...]:
    config = model.head.config
    temperature = "x = temperature · normal noise."
    condition = "c = head_condition.onnx(z)."
    if isinstance(config, EnergyConfig):
        return ("token = head.onnx(x, c) with x = z_uncond + g · (z − z_uncond) and "
                "c = head_condition.onnx(temperature · normal noise).",)  # fmt: skip
    if isinstance(config, DiffusionConfig):
        return (
            f"{condition} x = normal noise. For each time t of S times from {TRAINING_STEPS - 1} down to 0, "
            "evenly spaced and rounded: ε, v = head.onnx(x, c, head_time.onnx([t])), and x is drawn as a "
            "step of a DDPM does, its noise multiplied by the temperature. Only ε is guided.",
            f"The DDPM has the cosine schedule of {TRAINING_STEPS} steps with β ≤ 0.999, respaced to the S "
            "times. The log-variance is (v + 1)/2 of the way from that of the posterior to log β.",
            *_limit(config),
        )
    if isinstance(config, FlowMapConfig):
        learned = () if config.max_guidance is None else (
            f"Add head_guidance.onnx([{FLOW_MAP_UNIT:g} · (g − 1)]) to c. If 1 ≤ guidance ≤ "
            f"{config.max_guidance:g}, z_uncond is then not needed. Else give it 0, and guide as above.",
        )  # fmt: skip
        return (
            f"{temperature} {condition}",
            *learned,
            f"S times, from t = 0: x += head.onnx(x, c, head_time.onnx([{FLOW_MAP_UNIT:g} t, "
            f"{FLOW_MAP_UNIT:g}/S])) / S; t += 1/S.",
        )
    if isinstance(config, FlowConfig):
        solver = "Heun" if config.solver == "heun" else "Euler"
        return (
            f"{temperature} {condition} Integrate dx/dt = head.onnx(x, c, head_time.onnx([{TIME_UNIT:g} t])) "
            f"from t = 0 to 1 by S {solver} steps.",
        )
    return (
        f"{temperature} {condition} For steps of size d, powers of two that sum to 1: "
        f"x += d · head.onnx(x, c, head_time.onnx([{TIME_UNIT:g} t, {TIME_UNIT:g} d])); t += d. "
        f"d = 1/{FINEST} is given as 0.",
    )


def _limit(config: DiffusionConfig) -> tuple[str, ...]:
    if config.token_limit is None:
        return ()
    return (f"Clip the token that each step predicts from ε to ±{config.token_limit:g}.",)


def _constraint(model: FAR) -> tuple[str, ...]:
    if not model.config.network.spherical:
        return ()
    return ("Scale each drawn latent (one value per latent channel) to the norm √channels.",)
