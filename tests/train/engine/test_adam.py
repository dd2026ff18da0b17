"""The optimiser against the library's own, step by step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from saemill.train.engine.adam import Adam, Optim
from saemill.train.engine.schedules import cut_short
from saemill.train.errors import ConfigInvalid


def module(rng: torch.Generator) -> nn.ParameterDict:
    return nn.ParameterDict({name: torch.randn(5, 3, generator=rng) for name in ("a", "b")})


def gradients(parameters: nn.ParameterDict, rng: torch.Generator) -> None:
    for parameter in parameters.values():
        parameter.grad = 3 * torch.randn(parameter.shape, generator=rng)


@pytest.mark.parametrize("clip_norm", [None, 1.0, 1e6])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_those_of_the_library(clip_norm, weight_decay, rng):
    ours = module(rng)
    theirs = copy.deepcopy(ours)
    settings = Optim(lr=0.1, beta1=0.8, beta2=0.9, epsilon=1e-3, weight_decay=weight_decay, clip_norm=clip_norm)
    optimiser = Adam(dict(ours.items()), settings)
    library = torch.optim.Adam(
        theirs.parameters(), lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=weight_decay, fused=False
    )
    for step in range(5):
        gradients(ours, rng)
        for name in ours:
            theirs[name].grad = ours[name].grad.clone()
        norm = None
        if clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm)
        for group in library.param_groups:
            group["lr"] = 0.1 / (step + 1)
        library.step()
        optimiser.begin(0.1 / (step + 1))
        found = optimiser.step()
        assert (found is None) == (norm is None)
        if found is not None and norm is not None:
            torch.testing.assert_close(found, norm)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_the_norm_of_a_large_table_keeps_its_digits(rng):
    """Squares added one by one are lost to a sum that has grown too large for them."""
    parameters = nn.ParameterDict({"a": torch.zeros(1 << 11, 1 << 12), "b": torch.zeros(())})
    for parameter in parameters.values():
        parameter.grad = torch.rand(parameter.shape, generator=rng)
    exact = sum(float(parameter.grad.double().square().sum()) for parameter in parameters.values()) ** 0.5
    optimiser = Adam(dict(parameters.items()), Optim(lr=0.1, clip_norm=1.0))
    optimiser.begin(0.1)
    assert float(optimiser.step()) == pytest.approx(exact, rel=1e-5)


def test_a_parameter_without_gradient_keeps_its_value_and_its_count(rng):
    parameters = module(rng)
    before = parameters["b"].detach().clone()
    optimiser = Adam(dict(parameters.items()), Optim(lr=0.1))
    parameters["a"].grad = torch.ones(5, 3)
    optimiser.begin(0.1)
    optimiser.step()
    assert torch.equal(parameters["b"], before)
    assert [float(optimiser.state()[f"{name}.steps"]) for name in ("a", "b")] == [1.0, 0.0]


def test_state_is_named_and_holds_the_moments_themselves(rng):
    parameters = module(rng)
    optimiser = Adam(dict(parameters.items()), Optim(lr=0.1))
    state = optimiser.state()
    assert sorted(state) == [f"{p}.{s}" for p in "ab" for s in ("first_moment", "second_moment", "steps")]
    gradients(parameters, rng)
    optimiser.begin(0.1)
    optimiser.step()
    assert float(state["a.second_moment"].sum()) > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": 0.0}, "optim.lr"),
        ({"beta1": 1.0}, "optim.beta1"),
        ({"decay_fraction": 1.5}, "optim.decay_fraction"),
        ({"clip_norm": 0.0}, "optim.clip_norm: expected a positive number, found 0"),
        ({"epsilon": 0.0}, "optim.epsilon"),
        ({"weight_decay": -0.1}, "optim.weight_decay: expected 0 or more, found -0.1"),
        ({"weight_decay": float("nan")}, "optim.weight_decay"),
        ({"warmup_steps": -1}, "optim.warmup_steps"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ConfigInvalid, match=message):
        Optim(**wrong)


def test_a_warm_up_may_be_as_long_as_it_was_asked_for_however_short_the_run():
    cut, whole = (Optim(lr=1.0, warmup_steps=1000, warmup_max_fraction=f).schedule() for f in (0.1, 1.0))
    assert cut(60, 534) == 1.0 and cut_short(cut, 534) == [(1000, 53)]
    assert whole(60, 1000) == pytest.approx(61 / 1001) and cut_short(whole, 1000) == []
