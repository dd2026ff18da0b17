"""Which rows of stored text count."""

from __future__ import annotations

import torch

from saemill.cache_schema.sites import Site
from saemill.evaluate.context.stored_windows import ordinary_rows, without_massive
from saemill.evaluate.model.batches import store_batches


def test_rows_that_are_massive_at_any_place_of_the_store_are_left_out(world, builder, open_context):
    """One that is no number is not: whoever adds it up shall see it. Of other places nobody knows what is massive."""
    context, subject = open_context(world, massive_norms=10.0), builder.subject(builder.make_sae())
    (batch,) = store_batches(context.store, "test", (builder.LAYER,), batch_windows=20)
    assert torch.equal(ordinary_rows(context, subject, batch), batch.keep)
    acts = batch.resid[builder.LAYER].float()
    acts[0, 3], acts[1, 4], acts[2, 6] = 1e6, torch.inf, torch.nan
    expected = batch.keep.clone()
    assert expected[0, 3] and expected[1, 4] and expected[2, 6]
    assert torch.equal(without_massive(context, batch.keep, {Site("mlp_out", builder.LAYER): acts}), expected)
    expected[0, 3] = False
    assert torch.equal(without_massive(context, batch.keep, {builder.LAYER: acts}), expected)
