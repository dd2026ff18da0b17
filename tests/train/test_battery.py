"""What every file in train/variants/ must do. A new variant is found by its file and needs no edit here."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from saemill.cache_schema.strict import StrictError, from_json, to_json
from saemill.train.compose import Assembly, Batch
from saemill.train.errors import NonFiniteLoss, StateInvalid
from saemill.train.step import Report, Trainee
from saemill.train.variants import config_type, names

D, ROWS, STEPS = 32, 512, 40
SMALL: dict[str, Any] = {"width": 96, "k": 6, "target_l0": 6.0, "layers": (1, 2), "dead_after_tokens": 2000}
VARIANTS = names()
TOKENWISE = [name for name in VARIANTS if not config_type(name)().request().windows]


def config_of(variant: str, **changes: Any) -> Any:
    cls = config_type(variant)
    known = {field.name for field in dataclasses.fields(cls)}
    wanted = {name: value for name, value in (SMALL | changes).items() if name in known}
    return cls(**wanted)


def quick(variant: str, lr: float = 1e-3, **changes: Any) -> Any:
    """A config with a learning rate for tests of tens of steps."""
    config = config_of(variant, **changes)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=lr, warmup_steps=0))


def batches(config: Any, count: int, rows: int = ROWS, seed: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    needs = config.request()

    def draw(layers: tuple[int, ...]) -> Tensor:
        return torch.randn(rows, D * len(layers), generator=generator)

    return [Batch(draw(needs.inputs), None if needs.targets is None else draw(needs.targets)) for _ in range(count)]


def train(
    config: Any, count: int = STEPS, trainee: Trainee | None = None, start: int = 0
) -> tuple[Trainee, list[Report]]:
    trainee = trainee or Trainee("one", config.build(D), STEPS)
    return trainee, [trainee.step(batch) for batch in batches(config, STEPS)[start : start + count]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_survives_json(variant):
    config = config_of(variant)
    raw = json.loads(json.dumps(to_json(config)))
    assert from_json(config_type(variant), raw) == config
    with pytest.raises(StrictError, match="widht"):
        from_json(config_type(variant), raw | {"widht": 5})


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_defaults_build_a_request(variant):
    needs = config_type(variant)().request()
    assert needs.layers == tuple(sorted(needs.layers)) != ()


@pytest.mark.parametrize("variant", TOKENWISE)
def test_shapes(variant):
    config = config_of(variant)
    assembly: Assembly = config.build(D)
    batch = batches(config, 1)[0]
    target = batch.x if batch.target is None else batch.target
    acts = assembly.sae.encode(batch.x)
    assert acts.shape == (ROWS, 96)
    assert assembly.sae.decode(acts).shape == target.shape
    codes = assembly.sae.codes(batch.x)
    assert codes.dense().shape == acts.shape
    assert assembly.sae.reconstruct(codes).shape == target.shape
    torch.testing.assert_close(assembly.sae.reconstruct(codes), assembly.sae.decode(codes.dense()))


@pytest.mark.parametrize("variant", TOKENWISE)
def test_training_lowers_a_finite_loss(variant):
    config = quick(variant)
    _, reports = train(config)
    losses = [float(report.terms["reconstruction"]) for report in reports]
    assert all(torch.isfinite(report.loss) for report in reports)
    assert losses[-1] < losses[0]
    scalars = reports[-1].scalars()
    assert scalars["loss"] == pytest.approx(
        sum(scalars[f"loss/{name}"] * scalars[f"weight/{name}"] for name in reports[-1].terms), rel=1e-5
    )


@pytest.mark.parametrize("variant", TOKENWISE)
def test_gradient_reaches_every_parameter(variant):
    config = quick(variant)
    trainee = Trainee("one", config.build(D), STEPS)
    trainee.step_index = STEPS // 2
    before = {name: parameter.detach().clone() for name, parameter in trainee.sae.named_parameters()}
    for batch in batches(config, 3):
        trainee.step(batch)
    unmoved = [name for name, parameter in trainee.sae.named_parameters() if torch.equal(before[name], parameter)]
    assert not unmoved


@pytest.mark.parametrize("variant", TOKENWISE)
def test_same_seed_same_bits_and_another_seed_others(variant):
    first, second = (train(quick(variant, seed=5), 5)[0].state() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = train(quick(variant, seed=6), 5)[0].state()
    assert not torch.equal(first["sae.W_dec"], other["sae.W_dec"])


@pytest.mark.parametrize("variant", TOKENWISE)
def test_stopping_and_going_on_changes_no_bit(variant):
    config = quick(variant)
    straight, _ = train(config, 10)
    stopped, _ = train(config, 5)
    state = {name: tensor.clone() for name, tensor in stopped.state().items()}
    resumed = Trainee("one", config.build(D), STEPS)
    resumed.load_state(state)
    train(config, 5, resumed, start=5)
    expected, found = straight.state(), resumed.state()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize("variant", TOKENWISE)
def test_two_trained_side_by_side_have_the_bits_they_have_alone(variant):
    configs = [quick(variant, seed=1), quick("topk", seed=2)]
    alone = [train(config, 4)[0].state() for config in configs]
    trainees = [Trainee("x", config.build(D), STEPS) for config in configs]
    for pair in zip(*(batches(config, STEPS)[:4] for config in configs), strict=True):
        for trainee, batch in zip(trainees, pair, strict=True):
            trainee.step(batch)
    for expected, trainee in zip(alone, trainees, strict=True):
        assert all(torch.equal(tensor, trainee.state()[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("variant", TOKENWISE)
def test_a_loss_that_is_no_number_stops_before_the_weights_change(variant):
    config = quick(variant)
    trainee = Trainee("one", config.build(D), STEPS)
    batch = batches(config, 1)[0]
    trainee.step(batch)
    before = {name: tensor.clone() for name, tensor in trainee.state().items()}
    batch.x[3] = float("nan")
    with pytest.raises(NonFiniteLoss, match=r"step 1: .*reconstruction = nan"):
        trainee.step(batch)
    after = trainee.state()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("variant", TOKENWISE)
def test_a_foreign_state_is_refused_whole(variant):
    trainee = Trainee("one", config_of(variant).build(D), STEPS)
    state = trainee.state()
    wrong = {name: tensor for name, tensor in state.items() if name != "step"} | {"sae.W_dec": torch.zeros(2, 2)}
    with pytest.raises(StateInvalid, match=r"sae.W_dec: expected shape \(96, \d+\), found \(2, 2\); step is missing"):
        trainee.load_state(wrong)


def recovered(config: Any, rows: Tensor, directions: Tensor, steps: int = 600) -> float:
    """Share of the planted directions that training finds a decoder row for."""
    trainee = Trainee("one", config.build(D), steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        trainee.step(Batch(rows[torch.randint(rows.shape[0], (ROWS,), generator=generator)]))
    similarity = (directions @ trainee.sae.W_dec.detach().t()).amax(1)
    return float((similarity > 0.9).double().mean())


@pytest.mark.parametrize("variant", [name for name in TOKENWISE if config_type(name)().request().inputs == (19,)])
def test_a_planted_dictionary_is_recovered(variant, planted):
    if config_of(variant).request().targets is not None:
        pytest.skip("the dictionary is planted in one layer")
    # Penalties act in their own units in each variant; one of the two must fit this sparsity.
    penalties = [0.3, 0.8] if hasattr(config_of(variant), "penalty") else [None]
    shares = []
    for penalty in penalties:
        chosen = {} if penalty is None else {"penalty": penalty}
        config = quick(variant, lr=3e-3, k=3, target_l0=3.0, dead_after_tokens=20_000, **chosen)
        shares.append(recovered(config, *planted))
    assert max(shares) >= 0.9
