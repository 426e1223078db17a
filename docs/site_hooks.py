"""MkDocs hooks: add pages made from the repository's files and from the code.

README.md, CONTRIBUTING.md and examples/README.md become pages. Links out of docs/ point to these pages or to
copies of the files. The command-line reference is written from the parser.
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
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "examples/README.md": "examples.md"}
_LINK = re.compile(r"(\]\(|\bhref=\"|\bsrc=\")(?!\w+:|#)([^)\"\s#]+)")
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's pages and files outside docs/."""
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
    """Point links to their targets on the site, and write the generated references."""
    here = posixpath.dirname(page.file.src_uri)
    for link, target in _links(markdown, page.file.src_uri):
        pattern = re.compile(re.escape(link) + r"(?=[)\"#])")
        markdown = pattern.sub(posixpath.relpath(target, here or "."), markdown)
    if page.file.src_uri == "reference/command-line.md":
        markdown += "\n".join(_commands())
    return markdown


def _links(markdown: str, page: str) -> Iterator[tuple[str, str]]:
    """Yield links to or from files outside docs/, with their targets on the site."""
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
    """Yield every command's help, as the parser prints it."""
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
    """Turns roles such as ``:class:`` in docstrings into links, if the reference has the named object."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return

        def linked(match: re.Match[str]) -> str:
            try:
                target = obj.resolve(match[1])
            except griffe.NameResolutionError:
                return f"`{match[1]}`"
            return f'<autoref optional identifier="{target}"><code>{match[1]}</code></autoref>'

        obj.docstring.value = _ROLE.sub(linked, obj.docstring.value)
