"""With default settings, SAEBench's evaluations measure what SAEBench 0.6.0 measures with its own.

These are copied from its `*/eval_config.py`, under our names of them where those differ. How much text core reads is in
`core/test_saebench_keys.py`.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from saemill.evaluate import evals
from saemill.evaluate.evals import sparse_probing
from saemill.evaluate.evals.absorption import evaluation as absorption
from saemill.evaluate.evals.probing.fit_probes import FULL_WIDTH, Training
from saemill.evaluate.evals.probing.source_and_settings import HUB, Settings, filled
from saemill.evaluate.evals.ravel import evaluation as ravel
from saemill.evaluate.evals.unlearning.interventions import Sweep

BIOS, AMAZON = "LabHC/bias_in_bios_class_set1", "canrager/amazon_reviews_mcauley_1and5"
PROBED = (BIOS, "LabHC/bias_in_bios_class_set2", "LabHC/bias_in_bios_class_set3", AMAZON, f"{AMAZON}_sentiment")
PROBED += ("codeparrot/github-code", "fancyzhx/ag_news", "Helsinki-NLP/europarl")
EXAMS = ("wmdp-bio", "high_school_us_history", "college_computer_science", "high_school_geography", "human_aging")
SIZES = {"train_set_size": 4000, "test_set_size": 1000, "context_length": 128}
PROBES = {"probe_train_batch_size": 16, "probe_epochs": 20, "probe_lr": 1e-3, "probe_l1_penalty": 1e-3}
PROBES |= {"early_stopping_patience": 20, "n_values": (2, 5, 10, 20, 50, 100, 500), "dataset_names": (BIOS, AMAZON)}
LETTERS = {"f1_jump_threshold": 0.03, "max_k_value": 10, "k_sparse_probe_l1_decay": 0.01, "min_GT_probe_f1": 0.6}
LETTERS |= {"k_sparse_probe_batch_size": 4096, "k_sparse_probe_num_epochs": 50}
OFFICIAL: dict[str, dict[str, Any]] = {
    "core": {"batch_size_prompts": 16},
    "sparse_probing": {f"{'probe_' * ('set' in name)}{name}": size for name, size in SIZES.items()}
    | {"random_seed": 42, "dataset_names": PROBED},
    "scr": {"random_seed": 42} | SIZES | PROBES,
    "tpp": {"random_seed": 42} | SIZES | PROBES,
    "sparse_probing_sae_probes": {"random_seed": 42, "reg_type": "l1", "binarize": False, "include_llm_baseline": True},
    "unlearning": {"random_seed": 42, "dataset_names": EXAMS, "dataset_size": 1024, "seq_len": 1024},
    "absorption": {"random_seed": 42, "prompt_template": "{word} has the first letter:"} | LETTERS,
    "autointerp": {"random_seed": 42, "n_latents": 1000, "override_latents": None, "dead_latent_threshold": 15}
    | {"total_tokens": 2_000_000, "buffer": 10, "act_threshold_frac": 0.01, "max_tokens_in_explanation": 30}
    | {"n_top_ex_for_generation": 10, "n_iw_sampled_ex_for_generation": 5, "n_top_ex_for_scoring": 2}
    | {"n_random_ex_for_scoring": 10, "n_iw_sampled_ex_for_scoring": 2},
    "ravel": {"random_seed": 42, "top_n_entities": 500, "num_pairs_per_attribute": 5000, "train_test_split": 0.7}
    | {"learning_rate": 1e-3, "num_epochs": 2, "n_generated_tokens": 6},
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_defaults_are_those_of_saebench(name):
    """As they are completed for a model other than the bundled one."""
    config, context = evals.load(name).config(), SimpleNamespace(is_pocket=False)
    if name in ("scr", "tpp"):
        config = filled(config, HUB)
    elif name == "sparse_probing":
        config = sparse_probing.filled(config, HUB)
    elif name == "absorption":
        chosen = {"prompt_template": absorption.choose_classes(context, config).template}
        config = dataclasses.replace(config, k_sparse_probe_batch_size=config.batch_size(context), **chosen)
    assert {key: getattr(config, key) for key in OFFICIAL[name]} == OFFICIAL[name]


def test_what_no_setting_says_is_saebenchs_too():
    assert Settings().training == Training(batch_size=16, epochs=20, lr=1e-3, patience=20, l1_penalty=1e-3)
    assert Training(batch_size=250, epochs=100, lr=1e-2, patience=10, l1_penalty=0) == FULL_WIDTH
    assert evals.load("unlearning").config().sweep(Sweep()) == Sweep((0.001, 0.01), (10, 20), (25, 50, 100, 200))
    assert ravel.OFFICIAL_SELECTION == {
        "city": ("Country", "Continent", "Language"),
        "nobel_prize_winner": ("Country of Birth", "Field", "Gender"),
    }
    goods = ["Books CDs_and_Vinyl", "Software Electronics", "Pet_Supplies Office_Products"]
    assert {name: [" ".join(pair) for pair in pairs.column1] for name, pairs in HUB.pairs.items()} == {
        BIOS: ["professor nurse", "architect journalist", "surgeon psychologist", "attorney teacher"],
        AMAZON: [*goods, "Industrial_and_Scientific Toys_and_Games"],
    }
    first = evals.load("sparse_probing").config().k_values, evals.load("sparse_probing_sae_probes").config().ks
    assert [ks[:3] for ks in first] == [(1, 2, 5)] * 2  # more follow: MEASURES.md says what that changes
