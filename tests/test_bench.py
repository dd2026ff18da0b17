"""The benchmarks: their searches and comparisons, contestants that fail, and that the pages are up to date."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import json
import math
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

ROOT = Path(__file__).parent.parent
SCRIPTS = {"store": "store_speed"}  # whose results have another name than the script
SCRIPT = """
import sys
sys.path.insert(0, {bench!r})
print("a library says hello")
from worker_pipe import serve
def answer(request):
    print("and goes on talking")
    if request.get("fails"):
        raise RuntimeError("no such luck")
    if request.get("ends"):
        sys.stderr.write("out of everything\\n")
        sys.exit(3)
    if request.get("sleeps"):
        import time
        time.sleep(60)
    return request["value"] + 1
serve(answer)
"""
STEPS = """
import sys
sys.path.insert(0, {bench!r})
from stepping import serve_steps
def make(settings, batches):
    if {fails!r} == "opening":
        raise MemoryError("does not fit")
    def step(x):
        if {fails!r} == "stepping":
            raise ValueError("diverged")
    return step
serve_steps(make)
"""


@pytest.fixture
def bench(monkeypatch):
    """Imports a script of bench/ by name."""
    monkeypatch.syspath_prepend(str(ROOT / "bench/peers"))
    monkeypatch.syspath_prepend(str(ROOT / "bench/gpu"))
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module


def test_the_pages_match_the_results(bench, monkeypatch, tmp_path):
    table = bench("measured_tables")
    pages = {name: (ROOT / name).read_text() for name in table.PAGES}
    result = CliRunner().invoke(table.main, ["--check"])
    assert result.exit_code == 0, result.output
    monkeypatch.setattr(table, "ROOT", tmp_path)
    number = table.ratio_of(table.rows_of("store")[0])
    (tmp_path / "docs").mkdir()
    changes = {table.PAGE: (f"| {number} |", "| 9.99 |"), table.SMALLER: ("| int8 | 132 |", "| int8 | 64 |")}
    for changed, (old, new) in changes.items():
        for name, page in pages.items():
            (tmp_path / name).write_text(page.replace(old, new, 1) if name == changed else page)
        assert (tmp_path / changed).read_text() != pages[changed]
        assert CliRunner().invoke(table.main, ["--check"]).exit_code == 1
        assert CliRunner().invoke(table.main, []).exit_code == 0
        assert {name: (tmp_path / name).read_text() for name in pages} == pages


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": median - 10, "high": median + 10}


def test_a_kept_run_on_a_device_is_shown_against_the_best_peer(bench, monkeypatch, tmp_path):
    table = bench("measured_tables")
    folders = [tmp_path / f"gpu/2026-11-{name}-card" for name in ("26-1", "27-1", "27-2")]
    for folder in folders:
        folder.mkdir(parents=True)
    facts = {"card": "Some Card", "date": "2026-11-27", "torch": "2.11.0", "commit": "abc", "unit": "tok/s"}
    speeds = {"ours bfloat16": 900.0, "ours float32": 999.0, "sae_lens tf32": 300.0, "sparsify": 450.0}
    rows = [{"part": "steps", "what": "topk", "who": who, **spread(speed), **facts} for who, speed in speeds.items()]
    rows.append(
        {"part": "steps", "what": "topk", "who": "dictionary_learning tf32", "failed": "out of memory", **facts}
    )
    speeds = {"ours": 500.0, "ours, beside SAELens": 400.0, "SAELens, one residual": 200.0}
    rows += [{"part": "harvest", "what": "harvest", "who": who, **spread(speeds[who]), **facts} for who in speeds]
    rows.append({"part": "steps", "what": "gated", "who": "sae_lens tf32", **spread(10.0), **facts})
    rows.append({"part": "kernels", "what": "topk F 8: a step, 77 tok/s", "who": "device", **spread(1.0), **facts})
    older = [row | {"median": 1.0} for row in rows]
    beside = {"part": "fleet", "what": "fleet", "who": "80 tok/s", "against": "100 tok/s", "ratio": 0.8, **facts}
    beside |= {"target": 0.9, "is_met": False}
    later = [row | {"commit": "abd"} for row in rows if row["what"] == "gated"]
    files = {"1": [beside], "2": rows, "3": [{"part": "reading", "what": "disk", "median": 1.0, **facts}]}
    for folder, told in zip(folders, ({"1": older}, files, {"1": later}), strict=True):
        for name, of_call in told.items():
            (folder / f"{name}.json").write_text(json.dumps({"title": "", "parts": [], "rows": of_call}))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    lines = list(table.gpu_lines())
    assert "Some Card" in lines[0] and lines[4:] == [
        "| fleet | 80 tok/s | 100 tok/s | 0.80, goal 0.9 | abc |",
        "| topk | 900 (890 to 910) tok/s | sparsify: 450 | 2.00 | abc |",
        "| harvest | 400 (390 to 410) tok/s | SAELens, one residual: 200 | 2.00 | abc |",
        "| gated | failed | sae_lens tf32: 10 | | abd |",
        "| topk F 8, alone | 77 tok/s | | | abc |",
    ]


def test_ratios_name_their_day_and_processor_if_their_file_has_several(bench):
    table = bench("measured_tables")
    old = {"ratio": 2.0, "is_met": True, "date": "2026-11-21", "machine": "x86_64"}
    new = {"ratio": 3.0, "is_met": True, "date": "2026-11-27", "processor": "AMD EPYC"}
    assert table.ratios_of([old], [old, old]) == "2.00"
    assert table.ratios_of([old, old], [old, new]) == "2.00, 2.00 [2026-11-21, x86_64]"
    assert table.ratios_of([old, new], [old, new]) == "2.00, 3.00 [2026-11-21, x86_64; 2026-11-27, AMD EPYC]"


def test_small_stores_of_two_models_in_one_file_are_two_tables(bench, monkeypatch, tmp_path):
    table = bench("measured_tables")
    values = {"explained variance": [0.5, 0.6], "CE": [3.0, 3.2], "KL": [0.1, 0.2]}
    better = values | {"CE": [2.9, 3.0]}
    rows = [
        {"name": name, "found": "2 bytes a token", "rounds": rounds, "about": about}
        for about in ("one model", "another")
        for name, rounds in (("bfloat16", values), ("int8", better))
    ]
    (tmp_path / "smaller_stores.json").write_text(json.dumps({"title": "", "rows": rows}))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    lines = list(table.smaller_lines())
    assert [line.split(" (")[0] for line in lines if "all rounds" in line] == ["one model", "another"]
    assert (
        lines.count(
            "| bfloat16 | 2 | 0.5500 (0.5000 to 0.6000) | 3.1000 (3.0000 to 3.2000) | 0.1500 (0.1000 to 0.2000) |"
        )
        == 2
    )
    # for two differences, -0.1 and -0.2, Student's t with one degree of freedom is 12.706
    assert sum("| -0.1500 ± 0.6353 (-0.2000 to -0.1000) |" in line for line in lines) == 2
    assert "±" in table.cost([0.1, 0.2]) and "±" not in table.cost([0.1])


def names_in(script: Path) -> list[str]:
    """Patterns of a script's strings, in which fields of f-strings match anything."""
    found = []
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(re.escape(node.value))
        if isinstance(node, ast.JoinedStr):
            parts = [re.escape(part.value) if isinstance(part, ast.Constant) else ".+" for part in node.values]
            found.append("".join(parts))
    return found


def test_every_row_that_the_page_looks_up_is_one_that_its_benchmark_makes(bench):
    """Otherwise the page would show an old row for ever."""
    table, guided = bench("measured_tables"), bench("guided")
    settings = {"windows": 1, "context": 16, "d_model": 64, "width": 64, "device": "cpu", "rounds": 1, "steps": 1}
    settings |= {option.name: option.default for option in guided.main.params if option.name in ("sparsity", "product")}
    made = {row.name for base in ("standard", "topk") for row in guided.measure(base, settings)}
    for name, (_, told) in table.SPEED.items():
        for wanted in (wanted for rows in told.values() for wanted in rows):
            patterns = (
                map(re.escape, made) if name == "guided" else names_in(ROOT / f"bench/{SCRIPTS.get(name, name)}.py")
            )
            assert any(re.fullmatch(pattern, wanted) for pattern in patterns), (name, wanted)


@pytest.mark.parametrize("path", sorted((ROOT / "bench/results").glob("*.json")), ids=lambda path: path.stem)
def test_every_row_has_a_date_and_a_commit(path):
    rows = json.loads(path.read_text())["rows"]
    assert rows and all(row["date"] and row["commit"] for row in rows)


def test_a_claim_is_measured_on_known_codes(bench):
    """The first two of ten latents are the smooth part: one fires on every row, one on every other row."""
    claims = bench("claims")
    f = torch.zeros(8, 10)
    f[:, 0], f[::2, 1] = 1.0, 1.0
    f[:, 5] = torch.tensor([1.0, -1.0] * 4)  # both ways
    sae = argparse.Namespace(encode=lambda x: f, decode=lambda f: torch.zeros(8, 3))
    x = torch.ones(8, 3)
    sums = claims.Sums()
    sums.add(sae, x)
    found = sums.measures(variance=6.0)
    assert found["explained_variance"] == 0.5 and found["l0"] == 2.5
    assert found["never_fired"] == pytest.approx(0.7) and found["both_signs"] == pytest.approx(0.1)
    assert found["neighbours"] == pytest.approx(0.5**0.5 - 1.0)  # rows half a batch apart are equal


@pytest.mark.parametrize("what", ["cache_id", "width", "tokens"])
def test_a_claim_refuses_a_run_of_other_settings(bench, tmp_path, what):
    claims = bench("claims")
    config = {"cache": {"cache_id": "a"}, "data": {"batch_tokens": 4}, "saes": {"one": {"config": {"width": 8}}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "result.json").write_text(json.dumps({"tokens": 96}))
    run, asked = claims.Run(tmp_path), {"cache_id": "a", "width": 8, "tokens": 99}
    claims.require_same_settings([run], **asked)
    with pytest.raises(Exception, match="expected store .*choose another --runs"):
        claims.require_same_settings([run], **asked | {what: {"cache_id": "b", "width": 9, "tokens": 100}[what]})


@pytest.mark.parametrize("other", [{"git": {"commit": "another", "is_dirty": False}}, {"packages": {"torch": "1.0"}}])
def test_a_claim_refuses_a_run_of_another_commit_or_other_packages(bench, tmp_path, other):
    """Rows name the current commit and packages, so such a run is neither resumed nor read."""
    claims = bench("claims")
    config, result = tmp_path / "config.json", tmp_path / "result.json"
    config.write_text(json.dumps({"provenance": claims.provenance({}) | other}))
    for _ in range(2):
        with pytest.raises(Exception, match="choose another --runs"):
            claims.read_or_train(tmp_path, {})
        result.write_text("{}")
    config.write_text(json.dumps({"provenance": claims.provenance({})}))
    assert claims.read_or_train(tmp_path, {}).path == tmp_path


def score_of_fit(quality, value, l0=32.0, dead=0.0):
    return quality.Score(value, l0, dead, validation=value - 0.01, validation_l0=l0)


def test_a_fit_that_is_off_target_is_marked_and_claims_nothing(bench):
    quality = bench("quality")
    fits = [quality.Fit("batchtopk", 64, 32.0, "ours", 1e-3, seed=seed) for seed in range(3)]
    on, off = score_of_fit(quality, 0.8, 30.0), score_of_fit(quality, 0.9, 7.9)
    assert quality.row_of(fits[0], on)["on_target"] and not quality.row_of(fits[0], off)["on_target"]
    assert quality.score_of(quality.row_of(fits[0], off)) == off
    cell = quality.cell_at({fits[0]: off}, 1e-3)
    assert not cell.on_target and str(cell) == "off target: L0 7.9 (rate 0.001)"
    cell = quality.cell_at(dict(zip(fits, (on, off, on), strict=True)), 1e-3)
    assert str(cell) == "0.800 (0.8000) at L0 30.0, 0.0% dead, rate 0.001, 1 of 3 seeds off target"


def test_the_rate_is_searched_for_up_then_down_from_a_contestants_own(bench):
    quality = bench("quality")
    for peak, tried in ((0.027, [1e-3, 3e-3, 9e-3, 0.027, 0.081]), (3e-4, [1e-3, 3e-3, 3.333e-4, 1.111e-4])):
        rates = []

        def train(fit, peak=peak, rates=rates):
            rates.append(fit.lr)
            return score_of_fit(quality, -abs(math.log(fit.lr / peak)))

        first = quality.Fit("topk", 64, 32.0, "sae_lens", 1e-3)
        assert quality.best_of(first, train, True).lr == pytest.approx(peak, rel=0.2)
        assert rates == pytest.approx(tried, rel=1e-3)


def test_a_rate_that_misses_the_wanted_l0_is_never_the_best(bench):
    quality = bench("quality")

    def train(fit):
        return score_of_fit(quality, fit.lr, 90.0 if fit.lr > 2e-3 else 32.0)

    first = quality.Fit("jumprelu", 64, 32.0, "ours", 1e-3)
    assert quality.best_of(first, train, True) == first


def test_only_validation_text_decides_and_every_requested_seed_is_trained(bench):
    quality, seeds = bench("quality"), set()

    def train(fit):  # by the test split the higher rate would be off target
        seeds.add(fit.seed)
        return dataclasses.replace(score_of_fit(quality, fit.lr, 90.0 if fit.lr > 2e-3 else 32.0), validation_l0=32.0)

    first = quality.Fit("topk", 64, 32.0, "ours", 1e-3)
    quality.make_fits(first, (3, 4), lambda fit: train(dataclasses.replace(fit, lr=min(fit.lr, 9e-3))))
    assert seeds == {3, 4}
    assert quality.Score(0.8, 90.0, 0.0, 0.8, 32.0).worth(32.0) > quality.Score(0.7, 32.0, 0.0, 0.7, 32.0).worth(32.0)


@pytest.mark.parametrize("power", [-0.5, -1.0, -2.0])
def test_a_coefficient_is_searched_for_until_l0_is_the_wanted_one(bench, power):
    quality = bench("quality")
    fits = []

    def train(fit):
        fits.append(fit)
        return score_of_fit(quality, 0.5, 300.0 * fit.coefficient**power)

    found = quality.seek(quality.Fit("gated", 64, 32.0, "sae_lens", 1e-3, 1.0), train)
    assert 300.0 * found.coefficient**power == pytest.approx(32.0, rel=quality.NEAR)
    assert len(fits) <= 6


def test_no_coefficient_is_searched_for_once_a_fit_has_diverged(bench):
    quality = bench("quality")
    fits = []

    def train(fit):
        fits.append(fit)
        return score_of_fit(quality, -0.1, 50.0)

    quality.seek(quality.Fit("gated", 64, 32.0, "sae_lens", 1e-3, 1.0), train)
    assert len(fits) == 1


def test_a_coefficient_is_searched_for_between_one_that_gives_too_many_latents_and_one_that_diverges(bench):
    quality = bench("quality")

    def train(fit):
        return score_of_fit(quality, 0.5 if fit.coefficient < 45 else -0.1, 32.0 * (42.0 / fit.coefficient) ** 2.5)

    found = quality.seek(quality.Fit("gated", 64, 32.0, "sae_lens", 1e-3, 47.0 / math.e**1.5), train)
    assert found.coefficient == pytest.approx(42.0, rel=0.02)


def test_an_incomplete_comparison_does_not_replace_a_complete_one(bench):
    quality = bench("quality")
    first = quality.Fit("topk", 64, 32.0, "ours", 1e-3)

    def rows_of(cache_id, contestants):
        fits = [dataclasses.replace(first, contestant=who, seed=seed) for who in contestants for seed in quality.SEEDS]
        return [quality.row_of(fit, score_of_fit(quality, 0.5)) | {"cache_id": cache_id} for fit in fits]

    whole, half, two = rows_of("a", ["ours", "sae_lens"]), rows_of("b", ["ours"]), rows_of("c", ["ours", "sae_lens"])
    for rows, chosen in (([*whole, *half], whole), ([*whole, *half, *two], two), (half[:1], half[:1])):
        assert set(quality.last_scores(rows)) == {quality.fit_of(row) for row in chosen}


def test_each_contestant_is_shown_at_its_best_rate_and_at_its_own(bench):
    quality = bench("quality")
    own = quality.Fit("topk", 64, 32.0, "sae_lens", 1e-3)
    better = dataclasses.replace(own, lr=3e-3)
    scores = {own: score_of_fit(quality, 0.5), better: score_of_fit(quality, 0.6)}
    scores[dataclasses.replace(better, seed=1)] = score_of_fit(quality, 0.4)  # another seed does not decide
    lines = quality.lines_of(scores)
    (_, best), (_, default) = lines["best"][0], lines["own"][0]
    assert [score.explained_variance for score in best["sae_lens"].on_target] == [0.6, 0.4]
    assert [score.explained_variance for score in default["sae_lens"].on_target] == [0.5]
    other = dataclasses.replace(own, lr=9e-3)  # worse for the first seed by chance; once all seeds have it, they decide
    scores |= {dataclasses.replace(other, seed=seed): score_of_fit(quality, 0.55) for seed in (0, 1)}
    scores[dataclasses.replace(better, seed=2)] = score_of_fit(quality, 0.4)
    scores[dataclasses.replace(other, seed=2)] = score_of_fit(quality, 0.55)
    ((_, best),) = quality.lines_of(scores)["best"]
    assert best["sae_lens"].fits[0].lr == 9e-3


def test_a_short_run_of_a_peer_forgets_where_its_threshold_started(bench):
    beta = bench("dictionary_learning_fit").threshold_beta
    assert beta(100_000) == pytest.approx(0.999) and beta(10**6) == 0.999
    for steps in (60, 600, 10_000):
        assert beta(steps) ** (0.9 * steps) < 0.01


class RowsOfMlps:
    """A store whose rows differ between hooks and layers only by a factor."""

    def batches(self, layer, hook, **_):
        times = layer if hook == "mlp_in" else 10.0 * layer
        yield times * (torch.eye(4) - 0.25)


def test_a_threshold_is_placed_where_the_wanted_number_of_latents_is_active(bench):
    """Held-out text has more active latents than the text on which a threshold was learned."""
    fitting = bench("fitting")
    rows = torch.randn(3000, 40, generator=torch.Generator().manual_seed(0)).abs()
    threshold = torch.linspace(0.5, 1.5, 40)
    began = threshold.clone()
    came_to = fitting.place_threshold(threshold, lambda x: x * (x > threshold), rows, 4.0)
    assert came_to == pytest.approx(float((rows > began).sum()) / 3000)
    assert float((rows > threshold).sum()) / 3000 == pytest.approx(4.0, rel=0.003)
    torch.testing.assert_close(threshold / threshold[0], began / began[0])


def test_all_layers_of_a_cross_layer_transcoder_count_equally(bench, tmp_path):
    quality, fitting = bench("quality"), bench("fitting")
    quality.write_rows_of(RowsOfMlps(), (2, 3), tmp_path, quality.rows_read_by("clt"))
    x, target = fitting.split_pair(fitting.load(tmp_path, "test"))
    assert [float(part[0, 0]) for part in (*x.unbind(1), *target.unbind(1))] == [1.5, 2.25, 15.0, 22.5]
    scale, to = fitting.pair_scales(tmp_path)
    assert torch.allclose((x * scale).norm(dim=2), torch.tensor(2.0)) and torch.allclose(x * scale, target * to)
    only_first = torch.tensor([[1.0], [0.0]])
    ask = SimpleNamespace(folder=tmp_path)
    told = fitting.score_map(ask, lambda x: x.flatten(1), lambda x: x * only_first, scale, to)
    assert told["explained_variance"] == pytest.approx(0.5) and told["l0"] == 2.0 and told["dead"] == 0.0


def test_a_cross_layer_transcoder_is_fitted_to_the_wanted_l0(bench, tmp_path):
    rows = torch.randn(600, 4, 8, generator=torch.Generator().manual_seed(0))
    rows[:, 2:] = rows[:, :2].relu()
    for split in ("train", "validation", "test"):
        np.save(tmp_path / f"{split}.npy", rows.numpy())
    ask = bench("fitting").Ask(str(tmp_path), "clt", 32, 6.0, 0.0, 3e-3, 40, 0)
    told = bench("ours_fit").fit(ask)
    assert told["explained_variance"] > 0.3 and told["l0"] == pytest.approx(6.0, rel=0.2) and told["dead"] < 0.2


def test_a_cross_layer_transcoder_is_compared_with_clt_forge_at_a_coefficient_that_is_searched_for(bench):
    quality = bench("quality")
    ours, theirs = quality.contests(("clt",), 64, 32.0, 16)
    assert (ours.contestant, theirs.contestant) == ("ours", "clt_forge")
    assert ours.coefficient == 0.0 and ("clt", "ours") in quality.TARGETED
    assert theirs.coefficient > 0.0 and ("clt", "clt_forge") not in quality.TARGETED and "clt" not in quality.BY_K


@pytest.mark.parametrize(
    ("variants", "message"),
    [(("clt", "transcoder"), "different rows"), (("topk", "clt"), "different rows"), (("clt",), "--clt-forge")],
)
def test_an_impossible_comparison_is_refused_before_anything_is_read(bench, variants, message):
    words = [word for variant in variants for word in ("--variant", variant)]
    result = CliRunner().invoke(bench("quality").main, ["no store", "--peers-python", "no python", *words])
    assert result.exit_code == 2 and message in result.output


def test_turns_are_taken_in_another_order_each_round(bench):
    seen: list[str] = []
    jobs = {name: (lambda name=name: (seen.append(name), 0.25)[1]) for name in "abcd"}
    seconds = bench("timing_and_tables").take_turns(4, jobs)
    rounds = [tuple(seen[at : at + 4]) for at in range(0, 16, 4)]
    assert all(sorted(turn) == list("abcd") for turn in rounds) and len(set(rounds)) > 1
    assert seconds == {name: [0.25] * 4 for name in "abcd"}


def test_a_part_of_a_benchmark_leaves_the_rows_of_the_others(bench, tmp_path):
    table, file = bench("timing_and_tables"), tmp_path / "kept.json"
    for rows in ({"a": "1", "b": "2"}, {"b": "3", "c": "4"}):
        table.conclude("title", [table.Row(name, found) for name, found in rows.items()], file, {})
    kept = {row["name"]: row["found"] for row in json.loads(file.read_text())["rows"]}
    assert kept == {"a": "1", "b": "3", "c": "4"}


def test_a_row_about_another_model_leaves_the_one_that_is_kept(bench, tmp_path):
    table, file = bench("timing_and_tables"), tmp_path / "kept.json"
    for about in (None, "one model", "another", "one model"):  # a row without `about` is replaced by one with it
        table.conclude("title", [table.Row("int8", "1", facts={"about": about} if about else {})], file, {})
    assert [row["about"] for row in json.loads(file.read_text())["rows"]] == ["one model", "another"]


def test_two_rows_of_one_name_are_refused(bench, tmp_path):
    table, file = bench("timing_and_tables"), tmp_path / "kept.json"
    with pytest.raises(ValueError, match="peak memory"):
        table.conclude("title", [table.Row("peak memory", found) for found in "12"], file, {})
    assert not file.exists()


def test_rows_of_one_benchmark_have_different_names(bench):
    simulate, results = bench("simulate"), sorted((ROOT / "bench/results").glob("*.json"))
    made = [[row.name for paper in simulate.PAPERS for row in simulate.lay_out_on_paper(*paper)]]
    kept = [[row["name"] for row in json.loads(path.read_text())["rows"] if "name" in row] for path in results]
    assert all(len(names) == len(set(names)) for names in made + kept)


def test_rows_of_only_one_run_are_shown(bench, capsys):
    """The file also keeps rows of other stores, steps and widths."""
    massive = bench("massive_rows")
    run = {"steps": 440, "cache_id": "a", "windows": 128, "protocol": 3, "width": 2304, "l0": 32.0}
    row = {"variant": "topk", "trained_on": "all rows", "contestant": "ours", "seed": 0, "validation": 0.5, "lr": 0.01}
    row |= {"dead": 0.0} | dict.fromkeys(massive.MEASURES, 0.25) | run
    others = [{"cache_id": "b"}, {"steps": 9}, {"width": 8}, {"windows": 4}, {"l0": 9.0}, {"protocol": 2}]
    massive.show([row, *(row | other | dict.fromkeys(massive.MEASURES, 0.75) for other in others)], run)
    told = capsys.readouterr().out
    assert "0.250 (0.2500)" in told and "0.75" not in told


def test_a_worker_that_fails_says_why_and_answers_the_next_request(bench, tmp_path):
    pipe = bench("worker_pipe")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(bench=str(ROOT / "bench")))
    worker = pipe.Worker("it", [sys.executable, script])
    assert worker.ask(30, value=1) == 2
    with pytest.raises(pipe.WorkerFailed, match="no such luck"):
        worker.ask(30, fails=True)
    assert worker.ask(30, value=2) == 3
    with pytest.raises(pipe.WorkerFailed, match="out of everything"):
        worker.ask(30, ends=True)
    worker.close()


def test_a_worker_that_does_not_answer_in_time_is_killed(bench, tmp_path):
    pipe = bench("worker_pipe")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(bench=str(ROOT / "bench")))
    worker = pipe.Worker("it", [sys.executable, script])
    assert worker.ask(30, value=1) == 2
    with pytest.raises(pipe.WorkerFailed, match="no answer within"):
        worker.ask(0.2, sleeps=True)
    with pytest.raises(pipe.WorkerFailed, match="has exited"):
        worker.ask(1, value=1)


def test_a_contestant_that_fails_is_named_and_the_others_continue(bench, monkeypatch, tmp_path):
    racing = bench("racing")
    (tmp_path / "peers").mkdir()
    for name, fails in {"good": "", "large": "opening", "wild": "stepping"}.items():
        script = STEPS.format(bench=str(ROOT / "bench"), fails=fails)
        (tmp_path / f"peers/{name}_step.py").write_text(script)
    monkeypatch.setattr(racing, "HERE", tmp_path)
    racing.make_batches(str(tmp_path), 4, 3)
    contest = racing.Contest([racing.Entrant(name, name) for name in ("good", "large", "wild")], sys.executable, 1)
    outcome = contest.race({"batches": str(tmp_path), "variant": "topk", "width": 8, "k": 2}, rounds=3, steps=2)
    contest.close()
    assert list(outcome.seconds) == ["good"] and len(outcome.seconds["good"]) == 3
    assert "does not fit" in outcome.failures["large"] and "diverged" in outcome.failures["wild"]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_part_of_the_device_benchmark_has_its_command_and_its_turn(bench, tmp_path, device):
    run = bench("run")
    args = {"device": device, "small": False, "rounds": 5, "total": 580.0, "no_peers": True, "compile": False}
    args |= {"only": None, "matching": None}
    made = run.Run(argparse.Namespace(**args), tmp_path, {})
    parts = run.parts_of(made)
    assert tuple(part.name for part in parts) == run.PARTS
    assert run.chosen(made.args) == [name for name in run.PARTS if device == "cuda" or name != "kernels"]
    for part in parts[1:]:
        assert Path(part.command[1]).exists(), part.name


def test_rows_of_a_batch_have_lengths_of_the_requested_spread(bench, tmp_path):
    racing = bench("racing")
    for name, spread in (("alike", 0.0), ("unlike", 0.2)):
        batch = np.load(Path(racing.make_batches(str(tmp_path / name), 400, 300, 1, spread)) / "batch_0.npy")
        lengths = np.log(np.linalg.norm(batch, axis=1))
        assert batch.dtype == np.float32 and lengths.std() == pytest.approx((spread**2 + 1 / 600) ** 0.5, rel=0.15)


def test_a_part_of_the_device_benchmark_that_takes_too_long_keeps_its_numbers(bench, monkeypatch, tmp_path):
    run = bench("run")
    monkeypatch.setattr(run, "SHORTEST", 0.0)
    out, work = tmp_path / "out", tmp_path / "work"
    work.mkdir()
    args = argparse.Namespace(out=out, total=60.0, device="cpu")
    made = run.Run(args, work, run.make_environment(argparse.Namespace(small=True, device="cpu"), work))
    made.environment["PYTHONPATH"] = f"{ROOT / 'bench'}:{ROOT / 'bench/gpu'}"
    job = "import time, records; records.record('a thing', 'ours', 'tok/s', [1, 3, 2], (5.0, 6.0)); time.sleep(60)"
    facts = {"card": "Some Card", "commit": "abc"}

    class WhenRecorded(threading.Timer):
        def run(self):
            while not (made.records.exists() and made.records.read_bytes().endswith(b"\n")):
                if self.finished.wait(0.01):
                    return
            self.function()

    monkeypatch.setattr(run.threading, "Timer", WhenRecorded)
    part = run.Part("steps", 3.0, made.python("-c", job))
    run.do_part(made, part, facts)
    run.conclude(made, facts)
    (row,) = json.loads((out / "some-card.json").read_text())["rows"]
    assert (row["median"], row["rounds"], row["part"], row["commit"]) == (2.0, [1.0, 3.0, 2.0], "steps", "abc")
    assert "TOO LATE" in (out / "table.txt").read_text()


def test_a_job_of_the_small_path_fails_alone_and_says_why(bench, tmp_path, capsys):
    small = bench("small")

    def fail():
        print("the first line")
        raise ValueError("a device of another kind")

    jobs = small.Jobs(tmp_path / "logs", time.monotonic() + 100, None)
    good = [small.Job(name, 50, lambda name=name: print(f"{name} is done")) for name in ("one", "two")]
    assert jobs.run(*good) and not jobs.run(small.Job("bad", 50, fail), small.Job("told", 50, print, lambda: "a note"))
    jobs.deadline = 0.0
    assert not jobs.run(good[0])
    assert (jobs.done, jobs.failed) == (3, ["bad", "one"])
    said = capsys.readouterr().out
    for part in ("one is done", "two is done", "a note", "| the first line", "| ValueError: a device of another kind"):
        assert part in said
    assert "FAILED 1" in said and "no time left" in said


def test_a_row_has_the_clocks_of_its_measurement(bench):
    run = bench("run")
    clocks = [(float(at), [1000.0 + at, 2619.0, 500.0, 60.0]) for at in range(20)]
    assert run.clocks_of({"at": [4.0, 8.0]}, clocks)["clocks"]["sm_mhz"] == 1006.0
    assert run.clocks_of({}, clocks) == {}


def test_the_reading_of_a_store_reads_all_of_its_blocks(bench, monkeypatch):
    reading, blocks = bench("reading"), []
    plan, block = reading.Plan, reading.Loader.block
    monkeypatch.setattr(reading, "LAYER", 1)
    monkeypatch.setattr(reading, "Plan", lambda split, **sizes: plan(split, **sizes | {"batch_tokens": 4}))
    monkeypatch.setattr(reading.Loader, "block", lambda loader, one: blocks.append(one) or block(loader, one))
    reading.read_all(ROOT / "tests/golden/store_zstd", torch.device("cpu"), 8)
    assert sum(piece.windows for one in blocks for piece in one.pieces) == 3
