"""Documents: links, anchors, commands, recipe keys and blocks of code are valid, and the site builds.

Documents are found, not listed, so a new one is checked too. CONTRIBUTING.md explains the comments before
blocks of code.
"""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from far.cli.main import main, parse
from far.config import from_dict
from far.heads import HEADS, HeadConfig
from far.recipe import Recipe, from_overrides, load_recipe
from far.training.distillation import DistillationConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [
        *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "PYPI")),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / "notebooks").glob("*.ipynb"),
    ]
)
RECIPES = sorted([*(ROOT / "far/recipes").glob("*.yaml"), *(ROOT / "recipes").rglob("*.yaml")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
# Every block of Python that is not run is counted here, so that none is skipped by accident.
NOT_RUN = {"docs/export.md": 1, "docs/hub.md": 3, "docs/results.md": 1, "docs/tutorials/write-a-head.md": 1}

BLOCK = re.compile(
    r"(?:^<!-- ?(?P<comment>[^\n]*?) ?-->\n)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of code; ``comment`` is the text of an HTML comment on the line before it."""

    language: str
    code: str
    comment: str
    line: int


def text_of(document: Path) -> str:
    """Return a document's Markdown.

    Shell commands in the code of a notebook become an ``sh`` block, with the values of its variables.
    """
    text = document.read_text(encoding="utf-8")
    if document.suffix != ".ipynb":
        return text
    parts, values = [], {}
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        values |= dict(re.findall(r"^([A-Z]+) = \"?([\w-]+)", source, re.MULTILINE))
        commands = re.findall(r"^ *!(.+)$", source, re.MULTILINE) if cell["cell_type"] == "code" else []
        commands = [re.sub(r"\{([A-Z]+)\}", lambda name: values[name[1]], line) for line in commands]
        parts.append(source if cell["cell_type"] == "markdown" else "\n".join(["```sh", *commands, "```"]))
    return "\n\n".join(parts)


def blocks(document: Path, language: str) -> list[Block]:
    text = text_of(document)
    every = [
        Block(m["language"], m["code"], m["comment"] or "", text[: m.start("code")].count("\n"))
        for m in BLOCK.finditer(text)
    ]
    return [block for block in every if block.language == language]


def prose(text: str) -> str:
    """Return a text without code, in which nothing is a link or a heading."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", text)


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")


def anchors(document: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", text_of(document), flags=re.MULTILINE | re.DOTALL)
    found: dict[str, int] = {}
    result = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.MULTILINE):
        name = slug(heading)
        result.add(f"{name}-{found[name]}" if name in found else name)
        found[name] = found.get(name, 0) + 1
    return result


def links(document: Path) -> Iterator[str]:
    text = prose(text_of(document))
    yield from re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", text)
    yield from re.findall(r"^\[[^]]+\]: +(\S+)", text, re.MULTILINE)
    yield from re.findall(r"<(?:a|img)[^>]* (?:href|src)=\"([^\"]+)\"", text)


def broken_links(document: Path) -> list[str]:
    broken = []
    for link in links(document):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / unquote(path)).resolve() if path else document
        inside = target.is_relative_to(ROOT) and target.exists()
        if not inside or (anchor and (target.suffix != ".md" or unquote(anchor) not in anchors(target))):
            broken.append(link)
    return broken


@every_document
def test_links_and_anchors_lead_somewhere(document: Path) -> None:
    assert broken_links(document) == []


def test_links_and_commands_of_a_notebook_are_found(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# A\n", "[b](c.md)"]},
        {
            "cell_type": "code",
            "source": ["COUNT = 3  # few\n", "!far generate --count {COUNT}\n", "x = 1"],
        },
    ]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    assert list(links(tmp_path / "a.ipynb")) == ["c.md"]
    assert commands(tmp_path / "a.ipynb") == [["far", "generate", "--count", "3"]]


def test_broken_links_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Show that :func:`test_links_and_anchors_lead_somewhere` can fail."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "b.md").write_text(
        "# A title, with `code` & more\n\n## Twice\n\n## Twice\n\n```sh\n# no heading\n```\n"
    )
    (tmp_path / "a.md").write_text(
        "[a](b.md#a-title-with-code--more) [b](b.md#twice-1) [c](#here) ![d](d.png) [e](c.md)\n"
        "[f](b.md#no-heading) [g](b.md#twice-2)\n"
        '<img src="e.png"> [h](https://example.org/none) `[i](none.md)` [j](../outside.md)\n\n'
        "## Here\n\n```sh\n[k](none.md)\n```\n"
    )
    (tmp_path.parent / "outside.md").write_text("")
    assert broken_links(tmp_path / "a.md") == [
        "d.png",
        "c.md",
        "b.md#no-heading",
        "b.md#twice-2",
        "../outside.md",
        "e.png",
    ]


# --- Commands ---------------------------------------------------------------------------------------


def commands(document: Path) -> list[list[str]]:
    """Return every command of the sh blocks, in words."""
    code = "".join(block.code for block in blocks(document, "sh"))
    lines = code.replace("\\\n", " ").replace(" && ", "\n").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_far(words: list[str]) -> None:
    """Check that the parser accepts the arguments, and that keys of recipes and distillations exist."""
    arguments = parse(words)
    if arguments.command == "distill":
        from_overrides(DistillationConfig(), arguments.overrides)
    elif hasattr(arguments, "recipe"):
        # A reader's own recipe is written out in the document and checked there; only its name is known here.
        own = arguments.recipe.suffix == ".yaml" and arguments.recipe.parts[0] != "recipes"
        load_recipe(
            "avatars-64" if own else ROOT / arguments.recipe if arguments.recipe.suffix else arguments.recipe,
            arguments.overrides,
        )


def check_script(words: list[str]) -> None:
    """Check that a benchmark exists and that its source names the options."""
    script = ROOT / f"{words[0].replace('.', '/')}.py"
    assert script.is_file(), f"{words[0]} does not exist"
    text = script.read_text(encoding="utf-8")
    unknown = [word for word in words[1:] if word.startswith("--") and f'"{word}"' not in text]
    assert not unknown, f"{words[0]} has no option {unknown}"


def check_command(words: list[str]) -> None:
    program, *rest = words
    program = Path(program).name
    if program == "torchrun":
        assert rest[rest.index("-m") + 1] == "far"
        rest = [word for word in rest[rest.index("-m") + 2 :] if word != "…"]
        check_far(rest if rest[0] != "evaluate" or "--reference" in rest else [*rest, "--reference", "any"])
    elif program == "far":
        check_far(rest)
    elif program == "python" and rest[0] == "-m":
        if rest[1].startswith("benchmarks."):
            check_script(rest[1:])
        else:
            check_far(rest[2:] if rest[1] == "far" else ["--version"])
    elif program == "python" and rest[0].endswith(".py"):
        if len(rest) > 1 and rest[1] in (
            "generate",
            "train",
            "recipe",
        ):  # a reader's program that ends in our main()
            with_mixture(lambda: check_far(rest[1:]))
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert next(word for word in rest if "=" not in word) in targets, f"the Makefile has no target {rest}"


@dataclasses.dataclass(frozen=True)
class MixtureConfig(HeadConfig):
    """Configuration of the tutorial's head, as far as its commands name it."""

    kind: str = "mixture"


def with_mixture(check: typing.Callable[[], None]) -> None:
    """Run ``check`` with the tutorial's kind of head known to recipes."""
    HeadConfig.kinds["mixture"] = MixtureConfig
    try:
        check()
    finally:
        del HeadConfig.kinds["mixture"]


@every_document
def test_commands_are_valid(document: Path) -> None:
    for words in commands(document):
        check_command(words)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_the_head_of_a_recipe_are_valid(recipe: Path) -> None:
    text = re.sub(r" \\\n# +", " ", recipe.read_text(encoding="utf-8"))  # continued lines
    for line in re.findall(r"^# {2,}(far .+)$", text, re.MULTILINE):
        check_command(shlex.split(line, comments=True))


@every_document
def test_scripts_and_targets_named_in_the_text_exist(document: Path) -> None:
    """Check the code within the text: ``python -m benchmarks.…``, ``make …`` and ``far …``."""
    for code in re.findall(r"(?<!`)`((?:python -m benchmarks\.|make |far )[^`\n]+)`", text_of(document)):
        words = [word for word in shlex.split(code.replace("[…]", "")) if word not in ("…", "[SET …]")]
        if words[0] == "far":
            # The text does not always give the whole command, but it must exist.
            assert words[1] == "--help" or words[1].isupper() or words[1] in parse_commands(), code
        elif words[1] != "check":
            check_command(words)


def parse_commands() -> frozenset[str]:
    from far.cli.main import COMMANDS

    return frozenset(COMMANDS)


@pytest.mark.parametrize(
    "words",
    ["far gnerate", "far generate --lables 3", "far train recipes/none.yaml", "far train none",
     "far train avatars-64 generator.trainin.steps=3", "far distill a b training.step=3", "make nothing",
     "python -m benchmarks.none", "python -m benchmarks.savings --none"],
)  # fmt: skip
def test_wrong_commands_are_found(words: str) -> None:
    """Show that the tests of commands can fail."""
    with pytest.raises((ValueError, AssertionError)):
        check_command(words.split())


@every_document
def test_recipes_are_valid(document: Path) -> None:
    for block in blocks(document, "yaml"):
        assert block.comment in ("", "a recipe"), (
            f"{document.name}, line {block.line}: no such comment: {block.comment}"
        )
        values = yaml.safe_load(block.code)
        if block.comment:
            from_dict(Recipe, values, f"{document.name}, line {block.line}")


# --- Python -----------------------------------------------------------------------------------------


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Provide a working folder like a reader's clone; heads that are registered there are removed again."""
    for name in ("recipes", "far", "docs", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    heads, kinds = dict(HEADS), dict(HeadConfig.kinds)
    yield tmp_path
    for registry, before in ((HEADS, heads), (HeadConfig.kinds, kinds)):
        registry.clear()
        registry.update(before)  # type: ignore[arg-type]


def runs_something(document: Path) -> bool:
    return any(blocks(document, "python")) or any(block.comment == "run" for block in blocks(document, "sh"))


@pytest.mark.parametrize(
    "document",
    [pytest.param(path, id=name) for path, name in zip(DOCUMENTS, NAMES) if runs_something(path)],
)
def test_code_runs(document: Path, reader: Path) -> None:
    """Run all blocks of a document in order, in one namespace."""
    namespace: dict[str, object] = {"__name__": "document"}
    chosen = [block for language in ("python", "sh") for block in blocks(document, language)]
    skipped = 0
    for block in sorted(chosen, key=lambda block: block.line):
        if block.language == "python" and block.comment.startswith("not run: "):
            skipped += 1
        elif block.language == "python":
            # Empty lines first, so that errors name the line of the document.
            exec(compile("\n" * (block.line) + block.code, str(document), "exec"), namespace)
        elif block.comment == "run":
            for line in block.code.splitlines():
                words = shlex.split(line, comments=True)
                assert words[0] == "far"
                assert main(words[1:]) == 0
    assert skipped == NOT_RUN.get(str(document.relative_to(ROOT)), 0), (
        "NOT_RUN has another number of blocks that are not run"
    )


def write_python(folder: Path, documents: list[Path]) -> list[Path]:
    """Write each document's Python blocks as a module of a package, on the document's own lines."""
    package = folder / "python_blocks"  # the name has settings of its own in pyproject.toml
    package.mkdir()
    (package / "__init__.py").write_text("")
    written = []
    for number, document in enumerate(documents):
        lines: list[str] = []
        for block in blocks(document, "python"):
            if not block.comment.startswith("not run: "):
                lines += [""] * (block.line - len(lines)) + block.code.splitlines()
        if lines:
            written.append(package / f"page_{number}_{slug(document.stem).replace('-', '_')}.py")
            written[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return written


def type_errors(files: list[Path]) -> list[str]:
    """Return what mypy reports, with the settings and the cache of ``make check``."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary", *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()


def test_python_blocks_have_the_right_types(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.md"
    wrong.write_text(
        "# A page\n\n```python\nimport far\n\n"
        "images = far.load('a').generate([0], output='tensor')\nimages[0].save('a')\n```\n"
    )
    pages = write_python(tmp_path, [*DOCUMENTS, wrong])
    assert len(pages) > 5
    errors = type_errors(pages)
    mistakes = [error for error in errors if Path(error.partition(":")[0]).stem.endswith("_wrong")]
    assert errors == mistakes
    assert [error.split(":")[1] for error in mistakes] == ["7"], "a mistake in a page is not found"


# --- The site ---------------------------------------------------------------------------------------


def test_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    site = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(ROOT / "mkdocs.yml"),
        "--site-dir",
        str(site),
    ]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WARNING" not in result.stdout + result.stderr
    check_pages(site)
    check_reference(site / "reference")
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert any("guidance" in entry["text"] for entry in index["docs"])


def check_pages(site: Path) -> None:
    """Check that every document has a page, and that no page loads anything from another site."""
    pages = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    assert {"index.html", "contributing.html"} <= pages
    assert {
        str(path.relative_to(ROOT / "docs").with_suffix(".html")) for path in (ROOT / "docs").rglob("*.md")
    } <= pages
    outside = re.compile(
        r"(?:<(?:script|img|link|iframe|source)\b[^>]*\b(?:src|href)=[\"']|url\([\"']?|@import [\"'])"
        r"(?:https?:)?//"
    )
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        found = outside.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(site)} loads {found}"


def check_reference(folder: Path) -> None:
    """Check that commands and keys come from the code, and that no docstring markup is left unrendered."""
    commands = (folder / "command-line.html").read_text(encoding="utf-8")
    for option in ("far generate", "--guidance-passes", "--held-out-share", "--resume"):
        assert option in commands
    keys = (folder / "recipe.html").read_text(encoding="utf-8")
    for key in (
        "generator.training.learning_rate",
        "generator.network.backbone.input_noise",
        "autoencoder_from",
        "trajectories.images",
    ):
        assert f"<code>{key}</code>" in keys
    for path in folder.glob("*.html"):
        text = re.sub(r"<pre.*?</pre>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        left = re.search(
            r":(?:class|meth|func|data|mod|attr):|``|<p>(?:Args|Returns|Raises|Attributes):|"
            r"\[<code>[^<]*</code>\]\[",
            text,
        )
        assert left is None, f"{path.name}: {text[left.start() - 100 : left.end() + 100]}"
