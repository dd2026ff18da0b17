"""The terms of guidance against slow versions, and their gradients against finite differences."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from saemill.train.parallel.sums_over_processes import share_batch
from saemill.train.sae.attention.attention_encoder import MIXING, TEMPERATURE, Attention, Mixing
from saemill.train.sae.gates import JumpRelu, Relu, TopK
from saemill.train.sae.kernels.codes import Codes
from saemill.train.sae.side_inputs import Side
from saemill.train.sae.step_view import View
from saemill.train.terms import attention_guidance
from saemill.train.terms.attention_guidance import Consistency, Guidance

THETA = torch.tensor([0.7, -0.4, 0.1], dtype=torch.float64)
NEGATIVES = 5


def guided_view(guidance: Any, rng: torch.Generator, gate: Any = None, **knobs: float) -> tuple[View, Any]:
    windows = guidance.make_windows(rng, dtype=torch.float64)
    view = guidance.view_of(windows, rng, gate, torch.float64, **knobs)
    mixing = Mixing((17, 18, 20)).double()
    mixing.theta.data.copy_(THETA)
    view.sae.extras[MIXING] = mixing
    return view, windows


def again(view: View, values: Tensor, theta: Tensor, seed: int) -> View:
    """The same step with other codes and another mixture."""
    view.sae.extras[MIXING].theta.data.copy_(theta)
    generator = torch.Generator().manual_seed(seed)
    return with_codes(dataclasses.replace(view, generator=generator), view.codes.with_values(values))


def with_codes(view: View, codes: Codes) -> View:
    """The view of an SAE that gives these codes."""
    sae = copy.copy(view.sae)
    sae.codes = lambda x, side: codes
    return dataclasses.replace(view, sae=sae, cache={}, notes={})


def mixed(guidance: Any, windows: Any, weights: Tensor) -> tuple[Tensor, list[Tensor], list[list[int]]]:
    """A [B, B], the A^l, and which layers each row has."""
    tables = [guidance.oracle_links(windows, layer) for layer in guidance.LAYERS]
    A, present = torch.zeros(windows.rows, windows.rows, dtype=torch.float64), []
    for row in range(windows.rows):
        present.append([index for index in range(3) if tables[index][row].any()])
        for index in present[row]:
            A[row] = A[row] + weights[index] / weights[present[row]].sum() * tables[index][row]
    return A, tables, present


def oracle_guidance(
    acts: Tensor, A: Tensor, windows: Any, picked: list[int], temperature: float, with_entropy: bool
) -> Tensor:
    """Token by token; each keeps its own list of candidates."""
    places, losses = windows.places, []

    def cosine(i: int, j: int) -> Tensor:
        return acts[i] @ acts[j] / (acts[i].norm() * acts[j].norm())

    for i in range(windows.rows):
        if not A[i].any():
            continue
        window, position = int(places.window[i]), int(places.position[i])
        earlier = [int(j) for j in places.row_of[window, 1:position] if j >= 0]
        foreign = [j for j in picked if places.window[j] != window]
        scores = torch.stack([cosine(i, j) / temperature for j in earlier + foreign])
        log_p = scores - scores.exp().sum().log()
        loss = torch.stack([-A[i, j] * log_p[n] for n, j in enumerate(earlier)]).sum()
        if with_entropy:
            loss = loss + torch.stack([A[i, j] * A[i, j].log() for j in earlier if A[i, j] > 0]).sum()
        losses.append(loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("objective", ["divergence", "cross_entropy"])
@pytest.mark.parametrize("gate", [TopK(4), Relu()], ids=["sparse", "dense"])
def test_guidance_is_its_definition(guidance, rng, gate, objective):
    view, windows = guided_view(guidance, rng, gate, **{TEMPERATURE: 0.8})
    term = Guidance(Attention(guidance.LAYERS), 0.3, NEGATIVES, objective)
    state = rng.get_state()
    found = term(view)
    rng.set_state(state)
    picked = torch.randperm(windows.rows, generator=rng)[:NEGATIVES].tolist()
    A, _, _ = mixed(guidance, windows, torch.softmax(THETA / 0.8, 0))
    expected = oracle_guidance(view.codes.dense(), A, windows, picked, 0.3, objective == "divergence")
    torch.testing.assert_close(found, expected)
    if objective == "divergence":
        assert float(found.detach()) > 0


def test_ranks_of_unequal_rows_draw_as_much_as_each_other(guidance, rng, threads):
    """Of the generator a checkpoint keeps the first rank's: the others go on with it."""
    ranks, in_both = threads(2)
    views = []
    for rank, count in zip(ranks, (2, 3), strict=True):
        windows = guidance.make_windows(rng, windows=count)
        view = guidance.view_of(windows, rng)
        view.sae.extras[MIXING] = Mixing((17, 18, 20))
        views.append((rank, view, windows))

    def draw(index: int) -> Tensor:
        rank, view, windows = views[index]
        side = Side(windows.side, ranks=share_batch(rank, windows.rows))
        generator = torch.Generator().manual_seed(7)
        Guidance(Attention(guidance.LAYERS), 0.3, NEGATIVES)(dataclasses.replace(view, side=side, generator=generator))
        return generator.get_state()

    first, second = in_both(draw)
    assert torch.equal(first, second)


def test_consistency_is_its_definition(guidance, rng, monkeypatch):
    monkeypatch.setattr(attention_guidance, "EPSILON", 0.01)  # large enough to be seen
    view, windows = guided_view(guidance, rng)
    found = Consistency(Attention(guidance.LAYERS))(view)
    weights, acts = torch.softmax(THETA, 0), view.codes.dense()
    A, tables, present = mixed(guidance, windows, weights)
    losses = []
    for row in range(windows.rows):
        if present[row]:
            c = A[row] @ acts
            shares = weights[present[row]] / weights[present[row]].sum()
            apart = [(tables[index][row] @ acts - c).square().sum() for index in present[row]]
            losses.append((shares * torch.stack(apart)).sum() / (c.square().sum() + 0.01))
    torch.testing.assert_close(found, torch.stack(losses).mean())


@pytest.mark.parametrize("gate", [TopK(4), Relu()], ids=["sparse", "dense"])
@pytest.mark.parametrize(
    "term",
    [
        Guidance(Attention((17, 18, 20)), 0.3, NEGATIVES),
        Guidance(Attention((17, 18, 20)), 0.3, NEGATIVES, "cross_entropy"),
        Consistency(Attention((17, 18, 20))),
    ],
    ids=["divergence", "cross_entropy", "consistency"],
)
def test_gradients_are_finite_differences(guidance, rng, term, gate):
    view, _ = guided_view(guidance, rng, gate)
    values = view.codes.values.detach().clone().requires_grad_()
    loss = term(again(view, values, THETA, 5))
    theta = view.sae.extras[MIXING].theta
    grad, grad_theta = torch.autograd.grad(loss, (values, theta), allow_unused=True)

    def at(values: Tensor, theta: Tensor = THETA) -> float:
        with torch.no_grad():
            return float(term(again(view, values, theta, 5)))

    step = 1e-6
    for place in torch.randperm(values.numel(), generator=rng)[:60].tolist():
        move = torch.zeros(values.numel(), dtype=torch.float64)
        move[place] = step
        move = move.view(values.shape)
        slope = (at(values.detach() + move) - at(values.detach() - move)) / (2 * step)
        assert float(grad.flatten()[place]) == pytest.approx(slope, rel=1e-5, abs=1e-8)
    if isinstance(term, Consistency):
        assert grad_theta is None
        return
    for layer, move in enumerate(step * torch.eye(3, dtype=torch.float64)):
        slope = (at(values.detach(), THETA + move) - at(values.detach(), THETA - move)) / (2 * step)
        assert float(grad_theta[layer]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_gradients_reach_the_encoder_through_the_terms(guidance, rng):
    view, _ = guided_view(guidance, rng)
    loss = Guidance(Attention(guidance.LAYERS), 0.3, 4)(view) + Consistency(Attention(guidance.LAYERS))(view)
    loss.backward()
    assert bool(view.sae.W_enc.grad.any()) and view.sae.W_dec.grad is None


def test_codes_that_are_all_zero_have_finite_gradients(guidance, rng):
    view, _ = guided_view(guidance, rng)
    values = torch.zeros_like(view.codes.values).requires_grad_()
    fresh = again(view, values, THETA, 5)
    loss = Guidance(Attention(guidance.LAYERS), 0.3, 4)(fresh) + Consistency(Attention(guidance.LAYERS))(fresh)
    loss.backward()
    assert math.isfinite(float(loss.detach())) and bool(values.grad.isfinite().all())


def test_silent_rows_leave_thresholds_alone(guidance, rng):
    """Entries just below a threshold are zero, and yet pass a gradient to it."""
    view, _ = guided_view(guidance, rng, JumpRelu(guidance.LATENTS, 6.0, 4.0).double())
    is_silent = ~view.codes.dense().any(dim=1)
    assert 0.1 < is_silent.double().mean() < 0.9
    loss = Guidance(Attention(guidance.LAYERS), 0.3, 4)(view) + Consistency(Attention(guidance.LAYERS))(view)
    assert 0 < float(torch.autograd.grad(loss, view.sae.gate.raw_threshold)[0].abs().max()) < 10.0


def test_what_is_noted_for_the_log(guidance, rng):
    view, windows = guided_view(guidance, rng, **{TEMPERATURE: 0.8})
    attention = Attention(guidance.LAYERS)
    Guidance(attention, 0.3, 4)(view)
    attention.note(view)
    weights = torch.softmax(THETA / 0.8, 0)
    for layer, weight in zip(guidance.LAYERS, weights, strict=True):
        torch.testing.assert_close(view.notes[f"mixing/weight_{layer}"], weight)
    assert float(view.notes["mixing/temperature"]) == 0.8
    acts = view.codes.dense().detach()
    cosines = torch.nn.functional.normalize(acts) @ torch.nn.functional.normalize(acts).t()
    _, tables, present = mixed(guidance, windows, weights)
    along = torch.zeros(3, dtype=torch.float64)
    for row in range(windows.rows):
        for index in present[row]:
            along[index] += weights[index] / weights[present[row]].sum() * (tables[index][row] @ cosines[row])
    found = torch.stack([view.notes[f"attention/contribution_{layer}"] for layer in guidance.LAYERS])
    torch.testing.assert_close(found, along / along.sum())


def test_a_token_whose_attended_share_its_latents_costs_less(guidance, rng):
    """The direction of the term: codes that agree along the links against codes that agree elsewhere."""
    view, windows = guided_view(guidance, rng)
    term = Guidance(Attention(guidance.LAYERS), 0.3, 0)
    A, _, _ = mixed(guidance, windows, torch.softmax(THETA, 0))
    partner = A.argmax(1)

    def loss(acts: Tensor) -> float:
        fresh = again(view, view.codes.values, THETA, 5)
        return float(term(with_codes(fresh, Codes(acts, None, *acts.shape))).detach())

    alone = torch.eye(windows.rows, dtype=torch.float64)
    linked = alone + alone[partner]
    wrong = alone + alone[(partner + 1) % windows.rows]
    assert loss(linked) < loss(alone) and loss(linked) < loss(wrong)


@pytest.mark.parametrize(("objective", "collapses"), [("cross_entropy", True), ("divergence", False)])
def test_the_cross_entropy_gives_one_layer_all_the_weight(guidance, rng, objective, collapses):
    """Codes stand still, the mixture learns."""
    view, _ = guided_view(guidance, rng)
    mixing, values = view.sae.extras[MIXING], view.codes.values.detach()
    optimiser = torch.optim.Adam(mixing.parameters(), lr=0.1)
    for _ in range(150):
        loss = Guidance(Attention(guidance.LAYERS), 0.3, 0, objective)(again(view, values, mixing.theta.data, 5))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    largest = float(mixing(1.0).max().detach())
    assert largest > 0.95 if collapses else 0.33 < largest < 0.8
