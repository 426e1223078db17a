"""Models of the hub: huggingface_hub's own client against a hub on this machine."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import TOKEN, Files, Hub, serve, use
from PIL import Image
from safetensors.torch import load_file

import far
from far import InputError, Pipeline
from far.cli.main import main


def files_of(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as hub:
        use(hub, monkeypatch, tmp_path / "cache")
        yield hub


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def refused(name: str | Path, *expected: str, **options: object) -> str:
    """Check that loading fails with one line that names ``expected``."""
    with pytest.raises(InputError) as caught:
        far.load(name, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    for text in expected:
        assert text in message, message
    return message


def same_weights(one: Pipeline, other: Pipeline) -> bool:
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_only_config_and_safetensors_are_downloaded(hub: Hub, pipeline_folder: Path, tmp_path: Path) -> None:
    stray = {
        name: b"never to be read"
        for name in (
            "evil.pkl",
            "pytorch_model.bin",
            "modeling.py",
            "vae/model.safetensors",
            "../up.safetensors",
        )
    }
    hub.commit("ann/shapes", {**files_of(pipeline_folder), **stray})
    pipeline = Pipeline.from_pretrained("ann/shapes")
    assert hub.downloaded() == ["autoencoder.safetensors", "config.json", "model.safetensors"]
    assert {
        path.name for path in (tmp_path / "cache").rglob("*") if path.suffix in (".pkl", ".bin", ".py")
    } == set()
    assert same_weights(pipeline, Pipeline.from_pretrained(pipeline_folder))
    hub.requests.clear()
    far.load("ann/shapes")
    assert hub.downloaded() == []


def test_folder_is_preferred_to_a_name_on_the_hub(
    hub: Hub, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("ann/shapes", {"config.json": b"{}"})
    monkeypatch.chdir(tmp_path)
    Path("ann").mkdir()
    Path("ann/shapes").symlink_to(pipeline_folder)
    far.load("ann/shapes")
    refused("ann/shapes", "'ann/shapes'", "'v1'", revision="v1")
    refused("avatars-64", "'avatars-64'", "'v1'", revision="v1")
    refused(Path("ann/other"), "'ann/other'")  # a Path is never a name
    refused(Path("avatars-64"), "'avatars-64'")
    refused("./ann/other", "'./ann/other'")
    assert hub.requests == []


def test_revision_is_a_branch_a_commit_or_part_of_the_name(hub: Hub, pipeline_folder: Path) -> None:
    config = json.loads((pipeline_folder / "config.json").read_text())

    def named(*classes: str) -> Files:
        return {
            **files_of(pipeline_folder),
            "config.json": json.dumps({**config, "classes": classes}).encode(),
        }

    first = hub.commit("ann/shapes", named("a", "b", "c"))
    hub.commit("ann/shapes", named("d", "e", "f"), branch="refs/pr/1")
    hub.commit("ann/shapes", named("g", "h", "i"))

    def classes(name: str, **options: str) -> str:
        return "".join(Pipeline.from_pretrained(name, **options).classes)  # type: ignore[arg-type]

    assert classes("ann/shapes") == "ghi"
    assert classes("ann/shapes", revision=first) == classes(f"ann/shapes@{first}") == "abc"
    assert classes("ann/shapes", revision="refs/pr/1") == classes("ann/shapes@refs/pr/1") == "def"
    refused("ann/shapes", "ann/shapes", "'v9'", revision="v9")
    refused("ann/shapes@v9", "ann/shapes", "'v9'")
    refused("ann/shapes@v8", "'ann/shapes@v8'", "'v9'", revision="v9")


def test_autoencoder_alone_is_loaded_by_its_own_function(hub: Hub, autoencoder_folder: Path) -> None:
    hub.commit("ann/kl16", files_of(autoencoder_folder))
    assert isinstance(far.load_autoencoder("ann/kl16"), far.Autoencoder)
    refused("ann/kl16", "load_autoencoder")


def test_offline_mode_uses_the_cache_alone(
    hub: Hub, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.commit("ann/shapes", files_of(pipeline_folder))
    refused("ann/shapes", "'ann/shapes'", "local_files_only", local_files_only=True)
    assert hub.requests == []
    far.load("ann/shapes")
    hub.requests.clear()
    for name in ("ann/shapes", f"ann/shapes@{commit}"):
        far.load(name, local_files_only=True)
    offline(monkeypatch)
    far.load("ann/shapes")
    refused("ann/shapes@v2", "'ann/shapes'", "'v2'", "HF_HUB_OFFLINE")
    refused("ann/other", "'ann/other'", "HF_HUB_OFFLINE")
    assert hub.requests == []


def test_hub_that_does_not_answer_leaves_the_cache_usable(
    hub: Hub, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("ann/shapes", files_of(pipeline_folder))
    far.load("ann/shapes")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # discard; nobody listens
    far.load("ann/shapes")  # from the cache
    refused("ann/other", "'ann/other'")
    with pytest.raises(InputError, match="ann/shapes") as caught:
        Pipeline.from_pretrained(pipeline_folder).push_to_hub("ann/shapes", license="mit")
    assert "\n" not in str(caught.value)


def test_missing_and_gated_models_are_refused_with_a_remedy(hub: Hub, pipeline_folder: Path) -> None:
    refused("ann/nothing", "'ann/nothing'", "hf auth login")
    hub.commit("ann/gated", files_of(pipeline_folder))
    hub.gated.add("ann/gated")
    refused("ann/gated", "ann/gated", f"{hub.url}/ann/gated", "hf auth login")
    refused("ann/a--b", "'ann/a--b'")


@pytest.mark.parametrize(
    "files", [{"mar.pth": b"x"}, {"config.json": b"{}", "pytorch_model.bin": b"x"}, {"a/config.json": b"{}"}]
)
def test_repository_without_safetensors_is_refused_and_not_downloaded(hub: Hub, files: Files) -> None:
    hub.commit("ann/pickles", files)
    refused("ann/pickles", "ann/pickles", "config.json", "far convert mar")
    assert [name for name in hub.downloaded() if name != "config.json"] == []


def broken(config: bytes, **changes: object) -> bytes:
    return json.dumps({**json.loads(config), **changes}).encode()


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("config.json", lambda data: data[:40], "config.json"),
        ("config.json", lambda data: b"[" * 100_000, "config.json"),
        (
            "config.json",
            lambda data: data.replace(b'"classes": 3', b'"classes": 1' + b"1" * 5000),
            "config.json",
        ),
        ("config.json", lambda data: b'{"model_type": "bert"}', "'model_type'"),
        ("config.json", lambda data: broken(data, classes=3), "config.json: classes"),
        ("config.json", lambda data: broken(data, classes=["a", "b", 3]), "config.json: classes"),
        ("config.json", lambda data: broken(data, results="good"), "config.json: results"),
        ("config.json", lambda data: broken(data, training=[1]), "config.json: training"),
        (
            "config.json",
            lambda data: data.replace(b'"buffer": 2', b'"buffer": 3'),
            "backbone.encoder_positions",
        ),
        ("model.safetensors", lambda data: data[:-1], "model.safetensors"),
        ("model.safetensors", lambda data: data[:9], "model.safetensors"),
        ("model.safetensors", lambda data: b"\x80\x04pickle", "model.safetensors"),
        ("autoencoder.safetensors", lambda data: data[:-1], "autoencoder.safetensors"),
        ("model.safetensors", lambda data: data.replace(b'"head.net', b'"haed.net'), "model.safetensors"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(
    hub: Hub, pipeline_folder: Path, file: str, change: object, expected: str
) -> None:
    files = files_of(pipeline_folder)
    files[file] = change(files[file])  # type: ignore[operator]
    hub.commit("ann/shapes", files)
    refused("ann/shapes", expected)


def test_pushed_model_can_be_loaded(hub: Hub, pipeline_folder: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.from_pretrained(pipeline_folder)
    address = pipeline.push_to_hub("ann/shapes", license="mit")
    assert address == f"{hub.url}/ann/shapes"
    assert same_weights(pipeline, Pipeline.from_pretrained("ann/shapes"))
    published = hub.files[hub.branches["ann/shapes"]["main"]]
    assert sorted(published) == [
        ".gitattributes",
        "README.md",
        "autoencoder.safetensors",
        "config.json",
        "model.safetensors",
    ]
    card = published["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit"
    assert 'far.load("ann/shapes")' in card
    assert str(tmp_path) not in card
    assert hub.private == set()
    assert len(hub.messages) == 1


def test_push_can_go_to_a_private_branch_in_half_precision(
    hub: Hub, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")  # the one that is given counts
    pipeline = Pipeline.from_pretrained(pipeline_folder)
    pipeline.push_to_hub(
        "ann/shapes@half",
        license="other",
        private=True,
        dtype=torch.float16,
        commit_message="Half the size",
        token=TOKEN,
    )
    assert hub.private == {"ann/shapes"}
    assert hub.messages == ["Half the size"]
    assert list(hub.files[hub.branches["ann/shapes"]["main"]]) == [".gitattributes"]
    (tmp_path / "half").write_bytes(hub.files[hub.branches["ann/shapes"]["half"]]["model.safetensors"])
    assert {tensor.dtype for tensor in load_file(tmp_path / "half").values()} == {torch.float16}


def test_card_that_somebody_wrote_stays_on_the_hub(hub: Hub, pipeline_folder: Path) -> None:
    pipeline = Pipeline.from_pretrained(pipeline_folder)

    def card_after_pushing() -> str:
        pipeline.push_to_hub("ann/shapes", license="mit")
        return hub.files[hub.branches["ann/shapes"]["main"]]["README.md"].decode()

    hub.commit(
        "ann/shapes", {"README.md": b"---\nlicense: other\n---\n"}
    )  # as the hub makes it for a new repository
    first = card_after_pushing()
    assert "license: mit" in first
    pipeline.results = {"step": 9}
    renewed = card_after_pushing()
    assert "| step | 9 |" in renewed
    (mark,) = [line for line in renewed.splitlines() if line.startswith("<!--")]
    own = renewed.replace(mark, "A fine model.")
    hub.commit("ann/shapes", {"README.md": own.encode()})
    pipeline.results = {"step": 10}
    assert card_after_pushing() == own
    published = hub.files[hub.branches["ann/shapes"]["main"]]
    assert json.loads(published["config.json"])["results"] == {"step": 10}


def test_card_stays_if_the_hub_does_not_return_its_text(
    hub: Hub, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline.from_pretrained(pipeline_folder)
    pipeline.push_to_hub("ann/shapes", license="mit")
    pipeline.push_to_hub("ann/shapes", license="mit")  # has seen the card that was written here
    hub.commit("ann/shapes", {"README.md": b"# By Ann"})
    # Only the file's own address fails, as it may for a moment.
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        hub.url + "/away/{repo_id}/{revision}/{filename}",
    )
    with pytest.raises(InputError, match="404"):
        pipeline.push_to_hub("ann/shapes", license="mit")
    assert hub.files[hub.branches["ann/shapes"]["main"]]["README.md"] == b"# By Ann"


def test_refused_push_is_one_line_and_changes_nothing(
    hub: Hub, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline.from_pretrained(pipeline_folder)

    def push_refused(name: str, license: str, *expected: str) -> None:
        with pytest.raises(InputError) as caught:
            pipeline.push_to_hub(name, license=license)
        assert "\n" not in str(caught.value)
        for text in expected:
            assert text in str(caught.value)

    push_refused("shapes", "mit", "'shapes'", "OWNER/NAME")
    assert hub.branches == {}
    push_refused("ann/shapes", "whatever", "ann/shapes", '"license"')
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    push_refused("ann/shapes", "mit", "ann/shapes", "hf auth login")
    offline(monkeypatch)
    push_refused("ann/shapes", "mit", "ann/shapes", "HF_HUB_OFFLINE")
    assert hub.messages == []


def test_private_push_into_a_public_repository_is_refused_and_changes_nothing(
    hub: Hub, pipeline_folder: Path
) -> None:
    pipeline = Pipeline.from_pretrained(pipeline_folder)
    pipeline.push_to_hub("ann/shapes", license="mit")
    before = {name: dict(branches) for name, branches in hub.branches.items()}
    with pytest.raises(InputError, match="ann/shapes") as caught:
        pipeline.push_to_hub("ann/shapes@v1", license="mit", private=True)
    assert "\n" not in str(caught.value)
    assert (hub.branches, hub.private, len(hub.messages)) == (before, set(), 1)


def test_failure_of_the_hubs_storage_is_one_line(hub: Hub, pipeline_folder: Path) -> None:
    hub.storage = "nowhere"  # hf_xet raises a plain RuntimeError for it
    with pytest.raises(InputError, match="ann/shapes") as caught:
        Pipeline.from_pretrained(pipeline_folder).push_to_hub("ann/shapes", license="mit")
    assert type(caught.value.__cause__) is RuntimeError
    assert "\n" not in str(caught.value)
    assert hub.messages == []


def test_save_load_save_gives_equal_files(pipeline_folder: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.from_pretrained(pipeline_folder)
    pipeline.results, pipeline.training = (
        {"step": 3, "quick FD": 1 / 3},
        {"command": "far train", "recipe": {"label_drop": 0.1}},
    )
    pipeline.save_pretrained(tmp_path / "once")
    Pipeline.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    assert files_of(tmp_path / "once") == files_of(tmp_path / "twice")
    assert sorted(files_of(tmp_path / "once")) == [
        "README.md",
        "autoencoder.safetensors",
        "config.json",
        "model.safetensors",
    ]


def test_command_line_pushes_and_draws_offline(hub: Hub, pipeline_folder: Path, tmp_path: Path) -> None:
    """Run commands in separate processes, with the environment variables that users set."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
    }

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "far", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={**environment, **variables})

    pushed = run(
        "push", str(pipeline_folder), "ann/shapes@v1", "--license", "mit", "--private", "--dtype", "bfloat16"
    )
    assert pushed.returncode == 0, pushed.stderr
    assert f"{hub.url}/ann/shapes" in pushed.stdout
    assert hub.private == {"ann/shapes"}
    draw = ("generate", "--weights", "ann/shapes@v1", "--out", str(tmp_path / "a.png"))
    assert run(*draw, HF_HUB_OFFLINE="1").returncode == 2
    drawn = run(*draw)
    assert drawn.returncode == 0, drawn.stderr
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    hub.requests.clear()
    assert run(*draw, HF_HUB_OFFLINE="1").returncode == 0
    assert hub.requests == []
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    anonymous = run(*draw, HF_TOKEN="", HF_HOME=str(tmp_path / "elsewhere"))
    assert anonymous.returncode == 2
    assert re.fullmatch(r"far: error: .*'ann/shapes'.*hf auth login\n", anonymous.stderr), anonymous.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--weights", "ann/nothing"],
        ["edit", "a.png", "--label", "0", "--keep", "0", "0", "8", "8", "--weights", "ann/nothing"],
        ["benchmark", "--models", "ann/nothing"],
        ["demo", "--weights", "ann/nothing"],
        ["evaluate", "--weights", "ann/nothing", "--save-statistics", "a.npz"],
        ["distill", "ann/nothing", "out"],
        ["push", "ann/nothing", "ann/shapes", "--license", "mit"],
        ["convert", "to-diffusers", "ann/nothing", "out"],
        ["export", "diffusers", "ann/nothing", "out"],
    ],
)
def test_every_command_with_weights_looks_on_the_hub(
    command: list[str],
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("a.png")
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "'ann/nothing'" in error
    assert error.count("\n") == 1
    assert hub.requests != []


def test_importing_far_does_not_import_the_hubs_client() -> None:
    code = "import far, sys; far.load('avatars-64'); print('huggingface_hub' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
