"""The page of a run: whole by itself, and deaf to whatever stands in the text it shows."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saemill.evaluate import evals
from saemill.evaluate.context.write_and_read_results import INTERVALS, first_few, heading, interval_of, lines_of_each
from saemill.evaluate.output.figures.page_files import web_file
from saemill.evaluate.output.figures.records import Record, read_records
from saemill.evaluate.output.figures.style import COLOURS, LINES
from saemill.evaluate.output.report import table_and_curves
from saemill.evaluate.output.report.markup import Html, element, text
from saemill.evaluate.output.report.page_of_a_run import page, write_live_page, write_page
from saemill.evaluate.output.report.table_and_curves import training_data
from saemill.train.run.run_folder import RunFolder

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
    "p",
    "div",
    "span",
    "ul",
    "li",
    "bdi",
    "mark",
}
SAFE |= {"table", "thead", "tbody", "tr", "th", "td", "br", "figure", "figcaption", "img"}
SAFE |= {"dl", "dt", "dd", "small", "header", "main", "section", "button", "link", "script", "details", "summary"}


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
    document = page(word, [record(word)], {})
    reader = read(document)
    tags = [tag for tag, _ in reader.tags]
    assert set(tags) <= SAFE and tags.count("script") == 2  # the data and the page's own
    for _, attributes in reader.tags:
        assert not any(name.startswith("on") or name == "src" for name in attributes)
        assert attributes.get("href") in (None, "data:,")
    data = document.split('id="data">')[1].split("</script>")[0]
    assert "<" not in data and json.loads(data)["saes"][0]["name"] == word
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


def policy_of(document: str) -> tuple[str, str, str]:
    """What a page says, its script, and what it is to say if it runs that one and fetches nothing."""
    (policy,) = [str(a["content"]) for tag, a in read(document).tags if tag == "meta" and "http-equiv" in a]
    script = document.rsplit("<script>", 1)[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return policy, script, own


def test_the_page_runs_its_own_script_and_fetches_nothing(tmp_path):
    run = RunFolder(tmp_path / "run_1")
    run.path.mkdir()
    run.write_config({"saes": {"topk": {"variant": "topk", "config": {}}}})
    run.write_result({"steps": 3, "saes": {"topk": {"l0": 16.0, "explained_variance": 0.6}}})
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "pareto.png").write_bytes(b"\x89PNG not really")
    (tmp_path / "plots" / "pareto.svg").write_bytes(b"<svg/>")
    path = write_page(run.path, read_records([run], print), tmp_path / "plots")
    assert path == run.path / "report.html"
    document = path.read_text()
    reader = read(document)
    policy, _, own = policy_of(document)
    assert policy == own
    links = [a["href"] for tag, a in reader.tags if tag == "a"]
    assert links == ["../plots/pareto.png", "../plots/pareto.svg"]
    (picture,) = [a for tag, a in reader.tags if tag == "img"]
    assert str(picture["src"]).startswith("data:image/png;base64,")
    assert {"topk", "16", "0.6"} <= set(reader.words)


def test_numbers_that_nobody_has_are_no_columns():
    shown = "".join(read(page("run", [record("a"), Record("b", "run", "b")], {})).words)
    assert "explained variance" in shown
    assert "retention" not in shown
    assert "\N{EN DASH}" in shown


def test_explained_variance_is_that_of_core_where_it_was_measured():
    """One number under one name: as the browser, the plots and the console have it."""
    one = Record("a", "run", "a", outcome={"explained_variance": 0.7123})
    assert "0.7123" in read(page("run", [one], {})).words
    core = {"eval_result_metrics": {}, "saemill_metrics": {"explained_variance": 0.6543}}
    shown = read(page("run", [replace(one, documents={"core": core})], {})).words
    assert "0.6543" in shown and "0.7123" not in shown


def test_explained_variance_with_massive_rows_is_shown_where_there_are_some():
    for massive, is_shown in ((0, False), (7, True)):
        ours = {"explained_variance": 0.5, "explained_variance_with_massive": 0.625, "massive": {"tokens": massive}}
        core = {"eval_result_metrics": {}, "saemill_metrics": ours}
        words = read(page("run", [Record("a", "run", "a", documents={"core": core})], {})).words
        assert ("with massive rows" in words, "0.625" in words) == (is_shown, is_shown)


@pytest.mark.parametrize(
    ("value", "interval", "shown"),
    [
        (0.00069443, [0.0003, 0.001], ["0.00069", "\N{PLUS-MINUS SIGN} 0.00039"]),
        (50.5678, [49.5678, 51], ["50.6", "\N{PLUS-MINUS SIGN} 1.0"]),
        (5123.4, [5000, 5200], ["5,123", "\N{PLUS-MINUS SIGN} 123"]),
        (32.0, [32, 32], ["32", "\N{PLUS-MINUS SIGN} 0"]),
        (0.5, [0.5, 0.5 + 1e-12], ["0.500000", "\N{PLUS-MINUS SIGN} 0.000000"]),
    ],
)
def test_a_number_has_the_digits_that_its_interval_leaves_it(value, interval, shown):
    ours = {"explained_variance": value, "confidence_95": {"explained_variance": interval}}
    core = {"eval_result_metrics": {}, "saemill_metrics": ours}
    words = read(page("run", [Record("a", "run", "a", documents={"core": core})], {})).words
    assert words[words.index(shown[0]) :][:2] == shown


def test_the_chart_is_of_core_where_it_measured_any_as_the_plots_are():
    core = {"eval_result_metrics": {"sparsity": {"l0": 31.5}}, "saemill_metrics": {"explained_variance": 0.6543}}
    ends = {"l0": 32.0, "explained_variance": 0.7123}
    both = [Record(name, "run", name, outcome=ends, steps=9) for name in "ab"]
    for records, found in ((both, [(32.0, 0.7123)] * 2), ([replace(both[0], documents={"core": core}), both[1]], None)):
        data = training_data(records)
        shown = [(sae["l0"], sae["explained_variance"]) for sae in data["saes"]]
        assert shown == (found or [(31.5, 0.6543), (None, None)]) and data["is_measured"] == (found is None)
    (half,) = training_data([replace(both[0], documents={"core": core | {"saemill_metrics": {}}})])["saes"]
    assert (half["l0"], half["explained_variance"]) == (31.5, None)  # not one of core and the other of training


def test_an_sae_has_the_colour_that_the_plots_on_its_page_give_it():
    charts = web_file("charts.js")
    colours, dashes = (re.findall(rf"const {name} = \[(.*)\]", charts)[0] for name in ("COLOURS", "DASHES"))
    assert json.loads(f"[{colours}]") == [*COLOURS[:-1], "var(--ink)"] and COLOURS[-1] == "#000000"
    assert len(json.loads(f"[{dashes}]")) == len(LINES)


def test_the_page_leads_to_the_browser_where_there_is_one():
    link = 'href="browser/index.html"'
    assert link in page("run", [record("a")], {}, has_browser=True)
    assert link not in page("run", [record("a")], {})


def seeded(label: str, seed: int, k: int = 8, steps: int = 3) -> Record:
    log = [{"sae": label, "step": step, "loss": 1.0 + seed / 8, "l0": 5.0} for step in range(steps)]
    return Record(label, "run_1", label, "topk", {"k": k, "seed": seed}, log)


def test_seeds_of_one_sae_are_together_and_nothing_else_is():
    records = [seeded("topk_k8_seed0", 0), seeded("topk_k8_seed1", 1), seeded("topk_k9_seed0", 0, 9)]
    assert [sae["group"] for sae in training_data(records)["saes"]] == ["topk_k8", "topk_k8", "topk_k9"]
    alike = [seeded("topk_seed0", 0), seeded("topk_seed1", 1, 9)]  # of one name, but other settings
    assert [sae["group"] for sae in training_data(alike)["saes"]] == ["topk_seed0", "topk_seed1"]


def test_what_is_no_number_is_left_out_of_curves():
    found = seeded("a", 0)
    log = [*found.log[:-1], {**found.log[-1], "loss": float("nan"), "l0": float("inf"), "note": "x"}]
    (sae,) = training_data([replace(found, log=log)])["saes"]
    assert sae["steps"] == [0, 1, 2]
    assert sae["curves"]["loss"][-1] is None and sae["curves"]["loss"][0] == 1.0
    assert set(sae["curves"]) == {"loss", "l0"}


def test_what_was_logged_of_an_sae_is_no_end_of_a_run_in_which_it_diverged():
    going = seeded("a", 0)
    assert [training_data([one])["saes"][0]["l0"] for one in (going, replace(going, steps=3))] == [5.0, None]


# ---------------------------------------------------------------- in a browser


@pytest.fixture
def live(tmp_path):
    """A run in training: two seeds of one SAE, and another."""
    run = RunFolder(tmp_path / "run_1")
    run.path.mkdir()
    settings = {"topk_seed0": {"seed": 0}, "topk_seed1": {"seed": 1}, "wide": {"width": 9, "seed": 0}}
    members = {label: {"variant": "topk", "config": config} for label, config in settings.items()}
    run.write_config({"saes": members, "total_steps": 40})
    log(run, range(10))
    write_live_page(run, read_records([run], print), 5.0)
    return run


def test_the_page_of_a_run_in_training_takes_one_file_beside_it(live):
    policy, script, own = policy_of((live.path / "report.html").read_text())
    assert policy == f"{own} 'self' file:"
    assert re.findall(r"\.src = `(.*?)\?", script) == ["live.js"]


def log(run: RunFolder, steps) -> None:
    with run.metrics.open("a") as file:
        for step in steps:
            for place, label in enumerate(("topk_seed0", "topk_seed1", "wide")):
                values = {
                    "loss": 2.0 / (1 + step) + place / 9,
                    "explained_variance": 0.5 + place / 9,
                    "l0": 8.0 + place,
                }
                shared = {"sae": label, "step": step, "explained_variance": 0.5 + place / 9, "loss/aux": 0.0}
                file.write(json.dumps({**shared, **values}) + "\n")


@pytest.fixture
def open_report(chromium):
    """Pages that must end without a word on their console."""
    opened = []

    def open_(run, **settings):
        page = chromium.new_context(**settings).new_page()
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"file://{run.path / 'report.html'}")
        page.wait_for_selector("html[data-ready]")
        opened.append((page, said, asked, f"file://{run.path}/"))
        return page

    yield open_
    for one, said, asked, base in opened:
        assert not said
        assert all(url.startswith((base, "data:")) for url in asked), asked
        one.context.close()


def test_a_run_in_training_is_followed_to_its_end(live, open_report):
    page = open_report(live)
    assert "step 10 of 40" in page.inner_text("#live")
    log(live, range(10, 30))
    write_live_page(live, read_records([live], print), 5.0)
    page.evaluate("reload()")  # as it does by itself every few seconds
    page.wait_for_selector("progress[value='30']")
    ends = {
        label: {"l0": 16.0 + place, "explained_variance": 0.625} for place, label in enumerate(("wide", "topk_seed0"))
    }
    live.write_result({"steps": 40, "saes": ends})
    write_page(live.path, read_records([live], print), live.path)
    with page.expect_navigation():
        page.evaluate("reload()")
    page.wait_for_selector("html[data-ready]")
    assert page.locator("progress").count() == 0
    assert "0.625" in page.inner_text("table")
    assert "On the validation split, as measured by training." in page.inner_text("body")


def test_names_of_saes_stay_where_a_wide_table_is_moved(live, open_report):
    live.write_result({"steps": 40, "saes": {"wide": {"l0": 16.0, "explained_variance": 0.625}}})
    write_page(live.path, read_records([live], print), live.path)
    page = open_report(live, viewport={"width": 380, "height": 800})
    moved = page.evaluate(
        """() => {
          const table = document.querySelector(".wide");
          const left = () => table.querySelector("td").getBoundingClientRect().left;
          table.firstChild.style.width = "90rem";
          const before = left();
          table.scrollLeft = 500;
          return [table.scrollLeft, left() - before];
        }"""
    )
    assert moved == [500, 0]


def test_seeds_are_a_band_and_a_chart_is_read_by_keys(live, open_report):
    page = open_report(live, viewport={"width": 380, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    assert page.locator("[data-keep=loss] .band").count() == 1 and page.locator("[data-keep=loss] .line").count() == 2
    page.locator("[data-keep=loss]").focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    said = page.locator(".chart", has=page.locator("[data-keep=loss]")).locator(".readout")
    assert said.inner_text() == "step 8: topk 0.2778 (0.222 to 0.333), wide 0.4444"
    page.get_by_role("button", name="each seed by itself").press("Enter")
    assert page.locator("[data-keep=loss] .line").count() == 3 and page.locator(".band").count() == 0
    page.get_by_role("button", name="wide").press("Enter")
    assert page.locator("[data-keep=loss] .line").count() == 2
    assert page.evaluate("document.activeElement.dataset.keep") == "sae wide"  # kept over the drawing anew
    assert "loss/aux 0" in page.inner_text("#live")
    assert page.locator("[data-keep=l0]").locator("xpath=ancestor::div/h3").inner_text() == "L0, training batch"


def test_what_is_read_at_a_chart_stays_while_the_run_trains(live, open_report):
    page = open_report(live)
    page.locator("[data-keep=loss]").focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    said = page.locator(".chart", has=page.locator("[data-keep=loss]")).locator(".readout")
    before = said.inner_text()
    page.evaluate("document.activeElement.isOld = true")
    page.evaluate("saemill(structuredClone(data))")  # nothing new was written
    assert page.evaluate("document.activeElement.isOld") and said.inner_text() == before
    log(live, range(10, 30))
    write_live_page(live, read_records([live], print), 5.0)
    page.evaluate("reload()")
    page.wait_for_selector("progress[value='30']")
    assert said.inner_text() == before and before.startswith("step 8:")
    page.keyboard.press("ArrowRight")
    assert said.inner_text().startswith("step 9:")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_can_be_read_in_light_and_dark(live, open_report, contrasts, theme):
    live.write_result({"steps": 40, "saes": {"wide": {"l0": 16.0, "explained_variance": 0.625}}})
    write_page(live.path, read_records([live], print), live.path)
    page = open_report(live, color_scheme=theme)
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    assert page.evaluate(contrasts) == []


def test_the_page_says_what_its_numbers_are_of():
    """Model, text, store without a password, length, date and command of a run; how much text core read; whose numbers
    are training's."""
    asked = {
        "cache": {"url": "s3://me:word@b/s", "cache_id": "ab12", "model": "pocket", "corpus": "stdlib"}
        | {"model_revision": "v1"},
        "course": {"tokens": 180_224},
        "total_steps": 44,
        "provenance": {"date": "2026-11-28T09:00:00+00:00", "command": "sae-train --variant topk <b>", "packages": {}},
    }
    shared = {"variant": "topk", "settings": {"layer": 19, "width": 65536, "k": 32}, "asked": asked}
    interval = {"confidence_95": {"explained_variance": [0.5, 0.65]}, "explained_variance": 0.6}
    ours = {"measured_on": "test split, 9 tokens", "remark": "less than it seems"}
    core = {"eval_result_metrics": {}, "saemill_metrics": interval, "saemill": ours}
    first = Record("a", "run_1", "a", outcome={"l0": 32.0}, documents={"core": core}, **shared)
    second = Record("b", "run_1", "b", outcome={"l0": 31.0}, **shared)
    words = read(page("run_1", [first, second], {})).words
    assert "pocket (v1), layer 19 (resid), text stdlib, 180,224 tokens in 44 steps" in words
    assert {"s3://b/s (ab12)", "2026-11-28T09:00:00+00:00", "sae-train --variant topk <b>"} <= set(words)
    assert {
        "65,536",
        "32",
        "core: test split, 9 tokens.",
        "core: less than it seems.",
        "\N{PLUS-MINUS SIGN} 0.10",
    } <= set(words)
    assert "L0 and explained variance of b: validation split, measured by training." in words


def test_remarks_that_are_of_each_sae_are_told_of_a_few():
    """64 SAEs of which each has a count of its own would fill the page, and the screen at every --resume."""
    told = [{"eval_result_metrics": {}, "saemill": {"remark": f"{n} probes had not converged"}} for n in range(9)]
    lines = lines_of_each([(f"sae_{n}", "position", document) for n, document in enumerate(told)], "remark")
    assert len(lines) == 9 and lines[3] == "position of sae_3: 3 probes had not converged"
    assert first_few(lines) == [*lines[:6], "3 more remarks in the results' files"]
    assert first_few(lines[:6]) == lines[:6]


@pytest.mark.parametrize(("massive", "found"), [(0, (31.0, 33.0)), (7, None)])
def test_an_interval_of_other_rows_is_not_shown(massive, found):
    """SAEBench's L0 is of all tokens, our intervals are of those that are not massive."""
    ours = {"confidence_95": {"l0": [31.0, 33.0]}, "massive": {"tokens": massive}}
    document = {"eval_result_metrics": {"sparsity": {"l0": 32.0}}, "saemill_metrics": ours}
    assert interval_of(document, INTERVALS, "sparsity.l0") == found


def test_an_evaluation_without_a_column_of_its_own_has_those_of_its_summary():
    """One that somebody adds is on the page at once; one that is not installed here is left in its file."""
    for name in evals.names():
        summary = evals.load(name).summary
        columns = table_and_curves.summary_columns([Record("a", "run", "a", documents={name: {}})])
        assert len({column.heading for column in columns}) == len(columns)  # of contrast two are a mean
        for metric in summary:
            group, last = metric.rsplit(".", 1)
            document = {"eval_result_metrics": {}}
            place = document
            for part in group.split("."):
                place = place.setdefault(part, {})
            place[last] = 0.4321
            words = read(page("run", [Record("a", "run", "a", documents={name: document, "gone": document})], {})).words
            if name not in {column.evaluation for column in table_and_curves.COLUMNS}:
                assert "0.4321" in words and heading(metric, summary) in words


def test_curves_that_the_page_draws_are_no_pictures_in_it(tmp_path):
    paths = {f"plots/{name}.png": tmp_path / f"{name}.png" for name in ("pareto", "training_metrics")}
    for path in paths.values():
        path.write_bytes(b"\x89PNG")
    reader = read(page("run", [record("a")], paths))
    assert [attributes["alt"] for tag, attributes in reader.tags if tag == "img"] == ["pareto"]
    of_two = read(page("run", [record("a"), record("b")], paths))
    assert [tag for tag, _ in of_two.tags].count("img") == 2  # these have bars as well
    assert {"plots/pareto.png", "plots/training_metrics.png"} <= {a.get("href") for tag, a in reader.tags if tag == "a"}


def test_plots_of_quality_come_first_and_those_of_single_latents_are_folded_up(tmp_path):
    names = ("activation_patterns", "added", "hyperparameters", "pareto", "transition_matrix")
    paths = {f"plots/{name}.png": tmp_path / f"{name}.png" for name in names}
    for path in paths.values():
        path.write_bytes(b"\x89PNG")
    document = page("run", [replace(record("a"), documents={}), Record("b", "run", "b")], paths)
    assert re.findall(r'alt="(\w+)"|(<details)', document) == [
        ("pareto", ""), ("added", ""),
        ("", "<details"), ("activation_patterns", ""), ("transition_matrix", ""),
        ("", "<details"), ("hyperparameters", ""),
    ]  # fmt: skip


def test_results_of_other_settings_in_one_table_are_told():
    def measured(label, settings):
        core = {"eval_result_metrics": {"sparsity": {"l0": 32.0}}, "saemill": {"settings": settings}}
        return Record(label, "run", label, documents={"core": core})

    first = measured("a", {"config": {"split": "test"}})
    for split, is_told in (("test", False), ("validation", True)):
        shown = "".join(read(page("run", [first, measured("b", {"config": {"split": split}})], {})).words)
        assert ("core: these numbers do not compare, results differ in config.split." in shown) == is_told


def test_means_over_fewer_data_sets_are_told():
    """As when the hub did not answer for one of them: the settings are the same, but not what was averaged."""

    def measured(label, names, missing=None):
        ours = {"settings": {"config": {"dataset_names": []}}, "missing": missing}
        found = {"eval_result_metrics": {"sae": {"sae_top_5_test_accuracy": 0.75}}, "saemill": ours}
        probing = {**found, "eval_config": {"dataset_names": names}}
        return Record(label, "run", label, documents={"sparse_probing": probing})

    whole, other = measured("a", ["news", "speeches"]), measured("b", ["news", "speeches"])
    part = measured("c", ["news"], "data set speeches cannot be loaded")
    for second, is_part in ((other, False), (part, True)):
        shown = "".join(read(page("run", [whole, second], {})).words)
        uneven = "sparse_probing: these numbers do not compare, results differ in loaded data sets."
        assert (uneven in shown) == is_part
        assert ("incomplete: sparse_probing of c: data set speeches cannot be loaded." in shown) == is_part
