"""Links that stand in for attention: by distance, and to the same token."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from saemill.train.engine.step import Trainee
from saemill.train.errors import ConfigInvalid
from saemill.train.sae.attention.attention_links import links_of, nearest_links, same_token_links
from saemill.train.sae.side_inputs import Side

ROWS = 96


@pytest.fixture
def read(battery):
    """The links of one batch, its side inputs, and A^l [L, B, T] of any links."""
    config = battery.quick("attention", base="topk", links="same_token")
    batch = battery.batches(config, 1, rows=ROWS)[0]
    side = Side(batch.side, config.build(battery.D).knobs_at(0, 1))
    links = links_of(batch.side["attention"], config.attention_layers, batch.side["row_of"], ROWS)

    def dense(links):
        table = torch.zeros(*links.attends.shape, links.context)
        return table.index_put((links.layer, links.row, links.key), links.share, accumulate=True)

    return links, side, dense


def test_nearest_links_are_as_many_and_go_to_the_tokens_before(read):
    links, side, dense = read
    counts, nearest = (dense(links)[0] > 0).sum(1), nearest_links(links, side)  # of tokens, to which heads share links
    found = dense(nearest)[0]
    assert len(links.row) > counts.sum() == links.is_first.sum()
    assert (found > 0).sum() == nearest.is_first.sum()
    for row in range(ROWS):
        position, count = int(side["position"][row]), int(counts[row])
        keys = [position - 1 - rank for rank in range(count) if position - 1 - rank > 0]
        expected = torch.zeros(links.context)
        expected[keys] = torch.tensor([1.0 / (position - key) for key in keys])
        torch.testing.assert_close(found[row], expected / expected.sum().clamp_min(1e-9))


def test_same_token_links_go_to_every_earlier_place_of_the_token(read):
    links, side, dense = read
    found = dense(same_token_links(links, side))[0]
    assert found.sum() > 10
    for row in range(ROWS):
        before = [
            other
            for other in range(ROWS)
            if side["window"][other] == side["window"][row]
            and side["position"][other] < side["position"][row]
            and side["token"][other] == side["token"][row]
        ]
        expected = torch.zeros(links.context)
        if before and links.attends[0, row]:
            expected[side["position"][before]] = 1.0 / len(before)
        torch.testing.assert_close(found[row], expected)


@pytest.mark.parametrize("kind", ["nearest", "same_token"])
@pytest.mark.parametrize("variant", ["attention", "hierarchical"])
def test_a_control_trains_and_is_not_guided_by_attention(battery, variant, kind):
    config = battery.quick(variant, base="topk", alpha=1.0, alpha_warmup_fraction=0.0)
    control = dataclasses.replace(config, links=kind)
    batches = battery.batches(control, 3)
    losses = []
    for one in (config, control):
        trainee = Trainee("one", one.build(battery.D), battery.STEPS)
        losses.append([float(trainee.step(batch).measured["loss/guidance"]) for batch in batches])
    assert all(torch.tensor(losses).flatten().isfinite())
    assert losses[0] != losses[1]


def test_one_control_at_a_time(battery):
    config = dataclasses.replace(battery.quick("attention"), links="nearest", shuffle_attention=True)
    with pytest.raises(ConfigInvalid, match="links=nearest and shuffle_attention are two controls"):
        config.needs()
