"""``far evaluate --autoencoder``: figures of reconstructions."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from far.cli.main import main
from far.evaluation.features import load_feature_network
from far.evaluation.images import open_images
from far.evaluation.metrics import FeatureStatistics, frechet_distance, ssim
from far.evaluation.reconstructions import reconstructions_folder
from far.folder import load_autoencoder


def test_figures_of_reconstructions_equal_a_plain_computation(
    tmp_path: Path, image_set: Path, autoencoder_folder: Path
) -> None:
    command = [
        "evaluate",
        "--images",
        image_set,
        "--autoencoder",
        autoencoder_folder,
        "--reference",
        image_set,
    ]
    places = ["--count", 9, "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    assert main([*map(str, command), *map(str, places)]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())

    originals = open_images(image_set).tensor(range(12))
    autoencoder, network = load_autoencoder(autoencoder_folder, device="cpu"), load_feature_network()
    with torch.no_grad():
        decoded = autoencoder.decode(autoencoder.encode(originals[:9] * 2 - 1).mean) / 2 + 0.5
        output = (decoded.clamp(0, 1) * 255).round() / 255
        sides = [FeatureStatistics.of(network(images)) for images in (output, originals)]
    expected = peak_signal_noise_ratio(output, originals[:9], 1.0, reduction="none", dim=(1, 2, 3)).mean()
    assert result["figures"]["PSNR"] == pytest.approx(float(expected), abs=1e-3)
    assert result["figures"]["SSIM"] == pytest.approx(float(ssim(output, originals[:9]).mean()), abs=1e-4)
    distance = result["figures"]["FD (EfficientNet-Lite0)"]
    assert distance == pytest.approx(frechet_distance(*sides), rel=1e-3)
    assert result["evaluated"]["autoencoder"] == str(autoencoder_folder)
    assert result["evaluated"]["count"] == 9
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result.json"]


def test_parts_are_of_one_autoencoder_set_of_images_and_network(
    tmp_path: Path, image_set: Path, autoencoder_folder: Path
) -> None:
    autoencoder, network = load_autoencoder(autoencoder_folder, device="cpu"), load_feature_network()

    def folder(split: str = "train") -> Path:
        return reconstructions_folder(tmp_path, open_images(image_set / split), autoencoder, network)

    found = [folder(), folder("held-out")]
    autoencoder.config = dataclasses.replace(autoencoder.config, spherical=True)
    found.append(folder())
    autoencoder.config = dataclasses.replace(autoencoder.config, spherical=False)
    assert folder() == found[0]
    # The encoder's fingerprint stays when the decoder alone is trained.
    fingerprint = autoencoder.fingerprint()
    with torch.no_grad():
        autoencoder.decoder.conv_out.weight[0, 0, 0, 0] += 0.1
    assert autoencoder.fingerprint() == fingerprint
    found.append(folder())
    network.digest = "another"
    found.append(folder())
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "{model}", "--autoencoder", "{model}"], "--autoencoder"),
        (["--images", "{images}", "--autoencoder", "nowhere"], "'nowhere'"),
        (["--npz", "{uneven}", "--autoencoder", "{model}"], "18×18"),
        (["--images", "{images}", "--features", "lite9"], "'lite9'"),
        (["--images", "{images}", "--autoencoder", "{model}", "--dtype", "bfloat16"], "--dtype bfloat16"),
        (["--images", "{images}", "--compile"], "--compile"),
        (["--images", "{images}", "--batch-size", "9"], "--batch-size 9"),
        (["--images", "{images}", "--decoder", "small"], "--decoder small"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    image_set: Path,
    pipeline_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    np.savez(tmp_path / "uneven.npz", arr_0=np.zeros((9, 18, 18, 3), np.uint8))
    places = {"model": pipeline_folder, "images": image_set, "uneven": tmp_path / "uneven.npz"}
    given = [argument.format(**places) for argument in arguments]
    folders = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert main(["evaluate", *given, "--reference", str(image_set), *folders]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("far: error:")
    assert message in lines[-1]
