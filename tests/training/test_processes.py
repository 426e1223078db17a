"""Training in several processes: losses and weights equal those of one process."""

import functools
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import assert_close_checkpoints, newest
from conftest import write_recipe
from torchrun import kill_one, run, start, wait_for

from far.cli.main import main
from far.training.checkpoint import list_checkpoints
from far.training.epochs import epoch_rows

# The recipe uses dropout, so its random numbers are compared too.
STEPS = [
    "generator.training.steps=20",
    "generator.training.log_every=1",
    "generator.training.micro_batches=4",
]


def train_alone(*arguments: object, command: str = "train") -> None:
    """Train in this process with one thread, whose sums are rounded as those of the others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([command, *map(str, arguments)]) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained_alone(
    tmp_path_factory: pytest.TempPathFactory, image_set: Path, autoencoder_folder: Path, latents_folder: Path
) -> Callable[..., Path]:
    """Runs of one process, one per set of options, with four micro-batches per step."""

    @functools.cache
    def trained(*options: str) -> Path:
        folder = tmp_path_factory.mktemp("alone")
        (folder / "run").mkdir()
        (folder / "run" / "latents").symlink_to(latents_folder)
        recipe = write_recipe(folder / "recipe.yaml", image_set, folder / "run", autoencoder_folder)
        train_alone(recipe, "model=alone", *STEPS, *options)
        return folder / "run" / "alone"

    return trained


@pytest.fixture
def alone(trained_alone: Callable[..., Path]) -> Path:
    return trained_alone()


def losses(folder: Path) -> list[float]:
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def assert_close(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """Compare the losses of every step, the weights and their average, relative to each tensor's size."""
    assert losses(found) == pytest.approx(losses(expected), rel=tolerance)
    assert newest(found)["step"] == 20
    assert_close_checkpoints(newest(found), newest(expected), tolerance)


# Some parameters of a flow map have no gradient until its own loss starts.
FLOW_MAP = [
    "generator.network.head.kind=flow_map",
    "generator.network.head.flow_steps=10",
    "generator.network.head.max_guidance=3.0",
]
BLOCK_CAUSAL = [
    "generator.network.backbone={kind: block_causal, width: 16, encoder_depth: 1, decoder_depth: 1, heads: 2}"
]
FLOAT16 = ["generator.training.dtype=float16"]
CASES = {
    "ddp, flow_map": ("ddp", FLOW_MAP),
    "fsdp, shortcut": ("fsdp", []),
    "fsdp, flow_map": ("fsdp", FLOW_MAP),
    "ddp, block_causal": ("ddp", BLOCK_CAUSAL),
    "fsdp, block_causal": ("fsdp", BLOCK_CAUSAL),
    "ddp, float16": ("ddp", FLOAT16),
    "fsdp, float16": ("fsdp", FLOAT16),
}


@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_train_as_one(case: str, recipe: Path, trained_alone: Callable[..., Path]) -> None:
    parallel, options = CASES[case]
    run(
        2,
        "-m",
        "far",
        "train",
        recipe,
        "model=both",
        *STEPS,
        *options,
        f"generator.training.parallel={parallel}",
    )
    alone, both = trained_alone(*options), recipe.parent / "run" / "both"
    # Rounding to float16 between two layers may go either way, which changes the sign of small gradients.
    # 2e-3 is a tenth of the distance that Adam can move in 20 steps of 1e-3.
    assert_close(both, alone, tolerance=2e-3 if options is FLOAT16 else 1e-5)
    ours, theirs = newest(both)["values"], newest(alone)["values"]
    assert ours.pop("results") == pytest.approx(theirs.pop("results"), rel=1e-4)
    assert ours == theirs


# The discriminator is not used in the first ten steps.
ADVERSARIAL = [
    "autoencoder.loss.adversarial_weight=0.5",
    "autoencoder.loss.adversarial_start=10",
    "autoencoder.discriminator={width: 8, layers: 1}",
]


@pytest.mark.parametrize("options", [[], ADVERSARIAL], ids=["plain", "adversarial"])
def test_two_processes_train_an_autoencoder_as_one(options: list[str], recipe: Path) -> None:
    sizes = ["width=8", "width_multipliers=[1,1,2]", "blocks=1", "latent_channels=2", "norm_groups=4"]
    values = [f"autoencoder.model.{size}" for size in sizes] + [
        step.replace("generator.", "autoencoder.") for step in STEPS
    ]
    values += [
        "autoencoder_from=null",
        "autoencoder.training.batch_size=8",
        "autoencoder.loss.evaluation_images=4",
        *options,
    ]
    folders = [recipe.parent / name for name in ("alone", "both")]
    train_alone(recipe, f"run={folders[0]}", *values, command="train-autoencoder")
    run(2, "-m", "far", "train-autoencoder", recipe, f"run={folders[1]}", *values)
    # Gradients of four micro-batches are summed in another order. Adam turns the rounding of the smallest
    # ones of the discriminator into steps of the learning rate, which changes the losses by about 1e-4.
    assert_close(
        *(folder / "autoencoder" for folder in reversed(folders)), tolerance=2e-3 if options else 1e-5
    )


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_run_of_two_processes_resumes_in_one_after_a_kill(parallel: str, recipe: Path, alone: Path) -> None:
    both = recipe.parent / "run" / "both"
    options = ["generator.training.checkpoint_every=5", f"generator.training.parallel={parallel}"]
    process = start(2, "-m", "far", "train", recipe, "model=both", *STEPS, *options)
    wait_for(lambda: len(list_checkpoints(both / "checkpoints")) > 0)
    kill_one(process)
    done = list_checkpoints(both / "checkpoints")[-1][0]
    assert 5 <= done < 20
    kept = losses(both)[:done]
    (both / "log.jsonl").write_text("")
    train_alone(recipe, "model=both", *STEPS, "--resume")
    assert kept + losses(both) == pytest.approx(losses(alone), rel=1e-5)
    (both / "log.jsonl").write_text("".join(json.dumps({"loss": loss}) + "\n" for loss in losses(alone)))
    assert_close(both, alone)


@pytest.mark.soak
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_run_killed_at_random_moments_ends_with_the_weights_of_one_process(
    parallel: str, recipe: Path, alone: Path
) -> None:
    draw, kills, begun, finished, seconds = random.Random(parallel), 0, 0, True, 20.0
    while kills < 10 or not finished:
        begun += finished
        both = recipe.parent / "run" / f"both-{begun}"
        options = [
            f"model={both.name}",
            "generator.training.checkpoint_every=1",
            f"generator.training.parallel={parallel}",
            "--resume",
        ]
        start_time, process = time.monotonic(), start(2, "-m", "far", "train", recipe, *STEPS, *options)
        try:
            _, errors = process.communicate(timeout=draw.uniform(0, seconds) if kills < 10 else 240)
        except subprocess.TimeoutExpired:
            workers = list(
                map(
                    int,
                    subprocess.run(
                        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
                    ).stdout.split(),
                )
            )
            # Kill one of them, or all, as in a power failure.
            for victim in workers[-1:] if workers and kills % 2 else [process.pid, *workers]:
                os.kill(victim, signal.SIGKILL)
            _, errors = process.communicate(timeout=60)
        finished = process.returncode == 0
        kills += not finished
        assert "far: error" not in errors
        if finished:
            seconds = time.monotonic() - start_time
            assert_close(both, alone)
    print(f"{parallel}: {kills} kills in {begun} runs")


def test_run_of_one_process_resumes_in_two_with_shards(recipe: Path, alone: Path) -> None:
    both = recipe.parent / "run" / "both"
    train_alone(recipe, "model=both", *STEPS, "generator.training.steps=10")
    begun = losses(both)
    run(2, "-m", "far", "train", recipe, "model=both", *STEPS, "generator.training.parallel=fsdp", "--resume")
    assert losses(both)[:10] == begun
    assert_close(both, alone)
    # Each process writes about half, and one of them also the tensors without shards: the EMA's head and step
    # numbers.
    sizes = [path.stat().st_size for path in (both / "checkpoints" / "step-00000020").glob("*.safetensors")]
    [whole] = [
        path.stat().st_size for path in (alone / "checkpoints" / "step-00000020").glob("*.safetensors")
    ]
    assert len(sizes) == 2
    assert max(sizes) < 0.65 * whole


def test_sigterm_saves_the_finished_steps(recipe: Path, alone: Path) -> None:
    stopped = recipe.parent / "run" / "stopped"
    process = start(
        2,
        "-m",
        "far",
        "train",
        recipe,
        "model=stopped",
        *STEPS,
        "generator.training.checkpoint_every=1000",
        "generator.training.steps=4000",
    )
    wait_for(lambda: (stopped / "log.jsonl").exists() and losses(stopped))
    # A cluster signals all processes of a job, and torchrun signals its workers again.
    for worker in map(
        int, subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    ):
        os.kill(worker, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    step, _ = list_checkpoints(stopped / "checkpoints")[-1]
    assert f"step {step}" in output
    assert len(losses(stopped)) == step
    assert losses(stopped)[:20] == pytest.approx(losses(alone)[: min(step, 20)], rel=1e-5)


def test_signal_during_saving_ends_no_process_early(tmp_path: Path) -> None:
    output = run(2, Path(__file__).parent / "late_signal.py", tmp_path / "run")
    assert output.count("status 143") == 2
    assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == [5]


def test_all_processes_skip_a_step_that_one_must_skip(tmp_path: Path) -> None:
    """Process 2 has a NaN loss in one step, which halves both scales, and an infinite loss in another."""
    script = Path(__file__).parent / "one_skips.py"
    for dtype, scale in (("float32", 1.0), ("float16", 65536.0 / 2)):
        run(2, script, tmp_path / dtype, dtype)
        first, second = (json.loads((tmp_path / dtype / f"{rank}.json").read_text()) for rank in (0, 1))
        assert first == second
        assert (first["skipped"], first["scale"]) == (2, scale)


def test_folder_that_is_not_shared_is_rejected(recipe: Path, latents_folder: Path, tmp_path: Path) -> None:
    for rank in (0, 1):  # the same path on two machines
        (tmp_path / str(rank) / "run").mkdir(parents=True)
        (tmp_path / str(rank) / "run" / "latents").symlink_to(latents_folder)
    script = tmp_path / "apart.py"
    script.write_text(
        "import os, sys\nfrom far.cli.main import main\n"
        f"os.chdir(os.path.join({str(tmp_path)!r}, os.environ['RANK']))\n"
        "sys.exit(main(['train', *sys.argv[1:]]))\n"
    )
    process = start(2, script, recipe, "run=run", *STEPS)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "far: error: run/model " in errors
    assert not (tmp_path / "0" / "run" / "model").exists()


def test_command_for_one_process_is_rejected_in_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["generate", "--out", str(tmp_path / "x.png")]) == 2
    assert "far generate" in capsys.readouterr().err
    for arguments in (
        ["train", "avatars-32"],
        ["evaluate", "--weights", "avatars-64", "--out", str(tmp_path / "evaluation")],
    ):
        assert main(arguments) == 2
        assert "LOCAL_RANK" in capsys.readouterr().err
    assert not (tmp_path / "evaluation").exists()
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert main(["train", "avatars-32"]) == 2
    assert "WORLD_SIZE 'many'" in capsys.readouterr().err


def test_micro_batches_are_consecutive_rows_of_the_step() -> None:
    for step in range(5):
        whole = epoch_rows(step, 8, 60, seed=3)
        parts = [epoch_rows(4 * step + part, 2, 60, seed=3) for part in range(4)]
        assert torch.equal(torch.cat(parts), whole)


def test_micro_batches_that_cannot_be_shared_are_rejected(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start(2, "-m", "far", "train", recipe, "model=odd")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "far: error: micro_batches 1 " in errors
    assert not (recipe.parent / "run" / "odd").exists()
    assert main(["train", str(recipe), "generator.training.micro_batches=3"]) == 2
    line = capsys.readouterr().err
    assert "micro_batches 3 " in line
    assert "batch_size 8" in line
    assert main(["train", str(recipe), "generator.training.micro_batches=0"]) == 2
    assert "micro_batches 0 " in capsys.readouterr().err
