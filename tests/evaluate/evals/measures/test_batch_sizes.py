"""What is traced and which latents are looked at is what settings say, however large batches are."""

from __future__ import annotations

import pytest
import torch

from saemill.cache_schema.strict_json import to_json
from saemill.evaluate.context import loaded_sae
from saemill.evaluate.evals import attention, temporal, tiers
from saemill.evaluate.evals.core import evaluation as core
from saemill.evaluate.evals.core import sparsity_and_variance
from saemill.evaluate.model.batches import store_batches
from saemill.evaluate.run.find_saes_to_evaluate import make_subject
from saemill.train.data.scaling import unit_stats
from saemill.train.disk.sae_lens_folder import save_sae
from saemill.train.variants import attention as reading


def counting(monkeypatch, where, name: str, place: int) -> list[int]:
    """How many windows each call of a function is given."""
    counts, call = [], getattr(where, name)

    def counted(*args):
        counts.append(len(args[place]))
        return call(*args)

    monkeypatch.setattr(where, name, counted)
    return counts


@pytest.mark.parametrize("batch_windows", [2, 5, 12])
@pytest.mark.parametrize(
    ("module", "where", "name", "place"), [(tiers, tiers.Tracers, "of", 1), (attention, attention, "trace_pairs", 1)]
)
def test_as_many_windows_are_traced_as_were_asked_for(
    module, where, name, place, batch_windows, world, builder, open_context, monkeypatch
):
    counts = counting(monkeypatch, where, name, place)
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


@pytest.fixture
def reads_others(builder):
    """The control whose encoder reads the attention of other windows, and not at nothing."""
    config = reading.Config(width=24, base="topk", k=4, layer=builder.LAYER, guidance="encode", shuffle_attention=True)
    sae = config.build(builder.D).sae
    torch.nn.init.normal_(sae.U, generator=torch.Generator().manual_seed(0))
    folder, layers = builder.root / "control", {"layers": [builder.LAYER]}
    save_sae(folder, sae, unit_stats(builder.D), layers, to_json(config), "attention")
    return make_subject(folder, None)


def test_what_reads_other_windows_reads_the_same_ones_however_large_batches_are(reads_others, world, open_context):
    found = {}
    for size in (2, 6, 7, 20):
        store, layers = open_context(world).store, ((2,), reads_others.attention_layers)
        batches = list(store_batches(store, "test", *layers, batch_windows=loaded_sae.whole(size, 2)))
        found[size] = torch.cat([reads_others.encode(batch) for batch in batches])
    assert all(torch.equal(found[size], found[2]) for size in found)
    alone = torch.cat([reads_others.encode(batch.slice(n, n + 1)) for batch in batches for n in range(len(batch))])
    assert not torch.equal(alone, found[2])


def test_room_changes_no_number_of_what_reads_other_windows(reads_others, world, open_context, monkeypatch):
    """Beside a wide SAE, or on a device with little memory, there is room for one window at a time."""
    found = []
    for room in (1 << 27, 1):
        monkeypatch.setattr(loaded_sae, "MOST_CODES", room)
        monkeypatch.setattr(sparsity_and_variance, "PIECE_BYTES", room)
        configs = {temporal: temporal.Config(windows=12, batch_windows=6), core: core.Config(6, 1, 2, resamples=0)}
        for module, config in configs.items():
            (result,) = module.evaluate(open_context(world), [reads_others], config)
            found.append({f"{group}.{name}": v for group, one in result.metrics.items() for name, v in one.items()})
    for large, small in zip(found[:2], found[2:], strict=True):
        assert large == pytest.approx(small, rel=1e-5, nan_ok=True)
