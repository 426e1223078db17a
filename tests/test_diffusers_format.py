"""Autoencoders to and from diffusers, held to diffusers' own arithmetic."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

import far
from far import Autoencoder, InputError
from far.autoencoder import AutoencoderConfig
from far.cli.main import main
from far.diffusers_format import from_diffusers, to_diffusers
from far.folder import load_autoencoder, save_autoencoder
from far.names import find_folder

# The shape of KL-16 (five levels, two blocks, attention at the coarsest), and others.
CONFIGS = {
    "kl16": AutoencoderConfig(
        width=8, width_multipliers=(1, 1, 2, 2, 4), blocks=2, latent_channels=16, norm_groups=4
    ),
    "a shift": AutoencoderConfig(
        width=8,
        width_multipliers=(1, 2, 4),
        blocks=1,
        latent_channels=3,
        norm_groups=8,
        scale=1.5,
        shift=0.25,
    ),
    "a shift per channel": AutoencoderConfig(
        width=12,
        width_multipliers=(1, 3, 2, 1),
        blocks=3,
        latent_channels=2,
        norm_groups=2,
        scale=0.5,
        shift=(0.5, -2.0),
    ),
    "a scale per channel": AutoencoderConfig(
        width=8,
        width_multipliers=(1, 1, 2),
        blocks=1,
        latent_channels=3,
        norm_groups=4,
        scale=(1 / 0.54, 1 / 1.29, 0.5),  # measured as one over the standard deviation
        shift=(0.5, -2.0, 0.0),
    ),
}
KL16 = dict(
    down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",) * 5,
    block_out_channels=(8, 8, 16, 16, 32), layers_per_block=2, latent_channels=16, norm_num_groups=4,
)  # fmt: skip


def randomize(module: torch.nn.Module) -> None:
    """No zero, no one, no two layers alike, yet outputs of the order of one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def random_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    torch.manual_seed(1)
    autoencoder = Autoencoder(config).eval()
    randomize(autoencoder)
    return autoencoder


@torch.no_grad()
def check_equal(ours: Autoencoder, theirs: AutoencoderKL) -> None:
    """Moments, images and the latents that a generator models are the same, within 1e-4."""
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(2, 3, 32, 64, generator=generator) * 2 - 1
    posterior, expected = ours.encode(images), theirs.encode(images).latent_dist
    assert expected.mean.std() > 0.01
    torch.testing.assert_close(posterior.mean, expected.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(posterior.logvar, expected.logvar, atol=1e-4, rtol=1e-4)
    latents = torch.randn(expected.mean.shape, generator=generator)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(latents).sample, atol=1e-4, rtol=1e-4)
    config = theirs.config
    mean = torch.tensor(config.latents_mean or [config.shift_factor or 0.0]).view(1, -1, 1, 1)
    deviation = torch.tensor(config.latents_std or [1.0]).view(1, -1, 1, 1)
    torch.testing.assert_close(ours.normalize(latents), (latents - mean) * config.scaling_factor / deviation)


def fresh(folder: Path, **changes: object) -> AutoencoderKL:
    """An ``AutoencoderKL`` that diffusers makes and saves."""
    torch.manual_seed(3)
    theirs = AutoencoderKL(**{**KL16, **changes}).eval()
    randomize(theirs)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_computes_what_we_compute_there_and_back(name: str, tmp_path: Path) -> None:
    ours = random_autoencoder(CONFIGS[name])
    to_diffusers(ours, tmp_path / "theirs")
    theirs, report = AutoencoderKL.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report.values()), report
    check_equal(ours, theirs)
    from_diffusers(tmp_path / "theirs", tmp_path / "ours")
    back = load_autoencoder(tmp_path / "ours")
    assert back.config == ours.config
    assert all(torch.equal(tensor, ours.state_dict()[key]) for key, tensor in back.state_dict().items())


def test_bundled_autoencoder_is_converted_by_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "to-diffusers", "avatars-64", str(tmp_path / "theirs")]) == 0
    ours = load_autoencoder(find_folder("avatars-64"))
    check_equal(ours, AutoencoderKL.from_pretrained(tmp_path / "theirs"))
    assert main(["convert", "from-diffusers", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    assert str(tmp_path / "ours") in capsys.readouterr().out
    back = far.load_autoencoder(tmp_path / "ours")
    assert isinstance(back, Autoencoder)
    assert back.fingerprint() == ours.fingerprint()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        {"latents_mean": [0.5] * 8 + [-1.5] * 8, "latents_std": [2.0] * 16, "scaling_factor": 0.8},
        {"latents_mean": [0.5] * 16, "latents_std": [0.25] * 8 + [2.0] * 8, "scaling_factor": 0.8},
        {
            "layers_per_block": 1,
            "block_out_channels": (4, 8, 8, 8, 16),
            "norm_num_groups": 2,
            "force_upcast": False,
            "sample_size": 256,
        },
    ],
)
def test_autoencoder_of_diffusers_gives_the_same_results_here(changes: dict, tmp_path: Path) -> None:
    theirs = fresh(tmp_path / "theirs", **changes)
    from_diffusers(tmp_path / "theirs", tmp_path / "ours")
    check_equal(load_autoencoder(tmp_path / "ours"), theirs)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"down_block_types": ("DownEncoderBlock2D",) * 5}, "down_block_types"),
        ({"down_block_types": ("AttnDownEncoderBlock2D",) * 5}, "down_block_types"),
        ({"up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4}, "up_block_types"),
        ({"act_fn": "relu"}, "act_fn"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention"),
        ({"use_quant_conv": False}, "use_quant_conv"),
        ({"use_post_quant_conv": False}, "use_post_quant_conv"),
        ({"in_channels": 1}, "in_channels"),
        ({"out_channels": 4}, "out_channels"),
        ({"block_out_channels": (8, 8, 16, 16, 20)}, "block_out_channels"),
        ({"latents_mean": [0.0] * 16, "latents_std": [1.0] * 15 + [0.0]}, "latents_std"),
        ({"latents_mean": [0.0] * 16, "latents_std": [1.0, 2.0]}, "latents_std"),
        ({"latents_mean": [0.0] * 16}, "latents_std"),
        ({"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16, "shift_factor": 0.5}, "shift_factor"),
    ],
)
def test_entry_that_requires_other_arithmetic_is_named(changes: dict, expected: str, tmp_path: Path) -> None:
    fresh(tmp_path / "theirs", **changes)
    with pytest.raises(InputError, match=rf"config\.json: .*{expected}") as caught:
        from_diffusers(tmp_path / "theirs", tmp_path / "ours")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_levels_that_give_another_stride_are_refused(tmp_path: Path) -> None:
    blocks = {
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    fresh(tmp_path / "theirs", block_out_channels=(8, 8), **blocks)
    with pytest.raises(InputError, match="width_multipliers"):
        from_diffusers(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize(
    ("entry", "value", "expected"),
    [
        ("_class_name", "AsymmetricAutoencoderKL", "_class_name"),
        ("_class_name", None, "_class_name"),
        ("layers_per_block", "2", "layers_per_block"),
        ("block_out_channels", [], "block_out_channels"),
        ("block_out_channels", [0, 8, 8], "block_out_channels"),
        ("wavelets", True, "'wavelets'"),
        ("norm_num_groups", 5, "norm_groups 5"),
    ],
)
def test_wrong_config_is_refused(entry: str, value: object, expected: str, tmp_path: Path) -> None:
    fresh(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, entry: value}))
    with pytest.raises(InputError, match=expected):
        from_diffusers(tmp_path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    fresh(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)

    def refused(expected: str) -> None:
        with pytest.raises(InputError, match=expected):
            from_diffusers(tmp_path, tmp_path / "ours")
        assert not (tmp_path / "ours").exists()

    key = "encoder.mid_block.attentions.0.to_q.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path)
    refused(key)
    save_file({**tensors, key: tensors[key][:4].clone()}, path)
    refused(key)
    save_file({**tensors, "encoder.more": tensors[key].clone()}, path)
    refused("'encoder.more'")
    path.write_bytes(whole[:-1])
    refused(path.name)
    path.rename(tmp_path / "diffusion_pytorch_model.bin")
    refused(path.name)
    (tmp_path / "config.json").unlink()
    refused("config.json")


def test_nothing_is_overwritten(tmp_path: Path, autoencoder_folder: Path, pipeline_folder: Path) -> None:
    fresh(tmp_path / "theirs")
    with pytest.raises(InputError, match=str(autoencoder_folder)):
        from_diffusers(tmp_path / "theirs", autoencoder_folder)
    with pytest.raises(InputError, match=str(tmp_path / "theirs")):
        to_diffusers(load_autoencoder(autoencoder_folder), tmp_path / "theirs")


def test_autoencoder_can_be_added_to_a_model_without_one(tmp_path: Path, pipeline_folder: Path) -> None:
    pipeline = far.Pipeline.from_pretrained(pipeline_folder)
    assert pipeline.autoencoder is not None
    to_diffusers(pipeline.autoencoder, tmp_path / "theirs")
    pipeline.autoencoder = None
    pipeline.save_pretrained(tmp_path / "ours")
    from_diffusers(tmp_path / "theirs", tmp_path / "ours")
    folders = (pipeline_folder, tmp_path / "ours")
    whole, joined = (
        far.Pipeline.from_pretrained(folder).generate([0, 1], output="tensor") for folder in folders
    )
    assert torch.equal(whole, joined)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            AutoencoderConfig(width=8, width_multipliers=(1, 1, 2), blocks=1, norm_groups=4, spherical=True),
            "spherical",
        ),
        (
            AutoencoderConfig(width=8, width_multipliers=(2, 2, 4), blocks=1, norm_groups=4),
            r"width_multipliers \[2, 2, 4\]",
        ),
    ],
)
def test_autoencoder_that_diffusers_cannot_represent_is_refused(
    config: AutoencoderConfig, expected: str, tmp_path: Path
) -> None:
    save_autoencoder(Autoencoder(config), tmp_path / "ours")
    with pytest.raises(InputError, match=expected):
        to_diffusers(load_autoencoder(tmp_path / "ours"), tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def with_old_names(folder: Path) -> None:
    """Save the weights again as diffusers did before its attention was renamed."""
    path = folder / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for new, name in old.items():
        tensors = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in tensors.items()}
    assert any(".proj_attn." in key for key in tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("form", ["older names", "shards", "fp16", "fp16 in shards"])
def test_forms_that_diffusers_reads_are_read(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variant = "fp16" if "fp16" in form else None
    folder = tmp_path / "theirs"
    theirs = fresh(tmp_path / "whole")
    if variant:
        theirs = theirs.half()
    theirs.save_pretrained(folder, variant=variant, max_shard_size="20KB" if "shards" in form else "10GB")
    if form == "older names":
        with_old_names(folder)
    files = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")
    assert (len(files) > 1) == ("shards" in form)
    expected = AutoencoderKL.from_pretrained(folder, variant=variant).float()  # diffusers reads it too
    assert main(["convert", "from-diffusers", str(folder), str(tmp_path / "ours")]) == 0
    assert (variant or "diffusion_pytorch_model") in capsys.readouterr().out
    check_equal(load_autoencoder(tmp_path / "ours"), expected)


def test_plain_weights_are_preferred_to_a_variant_and_both_are_named(tmp_path: Path) -> None:
    theirs = fresh(tmp_path / "theirs")
    theirs.half().save_pretrained(tmp_path / "theirs", variant="fp16")
    said = from_diffusers(tmp_path / "theirs", tmp_path / "ours")
    assert said.index("diffusion_pytorch_model.safetensors") < said.index(
        "diffusion_pytorch_model.fp16.safetensors"
    )
    check_equal(load_autoencoder(tmp_path / "ours"), AutoencoderKL.from_pretrained(tmp_path / "theirs"))


@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        {},
        {"a": 3},
        {"a": "../secret.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "model.bin"},
        {"a": "missing.safetensors"},
        {"another": "one.safetensors"},
        {"a": "one.safetensors", "b": "one.safetensors"},
    ],
)
def test_index_of_shards_that_lists_anything_else_is_refused(weight_map: object, tmp_path: Path) -> None:
    fresh(tmp_path / "theirs")
    (tmp_path / "theirs" / "diffusion_pytorch_model.safetensors").unlink()
    save_file({"a": torch.ones(2)}, tmp_path / "theirs" / "one.safetensors", {"format": "pt"})
    save_file({"a": torch.ones(2)}, tmp_path / "secret.safetensors", {"format": "pt"})
    (tmp_path / "theirs" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    with pytest.raises(InputError) as error:
        from_diffusers(tmp_path / "theirs", tmp_path / "ours")
    assert "\n" not in str(error.value)
    assert str(tmp_path / "theirs") in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_attention_under_both_names_is_refused(tmp_path: Path) -> None:
    fresh(tmp_path / "theirs")
    path = tmp_path / "theirs" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file(
        {**tensors, **{key.replace(".to_q.", ".query."): tensor + 1 for key, tensor in tensors.items()}},
        path,
        {"format": "pt"},
    )
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.safetensors"):
        from_diffusers(tmp_path / "theirs", tmp_path / "ours")
