"""A run as one self-contained HTML page: its origin, curves, numbers, plots, and what its latents fire on.

The page makes no requests, and its policy forbids them: images are inside it, and only its own script may run, by its
digest. While a run trains, its page also loads updated data from `live.js` next to it.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ....cache_schema.sites import RESID
from ....train.disk.atomic_files import replace_file
from ....train.run.run_folder import RunFolder, without_password
from ..figures.page_files import script_json, web_file
from ..figures.records import Record
from .markup import Html, element, image, joined, text
from .table_and_curves import course_of, numbers_table, training_data

BROWSER = "browser/index.html"
LIVE = "live.js"
HERE = Path(__file__).parent


def write_page(folder: Path, records: Sequence[Record], plots: Path) -> Path:
    """Write <folder>/report.html atomically, with the plots from the folder `plots`."""
    path = folder / "report.html"
    has_browser = (folder / BROWSER).is_file()
    pictures = {quote(os.path.relpath(one, folder)): one for one in sorted(plots.glob("*.png"))}
    replace_file(path, page(folder.name, records, pictures, has_browser).encode())
    if (folder / LIVE).exists():  # a page still open from training reloads as this one
        replace_file(folder / LIVE, b'saemill({"ended":true});\n')
    return path


def write_live_page(run: RunFolder, records: Sequence[Record], pause: float) -> None:
    """Write the page of a run that is training, and the data that it keeps loading."""
    course = course_of(records, run.read_config().get("total_steps", 0), pause)
    data = training_data(records, course)
    replace_file(run.path / LIVE, f"saemill({script_json(data)});\n".encode())
    replace_file(run.path / "report.html", _document(run.name, data, origins(records), Html("")).encode())


def page(name: str, records: Sequence[Record], pictures: Mapping[str, Path], has_browser: bool = False) -> Html:
    """The whole document. `pictures` are the plots, by their paths relative to it."""
    link = element("p", element("a", "all latents, to browse and search", href=BROWSER)) if has_browser else Html("")
    numbers, *below = [
        element("section", card, class_="card") if card else card
        for card in (numbers_table(records), figures(pictures, len(records) == 1), contexts_of(records))
    ]
    return _document(name, training_data(records), joined([origins(records), link, numbers]), joined(below))


def _document(name: str, data: Mapping[str, Any], above: Html, below: Html) -> Html:
    """The document; the script draws between `above` and `below`."""
    script = web_file("charts.js") + (HERE / "report.js").read_text(encoding="utf-8")
    head = joined(
        [
            Html('<meta charset="utf-8">'),
            Html(f'<meta http-equiv="Content-Security-Policy" content="{text(_policy(script, data))}">'),
            Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html('<meta name="color-scheme" content="light dark">'),
            element("title", f"{name}: sparse autoencoders"),
            Html('<link rel="icon" href="data:,">'),
            element("style", Html(web_file("base.css") + (HERE / "report.css").read_text(encoding="utf-8"))),
        ]
    )
    button = Html('<button id="theme" type="button" aria-label="Light or dark" title="light or dark">&#9680;</button>')
    mark = Html('<span class="mark" aria-hidden="true"></span>')
    top = element(
        "header", element("span", mark, element("span", name), class_="brand"), element("div", button, class_="tools")
    )
    main = element("main", element("h1", name), above, element("div", id="live"), below, class_="page")
    own = element("script", Html(script))
    scripts = joined([element("script", Html(script_json(data)), type="application/json", id="data"), own])
    whole = element("html", element("head", head), element("body", top, main, scripts), lang="en")
    return joined([Html("<!doctype html>"), whole, Html("")], between="\n")


def _policy(script: str, data: Mapping[str, Any]) -> str:
    """The page's policy: nothing from anywhere; this script, by its digest; while a run trains, files next to it."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    beside = " 'self' file:" if data["course"] else ""
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'{beside}"


def origins(records: Sequence[Record]) -> Html:
    """Where the numbers come from: a line for each run, which unfolds to the details."""
    runs = dict.fromkeys(record.run for record in records)
    return joined([_origin(run, [one for one in records if one.run == run], len(runs) > 1) for run in runs])


def _origin(run: str, records: Sequence[Record], is_named: bool) -> Html:
    asked = records[0].asked
    cache, course, made = (_part(asked, name) for name in ("cache", "course", "provenance"))
    places = {(str(one.settings.get("layer")), str(one.settings.get("hook", RESID))) for one in records}
    layer, hook = next(iter(places))
    tokens, steps = course.get("tokens"), asked.get("total_steps")
    line = [
        _together(cache.get("model"), cache.get("model_revision")),
        f"layer {layer} ({hook})" if len(places) == 1 and layer != "None" else "",
        f"text {cache['corpus']}" if cache.get("corpus") else "",
        f"{tokens:,} tokens in {steps:,} steps" if isinstance(tokens, int) and isinstance(steps, int) else "",
    ]
    facts = {
        "store": _together(without_password(str(cache.get("url") or "")), cache.get("cache_id")),
        "trained": made.get("date"),
        "command": made.get("command"),
        "code": _code(made),
        "computed on": _part(made, "hardware").get("device"),
    }
    shown = {name: value for name, value in facts.items() if value}
    brief = ", ".join(filter(None, line))
    if not (brief or shown):
        return Html("")
    rows = [part for name, value in shown.items() for part in (element("dt", name), element("dd", value))]
    summary = element("summary", ": ".join(filter(None, [run, brief])) if is_named or not brief else brief)
    return element("details", summary, element("dl", *rows), class_="origin")


def _part(asked: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = asked.get(name)
    return found if isinstance(found, Mapping) else {}


def _code(made: Mapping[str, Any]) -> str:
    packages, git = _part(made, "packages"), _part(made, "git")
    version = f"saemill {packages['saemill']}" if packages.get("saemill") else ""
    commit = f"{str(git['commit'])[:9]}{', changed' if git.get('is_dirty') else ''}" if git.get("commit") else None
    torch = f"torch {packages['torch']}" if packages.get("torch") else ""
    return ", ".join(filter(None, [_together(version, commit), torch]))


def _together(name: Any, more: Any) -> str:
    """`name (more)`"""
    return f"{name} ({more})" if name and more else str(name or "")


FIRST = ("pareto",)
LATENTS_APART = ("activation_patterns", "composition_patterns", "transition_matrix")
CURVES = ("hyperparameters", "training_metrics", "training_progression")
"""Plots that the page's script draws too, but for the bars of several SAEs."""


def figures(pictures: Mapping[str, Path], is_alone: bool) -> Html:
    """Every plot with its name and its files for papers, the quality of SAEs first. Heat maps of single latents are
    folded, and so are the plots whose curves are drawn above; for one SAE, these are only links."""
    if not pictures:
        return Html("")
    found = {path.stem: (address, path) for address, path in pictures.items()}

    def drawn(names: Iterable[str]) -> list[Html]:
        some = [found[name] for name in names if name in found]
        return [
            element("figure", image(path, path.stem), element("figcaption", _links(address, path)))
            for address, path in some
        ]

    def folded(title: str, names: Sequence[str]) -> list[Html]:
        some = drawn(names)
        return [element("details", element("summary", title), *some)] if some else []

    parts = drawn(name for name in dict.fromkeys((*FIRST, *found)) if name not in (*LATENTS_APART, *CURVES))
    parts += folded("Single latents", LATENTS_APART)
    if not is_alone:
        parts += folded("Training and settings, with bars", CURVES)
    elif files := [_links(*found[name]) for name in CURVES if name in found]:
        parts.append(element("p", "The curves above, for papers: ", joined(files, between=", ")))
    return joined([element("h2", "Plots"), *parts])


def _links(address: str, path: Path) -> Html:
    """The plot's name, and links to its files."""
    files = {kind: path.with_suffix(f".{kind}") for kind in ("png", "svg")}
    links = [
        element("a", kind.upper(), href=f"{address.removesuffix('png')}{kind}")
        for kind, file in files.items()
        if file.is_file()
    ]
    return joined([text(path.stem.replace("_", " ")), *links], between=" ")


LATENTS = 12  # of an SAE: a page should be readable


def contexts_of(records: Sequence[Record]) -> Html:
    """The strongest contexts of latents, in a section for each SAE that has some."""
    sections = [_section(record) for record in records if record.unstructured("browser").get("latents")]
    return joined([element("h2", "What latents fire on"), *sections]) if sections else Html("")


def _section(record: Record) -> Html:
    latents = record.unstructured("browser")["latents"]
    every = max(1, -(-len(latents) // LATENTS))
    return element("details", element("summary", record.name), *(_latent(latent) for latent in latents[::every]))


def _latent(latent: Mapping[str, Any]) -> Html:
    share = f"latent {latent['latent']}, on {100 * latent['fired_share']:.3g} % of tokens"
    listed = element("ul", *(_context(context) for context in latent["contexts"]), class_="contexts")
    return joined([element("p", share, class_="faint"), listed])


def _context(context: Mapping[str, Any]) -> Html:
    strength = element("span", f"{context['activation']:.2f}", class_="strength")
    words = element("bdi", context["before"], element("mark", context["token"]), context["after"])
    return element("li", strength, words)
