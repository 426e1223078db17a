"""What mkdocs.yml cannot say: pages made from the repository's own files and from the code.

README.md and CONTRIBUTING.md become pages, links out of docs/ lead to them or to a copy of the file they name, and the
reference of commands and of recipe keys is written from the parser and the dataclasses.
"""

import argparse
import dataclasses
import inspect
import posixpath
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Files of the repository that are pages of the site.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
_LINK = re.compile(r"(\]\(|\bhref=\"|\bsrc=\")(?!\w+:|#)([^)\"\s#]+)")
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and files of the repository that stand outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    wanted = {target for file in files.documentation_pages() for _, target in _links(file.content_string, file.src_uri)}
    for target in sorted(wanted):
        if target.startswith("files/"):
            files.append(File.generated(config, target, abs_src_path=str(ROOT / target.removeprefix("files/"))))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links where the site has what they name, and write the generated references."""
    here = posixpath.dirname(page.file.src_uri)
    for link, target in _links(markdown, page.file.src_uri):
        pattern = re.compile(re.escape(link) + r"(?=[)\"#])")
        markdown = pattern.sub(posixpath.relpath(target, here or "."), markdown)
    if page.file.src_uri == "reference/command-line.md":
        markdown += "\n".join(_commands())
    if page.file.src_uri == "reference/recipe.md":
        markdown += "\n".join(_recipe())
    return markdown


def _links(markdown: str, page: str) -> Iterator[tuple[str, str]]:
    """Links of a page that name files outside docs/, or stand outside it, and the pages or files of the site that they become."""
    source = next((path for path, name in PAGES.items() if name == page), f"docs/{page}")
    for link in dict.fromkeys(match[2] for match in _LINK.finditer(_CODE.sub("", markdown))):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        if path.startswith("docs/") and source.startswith("docs/"):
            continue
        if path.startswith("docs/"):
            yield link, path.removeprefix("docs/")
        else:
            yield link, PAGES.get(path, f"files/{path}")


def _commands() -> Iterator[str]:
    """Every command's help, as the parser gives it."""
    from far.cli.main import build_parser

    def walk(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
        parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=110)
        yield f"\n{'#' * level} {parser.prog}\n\n```text\n{parser.format_help().strip()}\n```\n"
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for child in action.choices.values():
                    yield from walk(child, min(level + 1, 4))

    yield from walk(build_parser(), 2)


def _recipe() -> Iterator[str]:
    """Every key of a recipe and of far distill with its type, default and section's description."""
    from far.recipe import Recipe
    from far.training.distillation import DistillationConfig

    yield from _keys("A recipe", Recipe, Recipe("", ""), "")
    yield from _keys("far distill", DistillationConfig, DistillationConfig(), "")


def _keys(title: str, kind: type, default: Any, prefix: str) -> Iterator[str]:
    yield f"\n{'###' if prefix else '##'} {title}\n\n{_described(kind)}\n"
    rows: list[str] = []
    hints = typing.get_type_hints(kind)
    sections: list[tuple[str, type, Any]] = []
    for field in dataclasses.fields(kind):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        kinds = [option for option in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(option)]
        if kinds:
            value = getattr(default, field.name)
            sections += [(key, option, value if isinstance(value, option) else option()) for option in kinds]
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        value = "must be given" if required else f"`{_yaml(getattr(default, field.name))}`"
        rows.append(f"| `{key}` | {_type(hint)} | {value} |")
    if rows:
        yield "\n".join(["| key | type | default |", "|---|---|---|", *rows])
    for key, option, value in sections:
        chosen = f", {option.kind}" if isinstance(getattr(option, "kind", None), str) and "kind" in _alternatives(option) else ""
        yield from _keys(f"`{key}`{chosen}", option, value, f"{key}.")


def _alternatives(kind: type) -> list[str]:
    """The fields of a dataclass that allow one value only: by these a section is told from its alternatives."""
    return [
        key
        for key, hint in typing.get_type_hints(kind).items()
        if typing.get_origin(hint) is typing.Literal and len(typing.get_args(hint)) == 1
    ]


def _described(kind: type) -> str:
    """A dataclass's docstring; its table of attributes as a list."""
    text = _plain_roles(inspect.getdoc(kind) or "")
    head, _, attributes = text.partition("Attributes:\n")
    entries = re.sub(r"\n\s{8,}", " ", "\n" + inspect.cleandoc(attributes).replace("\n    ", " "))
    listed = re.sub(r"^(\w+): ", r"- `\1`: ", entries.strip(), flags=re.MULTILINE)
    return f"{head.strip()}\n\n{listed}".strip()


def _type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}s"
    if arguments:
        return " or ".join(_type(option) for option in arguments if option is not type(None))
    return {"str": "text", "int": "whole number", "float": "number", "bool": "`true`, `false`"}.get(hint.__name__, hint.__name__)


def _yaml(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


_ROLE = re.compile(r":(?:class|meth|func|data|mod|attr):`([^`]+)`")


def _plain_roles(text: str) -> str:
    return _ROLE.sub(lambda match: f"`{match[1]}`", text)


class Roles(griffe.Extension):
    """Makes a role such as ``:class:`` before a name in a docstring a link to what the reference has of it, if it has."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return

        def linked(match: re.Match[str]) -> str:
            try:
                return f'<autoref optional identifier="{obj.resolve(match[1])}"><code>{match[1]}</code></autoref>'
            except griffe.NameResolutionError:
                return f"`{match[1]}`"

        obj.docstring.value = _ROLE.sub(linked, obj.docstring.value)
