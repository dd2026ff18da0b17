"""Initial weights fitted to the first batch, so that no training step is spent on undoing the start.

Random decoder rows with an encoder equal to them overshoot where many latents read each row: with 16 latents for each
dimension and a ReLU, the reconstruction has 55 times the variance. Before the first step, without random numbers:
0. For SAEs that map one place to another, each decoder row is pointed to where the target is when its latent fires: a
   row as drawn says nothing about the target, and random output keeps the encoder from learning what to read.
1. Thresholds, if the gate has them, are set so that the requested number of latents fire.
2. All pre-activations are lowered by one amount, so that fewer latents fire and more weakly, until the least squares
   scale of the reconstruction is 1. A gate that chooses a number of latents keeps that number: if few rows have most
   of the squares, the best amount for those would leave all others without an active latent.
3. Where lowering would do harm (to the requested number of active latents, or the meaning of signed codes), the
   encoder is scaled down instead.
If the reconstruction explains almost nothing of the target at any scale, the SAE stays as drawn.
Rows keep their length wherever 2 suffices, so that Adam turns them no faster than before: a smaller encoder would
reconstruct the first batch better still, but end worse at equal sparsity, with more dead latents (`docs/quality.md`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..data.batch import Batch
from ..parallel.dictionary_over_processes import ALL_LATENTS, Latents
from ..parallel.sums_over_processes import BatchRanks
from ..sae.gates import JumpRelu
from ..sae.kernels.dense_products import dot
from ..sae.model import SparseAutoencoder
from ..sae.side_inputs import Side
from .terms_and_constraints import Assembly

LEAST_SHARE = 0.01  # share of the target's squares that the best scale must explain
CLOSE = 0.01  # tolerance of a search, as a share of its goal
MOST_TRIES = 40


@torch.no_grad()
def fit_start(
    assembly: Assembly, batch: Batch, total_steps: int, ranks: BatchRanks, latents: Latents = ALL_LATENTS
) -> None:
    """Fit the SAE's biases, thresholds and scale; a collective call, with the same result on every rank.

    Parts that knobs switch on during the run count as in the first or the last step, whichever is more.
    """
    sae, target = assembly.sae, batch.x if batch.target is None else batch.target
    knobs = [assembly.knobs_at(step, total_steps) for step in (0, total_steps)]
    sides = [Side(batch.side, at, ranks, latents) for at in (knobs[:1] if knobs[0] == knobs[1] else knobs)]
    if batch.target is not None:
        _point_rows(sae, batch.x, target, sides[0])
    if _explained(sae, batch.x, target, sides[-1]) < LEAST_SHARE:
        return
    most = math.inf
    if isinstance(sae.gate, JumpRelu) and sae.gate.asked_l0 is not None:
        most = _place_threshold(sae, sae.gate, batch.x, sides[0], sae.gate.asked_l0)

    def excess() -> float:
        return max(_excess(sae, batch.x, target, side) for side in sides)

    amount = _search(_when_lowered(sae, excess), 1.0, most) if sae.gate.can_lower else 0.0
    if sae.gate.keeps_number:  # but not so far that rows have fewer active latents than the gate chooses
        number = _when_lowered(sae, lambda: _l0(sae, batch.x, sides[-1]))
        amount = min(amount, _search(number, (1.0 - 2.0 * CLOSE) * number(0.0), math.inf))
    sae.lower(amount)
    left = excess()
    if left > 1.0 + 2.0 * CLOSE and math.isfinite(left):
        sae.rescale(1.0 / left)


def _point_rows(sae: SparseAutoencoder, x: Tensor, target: Tensor, side: Side) -> None:
    """Set decoder rows, of length one, along the sum of the targets weighted by the latent's activations."""
    codes = sae.codes(x, side)
    with torch.enable_grad():
        W_dec = sae.W_dec.detach().requires_grad_()
        (codes.decode(W_dec) * (target - sae.b_dec.detach())).sum().backward()
    assert W_dec.grad is not None
    rows = sae.clear_unwritten(side.ranks.sum(W_dec.grad))
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    sae.W_dec.copy_(torch.where(lengths > 0, rows / lengths.clamp_min(1e-30), sae.W_dec))


def _place_threshold(sae: SparseAutoencoder, gate: JumpRelu, x: Tensor, side: Side, asked_l0: float) -> float:
    """Set the threshold of all latents so that `asked_l0` of them fire per row; return it."""

    def l0(threshold: float) -> float:
        gate.place(threshold)
        return _l0(sae, x, side)

    threshold = _search(l0, asked_l0, math.inf)
    gate.place(threshold)
    return threshold


def _when_lowered(sae: SparseAutoencoder, measure: Callable[[], float]) -> Callable[[float], float]:
    """The measurement as a function of the amount by which pre-activations are lowered."""

    def measured(amount: float) -> float:
        sae.lower(amount)
        found = measure()
        sae.lower(-amount)
        return found

    return measured


def _l0(sae: SparseAutoencoder, x: Tensor, side: Side) -> float:
    return float(side.latents.sum(side.ranks.mean(sae.codes(x, side).l0)))


def _excess(sae: SparseAutoencoder, x: Tensor, target: Tensor, side: Side) -> float:
    """How many times too large the reconstruction is: |y|^2 / <target, y>, both centred by the decoder's bias."""
    squares, agreement, _ = _products(sae, x, target, side)
    return 0.0 if squares == 0.0 else squares / agreement if agreement > 0.0 else math.inf


def _explained(sae: SparseAutoencoder, x: Tensor, target: Tensor, side: Side) -> float:
    """Share of the target's squares that the reconstruction explains at its best scale."""
    squares, agreement, wanted = _products(sae, x, target, side)
    return max(agreement, 0.0) ** 2 / (squares * wanted) if squares * wanted > 0.0 else 0.0


def _products(sae: SparseAutoencoder, x: Tensor, target: Tensor, side: Side) -> list[float]:
    """|y|^2, <target, y> and |target|^2 over all ranks."""
    y, wanted = sae.skip(x, sae.reconstruct(sae.codes(x, side), side)) - sae.b_dec, target - sae.b_dec
    pairs = ((y, y), (wanted, y), (wanted, wanted))
    own = torch.stack([dot(a, b) for a, b in pairs]).double()
    return side.latents.agree(side.ranks.sum(own)).tolist()


def _search(falling: Callable[[float], float], goal: float, most: float) -> float:
    """The amount from 0 to `most` at which a falling function reaches the goal; 0 if it starts at or below the goal."""
    low, high = 0.0, min(1.0, most)
    if not falling(low) > goal:
        return low
    while high < most and falling(high) > goal and high < 2.0**20:
        low, high = high, min(2.0 * high, most)
    amount = high
    for _ in range(MOST_TRIES):
        amount = 0.5 * (low + high)
        found = falling(amount)
        if abs(found - goal) <= CLOSE * goal:
            return amount
        low, high = (amount, high) if found > goal else (low, amount)
    return amount
