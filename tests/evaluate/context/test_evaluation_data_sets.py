"""Data sets of the hub: the commit that a result remembers is the one that was read."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest

from saemill.evaluate.context import evaluation_data_sets as data_sets
from saemill.evaluate.context.context import Context
from saemill.evaluate.context.evaluation_data_sets import downloaded_commit, expected_data
from saemill.evaluate.evals import load
from saemill.evaluate.evals.probing import sae_probes_package, saebench_texts
from saemill.evaluate.evals.ravel.prompts_and_pairs import load_facts
from saemill.evaluate.run.run_evals import settings_of
from saemill.harvest.corpus.hugging_face import CONVERSION, Repository

OLD, NEW = "0" * 40, "f" * 40


@pytest.fixture
def hub(monkeypatch):
    """A hub that knows one commit of every data set, and one of its conversion; which were asked for."""
    asked = []

    def dataset_info(_, dataset, revision, timeout):
        asked.append((dataset, revision))
        return SimpleNamespace(sha=OLD if revision == CONVERSION else NEW)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr(data_sets, "ask_hub", lambda ask: ask())
    return asked


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sparse_probing", {saebench_texts.BIOS, saebench_texts.AMAZON, "codeparrot/github-code", "fancyzhx/ag_news"}),
        ("contrast", {"Helsinki-NLP/europarl", saebench_texts.BIOS}),
        ("scr", {saebench_texts.BIOS, saebench_texts.AMAZON}),
        ("tpp", {saebench_texts.BIOS, saebench_texts.AMAZON}),
        ("ravel", {"adamkarvonen/ravel_prompts"}),
        ("unlearning", {"cais/wmdp", "cais/mmlu", "Salesforce/wikitext"}),
    ],
)
def test_settings_name_the_commits_of_the_hubs_data_each_asked_for_once(name, expected, hub):
    context, config = Context(None, model_name="elsewhere/model"), load(name).config()
    commits = settings_of(context, name, config)["data_revision"]
    assert expected <= commits.keys() and (len(expected) == len(commits) or len(commits) == 5)
    assert {commit for dataset, commit in commits.items() if dataset != saebench_texts.GITHUB} == {NEW}
    assert commits.get(saebench_texts.GITHUB, OLD) == OLD  # of the conversion, which is what is read
    settings_of(context, name, config)
    for dataset in commits:  # as whoever reads it asks
        data_sets.commit_of(dataset, *([CONVERSION] if dataset == saebench_texts.GITHUB else []))
    assert len(hub) == len(set(hub)) == len(commits)


def test_a_hub_that_does_not_answer_is_waited_for_once(monkeypatch):
    asked = []
    monkeypatch.setattr(data_sets, "ask_hub", lambda _: asked.append(1) or TimeoutError("no answer"))
    monkeypatch.setattr(data_sets, "downloaded_commit", lambda _: None)
    data_sets.commit_of.cache_clear()
    data_sets._AWAY.clear()
    assert [data_sets.commit_of(name) for name in ("a/b", "a/c", "a/d")] == [None] * 3 and len(asked) == 1


def test_only_data_sets_that_were_asked_for_are_named(hub):
    config = load("sparse_probing").config(dataset_names=(saebench_texts.SENTIMENT, "no such one"))
    settings = settings_of(Context(None, model_name="elsewhere/model"), "sparse_probing", config)
    assert settings["data_revision"] == {saebench_texts.AMAZON: NEW}


def test_the_text_to_forget_is_named_by_what_it_holds(hub, tmp_path):
    """It is a file of the user's, which may hold another text next time."""
    context, corpus = Context(None, model_name="elsewhere/model"), tmp_path / "corpus.jsonl"
    config = load("unlearning").config(forget_corpus=str(corpus))
    assert "forget_corpus" not in settings_of(context, "unlearning", config)["data_revision"]
    found = []
    for text in ("one", "one", "another"):
        corpus.write_text(text)
        found.append(settings_of(context, "unlearning", config)["data_revision"]["forget_corpus"])
    assert found[0] == found[1] != found[2] and found[0].startswith("sha256:")


def test_what_is_read_is_what_is_remembered(hub, monkeypatch, tmp_path):
    read, file = [], tmp_path / "facts.json"
    file.write_text("{}")

    def load_dataset(*words, **how):
        read.append((words[0], how["revision"] if "revision" in how else how["data_files"]))
        return []

    def download(dataset, _file, repo_type, revision):
        read.append((dataset, revision))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(saebench_texts, "load_dataset", load_dataset)
    monkeypatch.setattr(data_sets, "load_dataset", load_dataset)
    repository = Repository(saebench_texts.GITHUB, NEW, ("all-all/train/0.parquet",))
    monkeypatch.setattr(saebench_texts, "find_repository", lambda _: repository)
    load_facts(["city"])
    data_sets.load_rows("cais/wmdp", "wmdp-bio")
    saebench_texts.read_speeches(1)
    saebench_texts.read_files(1)
    *others, (parquet, files) = read
    assert {commit for _, commit in others} == {NEW} and {"cais/wmdp", saebench_texts.EUROPARL} < {
        one for one, _ in others
    }
    assert (parquet, files["train"]) == (
        "parquet",
        [f"hf://datasets/codeparrot/github-code@{OLD}/{repository.files[0]}"],
    )


def test_without_the_hub_it_is_the_commit_that_was_downloaded_last(monkeypatch, tmp_path):
    """What `datasets` prepared comes first: offline it reads nothing else."""
    monkeypatch.setattr(data_sets, "downloaded_commit", downloaded_commit)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert data_sets.commit_of("fancyzhx/ag_news") is None
    data_sets.commit_of.cache_clear()
    for number, folder in enumerate(
        (
            tmp_path / f"hub/datasets--fancyzhx--ag_news/snapshots/{OLD}",
            tmp_path / f"datasets/fancyzhx___ag_news/default/0.0.0/{NEW}",
            tmp_path / f"datasets/fancyzhx___ag_news/default/0.0.0/{OLD}",
            tmp_path / "datasets/fancyzhx___ag_news/default/0.0.0/unfinished",
        )
    ):
        folder.mkdir(parents=True)
        os.utime(folder, (number, number))
        expected = (OLD, NEW, OLD, OLD)[number]
        assert downloaded_commit("fancyzhx/ag_news") == expected
    assert data_sets.commit_of("fancyzhx/ag_news") == OLD
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(data_sets, "ask_hub", lambda _: pytest.fail("asked the hub"))
    data_sets.commit_of.cache_clear()
    assert data_sets.commit_of("fancyzhx/ag_news") == OLD


def test_the_package_that_brings_prompts_is_named_by_its_version(monkeypatch):
    context, config = Context(None, model_name="elsewhere/model"), load("sparse_probing_sae_probes").config()
    monkeypatch.setattr(sae_probes_package.importlib.metadata, "version", lambda name: {"sae-probes": "0.4.2"}[name])
    found = settings_of(context, "sparse_probing_sae_probes", config)["data_revision"]
    assert found == {"sae-probes": "0.4.2"} == json.loads(json.dumps(found))


def test_a_result_is_judged_by_the_commits_that_it_tells_of():
    assert expected_data(None, {"a": OLD}) is None  # of before they were kept
    assert expected_data({"a": OLD}, None) == {"a": OLD}
    assert expected_data({"a": OLD}, {"a": NEW, "b": NEW}) == {"a": NEW}
    assert expected_data({"a": OLD, "b": OLD}, {"a": OLD}) == {"a": OLD, "b": OLD}
    assert expected_data("sha256:1", {"a": OLD}) == {"a": OLD}
    assert expected_data(None, "sha256:1") == "sha256:1"
