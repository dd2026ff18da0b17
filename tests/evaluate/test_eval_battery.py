"""What every file in evaluate/evals/ must do. A new evaluation is found by its file and needs no edit here.

It runs with its own defaults, on a tiny store or, where it needs a model, on the bundled one; `SMALL` is for those
whose defaults would take minutes there.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, fields
from functools import cache
from pathlib import Path

import pytest
import torch

from saemill import evaluate
from saemill.cache_schema import Store
from saemill.cache_schema.strict_json import StrictError, from_json, to_json
from saemill.evaluate import evals
from saemill.evaluate.context.context import Context
from saemill.evaluate.errors import EvaluationInvalid, SettingInvalid
from saemill.evaluate.evals.evaluation_contract import Evaluation
from saemill.evaluate.evals.probing import stdlib_texts
from saemill.evaluate.evals.unlearning import texts_and_exams
from saemill.evaluate.model.prefix_suffix import load_language_model
from saemill.evaluate.run.run_evals import run_evals
from saemill.harvest.pocket import MODEL_FOLDER
from saemill.harvest.progress import Watch

from ..free_port import free_port
from .fake_judge import FakeJudge, serving

MEASURES = (Path(evaluate.__file__).parent / "MEASURES.md").read_text()
PAGE = (Path(evaluate.__file__).parent.parent / "docs" / "evaluate.md").read_text()
EVALS = evals.names()
RUN_WHOLE = ("ravel", "unlearning")
JUDGE_PORT = free_port()
PROBES = {"context_length": 8}
SMALL = {
    "core": {"batch_size_prompts": 4, "resamples": 10},
    "tiers": {"windows": 8, "trace_windows": 8, "batch_windows": 8},
    "position": {"windows": 16, "batch_windows": 8, "least_firings": 3, "probe_k": (2,), "probe_tokens": 6},
    "temporal": {"windows": 8, "batch_windows": 8, "least_firings": 3},
    "attention": {"windows": 8, "batch_windows": 8},
    "replacement": {"windows": 8, "batch_windows": 8},
    "browser": {"windows": 8, "batch_windows": 8},
    "autointerp": {"endpoint": f"http://127.0.0.1:{JUDGE_PORT}/v1", "judge": "fake", "buffer": 1}
    | {"act_threshold_frac": 0.5, "n_top_ex_for_generation": 3, "n_iw_sampled_ex_for_generation": 2},
    "ravel": {"num_pairs_per_attribute": 12, "num_epochs": 1, "n_generated_tokens": 2, "llm_batch_size": 4},
    "unlearning": {"retain_thresholds": (1.0,), "n_features_list": (2,), "multipliers": (1.0,)},
    "absorption": {"max_words": 120, "k_sparse_probe_num_epochs": 2, "min_GT_probe_f1": 0.1, "min_feats_for_eval": 1},
    "sparse_probing": PROBES
    | {"dataset_names": ("stdlib/kind",), "probe_train_set_size": 24, "probe_test_set_size": 12, "k_values": (1, 5)},
    "contrast": PROBES | {"dataset_names": ("stdlib/library",), "train_set_size": 24, "test_set_size": 12},
    "scr": PROBES | {"train_set_size": 24, "test_set_size": 12, "n_values": (10, 50), "probe_epochs": 2},
    "tpp": PROBES | {"train_set_size": 24, "test_set_size": 12, "n_values": (10, 50), "probe_epochs": 2},
    "sparse_probing_sae_probes": {"dataset_names": ("stdlib/kind",), "ks": (1, 5)},
}
IN_SMALL = re.compile(r"_(t|u|l|k)(?=_|$)")  # of a documented name: numbers that settings decide
WITH_MASSIVE = ("core", "replacement")  # SAEBench's numbers count all rows; the model makes its own: tested apart
# What a model makes of a window depends on all of its rows.
UNTRACED, OF_MODEL = {name: {"trace_windows": 0} for name in ("attention", "tiers")}, {"attention": "fidelity"}
REMARKED = ("autointerp", "scr", "tpp", "unlearning")  # so small, they say less than they seem, and say so
MEASURED_ON = {
    "store": r" split, [\d,]+ tokens of ",
    "text": r", [\d,]+ ",
    "weights": "^weights alone$",
}  # as results say it


def settings_of(name, **changes):
    return evals.load(name).config(**SMALL.get(name, {}) | changes)


def of_what(name):
    return "text" if is_about_text(name) else "store" if evals.load(name).needs.store else "weights"


def is_about_text(name):
    """It reads prompts or texts of its own, not the store's windows."""
    return evals.load(name).needs.model or "data" in {field.name for field in fields(evals.load(name).config)}


@pytest.fixture(scope="module")
def stored(make_world, world, tmp_path_factory):
    """stored(**how): a store of windows of 24 tokens, of a model that has a tokenizer."""
    model = shutil.copytree(world.model, tmp_path_factory.mktemp("model") / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_FOLDER / name, model)
    tokens = torch.randint(3, 50, (40, 24), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 2
    return cache(lambda **how: make_world(model=model, tokens=tokens, **how))


@pytest.fixture(scope="module")
def pocket():
    """pocket(dtype), loaded once."""
    return cache(lambda dtype: load_language_model(MODEL_FOLDER, dtype, torch.device("cpu")))


@pytest.fixture(autouse=True, scope="module")
def judge():
    with serving(FakeJudge(), JUDGE_PORT):
        yield


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    monkeypatch.setattr(texts_and_exams, "TEXT_ROWS", 12)
    monkeypatch.setattr(texts_and_exams, "EXAM_ROWS", 6)
    monkeypatch.setattr(stdlib_texts, "BINARY_ROWS", 140)


@pytest.fixture(scope="module")
def run(stored, pocket, new_builder):
    """Evaluate SAEs by their seeds: run(name, seeds, config, **how the store is) gives their documents."""

    def documents(name, seeds, config=None, **how):
        builder, subjects = new_builder(), []
        layer, dtype = (19, torch.float32) if name in RUN_WHOLE else (3, torch.bfloat16)  # each the quicker way
        for seed in (0, 1):  # both lie side by side on disk, whoever is evaluated
            if is_about_text(name):
                sae = builder.make_sae(width=32, d_in=pocket(dtype).facts.d_model, k=8, seed=seed)
                subjects.append(builder.subject(sae, f"sae_{seed}", layers=(layer,)))
            else:
                sae = builder.make_sae(k=None, seed=seed)
                subjects.append(builder.subject(sae, f"sae_{seed}", config={"seed": seed}))
                extras = {"composition.C2": torch.ones(8, 8), "composition.C3": torch.ones(8, 8)}
                subjects[-1].sae.extras_tensors = extras
        subjects = [subjects[seed] for seed in seeds]
        watch, configs = Watch(is_quiet=True), {name: config or settings_of(name)}
        if is_about_text(name):
            context = Context(None, model_name="pocket", watch=watch)
            context._model = pocket(dtype)
            rows = run_evals(context, subjects, configs)
        else:
            with Store.open(stored(**how).store) as store:
                rows = run_evals(Context(store, watch=watch), subjects, configs)
        assert [row.status for row in rows] == ["done"] * len(seeds)
        assert name in REMARKED or not any(row.reason for row in rows)
        return [json.loads(row.path.read_text(), parse_constant=pytest.fail) for row in rows]

    return documents


def numbers_of(document):
    """All of a document that is measured, and nothing of when and where."""
    return {key: value for key, value in document.items() if key not in ("eval_id", "datetime_epoch_millis", "saemill")}


@pytest.mark.parametrize("name", EVALS)
def test_settings_survive_json_and_do_not_change(name):
    """As `--resume` compares them."""
    config, kind = settings_of(name), evals.load(name).config
    raw = json.loads(json.dumps(to_json(config), allow_nan=False))
    assert from_json(kind, raw, name) == config
    with pytest.raises(StrictError, match="no_such_setting"):
        from_json(kind, raw | {"no_such_setting": 5}, name)
    for field in fields(kind):
        with pytest.raises(FrozenInstanceError):
            setattr(config, field.name, None)


@pytest.mark.parametrize("name", EVALS)
def test_results_are_json_of_two_levels_the_same_alone_as_among_others_and_every_metric_has_a_row(name, run):
    """One test, because workers share no runs."""
    first, second = run(name, (0, 1))
    for document in (first, second):
        metrics = document["eval_result_metrics"]
        values = [value for group in metrics.values() for value in group.values()]
        assert values and all(isinstance(value, (int, float)) for value in values)
        assert re.search(MEASURED_ON[of_what(name)], document["saemill"]["measured_on"] or "it does not say")
    (alone,) = run(name, (1,))
    assert numbers_of(alone) == numbers_of(second)
    assert alone["saemill"]["measured_on"] == second["saemill"]["measured_on"]
    found = {
        f"{group}.{metric}"
        for document in (first, second)
        for group, metrics in document["eval_result_metrics"].items()
        for metric in metrics
    }
    rows = documented(name)
    assert not sorted(metric for metric in found if not any(row.fullmatch(metric) for row in rows.values()))
    assert not sorted(metric for metric, row in rows.items() if not any(map(row.fullmatch, found)))


@pytest.mark.parametrize("name", [name for name in EVALS if of_what(name) == "store" and name not in WITH_MASSIVE])
def test_massive_rows_change_no_number(name, run):
    """Opposite ones are as long, and fire other latents."""
    massive = tuple((window, position) for window in range(0, 40, 2) for position in (3, 8 + window // 4))
    config = settings_of(name, **UNTRACED.get(name, {}))
    (one,), (other,) = (run(name, (1,), config, massive=massive, longer=longer) for longer in (100.0, -100.0))
    for document in (one, other):
        document["eval_result_metrics"].pop(OF_MODEL.get(name), None)
    assert numbers_of(one) == numbers_of(other)
    assert "massive rows left out" in one["saemill"]["measured_on"]


@pytest.mark.parametrize("name", EVALS)
def test_the_pages_name_the_evaluation(name):
    assert re.search(rf"^\|.*`{name}`.*\|", PAGE, re.MULTILINE), f"the table of docs/evaluate.md lacks {name}"


def documented(name):
    """`group.metric` as it is written in MEASURES.md, and the names that it stands for."""
    assert f"\n## {name}\n" in MEASURES, f"MEASURES.md has no section {name}"
    section = MEASURES.split(f"\n## {name}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\w+) \| (`.*?`) \|", section, re.MULTILINE)
    written = [f"{group}.{metric}" for group, cell in rows for metric in re.findall(r"`(\w+)`", cell)]
    return {metric: re.compile(IN_SMALL.sub(r"_\\d+", metric.replace(".", r"\."))) for metric in written}


@pytest.mark.parametrize("name", EVALS)
def test_numbers_that_make_no_sense_are_refused_and_the_least_that_do_are_taken(name):
    evaluation = evals.load(name)
    for key, least in evaluation.least.items():
        kind = tuple if isinstance(getattr(evaluation.config(), key), tuple) else lambda value: value[0]
        evaluation.require(evaluation.config(**{key: kind([least])}))
        with pytest.raises(SettingInvalid, match=f"{key}: expected {least} or more, found {least - 1}"):
            evaluation.require(evaluation.config(**{key: kind([least - 1])}))


@dataclass
class Thawed:
    size: int = 1


@dataclass(frozen=True)
class Undecided:
    size: int


@dataclass(frozen=True)
class Sound:
    size: int = 1


@pytest.mark.parametrize(
    ("config", "summary", "words"),
    [
        (Thawed, (), "frozen dataclass with defaults"),
        (Undecided, (), "frozen dataclass with defaults"),
        (dict, (), "frozen dataclass with defaults"),
        (Sound, ("mean",), "paths like group.metric"),
    ],
)
def test_a_broken_contract_is_refused(config, summary, words):
    with pytest.raises(EvaluationInvalid, match=words):
        Evaluation(config, lambda context, subjects, config: iter(()), summary=summary)


def test_a_file_that_declares_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(evals, "_modules", lambda: {"probing": "probing"})
    with pytest.raises(EvaluationInvalid, match=r"evaluation probing: expected EVALUATION = Evaluation"):
        evals.load("probing")


def test_what_reads_weights_alone_does_not_wait_for_transformers(builder):
    folder = builder.save(builder.root / "sae", builder.make_sae())
    code = f"""
import sys
from saemill.evaluate.cli import main
try:
    main([{str(folder)!r}, "--evals", "decoder_cosine", "--no-plots"])
except SystemExit as end:
    print(end.code, sorted({{"transformers", "sklearn", "datasets", "matplotlib"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout + done.stderr
