"""Distill our own MAR-style models, saved as MAR checkpoints, to one or two head steps.

    python -m benchmarks.distillation [SET …]

The comparison's models of MAR's recipe are written as pickles under MAR's names, converted with ``far convert
mar``, and distilled with ``far distill`` over the latent cache. The result goes to ``WEIGHTS``/SET/distilled,
the seconds of each part to docs/results/distillation.json. ``benchmarks.results`` measures the distance.
"""

import argparse
import shutil
import time
from pathlib import Path

import torch

from benchmarks.comparison import TEACHER
from benchmarks.recorded import TRAIN, WEIGHTS, checksums, made
from far.backbone import MaskedConfig
from far.cli.main import main as far_command
from far.convert import mar_name
from far.files import read_json, write_json
from far.folder import load_autoencoder, save_autoencoder
from far.model import FAR
from far.pipeline import Pipeline
from far.recipe import Recipe, load_recipe

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
    """Convert and distill the model of MAR's recipe, unless it was done.

    An interrupted distillation is resumed; its seconds are unknown.

    Raises:
        SystemExit: that model is missing, or the distilled one comes from another.
    """
    source, result, start = WEIGHTS / name / TEACHER, WEIGHTS / name / "distilled", time.perf_counter()
    if not source.is_dir():
        raise SystemExit(f"{source} is missing. Train it with: {TRAIN}")
    report = read_json(RESULTS) if RESULTS.exists() else {}
    teacher = checksums(source)["model.safetensors"]
    if (result / "config.json").exists():  # written last
        if report.get(name, {}).get("teacher", teacher) != teacher:
            raise SystemExit(f"{result} was distilled from other weights than {source}. Remove it")
        return
    folder = Path("runs/distillation") / f"{name}-{teacher[:8]}"
    interrupted = (folder / "distilled").exists()
    recipe = load_recipe(Path(f"recipes/comparison/{name}-masked.yaml"))
    convert(source, recipe, folder)
    converted = time.perf_counter()
    folders = [str(folder / part) for part in ("mar", "distilled")]
    run("distill", *folders, *OPTIONS, "--latents", str(recipe.latents_folder), "--resume")
    distilled = time.perf_counter()
    found = Pipeline.from_pretrained(folder / "distilled")
    found.save_pretrained(result, torch.float16)
    seconds = None if interrupted else {"convert": converted - start, "distill": distilled - converted}
    row = {
        "options": OPTIONS,
        "seconds": seconds,
        "weights": str(result),
        "sha256": checksums(result),
        "teacher": teacher,
        **made(),
        **found.results,
    }
    write_json(RESULTS, {**report, name: row})
    print(f"{name}: {seconds} seconds, {found.results}")


def convert(source: Path, recipe: Recipe, folder: Path) -> None:
    """Write ``folder``/mar from a diffusion model by way of a MAR checkpoint, unless it was done."""
    done, teacher = folder / "converted", Pipeline.from_pretrained(source)
    if done.exists():
        return
    shutil.rmtree(folder / "mar", ignore_errors=True)
    # The latents' own autoencoder: the one beside the weights is rounded to float16.
    save_autoencoder(load_autoencoder(recipe.autoencoder_folder), folder / "mar")
    write_published(teacher.model, folder / "checkpoint.pth")
    run("convert", "mar", str(folder / "checkpoint.pth"), str(folder / "mar"))
    converted = Pipeline.from_pretrained(folder / "mar")
    converted.classes = teacher.classes  # a MAR checkpoint holds their number only
    converted.save_pretrained(folder / "mar")
    done.touch()


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
    assert isinstance(backbone, MaskedConfig)
    arguments = argparse.Namespace(
        class_num=config.classes, vae_embed_dim=config.latent_channels, patch_size=config.network.patch,
        num_iter=8, encoder_num_heads=backbone.encoder_heads, decoder_num_heads=backbone.decoder_heads,
        num_sampling_steps="100",
    )  # fmt: skip
    torch.save({"model": weights, "model_ema": weights, "args": arguments, "epoch": 0}, path)


if __name__ == "__main__":
    main()
