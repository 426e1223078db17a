"""Shards: read rows equal written rows, writing resumes, and damage of any kind is rejected."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchrun import run

from far.data.shards import ShardReader, ShardWriter, map_safetensors
from far.files import json_digest
from tests.refusals import refused

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are listed in /proc")
META = {"kind": "images", "size": 3}


def write(folder: Path, counts: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(counts))
    rows = torch.randint(0, 256, (sum(counts), 2, 3), generator=generator).to(torch.uint8)
    writer = ShardWriter(folder, META)
    for part in rows.split(counts):
        writer.write({"images": part, "labels": part[:, 0, 0].long()}, cursor=writer.cursor + len(part))
    writer.finish()
    return rows


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(sum), data=st.data())
def test_rows_are_read_in_any_order(
    counts: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    rows = write(folder, counts)
    reader = ShardReader(folder, "images", verify=True)
    assert len(reader) == len(rows)
    wanted = torch.tensor(data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20)), dtype=torch.int64)
    assert torch.equal(reader.rows("images", wanted), rows[wanted])
    assert torch.equal(reader.rows("labels", wanted), rows[wanted][:, 0, 0].long())
    assert torch.equal(reader.all("images"), rows)


def test_writing_resumes_after_the_last_complete_shard(tmp_path: Path) -> None:
    first = ShardWriter(tmp_path, META)
    first.write({"images": torch.zeros(2, 1, dtype=torch.uint8)}, cursor=5)
    first.report["skipped"] = ["a.png"]
    first.write({"images": torch.zeros(0, 1, dtype=torch.uint8)}, cursor=6)
    again = ShardWriter(tmp_path, META)
    assert again.cursor == 6
    assert not again.complete
    assert again.report == {"skipped": ["a.png"]}
    with refused(str(tmp_path)):
        ShardReader(tmp_path, "images")
    again.write({"images": torch.ones(1, 1, dtype=torch.uint8)}, cursor=7)
    again.finish()
    assert ShardReader(tmp_path, "images").all("images").flatten().tolist() == [0, 0, 1]


def test_other_settings_and_other_kinds_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [2])
    with refused(tmp_path, "size"):
        ShardWriter(tmp_path, {**META, "size": 4})
    with refused("'images'"):
        ShardReader(tmp_path, "moments")


@pytest.mark.parametrize("finished", [True, False])
def test_folder_without_one_of_its_shards_is_not_continued(finished: bool, tmp_path: Path) -> None:
    write(tmp_path, [2, 2])
    if not finished:
        index = json.loads((tmp_path / "index.json").read_text()) | {"complete": False}
        del index["sha256"]
        (tmp_path / "index.json").write_text(json.dumps({**index, "sha256": json_digest(index)}))
    ShardWriter(tmp_path, META)
    (tmp_path / "shard-00000.safetensors").unlink()
    with refused("shard-00000"):
        ShardWriter(tmp_path, META)


@pytest.mark.parametrize("position", [0, 5, 60, -1])
def test_flipped_byte_is_detected(position: int, tmp_path: Path) -> None:
    write(tmp_path, [4, 4])
    shard = tmp_path / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[position] ^= 0x10
    shard.write_bytes(content)
    with refused("shard-00001"):
        ShardReader(tmp_path, "images", verify=True)


@pytest.mark.parametrize("length", [0, 4, 20, 200])
def test_truncated_shard_is_detected_without_checksums(length: int, tmp_path: Path) -> None:
    write(tmp_path, [40])
    shard = tmp_path / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:length])
    with refused("shard-00000"):
        ShardReader(tmp_path, "images")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"meta": {}}', '{"meta": {"kind": "images"}, "complete": true}', "\x00\xff"],
)
def test_damaged_index_is_refused(content: str, tmp_path: Path) -> None:
    write(tmp_path, [2])
    (tmp_path / "index.json").write_text(content, encoding="latin-1")
    with refused(str(tmp_path)):
        ShardReader(tmp_path, "images")


def test_error_for_a_missing_folder_names_the_command(tmp_path: Path) -> None:
    with refused("far data"):
        ShardReader(tmp_path / "nothing", "images")


# Each of two processes writes its results to its own file: an error in one must be raised in both.
SCRIPT = """
import os
from pathlib import Path

import torch
from tqdm import tqdm

from far.data.shards import Piece, ShardWriter
from far.errors import InputError
from far.processes import joined


def make(part):
    if processes.rank == wrong and part.start > 3:
        raise InputError(f"no rows {part}")
    for row in part:
        yield Piece(1, {"rows": torch.tensor([row])})


def attempt(folder, meta):
    try:
        ShardWriter(Path(folder), meta, processes).fill(9, 2, make, tqdm(disable=True))
        return "written"
    except InputError as error:
        return str(error)


with joined() as processes:
    messages = []
    for wrong in (0, 1, None):
        messages.append(attempt("rows", {"kind": "rows"}))
    messages.append(attempt("rows", {"kind": "others"}))
    # The same path is another folder for each process, as on the disks of two machines.
    Path(f"disk-{processes.rank}").mkdir()
    os.chdir(f"disk-{processes.rank}")
    messages.append(attempt("own", {"kind": "rows"}))
    os.chdir("..")
Path(f"messages-{processes.rank}").write_text("\\n".join(messages))
"""


def test_error_of_one_process_is_raised_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    run(2, "script.py")
    for rank in (0, 1):
        first, second, third, other, unshared = (tmp_path / f"messages-{rank}").read_text().splitlines()
        assert (first, second, third) == ("no rows range(4, 6)", "no rows range(6, 8)", "written")
        assert other.startswith("rows ")
        assert unshared.startswith("own ")
    reader = ShardReader(tmp_path / "rows", "rows", verify=True)
    assert reader.all("rows").tolist() == list(range(9))
    assert len(list((tmp_path / "rows").iterdir())) == 6


@needs_proc
def test_a_folder_of_more_shards_than_a_process_may_open_files_is_read(tmp_path: Path) -> None:
    """Each shard takes one open file, whatever its tensors, and the limit is raised for those."""
    rows = write(tmp_path, [1] * 90)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 60, hard))
        reader = ShardReader(tmp_path, "images")
        assert torch.equal(reader.all("images"), rows)
        assert len(os.listdir("/proc/self/fd")) <= before + 91
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@needs_proc
def test_a_shard_that_cannot_be_opened_is_not_called_damaged(tmp_path: Path) -> None:
    write(tmp_path, [2])
    shard = tmp_path / "shard-00000.safetensors"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        with refused(shard, "ulimit"):
            map_safetensors(shard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    shard.unlink()
    with refused(shard, "missing"):
        map_safetensors(shard)
