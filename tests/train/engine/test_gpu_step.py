"""A step as a GPU takes it: kernels row by row, looked at late. Without a GPU the kernels are interpreted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from saemill.train.data.batch import Batch
from saemill.train.data.drawn_rows import Draw
from saemill.train.data.scaling import unit_stats
from saemill.train.engine import step
from saemill.train.engine.adam import Adam, Optim
from saemill.train.engine.fleet_of_saes import Fleet
from saemill.train.engine.step import Trainee
from saemill.train.errors import NonFiniteLoss
from saemill.train.kit.variant_registry import config_type
from saemill.train.parallel.sums_over_processes import ONE_PROCESS
from saemill.train.sae.kernels import hardware
from saemill.train.sae.side_inputs import Side
from saemill.train.sae.step_view import View

D, F, B = 8, 20, 8
LOOK_EVERY = 4  # in these tests: interpreted steps take a second
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.either


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr(step, "LOOK_EVERY", LOOK_EVERY)


def config_of(variant: str, **settings) -> Any:
    # As drawn: a fitted start would take minutes with interpreted kernels.
    return config_type(variant)(width=F, k=3, encoder_product="float32", optim=Optim(start="drawn"), **settings)


def make(variant: str, device: str = "cpu", **settings) -> Trainee:
    return Trainee(variant, config_of(variant, **settings).build(D), total_steps=40, device=device)


def batches(count: int, device: str = "cpu") -> list[Batch]:
    rng = torch.Generator().manual_seed(1)
    return [Batch(torch.randn(B, D, generator=rng).to(device)) for _ in range(count)]


@pytest.mark.parametrize("variant", ["topk", "batchtopk", "matryoshka"])
def test_it_trains_as_on_a_cpu(as_on_gpu, monkeypatch, request, variant):
    """Dead latents too: after one batch, so that the auxiliary loss takes part from the second step on. Lists are of
    each step."""
    if variant == "matryoshka" and DEVICE == "cpu":  # which selects as batchtopk does
        request.getfixturevalue("quick_selection")
    monkeypatch.setattr(step, "LOOK_EVERY", 1)
    ours = make(variant, DEVICE, dead_after_tokens=B)
    assert "W_enc" in ours.optimiser._by_row and "W_dec" in ours.optimiser._by_row
    losses = [ours.step(batch).scalars()["loss"] for batch in batches(3, DEVICE)]
    monkeypatch.undo()
    plain = make(variant, dead_after_tokens=B)
    assert "W_dec" not in plain.optimiser._by_row
    expected = [plain.step(batch).scalars()["loss"] for batch in batches(3)]
    assert losses == pytest.approx(expected, rel=1e-4)
    norms = torch.linalg.vector_norm(ours.sae.W_dec, dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_a_table_without_gradient_keeps_its_count(as_on_gpu):
    """What was moved in a step is known to the device alone, since the step may be a replayed one."""
    rng = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(6, D, generator=rng) for name in "ab"}
    by_row, plain = (
        {name: torch.nn.Parameter(value.to(DEVICE, copy=True)) for name, value in drawn.items()} for _ in range(2)
    )
    ours, theirs = Adam(by_row, Optim(), {"a": 0.5}, dict.fromkeys("ab", False)), Adam(plain, Optim(), {"a": 0.5})
    for index in range(4):
        moved = "ab" if index % 2 else "b"
        for name in moved:
            by_row[name].grad = torch.randn(6, D, generator=rng).to(DEVICE)
            plain[name].grad = by_row[name].grad.clone()
        for optimiser in (ours, theirs):
            optimiser.begin(0.1)
            optimiser.step()
            optimiser.zero_grad()
    for name, tensor in theirs.state().items():
        torch.testing.assert_close(ours.state()[name], tensor, msg=name)
    for name in "ab":
        torch.testing.assert_close(by_row[name], plain[name])


def test_a_step_that_broke_is_named_at_the_next_look(as_on_gpu, quick_selection):
    trainee = make("topk", DEVICE)
    good = batches(1, DEVICE)[0]
    trainee.step(good)
    before = {name: tensor.clone() for name, tensor in trainee.sae.state_dict().items()}
    trainee.step(Batch(torch.full_like(good.x, torch.nan)))
    for _ in range(LOOK_EVERY - 2):
        trainee.step(good)
    for name, tensor in trainee.sae.state_dict().items():
        assert torch.equal(tensor, before[name]), name  # nothing moved after what broke
    with pytest.raises(NonFiniteLoss, match="step 1: ") as caught:
        trainee.step(good)
    assert caught.value.is_input_finite is False


def test_no_checkpoint_is_made_of_a_step_that_broke(as_on_gpu, quick_selection):
    trainee = make("topk", DEVICE)
    trainee.step(Batch(torch.full((B, D), torch.nan, device=DEVICE)))
    with pytest.raises(NonFiniteLoss, match="step 0: "):
        trainee.state()


def test_a_fleet_goes_on_without_one_that_broke_before_the_last_look(monkeypatch):
    monkeypatch.setattr(step, "LOOK_EVERY", 1)
    monkeypatch.setattr(hardware, "READ_AT_ONCE", set())
    config = config_of("topk")
    fleet = Fleet(
        dict.fromkeys(("wild", "tame"), config), {config.layer: unit_stats(D)}, 40, torch.device(DEVICE), ONE_PROCESS
    )
    fleet.trainees["wild"].sae.b_dec.data.fill_(torch.nan)
    told = []
    for batch in batches(2, DEVICE):
        draw = SimpleNamespace(device=torch.device("cpu"), batch=lambda _, batch=batch: batch)
        told.append(list(fleet.step(cast(Draw, draw))))
    assert told == [["wild", "tame"], ["tame"]]
    assert fleet.diverged == {"wild": 0} and len(fleet.take_news()) == 1 and not fleet.take_news()
    assert {label: int(state["step"]) for label, state in fleet.state().items()} == {"wild": 0, "tame": 2}


def test_processes_agree_on_what_broke_when_it_is_read_late(threads):
    """Rows of one alone are not finite: that one names them, and the other does not go on alone."""
    config = config_of("topk")
    ranks, run = threads(2)

    def work(at: int) -> str:
        fleet = Fleet({"one": config}, {config.layer: unit_stats(D)}, 40, torch.device("cpu"), ranks[at])
        return type(fleet._add_place("one", NonFiniteLoss(3, {}, is_input_finite=at == 0), None)).__name__

    assert run(work) == ["StoppedElsewhere", "ActivationsNotFinite"]


def test_it_resumes_to_the_same_bits_between_looks(as_on_gpu, quick_selection, monkeypatch):
    """Looked at before the third step: the fourth goes by the latents that were dead then."""
    monkeypatch.setattr(step, "LOOK_EVERY", 2)
    stream = batches(4, DEVICE)
    straight, first, second = (make("topk", DEVICE, dead_after_tokens=B) for _ in range(3))
    for batch in stream:
        straight.step(batch)
    for batch in stream[:3]:
        first.step(batch)
    second.load_state(first.state())
    second.step(stream[3])
    for name, tensor in straight.state().items():
        assert torch.equal(tensor, second.state()[name]), name


def test_a_noted_number_lies_where_the_batch_lies():
    """All numbers of a report are brought to the host at once; one on another device ended a run on a GPU."""
    x = torch.zeros(2, D, device="meta")
    sae = make("topk").sae
    view = View(x, x, Side(), sae, torch.zeros(F, dtype=torch.bool), unit_stats(D), torch.Generator())
    view.note("number", 0.5)
    view.note("tensor", x.sum())
    assert {value.device.type for value in view.notes.values()} == {"meta"}
