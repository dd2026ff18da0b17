"""The page of a run: whole by itself, and deaf to whatever stands in the text it shows."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saemill.evaluate.output.figures.records import Record, read_records
from saemill.evaluate.output.page import page, write_page
from saemill.evaluate.output.page.markup import Html, element, text
from saemill.train.run.folder import RunFolder

HOSTILE = "</li><script>alert(1)</script><img src=http://x/y onerror=alert(2)>\"'&\u202e\x00"
SAFE = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "h2",
    "h3",
    "p",
    "div",
    "span",
    "ul",
    "li",
    "bdi",
    "mark",
}
SAFE |= {"table", "thead", "tbody", "tr", "th", "td", "br", "figure", "figcaption", "img"}


class Reader(HTMLParser):
    """What a browser would find."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def read(document: str) -> Reader:
    reader = Reader()
    reader.feed(document)
    reader.close()
    return reader


def record(word: str) -> Record:
    context = {"activation": 1.5, "before": word, "token": word, "after": word}
    latents = [{"latent": 7, "fired_share": 0.01, "contexts": [context]}]
    found = {"eval_result_metrics": {}, "eval_result_unstructured": {"latents": latents}}
    return Record(word, "run_1", word, outcome={"l0": 12.0, "explained_variance": 0.5}, documents={"browser": found})


@pytest.mark.parametrize("word", [HOSTILE, "<script>alert(1)</script>", "<!--", "]]>", "&lt;b&gt;", "<style>*{}"])
def test_a_script_in_a_document_is_words(word):
    reader = read(page(word, [record(word)], []))
    tags = {tag for tag, _ in reader.tags}
    assert tags <= SAFE
    for _, attributes in reader.tags:
        assert not any(name.startswith("on") or name in ("src", "href") for name in attributes)
    shown = word.replace("\u202e", "\ufffd").replace("\x00", "\ufffd")
    assert "".join(reader.words).count(shown) >= 4  # title, heading, table, contexts


@given(st.text())
def test_any_text_comes_back_as_text(word):
    reader = read(element("p", word))
    assert [tag for tag, _ in reader.tags] == ["p"]
    assert "".join(reader.words) == "".join(read(f"<p>{text(word)}</p>").words)
    assert not {"\u202e", "\x00", "\u200b"} & set("".join(reader.words))


def test_an_attribute_cannot_be_left():
    ((_, attributes),) = read(element("p", "x", title='"><b onclick="y')).tags
    assert attributes == {"title": '"><b onclick="y'}


def test_only_our_own_markup_goes_in_as_it_is():
    assert element("p", Html("<b>x</b>")) == "<p><b>x</b></p>"
    assert element("p", "<b>") == "<p>&lt;b&gt;</p>"
    assert not isinstance(Html("<b>") + "<script>", Html)


def test_the_page_forbids_scripts_and_fetches_nothing(tmp_path):
    run = RunFolder.at(tmp_path / "run_1")
    run.path.mkdir()
    run.write_config({"saes": {"topk": {"variant": "topk", "config": {}}}})
    run.write_result({"steps": 3, "saes": {"topk": {"l0": 16.0, "explained_variance": 0.6}}})
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "pareto.png").write_bytes(b"\x89PNG not really")
    path = write_page(run, read_records([run]), tmp_path / "plots")
    assert path == run.path / "report.html"
    reader = read(path.read_text())
    policy = [a["content"] for tag, a in reader.tags if tag == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    (picture,) = [a for tag, a in reader.tags if tag == "img"]
    assert str(picture["src"]).startswith("data:image/png;base64,")
    assert "script" not in {tag for tag, _ in reader.tags}
    assert {"topk", "16", "0.6"} <= set(reader.words)


def test_numbers_that_nobody_has_are_no_columns():
    shown = "".join(read(page("run", [record("a"), Record("b", "run", "b")], [])).words)
    assert "explained variance" in shown
    assert "retention" not in shown
    assert "\N{EN DASH}" in shown


def test_the_page_leads_to_the_browser_where_there_is_one():
    link = 'href="browser/index.html"'
    assert link in page("run", [record("a")], [], has_browser=True)
    assert link not in page("run", [record("a")], [])
