"""Files damaged at random give an error of one line that names the file, or the undamaged content.

Nothing crashes or hangs. Every loader of far needs a row in ``LOADERS``. ``make soak`` runs the long form.
"""

import contextlib
import dataclasses
import gzip
import inspect
import io
import json
import random
import re
import resource
import shutil
import signal
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from checkpoints import VALUES, read_checkpoint
from image_sources import image_table, read_image, samples, write_lines, write_pngs, write_tar
from PIL import Image
from profiles import EXCHANGED
from safetensors.torch import load_file
from torch import Tensor, nn

from far.autoencoder import Autoencoder, AutoencoderConfig
from far.cli.main import main
from far.convert import convert_kl16, convert_mar
from far.data.detection import open_source
from far.data.fashion_mnist import read_idx
from far.data.image_sets import open_image_set
from far.data.latents import open_latents
from far.data.shards import ShardReader, ShardWriter
from far.diffusers_format import from_diffusers, to_diffusers
from far.errors import InputError
from far.evaluation import inception
from far.evaluation.extraction import part_path, read_parts
from far.evaluation.features import FeatureNetwork
from far.evaluation.images import open_images, write_npz
from far.evaluation.references import open_reference, write_statistics
from far.files import read_json, write_json
from far.folder import ModelFolder, load_autoencoder
from far.onnx.config import OnnxConfig, OnnxFile, export_values, open_export
from far.pipeline import Pipeline
from far.recipe import find_recipe, load_recipe
from far.sampling import SamplingConfig
from far.training.checkpoint import named_tensors, save_checkpoint
from far.weights import NoInitialization, save_tensors

SECONDS = 10
# Limit for one damaged file: far more than any undamaged one here needs, far less than a machine has.
MEGABYTES = 500
Load = Callable[[Path], Any]


class Extractor(FeatureNetwork):
    """Feature network with few dimensions, so that a statistics file is small."""

    name, dimensions = "EfficientNet-Lite0", 4

    def __init__(self) -> None:
        nn.Module.__init__(self)


def network() -> nn.Module:
    """Replacement of the Inception network, whose file is too large to be damaged thousands of times."""
    return nn.Linear(3, 2)


@dataclasses.dataclass(frozen=True)
class Loader:
    """A function that reads a file, and the rules for damage to it.

    Attributes:
        file: path of the file within the folder that ``load`` gets.
        load: reads the file.
        checked: accepted content must equal what was written. Otherwise people may change the file, or its
            format has no checksum: accepted content is only used, which must not crash.
        else_named: what an error may name instead of the file, if the damage is that two files do not match.
    """

    file: str
    load: Load
    checked: bool
    else_named: str | None = None


CHECKPOINT_FILE = "checkpoints/step-00000007/shard-00001-model-00001-of-00001.safetensors"
LOADERS = {
    "generator": Loader(
        "pipeline/model.safetensors", lambda at: Pipeline.from_pretrained(at / "pipeline").model, True
    ),
    "its autoencoder": Loader(
        "pipeline/autoencoder.safetensors",
        lambda at: Pipeline.from_pretrained(at / "pipeline").autoencoder,
        True,
    ),
    "its config": Loader(
        "pipeline/config.json",
        lambda at: Pipeline.from_pretrained(at / "pipeline").model,
        False,
        ".safetensors",
    ),
    "autoencoder": Loader(
        "autoencoder/autoencoder.safetensors", lambda at: load_autoencoder(at / "autoencoder"), True
    ),
    "autoencoder's config": Loader(
        "autoencoder/config.json",
        lambda at: load_autoencoder(at / "autoencoder"),
        False,
        "autoencoder.safetensors",
    ),
    "export's config": Loader("export/config.json", lambda at: repr(open_export(at / "export")), False),
    "images": Loader(
        "images/shard-00000.safetensors", lambda at: everything(open_image_set(at / "images")), True
    ),
    "images' index": Loader(
        "images/index.json", lambda at: everything(open_image_set(at / "images")), True, "at/images"
    ),
    "continued": Loader("images/index.json", lambda at: ShardWriter(at / "images", META).index, True),
    "latents": Loader("latents/shard-00000.safetensors", lambda at: latents(at), True),
    "latents' index": Loader("latents/index.json", lambda at: latents(at), True, "at/latents"),
    "trajectories": Loader(
        "rows/shard-00001.safetensors",
        lambda at: everything(ShardReader(at / "rows", "rows", verify=True)),
        True,
    ),
    "shards unverified": Loader(
        "rows/shard-00001.safetensors", lambda at: everything(ShardReader(at / "rows", "rows")), False
    ),
    "training checkpoint": Loader(
        CHECKPOINT_FILE, lambda at: read_checkpoint(at / "checkpoints/step-00000007"), True
    ),
    "its index": Loader(
        "checkpoints/step-00000007/index.json",
        lambda at: read_checkpoint(at / "checkpoints/step-00000007"),
        True,
    ),
    "MAR": Loader("mar.pth", lambda at: converted(convert_mar, at, "mar.pth", "model"), True),
    "KL-16": Loader("kl16.ckpt", lambda at: converted(convert_kl16, at, "kl16.ckpt", "autoencoder"), True),
    "Inception": Loader("inception.pth", lambda at: inception.load_inception(at / "inception.pth"), True),
    "of diffusers": Loader(
        "theirs/diffusion_pytorch_model.safetensors",
        lambda at: converted(from_diffusers, at, "theirs", "autoencoder"),
        True,
    ),
    "config of diffusers": Loader(
        "theirs/config.json",
        lambda at: converted(from_diffusers, at, "theirs", "autoencoder"),
        False,
        "diffusion_pytorch_model.safetensors",
    ),
    "config of a tokenizer": Loader(
        "theirs/config.json",
        lambda at: load_autoencoder(f"diffusers:{at / 'theirs'}"),
        False,
        "diffusion_pytorch_model.safetensors",
    ),
    "weights of a tokenizer": Loader(
        "theirs/diffusion_pytorch_model.safetensors",
        lambda at: load_autoencoder(f"diffusers:{at / 'theirs'}"),
        True,
    ),
    "index of a tokenizer": Loader(
        "shards/diffusion_pytorch_model.safetensors.index.json",
        lambda at: load_autoencoder(f"diffusers:{at / 'shards'}"),
        True,
        "at/shards",
    ),
    "exported pipeline": Loader("exported/model_index.json", lambda at: diffusers_entries(at), False),
    "its generator's config": Loader(
        "exported/transformer/config.json", lambda at: diffusers_generator(at), False
    ),
    "its autoencoder's config": Loader(
        "exported/vae/config.json",
        lambda at: load_autoencoder(f"diffusers:{at / 'exported/vae'}"),
        False,
        "diffusion_pytorch_model.safetensors",
    ),
    "its autoencoder's weights": Loader(
        "exported/vae/diffusion_pytorch_model.safetensors",
        lambda at: load_autoencoder(f"diffusers:{at / 'exported/vae'}"),
        False,
    ),
    "shard of diffusers": Loader(
        "shards/one.safetensors", lambda at: converted(from_diffusers, at, "shards", "autoencoder"), True
    ),
    "index of diffusers": Loader(
        "shards/diffusion_pytorch_model.safetensors.index.json",
        lambda at: converted(from_diffusers, at, "shards", "autoencoder"),
        True,
        "at/shards",
    ),
    "features": Loader("parts/part-00000000-6.safetensors", lambda at: read_parts(at / "parts", 6), True),
    "images .npz": Loader("images.npz", lambda at: pixels(at / "images.npz"), True),
    "compressed .npz": Loader("compressed.npz", lambda at: pixels(at / "compressed.npz"), True),
    "statistics": Loader("statistics.npz", lambda at: statistics(at / "statistics.npz", at), True),
    "recipe": Loader(
        "recipe.yaml", lambda at: load_recipe(at / "recipe.yaml", ["generator.training.steps=3"]), False
    ),
    "override": Loader(
        "override",
        lambda at: load_recipe(at / "recipe.yaml", [(at / "override").read_text(errors="replace")]),
        False,
        "",
    ),
    "PNG": Loader("picture.png", lambda at: read_image(at / "picture.png", 16), False),
    "JPEG": Loader("picture.jpg", lambda at: read_image(at / "picture.jpg", 16), False),
    "WebP": Loader("picture.webp", lambda at: read_image(at / "picture.webp", 16), False),
    "PNG with a color profile": Loader("profile.png", lambda at: read_image(at / "profile.png", 16), False),
    "JPEG with a profile and EXIF": Loader(
        "profile.jpg", lambda at: read_image(at / "profile.jpg", 16), False
    ),
    "tar": Loader("set.tar", lambda at: content(at / "set.tar"), False),
    "CSV": Loader("photos/a.csv", lambda at: content(at / "photos/a.csv"), False, "at/photos"),
    "JSON lines": Loader("photos/a.jsonl", lambda at: content(at / "photos/a.jsonl"), False, "at/photos"),
    "parquet": Loader("set.parquet", lambda at: content(at / "set.parquet"), False),
    "save_to_disk": Loader(
        "saved/train/data-00000-of-00001.arrow", lambda at: content(at / "saved/train"), False
    ),
    "its state": Loader("saved/train/state.json", lambda at: content(at / "saved/train"), False, "at/saved"),
    "IDX": Loader("idx", lambda at: read_idx(at / "idx"), False),
    "gzipped IDX": Loader("idx.gz", lambda at: read_idx(at / "idx.gz"), True),
}
# Formats with a CRC-32.
ZIPS = ("MAR", "KL-16", "Inception", "images .npz", "compressed .npz", "statistics")
META = {
    "kind": "images",
    "size": 16,
    "classes": ["circle", "square", "stripes"],
    "source": "drawn by the tests",
}


def everything(reader: ShardReader) -> dict[str, Tensor]:
    return {name: reader.all(name) for name in sorted(reader._maps[0])}


def latents(at: Path) -> dict[str, Tensor]:
    return everything(open_latents(at / "latents", load_autoencoder(at / "autoencoder")))


def pixels(path: Path) -> np.ndarray:
    source = open_images(path)
    return source.read(range(source.count))


def content(path: Path) -> list[tuple[int, str]]:
    source = open_source(str(path))
    return [(record.label, source.digest(record)) for record in source.records]


def statistics(path: Path, at: Path) -> list[Any]:
    found = open_reference(path, Extractor(), at)
    return [found.statistics.mean, found.statistics.covariance, found.features, found.count]


def diffusers_generator(at: Path) -> Any:
    """Build the generator of an exported pipeline as diffusers does from its entries, without weights."""
    from far.diffusers_pipeline import FARModel

    entries, keys = read_json(at / "exported/transformer/config.json"), inspect.signature(FARModel).parameters
    with NoInitialization(), torch.device("meta"):
        return FARModel(**{key: entries[key] for key in keys if key in entries})


def diffusers_entries(at: Path) -> tuple[list[str], SamplingConfig]:
    """Return classes and sampling values of an exported pipeline, which far reads when it is called."""
    from far.diffusers_pipeline import FARPipeline

    index = read_json(at / "exported/model_index.json")
    entries = {key: index[key] for key in ("id2label", "sampling") if key in index}
    pipeline = FARPipeline(diffusers_generator(at), None, **entries)._far_pipeline()
    return pipeline.classes, pipeline.defaults


def split_weights(whole: Path, folder: Path) -> None:
    """Copy an ``AutoencoderKL`` folder with its weights split into two files."""
    folder.mkdir()
    shutil.copy(whole / "config.json", folder)
    tensors = load_file(whole / "diffusion_pytorch_model.safetensors")
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_tensors(folder / file, {name: tensors[name] for name in chosen})
    places = {name: file for file, chosen in parts.items() for name in chosen}
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": places})


def converted(convert: Callable[[Path, Path], Any], at: Path, source: str, part: str) -> Any:
    out = at / "converted"
    shutil.rmtree(out, ignore_errors=True)
    convert(at / source, out)
    return json.loads((out / "config.json").read_text()), (out / f"{part}.safetensors").read_bytes()


@pytest.fixture(scope="module")
def valid(
    tmp_path_factory: pytest.TempPathFactory,
    pipeline_folder: Path,
    autoencoder_folder: Path,
    image_set: Path,
    latents_folder: Path,
):  # type: ignore[no-untyped-def]
    """Return a folder with one undamaged file or folder of every kind."""
    at = tmp_path_factory.mktemp("valid")
    shutil.copytree(pipeline_folder, at / "pipeline")
    shutil.copytree(autoencoder_folder, at / "autoencoder")
    (at / "export").mkdir()
    exported = OnnxConfig("float32", {"head.onnx": OnnxFile("0" * 64, {"x": ("rows", 8)}, {})}, ("loop",))
    described = ModelFolder.open(pipeline_folder).config
    write_json(at / "export" / "config.json", export_values(described, exported))
    shutil.copytree(image_set / "train", at / "images")
    shutil.copytree(latents_folder, at / "latents")
    writer = ShardWriter(at / "rows", {"kind": "rows"})
    for start in (0, 3):
        writer.write(
            {"z": torch.arange(24.0).view(3, 8).half() + start, "known": torch.arange(3)}, cursor=start + 3
        )
    writer.finish()
    optimizer = torch.optim.AdamW((module := network()).parameters())
    sum(parameter.sum() for parameter in module.parameters()).backward()
    optimizer.step()
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict()["state"]}
    save_checkpoint(at / "checkpoints", 7, named_tensors(state), VALUES)
    shutil.copy(
        Path(__file__).parent.parent / "reference/fixtures/mar_reference_checkpoint.pth", at / "mar.pth"
    )
    ours = load_autoencoder(autoencoder_folder)
    narrow = AutoencoderConfig(width=32, width_multipliers=(1, 1, 1), blocks=1, latent_channels=2)
    torch.save({"model": Autoencoder(narrow).state_dict()}, at / "kl16.ckpt")
    torch.save(network().state_dict(), at / "inception.pth")
    to_diffusers(ours, at / "theirs")
    split_weights(at / "theirs", at / "shards")
    assert main(["export", "diffusers", str(pipeline_folder), str(at / "exported")]) == 0
    save_tensors(part_path(at / "parts", range(6)), {"features": torch.randn(6, 4)})
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    write_npz(at / "images.npz", [images], 3, [0, 1, 2])
    np.savez_compressed(at / "compressed.npz", arr_0=images)
    write_statistics(at / "statistics.npz", Extractor(), torch.randn(9, 4))
    (at / "override").write_text("generator.network.head={kind: flow_map, width: 64, max_guidance: 4.0}")
    shutil.copy(find_recipe("avatars-64-head"), at / "recipe.yaml")
    for name in ("picture.png", "picture.jpg", "picture.webp"):
        Image.fromarray(np.kron(images[0], np.ones((4, 4, 1), np.uint8))).save(at / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("profile.png", "profile.jpg"):
        Image.fromarray(images[0]).save(at / name, icc_profile=EXCHANGED, exif=exif)
    idx = struct.pack(">HBBIII", 0, 8, 3, 3, 8, 8) + images[..., 0].tobytes()
    (at / "idx").write_bytes(idx)
    (at / "idx.gz").write_bytes(gzip.compress(idx))
    write_tar(at / "set.tar", samples([1, 1, 2, 2]))
    write_pngs(at / "photos", range(4))
    rows = [{"file_name": f"0{index}.png", "label": "ab"[index % 2]} for index in range(4)]
    write_lines(at / "photos/a.jsonl", rows)
    lines = [",".join(map(str, row.values())) for row in rows]
    (at / "photos/a.csv").write_text("\n".join(["file_name,label", *lines]))
    pyarrow.parquet.write_table(image_table([0, 1] * 2, ["a", "b"]), at / "set.parquet", row_group_size=3)
    shutil.copytree(Path(__file__).parents[1] / "data/fixtures/hugging_face/saved", at / "saved")
    return at


# --- Damage ------------------------------------------------------------------------------------------------


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_early(data: bytearray, rng: random.Random) -> None:
    """Change a byte near the start, which holds the header of most formats."""
    data[rng.randrange(min(len(data), 200))] = rng.randrange(256)


def flip_late(data: bytearray, rng: random.Random) -> None:
    """Change a byte near the end, which holds the directory of a zip archive."""
    data[-1 - rng.randrange(min(len(data), 400))] = rng.randrange(256)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.choice((rng.randrange(len(data)), len(data) - 1 - rng.randrange(min(len(data), 32)))) :]


def remove(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.choice((1, 4, 100))]


def insert(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = rng.randbytes(rng.choice((1, 4, 100)))


def blank(data: bytearray, rng: random.Random) -> None:
    """Zero a block, as if it was never written before a power cut."""
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice((16, 512, 4096)))
    data[start:end] = bytes(end - start)


def number(data: bytearray, rng: random.Random) -> None:
    """Replace eight bytes, possibly a length or an offset, by an extreme number."""
    value = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1))
    start = rng.randrange(min(len(data), 64)) if rng.random() < 0.5 else rng.randrange(len(data))
    data[start : start + 8] = struct.pack(rng.choice("<>") + "Q", value)


BYTES = (flip, flip, flip_early, flip_late, cut, remove, insert, blank, number)
STRANGE = (
    None, True, 0, 1, -1, 3, 2**31, 2**60, 2**64, 10**400, 0.5, 1e300, float("nan"), float("inf"),
    "", "a\nb", "\ud800", "../../x", "/", "x" * 5000, [], [[]], [1, 2], {}, {"kind": "masked"}, [0.0] * 3,
)  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (container, key) within a JSON value."""
    for key in (
        list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    ):
        yield value, key
        yield from places(value[key])


def damage_json(text: bytes, rng: random.Random) -> bytes:
    """Replace, rename or remove a value; replacements are other values of the file or strange ones."""
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 2))):
        found = list(places(value))
        if not found:
            break
        (container, key), (other, place) = rng.choice(found), rng.choice(found)
        action = rng.randrange(4)
        if action == 0:
            container[key] = json.loads(json.dumps(other[place]))
        elif action == 1 and isinstance(container, dict):
            container[rng.choice(("kind", "shape", "sha256", "__metadata__", "x"))] = container.pop(key)
        elif action == 2:
            del container[key]
        else:
            container[key] = rng.choice(STRANGE)
    return json.dumps(value).encode()


def damaged(data: bytes, name: str, rng: random.Random) -> bytes:
    if name.endswith(".json") and rng.random() < 0.8:
        return damage_json(data, rng)
    if name.endswith(".safetensors") and rng.random() < 0.3:
        (length,) = struct.unpack("<Q", data[:8])
        header = damage_json(data[8 : 8 + length], rng)
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 3))):
        if changed:
            rng.choice(BYTES)(changed, rng)
    return bytes(changed)


def repaired(data: bytes, rng: random.Random) -> bytes:
    """Damage a member of a zip archive, with a valid checksum, so that later code reads the damage."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(entry, archive.read(entry)) for entry in archive.infolist()]
    # Damage the pickle of torch's files, which describes the other members, half of the time.
    pickles = [number for number, (entry, _) in enumerate(members) if entry.filename.endswith("data.pkl")]
    chosen = rng.choice(pickles if pickles and rng.random() < 0.5 else range(len(members)))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for number, (entry, content) in enumerate(members):
            archive.writestr(
                entry, damaged(content, entry.filename, rng) if number == chosen and content else content
            )
    return out.getvalue()


# --- Verdicts ----------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    if isinstance(a, nn.Module):
        a, b = a.state_dict(), b.state_dict()
    if isinstance(a, Tensor | np.ndarray):
        return (
            type(a) is type(b)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and np.array_equal(np.asarray(a), np.asarray(b))
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def stop(signum: int, frame: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class Memory:
    """Peak memory of the process since creation in MB (on Linux, otherwise 0)."""

    def __init__(self) -> None:
        self.known = sys.platform == "linux"
        if self.known:
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        self.before = self._read("VmRSS")

    def _read(self, name: str) -> int:
        found = (
            re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text()) if self.known else None
        )
        return int(found[1]) // 1024 if found else 0

    def growth(self) -> int:
        """Return the difference of the peak and the memory at creation."""
        return self._read("VmHWM") - self.before


@contextlib.contextmanager
def memory_limit() -> Iterator[None]:
    """Stop unlimited allocation before the machine runs out of memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 8 * MEGABYTES * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def problem(loader: Loader, at: Path, expected: Any) -> str:
    """Return what went wrong with a damaged file; empty if nothing."""
    memory = Memory()
    try:
        with time_limit(), memory_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow and torch warn of damage before they fail
            found = loader.load(at)
    except InputError as error:
        line, name = str(error), Path(loader.file).name
        named = name in line or (loader.else_named is not None and loader.else_named in line)
        return (
            too_much(memory)
            if "\n" not in line and named
            else f"not one line that names {name}: {line[:500]!r}"
        )
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:500]}"
    return too_much(memory) or (
        ""
        if not loader.checked or same(found, expected)
        else "accepted, although it differs from the written content"
    )


def too_much(memory: Memory) -> str:
    growth = memory.growth()
    return "" if growth < MEGABYTES else f"took {growth} MB"


@pytest.fixture(autouse=True)
def _small_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "InceptionV3", network)


def fuzz(name: str, valid: Path, folder: Path, count: int, *, valid_checksum: bool = False) -> None:
    """Check ``count`` damaged files. Damage with a ``valid_checksum`` may be accepted."""
    loader, failures = LOADERS[name], []
    if valid_checksum:
        loader = dataclasses.replace(loader, checked=False)
    at = folder / "at"
    shutil.copytree(valid, at)
    original = (at / loader.file).read_bytes()
    expected = loader.load(at)
    for seed in range(count):
        rng = random.Random(f"{name} {seed}")
        data = repaired(original, rng) if valid_checksum else damaged(original, loader.file, rng)
        (at / loader.file).write_bytes(data)
        if data != original and (wrong := problem(loader, at, expected)):
            failures.append(f"seed {seed}: {wrong}")
    assert not failures, f"{len(failures)} of {count} damaged files of {name!r}:\n" + "\n".join(failures[:20])


def refuse(message: str) -> None:
    raise InputError(message)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from /proc")
def test_every_kind_of_problem_is_found(tmp_path: Path) -> None:
    def verdict(load: Load, *, checked: bool = True) -> str:
        return problem(Loader("folder/a.json", load, checked), tmp_path, 3)

    assert verdict(lambda at: 3) == ""
    assert verdict(lambda at: 4, checked=False) == ""
    assert verdict(lambda at: refuse("folder/a.json is damaged")) == ""
    assert "differs" in verdict(lambda at: 4)
    assert "names a.json" in verdict(lambda at: refuse("folder is damaged"))
    assert "not one line" in verdict(lambda at: refuse("a.json\nis damaged"))
    assert "KeyError" in verdict(lambda at: {}["a"])
    taken = 2**20 * (MEGABYTES + 100)
    assert "took" in verdict(lambda at: bytearray(taken) and refuse("a.json is damaged"))
    assert "took" in verdict(lambda at: bytearray(taken) and 3)
    assert verdict(lambda at: 3) == "", "memory taken before does not count"
    assert "MemoryError" in verdict(lambda at: bytearray(20 * taken))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that interrupts")
@pytest.mark.parametrize("name", LOADERS)
def test_damage_is_found(name: str, valid: Path, tmp_path: Path) -> None:
    fuzz(name, valid, tmp_path, 40)


@pytest.mark.soak
@pytest.mark.parametrize("name", LOADERS)
def test_damage_is_found_in_many_more_files(name: str, valid: Path, tmp_path: Path) -> None:
    fuzz(name, valid, tmp_path, 500)


@pytest.mark.parametrize("name", ZIPS)
def test_damage_with_a_valid_checksum_does_no_harm(name: str, valid: Path, tmp_path: Path) -> None:
    fuzz(name, valid, tmp_path, 40, valid_checksum=True)


@pytest.mark.soak
@pytest.mark.parametrize("name", ZIPS)
def test_damage_with_a_valid_checksum_does_no_harm_in_many_more_files(
    name: str, valid: Path, tmp_path: Path
) -> None:
    fuzz(name, valid, tmp_path, 500, valid_checksum=True)
