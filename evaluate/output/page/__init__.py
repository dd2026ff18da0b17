"""A run as one HTML page that needs nothing else: its numbers, its pictures, and what its latents fire on.

The page asks for nothing from anywhere, and its policy forbids browsers to: pictures lie inside it, and
not even a script that found its way in would run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ....train.disk.whole_files import replace_file
from ....train.run.folder import RunFolder
from ..figures.records import Record
from .contexts import contexts_of
from .markup import Html, element, image, joined, text
from .numbers import numbers_table

BROWSER = "browser/index.html"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .6rem } h1 { font-size: 1.6rem } h2 { font-size: 1.25rem }
h3 { font-size: 1rem; margin-top: 1.2rem } figure { margin: 1.2rem 0 } figcaption { color: #666; font-size: .85rem }
img { max-width: 100%; height: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
.wide { overflow-x: auto } th, td { padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left } th { color: #666; font-weight: 600; vertical-align: bottom }
.contexts { list-style: none; padding: 0; font: 13px/1.6 ui-monospace, monospace }
.contexts li { white-space: pre-wrap }
.strength { color: #888; display: inline-block; width: 4.5em } mark { background: #ffd58a; padding: 0 .1em }
.faint { color: #666; font-size: .85rem }
"""


def write_page(run: RunFolder, records: Sequence[Record], plots: Path) -> Path:
    """Write <run>/report.html with the pictures of a folder; all or nothing."""
    path = run.path / "report.html"
    has_browser = (run.path / BROWSER).is_file()
    replace_file(path, page(run.name, records, sorted(plots.glob("*.png")), has_browser).encode())
    return path


def page(name: str, records: Sequence[Record], pictures: Sequence[Path], has_browser: bool = False) -> Html:
    """The whole document."""
    head = joined(
        [
            Html('<meta charset="utf-8">'),
            Html(f'<meta http-equiv="Content-Security-Policy" content="{text(POLICY)}">'),
            Html('<meta name="viewport" content="width=device-width">'),
            element("title", f"{name}: sparse autoencoders"),
            element("style", Html(STYLE)),
        ]
    )
    link = element("p", element("a", "all latents, to look at and search", href=BROWSER)) if has_browser else Html("")
    parts = [element("h1", name), link, numbers_table(records), figures(pictures), contexts_of(records)]
    body = element("body", joined(parts))
    whole = element("html", element("head", head), body, lang="en")
    return joined([Html("<!doctype html>"), whole, Html("")], between="\n")


def figures(pictures: Sequence[Path]) -> Html:
    """Every picture under its name."""
    if not pictures:
        return Html("")
    found = [
        element("figure", image(path, path.stem), element("figcaption", path.stem.replace("_", " ")))
        for path in pictures
    ]
    return joined([element("h2", "Pictures"), *found])
