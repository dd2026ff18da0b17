"""Massive rows: SAEBench's numbers take them, ours do not, and say how many there were."""

import pytest

from saemill.evaluate.errors import SettingInvalid
from saemill.evaluate.evals import attention, position, temporal, tiers
from saemill.evaluate.evals.browser import evaluation as browser
from saemill.evaluate.evals.core import bootstrap, evaluation
from saemill.evaluate.run.command import parse_multiple
from saemill.evaluate.run.run_evals import settings_of

PLANTED = [(21, 3), (37, 4), (38, 8), (2, 6)]  # of windows 20 to 39, which are the test split; one trains


@pytest.fixture(scope="module")
def spiked(make_world):
    return make_world(massive=PLANTED)


def core_of(context, subject):
    config = evaluation.Config(
        batch_size_prompts=4, n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=3
    )
    (found,) = evaluation.evaluate(context, [subject], config)
    return found


def test_saebench_is_of_all_tokens_and_ours_is_without_massive_ones(spiked, world, open_context, builder, monkeypatch):
    monkeypatch.setattr(bootstrap, "FEWEST", 2)
    subject = builder.subject(builder.make_sae())
    found = core_of(open_context(spiked), subject)
    every = core_of(open_context(spiked, massive_norms=None), subject)
    for group, metrics in found.metrics.items():
        for name, value in metrics.items():
            assert value == pytest.approx(every.metrics[group][name], nan_ok=True), (group, name)
    ours, theirs = (result.extra["saemill_metrics"] for result in (found, every))
    assert ours["massive"]["tokens"] == 2 and theirs["massive"]["tokens"] == 0
    assert ours["massive"]["share_of_squares"] > 0.9
    assert ours["explained_variance_with_massive"] == pytest.approx(theirs["explained_variance"])
    assert theirs["explained_variance_with_massive"] == theirs["explained_variance"]
    low, high = ours["confidence_95"]["explained_variance"]
    assert low <= ours["explained_variance"] <= high
    plain = core_of(open_context(world), subject).extra["saemill_metrics"]
    assert ours["explained_variance"] == pytest.approx(plain["explained_variance"], abs=0.02)


def test_massive_rows_keep_their_own_residual_where_ours_counts_losses(spiked, open_context, builder):
    """One of the first block's tokens: with it spliced the loss is another; an SAE that is perfect loses nothing."""
    found = core_of(open_context(spiked), builder.subject(builder.make_sae()))
    kept, losses = found.extra["saemill_metrics"]["massive_kept"], found.metrics["model_performance_preservation"]
    assert kept["tokens"] == 1
    assert kept["ce_loss_with_sae"] != pytest.approx(losses["ce_loss_with_sae"], abs=1e-4)
    off = core_of(open_context(spiked, massive_norms=None), builder.subject(builder.make_sae()))
    same = off.extra["saemill_metrics"]["massive_kept"]
    assert same["tokens"] == 0 and same["ce_loss_with_sae"] == losses["ce_loss_with_sae"]


def test_no_example_is_of_a_massive_token(spiked, open_context, builder):
    subject = builder.subject(builder.make_sae(k=None))
    for norms, massive, largest in ((10.0, 3, 100.0), (None, 0, 1e9)):
        context = open_context(spiked, massive_norms=norms)
        (found,) = browser.evaluate(context, [subject], browser.Config(splits=("test",)))
        assert found.metrics["firing"]["massive_tokens"] == massive
        strongest = max(one["contexts"][0]["activation"] for one in found.unstructured["latents"])
        assert strongest < largest and (norms is not None or strongest > 100)


def test_the_multiple_is_a_setting_that_results_remember(spiked, open_context):
    context = open_context(spiked, massive_norms=parse_multiple("25"))
    assert settings_of(context, "core", evaluation.Config())["massive_norms"] == 25
    assert settings_of(open_context(spiked), "browser", browser.Config())["massive_norms"] == 10
    assert parse_multiple("inf") is None
    with pytest.raises(SettingInvalid, match="above 1, or inf, found nan"):
        parse_multiple("nan")


@pytest.mark.parametrize("module", [attention, browser, position, temporal, tiers])
def test_results_count_the_text_that_they_are_of(module, spiked, open_context, builder):
    """Three of the planted rows lie in the test split's windows."""
    settings = {"splits": ("test",)} if module is browser else {}
    for norms, massive in ((10.0, 3), (None, 0)):
        context, subject = open_context(spiked, massive_norms=norms), builder.subject(builder.make_sae())
        (found,) = module.evaluate(context, [subject], module.Config(windows=20, **settings))
        tokens, left_out = int((spiked.tokens[20:] > 2).sum()) - massive, ", 3 massive rows left out" * bool(massive)
        first, *traced = found.measured_on.split("; ")
        assert first == f"test split, {tokens:,} tokens of 20 windows{left_out}"
        assert (traced == ["traced in 16 windows"]) == (module in (attention, tiers))


def test_a_layer_that_the_store_lacks_has_the_bound_of_the_saes_training_or_none_and_says_so(
    world, open_context, builder
):
    context = open_context(world, from_tokens=True)
    norms = context.model.resid(world.tokens[20:], (3,))[3].float().norm(dim=-1)[world.tokens[20:] > 2]
    bounds = {"none": {}, "own": {"norm_bounds": {"3": float(norms.median())}}}
    subjects = [builder.subject(builder.make_sae(), name, layers=(3,), **told) for name, told in bounds.items()]
    config = evaluation.Config(batch_size_prompts=4, resamples=0)
    none, own = evaluation.evaluate(context, subjects, config)
    assert none.remark == "massive rows of layer 3, not held by the store: none is left out there"
    assert own.remark == "massive rows of layer 3, not held by the store: the bound is that of the SAE's training"
    counted = [result.extra["saemill_metrics"]["massive"] for result in (none, own)]
    assert counted[0]["tokens"] == 0 and 0.3 < counted[1]["tokens"] / counted[1]["of_tokens"] < 0.7
    assert none.metrics["sparsity"] == own.metrics["sparsity"]  # SAEBench's are of every row
    every = open_context(world, from_tokens=True, massive_norms=None)
    assert [result.remark for result in evaluation.evaluate(every, subjects, config)] == [None, None]
    held = evaluation.evaluate(open_context(world), [builder.subject(builder.make_sae())], config)
    assert [result.remark for result in held] == [None]
