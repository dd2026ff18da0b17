"""The core evaluation where the truth is known: identity and zero SAEs, a uniform model, planted numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from saemill.cache_schema import Store
from saemill.evaluate.context.write_and_read_results import without_nan
from saemill.evaluate.errors import DataMissing, SettingInvalid
from saemill.evaluate.evals.core import bootstrap, choose_rows
from saemill.evaluate.evals.core import evaluation as core
from saemill.evaluate.evals.core.clean_and_spliced_losses import LossSums
from saemill.evaluate.evals.core.saebench_keys import LOSS_STATISTICS, against, official_losses
from saemill.evaluate.model.batches import store_batches
from saemill.train.sae.gates import Relu
from saemill.train.sae.model import SparseAutoencoder

SMALL = core.Config(batch_size_prompts=4, resamples=50)


def run(context, subjects, config=SMALL):
    return {result.subject.label: result for result in core.evaluate(context, subjects, config)}


def identity(width):
    """Each direction and its opposite: relu(x) - relu(-x) = x."""
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    return SparseAutoencoder(both.clone(), both.clone(), Relu(), centres_input=False)


def nothing(width, mean):
    """Never fires: its reconstruction is its bias."""
    rows = torch.eye(width)
    return SparseAutoencoder(rows.clone(), rows.clone(), Relu(), b_dec=mean, b_enc=torch.full((width,), -1e6))


def store_mean(world, layer):
    with Store.open(world.store) as store:
        return torch.from_numpy(store.moments(layer).mean).float()


def test_an_identity_scores_one(world, open_context, builder):
    context = open_context(world)
    result = run(context, [builder.subject(identity(builder.D))])["sae"]
    assert result.metrics["model_performance_preservation"]["ce_loss_score"] == 1.0
    assert result.metrics["model_behavior_preservation"]["kl_div_score"] == 1.0
    assert result.metrics["model_behavior_preservation"]["kl_div_with_sae"] == 0.0
    assert result.metrics["reconstruction_quality"]["cossim"] == pytest.approx(1.0, abs=1e-6)
    assert result.extra["saemill_metrics"]["explained_variance"] == pytest.approx(1.0, abs=1e-9)


def test_a_zero_sae_scores_nothing_against_mean_ablation(world, open_context, builder):
    context = open_context(world)
    zero = nothing(builder.D, store_mean(world, builder.LAYER))
    result = run(context, [builder.subject(zero)])["sae"]
    against = result.extra["saemill_metrics"]["ablations"]
    assert against["mean"]["ce_loss_score"] == 0.0
    assert against["mean"]["kl_div_score"] == 0.0
    assert against["resample"]["ce_loss"] != against["mean"]["ce_loss"] != against["zero"]["ce_loss"]
    assert result.metrics["sparsity"]["l0"] == 0.0


def test_a_reconstruction_of_zeros_has_no_cosine(world, open_context, builder):
    result = run(open_context(world), [builder.subject(nothing(builder.D, torch.zeros(builder.D)))])["sae"]
    assert math.isnan(result.metrics["reconstruction_quality"]["cossim"])
    assert without_nan(result.metrics, -1)["reconstruction_quality"]["cossim"] == -1


def test_a_broken_sae_has_no_losses(world, open_context, builder, monkeypatch):
    """One latent writes no numbers: where it fires there is no loss, and none is better than the clean model's."""
    monkeypatch.setattr(bootstrap, "FEWEST", 2)
    sae = builder.make_sae()
    sae.W_dec.data[3] = torch.nan
    result = run(open_context(world), [builder.subject(sae)])["sae"]
    whole, ours = without_nan(result.metrics, -1), result.extra["saemill_metrics"]
    losses = whole["model_performance_preservation"] | whole["model_behavior_preservation"]
    assert losses["ce_loss_with_sae"] == losses["ce_loss_score"] == losses["kl_div_with_sae"] == -1
    assert losses["ce_loss_without_sae"] > 0
    assert {name for name, found in ours["confidence_95"].items() if found} == {"l0"}
    for found in (ours["massive_kept"], *ours["ablations"].values()):
        assert math.isnan(found["ce_loss_score"]) and math.isnan(found["kl_div_score"])


def test_zero_ablation_leaves_a_gemma_with_every_token_equally_likely(world, open_context, builder):
    result = run(open_context(world), [builder.subject(builder.make_sae())])["sae"]
    assert result.metrics["model_performance_preservation"]["ce_loss_with_ablation"] == pytest.approx(
        math.log(builder.VOCAB), rel=1e-6
    )


def test_weights_are_a_stage_of_their_own(world, open_context, builder, monkeypatch):
    """On a CPU they can take longer than all text."""
    context, stages = open_context(world), []
    stage = context.watch.stage
    monkeypatch.setattr(context.watch, "stage", lambda *about: stages.append(about) or stage(*about))
    run(context, [builder.subject(builder.make_sae())])
    assert stages[-1] == ("core, weights of sae", builder.F * (builder.F - 1), "pairs")


def test_several_saes_get_the_numbers_they_get_alone(world, open_context, builder):
    subjects = [builder.subject(builder.make_sae(seed=seed), f"sae{seed}") for seed in range(3)]
    together = run(open_context(world), subjects)
    for subject in subjects:
        alone = run(open_context(world), [subject])[subject.label]
        assert alone.metrics == together[subject.label].metrics
        assert alone.details == together[subject.label].details


def test_from_tokens_and_from_the_store_agree_to_the_bit(world, open_context, builder):
    """In the store's dtype the stored residual is what the model computes."""
    subject = builder.subject(builder.make_sae())
    stored = run(open_context(world), [subject])["sae"]
    whole = run(open_context(world, from_tokens=True), [subject])["sae"]
    assert stored.metrics == whole.metrics
    assert stored.details == whole.details
    assert stored.extra == whole.extra


def test_the_suffix_is_the_rest_of_the_model_to_the_bit(world, open_context, builder):
    context = open_context(world)
    model = context.model
    for batch in store_batches(context.store, "test", (builder.LAYER,), batch_windows=5):
        whole = model.hidden(batch.tokens)
        assert torch.equal(model.suffix(batch.resid[builder.LAYER], builder.LAYER), whole)


def test_numbers_agree_with_a_slow_reading_of_the_definitions(world, open_context, builder):
    """Everything in one piece, from whole logits."""
    context = open_context(world)
    model, subject = context.model, builder.subject(builder.make_sae())
    config = core.Config(4, 2, 3, resamples=10)
    result = run(context, [subject], config)["sae"]
    batches = list(store_batches(context.store, "test", (builder.LAYER,), batch_windows=4))
    ce, kl, clean_ce = [], [], []
    for batch in batches[:2]:
        keep = batch.keep
        resid = batch.resid[builder.LAYER]
        x_hat = subject.reconstruct(batch)[1].to(resid.dtype)
        logits = [
            model.head(model.suffix(r, builder.LAYER).flatten(0, 1)).unflatten(0, keep.shape).float()
            for r in (resid, torch.where(keep[..., None], x_hat, resid))
        ]
        logp, logq = (x.log_softmax(-1) for x in logits)
        kl.append((logp.exp() * (logp - logq)).sum(-1)[keep])
        for found, x in ((clean_ce, logp), (ce, logq)):
            found.append(-x[:, :-1].gather(2, batch.tokens[:, 1:, None])[..., 0][keep[:, :-1]])
    preserved = result.metrics["model_performance_preservation"]
    assert preserved["ce_loss_with_sae"] == pytest.approx(float(torch.cat(ce).mean()), rel=1e-5)
    assert preserved["ce_loss_without_sae"] == pytest.approx(float(torch.cat(clean_ce).mean()), rel=1e-5)
    assert result.metrics["model_behavior_preservation"]["kl_div_with_sae"] == pytest.approx(
        float(torch.cat(kl).mean()), rel=1e-5
    )
    x = torch.cat([b.x((builder.LAYER,))[b.keep] for b in batches[2:5]]).double()
    r = torch.cat([subject.reconstruct(b)[1][b.keep] for b in batches[2:5]]).double()
    centred = 1 - (x - r).square().sum() / (x - x.mean(0)).square().sum()
    assert result.extra["saemill_metrics"]["explained_variance"] == pytest.approx(float(centred), rel=1e-6)


def test_the_blocks_of_rows_follow_each_other(world, open_context, builder, monkeypatch):
    """What is measured for the losses is not measured for sparsity."""
    read = []

    def watched(*args):
        for batch in store_batches(*args):
            read.append([(world.tokens == row).all(1).nonzero().item() for row in batch.tokens])
            yield batch

    monkeypatch.setattr(choose_rows, "store_batches", watched)
    context = open_context(world)
    result = run(context, [builder.subject(builder.make_sae())], core.Config(4, 1, 3))["sae"]
    first = context.manifest.splits["test"][0]
    sparsity, losses = [[*range(first + 4 * n, first + 4 * n + 4)] for n in (1, 2, 3)], [[*range(first, first + 4)]]
    assert read == [*sparsity, *losses]
    assert result.metrics["token_stats"] == {
        "total_tokens_eval_reconstruction": 4 * builder.CONTEXT,
        "total_tokens_eval_sparsity_variance": 12 * builder.CONTEXT,
    }
    assert result.eval_config["n_eval_reconstruction_batches"] == 1


def test_confidence_intervals_hold_the_estimate(world, open_context, builder, monkeypatch):
    monkeypatch.setattr(bootstrap, "FEWEST", 2)
    result = run(open_context(world), [builder.subject(builder.make_sae())], core.Config(4, resamples=500))["sae"]
    ours = result.extra["saemill_metrics"]
    estimates = {
        **result.metrics["model_performance_preservation"],
        **result.metrics["model_behavior_preservation"],
        "explained_variance": ours["explained_variance"],
        "cossim": result.metrics["reconstruction_quality"]["cossim"],
    }
    for name in ("ce_loss_with_sae", "kl_div_with_sae", "kl_div_score", "explained_variance", "cossim"):
        low, high = ours["confidence_95"][name]
        assert low < estimates[name] < high, name


def test_without_resamples_there_are_no_intervals(world, open_context, builder):
    config = core.Config(4, 1, 2, resamples=0, ablations=("zero",))
    result = run(open_context(world), [builder.subject(builder.make_sae())], config)["sae"]
    ours = result.extra["saemill_metrics"]
    assert set(ours["confidence_95"].values()) == {None} and ours["explained_variance"] > 0


@pytest.mark.parametrize("config", [core.Config(batch_size_prompts=0), core.Config(resamples=-1)])
def test_what_makes_no_sense_is_said_before_any_work(config):
    with pytest.raises(SettingInvalid, match=r"(batch_size_prompts|resamples): expected .*, found (0|-1)"):
        core.EVALUATION.require(config)


def test_scores_have_one_formula():
    """What intervals are drawn around, what stands under SAEBench's keys, and what stands against each ablation."""
    sums = {"tokens": 8.0, "predicting": 4.0, "ce_clean": 8.0, "ce_sae": 12.0, "ce_zero": 40.0}
    sums |= {"kl_sae": 4.0, "kl_zero": 64.0}
    ours = against(sums, "zero")
    assert ours == {"ce_loss": 10.0, "kl_div": 8.0, "ce_loss_score": 0.875, "kl_div_score": 0.9375}
    found = {name: statistic(sums) for name, statistic in LOSS_STATISTICS.items()}
    assert found == {"ce_loss_with_sae": 3.0, "kl_div_with_sae": 0.5, "ce_loss_score": 0.875, "kl_div_score": 0.9375}
    losses = LossSums(published={"zero": 64.0, "sae": 4.0})
    losses.documents.add(np.zeros(1, np.int64), {name: np.array([value]) for name, value in sums.items()})
    assert official_losses(losses) == {
        "model_behavior_preservation": {"kl_div_score": 0.9375, "kl_div_with_ablation": 8.0, "kl_div_with_sae": 0.5},
        "model_performance_preservation": {
            "ce_loss_score": 0.875,
            "ce_loss_with_ablation": 10.0,
            "ce_loss_with_sae": 3.0,
            "ce_loss_without_sae": 2.0,
        },
    }


def test_without_the_model_the_rest_is_measured(make_world, open_context, builder):
    world = make_world(model_id="nobody/has-this")
    result = run(open_context(world), [builder.subject(builder.make_sae())])["sae"]
    assert result.missing is not None
    assert "nobody/has-this" in result.missing
    assert math.isnan(result.metrics["model_performance_preservation"]["ce_loss_score"])
    assert result.eval_config["compute_kl"] is False
    assert result.metrics["sparsity"]["l0"] > 0
    assert "ablations" not in result.extra["saemill_metrics"]


def test_tokens_that_are_made_up_are_not_run(make_world, open_context, builder):
    world, subject = make_world(has_tokens=False), builder.subject(builder.make_sae())
    result = run(open_context(world), [subject])["sae"]
    assert "imported without tokens" in result.remark and result.metrics["sparsity"]["l0"] > 0
    assert result.missing is None  # nothing that could come: a store with them is another one
    with pytest.raises(DataMissing, match="with --cache, or leave out --from-tokens"):
        run(open_context(world, from_tokens=True), [subject])


def test_a_crosscoder_has_sparsity_and_no_losses(make_world, open_context, builder):
    world = make_world(layers=(1, 2))
    sae = builder.make_sae(d_in=2 * builder.D)
    result = run(open_context(world), [builder.subject(sae, layers=(1, 2))])["sae"]
    assert result.missing is None
    assert "writes layers [1, 2]" in result.remark
    assert result.metrics["sparsity"]["l0"] == 4.0


def test_what_goes_past_the_latents_is_spliced_too(world, open_context, builder):
    """No latent fires, and the skip is the identity."""
    sae = nothing(builder.D, torch.zeros(builder.D))
    sae.W_skip = torch.nn.Parameter(torch.eye(builder.D))
    plain, other = (builder.subject(sae, name) for name in ("plain", "other"))
    other.sae.is_plain = False  # as with a gate of the user's own: encoded and decoded as a whole
    results = run(open_context(world), [plain, other])
    for result in results.values():
        assert result.metrics["model_performance_preservation"]["ce_loss_score"] == 1.0
        assert result.extra["saemill_metrics"]["explained_variance"] == 1.0
        assert result.metrics["sparsity"]["l0"] == 0.0


def test_a_transcoder_is_spliced_where_it_writes(make_world, open_context, builder):
    """One that reads layer 1 and gives back the bias is a zero SAE at layer 2."""
    world = make_world(layers=(1, 2))
    mean = store_mean(world, 2)
    rows = torch.eye(builder.D)
    zero = SparseAutoencoder(
        rows.clone(), rows.clone(), Relu(), b_dec=mean, b_enc=torch.full((builder.D,), -1e6), centres_input=False
    )
    subject = builder.subject(zero, layers=(1,), target_layers=[2])
    result = run(open_context(world), [subject])["sae"]
    assert result.extra["saemill_metrics"]["ablations"]["mean"]["ce_loss_score"] == 0.0
    expected = np.linalg.norm(mean)
    assert result.metrics["shrinkage"]["l2_norm_out"] == pytest.approx(expected, rel=1e-5)
