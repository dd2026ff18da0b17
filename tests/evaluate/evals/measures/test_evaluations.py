"""The studies' measures as evaluations, on a tiny model and store: SAEs whose answers are known."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import Module

from saemill.cache_schema import Store
from saemill.cache_schema.sites import RESID, Site
from saemill.cache_schema.strict_json import to_json
from saemill.evaluate.context.stored_windows import mean_of_rows, ordinary_rows
from saemill.evaluate.context.write_and_read_results import frame
from saemill.evaluate.errors import ModelMissing, NotApplicable, SettingInvalid
from saemill.evaluate.evals import attention, position, temporal, tiers
from saemill.evaluate.evals.measures.assignment import Assignment, evenly_spread, groups_of, ranges_of, saved, tiers_of
from saemill.evaluate.evals.measures.attention import Explained, Pairs, choose_pairs, trace_pairs
from saemill.evaluate.evals.measures.splice_effects import Effect, Tracers
from saemill.evaluate.evals.measures.tiers import KeptTokens, tier_activity
from saemill.evaluate.model.batches import Windows, store_batches
from saemill.train.sae.gates import AbsTopK, Relu
from saemill.train.sae.model import SparseAutoencoder
from saemill.train.variants.positional import Config as Positional

CONFIGS = {
    tiers: tiers.Config(windows=12, trace_windows=8, batch_windows=5, fitted_rows=6),
    position: position.Config(windows=16, batch_windows=5, least_firings=3, probe_k=(2,), probe_tokens=6),
    temporal: temporal.Config(windows=12, batch_windows=5, least_firings=3, most_frequent=6),
    attention: attention.Config(windows=12, batch_windows=5),
}
EVERY = pytest.mark.parametrize("module", list(CONFIGS), ids=lambda module: module.__name__.rsplit(".", 1)[-1])


def identity(builder) -> SparseAutoencoder:
    """x_hat = x: a latent for each direction of the residual, and one for its opposite."""
    eye = torch.eye(builder.D)
    both = torch.cat([eye, -eye])
    return SparseAutoencoder(both.clone(), both.clone(), Relu(), centres_input=True)


def blind(builder, mean: torch.Tensor) -> SparseAutoencoder:
    """x_hat = mean, whatever x is."""
    nothing = torch.zeros(6, builder.D)
    return SparseAutoencoder(nothing, torch.eye(builder.D)[:6], Relu(), b_dec=mean.clone(), b_enc=-torch.ones(6))


def mean_of(world, layer: int) -> torch.Tensor:
    with Store.open(world.store) as store:
        return torch.as_tensor(store.moments(layer).mean, dtype=torch.float32)


def one(module, context, subject):
    (result,) = module.evaluate(context, [subject], CONFIGS[module])
    return result


@EVERY
def test_every_measure_applies_to_every_sae(module, world, builder, open_context):
    """Plain SAEs and one that saved what it trained with; together as alone, and JSON all through."""
    plain = builder.subject(builder.make_sae(seed=1), "plain")
    marked = builder.subject(builder.make_sae(k=None, seed=2), "marked")
    marked.sae.extras_tensors = {
        "tiers.membership": torch.arange(builder.F) % 2,
        "mask.range": torch.arange(builder.F) % 3 - 1,
        "temporal.group": torch.arange(builder.F) % 4,
    }
    context = open_context(world)
    together = {r.subject: r for r in module.evaluate(context, [plain, marked], CONFIGS[module])}
    for subject in (plain, marked):
        alone = one(module, context, subject)
        assert together[subject].missing is None
        assert frame(alone, "x", {})["eval_result_metrics"] == frame(together[subject], "x", {})["eval_result_metrics"]
    assert lookup(together[plain].metrics, module.EVALUATION.summary[0]) is not None


@EVERY
def test_an_sae_of_several_layers_is_measured_as_far_as_it_can_be(module, make_world, builder, open_context):
    """And takes nothing from its neighbour of one layer."""
    context = open_context(make_world(layers=(1, 2)))
    wide = builder.subject(builder.make_sae(d_in=2 * builder.D), "wide", layers=(1, 2))
    plain = builder.subject(builder.make_sae(), "plain")
    found = {result.subject: result for result in module.evaluate(context, [wide, plain], CONFIGS[module])}
    assert found[plain].metrics == one(module, context, plain).metrics
    assert lookup(found[wide].metrics, module.EVALUATION.summary[0]) is not None
    assert found[wide].missing is None  # nothing that could be had
    assert (found[wide].remark != found[plain].remark) == (module in (tiers, attention))


@EVERY
def test_an_sae_that_never_fires_has_numbers_or_none(module, world, builder, open_context):
    """As the studies' untrained baseline did: no division by nothing."""
    result = one(module, open_context(world), builder.subject(blind(builder, mean_of(world, builder.LAYER))))
    values = [value for group in result.metrics.values() for value in group.values()]
    assert values
    restored = [name for name in result.metrics.get("causal", {}) if name.startswith("restored_by_")]
    told = {name: value for group in result.metrics.values() for name, value in group.items() if name not in restored}
    assert all(math.isfinite(value) for value in told.values()), told
    if module in (position, temporal):  # numbers that are absent have a reason
        assert re.search(r"no latent (with a range )?fired \d+ times", result.remark)


def lookup(metrics, path):
    for part in path.split("."):
        metrics = metrics.get(part)
        if metrics is None:
            return None
    return metrics


def test_a_perfect_reconstruction_leaves_attention_as_it_is(world, builder, open_context):
    found = one(attention, open_context(world), builder.subject(identity(builder))).metrics["fidelity"]
    assert found["kl_true"] < 1e-4  # a float16 store of a bfloat16 model
    assert found["kl_sae"] == pytest.approx(found["kl_true"], abs=1e-5)
    assert found["score"] == pytest.approx(1.0, abs=1e-3)
    assert found["same_favourite_sae"] > 0.99
    assert found["kl_mean_ablation"] > 100 * found["kl_true"]


def test_pairs_are_the_strongest_links_and_their_weakest_alternatives():
    attended = torch.zeros(1, 5, 5)
    attended[0, 4] = torch.tensor([0.9, 0.05, 0.1, 0.4, 0.0])  # what stands at 0 is special
    attended[0, 3] = torch.tensor([0.0, 0.1, 0.3, 0.0, 0.0])
    rows = torch.tensor([[False, True, True, True, True]])
    pairs = choose_pairs(attended, rows, 3)
    assert pairs.is_pair.tolist() == [[True, True, False]]
    assert pairs.later[0, :2].tolist() == [4, 3] and pairs.most[0, :2].tolist() == [3, 2]
    assert pairs.least[0, :2].tolist() == [1, 1]


def test_a_latent_is_traced_by_what_attention_brings(world, builder, open_context):
    """What is taken out where much is attended to changes more than where little is; nothing shared, nothing traced."""
    found = one(attention, open_context(world), builder.subject(identity(builder))).metrics["tracing"]
    assert found["pairs"] > 20 and found["shared_share"] == 1.0
    assert found["change_attended"] > 1.5 * found["change_unattended"] > 0.0
    found = one(attention, open_context(world), builder.subject(blind(builder, mean_of(world, builder.LAYER)))).metrics
    assert found["tracing"]["shared_share"] == 0.0 and "change_attended" not in found["tracing"]


def test_what_attention_does_not_carry_changes_nothing(builder):
    """The layer above adds half of what stands two tokens before: a latent taken out there takes half away here."""
    subject = builder.subject(identity(builder))
    generator = torch.Generator().manual_seed(0)
    resid = 1.0 + torch.rand(2, 6, builder.D, generator=generator)
    keep = torch.ones(2, 6, dtype=torch.bool)
    batch = Windows(torch.zeros(2, 6, dtype=torch.int64), keep, keep, {subject.layer: resid})
    acts = subject.encode(batch)
    ones = torch.ones(2, 1, dtype=torch.int64)
    pairs = Pairs(5 * ones, 3 * ones, 2 * ones, ones > 0)
    found = trace_pairs(subject, batch, acts, pairs, lambda x: x + 0.5 * x.roll(2, 1)).metrics()
    latent = (acts[:, 5] * acts[:, 3]).argmax(1)
    expected = 0.5 * acts[[0, 1], 3, latent].sum() / acts[[0, 1], 5, latent].sum()
    assert found["change_attended"] == pytest.approx(float(expected), rel=1e-4)
    assert found["change_unattended"] == 0.0 and found["shared_share"] == 1.0


def test_the_mean_as_reconstruction_scores_zero(world, builder, open_context):
    subject = builder.subject(blind(builder, mean_of(world, builder.LAYER)))
    found = one(attention, open_context(world), subject).metrics["fidelity"]
    assert found["score"] == pytest.approx(0.0, abs=1e-3)


def test_attention_that_was_not_stored_is_named(make_world, builder, open_context):
    """For the SAE that needs it; the other, of the layer below, has its fidelity."""
    context = open_context(make_world(layers=(1, 2), attention_layers=(1, 2)))
    low = builder.subject(builder.make_sae(), "low", layers=(1,))
    high = builder.subject(builder.make_sae(), "high", layers=(2,))
    found = {result.subject: result for result in attention.evaluate(context, [low, high], CONFIGS[attention])}
    assert found[low].missing is None and found[low].metrics["fidelity"]
    assert found[high].missing is None  # nothing that could come: another store is another result
    assert found[high].remark == "attention fidelity needs layer 3; the store holds layers 1, 2"
    assert found[high].metrics["contribution"] and not found[high].metrics["fidelity"]


def test_above_the_last_layer_there_is_no_attention_to_ask_for(make_world, builder, open_context):
    """So that its result is complete."""
    subject = builder.subject(builder.make_sae(), layers=(4,))
    result = one(attention, open_context(make_world(layers=(4,), attention_layers=(3, 4))), subject)
    assert result.missing is None and result.remark == attention.TOP_LAYER
    assert result.metrics["contribution"] and not result.metrics["fidelity"] and not result.metrics["tracing"]


def test_a_store_without_attention_is_named(make_world, builder, open_context):
    """As `sae-harvest --attention-layers none` makes it."""
    context = open_context(make_world(attention_layers=()))
    with pytest.raises(NotApplicable, match=r"the store holds no attention: harvest again with --attention-layers"):
        one(attention, context, builder.subject(builder.make_sae()))


def test_without_the_model_the_rest_is_measured(world, builder, open_context):
    for module in (attention, tiers):
        context = open_context(world, model_name="/no/such/model")
        result = one(module, context, builder.subject(builder.make_sae(), module.__name__))
        assert result.missing is not None and "model" in result.missing
        assert result.metrics["contribution" if module is attention else "tier_activity"]
        assert not result.metrics["fidelity" if module is attention else "causal"]


def test_nothing_is_traced_on_tokens_that_are_made_up(make_world, builder, open_context):
    result = one(tiers, open_context(make_world(has_tokens=False)), builder.subject(builder.make_sae()))
    assert (
        "imported without tokens: import it into another folder with --tokens" in result.remark
        and result.missing is None
    )
    assert result.metrics["tier_activity"] and not result.metrics["causal"]


def test_the_tokenizer_of_another_model_is_not_taken(world, open_context):
    with pytest.raises(ModelMissing, match="not the one that made the store"):
        _ = open_context(world, model_name="pocket").tokenizer


def test_planted_composition_is_found(world, builder, open_context):
    """The second tier's rows are sums of two of the first's; the third's point anywhere else."""
    atoms = torch.eye(builder.D)[:6]
    sums = torch.nn.functional.normalize(atoms + atoms.roll(1, 0), dim=1)
    others = torch.eye(builder.D)[6:12]
    rows = torch.cat([atoms, sums, others])
    found = one(tiers, open_context(world), builder.subject(SparseAutoencoder(rows.clone(), rows, Relu())))
    composition = found.metrics["composition"]
    assert composition["coverage_2"] == composition["coverage_few_2"] == 1.0
    assert composition["coverage_3"] == composition["coverage_few_3"] == 0.0
    assert composition["coverage_few_chance_2"] < 0.9
    assert found.metrics["uncomposed"]["latents"] == 6
    assert {entry["tier"] for entry in found.unstructured["uncomposed"]} <= {3}
    listed = [entry for entry in found.unstructured["compositions"] if entry["tier"] == 2]
    assert listed and all(entry["r_squared"] == pytest.approx(1.0) and entry["tokens"] for entry in listed)
    for entry in listed:
        i = entry["latent"] - 6
        assert {part["latent"] for part in entry["parts"][:2]} == {i, (i - 1) % 6}
        assert [part["weight"] for part in entry["parts"][:2]] == pytest.approx([0.5**0.5] * 2, abs=1e-3)
        assert all(part["weight"] < 1e-3 for part in entry["parts"][2:])


def test_a_learned_composition_is_taken_where_it_was_saved(world, builder, open_context):
    rows = torch.eye(builder.D)[:6]
    both = torch.cat([rows[:3], torch.nn.functional.normalize(rows[:3] + rows[:3].roll(1, 0), dim=1)])
    subject = builder.subject(SparseAutoencoder(both.clone(), both, Relu()))
    learned = torch.eye(3) + torch.eye(3).roll(1, 0)
    config = tiers.Config(windows=5, trace_windows=0, tiers=2)
    roomy = torch.nn.functional.pad(learned, (0, 2, 0, 1))  # as where latents may change tiers
    for C, expected in ((learned, 1.0), (roomy, 1.0), (torch.zeros(3, 3), 0.0)):
        subject.sae.extras_tensors = {"composition.C2": C}
        (result,) = tiers.evaluate(open_context(world), [subject], config)
        assert result.metrics["composition"]["coverage_learned_2"] == expected
    subject.sae.extras_tensors = {"composition.C2": torch.zeros(2, 3)}  # of another dictionary
    (result,) = tiers.evaluate(open_context(world), [subject], config)
    assert "coverage_learned_2" not in result.metrics["composition"]


def test_causal_tracing_of_an_identity(world, builder, open_context):
    """All latents change nothing; each tier carries what the others do not."""
    found = one(tiers, open_context(world), builder.subject(identity(builder))).metrics["causal"]
    assert abs(found["kl_sae"]) < 1e-3 < found["kl_mean_ablation"]
    assert all(found[f"kl_without_{tier}"] > found["kl_sae"] for tier in (1, 2, 3))
    assert all(found[f"restored_by_{tier}"] < 1 for tier in (1, 2, 3))


def test_single_latents_are_traced(world, builder, open_context):
    """Of an identity each takes a direction away; what the third tier does is what its only latent that fires does."""
    sae = identity(builder)
    listed = one(tiers, open_context(world), builder.subject(sae)).unstructured["traced"]
    assert [entry["tier"] for entry in listed] == [1, 1, 2, 2, 3, 3]
    assert all(entry["kl_increase"] > 1e-4 and entry["tokens"] for entry in listed)
    subject = builder.subject(sae, "marked")
    membership = torch.zeros(2 * builder.D, dtype=torch.int64)
    membership[listed[0]["latent"]] = 2
    subject.sae.extras_tensors = {"tiers.membership": membership}
    found = one(tiers, open_context(world), subject)
    (alone,) = [entry for entry in found.unstructured["traced"] if entry["tier"] == 3]
    causal = found.metrics["causal"]
    assert alone["latent"] == listed[0]["latent"]
    assert alone["kl_increase"] == pytest.approx(causal["kl_without_3"] - causal["kl_sae"])
    assert alone["loss_increase"] == pytest.approx(causal["loss_increase_without_3"])


def test_a_tier_with_nothing_in_it_does_nothing(world, builder, open_context):
    subject = builder.subject(identity(builder))
    membership = torch.zeros(2 * builder.D, dtype=torch.int64)
    membership[0] = 2
    subject.sae.extras_tensors = {"tiers.membership": membership}
    found = one(tiers, open_context(world), subject).metrics
    assert found["causal"]["kl_without_2"] == pytest.approx(found["causal"]["kl_sae"])
    assert found["tier_activity"]["latents_2"] == 0


def test_an_sae_has_the_tiers_that_it_was_saved_with(world, builder, open_context):
    """Three is for SAEs without: a third one of zeros would stand in the tables beside real ones."""
    subject = builder.subject(identity(builder))
    for count in (1, 2):
        subject.sae.extras_tensors = {"tiers.membership": torch.arange(2 * builder.D) % count}
        found = one(tiers, open_context(world), subject).metrics
        ends = {name.rpartition("_")[2] for group in found.values() for name in group}
        assert {int(end) for end in ends if end.isdigit()} == set(range(1, count + 1))
        if count == 1:
            assert found["causal"]["restored_by_1"] == pytest.approx(1.0)


def test_effects_are_those_of_the_whole_model(world, builder, open_context):
    """KL and loss of a spliced reconstruction, and of the store's mean, against a plain forward of all layers."""
    context, subject = open_context(world), builder.subject(builder.make_sae())
    (batch,) = list(tiers.read_windows(context, [subject], "t", 4, 4))
    tracer = Tracers(context, [subject]).of(batch)[builder.LAYER]
    _, x_hat = subject.reconstruct(batch)
    found = {**tracer.baselines, **tracer.effects({"sae": lambda: x_hat})}
    clean = predictions(context.model, batch)
    for name, resid in {"sae": x_hat, "mean": mean_of(world, builder.LAYER).expand_as(x_hat)}.items():
        spliced = predictions(context.model, batch, resid, builder.LAYER)
        kl = (clean.exp() * (clean - spliced)).sum(-1)[batch.keep].mean()
        loss = -spliced[:, :-1].gather(2, batch.tokens[:, 1:, None]).squeeze(2)[batch.keep[:, :-1]].mean()
        assert found[name].kl == pytest.approx(float(kl), rel=1e-4)
        assert found[name].loss == pytest.approx(float(loss), rel=1e-5)
    assert found["clean"].kl == 0.0


def test_massive_rows_keep_theirs_and_do_not_count(make_world, builder, open_context):
    context, subject = open_context(make_world(massive=[(21, 3)])), builder.subject(builder.make_sae())
    (batch,) = list(tiers.read_windows(context, [subject], "t", 4, 4))
    rows, mean = ordinary_rows(context, subject, batch), mean_of_rows(context, builder.LAYER).float()
    assert int(batch.keep.sum() - rows.sum()) == 1
    tracer = Tracers(context, [subject]).of(batch)[builder.LAYER]
    _, x_hat = subject.reconstruct(batch)
    other = torch.where(rows[..., None], x_hat, 9.0)
    found = tracer.effects({"sae": lambda: x_hat, "other": lambda: other, "mean": lambda: mean.expand_as(x_hat)})
    assert found["sae"] == found["other"] and found["sae"].tokens == int(rows.sum())
    assert found["mean"] == tracer.baselines["mean"]


def predictions(model, batch, resid=None, layer=0):
    """Log-probabilities [W, T, V] of the whole model, with another residual behind a layer."""
    keep = batch.keep[:, :, None]
    put = {} if resid is None else {Site(RESID, layer): lambda own: torch.where(keep, resid.to(own.dtype), own)}
    with model.tapped(put):
        logits = model.head(model.hidden(batch.tokens).flatten(0, 1)).float()
    return logits.log_softmax(-1).view(*batch.tokens.shape, -1)


def test_what_a_tier_carries_is_what_is_lost_without_it():
    """By hand: (KL, loss) of each intervention, over one token."""
    told = {"clean": (0, 2), "mean": (8, 9), "all": (1, 3), "without_1": (6, 7), "only_1": (3, 5)}
    told |= {"without_2": (2, 3.5), "only_2": (7, 8), "without_uncomposed": (1.25, 3.125)}
    effects = {name: Effect(float(kl), float(loss), 1, 1) for name, (kl, loss) in told.items()}
    assert tiers.causal(effects, 2) == {
        "kl_sae": 1.0,
        "kl_mean_ablation": 8.0,
        "loss_clean": 2.0,
        "kl_without_1": 6.0,
        "loss_increase_without_1": 4.0,
        "restored_by_1": pytest.approx(5 / 7),
        "kl_without_2": 2.0,
        "loss_increase_without_2": 0.5,
        "restored_by_2": pytest.approx(1 / 7),
    }
    activity = tier_activity(torch.tensor([[3.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 1]), 2)
    seen = tiers.Seen(Assignment(torch.tensor([0, 1]), 2, "saved"), torch.tensor([torch.nan, 0.4]))
    seen.activity += activity
    assert tiers.uncomposed(seen, effects) == {
        "latents": 1,
        "l0": 1.0,
        "mass_share": pytest.approx(0.5),
        "loss_carried": 0.125,
        "kl_carried": 0.25,
    }


def test_the_favourites_that_stay_are_counted():
    """Two heads, three queries of which one is left out; the second head's last query looks elsewhere."""
    stored = torch.tensor([[[1.0, 0, 0], [0.4, 0.6, 0], [0.2, 0.3, 0.5]]] * 2)[None]
    found = stored.clone()
    found[0, 1, 2] = torch.tensor([0.5, 0.3, 0.2])
    found[0, :, 0] = torch.tensor([0.0, 0, 1])
    seen = attention.Seen(Explained.none(1))
    seen.compare("sae", stored, found, torch.tensor([[False, True, True]]))
    assert seen.agreement == {"sae": 3.0}
    assert seen.divergence["sae"] == pytest.approx(0.2 * math.log(0.2 / 0.5) + 0.5 * math.log(0.5 / 0.2), rel=1e-5)


def test_words_are_counted_over_the_batches_in_which_they_were_read(world, open_context):
    """By the kept tokens: what is left out takes no number."""
    context = open_context(world, model_name="/no/such/model")
    words, kept = KeptTokens(context), []
    for batch in store_batches(context.store, "test", batch_windows=7):
        words.read(batch)
        kept += batch.tokens[batch.keep].tolist()
    assert len(kept) == int((world.tokens[20:] > 2).sum())
    assert [words.token(number) for number in range(len(kept))] == [f"<{token}>" for token in kept]


def test_a_code_that_never_changes_has_no_temporal_score(world, builder, open_context):
    """And a scale that no window is long enough for has no number, and says why."""
    nothing = torch.zeros(4, builder.D)
    steady = SparseAutoencoder(nothing, torch.eye(builder.D)[:4], Relu(), b_enc=torch.ones(4))
    result = one(temporal, open_context(world), builder.subject(steady))
    found = result.metrics
    assert found["consistency"]["cosine_short"] == pytest.approx(1.0, abs=1e-5)
    assert found["consistency"]["tcs_short"] == pytest.approx(0.0, abs=1e-5)
    assert found["stability"]["fsm_mean"] == pytest.approx(1.0)
    assert found["stability"]["lifetime_mean"] > 3
    assert "tcs_long" not in found["consistency"]
    assert result.remark == "no numbers for long lags: no two tokens of one window and document are 17 apart"


def test_masks_that_were_trained_are_taken(world, builder, open_context):
    subject = builder.subject(builder.make_sae(k=None))
    subject.sae.extras_tensors = {"mask.range": torch.full((builder.F,), -1), "mask.num_ranges": torch.tensor(3)}
    result = one(position, open_context(world), subject)
    assert result.unstructured == {"ranges": "saved"}
    assert result.metrics["specialisation"]["bound"] == 0
    assert result.metrics["specialisation"]["chance"] == pytest.approx(1 / 3)
    plain = one(position, open_context(world), builder.subject(builder.make_sae(k=None), "plain"))
    assert plain.unstructured == {"ranges": "static slicing"}
    assert 0 < plain.metrics["specialisation"]["retention"] < 1


def test_static_slicing_does_not_look_at_what_it_is_measured_on(world, builder, open_context):
    """Ranges come from validation windows; chosen on the test windows themselves they would look better."""
    context, subject = open_context(world), builder.subject(builder.make_sae(k=None))
    config = position.Config(windows=99, batch_windows=5, probe_k=(), least_firings=1)
    (result,) = position.evaluate(context, [subject], config)
    before, after = (
        position.profiles(context, [subject], "p", config, split)[0][subject] for split in ("validation", "test")
    )
    honest, flattering = (
        float(position.retention(after, position.assign_ranges(seen, 4), 4)[after.firings > 0].mean())
        for seen in (before, after)
    )
    assert result.metrics["specialisation"]["retention"] == pytest.approx(honest)
    assert flattering > honest


def test_without_validation_windows_only_saes_that_have_ranges_are_measured(make_world, builder, open_context):
    context = open_context(make_world(splits=(20, 20)))
    plain, masked = (builder.subject(builder.make_sae(k=None), name) for name in ("plain", "masked"))
    masked.sae.extras_tensors = {"mask.range": torch.full((builder.F,), -1), "mask.num_ranges": torch.tensor(3)}
    refused, measured = position.evaluate(context, [plain, masked], CONFIGS[position])
    assert refused.subject is plain and "validation split has no windows" in str(refused.error)
    assert measured.subject is masked and measured.metrics["order"]


def drawn(context, subject, config):
    samples = position.make_samples([subject], config)
    position.profiles(context, [subject], "p", config, "test", samples)
    (sample,) = samples.values()
    return sample


def test_order_probes_see_no_special_token(world, builder, open_context):
    """However many tokens are asked for: position 0 is BOS, and would give its range away."""
    context, subject = open_context(world), builder.subject(builder.make_sae(k=None))
    sample = drawn(context, subject, position.Config(windows=16, probe_tokens=builder.CONTEXT, probe_k=()))
    positions, seen = torch.cat(sample.positions), sum(sample.sides())
    special = torch.isin(world.tokens[20:36], torch.tensor([0, 1, 2])).gather(1, positions)
    assert special.any() and torch.equal(seen.bool(), ~special)


def test_order_probes_see_no_massive_row(make_world, builder, open_context):
    """Nor does an SAE of another layer, in which other rows are massive, change what a probe sees."""
    massive = [(window, 3) for window in range(20, 36)]
    context = open_context(make_world(massive=massive, layers=(1, 2)))
    subject = builder.subject(builder.make_sae(k=None))
    config = position.Config(windows=16, probe_tokens=builder.CONTEXT, probe_k=(2,))
    sample = drawn(context, subject, config)
    seen = sum(sample.sides()).bool()
    assert seen.any() and (torch.cat(sample.positions) == 3).any()
    assert not (torch.cat(sample.positions)[seen] == 3).any()
    wide = builder.subject(builder.make_sae(d_in=2 * builder.D), "wide", layers=(1, 2))
    found = {result.subject: result for result in position.evaluate(context, [wide, subject], config)}
    (alone,) = position.evaluate(context, [subject], config)
    assert found[subject].metrics == alone.metrics


def test_what_order_probes_wait_for_is_kept_sparse(world, builder, open_context):
    context, subject = open_context(world), builder.subject(builder.make_sae(width=64, k=2))
    config = position.Config(windows=16, batch_windows=5, probe_tokens=6, probe_k=(2,))
    sample = drawn(context, subject, config)
    assert all(part.is_sparse and part.device.type == "cpu" for part in sample.rows[subject])
    assert sum(part._nnz() for part in sample.rows[subject]) <= 2 * 16 * 6
    (batch,) = list(tiers.read_windows(context, [subject], "t", 16, 16))
    place = torch.cat(sample.positions)[:, :, None].expand(-1, -1, 64)
    assert torch.allclose(sample.of(subject), subject.encode(batch).gather(1, place), atol=1e-6)


@pytest.mark.parametrize(("length", "windows"), [(5, [10, 11, 12, 13, 14, 15]), (40, [])])
def test_no_document_is_on_both_sides_of_a_probe(length, windows, make_world, builder, open_context):
    """Test windows 20..35, halves of eight: documents of five windows begin at 20, 25, 30 and 35."""
    documents = np.repeat(np.arange(40) // length, builder.CONTEXT).reshape(40, builder.CONTEXT)
    context, subject = open_context(make_world(documents=documents)), builder.subject(builder.make_sae(k=None))
    config = position.Config(windows=16, batch_windows=5, probe_tokens=6, probe_k=(2,))
    train, test = drawn(context, subject, config).sides()
    assert train.any(1).nonzero().view(-1).tolist() == list(range(8))
    assert test.any(1).nonzero().view(-1).tolist() == windows
    (result,) = position.evaluate(context, [subject], config)
    assert bool(result.metrics["order"]) == bool(windows) == (result.remark is None)


def test_order_probes_say_of_how_many_latents_they_are_and_how_many_had_not_converged(
    world, builder, open_context, monkeypatch
):
    context, subjects = open_context(world), [builder.subject(builder.make_sae(seed=n), f"sae_{n}") for n in (1, 2)]
    monkeypatch.setattr("saemill.evaluate.evals.measures.position.ITERATIONS", 1)
    config = replace(CONFIGS[position], probe_k=(2, 500))
    for result in position.evaluate(context, subjects, config):  # of each SAE and of the residual that both read
        assert result.remark == "k 500: the SAE has 24 latents; 6 of 6 probes had not converged"


def test_pairs_of_an_order_probe_lie_in_one_document():
    kept = torch.tensor([[True, True, True, True, False, True]])  # pairs of places 0 and 3, 1 and 4, 2 and 5
    documents = torch.tensor([[7, 7, 7, 8, 7, 7]])
    assert position.in_pairs(kept, documents).tolist() == [[False, False, True]]


def test_a_split_without_windows_is_not_applicable(make_world, builder, open_context):
    world = make_world(splits=(20, 40))
    with pytest.raises(NotApplicable, match="test split has no windows"):
        one(temporal, open_context(world), builder.subject(builder.make_sae()))


@pytest.mark.parametrize("module", [attention, position, temporal, tiers])
def test_a_number_of_windows_that_is_none_is_the_settings_fault(module, world, builder, open_context):
    config, subject = replace(CONFIGS[module], windows=0), builder.subject(builder.make_sae())
    with pytest.raises(SettingInvalid, match="windows: expected at least 1 to be read, found 0"):
        list(module.evaluate(open_context(world), [subject], config))


@pytest.mark.parametrize(
    ("settings", "source"),
    [
        ({}, "saved"),
        ({"mask": "soft"}, "saved"),
        ({"scattered": True}, "saved, found in training"),
        ({"mask": "static_slicing"}, "saved, found in training"),
        ({"mask": "none", "range_encoders": True}, "saved, found in training"),
    ],
)
def test_ranges_say_whether_a_mask_had_them_or_training_found_them(settings, source, builder):
    config = Positional(base="topk", k=2, width=builder.F, ranges=2, context=builder.CONTEXT, **settings)
    extras = config.build(builder.D).extras
    assert extras["mask"].measured == source.endswith("found in training")
    subject = builder.subject(builder.make_sae(), config=to_json(config))
    subject.sae.extras_tensors = {f"mask.{name}": value for name, value in extras["mask"].state_dict().items()}
    found = ranges_of(subject, 2, builder.CONTEXT)
    assert found is not None and found.source == source


def test_fewer_than_no_windows_to_trace_are_none(world, builder, open_context):
    config, subject = replace(CONFIGS[tiers], trace_windows=-1), builder.subject(builder.make_sae())
    (result,) = tiers.evaluate(open_context(world, model_name="/no/such/model"), [subject], config)
    assert result.metrics["causal"] == {} and result.missing is None  # nor is the model asked for


def test_an_assignment_is_found_beside_the_weights_or_in_the_module(builder):
    subject = builder.subject(builder.make_sae())
    assert tiers_of(subject, 3).source == groups_of(subject, 4).source == "equal shares"
    assert saved(subject, "mask.centre") is None and ranges_of(subject, 4, 12) is None
    subject.sae.mask = torch.nn.Module()
    subject.sae.mask.centre = torch.nn.Parameter(torch.linspace(0, 11, builder.F))
    found = ranges_of(subject, 4, 12)
    assert found is not None and found.source == "saved centres"
    assert (found.of_latent.diff() >= 0).all() and set(found.of_latent.tolist()) == {0, 1, 2, 3}
    subject.sae.extras_tensors = {"tiers.membership": torch.arange(builder.F) // 6}
    assert tiers_of(subject, 3).count == tiers_of(subject, 9).count == 4
    subject.sae.extras_tensors = {"temporal.group": torch.arange(builder.F) % 2}
    assert groups_of(subject, 4).count == 4  # each has its scale


@pytest.mark.parametrize(("module", "name"), [(tiers, "tiers.membership"), (temporal, "temporal.group")])
def test_a_latent_and_its_opposite_of_a_signed_sae_belong_together(module, name, world, builder, open_context):
    sae = builder.make_sae()
    sae.gate = AbsTopK(4)
    part, _, tensor = name.partition(".")
    sae.extras[part] = Module()
    sae.extras[part].register_buffer(tensor, torch.arange(builder.F) % 3)
    sae.extras[part].register_buffer("of_pairs", torch.eye(4))
    subject = builder.subject(sae)
    assert saved(subject, name).tolist() == 2 * (torch.arange(builder.F) % 3).tolist()
    assert saved(subject, f"{part}.of_pairs") is None
    assert one(module, open_context(world), subject).metrics


def test_some_of_many_are_spread_evenly():
    marked = torch.ones(100, dtype=torch.bool)
    assert evenly_spread(marked, 5).tolist() == [0, 24, 49, 74, 99]
    assert evenly_spread(torch.tensor([True, False, True]), 5).tolist() == [0, 2]


def test_a_wide_sae_gets_small_batches(world, builder, open_context, monkeypatch):
    subject = builder.subject(builder.make_sae())
    monkeypatch.setattr("saemill.evaluate.context.loaded_sae.MOST_CODES", 2 * builder.CONTEXT * builder.F)
    sizes = [len(batch) for batch in tiers.read_windows(open_context(world), [subject], "t", 7, 5)]
    assert sizes == [2, 2, 2, 1]


def test_special_tokens_keep_their_residual(world, builder, open_context):
    """What an SAE makes of the attention sink is nobody's business."""
    context, subject, seen = open_context(world), builder.subject(builder.make_sae()), attention.Seen(Explained.none(1))
    layers = (builder.LAYER + 1,)
    (batch,) = list(tiers.read_windows(context, [subject], "t", 4, 4, attention_layers=layers))
    x_hat = torch.where(batch.keep[:, :, None], batch.x(subject.layers), 99.0)
    given, rows = {"sae": x_hat}, ordinary_rows(context, subject, batch)
    attention.compare_attention(
        context, subject, batch, rows, given, attention.dense_rows(batch.attention[layers[0]]), seen
    )
    assert seen.divergence["sae"] == seen.divergence["true"] < seen.divergence["zero_ablation"]
