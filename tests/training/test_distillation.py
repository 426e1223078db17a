"""Distillation: the loss against exact mean velocities, and ``far distill`` from teacher to images."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from checkpoints import assert_close_checkpoints, newest
from drawing import draw
from exact import ExactNetwork
from torch import Tensor
from torchrun import kill_one, run, start, wait_for

import far
from benchmarks.distillation import write_published
from far.cli.main import main
from far.convert import convert_mar
from far.data.shards import ShardReader, ShardWriter
from far.errors import InputError
from far.files import read_json
from far.folder import save_autoencoder
from far.pipeline import Pipeline
from far.processes import Processes
from far.training.config import LoopConfig
from far.training.distillation import DistillationConfig, DistillationTask, draw_spans
from far.training.trajectories import GROUP, POINTS, TrajectoryConfig

DEVIATION = 0.5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums of several threads can be rounded differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- The loss ----------------------------------------------------------------------------------------


def test_spans_have_uniform_lengths_and_uniform_starts() -> None:
    start, end = draw_spans((4, 5000), torch.Generator().manual_seed(0))
    assert start.shape == end.shape == (4, 5000)
    assert int(start.min()) == 0
    assert int(end.max()) == POINTS - 1
    assert bool((start < end).all())
    length = end - start
    assert scipy.stats.chisquare(length.flatten().bincount(minlength=POINTS)[1:].numpy()).pvalue > 0.01
    for size in range(1, POINTS - 1):
        counts = start[length == size].bincount()
        assert len(counts) == POINTS - size
        assert scipy.stats.chisquare(counts.numpy()).pvalue > 0.01


def mean_of(z: Tensor, scale: Tensor) -> Tensor:
    """Return the mean of the Gaussian tokens, which depends on condition and guidance."""
    return scale.unsqueeze(-1) * z[..., :8]


def spread(t: Tensor) -> Tensor:
    return ((1 - t) ** 2 + (t * DEVIATION) ** 2).sqrt()


def exact_mean_velocity(x: Tensor, s: Tensor, t: Tensor, z: Tensor, scale: Tensor) -> Tensor:
    s, t = s.unsqueeze(-1), t.unsqueeze(-1)
    mean = mean_of(z, scale)
    return (t * mean + spread(t) / spread(s) * (x - s * mean) - x) / (t - s)


class StandIn(ExactNetwork):
    """Head network that returns a mean velocity of ``z`` and guidance scale; times are in units of ten."""

    def __init__(self, mean_velocity: Callable[..., Tensor]) -> None:
        super().__init__()
        self.mean_velocity = mean_velocity

    def forward(self, x: Tensor, condition: Tensor, start: Tensor, length: Tensor) -> Tensor:
        return self.mean_velocity(
            x, start / 10, (start + length) / 10, condition[..., :-1], condition[..., -1]
        )


def stand_in(task: DistillationTask, mean_velocity: Callable[..., Tensor]) -> None:
    task.module.head.network = StandIn(mean_velocity)
    task.module.head.embed_condition = lambda z, scale: torch.cat([z, scale.unsqueeze(-1)], dim=-1)  # type: ignore[assignment]


GROUPS = 5


@pytest.fixture
def exact_task(diffusion_folder: Path, tmp_path: Path) -> DistillationTask:
    """Task with exact trajectories of Gaussian tokens. The guidance scale k + 1 identifies group k."""
    rows, generator = GROUPS * GROUP, torch.Generator().manual_seed(0)
    z = 0.5 * torch.randn(rows, 3, 16, generator=generator)
    scale = (1.0 + torch.arange(rows) // GROUP).unsqueeze(1).expand(-1, 3)
    t = torch.linspace(0, 1, POINTS).view(-1, 1)
    noise = torch.randn(rows, 3, 1, 8, generator=generator)
    paths = t * mean_of(z, scale).unsqueeze(-2) + spread(t) * noise
    writer = ShardWriter(tmp_path / "rows", {"kind": "trajectories"})
    writer.write(
        {name: value.to(torch.float16) for name, value in (("z", z), ("scale", scale), ("paths", paths))},
        cursor=1,
    )
    writer.finish()
    config = DistillationConfig(training=LoopConfig(batch_size=2 * GROUP))
    task = DistillationTask(Pipeline.from_pretrained(diffusion_folder), config, tmp_path / "rows")
    stand_in(task, exact_mean_velocity)
    return task


def loss_of(task: DistillationTask) -> float:
    losses = []
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        losses.append(float(task.loss(step, task.batch(step, generator), generator)[0]))
    return sum(losses) / len(losses)


def test_exact_mean_velocity_has_no_loss(exact_task: DistillationTask) -> None:
    assert loss_of(exact_task) < 5e-4  # points of a trajectory are float16


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, s, t, z, scale: exact_mean_velocity(x, s, t, z, torch.ones_like(scale)),
        lambda x, s, t, z, scale: exact_mean_velocity(x, s, t, z.roll(1, 0), scale),
        lambda x, s, t, z, scale: exact_mean_velocity(x, t, s, z, scale),
        lambda x, s, t, z, scale: exact_mean_velocity(x, s, s + 1e-3, z, scale),
        lambda x, s, t, z, scale: (t - s).unsqueeze(-1) * exact_mean_velocity(x, s, t, z, scale),
        lambda x, s, t, z, scale: exact_mean_velocity(x, torch.zeros_like(s), t, z, scale),
    ],
    ids=["no scale", "another z", "backwards", "the velocity", "the way", "from noise"],
)
def test_wrong_mean_velocity_has_nonzero_loss(exact_task: DistillationTask, wrong: Any) -> None:
    stand_in(exact_task, wrong)
    assert loss_of(exact_task) > 0.02


def test_batches_are_whole_groups_without_the_held_out_one(exact_task: DistillationTask) -> None:
    assert exact_task.groups == GROUPS - 1
    seen: list[float] = []
    for step in range(6):
        scale = exact_task.batch(step, torch.Generator())["scale"]
        assert scale.shape == (2 * GROUP, 3)
        seen += [float(group.unique()) for group in scale.split(GROUP)]
    assert sorted(seen) == sorted(3 * [1.0, 2.0, 3.0, 4.0]), (
        "each epoch has every group but the last one once"
    )


def test_only_the_head_is_trained(exact_task: DistillationTask) -> None:
    trained = {
        id(parameter) for group in exact_task.parameter_groups(LoopConfig()) for parameter in group["params"]
    }
    assert trained == {
        id(parameter) for parameter in exact_task.module.parameters() if parameter.requires_grad
    }
    assert trained == {id(parameter) for parameter in exact_task.module.head.parameters()}
    assert [
        group["lr"]
        for group in exact_task.parameter_groups(LoopConfig(learning_rate=0.1, head_learning_rate=0.02))
    ] == [0.02]


def test_errors_are_measured_on_the_held_out_group(exact_task: DistillationTask, tmp_path: Path) -> None:
    def off_when_trained(x: Tensor, s: Tensor, t: Tensor, z: Tensor, scale: Tensor) -> Tensor:
        """Return 0.1 too much, and far more for all groups but the last, whose scale is 5."""
        off = torch.where(scale == GROUPS, 0.1, 7.0).unsqueeze(-1)
        return exact_mean_velocity(x, s, t, z, scale) + off

    stand_in(exact_task, off_when_trained)
    exact_task.teacher.autoencoder = None
    errors = exact_task.evaluate(exact_task.module, tmp_path, 3)
    assert set(errors) == {"error of 1 steps", "error of 2 steps", "error of 4 steps"}
    # The offset shrinks with the spread on the way to the data.
    half, one = (float(spread(torch.tensor(time))) for time in (0.5, 1.0))
    assert errors["error of 1 steps"] == pytest.approx(0.1, rel=0.02)
    assert errors["error of 2 steps"] == pytest.approx(0.05 * (1 + one / half), rel=0.02)
    assert not list(tmp_path.glob("*.safetensors")), "evaluation publishes nothing"


def test_exact_mean_velocity_has_no_error(exact_task: DistillationTask, tmp_path: Path) -> None:
    exact_task.teacher.autoencoder = None
    assert max(exact_task.evaluate(exact_task.module, tmp_path, 3).values()) < 0.005


def test_invalid_settings_are_rejected() -> None:
    for values, name in (
        ({"training": LoopConfig(batch_size=100)}, "batch_size .* 100"),
        ({"trajectories": TrajectoryConfig(images=64)}, "trajectories.images 64 "),
        ({"samples_per_token": 0}, "samples_per_token 0"),
        ({"adapter_rank": -1}, "adapter_rank -1"),
    ):
        with pytest.raises(InputError, match=name):
            DistillationConfig(**values)  # type: ignore[arg-type]


# --- The command ---------------------------------------------------------------------------------------

TINY = [
    "trajectories.images=192", "trajectories.tokens_per_image=2", "training.steps=4",
    "training.batch_size=64",
    "training.warmup_steps=2", "training.dtype=float32", "training.log_every=2",
]  # fmt: skip


def distill(teacher: Path, out: Path, *options: str) -> None:
    assert main(["distill", str(teacher), str(out), *TINY, *options]) == 0


def weights(folder: Path) -> dict[str, Tensor]:
    return Pipeline.from_pretrained(folder).model.state_dict()


@pytest.mark.parametrize(
    "teacher", ["diffusion_folder", "causal_diffusion_folder", "block_causal_diffusion_folder"]
)
def test_distilled_model_keeps_the_teachers_backbone_and_draws_in_few_steps(
    teacher: str,
    latents_folder: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = request.getfixturevalue(teacher), tmp_path / "out"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    distill(folder, out, "--latents", str(latents_folder))
    assert f"far generate --weights {out}" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert (out / "samples" / "step-00000004.png").stat().st_size > 100

    pipeline, original = far.load(out), far.load(folder)
    assert isinstance(original, Pipeline)
    head = pipeline.model.config.network.head
    assert (head.kind, head.width, head.depth, head.max_guidance) == ("flow_map", 16, 1, 4.0)
    assert pipeline.classes == original.classes
    assert pipeline.results["step"] == pipeline.training["finished steps"] == 4
    facts = pipeline.training["recipe"]
    assert facts.keys() == {field.name for field in dataclasses.fields(DistillationConfig)}
    assert facts["trajectories"]["max_guidance"] == 4.0
    assert "Training of the teacher" not in (out / "README.md").read_text()  # its training is unknown
    for name, tensor in original.model.backbone.state_dict().items():
        assert torch.equal(pipeline.model.backbone.state_dict()[name], tensor), name
    assert (pipeline.defaults.head_steps, pipeline.defaults.guidance) == (2, 3.0)
    one, two = (
        pipeline.generate([0, 1, 2], guidance=3.0, guidance_passes=passes, output="tensor")
        for passes in (1, 2)
    )
    for images in (one, two):
        assert isinstance(images, Tensor)
        assert images.shape == (3, 3, 16, 16)
        assert images.isfinite().all()
    assert not torch.equal(one, two)  # type: ignore[arg-type]


def test_errors_fall_for_an_easy_teacher(pipeline_folder: Path, tmp_path: Path) -> None:
    options = [
        "training.steps=80",
        "training.evaluate_every=10",
        "training.learning_rate=5.0e-3",
        "training.warmup_steps=30",
    ]
    distill(
        pipeline_folder, tmp_path / "out", *options, "training.ema_decay=0.9", "trajectories.max_guidance=2.0"
    )
    entries = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    for steps in (1, 2, 4):
        errors = [entry[f"error of {steps} steps"] for entry in entries if f"error of {steps} steps" in entry]
        assert len(errors) == 8
        assert errors[-1] < 0.6 * errors[0], (steps, errors)
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < 0.3 * losses[0]
    pipeline = Pipeline.from_pretrained(tmp_path / "out")
    assert pipeline.results["error of 1 steps"] == entries[-1]["error of 1 steps"]


@pytest.mark.parametrize("rank", [0, 2])
def test_resumed_distillation_equals_an_uninterrupted_one(
    rank: int, diffusion_folder: Path, tmp_path: Path
) -> None:
    options = ["training.schedule=constant", f"adapter_rank={rank}"]
    distill(diffusion_folder, tmp_path / "whole", *options)
    distill(diffusion_folder, tmp_path / "half", *options, "training.steps=2")
    halfway = weights(tmp_path / "half")
    distill(diffusion_folder, tmp_path / "half", *options, "--resume")
    whole, half = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert all(torch.equal(half[name], tensor) for name, tensor in whole.items())
    assert not all(torch.equal(half[name], tensor) for name, tensor in halfway.items())
    states = [newest(tmp_path / run) for run in ("whole", "half")]
    assert [state["step"] for state in states] == [4, 4]
    assert all(
        torch.equal(tensor, states[1]["tensors"][name]) for name, tensor in states[0]["tensors"].items()
    )


@pytest.mark.parametrize("teacher", ["diffusion_folder", "causal_diffusion_folder"])
def test_adapters_change_linear_layers_of_the_published_backbone_only(
    teacher: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The published model has the teacher's names and no adapters."""
    folder, out = request.getfixturevalue(teacher), tmp_path / "out"
    distill(folder, out, "adapter_rank=2", "training.ema_decay=0.5")
    old, new = (Pipeline.from_pretrained(path).model.backbone for path in (folder, out))
    linear = {f"{name}.weight" for name, layer in old.named_modules() if isinstance(layer, torch.nn.Linear)}
    changed = {
        name for name, tensor in old.state_dict().items() if not torch.equal(tensor, new.state_dict()[name])
    }
    assert changed == linear
    for name in linear:
        assert torch.linalg.matrix_rank(new.state_dict()[name] - old.state_dict()[name], atol=1e-5) <= 2, name
    assert Pipeline.from_pretrained(out).draw([0, 1], [1, 2]).isfinite().all()


def test_adapted_backbone_starts_with_the_conditions_on_disk(diffusion_folder: Path, tmp_path: Path) -> None:
    """So before the first step, its loss equals that of a training without adapters."""
    distill(diffusion_folder, tmp_path / "out")
    config = DistillationConfig(training=LoopConfig(batch_size=2 * GROUP), adapter_rank=2)
    task = DistillationTask(
        Pipeline.from_pretrained(diffusion_folder), config, tmp_path / "out" / "trajectories"
    )
    frozen = DistillationTask(
        task.teacher, dataclasses.replace(config, adapter_rank=0), tmp_path / "out" / "trajectories"
    )
    batch = task.batch(0, torch.Generator())
    assert len({int(group[0]) for group in batch["known"].split(GROUP)}) > 1, "the groups should differ"
    rows = ShardReader(tmp_path / "out" / "trajectories", "trajectories")
    written = [
        int((rows.all("paths") == path.half()).flatten(1).all(1).nonzero()[0]) for path in batch["paths"]
    ]
    from_disk = {**batch, "z": rows.all("z")[written].float()}
    for module in (task.module.head, frozen.module.head):  # random outputs that depend on the condition
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    losses = [
        float(each.loss(0, from_disk, torch.Generator().manual_seed(1))[0].detach())
        for each in (task, frozen)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    shuffled = {**from_disk, "z": from_disk["z"].roll(1, 0)}
    wrong = float(frozen.loss(0, shuffled, torch.Generator().manual_seed(1))[0].detach())
    assert wrong != pytest.approx(losses[1], rel=1e-2)


def test_run_is_not_resumed_with_another_adapter_rank(
    diffusion_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill(diffusion_folder, tmp_path / "out")
    capsys.readouterr()
    assert (
        main(["distill", str(diffusion_folder), str(tmp_path / "out"), *TINY, "adapter_rank=2", "--resume"])
        == 2
    )
    assert "step-00000004" in capsys.readouterr().err.splitlines()[-1]


# --- In several processes --------------------------------------------------------------------------------

SHARED = [
    "training.steps=20",
    "training.batch_size=256",
    "training.micro_batches=4",
    "trajectories.images=640",
    "training.log_every=1",
]


def in_two_processes(*arguments: object) -> list[object]:
    return [2, "-m", "far", "distill", *arguments, *TINY, *SHARED]


def assert_alike(actual: Path, expected: Path) -> None:
    """Compare trajectories bit by bit, and the losses of every step and the weights to 1e-5."""
    assert files(actual / "trajectories") == files(expected / "trajectories")
    entries = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (actual, expected)
    ]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in entries]
    assert len(losses[1]) == 20
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert newest(actual)["step"] == 20
    assert_close_checkpoints(newest(actual), newest(expected))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("teacher", "options"),
    [
        ("diffusion_folder", ["training.parallel=ddp"]),
        ("causal_diffusion_folder", ["training.parallel=fsdp", "adapter_rank=2"]),
    ],
    ids=["ddp", "fsdp with adapters"],
)
def test_two_processes_distill_as_one(
    teacher: str, options: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(teacher)
    distill(folder, tmp_path / "alone", *SHARED, *options)
    output = run(*in_two_processes(folder, tmp_path / "both", *options))
    assert output.count("far generate --weights") == 1
    assert_alike(tmp_path / "both", tmp_path / "alone")
    published, alone = (weights(tmp_path / name) for name in ("both", "alone"))
    for name, tensor in alone.items():
        torch.testing.assert_close(published[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_distillation_of_two_processes_resumes_in_one_after_a_kill(
    diffusion_folder: Path, tmp_path: Path
) -> None:
    killed, options = tmp_path / "killed", ["adapter_rank=2", "trajectories.images=1600"]
    process = start(*in_two_processes(diffusion_folder, killed), *options)
    index = killed / "trajectories" / "index.json"
    wait_for(lambda: index.exists() and read_json(index)["cursor"] >= 2)
    kill_one(process)
    assert not read_json(index)["complete"]
    distill(diffusion_folder, killed, *SHARED, *options)
    distill(diffusion_folder, tmp_path / "alone", *SHARED, *options)
    assert_alike(killed, tmp_path / "alone")


def test_micro_batches_that_cannot_be_shared_are_rejected_before_long_work(
    diffusion_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("far.cli.distill.joined", lambda: contextlib.nullcontext(Processes(1, 2)))
    assert main(["distill", str(diffusion_folder), str(tmp_path / "out"), *TINY]) == 2
    assert "training.micro_batches 1 " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- From MAR's published form ---------------------------------------------------------------------------


def test_converted_mar_checkpoint_is_distilled(diffusion_folder: Path, tmp_path: Path) -> None:
    teacher = Pipeline.from_pretrained(diffusion_folder)
    assert teacher.autoencoder is not None
    save_autoencoder(teacher.autoencoder, tmp_path / "mar")
    write_published(teacher.model, tmp_path / "checkpoint.pth")
    convert_mar(tmp_path / "checkpoint.pth", tmp_path / "mar")
    converted = Pipeline.from_pretrained(tmp_path / "mar")
    assert converted.defaults.ar_steps == 4  # the checkpoint has 8, but there are 4 tokens
    assert converted.defaults.head_steps == 100
    generator = torch.Generator().manual_seed(0)
    tokens, order = (
        torch.randn(4, 4, 8, generator=generator),
        torch.rand(4, 4, generator=generator).argsort(dim=1),
    )
    labels = torch.tensor([0, 1, 2, 3])  # the last one is the null label
    converted.model.head.config = teacher.model.head.config  # MAR's form has no token limit
    conditions, drawn = [], []
    for model in (teacher.model, converted.model):
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            conditions.append(model.backbone(tokens, order[:, :1], order[:, 1:], labels))
            drawn.append(
                draw(model.head, conditions[-1], lambda: torch.randn(4, 3, 8, generator=noise), steps=5)
            )
    torch.testing.assert_close(conditions[1], conditions[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-5, atol=1e-5)

    distill(tmp_path / "mar", tmp_path / "out", "trajectories.token_limit=3.0", "trajectories.images=128")
    published, original = weights(tmp_path / "out"), teacher.model.state_dict()
    assert all(
        torch.equal(tensor, original[name])
        for name, tensor in published.items()
        if name.startswith("backbone.")
    )
