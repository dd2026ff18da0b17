"""`sae-eval` from the command line: what is found, what is written, what goes wrong and what that costs."""

from __future__ import annotations

import io
import json
import math
import shutil
import signal
from dataclasses import dataclass, fields, replace
from pathlib import Path
from traceback import walk_stack
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file, save_file

from saemill import evaluate
from saemill.api.table import Table
from saemill.cache_schema import Store
from saemill.cache_schema.cli import main as store_main
from saemill.cache_schema.strict_json import to_json
from saemill.evaluate import evals
from saemill.evaluate.cli import main
from saemill.evaluate.context.context import Context
from saemill.evaluate.context.loaded_sae import LoadedSae
from saemill.evaluate.context.write_and_read_results import (
    Result,
    Row,
    frame,
    read_result,
    result_path,
    rounded_to,
    sae_config,
    standing_result,
    write_result,
)
from saemill.evaluate.errors import CacheIdMismatch, Incomparable, ModelMissing, SaeGone, WidthMismatch
from saemill.evaluate.evals import tiers
from saemill.evaluate.evals.core import bootstrap
from saemill.evaluate.evals.core import evaluation as core
from saemill.evaluate.evals.ravel import evaluation as ravel
from saemill.evaluate.evals.unlearning import evaluation as unlearning
from saemill.evaluate.model import ce_and_kl
from saemill.evaluate.output.figures.records import read_documents
from saemill.evaluate.run import command, find_saes_to_evaluate
from saemill.evaluate.run.console_table import print_results, require_comparable
from saemill.evaluate.run.find_saes_to_evaluate import find_places, find_subjects, make_subject
from saemill.evaluate.run.run_evals import settings_of
from saemill.train.data.scaling import unit_stats
from saemill.train.disk.formats import WRITERS
from saemill.train.disk.plain_form import in_raw_units
from saemill.train.disk.sae_lens_folder import save_sae
from saemill.train.run.find_and_load_sae import find_sae
from saemill.train.run.init_from_trained_sae import _digest_of
from saemill.train.run.run_folder import RunFolder
from saemill.train.variants import clt

QUICK = ["--set", "core.batch_size_prompts=4", "--set", "core.resamples=10"]


@pytest.fixture
def sae_eval(builder):
    """Run the command without pictures: `sae_eval("run_1")` gives its output; `code` is the exit status to expect."""

    def call(*words, code=0, options=QUICK, is_stdout=False):
        words = ["--runs", builder.root / "runs", "--device", "cpu", "--no-plots", *options, *words]
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == code, result.output + repr(result.exception)
        return result.stdout if is_stdout else result.output

    return call


@pytest.fixture
def run_1(world, builder):
    return builder.run(world, "run_1", {"small": builder.make_sae(), "large": builder.make_sae(width=32, seed=1)})


def results(run, eval_id="core"):
    return {
        path.name: json.loads(path.read_text())
        for path in sorted((run / "evals" / eval_id).glob("*_eval_results.json"))
    }


def test_results_read_from_a_store_say_where_its_residuals_are_not_the_models_own(make_world, builder, sae_eval):
    world = make_world(stored_as="int8")
    run = builder.run(world, "run_1", {"small": builder.make_sae()})
    wanted = ["--evals", "core,decoder_cosine,replacement"]
    said = "the store keeps activations as int8, which only approximate the model's own"
    output = sae_eval("run_1", *wanted)
    assert output.count(said) == 1 and "--from-tokens recomputes them" in output
    kept = sae_eval("run_1", *wanted, "--resume")
    assert f"kept: core of run_1/small: {said}" in kept  # a result that is kept says it too
    for eval_id in ("decoder_cosine", "replacement"):
        (document,) = results(run, eval_id).values()
        assert said not in (document["saemill"]["remark"] or "")
    (rounded,) = results(run).values()
    assert said in rounded["saemill"]["remark"]
    sae_eval("run_1", "--from-tokens")
    (anew,) = results(run).values()
    assert anew["saemill"]["remark"].endswith("here they are recomputed from tokens")
    losses = [found["eval_result_metrics"]["model_performance_preservation"] for found in (rounded, anew)]
    assert losses[0] != losses[1]
    assert losses[0]["ce_loss_without_sae"] == pytest.approx(losses[1]["ce_loss_without_sae"], rel=1e-2)


@pytest.mark.usefixtures("sigterm_is_harmless")
def test_a_stop_ends_the_command_with_a_status_of_its_own(sae_eval, monkeypatch):
    """SIGTERM, as Ctrl-C."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(command, "run", lambda *_: signal.raise_signal(signal.SIGTERM) or 0)
    assert sae_eval("run_1", code=130).startswith("stopped; finished results are saved, and --resume continues")
    assert signal.getsignal(signal.SIGTERM) is before


def test_all_saes_of_a_run(run_1, sae_eval):
    output = sae_eval("run_1")
    assert "run_1/small" in output
    assert "ce loss score" in output
    found = results(run_1)
    assert set(found) == {"small_eval_results.json", "large_eval_results.json"}
    assert len(found["large_eval_results.json"]["eval_result_details"]) == 32


def test_details_are_in_the_file_a_line_each_and_nowhere_else(builder, tmp_path):
    """Core's have a line for each latent: 33 MB of 65,536, and of every SAE of a fleet."""
    subject = replace(builder.subject(builder.make_sae()), home=tmp_path)
    details = [{"index": n, "density": math.nan if n else 0.25, "of": {"x": [n]}} for n in range(3)]
    result = Result(subject, {}, {"a": {"eval_result_details": []}}, details=details)
    document, path = write_result(result, "core", {}), result_path(subject, "core")
    assert document == standing_result(subject, "core") == read_documents(tmp_path / "evals", print, {})["sae"]["core"]
    whole, text = json.loads(path.read_text()), path.read_text()
    assert list(whole) == list(frame(result, "core", {}))
    assert whole.pop("eval_result_details") == [one | {"density": -1} if one["index"] else one for one in details]
    assert whole == document and '\n    {"index": 1, "density": -1, "of": {"x": [1]}},\n' in text


@pytest.mark.parametrize("indent", ["a line each", 2, None])
@pytest.mark.parametrize("details", [[{"latent": "]", "of": {"x": [1, [2]]}}] * 3, []])
def test_details_are_not_parsed_where_a_result_is_read(builder, tmp_path, monkeypatch, indent, details):
    """Those of 262,144 latents took 0.8 s of every SAE that has core's results; of other indents, they are parsed."""
    subject = replace(builder.subject(builder.make_sae()), home=tmp_path)
    extra = {"ours": [[1], {"latents": [2]}]}
    document = write_result(Result(subject, {}, {"a": {}}, details=details, extra=extra), "core", {})
    path, parsed, loads = result_path(subject, "core"), [], json.loads
    if indent != "a line each":
        path.write_text(json.dumps(json.loads(path.read_text()), indent=indent))
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    assert read_result(path) == document and document["ours"] == extra["ours"]
    assert (b'"latent"' in parsed[0]) == (indent is None and bool(details))


def test_the_table_says_how_much_text_it_is_of_and_how_far_that_is_sure(run_1, sae_eval, monkeypatch):
    """Four digits of 1,141 tokens in three documents look like much more."""
    few = sae_eval("run_1/large")
    assert "±" not in few and "documents (intervals need 10); CE and KL on " in few
    monkeypatch.setattr(bootstrap, "FEWEST", 2)
    output = sae_eval("run_1/small")
    ours = results(run_1)["small_eval_results.json"]["saemill_metrics"]
    value, (low, high) = ours["explained_variance"], ours["confidence_95"]["explained_variance"]
    assert " ± ".join(rounded_to(value, max(high - value, value - low))) in output
    assert rounded_to(32.0, 0.0) == ("32", "0")  # a reach of nothing takes no digits away
    tokens, documents = ours["massive"]["of_tokens"], ours["documents"]["sparsity"]
    assert f"core: test split, {tokens:,} tokens of {documents} documents; CE and KL on " in output
    assert f"{ours['documents']['losses']} documents" in output.split("CE and KL on ")[1].partition("\n")[0]
    assert "95 % interval over documents" in output
    bare = sae_eval("run_1/small", "--set", "core.resamples=0")
    assert "±" not in bare and "core: test split" in bare


def test_the_way_from_the_command_to_a_cross_entropy_is_short(run_1, sae_eval, monkeypatch):
    """Whoever reads core opens these files, one calling the next."""
    cross_entropy, ways, root = ce_and_kl._cross_entropy, [], Path(evaluate.__file__).parent.parent.resolve()

    def noted(*args):
        files = [Path(frame.f_code.co_filename).resolve() for frame, _ in walk_stack(None)]
        rooms = [file.relative_to(root) for file in reversed(files) if file.is_relative_to(root)]
        ways.append([str(file) for file in dict.fromkeys(rooms) if file.parts[0] in ("evaluate", "harvest", "train")])
        return cross_entropy(*args)

    monkeypatch.setattr(ce_and_kl, "_cross_entropy", noted)
    sae_eval("run_1/small")
    assert ways[0][0] == "evaluate/cli.py" and ways[0][-2:] == [
        "evaluate/model/ce_and_kl.py",
        "evaluate/model/smaller_pieces.py",
    ]
    assert max(map(len, ways)) <= 9


def test_saes_of_a_run_that_are_not_there_are_told(run_1, sae_eval):
    """A row less in the table is easily missed."""
    config = json.loads((run_1 / "config.json").read_text())
    config["saes"] |= {"gone": {}, "lost": {}, "wild": {}}
    (run_1 / "config.json").write_text(json.dumps(config))
    result = json.loads((run_1 / "result.json").read_text())
    (run_1 / "result.json").write_text(json.dumps(result | {"diverged": {"wild": "diverged at step 3"}}))
    at = run_1.parent
    gone = f"not evaluated: {at}/run_1/gone, {at}/run_1/lost: its folder is gone"
    wild = f"not evaluated: {at}/run_1/wild: diverged at step 3"
    quick = {"evals": "decoder_cosine", "device": "cpu", "plots": False}
    said = " ".join(sae_eval("run_1", "--evals", "decoder_cosine", code=3, options=[]).split())
    assert [said.count(one) for one in (gone, wild)] == [2, 2]  # above the table and below it
    found = json.loads(sae_eval("run_1", "--evals", "decoder_cosine", "--json", code=3, options=[], is_stdout=True))
    reasons = {"gone": "its folder is gone", "lost": "its folder is gone", "wild": "diverged at step 3"}
    absent = {f"{at}/run_1/{label}": reason for label, reason in reasons.items()}
    assert found["problems"] == [] and found["absent"] == absent
    table = evaluate(run_1, **quick)
    assert {gone, wild} <= set(table.notes) and gone in repr(table) and wild in table._repr_html_()
    assert "not evaluated" not in sae_eval("run_1/small", "--evals", "decoder_cosine", options=[])
    del config["saes"]["gone"], config["saes"]["lost"]  # what diverged is no failure of the evaluation
    (run_1 / "config.json").write_text(json.dumps(config))
    found = json.loads(sae_eval("run_1", "--evals", "decoder_cosine", "--json", options=[], is_stdout=True))
    assert found["problems"] == [] and list(found["absent"]) == [f"{at}/run_1/wild"]


def test_a_damaged_record_of_one_run_costs_the_others_nothing(run_1, world, builder, sae_eval):
    builder.run(world, "run_2", {"sae": builder.make_sae()})
    (run_1 / "result.json").write_text("{")
    output = sae_eval("run_1", "run_2", code=1)
    assert "result.json" in output and "run_2/sae" in output.split("ce loss score")[1]


def test_a_path_a_single_sae_and_the_same_one_twice(run_1, sae_eval, builder):
    assert "run_1/large" not in sae_eval(run_1 / "small", "run_1/small")
    assert set(results(run_1)) == {"small_eval_results.json"}
    found = find_subjects(["run_1/small", "run_1", str(run_1)], builder.root / "runs")
    assert len(found) == 2


def test_one_run_by_several_paths_has_one_page(run_1, builder, monkeypatch):
    monkeypatch.chdir(builder.root)
    assert len({one.home for one in find_subjects(["run_1/small", "run_1"], Path("runs"))}) == 1


def test_a_target_that_is_none_is_told_behind_the_table_too(run_1, sae_eval):
    output = sae_eval("run_1/small", "run_9", code=1)
    above, below = output.split("ce loss score")[0], output.split("ce loss score")[-1]
    assert "run_9" in above and "error: " in below and "run_9" in below and "next:" not in below


def test_a_run_comes_before_a_folder_of_its_name(world, builder, monkeypatch):
    """For whoever looks: training, export, evaluation."""
    monkeypatch.chdir(builder.root)
    builder.run(world, "run_1", {"one": builder.make_sae()})
    shutil.copytree("runs/run_1", "run_1")
    builder.save(builder.root / "run_1/one", builder.make_sae(width=32))
    for name in ("run_1", "run_1/one"):
        assert find_sae(name) == find_places(name, Path("runs"))[0][0][0] == Path("runs/run_1/one")
    assert RunFolder.open("runs", "run_1").path == Path("runs/run_1")
    assert find_sae(builder.root / "run_1") == builder.root / "run_1/one"
    assert make_subject(Path("run_1/one"), None).width == 32


def test_an_sae_from_elsewhere_on_a_store_that_is_named(golden, builder, sae_eval):
    """A SAELens folder that knows no store of ours."""
    subject = golden.subject("jumprelu", builder.root)
    options = ["--set", "core.batch_size_prompts=3", "--dtype", "float32"]
    output = sae_eval(subject.folder, "--cache", golden.store, options=options)
    assert "jumprelu" in output
    assert (subject.folder / "evals" / "core" / "jumprelu_eval_results.json").is_file()


def test_a_config_beside_an_sae_that_is_not_ours_makes_no_run(golden, builder):
    """sparsify keeps one in its run's folder, and a model's folder has one."""
    folder = golden.subject("topk", builder.root / "their_run" / "layers").folder
    (folder.parent / "config.json").write_text('{"model": "gpt2", "layers": [3]}')
    (subject,) = find_subjects([str(folder)], builder.root)
    assert subject.home == folder and subject.run is None
    assert find_places(str(folder.parent), builder.root) == ([(folder, None)], [])


def test_results_of_the_hubs_saes_lie_under_the_runs(world, builder, sae_eval, monkeypatch):
    cached = builder.root / "cache/snapshots/0123abc"
    builder.save(cached / "layer_2", builder.make_sae())
    before = sorted(cached.rglob("*"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(cached))
    there = SimpleNamespace(siblings=[SimpleNamespace(rfilename="layer_2/sae_weights.safetensors")])
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: there)
    for name in ("owner/name/layer_2", "owner/name/layer_2/"):
        assert "owner--name--layer_2" in sae_eval(name, "--cache", world.store)
    assert sorted(cached.rglob("*")) == before
    assert [path.name for path in (builder.root / "runs/hub").iterdir()] == ["owner--name--layer_2"]
    assert set(results(builder.root / "runs/hub/owner--name--layer_2")) == {"owner--name--layer_2_eval_results.json"}


def test_an_sae_without_a_store(golden, builder, sae_eval):
    output = sae_eval(golden.subject("topk", builder.root).folder, code=3)
    assert "not run: core of topk" in output
    assert "--cache" in output


def test_an_unknown_run_lists_what_there_is(run_1, sae_eval):
    output = sae_eval("my_run", code=1)
    assert "no run 'my_run'" in output
    assert "run_1" in output
    assert "recipe" not in output


def test_a_run_of_a_recipe_says_how_it_is_made(run_1, sae_eval, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no store of `make demo`, which it would name
    output = sae_eval("run_4", code=1)
    assert "no run 'run_4'" in output
    words = f"--recipe attention/run_4 --cache ./store --out {run_1.parent}"
    assert f"`sae-train {words}` trains the one of the study attention" in output


def test_a_run_that_has_not_ended(world, builder, sae_eval):
    folder = builder.run(world, "run_9", {}, finished=False)
    assert f"sae-train --resume {folder}" in sae_eval("run_9", code=1)


def test_what_is_wrong_with_one_target_does_not_stop_the_others(run_1, sae_eval):
    (run_1 / "large" / "cfg.json").write_text("{")
    output = sae_eval("nowhere", "run_1", code=1)
    assert "no run 'nowhere'" in output
    assert "is not JSON" in output
    assert set(results(run_1)) == {"small_eval_results.json"}


@pytest.fixture
def movable(world, builder):
    """A run on a store of its own, and that store, which a test may take away."""
    store = shutil.copytree(world.store, builder.root / "store")
    saes = {"one": builder.make_sae(), "two": builder.make_sae(seed=1)}
    return builder.run(replace(world, store=str(store)), "run_1", saes), store


def test_what_needs_no_store_goes_on_without_one(movable, sae_eval):
    run, store = movable
    shutil.rmtree(store)
    output = sae_eval("run_1/one", "--evals", "core,decoder_cosine", code=1)
    assert "failed: core of run_1/one: the store of run_1/one was at" in output and "failed: decoder" not in output
    assert "is no longer there" in output and "--cache" in output
    assert results(run, "decoder_cosine") and not results(run)


def test_nothing_goes_on_without_a_store_that_was_asked_for(world, run_1, sae_eval):
    output = sae_eval("run_1", "--evals", "decoder_cosine", "--cache", "no/such/store", code=1, options=[])
    assert "failed: decoder_cosine" in output and "no store at no/such/store, the value of --cache" in output
    assert f"leave it out to use {world.store}, which run_1/large was trained on" in output
    assert not results(run_1, "decoder_cosine")


def test_resume_leaves_a_result_of_a_store_that_is_gone(movable, sae_eval):
    run, store = movable
    words = ("run_1/one", "--evals", "decoder_cosine")
    sae_eval(*words, options=[])
    before = results(run, "decoder_cosine")
    shutil.rmtree(store)
    said = sae_eval(*words, "--resume", options=[])
    assert "kept: decoder_cosine of run_1/one: its result was measured on a store, and none is read now" in said
    assert results(run, "decoder_cosine") == before
    sae_eval(*words, "--resume", "--set", "decoder_cosine.threshold=0.5", options=[])
    assert results(run, "decoder_cosine") != before


@pytest.mark.parametrize("keep", ["--resume", "--compare"])
def test_results_on_a_store_that_is_gone_are_taken_and_the_rest_is_refused(movable, sae_eval, keep):
    run, store = movable
    sae_eval("run_1/one")
    before = results(run)
    shutil.rmtree(store)
    output = sae_eval("run_1", keep, code=1)
    assert "ce loss score" in output and results(run) == before
    assert "kept: core of run_1/one: its result was measured on a store, and none is read now" in output
    assert "failed: core of run_1/two: the store of run_1/one was at" in output
    assert "kept" not in sae_eval("run_1", keep, "--cache", store, code=1)
    if keep == "--resume":  # of other settings
        assert "kept" not in sae_eval("run_1", keep, "--massive-norms", "5", code=1)
        assert "kept" not in sae_eval("run_1", keep, "--dtype", "float32", code=1)
        assert "kept" in sae_eval("run_1", keep, "--dtype", "bfloat16", code=1)  # as the store was


@pytest.mark.parametrize("keep", [[], ["--compare"]])
def test_another_store_takes_nothing_from_results_on_one_that_is_gone(movable, world, make_world, sae_eval, keep):
    run, store = movable
    other = make_world(model_id="lab/tiny", dtype="float32").store
    sae_eval("run_1/one", "--evals", "core,browser", "--set", "browser.windows=4")
    (before,), page = results(run).values(), (run / "browser/data/run.js").read_text()
    shutil.rmtree(store)
    words = ["run_1/one", "--cache", other, "--model", world.model, *keep]
    said = sae_eval(*words, "--evals", "core,browser", code=1)
    (aside,) = (run / "evals/core").glob("one_eval_results.*.json")
    assert json.loads(aside.read_text()) == before and str(aside) in "".join(said.split())
    assert results(run)["one_eval_results.json"]["saemill"]["cache_id"] != before["saemill"]["cache_id"]
    assert "was made from the store" in said and (run / "browser/data/run.js").read_text() == page
    sae_eval(*words)  # of the other store twice
    assert json.loads(aside.read_text()) == before and len(results(run)) == 1


def test_the_own_store_is_looked_for_only_where_another_was_named(movable, world, sae_eval, monkeypatch):
    looked = []
    monkeypatch.setattr(command, "id_of_store", looked.append)
    sae_eval("run_1", "--cache", world.store, "--evals", "decoder_cosine", options=[])
    assert set(looked) <= {world.store}


def test_a_store_with_another_id_costs_the_other_runs_nothing(world, make_world, builder, sae_eval):
    other = make_world(dtype="float32")
    run_1, run_2 = (builder.run(w, n, {"sae": builder.make_sae()}) for w, n in ((world, "run_1"), (other, "run_2")))
    output = sae_eval("run_1", "run_2", "--cache", world.store, code=1)
    assert "failed: core of run_2/sae: trained on the store with cache id" in output
    assert results(run_1)
    assert not results(run_2)


def test_a_wrong_store_is_told_once_for_all_saes_of_a_run(run_1, make_world, sae_eval):
    output = sae_eval("run_1", "--cache", make_world(dtype="float32").store, code=1)
    assert output.count("trained on the store with cache id") == 1
    assert "failed: core of run_1/large, run_1/small: trained" in output


def test_saes_have_one_order_whichever_were_measured_before(run_1, sae_eval):
    sae_eval("run_1/small", "--evals", "decoder_cosine", options=[])
    output = sae_eval("run_1", "--evals", "decoder_cosine", "--resume", "--json", options=[], is_stdout=True)
    assert [row["sae"] for row in json.loads(output)["results"]] == ["run_1/large", "run_1/small"]


def test_one_sae_of_a_run_has_its_results_named_as_the_run_s_are(run_1, sae_eval, monkeypatch):
    monkeypatch.chdir(run_1.parent.parent)
    for target in ("run_1", "run_1/small"):
        said = sae_eval("--runs", "runs", target, "--evals", "decoder_cosine", options=[])
        assert "results: runs/run_1/evals\n" in said


def test_an_sae_of_another_width(world, builder, sae_eval):
    run = builder.run(world, "run_1", {"fits": builder.make_sae(), "wide": builder.make_sae(d_in=20)})
    output = sae_eval("run_1", code=1)
    assert "width 20" in output
    assert "have 16" in output
    assert set(results(run)) == {"fits_eval_results.json"}


def test_a_layer_that_the_store_does_not_hold(golden, world, builder, sae_eval):
    subject = golden.subject("topk", builder.root)  # reads layer 1
    output = sae_eval(subject.folder, "--cache", world.store, code=1)
    assert "residuals of layer 1" in output
    sae_eval(subject.folder, "--cache", world.store, "--from-tokens")


def test_a_missing_model_leaves_a_part(make_world, builder, sae_eval):
    world = make_world(model_id="nobody/has-this")
    run = builder.run(world, "run_1", {"sae": builder.make_sae()})
    output = sae_eval("run_1", code=3)
    assert "incomplete: core of run_1/sae" in output
    assert "--model" in output
    (document,) = results(run).values()
    assert document["eval_result_metrics"]["model_performance_preservation"]["ce_loss_score"] == -1
    assert document["saemill"]["missing"]
    sae_eval("run_1", "--resume", "--model", world.model)  # what was there in part is done again
    (document,) = results(run).values()
    assert document["saemill"]["missing"] is None


def test_what_is_there_in_part_is_no_result_to_compare(run_1, sae_eval):
    path = result_path(make_subject(run_1 / "small", RunFolder(run_1)), "core")
    sae_eval("run_1")

    def leave_a_part():
        document = json.loads(path.read_text())
        document["saemill"]["missing"] = "the model is not here"
        path.write_text(json.dumps(document))

    leave_a_part()
    sae_eval("run_1", "--compare")
    assert json.loads(path.read_text())["saemill"]["missing"] is None  # the model is here now
    leave_a_part()
    said = sae_eval("run_1/small", "--compare", "--set", "core.resamples=11", code=3)
    assert "incomplete: core of run_1/small: the model is not here; its result has config.resamples 10" in said


def test_a_whole_result_is_not_written_over_by_a_part_of_itself(run_1, sae_eval, monkeypatch):
    """The model may be away for a while."""
    sae_eval("run_1/small")
    before = results(run_1)

    def no_model(context):
        raise ModelMissing("it is away")

    monkeypatch.setattr(Context, "model", property(no_model))
    said = sae_eval("run_1/small")
    assert "kept: core of run_1/small: it is away" in said and "with these settings is kept" in said
    assert results(run_1) == before
    assert "incomplete: core of run_1/small" in sae_eval("run_1/small", "--set", "core.resamples=11", code=3)
    assert results(run_1) != before


@pytest.fixture
def imported(builder):
    """Activations from elsewhere: imported(tokens or None, model) makes a store and gives its address."""

    def make(tokens, model):
        rng = np.random.default_rng(0)
        np.save(builder.root / "acts.npy", rng.standard_normal((40, builder.CONTEXT, builder.D)).astype(np.float32))
        words = ["import", builder.root / f"imported_{tokens}", "--resid", builder.root / "acts.npy"]
        if tokens:
            np.save(builder.root / "tokens.npy", rng.integers(3, builder.VOCAB, (40, builder.CONTEXT)))
            words += ["--tokens", builder.root / "tokens.npy"]
        words += ["--layer", builder.LAYER, "--model", model, "--test", "0.5"]
        result = CliRunner().invoke(store_main, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return builder.root / f"imported_{tokens}"

    return make


@pytest.mark.parametrize(
    ("tokens", "status", "reason", "code"),
    [(False, "done", "import it into another folder with --tokens", 0), (True, "incomplete", "--model", 3)],
)
def test_an_imported_store_without_tokens_or_model(imported, builder, sae_eval, tokens, status, reason, code):
    """The model may come; a store with tokens is another one, so that without them nothing is left to be done."""
    sae, store = builder.save(builder.root / "sae", builder.make_sae()), imported(tokens, "nobody/has-this")
    output = sae_eval(sae, "--cache", store, code=code)
    assert reason in output
    assert f"{status}: core of sae" in output
    before = results(sae)
    (document,) = before.values()
    assert document["eval_result_metrics"]["sparsity"]["l0"] == 4.0
    sae_eval(sae, "--cache", store, "--resume", code=code)
    assert (results(sae) == before) == (code == 0)


def test_an_imported_store_with_its_model(imported, world, builder, sae_eval):
    sae_eval(builder.save(builder.root / "sae", builder.make_sae()), "--cache", imported(True, world.model))


def test_a_model_of_another_shape(imported, builder, sae_eval):
    store = imported(True, "nobody/has-this")
    sae = builder.save(builder.root / "sae", builder.make_sae())
    assert "the model has 26 layers of width 128" in sae_eval(sae, "--cache", store, "--model", "pocket", code=3)


def test_an_sae_whose_latents_read_one_layer_of_several_is_measured(make_world, builder, sae_eval):
    """Its encoder and decoder have rows of other lengths, as wide as what it reads and writes is."""
    config = clt.Config(width=24, layers=(1, 2), k=4)
    folder, scale, settings = builder.root / "cross", unit_stats(2 * builder.D), to_json(config)
    told = {"layers": [1, 2], "training_architecture": "clt", "training_architecture_details": settings}
    save_sae(folder, config.build(builder.D).sae, scale, told, settings, "clt", scale)
    world = make_world(layers=(1, 2))
    assert "done: core of cross: cross writes layers [1, 2]" in sae_eval(folder, "--cache", world.store)


def test_fewer_ablations(run_1, sae_eval):
    sae_eval("run_1/small", "--set", 'core.ablations=["zero"]')
    (document,) = results(run_1).values()
    assert set(document["saemill_metrics"]["ablations"]) == {"zero"}


def test_resume_skips_what_is_done_with_the_same_settings(run_1, sae_eval):
    sae_eval("run_1/small")
    before = results(run_1)
    sae_eval("run_1", "--resume")
    after = results(run_1)
    assert after["small_eval_results.json"] == before["small_eval_results.json"]
    assert "large_eval_results.json" in after
    sae_eval("run_1", "--resume", "--set", "core.n_eval_reconstruction_batches=1")
    assert results(run_1)["small_eval_results.json"] != before["small_eval_results.json"]


def test_resume_makes_a_browser_that_is_gone(run_1, sae_eval):
    words = ("run_1/small", "--evals", "browser", "--set", "browser.windows=4", "--resume")
    sae_eval(*words, options=[])
    made = (run_1 / "browser/index.html").stat().st_mtime_ns
    sae_eval(*words, options=[])
    assert (run_1 / "browser/index.html").stat().st_mtime_ns == made
    shutil.rmtree(run_1 / "browser")
    sae_eval(*words, options=[])
    assert (run_1 / "browser/index.html").is_file()


def test_saes_share_the_device_as_far_as_there_is_room_with_the_same_results(run_1, sae_eval, monkeypatch):
    sae_eval("run_1")
    together, groups, run_evals = results(run_1), [], command.run_evals

    def told(context, subjects, *settings):
        groups.append([subject.label for subject in subjects])
        return run_evals(context, subjects, *settings)

    monkeypatch.setattr(command, "run_evals", told)
    for room, expected in ((1 << 30, [["large", "small"]]), (5000, [["large"], ["small"]])):
        groups.clear()
        monkeypatch.setattr(command, "room_for_weights", lambda device, room=room: room)
        sae_eval("run_1")
        assert groups == expected
        for name, found in results(run_1).items():
            assert found["eval_result_metrics"] == together[name]["eval_result_metrics"]
    said = sae_eval("run_1", "--evals", "browser", "--set", "browser.windows=4", options=[])
    apart = "counterparts are sought only within run_1/large; run_1/small"
    assert f"browser: not all SAEs fit in memory at once: {apart}" in said


def test_weights_are_read_for_what_is_measured_and_released_with_their_group(run_1, sae_eval, monkeypatch):
    """And files are hashed for that, or where their times show that they are others than were measured."""
    read, held, saes, before = [], [], set(), _digest_of.cache_info().misses
    read_folder, run_evals = find_saes_to_evaluate.read_folder, command.run_evals

    def hashed():
        return _digest_of.cache_info().misses - before

    def measured(context, subjects, *settings):
        saes.update(subjects)
        rows = run_evals(context, subjects, *settings)
        held.append([subject.label for subject in saes if "sae" in vars(subject)])
        return rows

    monkeypatch.setattr(
        find_saes_to_evaluate, "read_folder", lambda folder: read.append(folder.name) or read_folder(folder)
    )
    monkeypatch.setattr(command, "run_evals", measured)
    monkeypatch.setattr(command, "room_for_weights", lambda device: 5000)
    words = ("run_1", "--evals", "core,decoder_cosine")
    sae_eval(*words)
    assert read == ["large", "small"] and held == [["large"], ["small"]] and hashed() == 2
    for more in ("--compare", "--resume"):
        assert "run_1/small" in sae_eval(*words, more)
    assert read == ["large", "small"] and hashed() == 2
    (run_1 / "small" / "cfg.json").touch()  # the weights are the same
    sae_eval(*words, "--resume")
    assert read == ["large", "small"] and hashed() == 3
    shutil.rmtree(run_1 / "evals" / "core")
    sae_eval("run_1/small", "--resume")
    assert read[2:] == ["small"]


def test_weights_that_cannot_be_read_cost_the_others_nothing(run_1, sae_eval):
    """Whether their file is not whole, which is seen at once, or what is in it does not fit together."""
    weights = run_1 / "small" / "sae_weights.safetensors"
    whole = load_file(weights)
    save_file({**whole, "b_enc": whole["b_enc"][:-1].clone()}, weights)
    said = sae_eval("run_1", code=1)
    assert "failed: core of run_1/small: " in said and "expected one value per latent or output in b_enc" in said
    assert set(results(run_1)) == {"large_eval_results.json"}
    save_file({**whole, "W_enc": whole["W_enc"].flatten()}, weights)
    assert "expected W_enc" in sae_eval("run_1", code=1)
    weights.write_bytes(weights.read_bytes()[:-9])
    said = sae_eval("run_1", code=1)
    assert f"error: {weights}: damaged" in said and "run_1/large" in said


def test_an_sae_that_has_no_room_costs_the_others_nothing(run_1, sae_eval, monkeypatch):
    moved = LoadedSae.to

    def to(subject, device):
        monkeypatch.setattr(LoadedSae, "to", moved)  # the first time alone, and large is the first
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(LoadedSae, "to", to)
    output = sae_eval("run_1", code=1)
    assert "failed: core of run_1/large: it does not fit on cpu. Free some memory" in output
    assert set(results(run_1)) == {"small_eval_results.json"}


def test_only_what_was_computed_from_tokens_says_so(run_1, sae_eval):
    words = ("run_1/small", "--evals", "core,temporal", "--set", "temporal.windows=4", "--from-tokens")
    output = sae_eval(*words)
    assert output.count("--from-tokens has no effect here") == 1 and "temporal: --from-tokens" in output
    said = [results(run_1, name)["small_eval_results.json"]["saemill"]["settings"] for name in ("core", "temporal")]
    assert [settings["from_tokens"] for settings in said] == [True, False]
    output = sae_eval("run_1/small", "--evals", "core,decoder_cosine", "--massive-norms", "5")
    assert output.count("--massive-norms has no effect here") == 1 and "decoder_cosine: --massive-norms" in output


@pytest.mark.parametrize("name", ["attention", "browser", "position", "replacement", "temporal", "tiers"])
def test_fewer_windows_than_were_asked_for_are_told(name, run_1, sae_eval):
    """By default nobody expects that there are so many. The result says how many there were."""
    words, there = ("run_1/small", "--evals", name), 40 if name == "browser" else 20
    assert "asked for" not in sae_eval(*words, options=[])
    output = sae_eval(*words, options=["--set", f"{name}.windows=5000"])
    assert f"{name}: asked for 5,000 windows, but " in output and f" {there}: all are read" in output
    (found,) = results(run_1, name).values()
    assert f" of {there} windows" in found["saemill"]["measured_on"]
    assert f"{name}: {found['saemill']['measured_on']}" in output


def test_smaller_batches_than_were_asked_for_are_told(run_1, sae_eval):
    """They are a part of the definition of some of SAEBench's means."""
    for options, is_told in (([], False), (["--set", "core.batch_size_prompts=64"], True)):
        output = sae_eval("run_1/small", options=options)
        assert ("core: asked for batches of 64 windows, but the test split has room for 10" in output) == is_told
        (found,) = results(run_1).values()
        assert found["eval_config"]["batch_size_prompts"] == 10  # of 20 windows, in two blocks
        assert found["saemill"]["measured_on"].endswith("; batches of 10 windows")
    assert "batches of" not in sae_eval("run_1/small")


def test_the_device_that_was_asked_for_is_the_one_that_the_thread_works_on(run_1, sae_eval, monkeypatch):
    """Kernels are launched on a thread's own GPU, wherever the tensors lie."""
    taken = []
    monkeypatch.setattr(command, "take_device", taken.append)
    monkeypatch.setattr(command, "find_device", lambda name: torch.device("cpu", 0))
    sae_eval("run_1/small", "--evals", "decoder_cosine", options=[])
    assert taken == [torch.device("cpu", 0)]


def test_without_resume_everything_is_done_anew(run_1, sae_eval):
    sae_eval("run_1/small")
    before = results(run_1)["small_eval_results.json"]
    sae_eval("run_1/small")
    after = results(run_1)["small_eval_results.json"]
    assert after["eval_id"] != before["eval_id"]
    assert after["eval_result_metrics"] == before["eval_result_metrics"]


@pytest.mark.parametrize("keep", ["--resume", "--compare"])
def test_a_damaged_result_is_named_and_measured_anew(run_1, sae_eval, keep):
    """It costs the others nothing."""
    sae_eval("run_1")
    before, damaged = results(run_1), run_1 / "evals" / "core" / "small_eval_results.json"
    damaged.write_text("{")
    output = " ".join(sae_eval("run_1", keep).split())
    assert "is damaged" in output and "It is now measured again for run_1/small" in output
    after = results(run_1)
    assert after["large_eval_results.json"] == before["large_eval_results.json"]
    assert after[damaged.name]["eval_result_metrics"] == before[damaged.name]["eval_result_metrics"]


@pytest.mark.parametrize("keep", ["--resume", "--compare", "--no-plots"])  # the last says nothing of results
def test_a_result_of_a_later_saemill_is_not_written_over_and_costs_no_other_its_own(run_1, sae_eval, keep):
    sae_eval("run_1/small")
    path = run_1 / "evals" / "core" / "small_eval_results.json"
    document = json.loads(path.read_text())
    document["saemill"]["format"] = 99
    path.write_text(json.dumps(document))
    output = sae_eval("run_1", keep, code=1)
    assert "failed: core of run_1/small" in output and "was written by a later saemill" in output
    assert json.loads(path.read_text())["saemill"]["format"] == 99
    assert "large_eval_results.json" in results(run_1)


def test_compare_is_one_table_and_evaluates_only_what_is_missing(world, run_1, builder, sae_eval):
    builder.run(world, "run_2", {"other": builder.make_sae(seed=5)})
    sae_eval("run_1")
    before = results(run_1)
    output = sae_eval("run_1", "run_2", "--compare")
    assert all(name in output for name in ("run_1/small", "run_1/large", "run_2/other"))
    assert output.count("ce loss score") == 1
    assert results(run_1) == before


def test_a_kept_result_is_read_once_for_table_comparison_and_pictures(run_1, sae_eval, monkeypatch):
    sae_eval("run_1")
    read, read_bytes = [], Path.read_bytes

    def counted(path):
        read.append(path.name)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    monkeypatch.setattr(Path, "read_text", lambda path, *_, **__: counted(path).decode())
    for words in (["--resume"], ["--compare"]):
        read.clear()
        sae_eval("run_1", "--plots", *words)
        assert [read.count(f"{label}_eval_results.json") for label in ("small", "large")] == [1, 1]


def test_compare_refuses_other_settings(world, run_1, builder, sae_eval):
    builder.run(world, "run_2", {"other": builder.make_sae(seed=5)})
    sae_eval("run_1")
    sae_eval("run_2", "--set", "core.n_eval_reconstruction_batches=1")
    output = sae_eval("run_1", "run_2", "--compare", code=1)
    assert "config.n_eval_reconstruction_batches" in output
    assert "(None in run_1/large, run_1/small; 1 in run_2/other)" in output
    assert "ce loss score" not in output


def test_saes_of_one_name_are_told_by_their_folders(builder):
    subjects = [builder.subject(builder.make_sae(seed=n), f"{n}/sae") for n in (1, 2)]
    documents = [
        {
            "eval_result_metrics": {"sparsity": {"l0": n}},
            "saemill": {"settings": {"batches": n}, "measured_on": f"on the store with cache id <b>{n}"},
        }
        for n in (1, 2)
    ]
    rows = [Row(one, "core", "done", "", document) for one, document in zip(subjects, documents, strict=True)]
    names = [f"sae ({one.folder})" for one in subjects]
    assert [(row["sae"], row["sparsity.l0"]) for row in Table(rows).rows] == list(zip(names, (1, 2), strict=True))
    page = Table(rows)._repr_html_()
    assert page.count("<p>core of sae (") == 2 and page.count("cache id &lt;b&gt;") == 2 and "<b>" not in page
    with pytest.raises(Incomparable, match="batches") as raised:
        require_comparable(rows)
    assert all(name in str(raised.value) for name in names)


def test_compare_names_results_of_other_settings_than_were_asked_for(run_1, sae_eval):
    sae_eval("run_1", "--set", "core.n_eval_reconstruction_batches=1")
    before = results(run_1)
    output = sae_eval("run_1", "--compare")
    assert "kept: core of run_1/large, run_1/small: its result has config.n_eval_reconstruction_batches 1" in output
    assert "(asked for: None)" in output and results(run_1) == before
    assert "kept:" not in sae_eval("run_1", "--compare", "--set", "core.n_eval_reconstruction_batches=1")


def test_a_result_of_other_settings_is_kept_beside_the_new_one(run_1, sae_eval):
    """Its model or its text may be out of reach by now."""
    sae_eval("run_1/small", "--set", "core.n_eval_reconstruction_batches=1")
    place = run_1 / "evals/core/small_eval_results.json"
    before = place.read_bytes()
    said = " ".join(sae_eval("run_1/small").split())
    assert "done. Its earlier result with config.n_eval_reconstruction_batches 1 (asked for: None) is now" in said
    (aside,) = place.parent.glob("small_eval_results.*.json")
    assert aside.read_bytes() == before != place.read_bytes()
    assert "Its result" not in sae_eval("run_1/small")  # of the same settings
    assert list(place.parent.glob("small_eval_results.*.json")) == [aside]


@pytest.mark.parametrize("keep", ["--resume", "--compare"])
def test_a_result_of_an_earlier_sae_is_done_again(run_1, builder, sae_eval, keep):
    sae_eval("run_1")
    before = results(run_1)
    builder.save(run_1 / "small", builder.make_sae(seed=9))
    sae_eval("run_1", keep)
    assert {name for name, found in results(run_1).items() if found != before[name]} == {"small_eval_results.json"}


def test_compare_takes_no_result_of_another_store(world, make_world, builder, sae_eval):
    folder, other = builder.subject(builder.make_sae(), "elsewhere").folder, make_world(dtype="float32")
    found = []
    for store in (world, other, other):
        sae_eval(folder, "--compare", "--cache", store.store, "--layer", builder.LAYER)
        found += results(folder).values()
    assert found[0]["saemill"]["cache_id"] != found[1]["saemill"]["cache_id"]
    assert found[1] == found[2]


def test_compare_refuses_other_stores(world, make_world, run_1, builder, sae_eval):
    other = builder.run(make_world(dtype="float32"), "run_2", {"other": builder.make_sae()})
    assert "SAEs of one store" in sae_eval("run_1", "run_2", "--compare", code=1)
    assert "Give --cache its own store" in sae_eval("run_2", "--cache", world.store, code=1)  # which is here
    assert not results(run_1) and not results(other)


def test_an_sae_that_knows_no_store_compares_with_those_of_the_store_it_is_given(world, run_1, builder, sae_eval):
    folder = builder.subject(builder.make_sae(seed=5), "elsewhere").folder
    output = sae_eval("run_1", str(folder), "--compare", "--cache", world.store, "--layer", str(builder.LAYER))
    assert "run_1/small" in output and "elsewhere" in output


def test_a_number_that_makes_no_sense_is_refused_before_anything_is_read(run_1, sae_eval, monkeypatch):
    monkeypatch.setattr(core, "measure_sparsity", None)
    said = sae_eval("run_1", "--set", "core.resamples=-1", options=[], code=1)
    assert "resamples: expected 0 or more, found -1" in said


def test_a_crash_in_one_sae_costs_no_other_its_result(run_1, sae_eval, monkeypatch):
    original = core.measure_sparsity

    def breaks(context, subjects, block):
        if any(subject.label == "large" for subject in subjects):
            raise ZeroDivisionError("planted")
        return original(context, subjects, block)

    monkeypatch.setattr(core, "measure_sparsity", breaks)
    output = sae_eval("run_1", code=1)
    assert "failed: core of run_1/large: ZeroDivisionError: planted" in output
    assert set(results(run_1)) == {"small_eval_results.json"}
    crash = run_1 / "evals" / "core" / "large_crash.txt"
    assert "Traceback" in crash.read_text()
    monkeypatch.undo()
    sae_eval("run_1", "--resume")
    assert not crash.exists()


def test_a_crash_whose_traceback_cannot_be_kept_is_told(run_1, sae_eval, monkeypatch):
    def breaks(context, subjects, block):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(core, "measure_sparsity", breaks)
    (run_1 / "evals").write_text("in the way")
    assert "planted (its traceback cannot be saved" in sae_eval("run_1", code=1)


@pytest.fixture
def second_eval(monkeypatch):
    """An evaluation beside core, of which a test may decide what it does, and which SAEs it was asked for."""
    second = SimpleNamespace(**vars(core.EVALUATION) | {"summary": (), "require": lambda config: None, "asked": []})

    def evaluate(context, subjects, config):
        second.asked.append([subject.label for subject in subjects])
        yield from (core.Result(subject, {}, {"group": {"value": 1.0}}) for subject in subjects)

    second.evaluate, known = evaluate, evals.load
    monkeypatch.setattr(evals, "names", lambda: ("core", "second"))
    monkeypatch.setattr(evals, "load", lambda name: second if name == "second" else known(name))
    return second


def test_only_remarks_that_are_in_files_are_few(builder):
    """What a table's numbers are of, if not of what was asked for, is told of each."""
    subject, rows = builder.subject(builder.make_sae()), []
    for number in range(8):
        one, remark = replace(subject, label=f"sae_{number}"), f"remark {number}"
        rows.append(Row(one, "core", "done", remark, {"eval_result_metrics": {}, "saemill": {"remark": remark}}))
        rows.append(Row(one, "tiers", "kept", f"its result has {number}", {"eval_result_metrics": {}, "saemill": {}}))
    file = io.StringIO()
    print_results(Console(file=file, width=200), rows)
    said = file.getvalue()
    assert (said.count("its result has"), said.count("done: core of"), said.count("2 more remarks")) == (8, 6, 1)


@pytest.mark.parametrize("width", [60, 80, 160, 500])
def test_what_is_too_wide_for_a_terminal_is_a_table_for_each_evaluation(builder, width):
    """Values broke in the middle, and names of evaluations too."""
    at = {"explained_variance": [0.7249, 0.74]}
    document = {
        "eval_result_metrics": {
            "sparsity": {"l0": 32.0},
            "model_performance_preservation": {"ce_loss_score": 0.9327},
            "sae": {f"sae_top_{k}_test_accuracy": k / 8 for k in (1, 5)},
        },
        "saemill_metrics": {"explained_variance": 0.7347, "confidence_95": at},
    }
    subjects = [replace(builder.subject(builder.make_sae()), label=label) for label in ("topk", "hierarchical" * 3)]
    evaluations = ("core", "sparse_probing", "tiers")
    rows = [Row(subject, eval_id, "done", "", document) for subject in subjects for eval_id in evaluations]
    file = io.StringIO()
    print_results(Console(file=file, width=width, soft_wrap=True), rows)
    lines = [line.rstrip() for line in file.getvalue().splitlines() if not line.startswith(("results: ", "± is"))]
    assert max(map(len, lines)) <= width
    words = [[word.strip() for word in line.split("  ")] for line in lines]
    assert sum("0.7347 ± 0.0098" in line for line in words) == 2
    assert sum(line.count("0.625") for line in words) == sum(line.count("0.9327") for line in words) == 2
    assert [line for line in lines if line in evaluations] == ([] if width == 500 else [*evaluations])
    assert any("sparse_probing: sae top 5 test accuracy" in line for line in words) == (width == 500)


def test_a_summary_without_a_number_says_of_which_metric(run_1, sae_eval, second_eval):
    """A dash in the table, and done, was all."""
    second_eval.summary = ("group.value", "group.share", "own.rate")
    remarks = {"large": None, "small": "it has one latent"}

    def evaluate(context, subjects, config):
        for one in subjects:
            metrics = {"group": {"value": math.nan, "share": 0.5}}
            yield core.Result(one, {}, metrics, extra={"own": {"rate": None}}, remark=remarks[one.label])

    second_eval.evaluate = evaluate
    said = sae_eval("run_1", "--evals", "second", options=[])
    assert "done: second of run_1/large: no number for value, rate" in said
    assert "done: second of run_1/small: it has one latent; no number for value, rate\n" in said
    found = results(run_1, "second")["large_eval_results.json"]
    assert found["saemill"]["remark"].startswith("no number") and found["eval_result_metrics"]["group"]["value"] == -1


@dataclass(frozen=True)
class Remembering:
    """Settings of an evaluation that keeps what it found out in a folder of the machine, as ravel and unlearning do."""

    pairs: int = 5
    cache: str = "~/.cache/here"


def test_where_an_evaluation_remembers_is_no_other_evaluation(run_1, sae_eval, second_eval):
    assert all("cache" in [field.name for field in fields(module.Config)] for module in (ravel, unlearning))
    second_eval.config = Remembering
    call = ("--evals", "second")
    sae_eval("run_1", *call, options=[])
    assert results(run_1, "second")["small_eval_results.json"]["saemill"]["settings"]["config"] == {"pairs": 5}
    elsewhere = ("--set", 'second.cache="/else/where"')
    sae_eval("run_1", *call, *elsewhere, "--resume", options=[])
    assert "its result has" not in sae_eval("run_1", *call, *elsewhere, "--compare", options=[])
    assert len(second_eval.asked) == 1
    sae_eval("run_1", *call, "--set", "second.pairs=6", "--resume", options=[])
    assert len(second_eval.asked) == 2


def test_a_result_of_an_earlier_revision_is_done_again(run_1, sae_eval, second_eval):
    """The first one is in no settings: results of before count."""
    for revision, times in ((1, 1), (1, 1), (2, 2), (2, 2)):
        second_eval.revision = revision
        sae_eval("run_1", "--evals", "second", "--resume", options=[])
        settings = results(run_1, "second")["small_eval_results.json"]["saemill"]["settings"]
        assert settings.get("revision", 1) == revision and ("revision" in settings) == (revision > 1)
        assert len(second_eval.asked) == times


def test_a_result_of_other_text_is_done_again(run_1, sae_eval, second_eval):
    """Where nobody knows by now which text was meant, it counts."""
    call = ("--evals", "second")
    told = ((None, 1), (None, 1), ("sha256:old", 2), ("sha256:old", 2), ("sha256:new", 3), ("sha256:new", 3), (None, 3))
    for text, times in told:
        second_eval.data_revision = lambda context, config, text=text: text
        sae_eval("run_1", *call, "--resume", options=[])
        assert len(second_eval.asked) == times
    second_eval.data_revision = lambda context, config: "sha256:newer"
    assert "data_revision 'sha256:new' (asked for: 'sha256:newer')" in " ".join(
        sae_eval("run_1", *call, "--compare", options=[]).split()
    )


def test_a_result_of_another_commit_of_the_hub_is_done_again(run_1, sae_eval, second_eval):
    """One of before commits were kept counts, and so does one whose commits nobody knows now."""
    call, old, new = ("--evals", "second"), {"a/b": "old"}, {"a/b": "new"}
    told = ((None, 1), (old, 1), ("", 1), (old, 2), (old, 2), (new, 3), (new | {"c/d": "new"}, 3), (None, 3))
    for commits, times in told:
        if commits == "":
            shutil.rmtree(run_1 / "evals")
            continue
        second_eval.data_revision = lambda context, config, commits=commits: commits
        sae_eval("run_1", *call, "--resume", options=[])
        assert len(second_eval.asked) == times
    second_eval.data_revision = lambda context, config: old
    assert "data_revision.a/b 'new' (asked for: 'old')" in " ".join(
        sae_eval("run_1", *call, "--compare", options=[]).split()
    )


def test_a_result_of_some_data_is_not_written_over_one_of_all(run_1, sae_eval, second_eval):
    """While the hub does not answer, the commits of data that cannot be loaded are not known either."""

    def partly(context, subjects, config):
        yield from (core.Result(subject, {}, {"group": {"value": 2.0}}, missing="no b") for subject in subjects)

    second_eval.data_revision = lambda context, config: {"a": "1", "b": "1"}
    sae_eval("run_1", "--evals", "second", options=[])
    before = results(run_1, "second")
    second_eval.evaluate, second_eval.data_revision = partly, lambda context, config: {"a": "1"}
    said = sae_eval("run_1", "--evals", "second", options=[])
    assert "no b. The earlier, complete result with these settings is kept" in " ".join(said.split())
    assert results(run_1, "second") == before


def test_a_result_of_a_model_that_was_replaced_is_done_again(world, run_1, sae_eval, second_eval, builder):
    """A folder may hold another one by now, and this store does not say which one made it."""
    folder = builder.root / "model"
    shutil.copytree(world.model, folder)
    call, weights = ("--evals", "second", "--model", folder, "--resume"), folder / "model.safetensors"
    sae_eval("run_1", *call, options=[])
    sae_eval("run_1", *call, options=[])
    assert len(second_eval.asked) == 1
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    said = sae_eval("run_1", "--evals", "second", "--model", folder, "--compare", options=[])
    assert "its result has model_revision 'sha256-" in " ".join(said.split())
    sae_eval("run_1", *call, options=[])
    assert len(second_eval.asked) == 2
    copies = [path for path in (run_1 / "evals" / "second").glob("*.json") if "_eval_results." in path.name]
    assert len(copies) == 4  # of two SAEs, the results of both models
    for path in copies:  # as earlier versions left them
        document = json.loads(path.read_text())
        del document["saemill"]["settings"]["model_revision"]
        path.write_text(json.dumps(document))
    sae_eval("run_1", *call, options=[])
    assert len(second_eval.asked) == 2


def test_a_store_that_says_which_model_made_it_leaves_nothing_to_record(world, open_context):
    context = open_context(world, model_name=str(world.model))
    known = replace(context.manifest.model, revision="sha256-1")
    assert settings_of(context, "core", core.Config())["model_revision"].startswith("sha256-")
    pinned = Context(SimpleNamespace(manifest=replace(context.manifest, model=known)), model_name=str(world.model))
    assert "model_revision" not in settings_of(pinned, "core", core.Config())
    elsewhere = Context(None, model_name="nobody/has-this")
    assert "model_revision" not in settings_of(elsewhere, "core", core.Config())


@pytest.mark.parametrize(
    "name", ["contrast", "ravel", "scr", "sparse_probing", "sparse_probing_sae_probes", "tpp", "unlearning"]
)
def test_evaluations_on_text_of_this_python_say_which_text_that_is(name):
    context, config = Context(None, model_name="elsewhere/model"), evals.load(name).config
    assert settings_of(context, name, config(data="stdlib"))["data_revision"].startswith("sha256:")
    assert "data_revision" not in settings_of(context, name, config())


def test_a_crash_in_one_evaluation_costs_no_other_its_result(run_1, sae_eval, second_eval):
    def evaluate(context, subjects, config):
        raise KeyError("planted")

    second_eval.evaluate = evaluate
    output = sae_eval("run_1", "--evals", "second,core", code=1)
    assert output.count("failed: second") == 2  # once for each SAE, which has its own traceback
    assert len(results(run_1)) == 2


@pytest.mark.parametrize("crashes", [False, True])
def test_a_run_that_was_removed_while_it_was_evaluated_does_not_come_back(
    world, builder, run_1, sae_eval, second_eval, crashes
):
    """And costs the other run no number, nor itself a second try; what core found of it before is drawn nowhere."""
    run_2, evaluate = builder.run(world, "run_2", {"other": builder.make_sae()}), second_eval.evaluate

    def remove(context, subjects, config):
        shutil.rmtree(run_1, ignore_errors=True)
        if crashes and any(subject.home == run_1 for subject in subjects):
            raise KeyError("planted")
        yield from evaluate(context, subjects, config)

    second_eval.evaluate = remove
    output = " ".join(sae_eval("run_1", "run_2", "--evals", "core,second", "--plots", code=1).split())
    assert output.count("was removed or moved during its evaluation") == 2 and not run_1.exists()
    assert set(results(run_2, "second")) == {"other_eval_results.json"} and (run_2 / "report.html").is_file()
    assert len(second_eval.asked) == 1


def test_what_was_measured_on_other_weights_is_not_written(run_1, sae_eval, second_eval):
    """They were trained again, or copied, while the first were measured."""
    evaluate, weights = second_eval.evaluate, run_1 / "small" / "sae_weights.safetensors"

    def replace_weights(context, subjects, config):
        whole = load_file(weights)
        save_file({**whole, "b_dec": whole["b_dec"] + 1}, weights)
        yield from evaluate(context, subjects, config)

    second_eval.evaluate = replace_weights
    assert "run_1/small was overwritten during its evaluation" in sae_eval(
        "run_1", "--evals", "second", code=1, options=[]
    )
    assert set(results(run_1, "second")) == {"large_eval_results.json"}


@pytest.mark.parametrize("batch", [16, 1])
def test_out_of_memory_is_told_with_the_setting_that_takes_less(batch, run_1, sae_eval, second_eval):
    """And no traceback: nothing is wrong with the evaluation."""

    def evaluate(context, subjects, config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB")

    second_eval.evaluate, second_eval.config = evaluate, tiers.Config
    options = ["--set", f"second.batch_windows={batch}"]
    said = " ".join(sae_eval("run_1", "--evals", "second", *options, code=1, options=[]).split())
    assert "out of memory (CUDA out of memory. Tried to allocate). " in said and "Free some memory" in said
    assert ("Make batches smaller with --set second.batch_windows=N, less than 16." in said) == (batch > 1)
    second_eval.config = ravel.Config
    said = " ".join(sae_eval("run_1", "--evals", "second", code=1, options=[]).split())
    assert "--set second.llm_batch_size=N, less than 8, which changes its numbers" in said
    assert not list(run_1.glob("evals/*/*_crash.txt"))


def test_results_before_a_crash_are_kept(run_1, sae_eval, second_eval):
    def evaluate(context, subjects, config):
        for subject in subjects:
            if subject.label == "small":
                raise KeyError("planted")
            yield core.Result(subject, {}, {"group": {"value": 1.0}})

    second_eval.evaluate = evaluate
    sae_eval("run_1", "--evals", "second", code=1, options=[])
    assert set(results(run_1, "second")) == {"large_eval_results.json"}


def test_a_disk_that_takes_no_result_costs_the_measuring_once(run_1, sae_eval, second_eval):
    (run_1 / "evals").mkdir()
    (run_1 / "evals/second").write_text("in the way")
    output = sae_eval("run_1", "--evals", "second", code=1, options=[])
    assert output.count("could not be written to") == 2 and "then --resume" in output
    assert second_eval.asked == [["large", "small"]]


def test_a_result_that_was_set_aside_comes_back_where_the_disk_takes_none_in_its_place(
    movable, world, make_world, sae_eval, second_eval, monkeypatch
):
    run, store = movable
    words = ("run_1/one", "--evals", "second")
    sae_eval(*words, options=[])
    before = results(run, "second")
    shutil.rmtree(store)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("saemill.evaluate.run.run_evals.write_result", full)
    other = make_world(model_id="lab/tiny", dtype="float32").store
    output = sae_eval(*words, "--cache", other, "--model", world.model, code=1, options=[])
    assert "could not be written to" in output and results(run, "second") == before


def test_an_evaluation_that_forgets_an_sae_is_told(run_1, sae_eval, second_eval):
    second_eval.evaluate = lambda context, subjects, config: iter(())
    assert "gave no result" in sae_eval("run_1", "--evals", "second", code=3, options=[])


def test_unknown_words(run_1, sae_eval):
    assert "unknown evaluation 'cor' (did you mean 'core'" in sae_eval("run_1", "--evals", "cor", code=1, options=[])
    assert "expected a setting like core.KEY=VALUE" in sae_eval("run_1", "--set", "corr.batch=1", code=1)
    for wrong in ("cor.split", "splitt"):
        assert f"found '{wrong}' (did you mean 'core.split'" in sae_eval("run_1", "--set", f"{wrong}=dev", code=1)
    assert "unknown setting 'batch' of core" in sae_eval("run_1", "--set", "core.batch=1", code=1)
    assert "expected a split of train, validation, test" in sae_eval("run_1", "--set", "core.split=dev", code=1)
    assert "expected zero and any others of" in sae_eval("run_1", "--set", 'core.ablations=["mean"]', code=1)
    assert "--device nope: expected auto, cpu, cuda or cuda:1" in sae_eval("run_1", "--device", "nope", code=1)


def test_more_batches_than_the_split_has(run_1, sae_eval):
    assert "the test split has 5" in sae_eval("run_1", "--set", "core.n_eval_reconstruction_batches=9", code=1)


@pytest.fixture
def told(golden, builder):
    """The folder of an SAE from elsewhere with other metadata: told(hook_name=...)."""
    folder = golden.subject("topk", builder.root).folder
    config = json.loads((folder / "cfg.json").read_text())

    def write(**metadata):
        changed = config | {"metadata": config["metadata"] | metadata}
        (folder / "cfg.json").write_text(json.dumps(changed))
        return folder

    return write


@pytest.mark.parametrize(
    ("hook", "layer"),
    [("blocks.3.hook_resid_post", 3), ("blocks.3.hook_resid_pre", 2), ("model.layers.7", 7), ("layer_12", 12)],
)
def test_the_layer_that_a_hook_means(told, builder, hook, layer):
    folder = told(hook_name=hook)
    (subject,) = find_subjects([str(folder)], builder.root)
    assert subject.layers == subject.target_layers == (layer,)
    assert result_path(subject, "core").parent == folder / "evals" / "core"


@pytest.mark.parametrize(
    ("name", "hook"), [("attn.hook_z", "z"), ("hook_mlp_out", "mlp_out"), ("hook_resid_post", "resid")]
)
@pytest.mark.parametrize("given", [None, 3])
def test_a_hook_is_what_its_name_says_whatever_layer_is_given(told, builder, sae_eval, name, hook, given):
    folder = told(hook_name=f"blocks.3.{name}")
    (subject,) = find_subjects([str(folder)], builder.root, layer=given)
    assert (subject.layers, subject.target_layers, subject.hooks) == ((3,), (3,), (hook, hook))


def test_another_layer_than_an_sae_names_is_refused(told, builder, run_1, sae_eval):
    """It was measured at its own, and the option had no effect."""
    said = " ".join(sae_eval(told(hook_name="blocks.3.hook_resid_post"), "run_1/small", "--layer", 4, code=1).split())
    assert "expected the layer that the SAE says it reads, 3, found --layer 4" in said
    assert f"the SAE says it reads, {builder.LAYER}, found --layer 4" in said


@pytest.mark.parametrize("name", ["blocks.3.hook_resid_mid", "hook_embed", "blocks.0.hook_resid_pre"])
def test_a_place_that_no_store_has_is_refused_whatever_layer_is_given(told, sae_eval, name):
    said = sae_eval(told(hook_name=name), "--layer", 3, code=1)
    assert name in said and "--layer" not in said


def test_an_sae_that_names_no_place_has_the_layer_it_is_given(told, builder, world, sae_eval):
    folder = told(hook_name="")
    assert "give --layer" in sae_eval(folder, code=1)
    (subject,) = find_subjects([str(folder)], builder.root, layer=4)
    assert subject.layers == (4,)
    assert "is not in the range x>=0" in sae_eval(folder, "--layer", -1, code=2)
    assert "below 5, the model's number of layers, found 99" in sae_eval(
        folder, "--layer", 99, "--cache", world.store, "--from-tokens", code=1
    )
    with Store.open(world.store) as store:
        model = replace(store.manifest.model, num_layers=5)
        known = SimpleNamespace(manifest=replace(store.manifest, model=model), url=world.store)
        with pytest.raises(WidthMismatch, match="writes layer 99, but the model .* has 5 layers"):
            command.require_fit(replace(subject, layers=(99,)), known)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"layers": 3}, "layers as a list of layers, such as [5], found 3"),
        ({"layers": [3], "target_layers": ["3"]}, "target_layers as a list of layers"),
        ({"layers": [-1]}, "found [-1]"),
        ({"layers": [3], "hook": ["mlp_in"]}, "expected hook among resid, mlp_in"),
    ],
)
def test_metadata_written_by_hand_cost_the_other_targets_nothing(told, run_1, sae_eval, metadata, said):
    output = sae_eval(told(**metadata), "run_1/small", code=1)
    assert said in output and "run_1/small" in output
    assert set(results(run_1)) == {"small_eval_results.json"}


@pytest.mark.parametrize("way", ["--resume", "--compare"])
def test_a_result_of_another_layer_is_no_result(told, make_world, sae_eval, way):
    store = make_world(layers=(1, 2)).store
    words = [told(hook_name=""), "--cache", store, way, "--layer"]
    found = []
    for layer in (1, 2, 2):
        sae_eval(*words, layer)
        found += results(words[0]).values()
    assert [document["sae_cfg_dict"]["hook_layer"] for document in found] == [1, 2, 2]
    assert found[1] == found[2]
    with (words[0] / "cfg.json").open("a") as file:
        file.write("\n")
    sae_eval(*words, 2)
    assert found[2] not in results(words[0]).values()


def test_a_result_of_another_layer_or_of_other_weights_is_kept_beside_the_new_one(told, sae_eval):
    """Its settings are the same."""
    folder = told(hook_name="")

    def measure(layer):
        said = sae_eval(folder, "--layer", layer, "--evals", "decoder_cosine", options=[])
        return " ".join(said.split()), *results(folder, "decoder_cosine").values()

    (_, first), (said, second) = measure(5), measure(6)
    place = folder / "evals/decoder_cosine/topk_eval_results"
    assert "done. Its earlier result of layer 5 (blocks.5.hook_resid_post, resid) is now" in said
    (aside,) = place.parent.glob(f"{place.name}.*.json")
    assert json.loads(aside.read_text()) == first
    said, third = measure(6)
    assert "Its result" not in said
    with (folder / "cfg.json").open("a") as file:
        file.write("\n")
    assert "done. Its earlier result of other weights is now" in measure(6)[0]
    asides = [json.loads(one.read_text()) for one in place.parent.glob(f"{place.name}.*.json")]
    assert len(asides) == 2 and first in asides and third in asides and second != third


def test_an_sae_of_another_tool_is_read_once_if_it_is_alone(builder, monkeypatch, tmp_path):
    """What has no file of sizes is read to be found; of several, those in work alone are in memory."""
    folders, read, read_folder = [tmp_path / name for name in "ab"], [], find_saes_to_evaluate.read_folder
    for folder in folders:
        WRITERS["dictionary_learning"](folder, in_raw_units(builder.make_sae()), {"layers": [builder.LAYER]})
    monkeypatch.setattr(
        find_saes_to_evaluate, "read_folder", lambda folder: read.append(folder.name) or read_folder(folder)
    )
    for names, times in ((folders[:1], 1), (folders, 2)):
        with torch.inference_mode():
            subjects = find_subjects(map(str, names), tmp_path)
        assert not any(subject.sae.W_dec.is_inference() for subject in subjects)
        assert read == [folder.name for folder in names] * times
        read.clear()
    (alone,) = find_subjects([str(folders[0])], tmp_path)
    WRITERS["dictionary_learning"](alone.folder, in_raw_units(builder.make_sae(seed=9)), {"layers": [builder.LAYER]})
    with pytest.raises(SaeGone, match="overwritten during its evaluation"):
        alone.require_unchanged()


def test_rows_of_other_lengths_are_evaluated_as_unit_rows(builder):
    sae = builder.make_sae(k=None)
    plain = make_subject(builder.save(builder.root / "plain", sae), None)
    weights = load_file(plain.folder / "sae_weights.safetensors")
    lengths = torch.linspace(0.5, 3, builder.F)
    for name, factor in (("W_enc", 1 / lengths), ("b_enc", 1 / lengths), ("W_dec", lengths[:, None])):
        weights[name] = weights[name] * factor
    save_file(weights, plain.folder / "sae_weights.safetensors")
    found = make_subject(plain.folder, None).sae
    torch.testing.assert_close(found.W_dec, plain.sae.W_dec)
    torch.testing.assert_close(found.W_enc, plain.sae.W_enc)


@pytest.mark.parametrize("is_told", [False, True])
def test_results_say_the_hook_and_the_gate_of_an_sae_of_sae_lens_before_6(golden, builder, is_told):
    """Its name by hand where that is none that is known."""
    folder = golden.subject("topk", builder.root).folder
    config = json.loads((folder / "cfg.json").read_text())
    k, place = config.pop("k"), {"layers": [5], "hook": "mlp_out"}
    config |= {"model_name": "gpt2-small", "architecture": "standard", "activation_fn_str": "topk"}
    config |= {"activation_fn_kwargs": {"k": k}, "hook_name": "" if is_told else "blocks.5.hook_mlp_out"}
    config["metadata"] = place if is_told else {}
    (folder / "cfg.json").write_text(json.dumps(config))
    subject = make_subject(folder, None)
    said = sae_config(subject)
    assert (subject.hooks, subject.layers, subject.variant) == (("mlp_out", "mlp_out"), (5,), "topk")
    assert (said["hook_name"], said["hook_layer"]) == ("blocks.5.hook_mlp_out", 5)
    assert (said["architecture"], said["k"], said["model_name"]) == ("topk", k, "gpt2-small")


def test_a_transcoder_from_elsewhere_is_no_sae_of_the_layer_it_reads(golden, builder, sae_eval):
    """SAELens names the layer that it writes by a hook alone, which may be one of the block's insides."""
    folder = golden.subject("jumprelu", builder.root).folder
    config = json.loads((folder / "cfg.json").read_text())
    config |= {"architecture": "jumprelu_transcoder", "metadata": {"hook_name": "blocks.3.hook_resid_post"}}
    (folder / "cfg.json").write_text(json.dumps(config))
    for more in ({}, {"target_layers": [3]}):
        config["metadata"] |= more
        (folder / "cfg.json").write_text(json.dumps(config))
        said = sae_eval(folder, "--layer", 3, code=1)
        assert (
            "a transcoder that does not say where it reads and writes" in said and "with hooks from resid, mlp" in said
        )
    config["metadata"] |= {"layers": [3], "hook": "mlp_in", "target_hook": "mlp_out"}
    (folder / "cfg.json").write_text(json.dumps(config))
    (subject,) = find_subjects([str(folder)], builder.root)
    assert (subject.layers, subject.hooks) == ((3,), ("mlp_in", "mlp_out"))


def test_an_sae_is_measured_on_a_store_that_is_named_in_place_of_its_own(world, run_1, builder, sae_eval):
    """As one of the Hub, whose store nobody here has."""
    told = {"cache_id": "f00d", "model_name": str(world.model)}
    folder = builder.subject(builder.make_sae(), "elsewhere", **told).folder
    words = (folder, "--cache", world.store)
    with Store.open(world.store) as store:
        own = store.manifest.cache_id
    said = f"on the store with cache id {own}, trained on another one (f00d)"
    assert said in " ".join(sae_eval(*words).split())
    before = results(folder)
    (document,) = before.values()
    assert document["saemill"]["cache_id"] == own and said in document["saemill"]["measured_on"]
    output = sae_eval(run_1, *words, "--compare")
    assert "run_1/small" in output and said in output
    assert said in sae_eval(*words, "--resume") and results(folder) == before
    assert "trained on another one" not in sae_eval(run_1)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"model_name": "lab/other"}, ", not of lab/other"),
        ({"model_name": None}, ", and the SAE names no model"),
        ({"context_size": 8}, "whose windows have 12 tokens, more than 8"),
        ({"hook_name": "blocks.1.hook_resid_post", "layers": [1], "target_layers": [1]}, "residuals of layer 1"),
    ],
    ids=["another model", "no model", "more positions", "another layer"],
)
def test_a_store_that_is_unlike_an_saes_own_does_not_stand_in_for_it(world, builder, sae_eval, told, why):
    told = {"cache_id": "f00d", "model_name": str(world.model)} | told
    folder = builder.save(builder.root / "elsewhere", builder.make_sae(), **told)
    assert why in sae_eval(folder, "--cache", world.store, code=1)
    assert not results(folder)


def test_models_of_two_owners_are_not_the_same_by_their_names(make_world, builder):
    """Of a folder, as other tools say it too, there is the last part alone."""
    names = ("lab/tiny", "tiny", "/models/tiny", "others/tiny")
    *alike, another = (
        builder.subject(builder.make_sae(), str(at), cache_id="f00d", model_name=name) for at, name in enumerate(names)
    )
    with Store.open(make_world(model_id="lab/tiny").store) as store:
        for subject in alike:
            command.require_fit(subject, store, is_named=True)
        with pytest.raises(CacheIdMismatch, match="of the model lab/tiny, not of others/tiny"):
            command.require_fit(another, store, is_named=True)
