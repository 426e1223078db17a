"""Compare heads on the conditions of a trained backbone: minutes per head, since the backbone runs once.

    python -m benchmarks.frozen_heads LATENTS [HEAD …] [--model avatars-64-causal]

Each HEAD, as in ``flow_map,objective=lagrangian``, is trained on pairs of conditions and tokens of the latent
cache. The figure is the energy score of 8 draws per token of held-out images, in 1, 2, 4 and 8 steps: a
strictly proper score, in standard deviations of the latents, the lower the better. Scores share their tokens,
so the standard error is that of the difference to the first row's best.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import yaml
from torch import Tensor

from far.config import from_dict
from far.data.latents import LatentCache
from far.heads import Condition, Head, build_head
from far.heads.energy import distance_and_spread
from far.model import FAR, NetworkConfig
from far.pipeline import Pipeline
from far.seeds import seeded, seeded_generator
from far.training.ema import Ema
from far.training.epochs import epoch_rows

HEADS = ("shortcut", "flow_map", "flow_map,time_balance=1", "flow_map,objective=lagrangian", "flow", "energy")
DRAWS, BATCH, STEPS = 8, 256, (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("latents", type=Path)
    parser.add_argument("heads", nargs="*", default=HEADS)
    parser.add_argument("--model", default="avatars-64-causal")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pairs = conditions(arguments.model, arguments.latents, arguments.images)
    tokens, z = pairs
    eighth = len(tokens) // 8
    held_out, trained_on = (tokens[:eighth], z[:eighth]), (tokens[eighth:], z[eighth:])
    print(f"{len(trained_on[0])} tokens, {len(held_out[0])} held out, {arguments.steps} steps of {BATCH}")
    reference: Tensor | None = None
    for name in arguments.heads:
        head, start = new_head(name, arguments, pairs), time.process_time()
        head = train(head, *trained_on, arguments.steps, arguments.seed)
        seconds = time.process_time() - start
        scores = {steps: score(head, *held_out, steps) for steps in STEPS if steps <= head.max_steps}
        if reference is None:
            reference = min(scores.values(), key=lambda each: float(each.mean()))
        print(f"{name} ({seconds:.0f} s): {row(scores, reference)}", flush=True)


@torch.no_grad()
def conditions(model: str, latents: Path, images: int) -> tuple[Tensor, Tensor]:
    """Return tokens ``[n, channels]`` and the backbone's conditions for them ``[n, width]``."""
    pipeline = Pipeline.from_pretrained(model, device="cpu")
    far: FAR = pipeline.model.eval()
    assert pipeline.autoencoder is not None
    cache, tokens, z = LatentCache(latents, pipeline.autoencoder), [], []
    for number in range(images // 64):
        generator = seeded_generator(number)
        rows = epoch_rows(number, 64, len(cache), 0)
        drawn = far.constrain(far.tokens(cache.draw(rows, generator)))
        fed, known, query = far.backbone.training_inputs(drawn, generator)
        z.append(far.backbone(fed, known, query, cache.labels[rows]).flatten(0, 1))
        tokens.append(drawn.gather(1, query.unsqueeze(-1).expand(-1, -1, drawn.shape[-1])).flatten(0, 1))
    return torch.cat(tokens), torch.cat(z)


def new_head(name: str, arguments: argparse.Namespace, pairs: tuple[Tensor, Tensor]) -> Head:
    """Return an untrained head of ``kind[,key=value…]``."""
    kind, *options = name.split(",")
    values = yaml.safe_load("{" + ", ".join(option.replace("=", ": ") for option in options) + "}")
    sizes = {"kind": kind, "width": arguments.width, "depth": 2, "samples_per_token": 4}
    config = from_dict(NetworkConfig, {"head": {**sizes, **values}}, name).head
    with seeded(arguments.seed):
        return build_head(config, pairs[0].shape[1], pairs[1].shape[1])


def train(head: Head, tokens: Tensor, z: Tensor, steps: int, seed: int) -> Head:
    """Train with AdamW and a half-cosine learning rate, and return the average weights."""
    rate = 2.5e-4 if head.config.kind == "energy" else 1e-3
    ema, optimizer = Ema(head, 0.995), torch.optim.AdamW(head.parameters(), lr=rate, betas=(0.9, 0.95))
    for step in range(steps):
        generator = seeded_generator(step, seed)
        chosen = torch.randint(0, len(tokens), (BATCH,), generator=generator)
        decay = (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50) * decay
        optimizer.zero_grad()
        head.loss(tokens[chosen], Condition(z[chosen]), generator, head, step).value.mean().backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        ema.update(head, step)
    return ema.module  # type: ignore[return-value]


@torch.no_grad()
def score(head: Head, tokens: Tensor, z: Tensor, steps: int) -> Tensor:
    """Return the energy score of each token ``[n]``."""
    generator = seeded_generator(0, 1)

    def normal() -> Tensor:
        return torch.randn(DRAWS, *tokens.shape, generator=generator)

    drawn = head.sampler(steps, tokens)(Condition(z.expand(DRAWS, -1, -1)), normal, 1.0)
    distance, spread = distance_and_spread(drawn, tokens)
    return (distance - spread / 2).mean(dim=0)


def row(scores: dict[int, Tensor], reference: Tensor) -> str:
    """Return the mean scores, each with the standard error of its difference to ``reference``."""
    errors = {steps: (each - reference).std() / math.sqrt(len(each)) for steps, each in scores.items()}
    return ", ".join(f"{float(each.mean()):.4f} ± {errors[s]:.4f} in {s}" for s, each in scores.items())


if __name__ == "__main__":
    main()
