"""replacement: SAEs whose cost is known beforehand, on every hook; a transcoder against transformers' own model."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Gemma2ForCausalLM

from saemill.cache_schema.sites import Site
from saemill.evaluate.errors import DataMissing
from saemill.evaluate.evals import replacement
from saemill.evaluate.evals.evaluation_contract import Failure

HOOKS = ("resid", "mlp_in", "mlp_out", "attn_out", "q", "k", "z")
WIDTHS = {"k": 8}


def exact_sae(builder, width, scale=1.0):
    """Each channel's positive and negative part: rebuilds `scale` times what it reads."""
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    return builder.make_sae(k=None, W_enc=both.clone(), W_dec=scale * both, b_enc=torch.zeros(2 * width))


def measure(context, *subjects, **settings):
    found = list(replacement.evaluate(context, subjects, replacement.Config(**{"batch_windows": 8, **settings})))
    return {item.subject.label: item if isinstance(item, Failure) else item.metrics["replacement"] for item in found}


@pytest.mark.parametrize("hook", HOOKS)
def test_an_exact_sae_costs_nothing_and_an_empty_one_what_skipping_costs(world, builder, open_context, hook):
    width, place = WIDTHS.get(hook, builder.D), {"hook": hook, "target_hook": hook}
    subjects = [builder.subject(exact_sae(builder, width, scale), f"{scale}", **place) for scale in (1.0, 0.0)]
    context = open_context(world, massive_norms=None)
    exact, empty = measure(context, *subjects).values()
    assert exact["explained_variance"] == pytest.approx(1)
    assert exact["kl_replaced"] == pytest.approx(0, abs=1e-3 * exact["kl_skipped"])
    assert exact["ce_score"] == pytest.approx(1) and exact["kl_score"] == pytest.approx(1)
    assert empty["kl_replaced"] == empty["kl_skipped"] == exact["kl_skipped"] > 1e-3
    assert empty["ce_replaced"] == empty["ce_skipped"] and empty["kl_score"] == 0
    assert exact["ce_clean"] == empty["ce_clean"] != exact["ce_skipped"]
    assert exact["tokens"] == int((world.tokens[20:] > 2).sum())
    assert 0 < exact["l0"] <= width


def test_a_transcoder_stands_for_the_mlp(world, builder, open_context):
    """Its loss is that of transformers' model whose MLP gives what the transcoder gives."""
    sae = builder.make_sae(k=4)
    subject = builder.subject(sae, "transcoder", hook="mlp_in", target_hook="mlp_out")
    (found,) = measure(open_context(world, massive_norms=None), subject).values()
    model, tokens, read = Gemma2ForCausalLM.from_pretrained(world.model, dtype=torch.bfloat16), world.tokens[20:], []
    layer = model.model.layers[builder.LAYER]
    layer.mlp.register_forward_pre_hook(lambda _, args: read.append(args[0].float()))

    def instead(_module, _args, output):
        kept = (tokens > 2)[..., None]
        return torch.where(kept, sae.decode(sae.encode(read[-1].flatten(0, 1))).view_as(output).to(output), output)

    layer.post_feedforward_layernorm.register_forward_hook(instead)
    with torch.inference_mode():
        logits = model(tokens).logits.float()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    predicts = (tokens > 2)[:, :-1]
    assert found["ce_replaced"] == pytest.approx(float(losses[predicts].mean()), rel=2e-3)
    assert found["kl_skipped"] > 0 and found["ce_replaced"] != found["ce_skipped"]


def test_several_layers_are_replaced_at_once(world, builder, open_context):
    """An exact one costs nothing, an empty one what skipping all costs, which is more than skipping either."""
    both = {"layers": (1, 3), "target_layers": [1, 3], "hook": "mlp_out", "target_hook": "mlp_out"}
    scales = {"exact": 1.0, "empty": 0.0}
    subjects = [
        builder.subject(exact_sae(builder, 2 * builder.D, scale), name, **both) for name, scale in scales.items()
    ]
    for layer in both["layers"]:
        one = both | {"layers": (layer,), "target_layers": [layer]}
        subjects.append(builder.subject(exact_sae(builder, builder.D), f"layer {layer}", **one))
    found = measure(open_context(world, massive_norms=None), *subjects)
    assert found["exact"]["kl_replaced"] == pytest.approx(0, abs=1e-3 * found["exact"]["kl_skipped"])
    assert found["empty"]["kl_replaced"] == found["exact"]["kl_skipped"]
    assert found["exact"]["kl_skipped"] not in (found["layer 1"]["kl_skipped"], found["layer 3"]["kl_skipped"])


def test_a_broken_sae_has_no_losses(world, builder, open_context):
    sae = builder.make_sae()
    sae.W_dec.data[3] = torch.nan
    (found,) = measure(open_context(world), builder.subject(sae)).values()
    assert math.isnan(found["ce_replaced"]) and math.isnan(found["ce_score"]) and math.isnan(found["kl_score"])
    assert found["ce_clean"] > 0 and found["ce_skipped"] > 0


def test_what_is_the_same_on_every_token_has_no_variance_to_explain():
    """Sums in float64 differ by rounding, and a share of that is no number."""
    seen, y = replacement.Seen(), torch.full((1000, 3), 0.1)
    seen.add(dict.fromkeys(("clean", "skipped", "replaced"), replacement.Effect()), y, y, 0.9 * y)
    assert math.isnan(seen.metrics()["explained_variance"]) and seen.metrics()["l0"] == 3


def test_tokens_that_are_made_up_are_not_run(make_world, builder, open_context):
    with pytest.raises(DataMissing, match="imported without tokens: import it into another folder with --tokens"):
        measure(open_context(make_world(has_tokens=False)), builder.subject(builder.make_sae()))


def test_skipping_is_shared_by_saes_that_read_and_write_the_same_places(world, builder, open_context):
    """Of two SAEs the flat lists of places are the same: one writes both layers, the other reads one of them."""
    both, one = {"layers": (3,), "target_layers": [1, 2]}, {"layers": (2, 3), "target_layers": [1]}
    hooks = {"hook": "mlp_out", "target_hook": "mlp_out"}
    narrow, wide = (builder.make_sae(d_in=width).W_dec.detach() for width in (builder.D, 2 * builder.D))
    writes = builder.make_sae(W_enc=narrow.clone(), W_dec=wide.clone(), centres_input=False)
    reads = builder.make_sae(W_enc=wide.clone(), W_dec=narrow.clone(), centres_input=False)
    subjects = builder.subject(writes, "both", **hooks, **both), builder.subject(reads, "one", **hooks, **one)
    together, alone = measure(open_context(world), *subjects), {}
    for subject in subjects:
        alone |= measure(open_context(world), subject)
    assert together == alone


def test_what_has_no_place_says_why_and_the_others_are_measured(world, builder, open_context):
    fine = builder.subject(exact_sae(builder, builder.D), "fine", hook="mlp_out", target_hook="mlp_out")
    wide = builder.subject(exact_sae(builder, 8), "wide", hook="mlp_out", target_hook="mlp_out")
    high = builder.subject(builder.make_sae(), "high", layers=(9,), hook="mlp_out", target_hook="mlp_out")
    found = measure(open_context(world), fine, wide, high, windows=4)
    assert found["fine"]["tokens"] > 0
    for name, said in {"wide": "reads width 8", "high": "has 5 layers"}.items():
        assert isinstance(found[name], Failure) and said in str(found[name].error)


def test_where_the_store_lacks_a_hook_the_saes_own_bounds_say_what_is_massive(world, builder, open_context):
    """Each SAE by its own, whoever is beside it; one that has none leaves nothing out, and both results say so."""
    hooks, place, seen = {"hook": "mlp_in", "target_hook": "mlp_out"}, Site("mlp_out", builder.LAYER), []
    context, tokens = open_context(world), world.tokens[20:]
    with context.model.tapped({place: lambda acts: seen.append(acts.float())}):
        context.model.hidden(tokens)
    norms = seen[0].norm(dim=-1)[tokens > 2]
    bounds = {"none": {}, "half": {place.path: float(norms.median())}, "all": {place.path: 1.01 * float(norms.max())}}
    subjects = [
        builder.subject(builder.make_sae(k=None), name, norm_bounds=found, **hooks) for name, found in bounds.items()
    ]
    config = replacement.Config(batch_windows=8)
    found = {one.subject.label: one for one in replacement.evaluate(context, subjects, config)}
    for subject in subjects:
        (alone,) = replacement.evaluate(open_context(world), [subject], config)
        assert alone.metrics == found[subject.label].metrics
    counted = {name: one.metrics["replacement"]["tokens"] for name, one in found.items()}
    assert counted["none"] == counted["all"] == len(norms) and counted["half"] == pytest.approx(len(norms) / 2, abs=3)
    assert found["half"].measured_on.endswith(f" {len(norms) - counted['half']} massive rows left out")
    assert found["none"].measured_on == f"test split, {len(norms)} tokens of 20 windows"
    nothing, own = "none is left out there", "the bound is that of the SAE's training"
    read, written = (f"massive rows of {hook} of layer 2, not held by the store: " for hook in ("mlp_in", "mlp_out"))
    assert found["half"].remark == found["all"].remark == f"{written}{own}; {read}{nothing}"
    both = "massive rows of mlp_in of layer 2, mlp_out of layer 2, not held by the store"
    assert found["none"].remark == f"{both}: {nothing}"
    every = replacement.evaluate(open_context(world, massive_norms=None), subjects, config)
    assert {(one.remark, one.metrics["replacement"]["tokens"]) for one in every} == {(None, len(norms))}
