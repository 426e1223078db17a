"""Models of far as pipelines of diffusers: diffusers loads the folder, and far draws the same images."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, NETWORK
from diffusers import AutoencoderDC, AutoencoderKL, DiffusionPipeline
from hub_server import serve, use
from PIL import Image
from refusals import refused
from safetensors.torch import load_file
from test_tokenizers import saved

import far
from far.autoencoder import Autoencoder, AutoencoderConfig
from far.cli.main import main
from far.diffusers_pipeline import FARModel, FARPipeline, export_diffusers
from far.model import FAR, ModelConfig
from far.pipeline import Pipeline
from far.sampling import SamplingConfig

EXACT = 1e-4  # an AutoencoderKL of diffusers rounds in another order than ours


@pytest.fixture(autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let diffusers copy the code of folders to a temporary one, and show no progress bars."""
    folder = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", folder)


@pytest.fixture(scope="module")
def folder(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "shapes"
    assert main(["export", "diffusers", str(pipeline_folder), str(out)]) == 0
    return out


def opened(folder: Path | str, **options: Any) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def check_same_images(pipeline: Any, reference: Pipeline, **options: Any) -> None:
    """One generator per image gives the images that far draws from their seeds."""
    labels = [1, len(reference.classes) - 1]
    drawn = pipeline(labels, generator=seeded(3, 4), output_type="pt", **options).images
    names = {"num_inference_steps": "ar_steps", "guidance_scale": "guidance"}
    sampling = {names.get(name, name): value for name, value in options.items()}
    expected = reference.generate(labels, seed=[3, 4], output="tensor", **sampling)
    assert expected.std() > 0.01
    torch.testing.assert_close(drawn, expected, atol=EXACT, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_inference_steps": 2, "guidance_scale": 3.0},
        {"head_steps": 1, "temperature": 0.7, "order": "halton"},
    ],
)
def test_images_are_those_of_far(folder: Path, pipeline_folder: Path, options: dict[str, Any]) -> None:
    check_same_images(opened(folder), far.load(pipeline_folder), **options)


def test_folder_is_a_custom_pipeline_too(folder: Path, pipeline_folder: Path) -> None:
    check_same_images(opened(folder, custom_pipeline=str(folder)), far.load(pipeline_folder))


def test_causal_model_with_diffusion_head_draws_the_same(
    causal_diffusion_folder: Path, tmp_path: Path
) -> None:
    reference = far.load(causal_diffusion_folder)
    export_diffusers(reference, str(tmp_path / "out"))
    pipeline = opened(tmp_path / "out")
    check_same_images(pipeline, reference)
    with refused("ar_steps 3"):
        pipeline([0], num_inference_steps=3)


def test_bundled_model_draws_the_same(tmp_path: Path) -> None:
    reference = far.load("avatars-64-mar")
    export_diffusers(reference, tmp_path / "out")
    check_same_images(opened(tmp_path / "out"), reference, num_inference_steps=2, head_steps=2)


@pytest.mark.parametrize(("name", "kind"), [("SD3", AutoencoderKL), ("DC-AE", AutoencoderDC)])
def test_autoencoder_of_diffusers_is_copied(name: str, kind: type, tmp_path: Path) -> None:
    theirs = saved(name, tmp_path / "vae")
    autoencoder = far.load_autoencoder(f"diffusers:{tmp_path / 'vae'}")
    torch.manual_seed(0)
    model = FAR(ModelConfig(NETWORK, len(CLASSES), theirs.config.latent_channels, (2, 2)))
    reference = Pipeline(model, autoencoder, CLASSES, SamplingConfig(ar_steps=1, head_steps=1))
    export_diffusers(reference, tmp_path / "out")
    pipeline = opened(tmp_path / "out")
    assert type(pipeline.vae) is kind
    check_same_images(pipeline, reference)
    assert str(tmp_path) not in (tmp_path / "out/README.md").read_text()


def test_bar_and_callback_move_with_ar_steps(folder: Path, capsys: pytest.CaptureFixture) -> None:
    pipeline = opened(folder)
    pipeline.set_progress_bar_config(disable=False, bar_format="{n}/{total}\n", mininterval=0)
    seen = []

    def callback(given: Any, step: int, timestep: int, tensors: dict[str, torch.Tensor]) -> None:
        seen.append((given is pipeline, step, int((tensors["latents"] == 0).sum())))

    capsys.readouterr()
    names = {"callback_on_step_end_tensor_inputs": ["latents"]}
    pipeline([0], num_inference_steps=3, callback_on_step_end=callback, **names)
    assert "3/3" in capsys.readouterr().err
    assert [(same, step) for same, step, _ in seen] == [(True, 0), (True, 1), (True, 2)]
    missing = [zeros for *_, zeros in seen]
    assert missing == sorted(missing, reverse=True)
    assert missing[0] > missing[-1] == 0


def test_interrupt_ends_the_drawing(folder: Path) -> None:
    pipeline, steps = opened(folder), []

    def callback(given: Any, step: int, *_: Any) -> None:
        steps.append(step)
        given._interrupt = step == 1

    latents = pipeline([0], callback_on_step_end=callback, output_type="latent").images
    assert steps == [0, 1]
    assert (latents == 0).any()
    assert (pipeline([0], output_type="latent").images != 0).all()  # the next drawing is whole


def test_one_generator_serves_all_images_and_moves_on(folder: Path) -> None:
    pipeline = opened(folder)

    def draw(labels: list[int], generator: Any) -> torch.Tensor:
        return pipeline(labels, generator=generator, output_type="pt").images

    first, second = draw([0, 0], *seeded(5))
    assert not torch.equal(first, second)
    torch.testing.assert_close(draw([0, 0], *seeded(5)), torch.stack([first, second]))
    generator = seeded(5)[0]
    alone, later = draw([0], generator), draw([0], generator)
    torch.testing.assert_close(alone, draw([0], seeded(5)))
    assert not torch.equal(alone, later)
    torch.manual_seed(6)
    unseeded = [draw([0], None), draw([0], None)]
    torch.manual_seed(6)
    torch.testing.assert_close(draw([0], None), unseeded[0])
    assert not torch.equal(*unseeded)


def test_outputs_have_the_forms_of_diffusers(folder: Path) -> None:
    pipeline = opened(folder)

    def draw(**options: Any) -> Any:
        return pipeline(["stripes", 2], generator=seeded(0, 0), **options)

    tensor = draw(output_type="pt").images
    assert torch.equal(tensor[0], tensor[1])  # the name and number of one class
    array = draw(output_type="np", return_dict=False)[0]
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    pictures = draw().images
    assert all(isinstance(picture, Image.Image) for picture in pictures)
    np.testing.assert_allclose(np.asarray(pictures[0]) / 255, array[0], atol=0.5 / 255 + 1e-6)


def test_pipeline_saved_by_diffusers_loads_again(folder: Path, pipeline_folder: Path, tmp_path: Path) -> None:
    opened(folder).save_pretrained(tmp_path / "again")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    again = {path.relative_to(tmp_path / "again").as_posix() for path in (tmp_path / "again").rglob("*.*")}
    assert names - {"README.md"} == again
    assert not [name for name in names if name.endswith((".bin", ".pt", ".ckpt"))]
    check_same_images(opened(tmp_path / "again"), far.load(pipeline_folder))


def test_half_precision_is_written_and_read(pipeline_folder: Path, tmp_path: Path) -> None:
    command = ["export", "diffusers", str(pipeline_folder), str(tmp_path / "out"), "--dtype", "float16"]
    assert main(command) == 0
    for part in ("transformer", "vae"):
        weights = load_file(tmp_path / "out" / part / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    reference = far.load(pipeline_folder).generate([0], seed=1, output="tensor")
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = opened(tmp_path / "out", dtype=dtype).to("cpu")
        assert pipeline.transformer.dtype == pipeline.vae.dtype == dtype
        drawn = pipeline([0], generator=seeded(1), output_type="pt").images
        assert (drawn - reference).abs().mean() < 0.05


def test_packed_weights_are_exported_as_plain_ones(pipeline_folder: Path) -> None:
    packed = far.load(pipeline_folder, dtype="bfloat16")
    exported = FARPipeline.from_far(packed).transformer.far.state_dict()
    plain = far.load(pipeline_folder).model.state_dict()
    assert exported.keys() == plain.keys()
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, plain[name].bfloat16().float(), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ({"class_labels": ["hexagon"]}, "'hexagon'"),
        ({"class_labels": []}, "class_labels"),
        ({"class_labels": 3}, "class_labels"),
        ({"class_labels": [0], "num_inference_steps": 99}, "99"),
        ({"class_labels": [0], "gudance": 2.0}, "'gudance'"),
        ({"class_labels": [0], "output_type": "jpg"}, "'jpg'"),
        ({"class_labels": [0, 1], "generator": seeded(0)}, "1 generators for 2"),
        ({"class_labels": [0], "num_inference_steps": 2, "ar_steps": 3}, "ar_steps"),
        ({"class_labels": [0], "guidance_scale": 2.0, "guidance": 3.0}, "guidance_scale"),
        ({"class_labels": [0], "callback_on_step_end_tensor_inputs": ["timesteps"]}, "'timesteps'"),
    ],
)
def test_bad_calls_are_errors_of_one_line(folder: Path, call: dict[str, Any], named: str) -> None:
    with refused(named):
        opened(folder)(**call)


def test_wrong_configuration_of_the_generator_is_named(folder: Path, tmp_path: Path) -> None:
    config = dict(json.loads((folder / "transformer/config.json").read_text()))
    config["network"]["patch"] = 3
    with refused("transformer/config.json", "patch"):
        FARModel.from_config(config)


def test_models_that_cannot_be_exported_are_refused(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    reference = far.load(pipeline_folder)
    out = tmp_path / "out"
    with refused("int8"):
        export_diffusers(far.load("avatars-64", dtype="int8"), out)
    sphere = Autoencoder(AutoencoderConfig(width=8, latent_channels=2, norm_groups=4, spherical=True))
    with refused("spherical"):
        export_diffusers(Pipeline(reference.model, sphere, CLASSES, reference.defaults), out)
    with refused("autoencoder"):
        export_diffusers(Pipeline(reference.model, None, CLASSES, reference.defaults), out)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("kept")
    for place in (tmp_path / "full", tmp_path / "full/mine.txt"):
        assert main(["export", "diffusers", str(pipeline_folder), str(place)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert str(place) in error
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_folder_without_far_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "far.diffusers_pipeline", None)  # as if it were not installed
    for file in ("pipeline.py", "transformer/far_model.py"):
        code = compile((folder / file).read_text(), file, "exec")
        with refused("far-image", error=ImportError):
            exec(code, {})


def test_command_without_diffusers_says_what_to_install(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "far.diffusers_pipeline")
    monkeypatch.delattr(far, "diffusers_pipeline")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    out = str(tmp_path / "out")
    for command in (
        ["export", "diffusers", str(pipeline_folder), out],
        ["push", str(pipeline_folder), "ann/shapes", "--license", "mit", "--diffusers"],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "far-image[diffusers]" in error
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_pushed_pipeline_loads_from_the_hub(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with serve() as hub:
        use(hub, monkeypatch, tmp_path / "cache")
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
        command = ["push", str(pipeline_folder), "ann/shapes", "--license", "mit", "--diffusers"]
        assert main([*command, "--private"]) == 0
        assert f"{hub.url}/ann/shapes" in capsys.readouterr().out
        assert hub.private == {"ann/shapes"}
        card = hub.files[hub.branches["ann/shapes"]["main"]]["README.md"].decode()
        assert "library_name: diffusers\nlicense: mit" in card
        assert 'from_pretrained("ann/shapes", trust_remote_code=True)' in card
        pipeline = opened("ann/shapes", cache_dir=tmp_path / "cache")
        assert not [path for path in hub.downloaded() if path.endswith((".bin", ".pkl"))]
    check_same_images(pipeline, far.load(pipeline_folder))


def test_card_of_a_branch_loads_that_branch(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with serve() as hub:
        use(hub, monkeypatch, tmp_path / "cache")
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
        assert main(["push", str(pipeline_folder), "ann/shapes@v1", "--license", "mit", "--diffusers"]) == 0
        assert list(hub.files[hub.branches["ann/shapes"]["main"]]) == [".gitattributes"]
        card = hub.files[hub.branches["ann/shapes"]["v1"]]["README.md"].decode()
        exec(card.split("```python\n")[1].split("```")[0])
    (expected,) = far.load(pipeline_folder).generate(["circle"], seed=0)
    difference = np.asarray(Image.open("image.png")).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 1


def test_push_into_a_repository_of_the_other_form_is_refused(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with serve() as hub:
        use(hub, monkeypatch, tmp_path / "cache")
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
        for name, form, other in (("ann/a", [], ["--diffusers"]), ("ann/b", ["--diffusers"], [])):
            command = ["push", str(pipeline_folder), name, "--license", "mit"]
            assert main([*command, *form]) == 0
            held = hub.files[hub.branches[name]["main"]]
            capsys.readouterr()
            assert main([*command, *other]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert name in error
            assert hub.files[hub.branches[name]["main"]] == held
            assert main([*command, *form]) == 0  # the same form again


def test_code_in_the_card_draws_an_image(
    folder: Path, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    card = Path("README.md").read_text()
    exec(card.split("```python\n")[1].split("```")[0])
    picture = Image.open("image.png")
    Path("image.png").unlink()
    (expected,) = far.load(pipeline_folder).generate(["circle"], seed=0)
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected)).max() <= 1
    weights = load_file("transformer/diffusion_pytorch_model.safetensors")
    assert f"| parameters of the generator | {sum(t.numel() for t in weights.values()):,} |" in card
