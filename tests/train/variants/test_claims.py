"""What each published variant is said to do better, on data in which that is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from saemill.cache_schema.strict_json import to_json
from saemill.train import load_sae
from saemill.train.data.batch import Batch
from saemill.train.data.scaling import unit_stats
from saemill.train.disk.sae_lens_folder import save_sae
from saemill.train.engine.step import Trainee
from saemill.train.errors import SaeInvalid
from saemill.train.variants import ortsae, treesae

from ..conftest import draw_unit, learn, scaled

D, ROWS = 32, 512


def draw_codes(rng: torch.Generator, rows: int, atoms: int, active: int) -> Tensor:
    """Each row has `active` of the atoms, of sizes 1 to 2."""
    chosen = torch.rand(rows, atoms, generator=rng).topk(active, dim=1).indices
    return torch.zeros(rows, atoms).scatter_(1, chosen, 1 + torch.rand(rows, active, generator=rng))


def left_over(x_hat: Tensor, target: Tensor) -> float:
    """Share of variance unexplained."""
    return float((target - x_hat).detach().square().sum() / (target - target.mean(0)).square().sum())


def test_a_skip_explains_what_is_linear_and_leaves_the_latents_the_rest(battery, rng):
    """The target is a turned copy of the input beside sparse features of it; at the same number of latents."""
    read, written, turned = draw_unit(rng, 32), draw_unit(rng, 32), torch.linalg.qr(torch.randn(D, D, generator=rng))[0]

    def batch(rows: int) -> Batch:
        codes = draw_codes(rng, rows, 32, 3)
        x = scaled(codes @ read + 0.3 * torch.randn(rows, D, generator=rng))
        return Batch(x, scaled(codes @ written + x @ turned))

    batches, held_out = [batch(ROWS) for _ in range(100)], batch(4 * ROWS)
    left = {}
    for variant in ("transcoder", "skip_transcoder"):
        config = battery.quick(variant, lr=1e-2, width=64, k=3, gate="batchtopk", dead_after_tokens=20_000)
        left[variant] = left_over(learn(config, batches).sae(held_out.x), held_out.target)
    assert left["skip_transcoder"] < 0.5 * left["transcoder"]


@pytest.mark.parametrize(("chunk", "expected"), [(8, [7, 6]), (2, [2] * 6)])
def test_no_chunk_of_rows_is_larger_than_asked_or_of_one_row(battery, rng, monkeypatch, chunk, expected):
    sizes, nearest = [], ortsae._nearest_cosine
    monkeypatch.setattr(ortsae, "_nearest_cosine", lambda rows: sizes.append(len(rows)) or nearest(rows))
    config = battery.quick("ortsae", width=13, k=3, chunk=chunk, every_steps=1)
    learn(config, [Batch(torch.randn(ROWS, D, generator=rng))])
    assert sizes == expected


def test_orthogonal_rows_do_not_absorb_what_fires_with_them(battery, rng):
    """A child fires only with its parent, as strongly: by itself a dictionary puts the parent into the child's row."""
    atoms = torch.linalg.qr(torch.randn(D, D, generator=rng))[0]
    parents, children = atoms[:8], atoms[8:32]

    def rows(count: int) -> Tensor:
        parent = draw_codes(rng, count, 8, 2)
        which = torch.randint(0, 6, (count, 8, 1), generator=rng)  # of three children, or none
        child = torch.zeros(count, 8, 6).scatter_(2, which, 0.7 + 0.3 * torch.rand(count, 8, 1, generator=rng))
        return scaled(parent @ parents + (parent[:, :, None] * child[:, :, :3]).flatten(1) @ children)

    batches, held_out, absorbed, left = [Batch(rows(ROWS)) for _ in range(300)], rows(4 * ROWS), {}, {}
    for variant, changes in (("batchtopk", {}), ("ortsae", {"overlap_weight": 1.0})):
        config = battery.quick(variant, lr=3e-3, width=40, k=3, dead_after_tokens=20_000, **changes)
        sae = learn(config, batches).sae
        of_child = sae.W_dec.detach()[(children @ sae.W_dec.detach().T).argmax(1)]
        absorbed[variant] = float(torch.linalg.vecdot(of_child, parents.repeat_interleave(3, 0)).mean())
        left[variant] = left_over(sae(held_out), held_out)
    assert absorbed["ortsae"] < 0.6 * absorbed["batchtopk"]
    assert left["ortsae"] < left["batchtopk"] + 0.05


def test_a_child_fires_with_its_parent_alone_and_dead_ones_change_parents(battery, rng):
    """Half of the first layer never fires: what hangs from it dies and moves to those that do, and to the root."""
    config = battery.quick("treesae", lr=3e-3, width=64, k=6, dead_after_tokens=500)
    trainee = Trainee("one", config.build(D), 40)
    sae, silent = trainee.sae, torch.arange(64) < 16
    with torch.no_grad():
        sae.b_enc[silent] -= 1e3
    before = sae.parent.clone()
    for _ in range(40):
        trainee.step(Batch(scaled(torch.randn(128, D, generator=rng))))
    assert silent[before[32:].clamp_max(63)].sum() > 8
    assert not silent[sae.parent[32:].clamp_max(63)].any()  # the root is 64
    assert (sae.parent[:32] == 64).all() and (before[32:] != sae.parent[32:]).sum() < 32
    fires = sae.encode(scaled(torch.randn(4 * ROWS, D, generator=rng))) > 0
    fires = torch.cat([fires, torch.ones(4 * ROWS, 1, dtype=torch.bool)], 1)
    assert fires[:, 32:64].any() and not (fires[:, 32:64] & ~fires[:, sae.parent[32:]]).any()
    assert (fires[:, :32].sum(1) <= 5).all() and (fires[:, 32:64].sum(1) <= 1).all()


def test_a_tree_encodes_in_float32_whatever_it_is_trained_in(battery, rng, monkeypatch):
    """With products in bfloat16 other latents are among the largest; what is saved does not depend on the machine."""
    config = battery.quick("treesae", width=512, k=32, encoder_product="bfloat16")
    sae, x = config.build(D).sae, torch.randn(64, D, generator=rng)
    acts, codes = {}, {}
    for product in ("float32", "bfloat16"):
        monkeypatch.setattr("saemill.train.sae.model.product_on", lambda device, wanted, product=product: product)
        acts[product], codes[product] = sae.encode(x), sae.codes(x).dense()
    torch.testing.assert_close(acts["float32"], codes["float32"])
    assert torch.equal(acts["bfloat16"], acts["float32"])
    assert not torch.equal(codes["bfloat16"] > 0, codes["float32"] > 0)
    assert torch.equal(sae.encode(x.view(4, 16, D)), acts["float32"].view(4, 16, 512))


def test_a_damaged_tree_is_named(battery, tmp_path):
    """A parent may be in a layer before, or none."""
    config = battery.quick("treesae", width=64, k=6, layer_fractions=(0.25, 0.5, 1.0), k_shares=(0.5, 0.25, 0.25))
    sae, stats = config.build(D).sae, unit_stats(D)
    for latent, parent in ((20, 15), (20, 64), (63, 31)):
        sae.parent[latent] = parent
        save_sae(tmp_path, sae, stats, {}, to_json(config), "treesae")
        assert load_sae(tmp_path).inner.parent[latent] == parent
    for latent, parent in ((0, 0), (15, 3), (20, 16), (20, 20), (40, 32), (63, 65), (63, -1)):
        before = int(sae.parent[latent])
        sae.parent[latent] = parent
        save_sae(tmp_path, sae, stats, {}, to_json(config), "treesae")
        with pytest.raises(SaeInvalid, match=rf"expected parents of latents .* found {parent}: copy the folder again"):
            load_sae(tmp_path)
        sae.parent[latent] = before


@pytest.mark.parametrize(("until", "last"), [(0.5, 20), (0.999, 39), (1.0, 39)])
def test_the_last_move_of_a_tree_is_within_the_run(until, last):
    moving = treesae.Moving(0.1, until)
    found = [moving(step, 40) for step in range(40)]
    assert found.index(treesae.TO_ROOT) == last and treesae.MOVE in found and set(found[last + 1 :]) <= {treesae.STAY}


@pytest.mark.parametrize("step", [1, 20])
def test_a_dead_child_that_fires_in_the_step_that_moves_keeps_its_parent(battery, step):
    """Step 1 moves dead latents to other parents, step 20 of 40 to the root."""
    config = battery.quick("treesae", move_every_fraction=0.01, dead_after_tokens=1000)
    trainee, batch = Trainee("one", config.build(D), 40), battery.batches(config, 1)[0]
    trainee.step_index = step
    trainee.counters.tokens_since_fired.fill_(1000)
    before = trainee.sae.parent.clone()
    trainee.step(batch)
    fired, moved = trainee.counters.tokens_since_fired == 0, trainee.sae.parent != before
    assert moved.any() and fired[48:].any() and not (moved & fired).any()


def test_children_are_given_out_in_proportion():
    share = torch.tensor([5.0, 0.0, 3.0, 2.0])
    assert treesae.quotas(share, 7).tolist() == [4, 0, 2, 1]
    assert treesae.quotas(torch.zeros(3), 5).sum() == 5


def test_one_dictionary_is_good_at_every_k(battery, rng):
    """As good at 2 as one trained for 2, where one trained for 8 alone is not, and no worse at 8."""
    atoms = draw_unit(rng, 64)

    def rows(count: int) -> Tensor:
        falling = draw_codes(rng, count, 64, 8).sort(1, descending=True)
        codes = torch.zeros(count, 64).scatter_(1, falling.indices, falling.values * 0.7 ** torch.arange(64))
        return scaled(codes @ atoms)

    batches, held_out, left = [Batch(rows(ROWS)) for _ in range(150)], rows(4 * ROWS), {}
    for variant, k in (("topk", 2), ("topk", 8), ("hierarchical_topk", 8)):
        sae = learn(battery.quick(variant, lr=3e-3, width=96, k=k, dead_after_tokens=20_000), batches).sae
        for asked in (2, 8):
            sae.gate.k = asked
            left[variant, k, asked] = left_over(sae(held_out), held_out)
    assert left["hierarchical_topk", 8, 2] < left["topk", 2, 2] + 0.05 < left["topk", 8, 2] - 0.05
    assert left["hierarchical_topk", 8, 8] < left["topk", 8, 8] + 0.01


def test_a_signed_latent_stands_for_a_direction_and_its_opposite(battery, rng):
    """Every direction is there with either sign: of as many latents as there are directions, each finds one."""
    atoms = draw_unit(rng, 40)

    def rows(count: int) -> Tensor:
        signs = 1.0 - 2.0 * torch.randint(0, 2, (count, 40), generator=rng)
        return scaled((draw_codes(rng, count, 40, 3) * signs) @ atoms)

    batches, held_out, left = [Batch(rows(ROWS)) for _ in range(200)], rows(4 * ROWS), {}
    for variant in ("topk", "abstopk"):
        sae = learn(battery.quick(variant, lr=3e-3, width=48, k=3, dead_after_tokens=20_000), batches).sae
        left[variant] = left_over(sae(held_out), held_out)
    assert left["abstopk"] < 0.6 * left["topk"]


def test_a_cross_layer_latent_writes_what_comes_later(battery, rng):
    """Each layer has features of its own, which its MLP and all later ones write about."""
    read, written = [[draw_unit(rng, 24) for _ in range(3)] for _ in range(2)]

    def batch(rows: int) -> Batch:
        codes = [draw_codes(rng, rows, 24, 2) for _ in read]
        seen = [scaled(code @ atoms) for code, atoms in zip(codes, read, strict=True)]
        made = [sum(codes[own] @ written[own].roll(layer, 0) for own in range(layer + 1)) for layer in range(3)]
        return Batch(torch.cat(seen, 1), torch.cat([scaled(part) for part in made], 1))

    batches, held_out = [batch(ROWS) for _ in range(120)], batch(4 * ROWS)
    shared = {"layers": (1, 2, 3), "hook": "mlp_in", "width": 96, "k": 6, "dead_after_tokens": 20_000}
    sae = learn(battery.quick("clt", lr=1e-2, **shared), batches).sae
    W_dec = sae.W_dec.detach().view(96, 3, D)
    assert all(float(W_dec[sae.layer_of == own, :own].abs().sum()) == 0 for own in range(3))
    last = slice(2 * D, 3 * D)
    left = left_over(sae(held_out.x)[:, last], held_out.target[:, last])
    alone = battery.quick("transcoder", lr=1e-2, width=32, k=6, dead_after_tokens=20_000)
    of_last = [Batch(one.x[:, last].contiguous(), one.target[:, last].contiguous()) for one in (*batches, held_out)]
    assert left < 0.4 * left_over(learn(alone, of_last[:-1]).sae(of_last[-1].x), of_last[-1].target)


def test_a_crosscoder_has_one_latent_for_what_is_in_every_layer(battery, rng):
    """Each feature has a direction of its own in each of three layers, and one code: a latent finds all three."""
    atoms = torch.stack([draw_unit(rng, 24) for _ in range(3)], 1)

    def batch() -> Batch:
        return Batch(
            torch.cat([scaled(part) for part in (draw_codes(rng, ROWS, 24, 3) @ atoms.flatten(1)).chunk(3, 1)], 1)
        )

    config = battery.quick("crosscoder", lr=1e-2, layers=(1, 2, 3), width=32, k=3, dead_after_tokens=20_000)
    sae = learn(config, [batch() for _ in range(100)]).sae
    written = functional.normalize(sae.W_dec.detach().view(-1, 3, D), dim=2)
    cosines = torch.einsum("fld,ald->afl", written, atoms)
    of_first = cosines[:, :, 0].argmax(1)
    whole = cosines[torch.arange(24), of_first].amin(1)
    assert (whole > 0.9).double().mean() > 0.8


def test_a_causal_crosscoder_reads_one_layer(battery):
    config = battery.quick("crosscoder", causal=True, layers=(1, 2, 3))
    (batch,) = battery.batches(config, 1)
    sae = battery.train(config, 5)[0].sae
    changed = batch.x.clone()
    changed[:, D : 2 * D] += 1.0
    differs = (sae.encode(changed) != sae.encode(batch.x)).any(0)
    assert bool(differs.any()) and set(sae.layer_of[differs].tolist()) == {1}
    W_dec = sae.W_dec.detach().view(-1, 3, D).norm(dim=2)
    assert bool((W_dec[sae.layer_of == 2, :2] == 0).all()) and bool((W_dec[sae.layer_of == 0] > 0).all(0).all())


@pytest.mark.parametrize(("sparsity", "reaches"), [("target", False), ("tanh", True)])
def test_the_smooth_l0_of_jumprelu_has_a_gradient_to_every_parameter(battery, sparsity, reaches):
    config = battery.quick("jumprelu", sparsity=sparsity, frequency_penalty=1.0)
    trainee = Trainee("one", config.build(D), battery.STEPS)
    view = battery.view_of(trainee, battery.batches(config, 1)[0])
    terms = {term.name: term.fn for term in trainee.assembly.terms}
    terms["l0"](view).backward()
    assert bool(trainee.sae.W_enc.grad is not None and trainee.sae.W_enc.grad.any()) == reaches
    assert bool(trainee.sae.gate.raw_threshold.grad.any())


@pytest.mark.parametrize("penalty", [0.0, 3e-3])
def test_a_threshold_of_jumprelu_that_nothing_reaches_comes_down(battery, rng, penalty):
    config = battery.quick(
        "jumprelu", lr=3e-3, width=96, target_l0=4.0, dead_penalty=penalty, dead_after_tokens=ROWS, start="fitted"
    )
    trainee, atoms = Trainee("one", config.build(D), 100), draw_unit(rng, 48)
    for step in range(100):
        x = scaled(draw_codes(rng, ROWS, 48, 3) @ atoms)
        if step == 20:
            raised = 1.2 * trainee.sae.encode(x)[:, :3].detach().amax() / D**0.5
            trainee.sae.gate.raw_threshold.data[:3] = raised
        trainee.step(Batch(x))
    came_down = trainee.sae.gate.raw_threshold[:3].detach() < raised - 0.05
    assert came_down.any() if penalty else not came_down.any()


def test_a_penalty_on_frequency_keeps_latents_from_firing_everywhere(battery, rng):
    """One direction is in three of four rows; L0 stays what was asked for."""
    atoms = draw_unit(rng, 48)

    def rows(count: int) -> Tensor:
        codes = draw_codes(rng, count, 48, 3)
        codes[:, 0] = torch.where(torch.rand(count, generator=rng) < 0.75, 1.0 + torch.rand(count, generator=rng), 0.0)
        return scaled(codes @ atoms)

    batches, held_out, most = [Batch(rows(ROWS)) for _ in range(200)], rows(4 * ROWS), {}
    for weight in (0.0, 0.1):
        config = battery.quick("jumprelu", lr=3e-3, width=96, target_l0=4.0, frequency_penalty=weight)
        fires = learn(config, batches).sae.encode(held_out) > 0
        most[weight] = float(fires.double().mean(0).amax())
        assert float(fires.sum(1).double().mean()) == pytest.approx(4.0, rel=0.08)
    assert most[0.1] < 0.4 * most[0.0]
