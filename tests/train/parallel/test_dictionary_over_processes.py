"""Dictionaries of which each of several processes holds some latents, against one process that holds all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saemill.train.data.scaling import Stats, unit_stats
from saemill.train.disk.plain_form import init_from, plain_sae, sae_from_plain
from saemill.train.disk.write_and_load_checkpoints import Standing, load_checkpoint, save_checkpoint
from saemill.train.engine.step import Trainee
from saemill.train.errors import ConfigInvalid, NonFiniteLoss, SaeInvalid
from saemill.train.kit.variant_registry import names
from saemill.train.parallel.dictionary_over_processes import SomeLatents
from saemill.train.parallel.sums_over_processes import ONE_PROCESS, share_batch
from saemill.train.sae.gates import BatchTopK
from saemill.train.sae.side_inputs import Side
from saemill.train.sae.top_k_over_processes import first_of_equals, lowest_of_batch, split_batch, split_topk

STEPS = 12
SPLIT = ["topk", "batchtopk", "jumprelu", "standard", "gated", "p_anneal", "transcoder", "crosscoder"]
SPLIT += ["abstopk", "skip_transcoder", "matryoshka"]


def tables(generator):
    """Pre-activations with and without equal entries, 33 latents."""
    smooth = torch.randn(20, 33, generator=generator)
    return {"smooth": smooth, "ties": (2 * smooth).round(), "equal": torch.ones(20, 33), "low": smooth.bfloat16()}


def chosen(supports, parts):
    """bool [B, F], from the support of each part."""
    masks = []
    for support, part in zip(supports, parts, strict=True):
        mask = torch.zeros(support.num_rows, part.stop - part.first, dtype=torch.bool)
        mask[support.rows.long(), support.latents.long()] = True
        assert int(mask.sum()) == support.latents.numel()
        masks.append(mask)
    return torch.cat(masks, 1)


def silence(trainee):
    """Every third latent is dead from the beginning."""
    with torch.no_grad():
        trainee.sae.b_enc[trainee.latents.own(torch.arange(67)) % 3 == 0] -= 50.0


def first_of(values, count, dim):
    """True at the `count` largest; of equal ones at the first."""
    order = values.sort(dim=dim, descending=True, stable=True).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter_(dim, order.narrow(dim, 0, count), True)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", ["smooth", "ties", "equal", "low"])
def test_the_selection_is_that_of_one_process_and_takes_the_lowest_of_equal_latents(rng, threads, kind, size):
    pre = tables(rng)[kind]
    ranks, run = threads(size)
    parts = [SomeLatents(rank, pre.shape[1]) for rank in ranks]
    own = [part.own(pre.t()).t().contiguous() for part in parts]
    for k in (1, 5, 12, 33):
        found = chosen(run(lambda at, k=k: split_topk(own[at], k, parts[at])), parts)
        assert torch.equal(found, first_of(pre, k, 1)), k
    flat = pre.reshape(-1)
    for count in (1, 57, 200, 660):
        found = chosen(run(lambda at, count=count: split_batch(own[at], count, parts[at])), parts)
        assert torch.equal(found.view(-1), first_of(flat, count, 0) & (flat > 0)), count


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1.0, 1e38])
def test_the_threshold_of_a_batch_is_found_from_counts_alone(rng, threads, scale):
    ranks, run = threads(3)
    own = [scale * (1 + torch.rand(count, generator=rng) * 2).bfloat16().float() for count in (300, 0, 90)]
    everyone, sent = torch.cat(own), []

    def total(counts, at):
        sent.append(counts.nbytes)
        return ranks[at].sum(counts)

    for count in (1, 200, 389, 390):
        found = run(lambda at, count=count: lowest_of_batch(own[at], count, lambda counts: total(counts, at)))
        lowest = everyone.topk(count).values[-1]
        wanted = count - int((everyone > lowest).sum())
        assert found == [None if count == 390 else (float(lowest), wanted)] * 3
    assert max(sent) <= 2**14


def test_no_process_gathers_the_candidates_of_a_batch(rng, threads):
    """They are 1 GB where 64 processes train on 65,536 rows of 64 latents."""
    pre, gate = torch.randn(128, 256, generator=rng), BatchTopK(64)
    (ranks, run), sent = threads(2), []
    for rank in ranks:
        rank.gather = lambda tensor, gather=rank.gather: sent.append(tensor.numel()) or gather(tensor)
    shares, latents = pre.split(64), [SomeLatents(rank, 256) for rank in ranks]
    run(lambda at: gate.choose(shares[at], Side(ranks=share_batch(ranks[at], 64))))
    run(lambda at: split_batch(pre[:, latents[at].first : latents[at].stop].contiguous(), 64 * 128, latents[at]))
    assert sent and max(sent) <= 2**11 < 64 * 128 // 2


@pytest.mark.parametrize("kind", ["smooth", "low"])
def test_no_table_of_the_whole_batch_has_numbers_to_count_in(rng, kind):
    """65,536 rows of 32,768 latents would be 17 GB of them in each step."""
    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            made.append(found.nbytes if isinstance(found, torch.Tensor) and not func.is_view else 0)
            return found

    pre = torch.randn(512, 128, generator=rng)
    pre = pre.bfloat16() if kind == "low" else pre
    with Sizes():
        split_batch(pre, 512 * 4, SomeLatents(ONE_PROCESS, 128))
    assert max(made) == pre.numel(), "one byte for each entry: which are chosen"


def test_a_process_with_none_to_choose_from_offers_none():
    assert first_of_equals(torch.zeros(5, 0), 0).shape == (5, 0)


def test_all_decide_by_the_numbers_of_the_first_process(threads):
    """Unlike GPUs round unlike: one that searched a step longer would wait for the others forever."""
    ranks, run = threads(3)
    found = run(lambda rank: SomeLatents(ranks[rank], 2).agree(torch.tensor([rank + 0.5])))  # one has no latents
    assert [one.tolist() for one in found] == [[0.5]] * 3


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("variant", SPLIT)
def test_latents_in_several_processes_train_as_in_one(battery, threads, variant, size):
    """The same losses and weights within the rounding of sums that are added in another order; no part is gathered."""
    changes = {"aux_k": 1} if size == 3 else {}  # of the dead latents: chosen by a support, or in a dense table
    changes |= {"start": "fitted", "encoder_product": "float32"}
    config = battery.quick(variant, dead_after_tokens=32, width=67, k=2, **changes)
    if variant == "jumprelu" and size == 2:
        config = replace(config, sparsity="tanh", frequency_penalty=0.1)
    if size == 2:
        config = replace(config, optim=replace(config.optim, clip_norm=0.5))
    batches = battery.batches(config, STEPS, rows=32)
    alone = Trainee("one", config.build(battery.D), STEPS)
    silence(alone)
    told = [alone.step(batch).scalars() for batch in batches]
    ranks, run = threads(size)
    split = [Trainee("one", config.build(battery.D), STEPS, split=rank) for rank in ranks]
    for trainee in split:
        silence(trainee)
    assert sum(len(trainee.sae.W_dec) for trainee in split) == 67 and len(split[0].sae.W_dec) < 34
    reports = run(lambda at: [split[at].step(batch).scalars() for batch in batches])
    states = run(lambda at: split[at].state())
    expected = alone.state()
    shared = {name for name, tensor in expected.items() if tensor.shape[:1] != (67,)}
    for state in states[1:]:  # the latents go to the first process alone
        assert state.keys() == shared and all(torch.equal(state[name], states[0][name]) for name in shared)
    for name in ("sae.W_enc", "sae.W_dec", "sae.b_enc", "sae.b_dec"):
        assert float((states[0][name] - expected[name]).norm()) <= 1e-3 * float(expected[name].norm()) + 1e-6, name
    assert torch.equal(states[0]["latents.tokens_since_fired"], expected["latents.tokens_since_fired"])
    for one, *parts in zip(told, *reports, strict=True):
        assert all(part == parts[0] for part in parts)
        assert parts[0] == pytest.approx(one, rel=2e-3, abs=1e-5)
    assert "loss/aux" not in told[-1] or told[-1]["loss/aux"] > 0, "the auxiliary loss is not tried"


def test_a_split_run_goes_on_from_its_checkpoint_in_any_number_of_processes(battery, threads, tmp_path):
    config = battery.quick("batchtopk", dead_after_tokens=32, encoder_product="float32", width=67, k=2)
    batches = battery.batches(config, STEPS, rows=32)
    half = STEPS // 2

    def train(size, state, part):
        ranks, run = threads(size)

        def work(at):
            trainee = Trainee("one", config.build(battery.D), STEPS, split=ranks[at])
            if state is not None:
                trainee.load_state(state)
            for batch in part:
                trainee.step(batch)
            return trainee.state()

        return run(work)[0]

    save_checkpoint(tmp_path, Standing(half, 0, 0.0, 0.0, 0, 0), {"one": train(3, None, batches[:half])})
    begun = load_checkpoint(tmp_path).tensors["one"]
    straight, again = train(3, None, batches), train(3, begun, batches[half:])
    assert all(torch.equal(again[name], straight[name]) for name in straight)
    for size in (1, 2):
        other = train(size, begun, batches[half:])
        assert other.keys() == straight.keys()
        for name in ("sae.W_enc", "sae.W_dec", "adam.W_dec.second_moment"):
            assert float((other[name] - straight[name]).norm()) <= 1e-3 * float(straight[name].norm()), (size, name)


@pytest.mark.parametrize("variant", ["topk", "batchtopk", "jumprelu", "gated", "skip_transcoder"])
def test_a_split_dictionary_begins_as_a_whole_one(battery, threads, rng, variant):
    """Each process has its rows of the source, in the units of its store: the first step rebuilds what it does."""
    changes = {"gate": "batchtopk"} if variant == "skip_transcoder" else {}
    config = battery.quick(variant, encoder_product="float32", width=67, k=2, **changes)
    source = config.build(battery.D).sae
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if name != "W_dec":
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
        if isinstance(source.gate, BatchTopK):
            source.gate.threshold.fill_(0.4)
    plain = sae_from_plain(plain_sae(source, unit_stats(battery.D), unit_stats(battery.D)))
    stats = Stats(torch.full((battery.D,), 0.37), torch.zeros(battery.D), float(battery.D))

    def trainee(split):
        sides = (stats,) if config.needs().targets is None else (stats, stats)
        found = Trainee("one", config.build(battery.D, *sides), STEPS, split=split)
        init_from(found.sae, plain, stats, stats, found.latents)
        return found

    ranks, run = threads(2)
    whole, parts = trainee(None), [trainee(rank) for rank in ranks]
    assert len(parts[0].sae.W_dec) == 33
    states = run(lambda at: parts[at].state())
    expected = whole.state()
    assert states[0].keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for state in states for name, tensor in state.items())

    def gathered(at):
        with parts[at].gather_weights():
            return parts[at].sae.W_dec.detach(), len(parts[at].counters.tokens_since_fired)

    (decoder, latents), _ = run(gathered)
    assert torch.equal(decoder, expected["sae.W_dec"]) and latents == 67 and len(parts[0].sae.W_dec) == 33
    x = torch.randn(50, battery.D, generator=rng)
    torch.testing.assert_close(whole.sae(x * stats.scale) / stats.scale, plain(x), rtol=1e-5, atol=1e-5)
    (batch,) = battery.batches(config, 1, rows=32)
    told = run(lambda at: parts[at].step(batch).scalars())
    assert told[0] == told[1] == pytest.approx(whole.step(batch).scalars(), rel=1e-4, abs=1e-6)
    with pytest.raises(SaeInvalid, match="an SAE with 66 latents .* found 67"):
        init_from(parts[0].sae, plain, stats, stats, SomeLatents(ranks[0], 66))


def test_a_loss_that_is_no_number_in_one_part_stops_all(battery, threads):
    config = battery.quick("standard", encoder_product="float32", width=67)
    (batch,) = battery.batches(config, 1)
    ranks, run = threads(2)

    def work(at):
        trainee = Trainee("one", config.build(battery.D), 10, split=ranks[at])
        trainee.step(batch)
        if at == 1:
            with torch.no_grad():
                trainee.sae.b_enc[0] = float("nan")
        with pytest.raises(NonFiniteLoss, match="reconstruction = nan"):
            trainee.step(batch)

    run(work)


def test_a_loss_that_is_no_number_in_one_process_alone_stops_all(battery, threads):
    """Each has the decoder's bias: if only one stopped, the others' sums would mix with those of its next SAE."""
    config = battery.quick("topk", encoder_product="float32", width=67)
    (batch,) = battery.batches(config, 1)
    ranks, run = threads(2)

    def work(at):
        trainee = Trainee("one", config.build(battery.D), 10, split=ranks[at])
        if at == 1:
            with torch.no_grad():
                trainee.sae.b_dec[0] = torch.inf
        with pytest.raises(NonFiniteLoss, match="expected finite losses"):
            trainee.step(batch)

    run(work)


def test_what_needs_all_latents_is_refused(battery, threads):
    """And docs/train.md tells them from the others."""
    ranks, _ = threads(2)
    for variant in set(names()) - {*SPLIT, "frozen"}:  # frozen: as its base
        with pytest.raises(ConfigInvalid, match=r"parts that need all latents in one .* only its base if it has one"):
            Trainee("one", battery.config_of(variant).build(battery.D), 10, split=ranks[0])
    page = (Path(__file__).parents[3] / "docs/train.md").read_text()
    assert f"`{' '.join(sorted(SPLIT))}` can be split" in page
