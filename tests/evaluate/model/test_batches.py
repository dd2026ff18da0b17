"""Batches of a store's windows: its rows, whatever is read at once, in no more memory than a few chunks take."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saemill.cache_schema import Request, Store, layout, reader
from saemill.evaluate.model.batches import joined, store_batches


@pytest.mark.parametrize(("first", "count", "size"), [(0, 12, 4), (3, 11, 3), (6, 2, 16)])
def test_batches_are_the_stores_rows_and_hold_a_few_chunks(make_world, builder, monkeypatch, first, count, size):
    """A shard at context 1,024 has gigabytes of each layer, and evaluations read many layers."""
    monkeypatch.setattr(layout, "CHUNK_BYTES", 1)  # a window in each chunk, seven in a shard
    world, made, read, layer = make_world(fresh=True), [], [], builder.LAYER
    shard_memory, run = reader.shard_memory, Store._run

    def noted_memory(manifest, request, windows):
        made.append(windows if request.layers else 0)
        return shard_memory(manifest, request, windows)

    def noted_run(store, job, shard, path):
        read.append((shard, path))
        run(store, job, shard, path)

    with Store.open(world.store) as store:
        request = Request((layer,), (layer,), True, True, split="test", windows=(first, first + count))
        shards = [store.read(request, span) for span in store.spans(request)]
        monkeypatch.setattr(reader, "shard_memory", noted_memory)
        monkeypatch.setattr(Store, "_run", noted_run)
        batches = list(store_batches(store, "test", (layer,), (layer,), size, first, count))
    assert [len(batch) for batch in batches] == [min(size, count - start) for start in range(0, count, size)]
    found = joined(batches)
    for name, values in (("tokens", found.tokens), ("documents", found.documents)):
        np.testing.assert_array_equal(values, np.concatenate([getattr(shard, name) for shard in shards]))
    rows = found.resid[layer].view(torch.uint16).numpy()
    np.testing.assert_array_equal(rows, np.concatenate([shard.resid[layer] for shard in shards]))
    for name in ("indices", "data", "kept_mass"):
        parts = [getattr(shard.attention[layer], name) for shard in shards]
        np.testing.assert_array_equal(getattr(found.attention[layer], name), np.concatenate(parts))
    assert 0 < max(made) <= 2
    assert all(read.count(one) == 1 for one in read if "resid" not in one[1])
