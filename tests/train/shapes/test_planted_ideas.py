"""A truth is planted for each idea: the variant finds it where its base does not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from saemill.train.data.batch import Batch
from saemill.train.sae.step_view import View
from saemill.train.terms.position import mass_by_range, retention
from saemill.train.terms.temporal import mean_lifetime, past_rows

from ..conftest import draw_unit, learn, scaled

D, ROWS = 32, 512
PARENTS, CHILDREN, ACTIVE, LOWER = 12, 18, 2, 12


def two_levels(rng: torch.Generator, steps: int) -> tuple[list[Batch], Tensor, Tensor, Tensor]:
    """Three of four tokens are of parents, one is of children, each of which is a sum of 2 parents and its own."""
    basis = torch.linalg.qr(torch.randn(D, D, generator=rng))[0]
    parents, own = basis[:PARENTS], basis[PARENTS : PARENTS + CHILDREN]
    pairs = torch.combinations(torch.arange(PARENTS))
    pairs = pairs[torch.randperm(len(pairs), generator=rng)[:CHILDREN]]
    C = torch.zeros(CHILDREN, PARENTS).scatter_(1, pairs, 0.5 + torch.rand(CHILDREN, 2, generator=rng))
    C = 0.8 * C / (C @ parents).norm(dim=1, keepdim=True)
    levels = (parents, C @ parents + 0.6 * own)

    def rows() -> Tensor:
        parts = []
        for atoms, count in zip(levels, (3 * ROWS // 4, ROWS // 4), strict=True):
            chosen = torch.rand(count, len(atoms), generator=rng).topk(ACTIVE, dim=1).indices
            codes = torch.zeros(count, len(atoms)).scatter_(1, chosen, 1 + torch.rand(count, ACTIVE, generator=rng))
            parts.append(codes @ atoms)
        return scaled(torch.cat(parts))

    return [Batch(rows()) for _ in range(steps)], parents, levels[1], C


def composition_r2(W: Tensor, found_C: Tensor, parents: Tensor, children: Tensor, C: Tensor) -> tuple[float, float]:
    """R^2 of the planted matrix by the found one over the children that were found, and the share of those.

    A lower latent counts for the parent that it is like; several that are like one add up.
    """
    lower = len(W) - found_C.shape[0]
    likeness = functional.normalize(children, dim=1) @ W[lower:].t()
    is_found, rows = likeness.amax(1) > 0.9, likeness.argmax(1)
    parts = (W[:lower] @ parents.t() > 0.9).float()
    found, planted = (found_C[rows] @ parts)[is_found], C[is_found]
    r2 = 1 - (planted - found).square().sum() / (planted - planted.mean()).square().sum()
    return float(r2), float(is_found.double().mean())


def test_tiers_find_what_children_are_made_of(battery, rng):
    batches, parents, children, C = two_levels(rng, 450)
    shared = {"width": 64, "k": ACTIVE, "dead_after_tokens": 5000}
    config = battery.quick(
        "tiered",
        lr=3e-3,
        base="topk",
        boundaries=(LOWER, 64),
        tier_weights=(0.1, 0.9),
        importance="fixed",
        curriculum=(0.0, 0.3),
        composition_l1=2e-5,
        **shared,
    )
    sae = learn(config, batches).sae
    r2, share = composition_r2(sae.W_dec.detach(), sae.extras["composition"].C2.detach(), parents, children, C)
    W = learn(battery.quick("topk", lr=3e-3, **shared), batches).sae.W_dec.detach()
    fitted = torch.linalg.lstsq(W[:LOWER].t(), W[LOWER:].t()).solution.t().clamp_min(0)
    assert r2 >= 0.9 and share >= 0.8
    assert composition_r2(W, fitted, parents, children, C)[0] < 0.5


def positional_batches(rng: torch.Generator, steps: int) -> list[Batch]:
    """Directions that say one thing in each quarter of the window, with a twist of the quarter's own."""
    shared, twists = draw_unit(rng, 12), draw_unit(rng, 48).view(4, 12, D)
    atoms = functional.normalize(shared + 0.6 * twists, dim=2)

    def batch() -> Batch:
        position = torch.randint(1, 32, (ROWS,), generator=rng)
        chosen = torch.rand(ROWS, 12, generator=rng).topk(2, dim=1).indices
        strength = 1 + torch.rand(ROWS, 2, 1, generator=rng)
        rows = (strength * atoms[(position * 4 // 32)[:, None], chosen]).sum(1)
        return Batch(scaled(rows), side={"position": position})

    return [batch() for _ in range(steps)]


def test_masks_keep_latents_in_their_ranges(battery, rng):
    *batches, held_out = positional_batches(rng, 401)
    shared = {"width": 64, "k": 2, "base": "topk", "context": 32, "dead_after_tokens": 20_000}

    def measured(**settings) -> tuple[float, float]:
        trainee = learn(battery.quick("positional", lr=3e-3, **shared, **settings), batches)
        view = battery.view_of(trainee, held_out)
        owner = trainee.sae.extras["mask"].range
        explained = 1 - float(view.residual.square().sum() / held_out.x.square().sum())
        return float(retention(mass_by_range(view, 32, 4), owner)), explained

    assert measured(mask="static_slicing")[0] < 0.9
    for mask in ({"mask": "hard"}, {"mask": "soft", "sigma": 2.0}):
        own, explained = measured(masked_share=1.0, **mask)
        assert own >= 0.9 and explained >= 0.8, mask


def slow_batches(rng: torch.Generator, steps: int, windows: int = 16, context: int = 33) -> list[Batch]:
    """Half of what a token says stays for about eight tokens, half is new each time."""
    slow, fast = draw_unit(rng, 16), draw_unit(rng, 16)
    window, position = torch.arange(windows * 32) // 32, torch.arange(windows * 32) % 32 + 1
    row_of = torch.full((windows, context), -1)
    row_of[window, position] = torch.arange(len(window))

    def batch() -> Batch:
        changes = torch.rand(windows, 32, generator=rng) < 1 / 8
        topic = (changes.cumsum(1) * 7 + torch.randint(0, 16, (windows, 1), generator=rng)) % 16
        word = torch.randint(0, 16, (windows, 32), generator=rng)
        size = 1 + torch.rand(2, windows * 32, 1, generator=rng)
        rows = size[0] * slow[topic.flatten()] + size[1] * fast[word.flatten()]
        return Batch(scaled(rows), side={"window": window, "position": position, "row_of": row_of, "document": window})

    return [batch() for _ in range(steps)]


def consistency(view: View, lag: int = 2) -> float:
    """Mean cosine of the first half's codes `lag` tokens apart, less that of random pairs."""
    acts, past = view.codes.dense().detach()[:, :32], past_rows(view.side, lag)
    held = (past >= 0).nonzero().view(-1)
    shuffled = torch.randperm(len(acts), generator=torch.Generator().manual_seed(0))[: len(held)]
    own, chance = (functional.cosine_similarity(acts[held], acts[o]).mean() for o in (past[held], shuffled))
    return float(own - chance)


def test_temporal_latents_change_slowly_at_the_same_explained_variance(battery, rng):
    *batches, held_out = slow_batches(rng, 251)
    shared = {"width": 64, "k": 4, "base": "topk", "dead_after_tokens": 20_000, "group_shares": (0.5, 0.0, 0.0)}

    def measured(weights) -> tuple[float, float, float]:
        trainee = learn(battery.quick("temporal", lr=3e-3, temporal_weights=weights, **shared), batches)
        view = battery.view_of(trainee, held_out)
        explained = 1 - float(view.residual.square().sum() / held_out.x.square().sum())
        return consistency(view), explained, float(mean_lifetime(view))

    base, explained_base, lifetime_base = measured((0.0, 0.0, 0.0))
    own, explained, lifetime = measured((0.3, 0.0, 0.0))
    assert own > base + 0.1
    assert explained > explained_base - 0.01
    assert lifetime > lifetime_base


def test_what_neighbours_share_gathers_in_the_first_part(battery, rng):
    """The first half of a contrastive matryoshka changes more slowly than that of a plain one."""
    *batches, held_out = slow_batches(rng, 151)
    shared = {"width": 64, "k": 4, "prefix_fractions": (0.5, 1.0), "dead_after_tokens": 20_000}
    found = {}
    for variant in ("matryoshka", "tsae"):
        view = battery.view_of(learn(battery.quick(variant, lr=3e-3, **shared), batches), held_out)
        found[variant] = consistency(view, lag=1), 1 - float(view.residual.square().sum() / held_out.x.square().sum())
    assert found["tsae"][0] > found["matryoshka"][0] + 0.1
    assert found["tsae"][1] > found["matryoshka"][1] - 0.01


def test_pursuit_leaves_less_where_latents_that_fire_together_lean_on_each_other(battery, rng):
    """Three children per parent, each leaning on it and firing only with it; the same number of active latents."""
    parents = draw_unit(rng, 32)
    atoms = torch.cat(
        [parents, functional.normalize(0.5 * parents.repeat_interleave(3, 0) + draw_unit(rng, 96), dim=1)]
    )

    def rows(count: int) -> Tensor:
        parent = torch.rand(count, 32, generator=rng).topk(3, dim=1).indices
        child = 32 + 3 * parent + torch.randint(0, 3, parent.shape, generator=rng)
        strong, weak = torch.rand(2, count, 3, generator=rng)
        return scaled(torch.zeros(count, 128).scatter_(1, parent, 1 + strong).scatter_(1, child, 0.5 + weak) @ atoms)

    batches, held_out, left = [Batch(rows(ROWS)) for _ in range(400)], rows(4 * ROWS), {}
    for variant in ("topk", "matching_pursuit"):
        config = battery.quick(variant, lr=3e-3, k=6, width=192, rounds=6, dead_after_tokens=40_000)
        sae = learn(config, batches).sae
        acts = sae.encode(held_out).detach()
        assert float((acts > 0).sum(1).double().mean()) <= 6
        left[variant] = float((held_out - sae.decode(acts)).detach().square().sum() / held_out.square().sum())
    assert left["matching_pursuit"] < 0.5 * left["topk"]
