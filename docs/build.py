"""`make docs`: README, the pages of docs/, and every setting as documented in the code, as a folder of HTML pages.

Pages are Markdown, rendered by markdown-it; there is no template language and nothing is fetched. Links between pages
are rewritten to the HTML pages; a link to a missing page or heading is an error.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import html
import inspect
import json
import os
import re
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import click
from markdown_it import MarkdownIt
from markdown_it.token import Token

from saemill.cache_schema.cli import main as store
from saemill.evaluate import evals
from saemill.evaluate.cli import main as evaluate
from saemill.evaluate.output.figures.page_files import web_file
from saemill.harvest.cli import main as harvest
from saemill.studies.study import main as study
from saemill.train.cli import main as train
from saemill.train.config.run_config import CourseConfig, DataConfig
from saemill.train.export import main as export
from saemill.train.kit import variant_registry

ROOT = Path(__file__).resolve().parent.parent
COMMANDS: dict[str, click.Command] = {
    "sae-harvest": harvest,
    "sae-train": train,
    "sae-eval": evaluate,
    "sae-study": study,
    "sae-store": store,
    "sae-export": export,
}
SECTIONS = {  # the menu; pages that are not listed come last in "Studies" or "Measured"
    "Begin": "README.md docs/tutorial.md docs/laptop.md docs/gemma.md",
    "Use": "docs/harvest.md docs/train.md docs/evaluate.md docs/python.md docs/share.md docs/cluster.md "
    "docs/commands.md",
    "Settings": "docs/settings_commands.md docs/settings_variants.md docs/settings_evaluations.md",
    "Reference": "docs/design.md cache_schema/FORMAT.md evaluate/MEASURES.md docs/guarantees.md CONTRIBUTING.md "
    "SECURITY.md docs/licences.md CHANGELOG.md",
    "Measured": "docs/measured.md docs/performance.md docs/quality.md",
}
THEME = 'if (matchMedia("(prefers-color-scheme: dark)").matches) document.documentElement.dataset.theme = "dark";'
MADE_BY = '<meta name="generator" content="saemill docs/build.py">'
MARKDOWN = MarkdownIt("commonmark").enable("table")


class LinkBroken(Exception):
    """A page links to something that does not exist."""


class FolderTaken(Exception):
    """The output folder holds something other than pages."""


def main(out: str = "build/docs") -> None:
    folder, texts = Path(out), pages()
    require_own(folder)
    problems = broken_links(texts)
    if problems:
        raise LinkBroken("\n".join(problems))
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in texts.items():
        target = folder / address(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(document(name, text, texts), encoding="utf-8")
    linked = {target for name, text in texts.items() for target, _ in links(name, text)}
    for file in sorted(linked - texts.keys()):
        if (ROOT / file).is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, folder / file)
    (folder / "base.css").write_text(web_file("base.css") + (ROOT / "docs" / "site.css").read_text(), encoding="utf-8")
    print(f"{len(texts)} pages: {folder / 'index.html'}")


def require_own(folder: Path) -> None:
    """The folder's content is deleted, so it must be earlier pages, or nothing."""
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    index = folder / "index.html"
    if not index.is_file() or MADE_BY not in index.read_text("utf-8", errors="replace"):
        raise FolderTaken(
            f"{folder}: expected no folder, an empty one, or one with earlier pages, found other files, which are "
            "left as they are. Delete them, or give another folder"
        )


# ---------------------------------------------------------------- pages


def pages() -> dict[str, str]:
    """Markdown by path in the repository, in the order of the menu; generated pages have paths too."""
    generated = {
        "docs/tutorial.md": tutorial_page(),
        "docs/settings_commands.md": commands_page(),
        "docs/settings_variants.md": variants_page(),
        "docs/settings_evaluations.md": evaluations_page(),
    }
    listed = [name for names in SECTIONS.values() for name in names.split()]
    found = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    return {name: generated.get(name) or (ROOT / name).read_text("utf-8") for name in dict.fromkeys([*listed, *found])}


def address(name: str) -> str:
    """A page's path in the output folder."""
    return "index.html" if name == "README.md" else f"{name.removesuffix('.md')}.html"


def title_of(name: str, text: str) -> str:
    """A page's heading; a study's tables have none and are titled by their path."""
    found, path = re.search(r"^# (.+)$", text, re.MULTILINE), PurePosixPath(name)
    return found.group(1) if found else f"{path.stem}: {path.parent.name}".replace("_", " ")


def tutorial_page() -> str:
    """The notebook, without its outputs."""
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text("utf-8"))["cells"]
    sources = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in cells]
    return "\n\n".join(f"```python\n{source}\n```" if is_code else source for source, is_code in sources)


def commands_page() -> str:
    parts = ["# Every option of every command", "Generated from the commands; `--help` shows the same, with examples."]
    for name, command in COMMANDS.items():
        parts += [f"## {name}", *_described(command)]
        for sub, one in (command.commands if isinstance(command, click.Group) else {}).items():
            parts += [f"### {name} {sub}", *_described(one)]
    return "\n\n".join(parts)


def _described(command: click.Command) -> Iterator[str]:
    yield _cell(inspect.cleandoc((command.help or "").split("\f")[0]).replace("\b\n", ""))
    context = click.Context(command)
    rows = [record for one in command.get_params(context) if (record := one.get_help_record(context))]
    if rows:
        yield "\n".join(["| option | |", "|---|---|", *(f"| {_code(name)} | {_cell(text)} |" for name, text in rows)])


def variants_page() -> str:
    intro = "Give a setting as `--set NAME=VALUE`, or as `--set VARIANT.NAME=VALUE` for one of several; lists as `a,b`."
    parts = ["# Every setting of every variant", f"{intro} Settings without a default follow from the others."]
    for name in variant_registry.names():
        parts += _settings(name, variant_registry.config_type(name), variant_registry.module(name).__doc__)
    shared = "All SAEs of a run share them."
    parts += _settings("data", DataConfig, f"Settings of the stream: `--set data.NAME=VALUE`. {shared}")
    parts += _settings("course", CourseConfig, f"Settings of the run: `--set course.NAME=VALUE`. {shared}")
    return "\n\n".join(parts)


def evaluations_page() -> str:
    intro = "Give a setting as `--set EVALUATION.NAME=VALUE`; lists as `a,b`."
    parts = ["# Every setting of every evaluation", f"{intro} What they measure: [MEASURES](../evaluate/MEASURES.md)."]
    for name in evals.names():
        found = evals.load(name)
        parts += _settings(name, found.config, sys.modules[found.evaluate.__module__].__doc__)
    return "\n\n".join(parts)


def _settings(name: str, config: Any, about: str | None) -> list[str]:
    rows = [f"| {_code(key)} | {_code(str(value))} | {_cell(text)} |" for key, value, text in _fields(config)]
    table = "\n".join(["| setting | default | |", "|---|---|---|", *rows])
    paragraphs = inspect.cleandoc(about or "").split("\n\n")
    return [f"## {name}", _cell(paragraphs[0]), table if rows else "No settings."]


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Name, default and description of every setting; names of nested settings have dots."""
    instance = config()
    notes = _notes(config)
    for field in dataclasses.fields(config):
        value = getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(type(value), f"{prefix}{field.name}.")
        else:
            shown = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else value
            yield f"{prefix}{field.name}", "" if shown is None else shown, notes.get(field.name, "")


@functools.cache
def _notes(config: type) -> Mapping[str, str]:
    """The strings below the fields in the source, own and inherited ones, by field."""
    found: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (body,) = (node.body for node in ast.parse(textwrap.dedent(inspect.getsource(base))).body)
        for field, below in pairwise(body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(note))):
                    found[name] = inspect.cleandoc(note)
    return found


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def _cell(text: str) -> str:
    """The text on one line of Markdown, escaped where it would become markup."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


# ---------------------------------------------------------------- links


def parse(text: str) -> list[Token]:
    return MARKDOWN.parse(text)


def slugs(text: str) -> list[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = []
    for opening, inline in pairwise(parse(text)):
        if opening.type == "heading_open":
            words = "".join(part.content for part in inline.children or () if part.type in ("text", "code_inline"))
            kept = [letter for letter in words.lower() if letter in " -_" or unicodedata.category(letter)[0] in "LN"]
            found.append("".join(kept).replace(" ", "-"))
    return found


def links(name: str, text: str) -> Iterator[tuple[str, str]]:
    """A page's links inside the repository, as path and anchor. A folder's README stands for the folder."""
    for token in parse(text):
        for part in token.children or ():
            to = str(part.attrGet("href") or part.attrGet("src") or "")
            if to and not urlsplit(to).scheme:
                yield target_of(name, to)


def target_of(name: str, to: str) -> tuple[str, str]:
    path, _, anchor = to.partition("#")
    target = os.path.normpath(os.path.join(os.path.dirname(name), unquote(path))) if path else name
    index = f"{target}/README.md"
    return (index if (ROOT / index).is_file() else target), anchor


def broken_links(texts: Mapping[str, str]) -> list[str]:
    found = []
    for name, text in texts.items():
        for target, anchor in links(name, text):
            if target not in texts and not (ROOT / target).exists():
                found.append(f"{name} links to {target}, which does not exist")
            elif anchor and target in texts and anchor not in slugs(texts[target]):
                found.append(f"{name} links to {target}#{anchor}, a heading that does not exist")
    return found


# ---------------------------------------------------------------- HTML


def document(name: str, text: str, texts: Mapping[str, str]) -> str:
    here = os.path.dirname(address(name)) or "."

    def relative(to: str) -> str:
        return os.path.relpath(to, here)

    tokens, anchors = parse(text), iter(slugs(text))
    for token in tokens:
        if token.type == "heading_open":
            token.attrSet("id", next(anchors))
        for place, part in enumerate(token.children or ()):
            attribute = "src" if part.type == "image" else "href"
            to = str(part.attrGet(attribute) or "")
            if to and not urlsplit(to).scheme:
                target, anchor = target_of(name, to)
                if (ROOT / target).is_dir():  # folders of the repository are not part of the site
                    _unlink(token.children or [], place)
                    continue
                path = relative(address(target) if target in texts else target)
                part.attrSet(attribute, f"{path}#{anchor}" if anchor else path)
    body = MARKDOWN.renderer.render(tokens, MARKDOWN.options, {}).replace(" ± ", "&nbsp;±&nbsp;")
    title = html.escape(title_of(name, text))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}: saemill</title>\n'
        f"{MADE_BY}\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
        f'<link rel="stylesheet" href="{relative("base.css")}"><script>{THEME}</script></head>\n'
        f'<body><main><a class="to-menu" href="#menu">all pages</a>{body}</main>\n'
        f'<nav class="menu" id="menu" aria-label="pages">{menu(name, texts, relative)}</nav></body></html>\n'
    )


def _unlink(inline: list[Token], place: int) -> None:
    """Turn a link into plain text."""
    closing = next(part for part in inline[place:] if part.type == "link_close")
    for part in (inline[place], closing):
        part.tag, part.attrs = "span", {}


def menu(here: str, texts: Mapping[str, str], relative: Callable[[str], str]) -> str:
    section_of = {name: section for section, names in SECTIONS.items() for name in names.split()}
    sections: dict[str, list[str]] = {}
    for name in texts:
        other = "Studies" if name.startswith("docs/studies/") else "Measured"
        sections.setdefault(section_of.get(name, other), []).append(name)
    return "".join(
        f"<h2>{section}</h2><ul>"
        + "".join(
            f'<li><a href="{relative(address(name))}"{" aria-current=page" if name == here else ""}>'
            f"{html.escape(title_of(name, texts[name]))}</a></li>"
            for name in names
        )
        + "</ul>"
        for section, names in sections.items()
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
