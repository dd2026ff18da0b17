"""From the store's rows of attention to links between the rows of a batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from saemill.train.errors import ConfigInvalid
from saemill.train.sae.attention.attention_links import Links, links_of
from saemill.train.sae.kernels import hardware


def dense(links: Links, layer: int, rows: int) -> Tensor:
    """[B, B]"""
    own = links.layer == layer
    table = torch.zeros(rows, rows, dtype=torch.float64)
    return table.index_put((links.row[own], links.key_row[own]), links.share[own].double(), accumulate=True)


@pytest.mark.parametrize("head", [None, 0, 1])
@pytest.mark.parametrize("min_mass", [0.0, 0.05, 0.4])
def test_links_are_their_definition(guidance, rng, head, min_mass):
    windows = guidance.make_windows(rng)
    links = links_of(windows.attention, guidance.LAYERS, windows.row_of, windows.rows, head=head, min_mass=min_mass)
    for index, layer in enumerate(guidance.LAYERS):
        expected = guidance.oracle_links(windows, layer, head, max(min_mass, 1e-9))
        torch.testing.assert_close(dense(links, index, windows.rows), expected, rtol=1e-5, atol=1e-7)
        if min_mass:
            assert torch.equal(links.attends[index], expected.sum(1) > 0)
    assert 0 < int((expected.sum(1) > 0).sum()) < windows.rows


def test_links_know_where_they_stand(guidance, rng):
    windows = guidance.make_windows(rng)
    links = links_of(windows.attention, guidance.LAYERS, windows.row_of, windows.rows)
    assert bool((links.place.diff() >= 0).all())
    places = torch.arange(links.attends.numel()).repeat_interleave(links.offsets.diff().long())
    assert torch.equal(places, links.place)
    window = windows.places.window[links.row]
    assert torch.equal(window, windows.places.window[links.key_row])
    assert torch.equal(links.key, windows.places.position[links.key_row])
    assert bool((links.key < windows.places.position[links.row]).all() and (links.key > 0).all())


def test_entries_that_are_left_out_stay_where_they_were(guidance, rng, monkeypatch):
    """On a GPU none is dropped. Thousands of zeros for one place are added one after the other there."""
    windows = guidance.make_windows(rng, windows=30)
    expected = links_of(windows.attention, guidance.LAYERS, windows.row_of, windows.rows)
    monkeypatch.setattr(hardware, "READ_AT_ONCE", set())
    links = links_of(windows.attention, guidance.LAYERS, windows.row_of, windows.rows)
    assert len(links.share) > len(expected.share) and torch.equal(links.attends, expected.attends)
    for index in range(len(guidance.LAYERS)):
        torch.testing.assert_close(dense(links, index, windows.rows), dense(expected, index, windows.rows))
    assert int(torch.bincount(links.place).max()) < 0.05 * len(links.place)


@pytest.mark.parametrize("more", [0, 1, 500])
@pytest.mark.parametrize("apart", [False, True])
def test_padded_rows_have_the_same_links(guidance, rng, monkeypatch, more, apart):
    """Those of a GPU, which gets as many entries in one batch as in the next; evenly spread over the rows."""
    windows = guidance.make_windows(rng, windows=30)
    room = max(len(rows.indices) for rows in windows.attention.values()) + more
    padded = {layer: rows.padded(room) for layer, rows in windows.attention.items()}
    monkeypatch.setattr(hardware, "READ_AT_ONCE", set())
    read = {"row_of": windows.row_of, "num_rows": windows.rows, "apart": apart}
    expected, links = (links_of(attention, guidance.LAYERS, **read) for attention in (windows.attention, padded))
    assert len(links.share) == room * len(guidance.LAYERS) and torch.equal(links.attends, expected.attends)
    for index in range(len(guidance.LAYERS)):
        torch.testing.assert_close(dense(links, index, windows.rows), dense(expected, index, windows.rows))
    for layer, rows in padded.items():
        added = rows.indptr.diff() - windows.attention[layer].indptr.diff()
        assert int(added.max() - added.min()) <= 1
    for rows in (links.place, links.layer * windows.rows + links.key_row):  # sums of gradients are by key
        assert int(torch.bincount(rows).max()) < 4 * len(rows) / len(links.attends.view(-1))


def test_the_control_gives_each_token_the_row_of_another_window(guidance, rng):
    """Windows without holes, so that nothing but the window changes."""
    windows = guidance.make_windows(rng, windows=4)
    row_of = torch.arange(4 * guidance.CONTEXT).view(4, -1)
    rows = row_of.numel()
    moved = links_of(windows.attention, (17,), row_of, rows, apart=True)
    own = links_of(windows.attention, (17,), row_of, rows)
    table = {name: dense(links, 0, rows).view(4, 9, 4, 9) for name, links in (("moved", moved), ("own", own))}
    sources = set()
    for window in range(4):
        for query in range(2, 9):
            found = table["moved"][window, query, window]
            if not bool(found.any()):
                continue
            source = [other for other in range(4) if torch.equal(table["own"][other, query, other], found)]
            assert source and source != [window]
            if len(source) == 1:  # rows of two windows may be the same by chance, on some processors
                sources.add((window - source[0]) % 4)
    assert len(moved.share) == len(own.share) and len(sources) == 3


def test_the_control_needs_two_windows(guidance, rng):
    windows = guidance.make_windows(rng, windows=1)
    with pytest.raises(ConfigInvalid, match=r"at least two windows.*larger data.batch_tokens"):
        links_of(windows.attention, (17,), windows.row_of, windows.rows, apart=True)


def test_a_head_that_is_not_there(guidance, rng):
    windows = guidance.make_windows(rng)
    with pytest.raises(ConfigInvalid, match="found 2 and a store with 2 heads"):
        links_of(windows.attention, (17,), windows.row_of, windows.rows, head=2)
    averaged = guidance.make_windows(rng, heads=1)
    with pytest.raises(ConfigInvalid, match="heads averaged into one"):
        links_of(averaged.attention, (17,), averaged.row_of, averaged.rows, head=1)


def test_a_batch_without_any_link(guidance, rng):
    windows = guidance.make_windows(rng)
    nothing = guidance.as_rows(torch.zeros_like(windows.dense[17]))
    links = links_of({17: nothing}, (17,), windows.row_of, windows.rows)
    assert links.share.numel() == 0 and not bool(links.attends.any())
    assert dataclasses.asdict(links)["context"] == guidance.CONTEXT
