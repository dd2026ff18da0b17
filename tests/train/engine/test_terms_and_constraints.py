"""Combining parts: terms, constraints, knobs, wrappers, side inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saemill.train.data.batch import Batch, Needs
from saemill.train.engine.schedules import Constant, Ramp
from saemill.train.engine.step import Trainee
from saemill.train.engine.terms_and_constraints import Term
from saemill.train.errors import SideInputMissing
from saemill.train.sae.extra_modules import Extra
from saemill.train.sae.kernels.codes import Codes
from saemill.train.sae.model import SparseAutoencoder
from saemill.train.sae.side_inputs import NO_SIDE, Side
from saemill.train.terms.constraints import UnitDecoder
from saemill.train.variants.topk import Config

D, WIDTH = 8, 24


def assembly():
    return Config(width=WIDTH, k=3, dead_after_tokens=10_000).build(D)


def rows(rng: torch.Generator, count: int = 64) -> torch.Tensor:
    return torch.randn(count, D, generator=rng)


def test_layers_of_a_request_are_those_of_both_sides():
    assert Needs(inputs=(20, 17), targets=(19,)).layers == (17, 19, 20)


def test_terms_are_added_and_replaced_by_name(rng):
    mean = Term("mean", lambda view: view.codes.mean_over_rows(), Constant(0.1))
    none = Term("aux", lambda view: view.x.sum(), Constant(0.0))
    changed = assembly().replacing(none).with_terms(mean)
    assert [term.name for term in changed.terms] == ["reconstruction", "aux", "mean"]
    report = Trainee("one", changed, 10).step(Batch(rows(rng)))
    scalars = report.scalars()
    assert scalars["loss"] == pytest.approx(scalars["loss/reconstruction"] + 0.1 * scalars["loss/mean"], rel=1e-5)


def test_names_of_terms_must_be_distinct_and_known():
    with pytest.raises(ValueError, match="distinct"):
        assembly().with_terms(Term("aux", lambda view: view.x.sum(), Constant(1.0)))
    with pytest.raises(ValueError, match=r"'l1', found .'reconstruction', 'aux'."):
        assembly().replacing(Term("l1", lambda view: view.x.sum(), Constant(1.0)))


def test_a_term_of_weight_zero_changes_no_bit_and_is_not_computed(rng):
    def never(view):
        raise AssertionError("computed")

    x = rows(rng)
    plain = Trainee("one", assembly(), 10)
    silent = Trainee("one", assembly().with_terms(Term("never", never, Constant(0.0))), 10)
    for trainee in (plain, silent):
        trainee.step(Batch(x))
    expected, found = plain.state(), silent.state()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_knobs_reach_reports(rng):
    trainee = Trainee("one", assembly().with_knobs(p=Ramp(6.0, 2.0)), total_steps=4)
    assert [trainee.step(Batch(rows(rng))).scalars()["knob/p"] for _ in range(4)] == [6.0, 5.0, 4.0, 3.0]


def test_constraints_run_in_their_order(rng):
    seen = []

    class Spy:
        table_use = "gradients"

        def before_step(self, sae):
            seen.append(("before", sae.W_enc.grad is not None))

        def after_step(self, sae):
            seen.append(("after", sae.W_enc.grad is not None))

    trainee = Trainee("one", assembly().with_constraints(Spy()), 10)
    trainee.step(Batch(rows(rng)))
    assert seen == [("before", True), ("after", False)]
    assert [type(constraint) for constraint in trainee.assembly.constraints] == [UnitDecoder, Spy]


def test_a_wrapper_changes_codes_and_gradients_follow(rng):
    class Damped(SparseAutoencoder):
        def __init__(self, base: SparseAutoencoder) -> None:
            super().__init__(base.W_enc.data, base.W_dec.data, base.gate, base.b_dec.data, base.b_enc.data)
            self.damping = torch.nn.Parameter(torch.full((base.num_latents,), 0.5))

        def codes(self, x: torch.Tensor, side: Side = NO_SIDE) -> Codes:
            codes = super().codes(x, side)
            return codes.with_values(codes.values * codes.per_latent(self.damping) / side["position"].numel())

    made = assembly()
    trainee = Trainee("one", made.with_sae(Damped(made.sae)), 10)
    before = trainee.sae.damping.detach().clone()
    trainee.step(Batch(rows(rng), side={"position": torch.arange(64)}))
    assert not torch.equal(before, trainee.sae.damping)
    with pytest.raises(SideInputMissing, match=r"'position', found \[\]"):
        trainee.step(Batch(rows(rng)))


def test_a_target_of_its_own_is_reconstructed(rng):
    x, target = rows(rng), rows(rng)
    made = assembly()
    trainee = Trainee("one", replace(made, optim=replace(made.optim, start="drawn")), 10)
    x_hat = trainee.sae.reconstruct(trainee.sae.codes(x)).detach()
    report = trainee.step(Batch(x, target))
    expected = 1 - (target - x_hat).square().sum(1).mean() / D
    torch.testing.assert_close(report.measured["explained_variance"], expected, rtol=1e-5, atol=1e-5)


class Counter(Extra):
    """Learns a weight, counts steps."""

    lr_scale = 10.0

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def observe(self, view) -> None:
        self.steps += 1


def extended():
    def term(view):
        weight = view.sae.extras["counter"].weight
        view.note("counter/weight", weight)
        return weight.square()

    return assembly().with_extra("counter", Counter()).with_terms(Term("counter", term, Constant(1.0)))


def test_an_extra_trains_along_and_is_told_of_every_step(rng):
    x = rows(rng)
    plain, more = Trainee("one", assembly(), 10), Trainee("one", extended(), 10)
    plain.step(Batch(x))
    scalars = more.step(Batch(x)).scalars()
    assert scalars["counter/weight"] == 1.0
    counter = more.sae.extras["counter"]
    assert int(counter.steps) == 1
    assert 1.0 - counter.weight.item() == pytest.approx(10.0 * scalars["lr"], rel=1e-3)  # Adam's first step is the rate
    state = more.state()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state().items())
    again = Trainee("one", extended(), 10)
    again.load_state(state)
    assert torch.equal(again.sae.extras["counter"].weight, counter.weight)


def test_names_of_extras_must_be_new():
    with pytest.raises(ValueError, match="'counter' again"):
        extended().with_extra("counter", Counter())
