"""What mkdocs.yml cannot say: pages made from the repository's own files and from the code.

README.md and CONTRIBUTING.md become pages, links out of docs/ lead to them or to a copy of the file they name, and the
reference of commands is written from the parser.
"""

import argparse
import posixpath
import re
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
    wanted = {
        target
        for file in files.documentation_pages()
        for _, target in _links(file.content_string, file.src_uri)
    }
    for target in sorted(wanted):
        if target.startswith("files/"):
            files.append(
                File.generated(config, target, abs_src_path=str(ROOT / target.removeprefix("files/")))
            )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links where the site has what they name, and write the generated references."""
    here = posixpath.dirname(page.file.src_uri)
    for link, target in _links(markdown, page.file.src_uri):
        pattern = re.compile(re.escape(link) + r"(?=[)\"#])")
        markdown = pattern.sub(posixpath.relpath(target, here or "."), markdown)
    if page.file.src_uri == "reference/command-line.md":
        markdown += "\n".join(_commands())
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


_ROLE = re.compile(r":(?:class|meth|func|data|mod|attr):`([^`]+)`")


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
