"""The browser in a real Chromium, opened from disk: what a person does with it, and what hostile text does not."""

from __future__ import annotations

import functools
import http.server
import json
import math
import re
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saemill.cache_schema import Store
from saemill.evaluate.context.context import Context
from saemill.evaluate.evals.browser import browser_folder, evaluation
from saemill.evaluate.evals.browser.browser_folder import write_data, write_page
from saemill.evaluate.evals.browser.collect_firings import lower_edges
from saemill.evaluate.evals.browser.config import Config
from saemill.evaluate.evals.browser.overview import refresh
from saemill.evaluate.model.batches import store_batches
from saemill.evaluate.output.figures.records import Record
from saemill.evaluate.run.find_saes_to_evaluate import find_all
from saemill.train.run.init_from_trained_sae import source_of

SCRIPT = "</script><script>window.stolen = 1</script><img src=x onerror='window.stolen = 2'>"
HEBREW, ARABIC, COMBINED = (
    "\u05e9\u05dc\u05d5\u05dd",
    "\u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f",
    "e\u0301\u0323",
)
TEXTS = {
    3: SCRIPT, 4: "\u2028", 5: "\ufeff", 6: HEBREW, 7: ARABIC, 8: COMBINED, 9: "\u202e", 10: "x" * 10_000, 11: "\ufffd",
    12: "\n        ", 13: "\u0000", 14: "\U0001f468\u200d\U0001f469", 15: "&lt;b&gt;", 16: " ", 17: "__proto__",
}  # fmt: skip
CONFIG = Config(windows=40, top=4, sample=9, low=3)
SORTING = "(() => { const began = performance.now(); sortBy('token'); return performance.now() - began; })()"


class Tokens:
    """A tokenizer whose tokens are whatever a corpus may hold."""

    def decode(self, ids, **_):
        return "".join(map(self._text, ids))

    def decode_batch(self, rows, **_):
        return [self.decode(ids) for ids in rows]

    def id_to_token(self, token):
        return "\u00c3\u0142" if token == 11 else None

    @staticmethod
    def _text(token):
        return TEXTS.get(token, f" word{token}")


@pytest.fixture
def open_page(chromium):
    """A page that must end without a word on its console and without having asked for anything but its own files."""
    pages = []

    def open_(home, hash_="", width=1440, address=None, **settings):
        context = chromium.new_context(viewport={"width": width, "height": 800}, **settings)
        page = context.new_page()
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        base = address or f"file://{home / 'browser'}"
        page.goto(f"{base}/index.html{hash_}")
        page.wait_for_selector("html[data-ready]")
        pages.append((context, page, said, asked, base))
        return page

    yield open_
    for context, page, said, asked, base in pages:
        assert not said
        assert all(url.startswith((base, "data:", "blob:")) for url in asked), asked
        assert page.evaluate("window.stolen") is None
        context.close()


@pytest.fixture(scope="module")
def site(world, new_builder):
    """A run of two SAEs and its browser, and the dense activations [W, T, F] of the first; numbers of core."""
    builder, patch = new_builder(), pytest.MonkeyPatch()
    home = builder.run(world, "run_1", {"first": builder.make_sae(k=3, seed=1), "second": builder.make_sae(k=None)})
    patch.setattr(Context, "tokenizer", property(lambda _: SimpleNamespace(backend=Tokens(), bos_token=2)))
    subjects = find_all([str(home)], home.parent)[0]
    subjects[0].sae.W_enc.data[5] = 0  # a dead latent
    with Store.open(world.store) as store:
        list(evaluation.evaluate(Context(store), subjects, CONFIG))
        batches = [b for s in CONFIG.splits for b in store_batches(store, s, store.manifest.layers)]
    patch.undo()
    core = {
        "eval_result_metrics": {"sparsity": {"l0": 3.0}},
        "saemill_metrics": {"explained_variance": 0.5, "confidence_95": {"explained_variance": [0.4, 0.6]}},
        "saemill": {"measured_on": SCRIPT},
    }
    explained = {"explanation": f"{SCRIPT}\u202e\n{'y' * 400}", "score": 13 / 14, "control_score": 0.5}
    autointerp = {
        "eval_result_metrics": {},
        "judge": {"answered": [SCRIPT]},
        "eval_result_unstructured": {"1": explained, "2": {"explanation": "verbs"}, "3": {"score": 1.0}, "4": "odd"},
    }
    autointerp["eval_result_unstructured"]["5"] = {"explanation": "nouns", "score": math.nan}  # JSON has none
    odd = autointerp | {"judge": {"answered": 7}}
    documents = {"core": core, "autointerp": autointerp}
    log = [{"sae": "first", "step": step, "loss": 1 / (step + 1)} for step in range(9)]
    refresh(
        home,
        [
            Record("first", "run_1", "first", log=log, documents=documents),
            Record("second", "run_1", "second", documents={"autointerp": odd}),
        ],
    )
    acts = torch.cat([subjects[0].encode(batch) * batch.keep[:, :, None] for batch in batches]).numpy()
    return SimpleNamespace(home=home, acts=acts, tokens=torch.cat([batch.tokens for batch in batches]).numpy())


def wait(page, expression):
    """Until it is true. Playwright's own way evaluates a string inside the page, which the page's policy forbids."""
    for _ in range(1200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(25)
    pytest.fail(f"never true: {expression}")


def listed(page):
    """Numbers of the latents on the screen, as they stand below each other."""
    found = page.evaluate(
        "[...document.querySelectorAll('.r')].filter((row) => !row.hidden)"
        ".map((row) => [new DOMMatrix(getComputedStyle(row).transform).f, row.id])"
    )
    return [int(name.removeprefix("row-")) for _, name in sorted(found)]


def test_the_overview_sorts_and_draws(site, open_page):
    page = open_page(site.home)
    names = page.locator("#saes tbody a")
    assert sorted(names.all_inner_texts()) == ["first", "second"]
    page.locator("#saes th button").first.click()
    assert names.all_inner_texts() == ["first", "second"]
    page.locator("#saes th button").first.click()
    assert names.all_inner_texts() == ["second", "first"]
    assert "0.4 to 0.6" in page.locator("#saes").inner_text()
    assert page.locator(".wide + p").inner_text() == f"core: {SCRIPT}."
    row = page.locator("#saes tbody tr").filter(has_text="second")
    assert row.locator("td").nth(2).inner_text() == "\u2013"  # its L0 was not measured on that text
    (fidelity,) = page.locator("svg[aria-label^='explained variance against L0']").all()
    assert "L0 (active latents per token), log scale" in fidelity.text_content()
    assert page.locator("svg[aria-label='loss by step'] polyline").count() == 1
    assert page.locator("svg[aria-label^='densities of']").count() == 2
    places = "run.saes.map((sae) => `${sae.label} ${placeOf(sae)}`).sort()"
    assert page.evaluate(places) == page.evaluate(f"{{ run.saes.reverse(); {places} }}") == ["first 0", "second 1"]
    as_seeds = f"{{ numbers.saes.second.place = 0; {places} }}"
    assert page.evaluate(as_seeds) == ["first 0", "second 0"]
    page.evaluate("run.saes.reverse()")
    names.first.click()
    page.wait_for_selector(".r")
    assert page.url.endswith("#/sae/second")
    page.keyboard.press("o")
    page.wait_for_selector("#saes")
    assert page.locator("#search").get_attribute("placeholder") == "number, token or text in first"
    page.locator("#search").fill("word7")
    wait(page, "location.hash === '#/sae/first' && document.querySelector('#found')?.textContent.includes('found')")


def test_a_latent_has_the_judges_explanation_with_its_scores_as_text(site, open_page):
    page = open_page(site.home, "#/sae/first/1")
    page.wait_for_selector("#explanation")
    shown = page.locator("#explanation").inner_text()
    assert shown.startswith(SCRIPT) and shown.count("y") < 300
    assert f"explained by {SCRIPT[:40]}" in shown
    assert shown.endswith("92.9 % of passages right, 50 % with another latent's explanation")
    assert page.locator("#explanation img, #explanation script").count() == 0
    page.evaluate("location.hash = '#/sae/first/2'")
    wait(page, "document.querySelector('#explanation')?.innerText.startsWith('verbs explained by ')")
    for place in ("first/3", "first/4", "second/1"):
        page.evaluate(f"location.hash = '#/sae/{place}'")
        wait(page, f"location.hash.endsWith('{place}') && detail.dataset.latent === '{place[-1]}'")
        assert page.locator("#explanation").count() == 0


def test_what_the_overview_draws_anew_keeps_the_keyboard_where_it_was(site, open_page):
    page = open_page(site.home)
    for _ in range(2):
        page.locator("#saes th button").nth(1).focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement === document.querySelectorAll('#saes th button')[1]")
    for name in ("fidelity", "curve"):
        page.get_by_label(name, exact=True).focus()
        page.get_by_label(name, exact=True).dispatch_event("change")
        assert page.evaluate("document.activeElement.ariaLabel") == name


def test_points_that_are_near_have_numbers_below_and_names_beside_them(site, open_page):
    page = open_page(site.home)
    hidden = page.evaluate(
        """() => {
          const points = [["topk", 32, .8655], ["standard", 35.3, .8193], ["near", 39.6, .8144], ["tiered", 40, .8145]];
          const chart = scatter(points.map(([name, x, y]) => ({ name, x, y, colour: "red" })), ["L0", "fidelity"]);
          document.querySelector("main").prepend(chart);
          const texts = [...chart.querySelectorAll("text")], circles = [...chart.querySelectorAll("circle")];
          if (texts.filter((text) => Number(text.textContent) > 30).length < 2) return "no numbers at the axis";
          return texts.filter((text) => circles.some((circle) => {
            const [a, b] = [text, circle].map((one) => one.getBBox());
            return a.x < b.x + b.width && b.x < a.x + a.width && a.y + 3 < b.y + b.height && b.y < a.y + a.height - 3;
          })).map((text) => text.textContent);
        }"""
    )
    assert hidden == []
    far = page.evaluate(
        """() => {
          const near = (name, place) => ({ name, x: 40 + place / 1e3, y: .8, colour: colourOf(place) });
          const points = [..."abcdefghij"].map(near);
          const marks = [...scatter(points, ["L0", "fidelity"]).querySelectorAll("g")];
          const colours = new Set(points.map((point) => point.colour));
          const named = marks.filter((mark) => mark.querySelector("text"));
          const height = (mark, name, key) => Number(mark.querySelector(name).getAttribute(key));
          const isFar = (mark) => height(mark, "text", "y") - height(mark, "circle", "cy") > 40;
          return [colours.size, named.length, named.filter(isFar).length];
        }"""
    )
    assert far[0] == 7 and 1 <= far[1] < 10 and far[2] == 0  # names that are left out are the pointer's


def test_an_axis_has_three_numbers_at_least_and_a_line_through_few_points_shows_them(site, open_page):
    page = open_page(site.home)
    near = ([0.8, 0.8 + 2**-52], [0.8, 0.8 + 1e-12])  # the first had no end
    for values in ([0.675, 0.74], [32, 51], [16, 64], [0, 43], [5, 5], [0.0004, 0.9], *near):
        for is_log in ("false", "true"):
            ticks = page.evaluate(f"axis({values}, {is_log}).ticks")
            assert 3 <= len(ticks) < 14 and ticks == sorted(set(ticks)), (values, is_log)
    for values, is_log in (([], "false"), ([0, 0], "true"), ([-1, -2], "true")):  # nothing to draw
        assert page.evaluate(f"axis({values}, {is_log}).ticks") == []
    assert page.evaluate("lines([{ name: 'a', x: [0, 1], y: [0, 0] }], ['step', 'y', 'log']) instanceof Element")
    for count, circles in ((1, 1), (2, 2), (9, 9), (10, 0)):
        points = f"x: {list(range(count))}, y: {list(range(count))}"
        chart = f"lines([{{ name: 'a', colour: 'red', {points} }}], ['step', 'y', ''])"
        assert page.evaluate(f"{chart}.querySelectorAll('circle').length") == circles


def test_the_list_sorts_filters_and_searches(site, open_page):
    page = open_page(site.home, "#/sae/first")
    fired = (site.acts > 0).sum((0, 1))
    assert listed(page) == list(range(24))
    page.locator("[data-key=density]").click()
    assert [fired[latent] for latent in listed(page)] == sorted(fired, reverse=True)
    page.get_by_label("which latents").select_option("dead")
    assert listed(page) == np.flatnonzero(fired == 0).tolist()
    page.get_by_label("which latents").select_option("all")
    page.locator("[data-key=number]").click()
    page.keyboard.press("/")
    page.keyboard.type("7")
    wait(page, "document.querySelector('#found').textContent.includes('found')")
    assert listed(page)[0] == 7
    page.locator("#search").fill("WORD30")
    wait(page, "document.querySelector('#found').textContent.includes('example')")
    near = {
        latent for latent, windows in examples(site).items() if any(has_near(site, *place, 30) for place in windows)
    }
    said = page.locator("#found").inner_text()
    assert int(re.search(r"(\d+) have it in an example", said)[1]) == len(near)
    assert near <= set(listed(page))
    page.keyboard.press("Escape")
    wait(page, "document.querySelector('#found').textContent === ''")
    assert listed(page) == list(range(24))


def hold(page, name):
    """What is asked for by this name comes only after `release[name]()`."""
    page.evaluate(
        """(name) => {
          const quick = load, released = new Promise((go) => { (window.release ??= {})[name] = go; });
          load = async (asked) => { if (asked === name) await released; return quick(asked); };
        }""",
        name,
    )


def test_a_search_typed_on_the_overview_waits_for_the_sae(site, open_page):
    page = open_page(site.home)
    hold(page, "sae_first/columns")
    hold(page, "text/0")
    page.locator("#search").press_sequentially("wor", delay=150)  # longer than a search waits for the next letter
    wait(page, "state.query === 'wor'")
    page.evaluate("release['sae_first/columns']()")
    page.wait_for_selector("[aria-label='latents of first']")
    page.locator("#search").press_sequentially("d30", delay=150)  # while what stood there before is searched for
    wait(page, "state.query === 'word30'")
    page.evaluate("release['text/0']()")
    wait(page, "document.querySelector('#found')?.textContent.includes('in an example')")
    assert page.evaluate("state.order.every((latent) => state.hits.score[latent] > 0)")
    page.wait_for_selector(f"#detail[data-latent='{listed(page)[0]}']")


def test_an_sae_that_still_searches_leaves_the_one_chosen_after_it_alone(site, open_page):
    page = open_page(site.home, "#/sae/second")
    page.locator("#search").fill("word30")
    wait(page, "document.querySelector('#found')?.textContent.includes('in an example')")
    hold(page, "sae_first/places/0")
    page.locator("#sae").select_option("first")
    page.wait_for_selector("[aria-label='latents of first']")
    page.locator("#sae").select_option("second")
    page.wait_for_selector("[aria-label='latents of second'] ~ [data-latent]")
    page.evaluate("release['sae_first/places/0']()")
    page.wait_for_timeout(100)
    assert page.title().startswith("second")
    assert page.locator("#detail h1").inner_text().startswith(f"{listed(page)[0]} ")


def test_enter_opens_what_was_typed_and_nothing_of_another_list(site, open_page):
    page = open_page(site.home, "#/sae/first")
    page.wait_for_selector("#detail[data-latent]")
    page.keyboard.press("o")
    page.wait_for_selector("#saes")
    page.keyboard.press("/")
    page.keyboard.press("Enter")
    assert page.locator("#saes").is_visible()
    page.keyboard.press("Escape")
    page.goto(page.url.split("#")[0] + "#/sae/first")
    page.wait_for_selector("#detail[data-latent]")
    page.keyboard.press("/")
    page.keyboard.type("7")
    page.keyboard.press("Enter")  # before it is searched for
    page.wait_for_selector("#detail[data-latent='7']")
    assert page.url.endswith("#/sae/first/7")
    page.evaluate("columns.delete('sae_second')")  # as if nothing had asked for them yet
    hold(page, "sae_second/columns")
    page.locator("#sae").select_option("second")
    wait(page, "state.sae.label === 'second'")
    page.keyboard.press("/")
    page.keyboard.press("Enter")
    page.evaluate("release['sae_second/columns']()")
    page.wait_for_selector("[aria-label='latents of second'] ~ [data-latent]")
    assert page.url.endswith("#/sae/second")


def examples(site):
    """Window and position of every kept example, by latent, as they lie on disk."""
    found = browser_folder.read_data(site.home / "browser", "sae_first/places/0")
    counts, window, at = (browser_folder.unpacked(found[name]) for name in ("counts", "window", "at"))
    places = iter(zip(window.tolist(), at.tolist(), strict=True))
    return {latent: [next(places) for _ in range(count)] for latent, count in enumerate(counts)}


def has_near(site, window, at, token):
    return token in site.tokens[window, max(0, at - 16) : at + 9]


def test_a_latent_shows_values_on_hover_and_more_text_on_a_click(site, open_page):
    latent = int(site.acts.max((0, 1)).argmax())
    page = open_page(site.home, f"#/sae/first/{latent}")
    line = page.locator(".ex").first
    window, at = np.unravel_index(site.acts[:, :, latent].argmax(), site.acts.shape[:2])
    assert line.locator(".peak").inner_text() == f"{site.acts[window, at, latent]:.3g}"
    line.locator(f"[data-at='{at}']").hover()
    assert f"activation {site.acts[window, at, latent]:.3g}" in page.locator("#tip").inner_text()
    assert line.locator(".on").count() == int((site.acts[window, max(0, at - 16) : at + 9, latent] > 0).sum())
    line.locator(".peak").click()
    assert line.locator("[data-at]").count() == site.tokens.shape[1]
    assert line.get_attribute("aria-expanded") == "true"
    place = line.locator("a").get_attribute("href")
    assert place == f"#/sae/first/{latent}/{window}/{at}"
    page.mouse.move(0, 0)
    assert page.locator("#tip").is_hidden()
    for shown in (place, place.rpartition("/")[0]):  # as links of before
        other = open_page(site.home, shown)
        assert other.locator(".ex[aria-current=true]").first.get_attribute("aria-expanded") == "true"
    headings = set(page.locator("#examples h3").all_inner_texts())
    assert {"Strongest", "Sampled from the lowest quarter", "Random tokens on which it fires"} <= headings
    assert page.locator("svg[aria-label='histogram of activations'] rect").count() > 1
    assert "both scales are logarithmic" in page.locator("svg[aria-label='histogram of activations']").text_content()


def test_what_another_sae_leaves_out_still_shows_where_this_one_fires(site, open_page):
    page = open_page(site.home, f"#/sae/first/{int(site.acts.max((0, 1)).argmax())}")
    page.wait_for_selector(".ex")
    seen = page.evaluate(
        """[".hit", "[data-at]:not(.on)"].map((which) => {
          const [one] = shown, at = Number(one.line.querySelector(which).dataset.at);
          one.text.marks[at] |= 1;
          drawExample(one);
          const span = one.line.querySelector(`[data-at="${at}"]`);
          point(one, at, span);
          return [document.querySelector("#tip .big").textContent, span.classList.contains("out")];
        })"""
    )
    assert seen[0][0].startswith("activation ") and not seen[0][1]
    assert seen[1] == ["left out by some SAE: special, or an outlier", True]


def test_it_shows_what_the_model_looked_back_at(site, open_page):
    data = {
        name: browser_folder.unpacked(value)
        for name, value in browser_folder.read_data(site.home / "browser", "attention/0").items()
    }
    about = browser_folder.read_data(site.home / "browser", "run")
    shape = (-1, about["context"], len(about["attention_layers"]), about["attended"])
    positions, weights = data["positions"].reshape(shape), data["weights"].reshape(shape)
    firsts = [(latent, *places[0]) for latent, places in examples(site).items() if places]
    latent, window, at = next(one for one in firsts if weights[one[1:]].max() > 0.1 * about["levels"])
    page = open_page(site.home, f"#/sae/first/{latent}/{window}")
    page.wait_for_selector(".att")
    line = page.locator(".ex[aria-current=true]").first
    marked = {int(span.get_attribute("data-at")) for span in line.locator(".att").all()}
    strong = weights[window, at] >= 0.06 * about["levels"]
    assert marked == set(positions[window, at][strong].tolist())
    page.get_by_role("button", name=str(about["attention_layers"][0]), exact=True).click()
    marked = {int(span.get_attribute("data-at")) for span in line.locator(".att").all()}
    assert marked == set(positions[window, at, 0][strong[0]].tolist())
    page.get_by_role("button", name="off", exact=True).click()
    assert line.locator(".att").count() == 0
    assert page.locator("#attention h3").first.inner_text().startswith("layer ")


def test_what_another_sae_or_the_model_would_say_is_shown_where_it_is_the_very_one_and_was_there(site, open_page):
    page = open_page(site.home, "#/sae/first/3")
    page.wait_for_selector("#detail[data-latent='3']")
    assert "In the other SAEs" in page.locator("#related").text_content()
    assert "were not compared" not in page.locator("#related").text_content()
    wait(page, "document.getElementById('related').textContent.split('fires on the same tokens (of ').length === 3")
    page.evaluate("run.saes[0].not_compared = 55; showSae('first', 3, null)")
    said = "Those most like this SAE in layer, variant and width; 55 others were not compared with it."
    assert said in page.locator("#related").text_content()
    page.evaluate("run.saes[1] = { ...run.saes[1], sha256: 'of others' }")
    page.evaluate("showSae('first', 3, null)")
    assert "In the other SAEs" not in page.locator("#related").text_content()
    said = page.evaluate("[[1], [1, 2]].map((layers) => logits({ target_layers: layers }, {}).textContent)")
    assert "The model was not available when this SAE was read" in said[0] and "writes to several layers" in said[1]


def test_keys_alone_are_enough(site, open_page):
    page = open_page(site.home, "#/sae/first")
    for key, latent in (("j", 1), ("ArrowDown", 2), ("k", 1)):
        page.keyboard.press(key)
        page.wait_for_selector(f"#detail[data-latent='{latent}']")
    assert page.url.endswith("#/sae/first/1")
    assert page.locator(".r[aria-selected=true]").get_attribute("id") == "row-1"
    page.locator(".ex").first.focus()
    page.keyboard.press("Enter")
    assert page.locator(".ex").first.get_attribute("aria-expanded") == "true"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip").is_visible()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("?")
    assert page.locator("dialog").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("o")
    page.wait_for_selector("#saes")
    unnamed = page.evaluate(
        "[...document.querySelectorAll('a, button, input, select')].filter((one) => !one.hidden)"
        ".filter((one) => !(one.innerText.trim() || one.ariaLabel || one.title)).map((one) => one.outerHTML)"
    )
    assert unnamed == []


def test_notes_are_kept_exported_and_imported(site, open_page, tmp_path):
    page = open_page(site.home, "#/sae/first/3")
    page.keyboard.press("s")
    page.keyboard.press("l")
    page.keyboard.type("greetings")
    page.keyboard.press("Tab")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.locator("#own-label").input_value() == "greetings"
    page.goto(page.url.split("#")[0] + "#/notes")
    with page.expect_download() as download:
        page.locator("#export-notes").click()
    download.value.save_as(tmp_path / "notes.json")
    notes = json.loads((tmp_path / "notes.json").read_text())
    assert notes["notes"] == {"first": {"3": {"star": True, "label": "greetings"}}}
    assert notes["weights"] == {sae: source_of(site.home / sae).sha256 for sae in ("first", "second")}
    other = open_page(site.home, "#/notes")
    notes["notes"]["first"]["4"] = {"star": "yes", "label": SCRIPT, "more": 1}
    (tmp_path / "changed.json").write_text(json.dumps(notes))
    other.locator("#notes-file").set_input_files(tmp_path / "changed.json")
    other.wait_for_selector("text=notes imported")
    assert other.locator("table a").all_inner_texts() == ["\u2605 first 3", "first 4"]
    (tmp_path / "bad.json").write_text("[1")
    other.locator("#notes-file").set_input_files(tmp_path / "bad.json")
    other.wait_for_selector("text=not imported")
    assert other.locator("#notes-file").evaluate("(one) => one.files.length") == 0  # the same one can be chosen again


def test_two_tabs_keep_each_others_notes(site, open_page):
    page = open_page(site.home, "#/sae/first/3")
    other = page.context.new_page()
    other.goto(page.url)
    other.wait_for_selector("#star")
    page.keyboard.press("s")
    wait(other, "document.querySelector('#star').ariaPressed === 'true'")
    other.evaluate("notes = Object.create(null)")  # as if the word of it were still on its way
    other.locator("#own-label").fill("greetings")
    other.keyboard.press("Tab")
    wait(page, "document.querySelector('#own-label').value === 'greetings'")
    kept = json.loads(page.evaluate("localStorage.getItem(KEY(run.saes[0]))"))
    assert kept == {"3": {"star": True, "label": "greetings"}}


def test_notes_are_of_the_weights_and_not_of_whatever_bears_their_label(site, open_page, tmp_path):
    """Another SAE under the same label begins without notes, and an export of the one before is refused in words."""
    page = open_page(site.home, "#/sae/first/3")
    page.keyboard.press("s")
    wait(page, "document.querySelector('#star').ariaPressed === 'true'")
    retrained = "run.saes[0] = { ...run.saes[0], sha256: 'of others' }; readNotes(); showNotes()"
    page.evaluate(f"{{ {retrained} }}")
    assert page.locator("table a").count() == 0
    weights = {sae: source_of(site.home / sae).sha256 for sae in ("first", "second")}
    star = {"3": {"star": True}}
    given = {
        "old": {"notes": {"first": star}},  # which says nothing of weights
        "all": {"notes": {"first": star}, "weights": weights},
        "some": {"notes": {"first": star, "elsewhere": star}, "weights": weights | {"elsewhere": weights["second"]}},
    }
    said = []
    for name, notes in given.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"saemill_notes": 1} | notes))
        page.locator("#said").evaluate("(said) => { said.textContent = ''; }")
        page.locator("#notes-file").set_input_files(tmp_path / f"{name}.json")
        page.wait_for_selector("#said:not(:empty)")
        said.append(page.locator("#said").inner_text())
    refused = "not imported: these notes are for other weights than the ones shown here: first"
    assert said[:2] == [refused] * 2
    assert said[2] == "notes imported, except those for other weights than the ones shown here: first"
    assert page.locator("table a").all_inner_texts() == ["\u2605 second 3"]


def test_hostile_notes_change_nothing_and_lock_nobody_out(site, open_page, tmp_path):
    page = open_page(site.home, "#/notes")
    label = {"1": {"star": True, "label": "x"}}
    notes = {"\ud800": label, "__proto__": label, "first": label}
    first, second = (source_of(site.home / sae).sha256 for sae in ("first", "second"))
    weights = {"\ud800": second, "__proto__": second, "first": first}
    about = {"saemill_notes": 1, "weights": weights, "notes": notes}
    (tmp_path / "notes.json").write_text(json.dumps(about))
    page.locator("#notes-file").set_input_files(tmp_path / "notes.json")
    page.wait_for_selector("text=notes imported")
    assert page.evaluate("({})[1]") is None
    hostile = "{ '__proto__x': { star: true }, 2: 'x', ...notes.first }"
    page.evaluate(f"localStorage.setItem(KEY(run.saes[0]), JSON.stringify({hostile}))")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.locator("table a").all_inner_texts() == ["\u2605 first 1", "\u2605 second 1"]


def test_hostile_text_is_text(site, open_page):
    """All hostile tokens stand on this page: written out, cut where it is endless, turned as its script turns."""
    page = open_page(site.home, "#/sae/second/0")
    page.wait_for_selector("#detail[data-latent='0']")
    seen = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('.ctx [data-at]')].map((span) => "
        "[shown[span.closest('.ex').dataset.place].text.tokens[span.dataset.at], span.textContent]))"
    )
    assert set(map(str, TEXTS)) <= set(seen)
    assert seen["3"].startswith("</script><script>window.stolen")
    assert (seen["4"], seen["5"], seen["9"], seen["13"]) == (
        "\u27e82028\u27e9",
        "\u27e8FEFF\u27e9",
        "\u27e8202E\u27e9",
        "\u27e80000\u27e9",
    )
    assert (seen["6"], seen["7"], seen["8"], seen["14"]) == (HEBREW, ARABIC, COMBINED, TEXTS[14])
    assert seen["10"].endswith("\u2026(10,000 characters)") and len(seen["10"]) < 100
    assert seen["11"] == "\\xC3\\xA0" or seen["11"].startswith("\\x")
    assert seen["12"] == "\u21b5        "
    assert seen["15"] == "&lt;b&gt;"
    assert page.evaluate("getComputedStyle(document.querySelector('.ctx')).unicodeBidi") == "plaintext"
    assert page.evaluate("document.scripts.length") == 2
    page.keyboard.press("/")
    page.keyboard.type("__proto__")
    wait(page, "document.querySelector('#found').textContent.includes('found')")


def test_right_to_left_text_reads_from_the_right(site, open_page):
    page = open_page(site.home, "#/sae/second/0")
    page.evaluate("texts[3] = ''")
    left_to_right = page.evaluate(
        """() => {
          const line = document.querySelector('.ctx');
          const [first, second] = [' \u05d0\u05d1', ' \u05d2\u05d3'].map((text) => h('span', {}, text));
          line.replaceChildren(first, second);
          return first.getBoundingClientRect().left < second.getBoundingClientRect().left;
        }"""
    )
    assert not left_to_right


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_everything_can_be_read_in_light_and_dark(site, open_page, contrasts, theme):
    """Every text on the page stands out from what is behind it: at least 4.5 to 1."""
    page = open_page(site.home, color_scheme=theme)
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    for hash_ in ("#/", "#/sae/first/2", "#/sae/second/1", "#/notes"):
        page.goto(page.url.split("#")[0] + hash_)
        wait(page, "document.querySelector('#main').innerText.length > 60")
        if "sae" in hash_:
            page.wait_for_selector(".att")
        assert page.evaluate(contrasts) == []


@pytest.mark.parametrize("width", [380, 900])
def test_nothing_is_cut_off_on_a_small_screen(site, open_page, width):
    page = open_page(site.home, width=width)
    for hash_ in ("#/", "#/sae/first", "#/sae/first/2", "#/notes"):
        page.goto(page.url.split("#")[0] + hash_)
        wait(page, "document.querySelector('#main').innerText.length > 60")
        wide = page.evaluate(
            "[...document.querySelectorAll('header, main, .card, .detail, .list, .latent')]"
            ".filter((one) => one.getBoundingClientRect().right > innerWidth + 1"
            " || (one.scrollWidth > one.clientWidth + 1 && !one.matches('.wide'))).map((one) => one.outerHTML)"
        )
        assert wide == [], hash_
    page.goto(page.url.split("#")[0] + "#/sae/first/2")
    page.wait_for_selector("#detail[data-latent='2']")
    over = page.evaluate(
        """() => {
          const line = document.querySelector(".ctx"), indent = document.createElement("span");
          line.append(indent);
          indent.textContent = " ".repeat(300);  // as an indented line is underlined where the model looks back at it
          return [...indent.getClientRects()].some((one) => one.right > line.getBoundingClientRect().right + 1);
        }"""
    )
    assert not over
    page.get_by_text("all latents").last.click()
    page.wait_for_selector(".r >> visible=true")


def test_one_sae_without_model_or_attention_says_what_is_missing(make_world, builder, open_context, open_page):
    bare = make_world(attention_layers=())
    home = builder.run(bare, "run_1", {"only": builder.make_sae()})
    context = open_context(bare, model_name="/no/such/model")
    list(evaluation.evaluate(context, find_all([str(home)], home.parent)[0], CONFIG))
    page = open_page(home)
    text = page.locator("#main").inner_text()
    assert "One SAE" in text and "holds no attention" in text and "shown as their ids" in text
    assert "sae-eval RUN --evals core" in text
    page.goto(page.url.split("#")[0] + "#/sae/only/2")
    page.wait_for_selector("#detail[data-latent='2']")
    assert "promoted tokens need the model" in page.locator("#detail").inner_text()
    assert re.search(r"<\d+>", page.locator(".ctx").first.inner_text())
    for hash_, said in (
        ("#/sae/only/999", "has latents 0 to 23"),
        ("#/sae/nobody", "no SAE nobody"),
        ("#/what", "no page what"),
    ):
        page.goto(page.url.split("#")[0] + hash_)
        page.wait_for_selector(f"text={said}")


def test_a_damaged_browser_says_what_is_missing(site, chromium, tmp_path):
    shutil.copytree(site.home / "browser", tmp_path / "browser")
    (tmp_path / "browser/data/sae_first/latents/0.js").unlink()
    (tmp_path / "browser/data/sae_second/columns.js").write_text("saemill('other', 1)")
    page = chromium.new_page()
    for hash_ in ("#/sae/first/1", "#/sae/second"):
        page.goto(f"file://{tmp_path / 'browser'}/index.html{hash_}")
        page.wait_for_selector("text=rebuild the browser")
    page.close()


def test_a_static_server_shows_it_too(site, open_page):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(site.home / "browser"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            page = open_page(site.home, "#/sae/first/1", address=f"http://127.0.0.1:{server.server_port}")
            page.wait_for_selector(".att")
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("width", [8192, pytest.param(65_536, marks=pytest.mark.slow)])
def test_latents_are_shown_to_the_last(tmp_path, open_page, width):
    """Of which only those on the screen are made."""
    write_wide(tmp_path / "browser", width)
    page = open_page(tmp_path, "#/sae/wide")
    page.wait_for_selector(".r")
    assert len(listed(page)) < 60
    page.evaluate("rows.scrollTop = rows.scrollHeight")
    wait(page, f"document.querySelector('.r[aria-posinset=\"{width}\"]')")
    page.evaluate(f"showSae('wide', {width - 100}, null)")
    assert page.locator("#detail").get_attribute("data-latent") == str(width - 100)


def test_a_list_longer_than_a_page_may_be_high_is_shown_to_the_last(tmp_path, open_page):
    """Firefox ends at 526,000 latents, Chromium at 987,000."""
    write_wide(tmp_path / "browser", 8192)
    page = open_page(tmp_path, "#/sae/wide")
    page.wait_for_selector(".r")
    page.evaluate("MOST_HIGH = 30_000; arrange()")
    assert page.evaluate("rows.scrollHeight") == 30_000
    seen = (
        "[...document.querySelectorAll('.r')].filter((row) => { const at = row.getBoundingClientRect(), box ="
        " rows.getBoundingClientRect(); return !row.hidden && at.top >= box.top - 1 && at.bottom <= box.bottom + 1; })"
        ".map((row) => Number(row.id.slice(4))).sort((a, b) => a - b)"
    )
    for share, latent in ((0, 0), (0.5, 4096), (1, 8191)):
        page.evaluate(f"rows.scrollTop = {share} * (rows.scrollHeight - rows.clientHeight)")
        wait(page, f"document.getElementById('row-{latent}')")
        found = page.evaluate(seen)
        assert latent in found and found == list(range(found[0], found[0] + len(found)))
    page.evaluate("showSae('wide', 7000, null).then(revealSelected)")
    wait(page, "document.querySelector('#row-7000[aria-selected=true]')")
    assert 7000 in page.evaluate(seen)


@pytest.mark.slow
def test_65k_latents_are_painted_in_a_second_and_each_in_a_tenth(tmp_path, open_page):
    """On a quiet machine: the best of three."""
    write_wide(tmp_path / "browser", 65_536)
    paints, lists, sorts, latents_shown = [], [], [], []
    for latent in (40_000, 65_000, 65_535):  # in files of their own, which no page has read before
        page = open_page(tmp_path, "#/sae/wide")
        page.wait_for_selector(".r")
        lists.append(page.evaluate("performance.now()"))  # since the page was asked for
        wait(page, "performance.getEntriesByName('first-contentful-paint').length")
        paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
        sorts.append(page.evaluate(SORTING))
        latents_shown.append(
            page.evaluate(
                """async (latent) => {
                  const began = performance.now();
                  await showSae('wide', latent, null);
                  return performance.now() - began;
                }""",
                latent,
            )
        )
        assert page.locator("#detail").get_attribute("data-latent") == str(latent)
    print(f"ms: first paint {paints}, list {lists}, sorted {sorts}, a latent {latents_shown}")
    assert min(paints) < 1000 and min(lists) < 1000
    assert min(latents_shown) < 100 and min(sorts) < 300


def write_wide(path, width, windows=64, context=128, kept=40):
    """A browser with columns of so many latents; they share one file of examples' text."""
    random = np.random.default_rng(0)
    (path / "data").mkdir(parents=True)
    sae = {"folder": "wide", "label": "wide", "variant": "topk", "width": width, "target_layers": [1],
           "tokens": windows * context, "alive_share": 1.0, "dense_share": 0.0, "l0": 64.0, "dense": 0.1,
           "density": {"edges": np.arange(-6, 0.01, 0.25).tolist(), "counts": [1] * 24}}  # fmt: skip
    about = {"format": 1, "build": "b", "run": "wide", "model": "m", "corpus": "c", "cache_id": "i", "context": context,
             "windows": {"test": windows}, "text_windows": windows, "attention_windows": 8, "attention_layers": [],
             "attended": 0, "levels": 255, "edges": lower_edges(), "file_latents": 32,
             "without_words": None, "without_model": None, "saes": [sae]}  # fmt: skip
    write_data(path, "run", about)
    write_data(path, "numbers", {"columns": [], "saes": {}})
    write_data(path, "words", {"ids": np.arange(5000, dtype=np.uint32), "texts": [f" word{n}" for n in range(5000)]})
    tokens = random.integers(0, 5000, windows * context).astype(np.uint32)
    write_data(path, "text/0", {"tokens": tokens, "marks": np.zeros(windows * context, np.uint8)})
    floats = random.random(width).astype(np.float32) + 0.1
    columns = {"fired": random.integers(1, 900, width).astype(np.uint32), "mean": floats, "highest": floats * 9,
               "token": random.integers(0, 5000, width).astype(np.int32), "marks": {},
               "promoted": random.integers(0, 5000, (width, 3)).astype(np.uint32),
               "part_tokens": np.full(32, 256, np.uint32)}  # fmt: skip
    write_data(path, "wide/columns", columns)
    some = random.integers
    items = 32 * kept
    near = {"latents": some(0, width, (32, 8)).astype(np.int32), "scores": np.full((32, 8), 0.5, np.float32)}
    part = {"counts": np.full(32, kept, np.uint16), "reasons": some(1, 8, items).astype(np.uint8),
            "window": some(0, windows, items).astype(np.uint32), "at": some(0, context, items).astype(np.uint16),
            "peak": np.ones(items, np.float32), "lengths": np.full(items, 4, np.uint16),
            "positions": some(0, context, items * 4).astype(np.uint16),
            "levels": some(1, 65_535, items * 4).astype(np.uint16),
            "bins_first": np.full(32, 60, np.uint8), "bins_count": np.full(32, 12, np.uint8),
            "bins": some(1, 99, 32 * 12).astype(np.uint32), "parts": some(0, 9, (32, 32)).astype(np.uint32),
            "by_direction": near, "by_firing": near, "others": []}  # fmt: skip
    for number in (0, 40_000 // 32, *range(width // 32 - 40, width // 32)):
        write_data(path, f"wide/latents/{number}", part)
    write_page(path, "b")
