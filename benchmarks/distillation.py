"""Distill our own MAR-style models, saved as MAR checkpoints, to one or two head steps.

    python -m benchmarks.distillation [SET …]

The comparison's diffusion models are written as pickles under MAR's names, converted with ``far convert
mar``, and distilled with ``far distill`` over the latent cache. The result goes to ``WEIGHTS``/SET/distilled,
the seconds of each part to docs/results/distillation.json. ``benchmarks.results`` measures the distance.
"""

import argparse
import shutil
import time
from pathlib import Path

import torch

from benchmarks.recorded import TRAIN, WEIGHTS, checksums, made
from far.cli.main import main as far_command
from far.convert import mar_name
from far.files import read_json, write_json
from far.folder import save_autoencoder
from far.model import FAR
from far.pipeline import Pipeline

RESULTS = Path("docs/results/distillation.json")
OPTIONS = [
    "trajectories.images=12800",
    "trajectories.token_limit=5.0",
    "training.steps=3000",
    "training.batch_size=128",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="*", default=["avatars-64", "fashion-mnist"])
    for name in parser.parse_args().sets:
        distill(name)


def distill(name: str) -> None:
    """Convert and distill a diffusion model, unless it was done.

    An interrupted distillation is resumed; its seconds are unknown.
    """
    folder, result, start = (
        Path("runs/distillation") / name,
        WEIGHTS / name / "distilled",
        time.perf_counter(),
    )
    if result.exists():
        return
    interrupted = (folder / "distilled").exists()
    if not (WEIGHTS / name / "diffusion").is_dir():
        raise SystemExit(f"{WEIGHTS / name / 'diffusion'} is missing. Train it with: {TRAIN}")
    teacher = Pipeline.from_pretrained(WEIGHTS / name / "diffusion")
    assert teacher.autoencoder is not None
    if not (folder / "mar" / "model.safetensors").exists():
        shutil.rmtree(folder / "mar", ignore_errors=True)
        save_autoencoder(teacher.autoencoder, folder / "mar")
        write_published(teacher.model, folder / "checkpoint.pth")
        run("convert", "mar", str(folder / "checkpoint.pth"), str(folder / "mar"))
    converted = time.perf_counter()
    latents = f"runs/comparison/{name}/latents"
    run("distill", str(folder / "mar"), str(folder / "distilled"), *OPTIONS, "--latents", latents, "--resume")
    distilled = time.perf_counter()
    found = Pipeline.from_pretrained(folder / "distilled")
    found.save_pretrained(result, torch.float16)
    report = read_json(RESULTS) if RESULTS.exists() else {}
    seconds = None if interrupted else {"convert": converted - start, "distill": distilled - converted}
    row = {
        "options": OPTIONS,
        "seconds": seconds,
        "weights": str(result),
        "sha256": checksums(result),
        **made(),
        **found.results,
    }
    write_json(RESULTS, {**report, name: row})
    print(f"{name}: {seconds} seconds, {found.results}")


def run(*command: str) -> None:
    print("far", *command, flush=True)
    if far_command(command) != 0:
        raise SystemExit(2)


def write_published(model: FAR, path: Path) -> None:
    """Write a checkpoint as MAR's training does: a pickle of both sets of weights and the arguments."""
    state, config = model.state_dict(), model.config
    classes = state.pop("backbone.class_embedding.weight")
    weights = {mar_name(name): tensor for name, tensor in state.items()}
    weights |= {"class_emb.weight": classes[:-1].clone(), "fake_latent": classes[-1:].clone()}
    backbone = config.network.backbone
    arguments = argparse.Namespace(
        class_num=config.classes, vae_embed_dim=config.latent_channels, patch_size=config.network.patch,
        num_iter=8, encoder_num_heads=backbone.encoder_heads, decoder_num_heads=backbone.decoder_heads,
        num_sampling_steps="100",
    )  # fmt: skip
    torch.save({"model": weights, "model_ema": weights, "args": arguments, "epoch": 0}, path)


if __name__ == "__main__":
    main()
