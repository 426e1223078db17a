"""Readers of images: each finds every image with its class, in place, or refuses in one line."""

import gzip
import io
import json
import os
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest
from image_sources import color, image_table, png, samples, write_lines, write_pngs, write_tar
from PIL import Image

from far.cli.main import main
from far.data.detection import open_source
from far.data.packing import _split
from far.data.shards import ShardReader
from far.data.sources import Source
from tests.refusals import refused

# Written by datasets 5.2: DatasetDict.save_to_disk and Dataset.to_parquet. Classes owl and cat take turns;
# images 0 to 6 are for training, 40 to 43 for testing.
HUGGING_FACE = Path(__file__).parent / "fixtures/hugging_face"


def found(source: Source, *, held_out: bool = False) -> list[tuple[int, str]]:
    """The images of a part: index by color, and class, sorted by index."""
    images = []
    for record in source.records:
        with source.open(record) as file, Image.open(file) as picture:
            index = picture.convert("RGB").getpixel((3, 3))[0]
            assert picture.convert("RGB").getpixel((3, 3)) == color(index)
        if record.held_out == held_out:
            images.append((index, source.classes[record.label]))
    return sorted(images)


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_data_sets_of_hugging_face_are_read(form: str) -> None:
    source = open_source(str(HUGGING_FACE / form))
    assert source.classes == ["owl", "cat"]
    assert found(source) == [(index, ["owl", "cat"][index % 2]) for index in range(7)]
    assert found(source, held_out=True) == [(40 + index, ["owl", "cat"][index % 2]) for index in range(4)]
    part = "saved/train" if form == "saved" else "parquet/data/train-00000-of-00001.parquet"
    assert found(open_source(str(HUGGING_FACE / part))) == found(source)


def test_tars_are_read_in_place_with_integer_classes_in_numerical_order(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"set-{number:03d}.tar", samples([11, 2, 2, 11], first=4 * number))
    everything = [(index, ("11", "2", "2", "11")[index % 4]) for index in range(12)]
    for place in ("", "set-{000..002}.tar", "set-*.tar", "set-00{0,1,2}.tar"):
        source = open_source(str(tmp_path / place))
        assert source.classes == ["2", "11"]
        assert found(source) == everything
        assert not source.left_out
    for record in source.records:
        path, name = tmp_path / Path(record.key).parent, Path(record.key).name
        with tarfile.open(path) as tar, source.open(record) as file:
            assert file.read() == tar.extractfile(name).read()  # type: ignore[union-attr]
    assert found(open_source(str(tmp_path / "set-00{1..1}.tar"))) == everything[4:8]
    with refused(tmp_path / "set-003.tar"):
        open_source(str(tmp_path / "set-{000..003}.tar"))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".tar"] * 3


@pytest.mark.parametrize("place", ["a/*.tar", "{a,b}/0.tar", "{@,b}/0.tar", "@/?.tar", "b/../{a,b}/*.tar"])
def test_paths_may_be_relative_absolute_or_both(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """@ stands for the absolute path of the folder a."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("ab"):
        write_tar(tmp_path / name / "0.tar", samples([name, name], first=2 * number))
    every = [(0, "a"), (1, "a"), (2, "b"), (3, "b")]
    images = found(open_source(place.replace("@", str(tmp_path / "a"))))
    assert images == (every if "b}" in place else every[:2])


def test_brackets_in_a_pattern_are_those_of_the_name(tmp_path: Path) -> None:
    for number, name in enumerate(("set [1]", "set 1")):
        write_tar(tmp_path / name / f"{number}.tar", samples(["a", "a"], first=2 * number))
    assert found(open_source(str(tmp_path / "set [1]" / "*.tar"))) == [(0, "a"), (1, "a")]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_of_every_form_is_read_as_tarfile_reads_it(form: int, tmp_path: Path) -> None:
    names = ["a/1.png", "b/größe 2.png", f"{'c' * 90}/{'3' * 90}.png", "a/4.png", "b/5.png", "b/6.png"]
    names += [] if form == tarfile.USTAR_FORMAT else [f"{'c' * 90}/{'7' * 200}.png"]
    names += [f"{'c' * 90}/8.png", "a/9.png"]
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(png(number)), number + 0.5 * (form == tarfile.PAX_FORMAT)
            tar.addfile(info, io.BytesIO(png(number)))
            folder = tarfile.TarInfo(f"folder {number}")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        link = tarfile.TarInfo("a/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "1.png"
        tar.addfile(link)
    source = open_source(str(tmp_path / "a.tar"))
    with tarfile.open(tmp_path / "a.tar") as tar:
        expected = {f"a.tar/{each.name}": tar.extractfile(each).read() for each in tar if each.isreg()}  # type: ignore[union-attr]
    contents = {}
    for record in source.records:
        with source.open(record) as file:
            contents[record.key] = file.read()
    assert contents == expected
    assert source.left_out == {"links or special files": 1}


def test_tar_is_labeled_by_json_text_or_folders(tmp_path: Path) -> None:
    pairs = [json.dumps({"label": name, "size": number}) for name, number in (("b", 1), ("a", 2)) * 2]
    place = str(write_tar(tmp_path / "json.tar", samples(pairs, "json")))
    assert found(open_source(place)) == [(0, "b"), (1, "a"), (2, "b"), (3, "a")]
    assert found(open_source(place, "size")) == [(0, "1"), (1, "2"), (2, "1"), (3, "2")]
    with refused("weight"):
        open_source(place, "weight")
    place = str(write_tar(tmp_path / "text.tar", samples(["b", "a", "b\n", " a"], "txt")))
    assert found(open_source(place)) == [(0, "b"), (1, "a"), (2, "b"), (3, "a")]
    members = [(f"./top/{name}/{index}.PNG", png(index)) for index, name in enumerate("abab")]
    others = [("notes.md", b"x"), ("top/._a.png", b"x"), ("top/a/0.seg.png", b"x"), ("top/a/0.mask", b"x")]
    source = open_source(str(write_tar(tmp_path / "folders.tar", [*members, *others])))
    assert found(source) == [(0, "a"), (1, "b"), (2, "a"), (3, "b")]
    assert source.left_out == {".md": 1, "hidden": 1, ".png": 1, ".mask": 1}


def test_tar_and_folder_have_the_same_classes_and_parts(tmp_path: Path) -> None:
    names = ["b/1.png", "a/deep/2.png", "a/3.png", "b/4.png", "10/5.png", "10/x/6.png", "7.png"]
    trees = {"classes": names}
    for form, deeper in (("parts", "c/"), ("unlabeled", "")):
        parts = (("train", 2), ("val", 10), ("test", 20))
        trees[form] = [f"{part}/{deeper}{first + i}.png" for part, first in parts for i in range(3)]
    for form, tree in trees.items():
        folder = tmp_path / form
        members = [(name, png(int(Path(name).stem))) for name in tree]
        for name, content in members:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        expected = open_source(str(folder))
        for top in ("", "./", "downloads/set/"):
            path = write_tar(tmp_path / f"{form}.tar", [(top + name, content) for name, content in members])
            source = open_source(str(path))
            assert source.classes == expected.classes
            assert source.left_out == expected.left_out
            for held_out in (False, True):
                assert found(source, held_out=held_out) == found(expected, held_out=held_out)
        assert ("val/ held out" in source.kind) == (form != "classes")


def test_labels_in_tars_go_with_parts_by_folder_or_by_file(tmp_path: Path) -> None:
    train, val = samples(["a", "b"] * 2), samples(["a", "b"], first=20)
    members = [("x/train/" + name, content) for name, content in train]
    members += [("x/val/" + name, content) for name, content in val]
    write_tar(tmp_path / "all.tar", members)
    for part, content in (("train", train), ("val", val)):
        write_tar(tmp_path / f"set-{part}.tar", [(f"x/{part}/{name}", each) for name, each in content])
    for place in ("all.tar", "set-*.tar"):
        source = open_source(str(tmp_path / place))
        assert found(source) == [(0, "a"), (1, "b"), (2, "a"), (3, "b")]
        assert found(source, held_out=True) == [(20, "a"), (21, "b")]
    for part, numbers in (("train", (1, 2)), ("val", (3, 4))):
        images = [(f"x/cats/{number}.png", png(number)) for number in numbers]
        write_tar(tmp_path / f"one-{part}.tar", images)
    source = open_source(str(tmp_path / "one-*.tar"))
    assert found(source) == [(1, "cats"), (2, "cats")]
    assert found(source, held_out=True) == [(3, "cats"), (4, "cats")]


def test_an_image_beside_the_outermost_folder_of_a_tar_is_left_out(tmp_path: Path) -> None:
    classes = [(f"x/{name}/{number}.png", png(number)) for name in ("a", "b") for number in (1, 2)]
    parts = [(f"y/{part}/a/{number}.png", png(number)) for part in ("train", "val") for number in (3, 4)]
    for members in (classes, classes[:2], parts):
        write_tar(tmp_path / "stray.tar", [("preview.png", png(9)), *members])
        source = open_source(str(tmp_path / "stray.tar"))
        assert source.left_out == {"outside the class folders": 1}
        assert source.has_parts == (members is parts)
        assert source.classes == (["a", "b"] if members is classes else ["a"])


def test_images_labeled_minus_one_are_left_out_and_counted(tmp_path: Path) -> None:
    labels = [1, -1, 0, 1, -1, 0]
    write_pngs(tmp_path / "photos", range(6))
    write_tar(tmp_path / "a.tar", samples(labels))
    rows = [{"path": f"photos/0{index}.png", "label": label} for index, label in enumerate(labels)]
    write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.csv").write_text("path,label\n" + "\n".join(f"{r['path']},{r['label']}" for r in rows))
    pyarrow.parquet.write_table(image_table(labels), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(image_table(labels, ["0", "1"]), tmp_path / "named.parquet")
    for name in ("a.tar", "a.jsonl", "a.csv", "a.parquet", "named.parquet"):
        source = open_source(str(tmp_path / name))
        assert found(source) == [(0, "1"), (2, "0"), (3, "1"), (5, "0")]
        assert source.left_out == {"labeled -1 (no label)": 2}
    for name in ("-1", "0"):
        write_pngs(tmp_path / "folders" / name, range(3))
    assert {*open_source(str(tmp_path / "folders")).classes} == {"-1", "0"}


def test_few_of_many_parquet_files_are_open_at_a_time(tmp_path: Path) -> None:
    for number in range(40):
        pyarrow.parquet.write_table(image_table([0, 1]), tmp_path / f"{number:02d}.parquet")
    before = len(os.listdir("/proc/self/fd"))
    source = open_source(str(tmp_path))
    for record in source.records:
        source.open(record).close()
    assert len(os.listdir("/proc/self/fd")) - before <= 20


def test_a_table_in_one_of_several_folders_is_refused(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        write_pngs(tmp_path / name, range(2))
    (tmp_path / "cats" / "metadata.csv").write_text("file_name,label\n00.png,a\n01.png,a\n")
    with refused(tmp_path / "cats", "metadata.csv", tmp_path / "dogs"):
        open_source(str(tmp_path))
    (tmp_path / "cats" / "metadata.csv").write_text("file_name,label\n../dogs/00.png,a\n01.png,a\n")
    assert len(open_source(str(tmp_path)).records) == 2


def test_a_table_of_the_folder_comes_before_those_of_subfolders(tmp_path: Path) -> None:
    write_pngs(tmp_path / "photos", range(4))
    rows = [{"file_name": f"0{index}.png", "label": "within"} for index in range(4)]
    write_lines(tmp_path / "photos" / "metadata.jsonl", rows)
    lines = [f"photos/0{index}.png,{'ab'[index // 2]}" for index in range(4)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    assert list(open_source(str(tmp_path)).classes) == ["a", "b"]


def test_captions_in_a_tar_are_no_labels(tmp_path: Path) -> None:
    members = [(f"{i}.png", png(i)) for i in range(4)]
    members += [(f"{i}.txt", f"a photo of {i} dogs".encode()) for i in range(4)]
    write_tar(tmp_path / "a.tar", members)
    source = open_source(str(tmp_path / "a.tar"))
    assert found(source) == [(i, "images") for i in range(4)]
    (hint,) = source.hints
    assert "captions" in hint
    write_tar(tmp_path / "b.tar", [(f"{'xy'[i // 2]}/{name}", content) for name, content in members
                                   for i in (int(name[0]),)])  # fmt: skip
    assert found(open_source(str(tmp_path / "b.tar"))) == [(0, "x"), (1, "x"), (2, "y"), (3, "y")]


def test_minus_one_beside_one_is_a_class(tmp_path: Path) -> None:
    labels = [1, -1, 1, -1]
    write_pngs(tmp_path / "photos", range(4))
    rows = [f"photos/0{index}.png,{label}" for index, label in enumerate(labels)]
    (tmp_path / "a.csv").write_text("\n".join(["path,label", *rows]))
    pyarrow.parquet.write_table(image_table(labels), tmp_path / "a.parquet")
    write_tar(tmp_path / "a.tar", samples(labels))
    for name in ("a.csv", "a.parquet", "a.tar"):
        source = open_source(str(tmp_path / name))
        assert found(source) == [(0, "1"), (1, "-1"), (2, "1"), (3, "-1")]
        assert not source.left_out


def test_notes_name_a_table_that_is_not_read_or_has_no_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_pngs(tmp_path / "flat", range(4))
    (tmp_path / "flat/labels.csv").write_text("id,class\n00,a\n")
    for name in "ab":
        write_pngs(tmp_path / "classes" / name, range(2))
    shutil.copy(tmp_path / "flat/labels.csv", tmp_path / "classes")
    write_pngs(tmp_path / "captions", range(4))
    rows = "".join(f"0{index}.png,a cat\n" for index in range(4))
    (tmp_path / "captions/metadata.csv").write_text("file_name,text\n" + rows)
    for name, table, classes in (
        ("flat", "labels", 1),
        ("classes", "labels", 2),
        ("captions", "metadata", 1),
    ):
        assert len(open_source(str(tmp_path / name)).classes) == classes
        assert main(["data", str(tmp_path / name), str(tmp_path / "out" / name), "--size", "8"]) == 0
        notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("far: note")]
        assert len(notes) == 1
        assert f"{name}/{table}.csv" in notes[0]
    assert "'text'" in notes[0]


def test_list_of_images_takes_little_memory(tmp_path: Path) -> None:
    count = 50_000
    table = pyarrow.table({"image": [b"x"] * count, "label": [index % 100 for index in range(count)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5000)
    del table
    open_source(str(HUGGING_FACE / "parquet"))  # imports what the reader needs
    tracemalloc.start()
    source = open_source(str(tmp_path / "a.parquet"))
    held_out, train = _split(source, 0.05)
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(held_out) + len(train) == len(source.records) == count
    assert size < 110 * count
    assert peak < 160 * count


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_table_lists_images_and_labels(form: str, tmp_path: Path) -> None:
    write_pngs(tmp_path / "photos", range(5))
    rows = [{"file_name": f"photos/0{index}.png", "label": "ba"[index % 2]} for index in range(4)]
    path = tmp_path / f"metadata.{form}"
    if form == "csv":
        lines = [f'{number},"{row["file_name"]}",{row["label"]}' for number, row in enumerate(rows)]
        path.write_text("\ufeff,file_name,label\r\n" + "\r\n".join(lines))  # as spreadsheets write it
    else:
        write_lines(path, rows)
    for place in (path, tmp_path):
        source = open_source(str(place))
        assert source.classes == ["a", "b"]
        assert found(source) == [(0, "b"), (1, "a"), (2, "b"), (3, "a")]
        assert source.left_out == {f"not in metadata.{form}": 1}


def test_folder_without_labels_is_one_class(tmp_path: Path) -> None:
    write_pngs(tmp_path / "photos", range(4))
    write_tar(tmp_path / "a.tar", [(f"{index}.png", png(index)) for index in range(4)])
    write_lines(tmp_path / "a.jsonl", ({"path": f"photos/0{index}.png"} for index in range(4)))
    pyarrow.parquet.write_table(image_table([0] * 4).drop_columns("label"), tmp_path / "a.parquet")
    for name in ("photos", "a.tar", "a.jsonl", "a.parquet"):
        source = open_source(str(tmp_path / name))
        assert [index for index, _ in found(source)] == [0, 1, 2, 3]
        assert len(source.classes) == 1


def test_val_folder_is_held_out(tmp_path: Path) -> None:
    for part, first in (("train", 0), ("val", 20), ("test", 40)):
        for number, name in enumerate("ab"):
            write_pngs(tmp_path / "net" / part / name, range(first + 3 * number, first + 3 * number + 3))
    source = open_source(str(tmp_path / "net"))
    assert found(source) == [(index, "ab"[index // 3]) for index in range(6)]
    assert found(source, held_out=True) == [(20 + index, "ab"[index // 3]) for index in range(6)]
    assert source.left_out == {"in test/": 6}
    shutil.rmtree(tmp_path / "net/val")
    assert found(open_source(str(tmp_path / "net")), held_out=True)[0] == (40, "a")
    shutil.rmtree(tmp_path / "net/test/b")
    with refused("'b'"):
        open_source(str(tmp_path / "net"))


def test_classes_named_like_parts_stay_classes(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "test", "station")):
        write_pngs(tmp_path / name, range(3 * number, 3 * number + 3))
    assert open_source(str(tmp_path)).classes == ["station", "test", "train"]


Write = Callable[[Path], object]


def parquet(table: pyarrow.Table) -> Write:
    return lambda path: pyarrow.parquet.write_table(table, path / "a.parquet")


def text(name: str, content: str) -> Write:
    return lambda path: (path / name).write_text(content)


def tar(members: list[tuple[str, bytes]], cut: int | None = None, times: int = 1) -> Write:
    def write(folder: Path) -> None:
        path = write_tar(folder / "a.tar", members)
        path.write_bytes(times * path.read_bytes()[:cut])

    return write


def hiding(folder: Path) -> None:
    for name in "ab":
        write_pngs(folder / name, range(2))
    (folder / "metadata.csv").write_text("file_name,size\na/00.png,1\nb/00.png,2\n")


FLAWS: dict[str, tuple[Write, str, str]] = {
    "tar cut within an image": (tar(samples([1, 1]), 600), "a.tar", "a.tar"),
    "tar cut between images": (tar(samples([1] * 4), 4096), "a.tar", "a.tar"),
    "tar cut to nothing": (tar(samples([1, 1]), 0), "a.tar", "a.tar"),
    "two tars in one file": (tar(samples([1, 1]), times=2), "a.tar", "a.tar"),
    "tar with two files of one name": (tar(samples([1, 1]) * 2), "a.tar", "00.png"),
    "tar with labels of two types": (tar(samples([1, 1, "x", "x"])), "a.tar", "a.tar/02.png"),
    "tar with an unlabeled image": (tar([*samples([1, 1]), ("z.png", png(9))]), "a.tar", "a.tar/z.png"),
    "tar with a label that is no text": (tar(samples(['{"label": [1]}'] * 2, "json")), "a.tar", "00.json"),
    "tar without images": (tar([("a.txt", b"x")]), "a.tar", "a.tar"),
    "compressed tar": (lambda path: (path / "a.tar").write_bytes(gzip.compress(b"x")), "a.tar", "a.tar"),
    "archive of another kind": (text("a.zip", "x"), "a.zip", ".zip"),
    "nothing": (text("a.txt", ""), "nowhere.tar", "nowhere.tar"),
    "parquet without images": (parquet(pyarrow.table({"label": [1, 1]})), "a.parquet", "a.parquet"),
    "parquet with two columns of images": (
        parquet(pyarrow.table({"x": [b"1"], "y": [b"2"]})), "a.parquet", "'x', 'y'"
    ),
    "parquet with a missing label": (parquet(image_table([1, 1, None])), "a.parquet", "row 2"),
    "parquet with an unknown class": (parquet(image_table([0, 0, 2], ["a", "b"])), "a.parquet", "row 2"),
    "parquet with two classes of one name": (
        parquet(image_table([0, 1, 2], ["crane", "macaw", "crane"])), "a.parquet", "'crane'"
    ),
    "parquet with numbers as labels": (parquet(image_table([0.5, 0.5])), "a.parquet", "row 0"),
    "no parquet": (text("a.parquet", "PAR1 PAR1"), "a.parquet", "a.parquet"),
    "CSV with a missing file": (text("a.csv", "path,label\n00.png,a\n09.png,a\n"), "a.csv", "line 3"),
    "CSV with a missing label": (text("a.csv", "path,label\n00.png,a\n01.png,\n"), "a.csv", "01.png"),
    "CSV with a missing value": (text("a.csv", "path,label\n00.png,a\n01.png\n"), "a.csv", "line 3"),
    "CSV with a file twice": (text("a.csv", "path,label\n00.png,a\n./00.png,b\n"), "a.csv", "00.png"),
    "CSV without paths": (text("a.csv", "a,b\n1,2\n"), "a.csv", "'a', 'b'"),
    "CSV that is not UTF-8": (
        lambda path: (path / "a.csv").write_bytes("path,label\n00.png,größer\n".encode("latin-1")),
        "a.csv", "UTF-8",
    ),
    "CSV in UTF-16": (
        lambda path: (path / "a.csv").write_bytes("path,label\n00.png,a\n".encode("utf-16")), "a.csv", "UTF-8"
    ),
    "CSV whose images all have no label": (
        text("a.csv", "path,label\n00.png,-1\n01.png,-1\n"), "a.csv", "2 labeled -1"
    ),
    "JSON lines with a truth value as label": (
        text("a.jsonl", '{"path": "00.png", "label": true}'), "a.jsonl", "line 1"
    ),
    "JSON lines without a path": (
        text("a.jsonl", '{"path": "00.png"}\n{"label": 1}'), "a.jsonl", "line 2"
    ),
    "table without labels beside class folders": (hiding, "", "metadata.csv"),
    "empty CSV": (text("a.csv", ""), "a.csv", "a.csv"),
    "class with one image": (text("a.csv", "path,label\n00.png,a\n01.png,a\n02.png,b\n"), "a.csv", "'b'"),
    "names that differ in case": (text("a.csv", "path,label\n00.png,A\n01.png,a\n"), "a.csv", "'A'"),
    "JSON lines with labels of two types": (
        text("a.jsonl", '{"path": "00.png", "label": 1}\n{"path": "01.png", "label": "1"}'),
        "a.jsonl", "01.png",
    ),
    "JSON lines cut off": (text("a.jsonl", '{"path": "00.png"}\n{"path": "01.'), "a.jsonl", "line 2"),
    "line that is a list": (text("a.jsonl", "[1]"), "a.jsonl", "line 1"),
    "state without files": (text("state.json", "{}"), "", "state.json"),
}  # fmt: skip


@pytest.mark.parametrize("flaw", FLAWS)
def test_flawed_source_is_refused_before_anything_is_written(
    flaw: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write, name, named = FLAWS[flaw]
    (tmp_path / "in").mkdir()
    write_pngs(tmp_path / "in", range(3))
    write(tmp_path / "in")
    assert main(["data", str(tmp_path / "in" / name), str(tmp_path / "set"), "--size", "8"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error
    assert not (tmp_path / "set").exists()


def test_every_kind_of_source_gives_the_same_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = ["a", "b"] * 6
    for index, name in enumerate(names):
        write_pngs(tmp_path / "folders" / name, [index])
    write_pngs(tmp_path / "photos", range(12))
    write_tar(tmp_path / "a.tar", samples(names))
    rows = ({"file_name": f"photos/{index:02d}.png", "label": name} for index, name in enumerate(names))
    write_lines(tmp_path / "a.jsonl", rows)
    labels = [index % 2 for index in range(12)]
    pyarrow.parquet.write_table(image_table(labels, ["a", "b"]), tmp_path / "a.parquet", row_group_size=5)
    expected = None
    for number, name in enumerate(("folders", "a.tar", "a.jsonl", "a.parquet")):
        command = ["data", str(tmp_path / name), str(tmp_path / f"set-{number}"), "--size", "8"]
        assert main(command) == 0
        contents = [sorted(images_of(tmp_path / f"set-{number}" / part)) for part in ("train", "held-out")]
        assert sorted(contents[0] + contents[1]) == [(index, index % 2) for index in range(12)]
        expected = expected or contents
        assert contents == expected
        assert main(command) == 0
        assert "already complete" in capsys.readouterr().out


def test_changed_labels_are_another_source(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The order of the images stays, and so do their keys and contents."""
    for labels, status in (("aabb", 0), ("aaab", 2), ("aabb", 0)):
        write_tar(tmp_path / "a.tar", samples(list(labels + "bb")))
        assert main(["data", str(tmp_path / "a.tar"), str(tmp_path / "set"), "--size", "8"]) == status
    assert str(tmp_path / "set") in capsys.readouterr().err


def images_of(folder: Path) -> list[tuple[int, int]]:
    reader = ShardReader(folder, "images", verify=True)
    return list(zip(reader.all("images")[:, 0, 0, 0].tolist(), reader.all("labels").tolist()))


def test_parts_of_a_source_are_kept_and_broken_images_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    broken = [("zz.png", b"no image"), ("zz.cls", b"a")]
    write_tar(tmp_path / "x-train-0.tar", [*samples(["a", "b"] * 3), *broken])
    write_tar(tmp_path / "x-val-0.tar", samples(["a", "b"] * 2, first=10))
    command = ["data", str(tmp_path), str(tmp_path / "set"), "--size", "8"]
    assert main(command) == 0
    assert sorted(images_of(tmp_path / "set/train")) == [(index, index % 2) for index in range(6)]
    assert sorted(images_of(tmp_path / "set/held-out")) == [(index, index % 2) for index in range(10, 14)]
    out, error = capsys.readouterr()
    assert "1 broken" in out.splitlines()[-1]
    assert "x-train-0.tar/zz.png" in error
    assert main([*command, "--held-out-share", "0.1"]) == 2
    write_tar(tmp_path / "x-val-0.tar", [*broken, ("0.png", b"x"), ("0.cls", b"b")])
    assert main(["data", str(tmp_path), str(tmp_path / "new"), "--size", "8"]) == 2
    assert not (tmp_path / "new").exists()
