"""The whole evaluation with judges whose scores are known: one that knows, one that does not, one that babbles."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import statistics
import threading
from collections import Counter
from dataclasses import replace

import pytest

from saemill.evaluate.cli import main
from saemill.evaluate.context.write_and_read_results import frame
from saemill.evaluate.errors import DataMissing, JudgeMissing, NotApplicable
from saemill.evaluate.evals.autointerp import passages
from saemill.evaluate.evals.autointerp.config import Config
from saemill.evaluate.evals.autointerp.evaluation import EVALUATION, Scored, deranged, evaluate, share_right
from saemill.evaluate.evals.autointerp.prompts import MOST_LETTERS, read_explanation, read_numbers
from saemill.evaluate.evals.evaluation_contract import Failure

from ... import fake_judge
from ...fake_judge import NAME, failing, ignorant, is_to_explain, passages_in, perfect
from .conftest import KEY

MARK_UP = "</script><img src=x onerror='window.stolen = 2'>"


@pytest.fixture
def run(text_store, open_context, by_token, builder, config):
    """run(**settings): the result of an SAE whose latents fire on tokens."""
    subjects = {}

    def of(name="sae", **settings):
        subject = subjects.setdefault(name, builder.subject(builder.make_sae(), name))
        (result,) = evaluate(open_context(text_store), [subject], config(**settings))
        return result

    return of


def test_a_judge_that_knows_gets_everything_right_and_its_control_less(run, judge):
    result = run()
    ours = result.extra["saemill_metrics"]
    assert result.metrics == {"autointerp": {"autointerp_score": 1.0, "autointerp_std_dev": 0.0}}
    assert ours["latents"] == 8 and ours["always_none"] == pytest.approx(10 / 14)
    assert ours["control_score"] < 0.75 and ours["gain"] > 2 * ours["gain_standard_error"] > 0
    assert ours["gain"] == pytest.approx(1 - ours["control_score"])
    assert result.extra["judge"]["answered"] == [NAME] and result.extra["judge"]["asked_for"] == "fake"
    assert result.remark is None
    assert re.fullmatch(
        r"test, validation and train split, 4,\d+ tokens of 200 windows(, \d+ massive rows? left out)?; "
        rf"8 latents, judged by {NAME}",
        result.measured_on or "",
    )
    explained, scored = (
        [one for one in judge.prompts if is_to_explain(one) == is_first and passages_in(one)]
        for is_first in (True, False)
    )
    assert len(explained) == 8 and len(scored) == 16
    assert all(len(passages_in(one)) == 15 and all("<<" in text for text in passages_in(one)) for one in explained)
    assert all(len(passages_in(one)) == 14 and "<<" not in one for one in scored)
    of_scoring = Counter(tuple(passages_in(one)) for one in scored)
    assert set(of_scoring.values()) == {2}, "the control has the same passages"


def test_a_result_says_of_every_latent_what_the_judge_said(run):
    found = run().unstructured
    assert len(found) == 8
    for name, one in found.items():
        latent = int(name)
        own = {f"word{token}" for token in (latent, latent + 24)}
        assert one["latent"] == latent and set(one["explanation"].split(", ")) == own
        assert one["predictions"] == one["correct seqs"] and len(one["predictions"]) == 4 and one["score"] == 1.0
        assert one["control_latent"] != latent
        assert one["control_score"] == share_right(one["control_predictions"], one["correct seqs"], 14)
    controls = {one["control_latent"] for one in found.values()}
    assert controls == set(map(int, found)), "every explanation is some latent's control"


def test_a_judge_that_knows_nothing_gets_what_no_passage_gets_and_a_remark(run, judge):
    judge.answer = ignorant
    result = run()
    ours = result.extra["saemill_metrics"]
    assert result.metrics["autointerp"]["autointerp_score"] == ours["control_score"] == pytest.approx(10 / 14)
    assert ours["gain"] == 0 and "no better with a latent's explanation than with another's" in (result.remark or "")


def test_answers_that_cannot_be_read_are_counted_and_are_in_no_mean(run, judge):
    """Of eight latents, one explanation is empty and two answers are talk."""
    counts = Counter[str]()

    def answer(prompt):
        kind = "explain" if is_to_explain(prompt) else "score"
        counts[kind] += 1
        if kind == "explain" and counts[kind] == 3:
            return " \n"
        return "I think passage 3" if kind == "score" and counts[kind] in (2, 4) else perfect(prompt)

    judge.answer = lambda prompt: answer(prompt) if passages_in(prompt) else "yes"
    result = run(requests_at_once=1)
    ours = result.extra["saemill_metrics"]
    unreadable = ours["unreadable_answers"], ours["unreadable_control_answers"]
    assert ours["unreadable_explanations"] == 1 and sum(unreadable) == 2
    assert ours["latents"] == 7 - ours["unreadable_answers"]
    assert result.metrics["autointerp"]["autointerp_score"] == 1.0
    assert f"{ours['latents']} of 8 latents have a score: 1 have no readable explanation" in (result.remark or "")
    assert sum("explanation" not in one for one in (result.unstructured or {}).values()) == 1
    judge.answer = lambda _: "what?"
    result = run("other")
    assert math.isnan(result.metrics["autointerp"]["autointerp_score"])
    assert "0 of 8 latents have a score: 8 have no readable answer" in (result.remark or "")


def test_questions_that_the_judge_does_not_take_are_said(run, judge):
    judge.faults += [lambda _: True, failing(400, "filtered")]
    result = run(requests_at_once=1)
    assert "the judge did not take 1 question, such as: status 400" in (result.remark or "")
    assert result.extra["saemill_metrics"]["unreadable_explanations"] == 1
    assert run().extra["saemill_metrics"]["latents"] == 8


def test_the_score_is_the_share_of_passages_told_apart():
    assert share_right([1, 2, 3], [2, 3, 5, 9], 14) == 11 / 14
    assert share_right([], [1, 2, 3, 4], 14) == 10 / 14
    assert share_right([1, 99, 0], [1], 14) == 1.0
    assert share_right(None, [1], 14) is None
    one = Scored(5, [1, 2], "x", [1], 6, [3])
    assert one.score(4) == 3 / 4 and one.control(4) == 1 / 4


def test_means_and_errors_are_those_of_the_latents(run, judge):
    """A judge that is right about all but as many passages as its latent's number says."""

    def answer(prompt):
        if is_to_explain(prompt) or not passages_in(prompt):
            return perfect(prompt)
        wrong = int(re.findall(r"word(\d+)", prompt)[0]) % 3
        right = read_numbers(perfect(prompt)) or []
        silent = [number for number in range(1, 15) if number not in right]
        return ",".join(map(str, right + silent[:wrong])) or "none"

    judge.answer = answer
    result = run()
    rows = list((result.unstructured or {}).values())
    scores = [1 - (len(one["predictions"]) - 4) / 14 for one in rows]
    gains = [one["score"] - one["control_score"] for one in rows]
    assert len(set(scores)) > 1 and [one["score"] for one in rows] == pytest.approx(scores)
    assert result.metrics["autointerp"]["autointerp_score"] == pytest.approx(statistics.mean(scores))
    assert result.metrics["autointerp"]["autointerp_std_dev"] == pytest.approx(statistics.stdev(scores))
    ours = result.extra["saemill_metrics"]
    assert ours["gain"] == pytest.approx(statistics.mean(gains))
    assert ours["gain_standard_error"] == pytest.approx(statistics.stdev(gains) / len(gains) ** 0.5)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_control_is_never_a_latents_own_explanation(count):
    latents = list(range(5, 5 + count))
    found = deranged(latents, 42)
    assert sorted(found) == sorted(found.values()) == latents and all(a != b for a, b in found.items())
    assert deranged(latents, 42) == found
    assert deranged([7], 42) == deranged([], 42) == {}


def test_one_latent_alone_has_a_score_and_no_control(run):
    result = run(override_latents=(9,))
    assert result.metrics["autointerp"]["autointerp_score"] == 1.0
    assert math.isnan(result.metrics["autointerp"]["autointerp_std_dev"])
    assert math.isnan(result.extra["saemill_metrics"]["control_score"])
    assert result.remark == "fewer than two latents have both scores: whether their explanations help is not known"
    assert result.eval_config["n_latents"] is None and result.eval_config["override_latents"] == [9]


def test_latents_that_are_not_there_are_refused_and_those_that_never_fire_counted(
    text_store, open_context, by_token, builder, config
):
    subjects = [builder.subject(builder.make_sae(width=width), f"sae_{width}") for width in (24, 60)]
    small, large = evaluate(open_context(text_store), subjects, config(override_latents=(40, 55)))
    assert isinstance(small, Failure) and "expected 0 to 23, found [40, 55]" in str(small.error)
    assert not isinstance(large, Failure)
    assert large.extra["saemill_metrics"]["too_rare"] == 1, "no token is 55"
    assert "1 of 2 latents have a score: 1 fired in too few separate places" in (large.remark or "")


def test_a_second_call_asks_only_what_the_first_did_not(run, judge):
    first = run()
    judge.requests.clear()
    assert run() == first
    assert len(judge.requests) == 1, "the check alone"
    more = run(n_latents=12)
    assert len([one for one in judge.prompts if is_to_explain(one)]) == 4
    assert more.extra["saemill_metrics"]["latents"] == 12


def test_answers_of_several_judges_are_said(run, monkeypatch):
    """As after a local server was started with another model under the same name."""
    run()
    monkeypatch.setattr(fake_judge, "NAME", "another")
    assert run().remark is None, "its answers are all the first one's, as the result says"
    more = run(n_latents=12)
    assert more.extra["judge"]["answered"] == ["another", NAME]
    assert f"several judges answered (another, {NAME})" in (more.remark or "")


def test_memory_for_one_sae_at_a_time_changes_nothing(text_store, open_context, by_token, builder, config, monkeypatch):
    subjects = [builder.subject(builder.make_sae(seed=seed), f"sae_{seed}") for seed in (0, 1)]
    together = list(evaluate(open_context(text_store), subjects, config()))
    monkeypatch.setattr(passages, "ROOM", 1)
    assert list(evaluate(open_context(text_store), subjects, config())) == together


def test_a_lost_judge_leaves_its_answers_and_says_so(run, judge, builder):
    judge.faults += [lambda _: True] * 6 + [failing(503)] * 9
    with pytest.raises(JudgeMissing, match="5 answers so far are kept: the same command asks for the rest"):
        run(requests_at_once=1)
    judge.faults.clear()
    assert run().extra["saemill_metrics"]["latents"] == 8


def test_nothing_is_read_before_the_judge_has_answered(text_store, open_context, builder, config, monkeypatch):
    monkeypatch.setattr(passages, "read_windows", pytest.fail)
    with pytest.raises(JudgeMissing, match="no connection"):
        list(
            evaluate(open_context(text_store), [builder.subject(builder.make_sae())], config(endpoint="http://[::1]:9"))
        )


def test_text_is_needed_and_windows_that_hold_a_passage(text_store, open_context, builder, config, run):
    with pytest.raises(NotApplicable, match="expected windows of at least 25 tokens, found 24: set a smaller buffer"):
        run(buffer=12)


def test_tokens_without_text_are_not_judged(make_world, text_store, open_context, builder, config):
    subject = builder.subject(builder.make_sae())
    with pytest.raises(DataMissing, match="tokenizer has no text for the store's tokens"):
        list(evaluate(open_context(text_store), [subject], config()))
    with pytest.raises(DataMissing, match="the judge needs tokens as text: .* was imported without tokens"):
        list(evaluate(open_context(make_world(has_tokens=False)), [subject], config()))


@pytest.mark.parametrize(
    ("answer", "numbers"),
    [
        ("1, 4, 7", [1, 4, 7]),
        ("7 and 1.", [1, 7]),
        ("[2,3]\n", [2, 3]),
        ("None", []),
        ("none.", []),
        ("<think>1, 2? no: 3</think>\n\n3", [3]),
        ("<think>1, 2", None),
        ("", None),
        ("passages 1 and 2", None),
        ("1. 1. 2. 3. 4. 5.", None),  # a judge that counts
        ("9" * 5000, None),
        ("\u0663", None),
        ("-1", None),
    ],
)
def test_numbers_are_read_or_they_are_not(answer, numbers):
    assert read_numbers(answer) == numbers


@pytest.mark.parametrize(
    ("answer", "explanation"),
    [
        ("  verbs of\n motion. ", "verbs of motion"),
        ('"The unit is active on: verbs"', '"The unit is active on: verbs"'.strip('"')),
        ("The unit is active on verbs.", "verbs"),
        ("<think>hm</think> verbs", "verbs"),
        ("<think>hm</think>", None),
        ("<think>\nOkay, the marked tokens", None),
        (" '.' ", None),
        ("x" * 10_000, "x" * MOST_LETTERS),
    ],
)
def test_an_explanation_is_one_phrase(answer, explanation):
    assert read_explanation(answer) == explanation


def test_the_document_is_one_that_saebench_reads(run, builder):
    """Keys and types of its `eval_output_schema_autointerp.json`; more keys are allowed there."""
    result = run()
    document = frame(result, "autointerp", {})
    assert document["eval_type_id"] == "autointerp"
    kinds = {"dataset_name": str, "model_name": str, "llm_dtype": str, "llm_context_size": int, "n_latents": int}
    kinds |= {"override_latents": type(None), "dead_latent_threshold": (int, float), "random_seed": int, "buffer": int}
    kinds |= {"no_overlap": bool, "act_threshold_frac": float, "total_tokens": int, "scoring": bool}
    kinds |= {"max_tokens_in_explanation": int, "use_demos_in_explanation": bool, "n_top_ex_for_generation": int}
    kinds |= {"n_iw_sampled_ex_for_generation": int, "n_top_ex_for_scoring": int, "n_random_ex_for_scoring": int}
    kinds |= {"n_iw_sampled_ex_for_scoring": int}
    for key, kind in kinds.items():
        assert isinstance(document["eval_config"][key], kind), key
    assert set(document["eval_result_metrics"]) == {"autointerp"}
    assert set(document["eval_result_metrics"]["autointerp"]) == {"autointerp_score", "autointerp_std_dev"}
    assert document["eval_result_details"] == []
    of_saebench = {"latent", "explanation", "predictions", "correct seqs", "score"}
    assert all(of_saebench <= set(one) for one in document["eval_result_unstructured"].values())
    json.dumps(document | {"saemill": None}, allow_nan=False)
    nothing = replace(result, unstructured={}, metrics={"autointerp": {"autointerp_score": math.nan}})
    assert frame(nothing, "autointerp", {})["eval_result_metrics"]["autointerp"]["autointerp_score"] == -1


@pytest.fixture
def command(text_store, builder, by_token, judge, capsys):
    """command(*words): its exit status and what it said, for a run with two SAEs."""
    home = builder.run(text_store, "run_1", {name: builder.make_sae(seed=seed) for seed, name in enumerate("ab")})

    def go(*words):
        with pytest.raises(SystemExit) as ended:
            main([str(home), "--runs", str(home.parent), "--evals", "autointerp", "--no-plots", *words])
        told = capsys.readouterr()
        return ended.value.code, told.out + told.err

    go.home = home
    return go


def settings(judge, **more):
    given = {"endpoint": judge.url, "judge": "fake", "buffer": 2, "n_latents": 6} | more
    return [word for name, value in given.items() for word in ("--set", f"autointerp.{name}={value}")]


def test_by_name_without_an_endpoint_the_command_says_what_to_type(command, judge):
    status, told = command()
    assert status == 3 and "not run" in told
    assert "--set autointerp.endpoint=http://localhost:8000/v1" in " ".join(told.split())
    assert not judge.requests


def test_the_key_is_in_no_file_and_no_output(command, judge):
    judge.answer = lambda prompt: perfect(prompt) if passages_in(prompt) else f"yes {KEY}"
    judge.faults.append(failing(429, KEY))
    status, told = command(*settings(judge), "--json")
    assert status == 0 and all(one["Authorization"] == f"Bearer {KEY}" for one in judge.headers)
    files = [file for file in command.home.rglob("*") if file.is_file()]
    assert {file.name for file in files} > {"a_eval_results.json", "a_answers.jsonl", "b_answers.jsonl"}
    assert KEY not in told and not any(KEY.encode() in file.read_bytes() for file in files)


def test_a_stopped_command_resumes_from_its_answers(command, judge):
    """Ctrl-C after 20 answers."""
    judge.faults += [lambda _: True] * 20 + [lambda _: os.kill(os.getpid(), signal.SIGINT) or True]
    status, told = command(*settings(judge))
    assert status == 130 and "stopped" in told
    for thread in threading.enumerate():
        if thread.name == "saemill-judge":
            thread.join(20)
    lines = [one for file in command.home.rglob("*_answers.jsonl") for one in file.read_text().splitlines()]
    assert 10 < len(lines) < 36
    judge.requests.clear()
    status, _ = command(*settings(judge), "--resume")
    assert status == 0 and len(judge.requests) == 1 + 36 - len(lines)
    judge.requests.clear()
    status, told = command(*settings(judge), "--resume")
    assert status == 0 and not judge.requests, "what is done asks nothing, not even whether the judge is there"
    status, told = command(*settings(judge, requests_at_once=1, timeout=9), "--resume")
    assert status == 0 and not judge.requests, "how the judge is asked decides nothing"


def test_its_settings_are_checked(command, judge):
    status, told = command(*settings(judge, endpoint="http://10.0.0.7:8000/v1"))
    assert status == 1 and "would travel readable" in " ".join(told.split())
    status, told = command(*settings(judge, timeout=-1))
    assert status == 1 and "timeout" in told and not judge.requests
    assert EVALUATION.least["n_latents"] == 1 and EVALUATION.needs.store and not EVALUATION.needs.model
    assert Config().n_scoring == 14 and Config().n_top == 12 and Config().n_weighted == 7
