"""Studies: which commands they are, what their tables say, what they refuse."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from saemill.cache_schema import Store, StoreUnreachable
from saemill.cache_schema.strict_json import to_json
from saemill.evaluate import evals
from saemill.evaluate.errors import EvalError
from saemill.evaluate.run.console_table import NOTHING_LEARNED, signs_of_no_learning
from saemill.studies import study, tables
from saemill.studies.compare_and_decide import Difference
from saemill.studies.run_results import Line, read_lines
from saemill.studies.study import Course, call, training_words
from saemill.studies.tables import MEASURES, seeded_rows, spread, write_tables
from saemill.train.cli_support import report_errors
from saemill.train.config.recipe import Recipe, find_recipes, own_evals, runs_of, studies
from saemill.train.errors import ConfigInvalid, NonFiniteLoss, TrainingDiverged
from saemill.train.run.run_folder import RunFolder

GOOD = {"l0": 20.0, "explained_variance": 0.8, "ce": 0.9, "kl": 0.9, "alive": 1.0}
CACHE_ID = "0" * 32


def document(l0=20.0, explained_variance=0.8, ce=0.9, kl=0.9, alive=1.0):
    return {
        "eval_result_metrics": {
            "sparsity": {"l0": l0},
            "model_performance_preservation": {"ce_loss_score": ce},
            "model_behavior_preservation": {"kl_div_score": kl},
            "misc_metrics": {"frac_alive": alive},
        },
        "saemill_metrics": {"explained_variance": explained_variance},
    }


def recipe(name, seeds=1):
    return Recipe(name, "", (), seeds=seeds, study="attention")


def write_run(folder, steps=100, labels=("one",), **scores):
    (folder / "evals" / "core").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"cache": {"url": "./store", "cache_id": CACHE_ID}}))
    saes = {label: {"dead_share": 0.1} for label in labels}
    (folder / "result.json").write_text(json.dumps({"steps": steps, "saes": saes}))
    for label in labels:
        (folder / "evals/core" / f"{label}_eval_results.json").write_text(json.dumps(document(**scores)))
    return RunFolder(folder)


@pytest.fixture(autouse=True)
def any_store(monkeypatch):
    """Wherever one is looked for, there is the same."""
    store = SimpleNamespace(manifest=SimpleNamespace(cache_id=CACHE_ID))
    monkeypatch.setattr(Store, "open", lambda url: nullcontext(store))


def begin(course, run="run_1", cache_id=CACHE_ID):
    (course.out / run).mkdir(exist_ok=True)
    (course.out / run / "config.json").write_text(json.dumps({"cache": {"url": "./store", "cache_id": cache_id}}))


def test_a_run_that_learned_has_no_problems(tmp_path):
    (line,) = read_lines(write_run(tmp_path / "run_0"), ["core"])
    assert line.problems == []
    assert line.values["l0"] == 20.0 and line.values["steps"] == 100 and line.values["dead"] == 0.1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "no step"),
        ({"l0": 0.0}, "l0 0, no better than no latents (0)"),
        ({"explained_variance": -0.785}, "explained_variance -0.785"),
        ({"explained_variance": 0.0}, "explained_variance 0, no better than the mean (0)"),
        ({"ce": -0.6}, "ce_loss_score -0.6"),
        ({"explained_variance": None}, "explained_variance is not a number"),
        ({"ce": -1}, "ce_loss_score is not a number"),
        ({"alive": 0.0}, "frac_alive 0"),
    ],
)
def test_a_run_that_did_nothing_is_told(tmp_path, change, said):
    (line,) = read_lines(write_run(tmp_path / "run_0", **change), ["core"])
    assert any(said in problem for problem in line.problems)


def test_an_sae_that_diverged_is_told(tmp_path):
    folder = write_run(tmp_path / "run_0")
    result = json.loads((folder.path / "result.json").read_text())
    (folder.path / "result.json").write_text(json.dumps({**result, "diverged": {"wild": "its loss was not finite"}}))
    assert [(line.label, line.problems) for line in read_lines(folder, ["core"])] == [
        ("one", []),
        ("wild", ["its loss was not finite"]),
    ]


def test_a_missing_evaluation_is_told(tmp_path):
    (line,) = read_lines(write_run(tmp_path / "run_0"), ["core", "tiers"])
    assert line.problems == ["tiers gave no result"]


def test_a_table_of_many_measures_is_printed_whole(tmp_path):
    """Nothing is cut off or broken in the middle: what does not fit comes below, next to the same names."""
    values = {f"measure_{number}": 0.8153 + number for number in range(20)}
    lines = [Line("headline", f"an_sae_seed{seed}", values, []) for seed in range(3)]
    console = Console(width=80, record=True, file=io.StringIO())
    write_tables([(recipe("headline", 3), lines)], tmp_path, console)
    said = console.export_text()
    assert "\u2026" not in said and all(f"{value:.4g} \u00b1 0" in said for value in values.values())
    assert said.count("an_sae") > 3


def test_a_measure_that_gave_no_number_has_its_place_and_its_reason(tmp_path):
    folder = write_run(tmp_path / "run_0")
    metrics = {"contribution": {}, "fidelity": {"score": None}}
    told = {"eval_result_metrics": metrics, "saemill": {"missing": None, "remark": "it has several layers"}}
    (tmp_path / "run_0/evals/attention").mkdir()
    (tmp_path / "run_0/evals/attention/one_eval_results.json").write_text(json.dumps(told))
    (line,) = read_lines(folder, ["core", "attention"])
    own = [metric.rsplit(".", 1)[-1] for metric in evals.load("attention").summary]
    assert line.problems == [] and own and all(line.values[name] is None for name in own)
    results = [(recipe("run_0"), [line]), (recipe("headline", 3), [Line("headline", "one_seed0", line.values, [])])]
    write_tables(results, tmp_path, Console(quiet=True))
    text = (tmp_path / "table.md").read_text()
    assert all(name in text for name in own) and text.count(" | -" * len(own) + " |") == 2
    assert f"- run_0: attention has no {', '.join(own)}: its result says: it has several layers" in text
    assert json.loads((tmp_path / "table.json").read_text())[0][own[0]] is None


@pytest.mark.parametrize("write", [(study, "write_json"), (tables, "replace_file")])
def test_a_full_disk_ends_a_study_in_one_line(tmp_path, monkeypatch, write):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    wanted = runs_of("tiered")[0].name
    write_run(tmp_path / "tiered" / wanted)
    monkeypatch.setattr(study, "call", lambda *_, **__: None)
    monkeypatch.setattr(*write, full)
    words = ["tiered", "--only", wanted, "--evals", "core", "--cache", "./store", "--out", str(tmp_path)]
    result = CliRunner().invoke(study.main, words)
    assert result.exit_code == 1
    assert f"the disk is full while writing into {tmp_path / 'tiered'}. Free some space" in result.output


def write_core(folder, label, settings, missing=None):
    told = {"settings": settings, "cache_id": settings.get("cache_id"), "missing": missing}
    result = document() | {"sae_cfg_dict": {"model_name": "smollm2"}, "saemill": told}
    (folder / "evals/core" / f"{label}_eval_results.json").write_text(json.dumps(result))


@pytest.mark.parametrize("old", ["one", "three"])
def test_results_of_other_settings_are_not_put_into_one_table(tmp_path, old):
    """Those of an earlier call stay where this one's evaluation failed; nothing says which was meant."""
    folder = write_run(tmp_path / "run_0", labels=("one", "two", "three"))
    for label in ("one", "two", "three"):
        split = "validation" if label == old else "test"
        write_core(tmp_path / "run_0", label, {"config": {"split": split}, "cache_id": CACHE_ID})
    for line in read_lines(folder, ["core"]):
        assert line.problems == ["core is left out: results of this run differ in config.split"]
        assert "l0" not in line.values


def test_results_left_standing_by_an_evaluation_that_failed_are_not_those_that_were_asked_for(tmp_path):
    folder = write_run(tmp_path / "run_0")
    asked = evals.load("core").config()
    for split in ("test", "validation"):
        write_core(tmp_path / "run_0", "one", {"config": to_json(replace(asked, split=split)), "cache_id": CACHE_ID})
        (line,) = read_lines(folder, ["core"], asked={"core": asked})
        left_out = ["core is left out: its result is of config.split 'validation' (asked for: 'test')"]
        assert line.problems == ([] if split == "test" else left_out)
        assert ("l0" in line.values) == (split == "test")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cache_id": CACHE_ID}, ""),
        ({"cache_id": None}, ""),
        ({"cache_id": "f00d"}, f"the store with cache id f00d, but the run is of {CACHE_ID}"),
        ({"cache_id": CACHE_ID, "from_tokens": True}, "residuals computed from tokens (--from-tokens)"),
    ],
)
def test_results_of_another_store_or_of_tokens_are_left_out(tmp_path, settings, said):
    """`sae-eval --cache` measures a run whose own store is gone on another one."""
    folder = write_run(tmp_path / "run_0")
    write_core(tmp_path / "run_0", "one", settings)
    (line,) = read_lines(folder, ["core"])
    assert ("l0" in line.values) == (not said)
    assert said in "".join(line.problems) and len(line.problems) == bool(said)


def test_results_of_an_earlier_sae_are_left_out(tmp_path):
    folder, sae, ahead = write_run(tmp_path / "run_0"), tmp_path / "run_0/one", time.time() + 60
    sae.mkdir(exist_ok=True)
    (sae / "cfg.json").write_text("{}")
    os.utime(sae / "cfg.json", (ahead, ahead))
    (line,) = read_lines(folder, ["core"])
    assert line.problems == ["core is left out: its result is of weights that the SAE no longer has"]


def test_results_of_one_run_are_of_one_text(tmp_path):
    """One that names none is of a data set that does not change."""
    folder = write_run(tmp_path / "run_0", labels=("one", "two"))
    for texts, problems in (((None, None), 0), ((None, "a"), 1), (("a", "a"), 0), (("a", "b"), 1)):
        for label, text in zip(("one", "two"), texts, strict=True):
            write_core(tmp_path / "run_0", label, {"config": {}} | ({} if text is None else {"data_revision": text}))
        assert [len(line.problems) for line in read_lines(folder, ["core"])] == [problems, problems]


def test_results_of_an_earlier_revision_are_not_those_that_were_asked_for(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run_0")
    asked = evals.load("core").config()
    write_core(tmp_path / "run_0", "one", {"config": to_json(asked), "cache_id": CACHE_ID})
    monkeypatch.setattr(evals, "load", lambda name, load=evals.load: replace(load(name), revision=7))
    (line,) = read_lines(folder, ["core"], asked={"core": asked})
    assert line.problems == ["core is left out: its result is of revision None (asked for: 7)"]


@pytest.mark.parametrize(
    ("name", "model", "seeds", "found"),
    [
        ("decisive", "smollm2", 5, ["helps"]),
        ("decisive", "pocket", 5, ["not asked"]),
        ("decisive", "smollm2", 4, ["not asked"]),
        ("headline", "smollm2", 5, []),
    ],
)
def test_the_rule_is_asked_of_what_it_is_about(tmp_path, name, model, seeds, found):
    lines = []
    for label, value in (("base", 0.7), ("one", 0.8)):
        for seed in range(seeds):
            values = dict.fromkeys(MEASURES, 0.5) | {"explained_variance": value * (1 + 1e-3 * seed), "growth": 0.0}
            lines.append(Line(name, f"{label}_seed{seed}", values, [], model=model))
    lines.append(Line(name, "wild_seed0", {}, ["it diverged"]))
    write_tables([(replace(recipe(name, seeds), against=("base",)), lines)], tmp_path, Console(quiet=True))
    text = (tmp_path / "table.md").read_text()
    assert [verdict for verdict in ("helps", "not asked") if f"| one | {verdict} |" in text] == found


def test_a_table_says_what_it_is_of_and_that_a_result_is_of_a_part(tmp_path):
    folder = write_run(tmp_path / "run_0", steps=1080)
    write_core(tmp_path / "run_0", "one", {"cache_id": CACHE_ID}, missing="two data sets are not here")
    (line,) = read_lines(folder, ["core"])
    assert line.remarks == [
        "core is of a part of its data: two data sets are not here",
        f"of the model smollm2, store id {CACHE_ID}: 0 tokens in 1,080 steps",
    ]
    write_tables([(recipe("run_0"), [line])], tmp_path, Console(quiet=True))
    assert f"- run_0: of the model smollm2, store id {CACHE_ID}" in (tmp_path / "table.md").read_text()


def test_every_number_that_takes_no_learning_is_told():
    recorded = document(
        *(NOTHING_LEARNED[name][0] for name in ("sparsity.l0", "saemill_metrics.explained_variance")),
        ce=NOTHING_LEARNED["model_performance_preservation.ce_loss_score"][0],
        kl=NOTHING_LEARNED["model_behavior_preservation.kl_div_score"][0],
        alive=0.0,
    )
    assert len(signs_of_no_learning(recorded)) == 5
    assert signs_of_no_learning(document()) == []


def test_commands_start_what_is_missing_go_on_with_what_stopped_and_leave_what_ended(tmp_path):
    write_run(tmp_path / "run_0")
    (tmp_path / "run_1").mkdir()
    (tmp_path / "run_1/config.json").write_text("{}")
    course = Course("./store", tmp_path, ("--tokens", "1M"), seeds=3)
    out = ["--out", str(tmp_path)]
    start = ["--cache", "./store", *out, "--name"]
    runs = [recipe("run_0"), recipe("run_1"), recipe("run_2"), recipe("headline", 5)]
    assert commands_of(runs, course) == [
        ["--resume", "run_1", *out, "--cache", "./store"],
        ["--recipe", "attention/run_2", *start, "run_2", "--tokens", "1M"],
        ["--recipe", "attention/headline", *start, "headline", "--tokens", "1M", "--grid", "seed=0,1,2"],
    ]


def test_a_seed_is_found_wherever_it_stands_in_a_label():
    found = [Line("run", label, {}, []) for label in ("topk_seed3", "topk_seed3_wide", "topk_seeded")]
    assert [(one.family, one.seed) for one in found] == [("topk", 3), ("topk_wide", 3), ("topk_seeded", 0)]


def test_seeds_of_one_sae_become_one_row():
    lines = [Line("headline", f"base_seed{n}", {"l0": value}, []) for n, value in enumerate((1.0, 2.0, 3.0))]
    lines.append(Line("headline", "other_seed0", {}, []))
    assert seeded_rows(lines, ["l0"]) == [["base", "3", "2 ± 1"], ["other", "1", "-"]]
    lines.append(Line("headline", "base_seed3", {"l0": None}, []))
    assert seeded_rows(lines, ["l0"])[0] == ["base", "4", "2 ± 1 (of 3)"]
    assert tables.interval_of(Difference("one", "base", "l0", 3, 1.0, 0.1, 0.5), 4) == "+1 ± 0.1 (of 3)"
    assert tables.interval_of(Difference("one", "base", "l0", 3, 1.0, 0.1, 0.5), 3) == "+1 ± 0.1"
    assert spread([4.0]) == "4"


def test_tables_are_written(tmp_path):
    headline = [Line("headline", "one_seed0", GOOD, [])]
    results = [(recipe("run_0"), [Line("run_0", "one", GOOD, [])]), (recipe("headline", 3), headline)]
    write_tables(results, tmp_path, Console(quiet=True))
    text = (tmp_path / "table.md").read_text()
    assert "| run_0 | one | 20 | 0.8 |" in text and "| one | 1 | 20 | 0.8 |" in text
    assert json.loads((tmp_path / "table.json").read_text())[0]["label"] == "one"


def commands_of(recipes, course):
    words = (training_words(one, course, course.options, course.baselines) for one in recipes)
    return [one for one in words if one]


@pytest.mark.parametrize(
    "error", [NonFiniteLoss(1, {}), TrainingDiverged("none is left"), ConfigInvalid("no such store")]
)
def test_a_failure_of_training_ends_the_study_unless_it_diverged(error):
    """`sae-train` ends with 1 either way."""

    def command(words, **_):
        with report_errors():
            raise error

    has_diverged = not isinstance(error, ConfigInvalid)
    said = (
        nullcontext() if has_diverged else pytest.raises(click.ClickException, match="sae-train exited with status 1")
    )
    with said:
        call(SimpleNamespace(main=command), "sae-train", [], Console(quiet=True))


def test_a_command_that_fails_ends_the_study():
    @click.command()
    @click.option("--status", type=int)
    def command(status):
        raise SystemExit(status)

    call(command, "sae-eval", ["--status", "1"], Console(quiet=True), (0, 1))
    with pytest.raises(click.ClickException, match="sae-eval exited with status 3"):
        call(command, "sae-eval", ["--status", "3"], Console(quiet=True), (0, 1))


def test_a_run_of_which_every_sae_diverged_costs_the_others_nothing(tmp_path, monkeypatch):
    """Nor does it the next time, when it is trained again."""
    wild, tame, *_ = (one.name for one in runs_of("tiered"))
    trained, evaluated = [], []

    def train(words, **_):
        trained.append(wild if wild in words else tame)
        if tame in words:
            write_run(tmp_path / "tiered" / tame)
            return
        (tmp_path / "tiered" / wild).mkdir(exist_ok=True)
        begun = {"cache": {"url": "./store", "cache_id": CACHE_ID}, "saes": {"one": {}}}
        (tmp_path / "tiered" / wild / "config.json").write_text(json.dumps(begun))
        raise SystemExit(1) from TrainingDiverged("none is left")

    monkeypatch.setattr(study, "sae_train", SimpleNamespace(main=train))
    monkeypatch.setattr(study, "sae_eval", SimpleNamespace(main=lambda words, **_: evaluated.append(words[:2])))
    words = ["tiered", "--only", f"{wild},{tame}", "--evals", "core", "--cache", "./store", "--out", str(tmp_path)]
    for asked in ([wild, tame], [wild]):
        result = CliRunner().invoke(study.main, words)
        assert result.exit_code == 1 and f"failed: tiered/{wild}/one: training diverged" in result.output
        assert (trained, evaluated) == (asked, [[tame, "--runs"]])
        text = (tmp_path / "tiered/table.md").read_text()
        assert f"| {tame} | one | 100 |" in text and f"- failed: {wild}: training diverged" in text
        trained.clear(), evaluated.clear()


@pytest.mark.parametrize(
    ("stop", "status"), [(SystemExit(130), 130), (SystemExit(143), 143), (KeyboardInterrupt(), 130)]
)
def test_a_stop_ends_the_study_as_it_ended_the_command(tmp_path, monkeypatch, stop, status):
    def command(*_, **__):
        raise stop

    monkeypatch.setattr(study, "sae_train", SimpleNamespace(main=command))
    words = ["tiered", "--only", "run_0", "--cache", "./store", "--out", str(tmp_path)]
    assert CliRunner().invoke(study.main, words).exit_code == status


def test_a_table_is_of_all_runs_that_ended(tmp_path, monkeypatch):
    """Whichever were asked for last; and it says what is wrong with them."""
    wanted, other, stopped, *_ = (one.name for one in runs_of("tiered"))
    for name in (wanted, other):
        write_run(tmp_path / "tiered" / name, steps=0 if name == other else 100)
    (tmp_path / "tiered" / stopped).mkdir()
    monkeypatch.setattr(study, "call", lambda *_, **__: None)
    words = ["tiered", "--only", wanted, "--evals", "core", "--cache", "./store", "--out", str(tmp_path)]
    result = CliRunner().invoke(study.main, words)
    assert "made no step" not in result.output  # of a run that was not asked for
    text = (tmp_path / "tiered/table.md").read_text()
    assert f"- failed: {other}: it made no step" in text
    rows = json.loads((tmp_path / "tiered/table.json").read_text())
    assert [row["run"] for row in rows] == [wanted, other]
    damaged = tmp_path / "tiered" / other / "evals/core/one_eval_results.json"
    damaged.write_text(damaged.read_text()[:-3])
    assert CliRunner().invoke(study.main, words).exit_code == result.exit_code
    assert f"- failed: {other}: {damaged}" in (tmp_path / "tiered/table.md").read_text()


def test_columns_name_their_evaluation_where_their_name_does_not(tmp_path):
    """The explained variance of `replacement` is another one than core's."""
    run = write_run(tmp_path / "run_0")
    for eval_id, metrics in (("replacement", {"replacement": {"explained_variance": 0.3}}), ("decoder_cosine", {})):
        (run.path / "evals" / eval_id).mkdir()
        told = {"eval_result_metrics": metrics, "sae_cfg_dict": None, "saemill": {}}
        (run.path / "evals" / eval_id / "one_eval_results.json").write_text(json.dumps(told))
    eval_ids = ("core", "replacement", "decoder_cosine", "tpp")
    (line,) = read_lines(run, eval_ids)
    assert line.values["explained_variance"] == 0.8 and line.values["replacement.explained_variance"] == 0.3
    for seeds, name in ((1, "run_0"), (3, "headline")):
        one = replace(recipe(name, seeds), evals=eval_ids)
        write_tables([(one, [line])], tmp_path, Console(quiet=True))
        head = [cell.strip() for cell in (tmp_path / "table.md").read_text().splitlines()[2].split("|")]
        assert {"explained_variance", "replacement: explained_variance", "decoder_cosine: mean"} <= set(head)
        assert "mean" not in head
    titles = set(study.titles_of(eval_ids).values())
    assert not any(title.startswith("tpp: ") for title in titles)  # tpp_threshold_10_total_metric says it


def test_a_result_that_names_no_sae_has_no_model(tmp_path):
    run = write_run(tmp_path / "run_0")
    (run.path / "evals/core/one_eval_results.json").write_text(json.dumps(document() | {"sae_cfg_dict": None}))
    (line,) = read_lines(run, ["core"])
    assert line.model is None


def test_every_study_has_measures_of_its_own_and_compares_with_saes_that_it_trains():
    for name in studies():
        assert own_evals(name) and set(own_evals(name)) <= set(evals.names())
        for one in runs_of(name):
            assert set(one.against) <= {sae.label for sae in one.saes}
            assert set(one.evals) <= set(evals.names())
            assert (one.seeds > 1) == bool(one.against)
        assert {"headline", "decisive"} <= {one.name for one in runs_of(name)}


def test_settings_of_evaluations_reach_those_runs_that_ask_for_them():
    settings = ("scr.data=stdlib", "browser.windows=9")
    assert study.settings_of(settings, ("core", "browser")) == ["browser.windows=9"]
    assert study.settings_of(settings, ("core",)) == []


@pytest.mark.parametrize(("said", "message"), [("srcc.data=stdlib", "srcc.data"), ("scr.rows=2", "unknown setting")])
def test_settings_of_no_evaluation_are_refused_before_anything_is_trained(tmp_path, said, message):
    words = ["tiered", "--cache", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--eval-set", said]
    result = CliRunner().invoke(study.main, words)
    assert result.exit_code == 1 and "--eval-set: " in result.output and message in result.output
    assert not (tmp_path / "out").exists()


def test_several_processes_of_a_study_are_refused(tmp_path, monkeypatch):
    """Each would train all runs, and its second could not meet the others again."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["tiered", "--cache", str(tmp_path / "none"), "--out", str(tmp_path / "o")]
    result = CliRunner().invoke(study.main, words)
    assert result.exit_code == 1 and "expected one process" in result.output and not (tmp_path / "o").exists()
    monkeypatch.setenv("WORLD_SIZE", "abc")
    assert "WORLD_SIZE=abc: expected a number as torchrun sets it" in CliRunner().invoke(study.main, words).output


def test_studies_run_what_no_variant_is_trained_on_and_what_their_notes_ask_for():
    asked = {name: {one.name: set(one.evals) for one in runs_of(name)} for name in studies()}
    for runs in asked.values():
        assert {"sparse_probing", "scr", "tpp"} <= runs["headline"] & runs["decisive"]
    assert all("unlearning" in asked[name]["headline"] for name in ("tiered", "temporal"))
    assert "browser" in asked["attention"]["run_6"]


def test_a_study_is_whole_without_material_that_is_given_on_request_only(tmp_path):
    (line,) = read_lines(write_run(tmp_path / "run_0"), ["core", "unlearning"])
    assert line.problems == [] and line.remarks == ["unlearning gave no result"]


def test_a_run_that_tunes_names_the_best_and_one_that_weighs_costs_shows_them(tmp_path):
    tuned = Recipe("run_6", "", (), select="explained_variance", study="attention_plan")
    values = {"base": 0.7, "weaker": 0.8, "stronger": None}
    lines = [Line("run_6", label, {"explained_variance": value}, []) for label, value in values.items()]
    write_tables([(tuned, lines)], tmp_path, Console(quiet=True))
    said = "- run_6: selected by explained_variance: weaker (weaker 0.8, base 0.7)"
    assert said in (tmp_path / "table.md").read_text()
    assert "no SAE has explained_variance" in tables.ranking(tuned, [])
    folder = write_run(tmp_path / "run_2")
    result = json.loads((folder.path / "result.json").read_text())
    result["saes"]["one"] |= {"step_seconds": 0.004, "state_bytes": 3_000_000}
    (folder.path / "result.json").write_text(json.dumps(result))
    (line,) = read_lines(folder, ["core"], costs=True)
    assert line.values["ms_per_step"] == 4.0 and line.values["state_mb"] == 3.0
    assert "ms_per_step" not in read_lines(folder, ["core"])[0].values


def test_what_a_run_is_selected_by_is_measured_in_it():
    for name in studies():
        for one in runs_of(name):
            measured = {metric.rsplit(".", 1)[-1] for eval_id in one.evals for metric in evals.load(eval_id).summary}
            assert not one.select or one.select in measured


def test_the_run_that_decides_is_asked_for_by_name():
    assert "decisive" not in [one.name for one in study.choose("tiered", None)]
    assert [one.name for one in study.choose("tiered", "run_1, decisive,")] == ["run_1", "decisive"]
    for nothing in ("", " ,"):
        with pytest.raises(click.ClickException, match="expected names of runs, found none: give one of run_"):
            study.choose("tiered", nothing)
    with pytest.raises(ConfigInvalid, match="did you mean 'decisive'"):
        study.choose("tiered", "decisiv")


def test_a_base_at_half_length_is_no_run_of_its_own(tmp_path):
    words = ["tiered", "--cache", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--only", "decisive_half"]
    result = CliRunner().invoke(study.main, words)
    assert result.exit_code == 1 and "Ask for decisive" in result.output, result.output
    assert "sae-train --recipe tiered/decisive_half" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tierd"], "Error: unknown study 'tierd' (did you mean 'tiered'?)"),
        (["tiered", "tierd"], "Error: unknown study 'tierd' (did you mean 'tiered'?)"),
        (["tiered", "--only", "run_99"], "Error: "),
        (["tiered", "--evals", "cores"], "Error: unknown evaluation 'cores' (did you mean 'core'"),
        (["tiered", "--out", "file/runs"], "Error: file/runs/tiered cannot be created (Not a directory)"),
    ],
)
def test_bad_words_are_one_line_before_anything_is_trained(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(study, "call", lambda *_: pytest.fail("something runs"))
    result = CliRunner().invoke(study.main, [*words, "--cache", "./store"])
    assert result.exit_code == 1 and result.output.startswith(said) and len(result.output.splitlines()) == 1
    assert not Path("study_runs").exists()


def test_what_a_run_was_too_short_for_is_told(tmp_path):
    folder = write_run(tmp_path / "run_0")
    result = json.loads((folder.path / "result.json").read_text())
    result["saes"]["one"]["cut_short"] = [[1000, 53]]
    (folder.path / "result.json").write_text(json.dumps(result))
    (line,) = read_lines(folder, ["core"])
    assert line.remarks == ["a warm-up or onset of 1000 steps took 53"]


def test_the_controls_are_those_that_were_written_down():
    page = (Path(study.__file__).parent.parent / "docs/studies/questions.md").read_text()
    for name in studies():
        (row,) = re.findall(rf"^\| {name} \|.*$", page, re.MULTILINE)
        controls = set(re.findall(r"`(\w+)`", row.split("|")[4]))
        (decisive,) = [one for one in runs_of(name) if one.name == "decisive"]
        assert controls == set(decisive.against), name
        assert set(re.findall(r"`(\w+)`", row.split("|")[3])) <= {sae.label for sae in decisive.saes}


def test_differences_are_of_what_is_not_trained_on(tmp_path):
    """Five seeds: one SAE explains 0.1 more than the base, about the same as its control."""
    one = Recipe(
        "decisive", "", (), seeds=5, against=("base", "shuffled"), evals=("core", "attention"), study="attention"
    )
    lines = []
    for seed, noise in enumerate((-0.02, 0.01, 0.0, 0.03, -0.01)):
        for label, gain in (("base", 0.0), ("guided", 0.1 + noise / 50), ("shuffled", 0.1 + noise / 40)):
            values = {**GOOD, "explained_variance": 0.7 + noise + gain, "contribution": gain}
            lines.append(Line("decisive", f"{label}_seed{seed}", values, []))
    found = {(d.label, d.against): d for d in tables.differences(one, lines) if d.measure == "explained_variance"}
    assert found["guided", "base"].verdict == "more" and found["guided", "base"].mean == pytest.approx(0.1, abs=1e-3)
    assert found["guided", "shuffled"].verdict == "no difference shown"
    assert {d.measure for d in tables.differences(one, lines)} == {"explained_variance"}  # neither L0 nor contribution
    write_tables([(one, lines)], tmp_path, Console(quiet=True))
    assert "| guided | base | explained_variance | +0.1" in (tmp_path / "table.md").read_text()


def test_a_table_is_of_one_course(tmp_path):
    other = Course("./store", tmp_path / "tiered", ("--tokens", "2M"), seeds=3)
    other.out.mkdir()
    study.keep_course(other)  # nothing was begun by it: a refused call must not bind the next one
    course = Course("./store", tmp_path / "tiered", ("--tokens", "1M"), seeds=3)
    study.keep_course(course)
    begin(course)
    study.keep_course(course)
    with pytest.raises(
        click.ClickException, match="started with --tokens 1M --seeds 3, found --tokens 2M --seeds 3: give"
    ):
        study.keep_course(other)


def test_a_study_is_carried_out_by_one_process_at_a_time(tmp_path, monkeypatch):
    """And others in the same folder beside it, as `make studies` does."""
    words = ["--only", "run_0", "--evals", "core", "--cache", "./store", "--out", str(tmp_path)]
    trained, others = [], []

    def train(typed, **_):
        trained.append(typed[1])
        if len(trained) == 1:
            for called in (["tiered", "--tokens", "2M"], ["tiered"], ["attention"]):
                others.append(CliRunner().invoke(study.main, [*called, *words]).output)
        write_run(Path(typed[typed.index("--out") + 1]) / "run_0")

    monkeypatch.setattr(study, "sae_train", SimpleNamespace(main=train))
    monkeypatch.setattr(study, "sae_eval", SimpleNamespace(main=lambda *_, **__: None))
    CliRunner().invoke(study.main, ["tiered", *words])
    refused = f"Error: another sae-study is running in {tmp_path / 'tiered'}"
    assert [output.startswith(refused) for output in others] == [True, True, False]
    assert trained == ["tiered/run_0", "attention/run_0"]
    assert json.loads((tmp_path / "tiered/course.json").read_text())["options"] == []
    assert (tmp_path / "tiered/table.md").is_file() and (tmp_path / "attention/table.md").is_file()
    assert not CliRunner().invoke(study.main, ["tiered", *words]).output.startswith("Error")  # it has ended


def test_on_a_disk_without_locks_the_first_options_hold(tmp_path, monkeypatch):
    """Two calls that begin together both see that no run is begun."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    course = Course("./store", tmp_path / "tiered", ("--tokens", "1M"), seeds=3)
    with study._lock(course.out) as is_locked:
        assert not is_locked
        study.keep_course(course, is_locked)
        study.keep_course(course, is_locked)
        with pytest.raises(click.ClickException, match="started with --tokens 1M --seeds 3, found --seeds 3: give"):
            study.keep_course(replace(course, options=()), is_locked)


def test_seeds_that_were_asked_for_are_asked_for_again(tmp_path):
    """Runs that are not begun yet would have as many as their recipe says, in the same table."""
    course = Course("./store", tmp_path, (), seeds=3)
    study.keep_course(course)
    begin(course)
    with pytest.raises(click.ClickException, match="started with --seeds 3, found no options: give the same options"):
        study.keep_course(replace(course, seeds=None))


def gone(url):
    raise StoreUnreachable(2, url)


def test_a_table_is_of_one_store(tmp_path, monkeypatch):
    """It may have moved; another one in its place is of another text."""
    course = Course("./store", tmp_path, (), seeds=3)
    study.keep_course(course)
    begin(course)
    study.keep_course(replace(course, cache="./elsewhere"))
    with monkeypatch.context() as patch:  # what is there can be told without it
        patch.setattr(Store, "open", gone)
        study.keep_course(course)
    for cache in ({}, []):
        (tmp_path / "run_1/config.json").write_text(json.dumps({"cache": cache}))
        with pytest.raises(ConfigInvalid, match="run_1/config.json to name the run's store, .* copy the folder again"):
            study.keep_course(course)
    begin(course)
    begin(course, "run_2", "id of another")
    with pytest.raises(click.ClickException, match="run_2 was trained on store id of another, but ./store is store "):
        study.keep_course(course)


def test_what_is_evaluated_may_change_from_call_to_call(tmp_path):
    """Probing that turns out too long must not cost the runs that are there."""
    study.keep_course(course := Course("./store", tmp_path, (), seeds=5, evaluation=("scr.data=stdlib",)))
    begin(course)
    study.keep_course(Course("./store", tmp_path, (), seeds=5))
    with pytest.raises(click.ClickException, match="give the same options"):
        study.keep_course(Course("./store", tmp_path, (), seeds=5, baselines=True))


def test_only_runs_that_compare_have_sanity_baselines(tmp_path):
    course = Course("./store", tmp_path, (), seeds=None, baselines=True)
    alone, compared = commands_of([recipe("run_0"), recipe("decisive", 5)], course)
    assert "--with-baselines" not in alone and compared[-1] == "--with-baselines"


def test_what_no_run_has_a_use_for_is_told():
    runs = [replace(recipe(name), evals=("core",)) for name in ("run_0", "run_1")]
    said = list(study.unused(runs, "core,ravel", ("tiers.trace_windows=0", "core.resamples=9"), 5, True))
    assert said == [
        "--evals ravel: none of these runs has it",
        "--eval-set tiers.trace_windows=0: none of these runs is measured by tiers",
        "--seeds: none of these runs compares seeds",
        "--with-baselines: none of these runs compares seeds",
    ]
    assert list(study.unused([recipe("decisive", 5)], None, (), 5, True)) == []


def test_a_few_evaluations_can_be_chosen():
    (decisive,) = study.restrict(study.choose("tiered", "decisive"), "core, scr")
    assert decisive.evals == ("core", "scr")
    with pytest.raises(EvalError, match="core"):
        study.restrict([decisive], "cores")


def test_seeds_of_baselines_are_seeds():
    frozen = Line("decisive", "base_seed3_frozen_encoder", {}, [])
    assert (frozen.family, frozen.seed) == ("base_frozen_encoder", 3)
    assert Line("decisive", "pca_k32_layer15", {}, []).family == "pca_k32_layer15"


def test_a_remark_is_told_once_and_of_whom():
    lines = [Line("a", f"{name}_seed{n}", {}, [], ["short"]) for name in ("base", "guided") for n in (0, 1)]
    lines += [Line("b", "base_seed0", {}, [], ["short"]), Line("b", "other_seed0", {}, [])]
    assert tables.by_subject(lines, lambda line: line.remarks) == ["a: short", "b/base: short"]


def test_what_the_last_doubling_gained_is_of_the_base_at_half_the_length(tmp_path):
    folder, half = write_run(tmp_path / "decisive", labels=("base_seed0", "guided_seed0")), tmp_path / "decisive_half"
    settings = ("--set", "course.tokens=2k", "--set", "course.epochs=4")
    course = Course("./store", tmp_path, ("--epochs", "4", "--width", "64", *settings), seeds=2)
    decisive = Recipe("decisive", "", (), seeds=5, against=("base",), study="attention")
    (folder.path / "config.json").write_text(json.dumps({"course": {"tokens": 1001}}))
    result = json.loads((folder.path / "result.json").read_text())
    for label, share in (("base_seed0", 0.75), ("guided_seed0", 0.8)):
        result["saes"][label]["explained_variance"] = share
    (folder.path / "result.json").write_text(json.dumps(result))
    start = ["--cache", "./store", "--out", str(tmp_path), "--name", "decisive_half", "--width", "64"]
    length = ["--tokens", "500", "--epochs", "1000", "--grid", "seed=0,1"]
    assert study.half_command(decisive, course) == ["--recipe", "attention/decisive_half", *start, *length]
    assert all("growth" not in line.values for line in read_lines(folder, ["core"]))
    half.mkdir()
    (half / "config.json").write_text(json.dumps({"saes": {"base_seed0": {}}, "cache": {}}))
    base, guided = read_lines(folder, ["core"])
    assert base.problems == ["its growth is not known: decisive_half diverged, or has not ended"]
    assert not guided.problems
    of_half = {"steps": 100, "saes": {"base_seed0": {"explained_variance": 0.7}}}
    (half / "result.json").write_text(json.dumps(of_half))
    base, guided = read_lines(folder, ["core"])
    assert "growth" not in base.values and "expected 50 steps of decisive_half, found 100" in base.problems[0]
    (half / "result.json").write_text(json.dumps(of_half | {"steps": 50}))
    base, guided = read_lines(folder, ["core"])
    assert base.values["growth"] == pytest.approx(0.05) and "growth" not in guided.values
    assert study.half_command(decisive, course) == []


def test_the_base_of_a_run_that_compares_can_be_asked_for_alone():
    (half,) = find_recipes("tiered/decisive_half")
    (whole,) = find_recipes("tiered/decisive")
    assert [sae.label for sae in half.saes] == ["base"] and half.seeds == whole.seeds
    assert half.settings == whole.settings and half.saes[0] in whole.saes
    with pytest.raises(ConfigInvalid):
        find_recipes("tiered/run_0_half")


def test_sanity_baselines_are_no_comparisons():
    """Each would be one more that p is corrected for; the rule asks only whether a measure tells them from the base."""
    one = Recipe("decisive", "", (), seeds=2, against=("base",), study="attention")
    labels = [f"{name}_seed{n}" for name in ("base", "guided") for n in (0, 1)]
    labels += [f"base_seed{n}_frozen_encoder" for n in (0, 1)]
    lines = [Line("decisive", label, {"frac_alive": 0.1 * n}, []) for n, label in enumerate(labels)]
    assert {difference.label for difference in tables.differences(one, lines)} == {"guided"}


def test_an_evaluation_that_no_run_of_a_study_has_is_refused():
    recipes = study.choose("tiered", "decisive")
    with pytest.raises(click.ClickException, match="--evals ravel: the chosen runs of tiered have only core, "):
        study.restrict(recipes, "ravel")
    assert [found.evals for found in study.restrict(recipes, "core,ravel")] == [("core",)]
