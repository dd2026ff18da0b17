"""Dead latents begin anew where the living rebuild least, and fire."""

from __future__ import annotations

import pytest
import torch

from saemill.train.engine.step import Trainee
from saemill.train.sae.gates import Relu
from saemill.train.terms.resampling import Resampling, drawn_rows, resample


def test_the_dead_take_what_is_left_of_rows_and_the_living_stay(rng, shaping):
    dead = torch.arange(shaping.LATENTS) % 3 == 0
    view = shaping.make_views(rng, shaping.make_sae(rng, Relu()), dead)()
    before = {name: table.detach().clone() for name, table in view.sae.named_parameters()}
    living = ~dead
    with torch.no_grad():
        resample(view, dead)
    for name in ("W_enc", "W_dec", "b_enc"):
        assert torch.equal(getattr(view.sae, name)[living], before[name][living])
    left = torch.nn.functional.normalize(view.residual, dim=1)
    for row in view.sae.W_dec.detach()[dead]:
        assert float((left @ row).max()) == pytest.approx(1.0)
    length = before["W_enc"][living].norm(dim=1).mean()
    torch.testing.assert_close(view.sae.W_enc.detach()[dead], 0.2 * length * view.sae.W_dec.detach()[dead])
    torch.testing.assert_close(view.sae.b_enc.detach()[dead], (0.2 * before["b_enc"][living].mean()).expand(dead.sum()))


def test_a_dead_latent_that_fires_in_the_step_that_resamples_keeps_its_rows(rng, shaping):
    sae = shaping.make_sae(rng, Relu())
    with torch.no_grad():
        sae.b_enc[:5] -= 100.0
    view = shaping.make_views(rng, sae, torch.arange(shaping.LATENTS) < 10)()
    assert (view.codes.fired[5:] > 0).all()
    before, resampling = sae.W_dec.detach().clone(), Resampling(1)
    resampling.observe(view)
    assert (sae.W_dec == before).all(dim=1).tolist() == [False] * 5 + [True] * (shaping.LATENTS - 5)
    assert int(resampling.resampled) == 5


def test_rows_are_drawn_by_their_squared_loss(rng, shaping):
    view = shaping.make_views(rng, shaping.make_sae(rng, Relu()))()
    chances = view.residual.square().sum(1).square()
    found = torch.bincount(drawn_rows(view, 20_000), minlength=len(chances)) / 20_000
    torch.testing.assert_close(found, (chances / chances.sum()).float(), atol=0.02, rtol=0)


@pytest.mark.parametrize(("every", "until", "come_back"), [(0, 0.7, False), (4, 0.7, True), (4, 0.0, False)])
def test_dead_latents_fire_again_until_a_part_of_the_run_is_over(battery, every, until, come_back):
    settings = {"aux_weight": 0.0, "dead_after_tokens": 600, "resample_every_steps": every, "resample_until": until}
    config = battery.quick("tiered", **settings)
    trainee = Trainee("one", config.build(battery.D), battery.STEPS)
    batches = battery.batches(config, 12)
    trainee.step(batches[0])
    with torch.no_grad():
        trainee.sae.b_enc[:10] -= 100.0
    for batch in batches[1:]:
        report = trainee.step(batch)
    assert bool((trainee.counters.tokens_since_fired[:10] == 0).all()) == come_back
    if every:
        resampling = trainee.sae.extras["resampling"]
        assert isinstance(resampling, Resampling)
        assert (float(report.measured["resampled"]) >= 10) == come_back
