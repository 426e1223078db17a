"""Exports to ONNX against torch: every backbone with every head, dtypes, errors."""

import dataclasses
import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_parts import BACKBONES, CLASSES, HEADS, Parts, config_of, latents, random_model, sampling
from PIL import Image
from refusals import refused
from test_tokenizers import saved
from torch import nn

import far.onnx
from far.autoencoder import Autoencoder
from far.autoencoder_config import DECODERS, SmallDecoderConfig
from far.cli.main import main
from far.folder import load_autoencoder
from far.heads.network import HeadNetwork
from far.names import bundled_names
from far.onnx.config import OnnxFile, open_export
from far.onnx.exporter import write_graphs
from far.onnx.graphs import DECODER, HEAD, Graph, _Step
from far.onnx.pipeline import Session
from far.pipeline import Pipeline, load
from far.sampling import Kept, SamplingConfig

TOLERANCE = 1e-3


@pytest.mark.parametrize(("backbone", "head"), [*itertools.product(BACKBONES, HEADS)])
def test_onnx_draws_the_latents_of_torch(parts: Parts, backbone: str, head: str, tmp_path: Path) -> None:
    model, exported = parts.torch(backbone, head), parts.onnx(backbone, head, tmp_path).model
    for given in ({}, {"guidance": 1.0}, {"guidance_interval": (0.0, 0.6), "guidance_passes": 2}):
        config = sampling(model, **given)
        expected = latents(model, config)
        torch.testing.assert_close(latents(exported, config), expected, atol=TOLERANCE, rtol=0)
        assert expected.std() > 0.1


@pytest.mark.parametrize("backbone", BACKBONES)
def test_onnx_redraws_around_kept_tokens_as_torch_does(parts: Parts, backbone: str, tmp_path: Path) -> None:
    model, exported = parts.torch(backbone, "shortcut"), parts.onnx(backbone, "shortcut", tmp_path).model
    given = torch.randn(2, 4, 3, 4, generator=torch.Generator().manual_seed(1))
    kept = Kept(given, torch.arange(5) if backbone == "causal" else torch.tensor([7, 2, 11]))
    config = sampling(model, ar_steps=12 - len(kept.positions))
    expected = latents(model, config, kept)
    torch.testing.assert_close(latents(exported, config, kept), expected, atol=TOLERANCE, rtol=0)


def test_onnx_reuses_the_guidance_of_earlier_steps_as_torch_does(parts: Parts, tmp_path: Path) -> None:
    model, exported = parts.torch("masked", "shortcut"), parts.onnx("masked", "shortcut", tmp_path).model
    config = sampling(model, guidance_every=2)
    torch.testing.assert_close(latents(exported, config), latents(model, config), atol=TOLERANCE, rtol=0)


def test_masked_exports_refuse_an_approximate_cache(parts: Parts, tmp_path: Path) -> None:
    pipeline = parts.onnx("masked", "shortcut", tmp_path)
    with refused("refresh_every 2"):
        pipeline.stream([0], [0], SamplingConfig(refresh_every=2))


def test_exports_draw_and_edit_the_images_of_torch(whole: Path, exported: Path) -> None:
    ours, theirs = far.onnx.load(exported), load(whole, device="cpu")
    assert ours.image_size == theirs.image_size
    assert ours.defaults == theirs.defaults
    labels, seeds = ["square", 2], [3, 4]
    images = ours.generate(labels, seed=seeds, output="tensor")
    expected = theirs.generate(labels, seed=seeds, output="tensor")
    torch.testing.assert_close(images, expected, atol=TOLERANCE, rtol=0)
    mask = torch.zeros(ours.image_size)
    mask[ours.image_size[0] // 2 :] = 1  # a causal model redraws to the end
    edits = [
        pipeline.edit(expected[0], mask, "circle", paste=False, output="tensor")
        for pipeline in (ours, theirs)
    ]
    torch.testing.assert_close(*edits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(ours.encode(expected), theirs.encode(expected), atol=TOLERANCE, rtol=0)


def test_exports_without_an_encoder_draw_but_do_not_edit(exported: Path, tmp_path: Path) -> None:
    """Check the folder of a web page, which has no encoder."""
    folder = tmp_path / "page"
    shutil.copytree(exported, folder)
    (folder / "encoder.onnx").unlink()
    values = json.loads((folder / "config.json").read_text())
    del values["onnx"]["files"]["encoder.onnx"]
    (folder / "config.json").write_text(json.dumps(values))
    pipeline = far.onnx.load(folder)
    images = pipeline.generate(["circle"], seed=0, output="tensor")
    assert torch.equal(images, far.onnx.load(exported).generate(["circle"], seed=0, output="tensor"))
    with refused("encoder.onnx"):
        pipeline.encode(images)


def test_generate_and_edit_take_an_export(whole: Path, exported: Path, tmp_path: Path) -> None:
    drawn = []
    for weights, dtype in ((whole, ["--dtype", "float32"]), (exported, [])):
        out = tmp_path / f"{len(drawn)}.png"
        command = ["generate", "--weights", str(weights), "--labels", "1", "--out", str(out), *dtype]
        assert main(command) == 0
        drawn.append(np.asarray(Image.open(out)).astype(int))
        edited = tmp_path / "edited.png"
        box = ["--redraw", "0", "8", "16", "12"]
        command = ["edit", str(out), "--weights", str(weights), "--label", "0", *box, "--out", str(edited)]
        assert main([*command, *dtype]) == 0
    assert abs(drawn[0] - drawn[1]).max() <= 1


def test_the_loop_names_every_file_and_input(exported: Path) -> None:
    onnx = json.loads((exported / "config.json").read_text())["onnx"]
    text = " ".join(onnx["loop"])
    for file, described in onnx["files"].items():
        if file != "encoder.onnx":  # for edits only
            assert file in text
        if file == "backbone.onnx":
            assert all(name in text for name in described["inputs"])


@pytest.mark.parametrize(("dtype", "most", "fraction"), [("float16", 1e-3, 0.55), ("int8", 0.05, 0.35)])
def test_smaller_dtypes_shrink_the_files_and_stay_near(
    dtype: str, most: float, fraction: float, tmp_path: Path
) -> None:
    network = HeadNetwork(8, 8, 48, width=128, depth=1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    inputs = {"x": ("rows", 8), "condition": ("rows", 128), "time": (128,)}
    graph = Graph(_Step(network), inputs, {"output": ("rows", 8)})
    outputs, sizes = [], []
    for name in ("float32", dtype):
        (tmp_path / name).mkdir()
        (described,) = write_graphs({HEAD: graph}, tmp_path / name, name).values()
        outputs.append(Session(tmp_path / name / HEAD, described)(**graph.examples())[0])
        sizes.append((tmp_path / name / HEAD).stat().st_size)
    error = (outputs[1] - outputs[0]).square().mean().sqrt() / outputs[0].std()
    assert 0 < error < most
    assert sizes[1] < fraction * sizes[0]


def test_float16_images_are_near_those_of_float32(whole: Path, exported: Path, tmp_path: Path) -> None:
    """float16 rounds a weight by up to 2⁻¹¹ of its size, and 12 AR steps pass the errors on."""
    far.onnx.export(whole, tmp_path / "float16", dtype="float16")
    pipelines = [far.onnx.load(folder) for folder in (tmp_path / "float16", exported)]
    images, expected = (one.generate([0, 1, 2], seed=3, output="tensor") for one in pipelines)
    error = (images - expected).square().mean().sqrt() / expected.std()
    assert 0 < error < 0.02  # 40 times the rounding


@pytest.mark.parametrize("name", ["SD3", "DC-AE"])
def test_models_on_autoencoders_of_diffusers_are_exported(name: str, tmp_path: Path) -> None:
    channels = saved(name, tmp_path / "vae").config.latent_channels
    autoencoder = load_autoencoder(f"diffusers:{tmp_path / 'vae'}", device="cpu")
    model = random_model(dataclasses.replace(config_of("causal", "energy"), latent_channels=channels))
    defaults = SamplingConfig(12, 1)
    Pipeline(model, autoencoder, CLASSES, defaults).save_pretrained(tmp_path / "model")
    theirs = load(tmp_path / "model", device="cpu")
    assert main(["export", "onnx", str(tmp_path / "model"), str(tmp_path / "onnx")]) == 0
    shutil.rmtree(tmp_path / "vae")  # the export does not need it
    ours = far.onnx.load(tmp_path / "onnx")
    images, expected = (one.generate([0, 1], seed=3, output="tensor") for one in (ours, theirs))
    assert expected.std() > 0.01
    torch.testing.assert_close(images, expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(ours.encode(expected), theirs.encode(expected), atol=TOLERANCE, rtol=TOLERANCE)


def test_an_export_can_have_the_small_decoder(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load(whole, device="cpu")
    assert isinstance(pipeline.autoencoder, Autoencoder)
    pipeline.autoencoder.set_small_decoder(SmallDecoderConfig(8, 1))
    pipeline.save_pretrained(tmp_path / "model")

    def decoder_alone(graphs: dict[str, Graph], folder: Path, dtype: str) -> dict[str, OnnxFile]:
        return write_graphs({DECODER: graphs[DECODER]}, folder, dtype)

    monkeypatch.setattr("far.onnx.exporter.write_graphs", decoder_alone)
    command = ["export", "onnx", str(tmp_path / "model"), str(tmp_path / "onnx"), "--decoder", "small"]
    assert main(command) == 0
    _, config, onnx = open_export(tmp_path / "onnx")
    assert config.results == {}  # those are of the full decoder
    assert onnx.decoder == "small"
    latents = torch.randn(2, 4, *pipeline.model.config.grid, generator=torch.Generator().manual_seed(1))
    (images,) = Session(tmp_path / "onnx" / DECODER, onnx.files[DECODER])(latents=latents)
    full, small = (
        load(tmp_path / "model", device="cpu", decoder=decoder).decode(latents) for decoder in DECODERS
    )
    torch.testing.assert_close(images.clamp(0, 1), small, atol=TOLERANCE, rtol=0)
    assert (full - small).abs().max() > 0.01


def test_exporting_a_small_decoder_that_is_missing_is_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["export", "onnx", str(whole), str(tmp_path / "onnx"), "--decoder", "small"]) == 2
    error = capsys.readouterr().err
    assert str(whole) in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_int8_images_do_not_depend_on_the_batch(whole: Path, tmp_path: Path) -> None:
    far.onnx.export(whole, tmp_path / "int8", dtype="int8")
    pipeline = far.onnx.load(tmp_path / "int8")
    labels, seeds = [0, 1, 2], [3, 4, 5]
    together = pipeline.generate(labels, seed=seeds, output="tensor")
    for label, seed, image in zip(labels, seeds, together, strict=True):
        assert torch.equal(pipeline.generate([label], seed=seed, output="tensor")[0], image)
    expected = load(whole, device="cpu").generate(labels, seed=seeds, output="tensor")
    assert 0 < (together - expected).square().mean().sqrt() < 0.3 * expected.std()
    mask = torch.zeros(pipeline.image_size)
    mask[pipeline.image_size[0] // 2 :] = 1
    edits = [pipeline.edit(expected[0], mask, 1, seed=seed, output="tensor") for seed in (seeds, seeds[1])]
    assert torch.equal(edits[0][1:2], edits[1])


@pytest.mark.parametrize(
    ("dtype", "remedy"), [("float32", "float16"), ("float16", "smaller model"), ("int8", "float16")]
)
def test_a_model_too_large_for_a_file_is_refused(
    dtype: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"x": ("rows", 8), "condition": ("rows", 24), "time": (24,)}
    graph = Graph(_Step(HeadNetwork(8, 8, 48, width=24, depth=1)), inputs, {"output": ("rows", 8)})
    monkeypatch.setattr("far.onnx.stored._MOST_BYTES", 1000)
    with refused(HEAD, "GiB", remedy):
        write_graphs({HEAD: graph}, tmp_path, dtype)
    assert not list(tmp_path.iterdir())


def test_the_current_folder_is_refused(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with refused("current folder"):
        far.onnx.export(whole, ".")
    assert tmp_path.is_dir()


def test_figures_of_the_model_are_not_those_of_an_int8_export(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("far.onnx.exporter.write_graphs", lambda graphs, folder, dtype: {})
    for dtype, results in (("float32", {"loss": 1.5}), ("int8", {})):
        far.onnx.export(whole, tmp_path / dtype, dtype=dtype)
        assert open_export(tmp_path / dtype)[1].results == results


# --- Errors
# ----------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    assert main(["export", "onnx", str(whole), str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_kind_that_cannot_be_exported_leaves_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("far.onnx.graphs._HEADS", ())
    with refused("energy"):
        far.onnx.export(whole, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_exporting_without_the_extra_names_it(
    package: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "far.onnx.stored", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with refused(package, "far-image[onnx]"):
        far.onnx.export(whole, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_drawing_without_the_extra_names_it(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with refused("onnxruntime", "far-image[onnx]"):
        far.onnx.load(exported)


@pytest.mark.parametrize("file", ["backbone.onnx", "head_condition.onnx"])
def test_a_truncated_or_missing_file_is_named(exported: Path, file: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    with refused(folder / file):
        far.onnx.load(folder)
    (folder / file).unlink()
    with refused(folder / file):
        far.onnx.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["onnx"].pop("files"),
        lambda values: values["onnx"]["files"].pop("backbone.onnx"),
        lambda values: values["onnx"].update(dtype="int4"),
        lambda values: values.pop("model"),
        lambda values: values.update(onnx=[]),
    ],
)
def test_a_damaged_config_is_named(exported: Path, change: object, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    values = json.loads((folder / "config.json").read_text())
    change(values)  # type: ignore[operator]
    (folder / "config.json").write_text(json.dumps(values))
    with refused(folder / "config.json"):
        far.onnx.load(folder)


def test_models_and_exports_are_not_mistaken_for_each_other(whole: Path, exported: Path) -> None:
    with refused(whole / "config.json"):
        far.onnx.load(whole)
    with refused(exported / "config.json", "far.onnx.load"):
        load(exported)


@pytest.mark.parametrize("option", [["--dtype", "int8"], ["--device", "cuda"], ["--fast"], ["--compile"]])
def test_options_of_torch_are_refused_for_an_export(
    option: list[str], exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out.png"
    assert main(["generate", "--weights", str(exported), "--out", str(out), *option]) == 2
    assert " ".join(option) in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.soak
@pytest.mark.parametrize("name", bundled_names())
def test_bundled_models_draw_the_images_of_torch(name: str, tmp_path: Path) -> None:
    far.onnx.export(name, tmp_path / "onnx")
    ours, theirs = far.onnx.load(tmp_path / "onnx"), load(name, device="cpu")
    labels = range(len(theirs.classes))
    images, expected = (pipeline.generate(labels, seed=0, output="tensor") for pipeline in (ours, theirs))
    torch.testing.assert_close(images, expected, atol=TOLERANCE, rtol=0)
