"""Conversion of published checkpoints: results and refusals. Parity is tested in tests/reference."""

import argparse
import collections
import fractions
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import far
from far.autoencoder import Autoencoder
from far.convert import convert_kl16, convert_mar
from far.errors import InputError

FIXTURES = Path(__file__).parent / "reference" / "fixtures"
MAR = FIXTURES / "mar_reference_checkpoint.pth"


def read_mar() -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(MAR, weights_only=True)


@pytest.fixture
def kl16(tmp_path: Path) -> Path:
    """Write the reference autoencoder as a published file, with the 16 latent channels of the MAR fixture."""
    tensors = load_file(FIXTURES / "kl16_reference.safetensors")
    weights = {
        name.removeprefix("weights."): tensor
        for name, tensor in tensors.items()
        if name.startswith("weights.")
    }
    torch.save({"model": weights}, tmp_path / "kl16.ckpt")
    return tmp_path / "kl16.ckpt"


def refusal(convert: Callable[..., None], source: Path, folder: Path, **options: Any) -> str:
    """Return the error of a conversion after checking that it is one line and that nothing was written."""
    before = snapshot(folder)
    with pytest.raises(InputError) as caught:
        convert(source, folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message
    assert snapshot(folder) == before
    return message


def snapshot(folder: Path) -> dict[str, bytes] | None:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else None


def test_averaged_weights_are_the_default(tmp_path: Path) -> None:
    convert_mar(MAR, tmp_path / "averaged")
    convert_mar(MAR, tmp_path / "raw", ema=False)
    published = read_mar()["model"]["encoder_norm.weight"]
    averaged, raw = (
        load_file(tmp_path / name / "model.safetensors")["backbone.encoder_norm.weight"]
        for name in ("averaged", "raw")
    )
    assert torch.equal(raw, published)
    torch.testing.assert_close(averaged, published + 0.01)


def test_defaults_and_classes_come_from_the_checkpoint(tmp_path: Path) -> None:
    convert_mar(MAR, tmp_path / "out")
    pipeline = far.load(tmp_path / "out")
    assert pipeline.classes == [str(number) for number in range(10)]
    assert pipeline.defaults == far.SamplingConfig(
        ar_steps=16, head_steps=10, guidance=3.0, guidance_schedule="linear"
    )
    with pytest.raises(InputError, match="far convert kl16"):
        pipeline.generate([0])


@pytest.mark.parametrize("mar_first", [True, False])
def test_both_conversions_into_one_folder_give_a_complete_model(
    tmp_path: Path, kl16: Path, mar_first: bool
) -> None:
    steps: list[Callable[[], None]] = [
        lambda: convert_mar(MAR, tmp_path / "out"),
        lambda: convert_kl16(kl16, tmp_path / "out"),
    ]
    for step in steps if mar_first else reversed(steps):
        step()
    pipeline = far.load(tmp_path / "out")
    assert isinstance(pipeline.autoencoder, Autoencoder)
    images = pipeline.generate([3, "7"], ar_steps=2, head_steps=1, output="tensor")
    assert images.shape == (2, 3, 64, 64)
    assert sorted(snapshot(tmp_path / "out") or ()) == [
        "autoencoder.safetensors",
        "config.json",
        "model.safetensors",
    ]


def test_kl16_alone_is_loaded_as_an_autoencoder(tmp_path: Path, kl16: Path) -> None:
    convert_kl16(kl16, tmp_path / "out")
    assert isinstance(far.load_autoencoder(tmp_path / "out"), Autoencoder)
    with pytest.raises(InputError, match="int8"):
        far.load_autoencoder(tmp_path / "out", dtype="int8")
    with pytest.raises(InputError, match="load_autoencoder"):
        far.load(tmp_path / "out")


def test_figures_of_a_trained_autoencoder_are_kept(tmp_path: Path, kl16: Path) -> None:
    convert_kl16(kl16, tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "results": {"psnr": 26.5}}))
    convert_mar(MAR, tmp_path / "out")
    assert json.loads(config.read_text())["results"] == {"psnr": 26.5}


def test_nothing_is_overwritten(tmp_path: Path, kl16: Path) -> None:
    out = tmp_path / "out"
    convert_mar(MAR, out)
    assert str(out) in refusal(convert_mar, MAR, out, ema=False)
    convert_kl16(kl16, out)
    assert str(out) in refusal(convert_kl16, kl16, out)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"architectures": ["Bert"]}')
    assert "'architectures'" in refusal(convert_mar, MAR, tmp_path / "foreign")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "model.safetensors").write_bytes(b"precious")
    assert str(tmp_path / "half") in refusal(convert_mar, MAR, tmp_path / "half")
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refusal(convert_mar, MAR, tmp_path / "file")


def test_other_latent_channels_are_refused(tmp_path: Path, kl16: Path) -> None:
    convert_kl16(kl16, tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    entries = json.loads(config.read_text())
    entries["autoencoder"]["latent_channels"] = 4
    config.write_text(json.dumps(entries))
    assert re.search("16 latent channels .* 4[.]", refusal(convert_mar, MAR, tmp_path / "out"))

    convert_mar(MAR, tmp_path / "other")
    weights = torch.load(kl16, weights_only=True)["model"]
    for name in list(weights):
        if name.startswith("post_quant_conv"):
            weights[name] = torch.zeros(4, 4, 1, 1) if name.endswith("weight") else torch.zeros(4)
    weights["decoder.conv_in.weight"] = torch.zeros(32, 4, 3, 3)
    weights["quant_conv.weight"], weights["quant_conv.bias"] = torch.zeros(8, 8, 1, 1), torch.zeros(8)
    weights["encoder.conv_out.weight"], weights["encoder.conv_out.bias"] = (
        torch.zeros(8, 32, 3, 3),
        torch.zeros(8),
    )
    torch.save(weights, tmp_path / "four.ckpt")
    message = refusal(convert_kl16, tmp_path / "four.ckpt", tmp_path / "other")
    assert re.search("16 latent channels .* 4[.]", message)
    convert_kl16(tmp_path / "four.ckpt", tmp_path / "alone")  # it is wrong for that model only


# --- Variants of checkpoints ---------------------------------------------------------------


def saved(tmp_path: Path, checkpoint: Any, **options: Any) -> Path:
    torch.save(checkpoint, tmp_path / "checkpoint.pth", **options)
    return tmp_path / "checkpoint.pth"


def test_weights_can_be_parameters_in_an_ordered_dict(tmp_path: Path) -> None:
    """MAR's trainer stores its averaged weights in this form."""
    checkpoint = read_mar()
    checkpoint["model_ema"] = collections.OrderedDict(
        (name, nn.Parameter(tensor)) for name, tensor in checkpoint["model_ema"].items()
    )
    convert_mar(saved(tmp_path, checkpoint), tmp_path / "out")
    far.load(tmp_path / "out")


def test_old_file_format_is_converted(tmp_path: Path) -> None:
    convert_mar(saved(tmp_path, read_mar(), _use_new_zipfile_serialization=False), tmp_path / "out")
    far.load(tmp_path / "out")


def test_rows_beyond_the_classes_are_dropped(tmp_path: Path) -> None:
    """Some releases of MAR always allocate 1000 rows; those beyond class_num were never trained."""
    checkpoint = read_mar()
    rows = checkpoint["model"]["class_emb.weight"]
    checkpoint["model"]["class_emb.weight"] = torch.cat([rows, torch.full((990, rows.shape[1]), 9.0)])
    convert_mar(saved(tmp_path, checkpoint), tmp_path / "out", ema=False)
    pipeline = far.load(tmp_path / "out")
    assert len(pipeline.classes) == 10
    expected = torch.cat([rows, checkpoint["model"]["fake_latent"]])
    assert torch.equal(pipeline.model.backbone.class_embedding.weight, expected)


def test_patches_come_from_the_args(tmp_path: Path) -> None:
    """Tokens of 16 numbers may be 4 channels of a 2×2 patch; only the args determine it."""
    checkpoint = read_mar()
    checkpoint["args"].vae_embed_dim, checkpoint["args"].patch_size = 4, 2
    convert_mar(saved(tmp_path, checkpoint), tmp_path / "out")
    pipeline = far.load(tmp_path / "out")
    config = pipeline.model.config
    assert (config.latent_channels, config.network.patch, config.grid, config.tokens) == (4, 2, (8, 8), 16)


def test_nan_weights_are_kept(tmp_path: Path) -> None:
    checkpoint = read_mar()
    checkpoint["model_ema"]["encoder_norm.weight"][0] = float("nan")
    convert_mar(saved(tmp_path, checkpoint), tmp_path / "out")
    assert (
        load_file(tmp_path / "out" / "model.safetensors")["backbone.encoder_norm.weight"].isnan().sum() == 1
    )


@pytest.mark.parametrize(
    ("width", "heads", "guidance"),
    [(768, 12, 2.9), (1024, 16, 3.0), (1280, 16, 3.2)],
)
def test_published_sizes_need_no_args(tmp_path: Path, width: int, heads: int, guidance: float) -> None:
    """Heads and guidance of MAR-B, -L and -H follow from the width (here at a depth of one block)."""
    checkpoint = {"model_ema": thin_mar(width)}
    convert_mar(saved(tmp_path, checkpoint), tmp_path / "out")
    pipeline = far.load(tmp_path / "out")
    backbone = pipeline.model.config.network.backbone
    assert (backbone.encoder_heads, backbone.decoder_heads, backbone.buffer) == (heads, heads, 2)
    assert pipeline.defaults == far.SamplingConfig(ar_steps=64, head_steps=100, guidance=guidance)


def thin_mar(width: int) -> dict[str, torch.Tensor]:
    """Return the fixture's names at another width, one block deep, with 256 tokens and 2 buffer positions."""
    sizes = {32: width, 48: width, 96: 3 * width, 144: 3 * width, 128: 4 * width, 192: 4 * width, 24: 258}
    weights = {}
    for name, tensor in read_mar()["model"].items():
        if "blocks.1." not in name:
            head = name.startswith("diffloss")
            shape = [sizes.get(size, size) if not head or size == 48 else size for size in tensor.shape]
            if name == "diffusion_pos_embed_learned":
                shape[1] = 256
            weights[name] = torch.zeros(shape)
    return weights


# --- Refusals -----------------------------------------------------------------------------


class RunsACommand:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("place", ["model", "args"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("convert", [convert_mar, convert_kl16])
def test_hostile_pickle_is_refused_and_not_executed(
    tmp_path: Path, place: str, zipped: bool, convert: Callable[[Path, Path], None]
) -> None:
    checkpoint = read_mar()
    checkpoint[place] = RunsACommand(f"touch {tmp_path / 'executed'}")
    source = saved(tmp_path, checkpoint, _use_new_zipfile_serialization=zipped)
    message = refusal(convert, source, tmp_path / "out")
    assert "'posix.system'" in message
    assert str(source) in message
    assert not (tmp_path / "executed").exists()


def test_hostile_attribute_of_args_is_refused_and_not_executed(tmp_path: Path) -> None:
    checkpoint = read_mar()
    checkpoint["args"].model = RunsACommand(f"touch {tmp_path / 'executed'}")
    assert "'posix.system'" in refusal(convert_mar, saved(tmp_path, checkpoint), tmp_path / "out")
    assert not (tmp_path / "executed").exists()


def test_hostile_plain_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    source = tmp_path / "plain.pth"
    source.write_bytes(pickle.dumps({"model": RunsACommand(f"touch {tmp_path / 'executed'}")}))
    refusal(convert_mar, source, tmp_path / "out")
    assert not (tmp_path / "executed").exists()


def test_thousand_classes_have_the_names_of_imagenet(tmp_path: Path) -> None:
    checkpoint = read_mar()
    checkpoint["args"].class_num = 1000
    rows = checkpoint["model"]["class_emb.weight"]
    checkpoint["model"]["class_emb.weight"] = rows.repeat(100, 1)
    convert_mar(saved(tmp_path, checkpoint), tmp_path / "out", ema=False)
    classes = far.load(tmp_path / "out").classes
    assert (classes[88], classes[207]) == ("macaw", "golden retriever")


def test_other_classes_are_refused_by_name(tmp_path: Path) -> None:
    checkpoint = read_mar()
    checkpoint["args"] = fractions.Fraction
    assert "'fractions.Fraction'" in refusal(convert_mar, saved(tmp_path, checkpoint), tmp_path / "out")


def test_namespace_is_allowed_only_while_converting(tmp_path: Path) -> None:
    convert_mar(MAR, tmp_path / "out")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_tensor_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    checkpoint = read_mar()
    checkpoint["model_ema"]["class_emb.weight"] = torch.zeros(1, 32).expand(10**9, 32)
    assert "class_emb.weight" in refusal(convert_mar, saved(tmp_path, checkpoint), tmp_path / "out")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    content = MAR.read_bytes()
    source = tmp_path / "truncated.pth"
    source.write_bytes(content[: int(share * len(content))])
    assert str(source) in refusal(convert_mar, source, tmp_path / "out")


def test_one_damaged_byte_of_a_weight_is_found(tmp_path: Path) -> None:
    content = bytearray(MAR.read_bytes())
    with zipfile.ZipFile(MAR) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 0xFF
    source = tmp_path / "damaged.pth"
    source.write_bytes(content)
    assert str(source) in refusal(convert_mar, source, tmp_path / "out")


def test_any_damaged_byte_is_an_input_error_or_harmless(tmp_path: Path) -> None:
    """Damage bytes of the pickle itself, in the form without checksums."""
    small = {"model_ema": {"a": torch.zeros(2)}, "args": argparse.Namespace(model="mar_tiny")}
    content = saved(tmp_path, small, _use_new_zipfile_serialization=False).read_bytes()
    generator = torch.Generator().manual_seed(0)
    source = tmp_path / "damaged.pth"
    for position in range(0, len(content), 3):
        changed = bytearray(content)
        changed[position] = int(torch.randint(256, (), generator=generator))
        source.write_bytes(changed)
        refusal(convert_mar, source, tmp_path / "out")  # its one tensor is not enough for any model


def test_files_that_are_not_checkpoints_are_named(tmp_path: Path) -> None:
    text, archive, listing = tmp_path / "text.pth", tmp_path / "archive.pth", tmp_path / "list.pth"
    text.write_text("hello " * 100)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "hello")
    torch.save([1, 2], listing)
    for source in (text, archive, listing, tmp_path / "missing.pth", tmp_path):
        for convert in (convert_mar, convert_kl16):
            assert str(source) in refusal(convert, source, tmp_path / "out")


def test_swapped_files_are_refused(tmp_path: Path, kl16: Path) -> None:
    assert "model_ema" in refusal(convert_mar, kl16, tmp_path / "out")
    assert "encoder_pos_embed_learned" in refusal(convert_mar, kl16, tmp_path / "out", ema=False)
    assert "encoder.conv_in.weight" in refusal(convert_kl16, MAR, tmp_path / "out")


def test_missing_set_of_weights_is_named(tmp_path: Path) -> None:
    checkpoint = read_mar()
    del checkpoint["model"]
    checkpoint["model_ema"] = None  # what MAR's trainer writes without averaging
    source = saved(tmp_path, checkpoint)
    assert "--no-ema" in refusal(convert_mar, source, tmp_path / "out")
    assert "'model'" in refusal(convert_mar, source, tmp_path / "out", ema=False)


def set_tensor(name: str, tensor: torch.Tensor) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint["model_ema"].update({name: tensor})


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint["model_ema"].pop(name)


def repeated(levels: int) -> list[Any]:
    """A small list in memory and on disk, and 10^levels words as text."""
    value = ["x" * 10] * 10
    for _ in range(levels):
        value = [value] * 10
    return value


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def with_args(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: vars(checkpoint["args"]).update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("encoder_norm.bias"), "encoder_norm.bias"),
        (without("z_proj.weight"), "z_proj.weight"),
        (without("fake_latent"), "fake_latent"),
        (without("class_emb.weight"), "class_emb.weight"),
        (without("encoder_blocks.0.attn.qkv.weight"), "encoder_blocks.0.attn.qkv.weight"),
        (set_tensor("extra.weight", torch.zeros(1)), "'extra.weight'"),
        (set_tensor("encoder_blocks.7.norm1.weight", torch.zeros(32)), "encoder_blocks.2.norm1.weight"),
        (set_tensor("encoder_blocks.0.mlp.fc1.weight", torch.zeros(64, 32)), "[64, 32]"),
        (set_tensor("fake_latent", torch.zeros(1, 31)), "fake_latent"),
        (set_tensor("class_emb.weight", torch.zeros(0, 32)), "classes 0"),
        (set_tensor("class_emb.weight", torch.zeros(10)), "class_emb.weight"),
        (set_tensor("encoder_pos_embed_learned", torch.zeros(1, 16, 32)), "buffer 0"),
        (set_tensor("diffusion_pos_embed_learned", torch.zeros(1, 15, 48)), "15 tokens"),
        (set_tensor("z_proj.weight", torch.zeros(32, 12)), "12 values"),
        (set_tensor("encoder_norm.bias", torch.zeros(32, dtype=torch.int64)), "'encoder_norm.bias'"),
        (set_tensor("encoder_norm.bias", torch.zeros(32).to_sparse()), "'encoder_norm.bias'"),
        (set_tensor("encoder_norm.bias", torch.zeros(32, device="meta")), "'encoder_norm.bias'"),
        (lambda checkpoint: checkpoint["model_ema"].update({3: torch.zeros(1)}), " 3 "),
        (lambda checkpoint: checkpoint["model_ema"].update({"epoch": 3}), "'epoch'"),
        (lambda checkpoint: checkpoint.update(model_ema=[torch.zeros(1)]), ""),
        (lambda checkpoint: checkpoint.update(args={}), "encoder_num_heads"),
        (with_args(encoder_num_heads=None), "encoder_num_heads"),
        (with_args(decoder_num_heads="9" * 5000), "decoder_num_heads"),
        (with_args(decoder_num_heads=True), "decoder_num_heads"),
        (with_args(decoder_num_heads=-8), "decoder_num_heads"),
        (with_args(decoder_num_heads=10**500), "decoder_num_heads"),
        (with_args(decoder_num_heads=repeated(12)), "decoder_num_heads"),
        (with_args(decoder_num_heads=nested(300)), "decoder_num_heads"),
        (with_args(encoder_num_heads=5), "encoder_heads 5"),
        (with_args(patch_size=3), "3×3"),
    ],
)
def test_wrong_mar_names_file_and_entry(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    checkpoint = read_mar()
    change(checkpoint)
    source = saved(tmp_path, checkpoint)
    text = refusal(convert_mar, source, tmp_path / "out")
    assert message in text
    assert str(source) in text


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("decoder.norm_out.bias", None, "decoder.norm_out.bias"),
        ("encoder.conv_in.weight", None, "encoder.conv_in.weight"),
        ("loss.discriminator.weight", torch.zeros(3), "'loss.discriminator.weight'"),
        ("quant_conv.bias", torch.zeros(3), "quant_conv.bias"),
        ("encoder.conv_in.weight", torch.zeros(20, 3, 3, 3), "20"),
        ("encoder.conv_in.weight", torch.zeros(16, 3, 3, 3), "norm_groups 32"),
        ("encoder.down.5.block.0.conv1.weight", torch.zeros(32, 32, 3, 3), "width_multipliers"),
    ],
)
def test_wrong_kl16_names_file_and_entry(
    tmp_path: Path, kl16: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    weights = torch.load(kl16, weights_only=True)["model"]
    if tensor is None:
        del weights[name]
    else:
        weights[name] = tensor
    source = saved(tmp_path, {"model": weights})
    text = refusal(convert_kl16, source, tmp_path / "out")
    assert message in text
    assert str(source) in text


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on file sizes")
def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file sizes simulates a full disk: the weights (490 kB) do not fit."""
    script = (
        "import resource, signal; from pathlib import Path; from far.convert import convert_mar; from "
        "far.errors import InputError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"try: convert_mar(Path({str(MAR)!r}), Path({str(tmp_path / 'out')!r}))\n"
        "except InputError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(far.__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    assert "cannot write" in done.stdout
    assert not (tmp_path / "out").exists()
