"""The core evaluation against the official package's own output on the same model, tokens and SAEs."""

from __future__ import annotations

import pytest
import torch

from saemill.evaluate.context.write_and_read_results import frame
from saemill.evaluate.evals.core import evaluation as core
from saemill.evaluate.model.batches import store_batches

SAES = ["standard", "topk", "jumprelu", "gated"]
TOLERANCE = 1e-5
OURS = {"saemill_metrics", "saemill"}


@pytest.fixture(params=SAES)
def name(request):
    return request.param


@pytest.fixture
def config(golden):
    settings = golden.output("topk")["eval_config"]
    return core.Config(
        batch_size_prompts=settings["batch_size_prompts"],
        n_eval_reconstruction_batches=settings["n_eval_reconstruction_batches"],
        n_eval_sparsity_variance_batches=settings["n_eval_sparsity_variance_batches"],
        resamples=20,
    )


def document(golden, context, subject, config):
    (result,) = core.evaluate(context, [subject], config)
    return frame(result, "core", {})


def numbers(value, path=""):
    """Every number of a document by its dotted path."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in numbers(item, f"{path}.{key}").items()}
    if isinstance(value, list):
        return {k: v for index, item in enumerate(value) for k, v in numbers(item, f"{path}[{index}]").items()}
    return {path: value}


def skeleton(value):
    """Keys in their order and types, without the values."""
    if isinstance(value, dict):
        return [(key, skeleton(item)) for key, item in value.items()]
    if isinstance(value, list):
        return [skeleton(item) for item in value[:1]]
    return type(value).__name__


@pytest.mark.parametrize("from_tokens", [True, False])
def test_every_number_is_the_official_one(golden, open_context, tmp_path, name, config, from_tokens):
    context = open_context(golden.store, dtype_name="float32", from_tokens=from_tokens)
    found = document(golden, context, golden.subject(name, tmp_path), config)
    official = golden.output(name)
    for part in ("eval_result_metrics", "eval_result_details"):
        expected = numbers(official[part])
        assert numbers(found[part]) == pytest.approx(expected, rel=TOLERANCE, abs=2e-10), part
        assert len(expected) > 20


def test_the_document_has_the_official_form(golden, open_context, tmp_path, name, config):
    """All keys in their order, with their types; ours come last, beside the official ones."""
    found = document(golden, open_context(golden.store), golden.subject(name, tmp_path), config)
    official = golden.output(name)
    kept = {key: value for key, value in found.items() if key not in OURS}
    assert list(kept) == list(official)
    assert set(found) > OURS
    for part in ("eval_config", "eval_result_metrics", "eval_result_details", "eval_result_unstructured"):
        assert skeleton(kept[part]) == skeleton(official[part]), part
    for key in ("eval_id", "datetime_epoch_millis", "sae_lens_id", "sae_bench_commit_hash", "sae_lens_version"):
        assert type(kept[key]) is type(official[key])


def test_a_latent_that_never_fires_is_told_as_minus_one(golden, open_context, tmp_path, config):
    found = document(golden, open_context(golden.store), golden.subject("topk", tmp_path), config)
    dead = found["eval_result_details"][7]
    assert dead["feature_density"] == 0
    assert (
        dead["consistent_activation_heuristic"]
        == golden.output("topk")["eval_result_details"][7]["consistent_activation_heuristic"]
        == -1
    )


def test_the_model_is_the_official_one(golden, open_context):
    """Residuals of the same weights in both libraries."""
    context = open_context(golden.store)
    stored = torch.cat([batch.resid[1] for batch in store_batches(context.store, "test", (1,))])
    torch.testing.assert_close(stored, golden.resid, rtol=1e-4, atol=1e-4)
