"""What is traced and which latents are looked at is what settings say, however large batches are."""

from __future__ import annotations

import pytest
import torch

from saemill.evaluate.evals import attention, temporal, tiers


def counting(monkeypatch, module, name: str, place: int) -> list[int]:
    """How many windows each call of a function is given."""
    counts, call = [], getattr(module, name)

    def counted(*args):
        counts.append(len(args[place]))
        return call(*args)

    monkeypatch.setattr(module, name, counted)
    return counts


@pytest.mark.parametrize("batch_windows", [2, 5, 12])
@pytest.mark.parametrize(("module", "name", "place"), [(tiers, "make_tracers", 1), (attention, "trace", 2)])
def test_as_many_windows_are_traced_as_were_asked_for(
    module, name, place, batch_windows, world, builder, open_context, monkeypatch
):
    counts = counting(monkeypatch, module, name, place)
    config = module.Config(windows=12, trace_windows=4, batch_windows=batch_windows)
    list(module.evaluate(open_context(world), [builder.subject(builder.make_sae(k=None))], config))
    assert sum(counts) == 4


def test_the_size_of_batches_changes_no_traced_number(world, builder, open_context):
    subject, found = builder.subject(builder.make_sae(k=None)), {}
    for size in (2, 5, 12):
        config = tiers.Config(windows=12, trace_windows=7, batch_windows=size, fitted_rows=6)
        (found[size],) = tiers.evaluate(open_context(world), [subject], config)
    for other in (5, 12):
        assert found[other].metrics["causal"] == pytest.approx(found[2].metrics["causal"], rel=1e-3, abs=1e-5)
        listed = [[entry["latent"] for entry in found[size].unstructured["traced"]] for size in (2, other)]
        assert listed[0] == listed[1] != []


def test_the_size_of_batches_changes_no_transition(world, builder, open_context):
    subject, found = builder.subject(builder.make_sae()), {}
    for size in (1, 12):
        config = temporal.Config(windows=12, batch_windows=size, most_frequent=6)
        (result,) = temporal.evaluate(open_context(world), [subject], config)
        found[size] = result.unstructured
    assert found[1]["frequent_latents"] == found[12]["frequent_latents"]
    assert torch.equal(*(torch.tensor(one["transitions"]) for one in found.values()))
