"""Two ranks with a share of a batch each against one with all of it, for every variant."""

from __future__ import annotations

import pytest
import torch

from saemill.train.data.batch import Batch
from saemill.train.engine.step import Trainee
from saemill.train.errors import ConfigInvalid, StoppedElsewhere
from saemill.train.kit.variant_registry import config_type, names
from saemill.train.parallel import sums_over_processes
from saemill.train.parallel.processes import SOLO, Group, all_or_none, join
from saemill.train.parallel.sums_over_processes import share_batch
from saemill.train.sae.gates import BatchTopK
from saemill.train.sae.kernels import hardware
from saemill.train.sae.side_inputs import NO_SIDE, Side

TOKENWISE = [name for name in names() if not config_type(name)().needs().windows]


HALVES = (slice(0, None, 2), slice(1, None, 2))
UNEVEN = (slice(0, 150), slice(150, None))


def part(batch: Batch, cut: slice) -> Batch:
    side = {name: values[cut] for name, values in batch.side.items()}
    return Batch(batch.x[cut], None if batch.target is None else batch.target[cut], side)


def windows_part(batch: Batch, windows: slice, spans: int) -> Batch:
    """The rows of some whole windows, of `spans` tokens each."""
    rows = slice(windows.start * spans, windows.stop * spans)
    side = {name: batch.side[name][rows] for name in ("position", "document")}
    row_of = batch.side["row_of"][windows]
    side |= {"window": batch.side["window"][rows] - windows.start}
    side |= {"row_of": torch.where(row_of >= 0, row_of - rows.start, -1)}
    return Batch(batch.x[rows], side=side)


def test_whole_windows_need_not_be_shared_out_evenly(battery, threads):
    """5 windows here and 11 there, and of the five no token of the first 16 has an active latent to compare."""
    config = battery.quick("temporal", dead_after_tokens=1000, warmup_steps=0, temporal_weights=(3.0, 3.0, 3.0))
    all_batches = battery.batches(config, 6)
    for batch in all_batches:
        batch.x[:160].view(5, 32, -1)[:, :16] = 0.0
    alone = Trainee("one", config.build(battery.D), battery.STEPS)
    for batch in all_batches:
        alone.step(batch)
    ranks, in_both = threads(2)
    pair = [Trainee("one", config.build(battery.D), battery.STEPS, ranks=one) for one in ranks]
    cuts = (slice(0, 5), slice(5, 16))
    in_both(lambda rank: [pair[rank].step(windows_part(batch, cuts[rank], 32)) for batch in all_batches])
    expected, first, second = (trainee.state() for trainee in (alone, *pair))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("sae.W_enc", "sae.W_dec", "sae.b_dec"):
        assert float((first[name] - expected[name]).norm()) <= 1e-3 * float(expected[name].norm()), name


def test_adaptive_weights_are_those_of_one_process_in_uneven_ranks(battery, threads):
    config = battery.quick("temporal", base="topk", adaptive="gradient", warmup_steps=0)
    (batch,) = battery.batches(config, 1)
    batch.x[:160] *= 3.0  # the first windows are unlike the others
    alone = Trainee("one", config.build(battery.D), battery.STEPS).step(batch)
    ranks, in_both = threads(2)
    pair = [Trainee("one", config.build(battery.D), battery.STEPS, ranks=one) for one in ranks]
    cuts = (slice(0, 3), slice(3, 16))
    first, _ = in_both(lambda rank: pair[rank].step(windows_part(batch, cuts[rank], 32)))
    weights = [name for name in alone.measured if name.startswith("temporal/weight_")]
    assert weights
    for name in weights:
        assert 0 < float(alone.measured[name]) == pytest.approx(float(first.measured[name]), rel=1e-4), name


@pytest.mark.parametrize("cuts", [HALVES, UNEVEN], ids=["halves", "uneven"])
@pytest.mark.parametrize("variant", TOKENWISE)
def test_two_ranks_train_as_one(battery, threads, variant, cuts):
    config = battery.quick(variant, start="fitted", dead_after_tokens=1000, encoder_product="float32")
    all_batches = battery.batches(config, 6)
    alone = Trainee("one", config.build(battery.D), battery.STEPS)
    told = [alone.step(batch) for batch in all_batches]

    ranks, in_both = threads(2)
    pair = [Trainee("one", config.build(battery.D), battery.STEPS, ranks=one) for one in ranks]
    reports = in_both(lambda rank: [pair[rank].step(part(batch, cuts[rank])) for batch in all_batches])

    expected, first, second = (trainee.state() for trainee in (alone, *pair))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("sae.W_enc", "sae.W_dec", "sae.b_dec"):
        assert float((first[name] - expected[name]).norm()) <= 1e-3 * float(expected[name].norm()), name
    assert torch.equal(first["latents.tokens_since_fired"], expected["latents.tokens_since_fired"])
    for one, *shares in zip(told, *reports, strict=True):
        together = sum(float(share.measured["l0"]) * share.weight for share in shares) / 2
        assert together == pytest.approx(float(one.measured["l0"]), rel=1e-2)


def test_gradients_go_in_buckets_while_backward_goes_on(battery, threads, monkeypatch):
    """Two tables by themselves, the decoder's before the encoder's is there; the biases and the threshold together."""
    config = battery.quick("jumprelu", encoder_product="float32")
    monkeypatch.setattr(sums_over_processes, "BUCKET_BYTES", 4 * config.width * battery.D)
    (batch,) = battery.batches(config, 1)
    ranks, in_both = threads(2)
    pair = [Trainee("one", config.build(battery.D), battery.STEPS, ranks=one) for one in ranks]
    sent = []

    def spy(tensor, begin=ranks[0].begin_sum):
        sent.append((tuple(tensor.shape), pair[0].sae.W_enc.grad is None))
        return begin(tensor)

    ranks[0].begin_sum = spy
    in_both(lambda rank: pair[rank].step(part(batch, HALVES[rank])))
    table, small = (config.width, battery.D), (2 * config.width + battery.D,)
    assert sent == [(table, True), (table, False), (small, False)]


def test_a_step_on_a_gpu_sums_its_losses_in_one_call(battery, threads, monkeypatch):
    """Each is a kernel that waits for all processes."""
    monkeypatch.setattr(hardware, "READ_AT_ONCE", set())
    config = battery.quick("topk", encoder_product="float32", dead_after_tokens=10**9)
    (batch,) = battery.batches(config, 1)
    ranks, in_both = threads(2)
    pair = [Trainee("one", config.build(battery.D), battery.STEPS, ranks=one) for one in ranks]
    sent = []
    ranks[0].sum = lambda tensor, add=ranks[0].sum: sent.append(tuple(tensor.shape)) or add(tensor)
    in_both(lambda rank: pair[rank].step(part(batch, HALVES[rank])))
    losses, gradients = len(pair[0].assembly.terms), sum(p.numel() for p in pair[0].sae.parameters())
    assert sent == [(1,), (1 + losses,), (gradients,), (config.width,)]  # the first and the last: rows, and what fired


def test_of_equal_values_no_more_are_kept_than_by_one_rank(threads):
    """114 of 30 rows: 90 are larger, and 24 of 120 that tie come from the first rank."""
    pre = torch.ones(30, 8)
    pre[:, :3], pre[:, 7] = 2.0, 0.5
    shares = (pre[:20], pre[20:])
    (pair, in_both), gate = threads(2), BatchTopK(3.8)

    def tied_kept(rank: int) -> int:
        kept = gate.choose(shares[rank], Side(ranks=share_batch(pair[rank], len(shares[rank]))))
        return kept.latents.numel() - int((kept.latents < 3).sum())

    assert gate.choose(pre, NO_SIDE).latents.numel() == 114
    assert in_both(tied_kept) == [24, 0]


def test_who_failed_says_why_where_the_others_have_left_already():
    """The one that was told first is gone before this one hears what it said itself."""

    class Left(Group):
        def any(self, flag: bool) -> bool:
            raise StoppedElsewhere("another process of the run is gone")

    with pytest.raises(ConfigInvalid, match="mine"), all_or_none(Left()):
        raise ConfigInvalid("mine")
    with pytest.raises(StoppedElsewhere, match="gone"), all_or_none(Left()):
        pass


def test_processes_of_srun_are_told_that_each_trains_alone(monkeypatch, recwarn):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert join("cpu")[0] is SOLO and not recwarn
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.warns(UserWarning, match="srun started 8 processes, and each trains everything on its own"):
        assert join("cpu")[0] is SOLO
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun, one a node
    assert join("cpu")[0] is SOLO and len(recwarn) == 0
