"""The four evaluations from the model to the JSON, on a tiny model that reads words."""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Gemma2ForCausalLM

from saemill.evaluate.context import loaded_sae
from saemill.evaluate.errors import DataMissing, NotApplicable, WidthMismatch
from saemill.evaluate.evals import contrast, scr, sparse_probing, sparse_probing_sae_probes, tpp
from saemill.evaluate.evals.probing import fit_probes, sae_probes_package, saebench_texts, stdlib_texts
from saemill.evaluate.evals.probing.source_and_settings import HUB, Settings
from saemill.evaluate.evals.sparse_probing_sae_probes import read_prompts, token_rows
from saemill.evaluate.model.prefix_suffix import LanguageModel
from saemill.evaluate.run.run_evals import run_evals
from saemill.harvest.model.tokenizer import TextEncoder

pytestmark = pytest.mark.usefixtures("global_random_state_stays")

SMALL = {
    "sparse_probing": sparse_probing.Config(
        data="stdlib",
        dataset_names=("stdlib/kind", "stdlib/first"),
        probe_train_set_size=40,
        probe_test_set_size=20,
        context_length=16,
        k_values=(1, 5),
    ),
    "scr": Settings(
        data="stdlib", train_set_size=48, test_set_size=24, context_length=16, n_values=(2, 5), probe_epochs=3
    ),
    "tpp": Settings(
        data="stdlib", train_set_size=40, test_set_size=20, context_length=16, n_values=(2, 5), probe_epochs=3
    ),
    "sparse_probing_sae_probes": sparse_probing_sae_probes.Config(
        data="stdlib", dataset_names=("stdlib/kind",), ks=(1, 2)
    ),
}


class Words:
    """A tokenizer's backend: every word has a number."""

    def encode_batch_fast(self, texts, add_special_tokens):
        assert not add_special_tokens
        return [SimpleNamespace(ids=[3 + zlib.crc32(word.encode()) % 47 for word in text.split()]) for text in texts]


@pytest.fixture
def context(world, open_context):
    """A context whose model has a tokenizer, and counts the rows that it reads."""
    made = open_context(world)
    model = Gemma2ForCausalLM.from_pretrained(world.model, dtype=torch.bfloat16)
    made._model = LanguageModel(model, TextEncoder(Words(), 2, (0, 1, 2)), eos=1, pad=0)
    return made


def documents(rows):
    return [json.loads(row.path.read_text()) for row in rows]


@pytest.fixture
def run(context, builder):
    """Evaluate two SAEs: run(eval id, **changes of the config)."""
    subjects = [builder.subject(builder.make_sae(seed=seed), f"sae_{seed}") for seed in (0, 1)]

    def evaluate(name, config=None, subjects=subjects):
        return run_evals(context, subjects, {name: config or SMALL[name]})

    return evaluate


@pytest.mark.parametrize("name", SMALL)
def test_results_have_the_official_keys_and_say_which_data_they_are_of(run, official, name):
    rows = run(name)
    assert [row.status for row in rows] == ["done", "done"]
    one, other = documents(rows)
    keys = official.outputs["keys"][name]
    assert set(keys["eval_config"]) <= set(one["eval_config"])
    assert one["eval_type_id"] == name
    assert one["eval_config"]["data"] == "stdlib"
    assert one["eval_config"]["data_revision"].startswith("sha256:")
    for category, allowed in keys["eval_result_metrics"].items():
        metrics = one["eval_result_metrics"][category]
        assert metrics
        assert set(metrics) <= set(allowed)
        assert all(np.isfinite(value) for value in metrics.values())
    for detail in one["eval_result_details"]:
        assert {key for key in detail if "validated" not in key} <= set(keys["eval_result_details"])
    if name != "scr" or any(one["eval_result_metrics"]["scr_metrics"].values()):
        # Of so few texts scr may find nothing: Python's library, from which they are, differs between versions.
        assert one["eval_result_metrics"] != other["eval_result_metrics"]


@pytest.mark.parametrize(
    ("name", "setting", "remark"),
    [
        ("sparse_probing", "k_values", "k 500: the SAE has 24 latents; k 20, 500: the residual has 16 channels"),
        ("scr", "n_values", "n 500: the SAE has 24 latents"),
        ("tpp", "n_values", "n 500: the SAE has 24 latents"),
        ("sparse_probing_sae_probes", "ks", "k 500: the SAE has 24 latents"),
    ],
)
def test_more_latents_than_there_are_is_all_of_them_and_said(run, name, setting, remark):
    rows = run(name, dataclasses.replace(SMALL[name], **{setting: (2, 20, 500)}))
    assert all(row.status == "done" and remark in row.reason for row in rows)
    assert not any("has 24 latents" in row.reason for row in run(name))


@pytest.mark.parametrize(
    ("module", "name", "probes"),
    [(fit_probes, "sparse_probing", 2 * 2 * 4), (sae_probes_package, "sparse_probing_sae_probes", 3)],
)
def test_probes_that_ran_out_of_iterations_are_counted_for_every_sae(run, monkeypatch, module, name, probes):
    """Those of the model's own features too, which SAEs share."""
    assert not any("converged" in row.reason for row in run(name))
    monkeypatch.setattr(module, "MAX_ITERATIONS", 1)
    assert [row.reason for row in run(name)] == [f"{probes} of {probes} probes had not converged"] * 2


def test_prompts_that_lose_their_beginning_are_counted(run, monkeypatch):
    texts = [row.document["saemill"]["measured_on"] for row in run("sparse_probing_sae_probes")]
    monkeypatch.setattr(sparse_probing_sae_probes, "MAX_TOKENS", 8)
    cut = [row.document["saemill"]["measured_on"] for row in run("sparse_probing_sae_probes")]
    assert all("cut" not in text for text in texts)
    assert all(re.search(r" in 1 task, \d+ prompts cut to 8 tokens$", text) for text in cut)


@pytest.mark.parametrize("module", [contrast, scr, sparse_probing, sparse_probing_sae_probes, tpp])
def test_saes_of_another_model_are_named_and_cost_no_text(module, context, builder, monkeypatch):
    """One of another width, one of a layer that the model lacks, of several layers one too many, and one that reads
    places of shorter windows than texts have."""
    monkeypatch.setattr(context.model, "resid", None)
    wide = builder.subject(builder.make_sae(d_in=builder.D + 1), "wide")
    high = builder.subject(builder.make_sae(), "high", layers=(9,))
    both = builder.subject(builder.make_sae(), "both", layers=(1, 2))
    short = builder.subject(builder.make_sae(), "short", context_size=8)
    monkeypatch.setattr(short.sae, "needs_side", ("position",))
    subjects, config = [wide, high, both, short], module.EVALUATION.config(data="stdlib")
    failures = list(module.EVALUATION.evaluate(context, subjects, config))
    assert [failure.subject for failure in failures] == subjects
    of_one_layer = module in (scr, tpp)
    assert [type(failure.error) for failure in failures[:2]] == [WidthMismatch, WidthMismatch]
    assert type(failures[2].error) is (NotApplicable if of_one_layer else WidthMismatch)
    assert type(failures[3].error) is NotApplicable and "trained on windows of 8, but" in str(failures[3].error)
    assert "reads width 17 after layer 2, but the model" in str(failures[0].error)
    assert of_one_layer or "reads width 16 after layers 1, 2, but" in str(failures[2].error)


def test_an_sae_of_another_model_costs_the_others_nothing(run, builder):
    wide = builder.subject(builder.make_sae(d_in=builder.D + 1), "wide")
    rows = {row.subject.label: row for row in run("tpp", subjects=[wide, builder.subject(builder.make_sae(), "fine")])}
    assert (rows["wide"].status, rows["fine"].status) == ("failed", "done")


def test_the_model_reads_every_text_once_for_all_saes(run, context, monkeypatch):
    rows = []
    original = context.model.resid

    def counting(tokens, *rest):
        rows.append(len(tokens))
        return original(tokens, *rest)

    monkeypatch.setattr(context.model, "resid", counting)
    run("sparse_probing")
    assert sum(rows) == 2 * (40 + 20)  # two data sets of two classes


@pytest.mark.parametrize("name", ["scr", "tpp"])
def test_an_sae_of_several_layers_is_not_run_and_costs_no_other_its_result(run, builder, name):
    able = builder.subject(builder.make_sae(), "able")
    wide = builder.subject(builder.make_sae(d_in=2 * builder.D), "wide", layers=(1, 2))
    statuses = {row.subject.label: row for row in run(name, subjects=[wide, able])}
    assert statuses["able"].status == "done"
    assert statuses["wide"].status == "not run"
    assert "one layer" in statuses["wide"].reason


def test_missing_data_is_told_and_the_rest_is_evaluated(run, monkeypatch):
    def load(name, *sizes):
        if name != saebench_texts.NEWS:
            raise DataMissing(f"{name}: log in")
        return stdlib_texts.load_task("stdlib/kind", *sizes)

    monkeypatch.setattr(sparse_probing, "find_source", lambda *_: dataclasses.replace(HUB, load_task=load))
    config = sparse_probing.Config(data="hub", probe_train_set_size=40, probe_test_set_size=20, k_values=(1,))
    rows = run("sparse_probing", config)
    assert [row.status for row in rows] == ["incomplete", "incomplete"]
    assert "log in" in rows[0].reason
    assert documents(rows)[0]["eval_config"]["dataset_names"] == ["stdlib/kind"]


def test_no_data_at_all_is_not_run(run, monkeypatch):
    def away(*_args, **_kwargs):
        raise ConnectionError("no network in tests")

    saebench_texts._table.cache_clear()
    monkeypatch.setattr(saebench_texts, "load_dataset", away)
    monkeypatch.setattr(saebench_texts, "find_repository", away)
    rows = run("tpp", Settings(data="hub"))
    assert [row.status for row in rows] == ["not run", "not run"]
    assert "hf auth login" in rows[0].reason


def test_prompts_are_read_at_their_last_token(context, builder):
    prompts = ["one two three", "four", "a b c d e f g h i j k"]
    subject = builder.subject(builder.make_sae(), "sae")
    rows, cut = token_rows(context.model, prompts, 8)
    ids = context.model.tokenizer.encode(prompts)
    assert cut == 1 and token_rows(context.model, prompts, 12)[1] == 0  # BOS and eleven words
    assert rows == [[2, *ids[0]], [2, *ids[1]], [2, *ids[2][-7:]]]
    residuals, latents = read_prompts(context, [subject], "prompts", rows, batch_size=2)
    for number, row in enumerate(rows):
        resid = context.model.resid(torch.tensor([row]), [builder.LAYER])[builder.LAYER][0, -1].float()
        np.testing.assert_allclose(residuals[subject.layers][number], resid, rtol=2e-2, atol=2e-2)
        acts = subject.sae.encode(torch.from_numpy(residuals[subject.layers][number]))
        np.testing.assert_allclose(latents[subject][[number]].toarray()[0], acts.detach(), atol=1e-5)


@pytest.mark.parametrize(("needs", "rows"), [((), [3]), (("position",), [2, 1])])
def test_prompts_are_read_by_few_only_where_their_whole_rows_are_encoded(needs, rows, context, builder, monkeypatch):
    """Room is for the codes of two rows of the longest prompt, which has a fiftieth of the tokens that it may have."""
    prompts = ["one two three", "four", "a b c d"]
    subject = builder.subject(builder.make_sae(), "sae")
    monkeypatch.setattr(subject.sae, "needs_side", needs)
    monkeypatch.setattr(loaded_sae, "MOST_CODES", 2 * 5 * builder.F)
    read, resid = [], context.model.resid
    monkeypatch.setattr(context.model, "resid", lambda tokens, *rest: read.append(len(tokens)) or resid(tokens, *rest))
    read_prompts(context, [subject], "prompts", token_rows(context.model, prompts, 250)[0], batch_size=3)
    assert read == rows


def test_contrasts_tell_how_far_they_have_come(context, builder, monkeypatch):
    stages, stage = [], context.watch.stage
    monkeypatch.setattr(context.watch, "stage", lambda title, *rest: stages.append(title) or stage(title, *rest))
    config = contrast.Config(
        data="stdlib", dataset_names=("stdlib/kind",), train_set_size=8, test_set_size=8, context_length=8
    )
    (result,) = contrast.evaluate(context, [builder.subject(builder.make_sae())], config)
    assert stages == ["stdlib/kind: texts", "stdlib/kind: contrasts"] and len(result.details) == 1


def test_memory_that_runs_out_halves_the_batch_and_changes_nothing(run, context, monkeypatch):
    expected = documents(run("tpp"))[0]["eval_result_metrics"]
    original, said = context.model.resid, []

    def tight(tokens, *rest):
        if len(tokens) > 8:
            raise torch.OutOfMemoryError("too much")
        return original(tokens, *rest)

    monkeypatch.setattr(context.model, "resid", tight)
    monkeypatch.setattr(context.watch, "say", said.append)
    assert documents(run("tpp"))[0]["eval_result_metrics"] == expected
    assert any("8 texts at a time" in line for line in said)
