"""What a step draws, against picking it from the written arrays by hand."""

from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch

from saemill.cache_schema import AttentionCsr, Store, to_float32
from saemill.cache_schema.stored_dtypes import SmallDtype, to_codes
from saemill.cache_schema.token_counts_and_summary import pair_share
from saemill.train.data.batch import Kind, Needs, rounded_up
from saemill.train.data.batch_stream import Feed, held_out
from saemill.train.data.block import even_size
from saemill.train.data.scaling import stats_from_moments
from saemill.train.data.shuffle_order import Plan, measure_split
from saemill.train.run.preflight import layer_stats

CPU = torch.device("cpu")
TOKENS = Needs(inputs=(3,), tokens=True, documents=True, positions=True)
WINDOWS = Needs(inputs=(3, 4), targets=(4,), attention_layers=(3,), tokens=True, windows=True)


@pytest.fixture
def store(written):
    with Store.open(written["path"]) as store:
        yield store


def make_feed(store, needs=(TOKENS,), pool_tokens=480, batch_tokens=40, device=CPU, massive_norms=None, **share):
    sizes = measure_split(store, "train")
    plan = Plan(sizes, batch_tokens=batch_tokens, pool_tokens=pool_tokens, seed=0)
    stats = {layer: layer_stats(store, layer, massive_norms) for layer in (3, 4)}
    return Feed(store, plan, needs, stats, device, **share)


def raw_places(written, draw, windows):
    """The (window, position) of every row."""
    rows = draw.rows[Kind(windows, ())]
    return draw.store_windows(Kind(windows, ())), rows.places % written["tokens"].shape[1]


def test_sizes_count_what_trains(store, written):
    sizes = measure_split(store, "train")
    tokens, documents = written["tokens"][:220], written["documents"][:220]
    assert sizes.trainable.tolist() == (tokens != 2).sum(1).tolist()
    assert sizes.same_document == pair_share(np.unique(documents[tokens != 2], return_counts=True)[1])
    assert sizes.same_first_document == pair_share(np.unique(documents[:, 0], return_counts=True)[1])
    assert sizes.first_window == 0 and sizes.tokens == (tokens != 2).sum()


def test_an_epoch_draws_tokens_once_and_special_tokens_never(store, written):
    feed = make_feed(store)
    seen = []
    for step in range(feed.plan.steps_in(1)):
        window, position = raw_places(written, feed.draw(step), False)
        seen += list(zip(window.tolist(), position.tolist(), strict=True))
    feed.close()
    assert feed.plan.num_blocks > 2
    assert len(set(seen)) == len(seen) == 40 * feed.plan.steps_in(1)
    assert all(position > 0 and window < 220 for window, position in seen)


def test_rows_are_the_stores_values_scaled(store, written):
    feed = make_feed(store)
    for step in (0, 9, 23):
        draw = feed.draw(step)
        batch = draw.batch(TOKENS)
        window, position = raw_places(written, draw, False)
        expected = to_float32(written["resid"][3][window, position], "bfloat16")
        assert torch.equal(batch.x, torch.from_numpy(expected) * draw._scales[3])
        assert batch.side["token"].tolist() == written["tokens"][window, position].tolist()
        assert batch.side["document"].tolist() == written["documents"][window, position].tolist()
        assert batch.side["position"].tolist() == position.tolist()
        assert batch.target is None
    feed.close()


@pytest.mark.parametrize("small", get_args(SmallDtype))
def test_rows_of_a_small_store_are_its_codes_times_their_scales(write_store, tmp_path, small):
    """On the device, massive rows left out; torch reads fp8 as we write it."""
    written = write_store(tmp_path / "store", stored_as=small, massive=[(3, 40, 5), (3, 41, 6)])
    with Store.open(written["path"]) as store:
        feed = make_feed(store, massive_norms=10.0, pool_tokens=10_000)
        seen = []
        for step in range(feed.plan.steps_in(1)):
            draw = feed.draw(step)
            batch = draw.batch(TOKENS)
            kind = TOKENS.kind([3, 4])
            window, position = draw.store_windows(kind), draw.rows[kind].places % 8
            codes, scales = to_codes(written["resid"][3][window, position], "bfloat16", small)
            expected = torch.from_numpy(to_float32(codes, small, scales))
            assert torch.equal(batch.x, expected * draw._scales[3])
            seen += list(zip(window.tolist(), position.tolist(), strict=True))
        feed.close()
    assert len(seen) > 1400 and not {(40, 5), (41, 6)} & set(seen)


def test_mean_norm_is_the_root_of_the_width(store):
    feed = make_feed(store, pool_tokens=10000)
    norms = torch.cat([feed.draw(step).batch(TOKENS).x.norm(dim=1) for step in range(feed.plan.steps_in(1))])
    feed.close()
    assert norms.mean().item() == pytest.approx(16**0.5, rel=0.01)


def test_windows_come_whole_with_their_attention(store, written):
    feed = make_feed(store, needs=(WINDOWS,))
    draw = feed.draw(3)
    batch = draw.batch(WINDOWS)
    windows = draw.block.windows[draw.rows[Kind(True, ())].windows]
    feed.close()
    assert len(batch.x) == (written["tokens"][windows] != 2).sum()
    row_of = batch.side["row_of"].numpy()
    assert (row_of[:, 0] == -1).all() and (np.sort(row_of[row_of >= 0]) == np.arange(len(batch.x))).all()
    for at, window in enumerate(windows):
        rows = row_of[at, 1:]
        for layer, part in ((3, batch.x[:, :16]), (4, batch.x[:, 16:])):
            expected = torch.from_numpy(to_float32(written["resid"][layer][window, 1:], "bfloat16"))
            assert torch.equal(part[rows], expected * draw._scales[layer])
        assert (batch.side["window"][rows] == at).all()
        assert batch.side["position"][rows].tolist() == list(range(1, 8))
    assert torch.equal(batch.target, batch.x[:, 16:])
    expected = AttentionCsr.concat([written["attention"].slice(window, window + 1) for window in windows])
    attention = batch.side["attention"][3]
    assert attention.indptr.tolist() == expected.indptr.tolist()
    assert attention.data.tolist() == expected.data.astype(np.float32).tolist()
    assert attention.kept_mass.numpy().tolist() == expected.kept_mass.astype(np.float32).tolist()


def test_a_gpu_gets_attention_of_few_sizes_whatever_else_is_read(store):
    """As if all rows were as long as the longest. An SAE trains to the same bits next to one that reads a denser
    layer."""
    feed = make_feed(store, needs=(WINDOWS,))
    draw = feed.draw(3)
    exact = draw.batch(WINDOWS).side["attention"][3]
    feed.close()
    draw.block.attention[9] = replace(draw.block.attention[3], begins=4 * draw.block.attention[3].begins)
    draw.device = torch.device("cuda")
    found = draw.batch(WINDOWS).side["attention"][3]
    longest = int(draw.block.attention[3].indptr.diff().max())
    assert len(found.indices) == longest * (len(exact.indptr) - 1) > len(exact.indices)
    for name, part in vars(exact.padded(len(found.indices))).items():
        assert torch.equal(vars(found)[name], part), name


def test_rows_of_very_different_length_are_padded_to_few_sizes():
    layer = SimpleNamespace(longest=64, kept_mass=torch.zeros(5, 1, 8), entries=lambda windows: 99 * len(windows))
    assert even_size([layer], np.arange(3)) == rounded_up(297) == 320
    assert even_size([layer, replace_in(layer, longest=20)], np.arange(3)) == 320
    assert even_size([replace_in(layer, longest=20)], np.arange(3)) == 20 * 8 * 3


def replace_in(one: SimpleNamespace, **changes: int) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(one), **changes})


def test_what_a_fleet_shares_goes_to_the_device_once(store):
    feed = make_feed(store, needs=(WINDOWS,))
    draw = feed.draw(3)
    first, second = draw.batch(WINDOWS), draw.batch(WINDOWS)
    feed.close()
    assert first.x is second.x
    assert first.side["attention"][3] is second.side["attention"][3]
    assert all(first.side[name] is second.side[name] for name in ("position", "window", "row_of"))


@pytest.mark.gpu
def test_a_gpu_that_is_behind_draws_what_a_cpu_draws(store):
    """Blocks are filled anew while earlier draws still wait their turn on the GPU."""
    gpu, cpu = (make_feed(store, needs=(TOKENS, WINDOWS), device=device) for device in (torch.device("cuda"), CPU))
    drawn = []
    for step in range(3 * gpu.plan.blocks(0)[0].steps):
        torch.cuda._sleep(10**8)
        draw = gpu.draw(step)
        drawn.append([draw.batch(needs) for needs in (TOKENS, WINDOWS)])
    for step, batches in enumerate(drawn):
        draw = cpu.draw(step)
        for needs, batch in zip((TOKENS, WINDOWS), batches, strict=True):
            expected = draw.batch(needs)
            assert torch.equal(batch.x.cpu(), expected.x)
            for name in expected.side.keys() - {"attention"}:
                assert torch.equal(batch.side[name].cpu(), expected.side[name]), name
        found = batches[1].side["attention"][3]
        padded = expected.side["attention"][3].padded(len(found.indices))
        for name, part in vars(padded).items():
            assert torch.equal(vars(found)[name].cpu(), part), name
    gpu.close()
    cpu.close()


@pytest.mark.gpu
def test_no_draw_inside_a_block_waits_for_the_gpu(store):
    """On a feed of one block, which reads nothing ahead: what CUDA refuses it refuses to all threads."""
    feed = make_feed(store, needs=(TOKENS, WINDOWS), pool_tokens=10_000, device=torch.device("cuda"))
    feed.draw(0)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for step in range(feed.plan.steps_in(1)):
            draw = feed.draw(step)
            assert all(len(draw.batch(needs).x) for needs in (TOKENS, WINDOWS))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    feed.close()


@pytest.mark.gpu
@pytest.mark.parametrize("small", get_args(SmallDtype))
def test_a_gpu_draws_of_a_small_store_what_a_cpu_draws(write_store, tmp_path, small):
    written = write_store(tmp_path / "store", stored_as=small, massive=[(3, 40, 5), (3, 41, 6)])
    with Store.open(written["path"]) as store:
        gpu, cpu = (make_feed(store, device=device, massive_norms=10.0) for device in (torch.device("cuda"), CPU))
        for step in range(gpu.plan.steps_in(1)):
            assert torch.equal(gpu.draw(step).batch(TOKENS).x.cpu(), cpu.draw(step).batch(TOKENS).x)
        gpu.close()
        cpu.close()


def test_a_fleet_sees_what_each_would_see_alone(store):
    """Both kinds of rows from one read: the same as from a stream of its own."""
    both = make_feed(store, needs=(TOKENS, WINDOWS))
    for needs in (TOKENS, WINDOWS):
        alone = make_feed(store, needs=(needs,))
        for step in (0, 11, 12, 30):
            assert torch.equal(both.draw(step).batch(needs).x, alone.draw(step).batch(needs).x)
        alone.close()
    both.close()


def test_a_step_is_the_same_from_any_start(store):
    straight, jumping = make_feed(store), make_feed(store)
    expected = {step: straight.draw(step).batch(TOKENS).x for step in range(100)}
    for step in (77, 78, 5, 99, 40):
        assert torch.equal(jumping.draw(step).batch(TOKENS).x, expected[step])
    straight.close()
    jumping.close()


def test_processes_share_each_batch(store):
    whole = make_feed(store)
    parts = [make_feed(store, rank=rank, size=3) for rank in range(3)]
    joined = torch.cat([part.draw(7).batch(TOKENS).x for part in parts])
    assert torch.equal(joined, whole.draw(7).batch(TOKENS).x)
    for feed in (whole, *parts):
        feed.close()


def test_a_split_that_fits_is_read_once(store):
    feed = make_feed(store, pool_tokens=10_000)
    first = feed.draw(0).block
    assert feed.draw(feed.plan.steps_in(2) + 1).block is first
    feed.close()


def test_the_held_out_split_comes_in_order(store):
    drawn = list(
        held_out(store, [TOKENS], {3: stats_from_moments(store.moments(3))}, CPU, tokens=10**6, batch_tokens=64)
    )
    windows = np.concatenate([draw.block.windows[draw.rows[Kind(False, ())].windows] for draw in drawn])
    assert sorted(set(windows.tolist())) == list(range(220, 260))


def test_held_out_rows_are_all_there_and_no_massive_one_is_read_by_others(write_store, tmp_path):
    """As in training, which has none of them: what reads other rows of its window does not find them."""
    places = [(230, 5), (231, 6)]
    write_store(tmp_path / "store", massive=[(3, *places[0]), (4, *places[1])])
    with Store.open(tmp_path / "store") as store:
        stats = {layer: layer_stats(store, layer, 10.0) for layer in (3, 4)}
        for layers, unread in (((3,), places[:1]), ((3, 4), places)):
            needs, lost = Needs(inputs=layers, windows=True), []
            for draw in held_out(store, [needs, WINDOWS], stats, CPU, tokens=10**6, batch_tokens=10**6):
                side, rows = draw.batch(needs).side, draw.rows[Kind(True, ())]
                number = side["row_of"][side["window"], torch.from_numpy(rows.places % 8)]
                assert torch.equal(number.where(number >= 0, torch.arange(len(number))), torch.arange(len(number)))
                window = draw.store_windows(Kind(True, ()))[number < 0]
                lost += zip(window.tolist(), (rows.places % 8)[number < 0].tolist(), strict=True)
            assert sorted(lost) == unread


def test_damage_is_named(write_store, tmp_path):
    """A flipped byte ends the stream with the store's own error: shard, array and remedy."""
    from saemill.cache_schema import ShardCorrupt

    write_store(tmp_path / "store")
    chunk = sorted((tmp_path / "store/resid/layer_3").glob("c.2.*"))[0]
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    with Store.open(tmp_path / "store") as store:
        feed = make_feed(store)
        with pytest.raises(ShardCorrupt, match=r"shard 2.*sae-store repair"):
            for step in range(feed.plan.steps_in(1)):
                feed.draw(step)
        feed.close()


def test_no_step_is_drawn_from_another_store_in_its_place(write_store, tmp_path):
    from saemill.cache_schema import StoreMismatch

    write_store(tmp_path / "first")
    write_store(tmp_path / "other", layers=(3, 4, 5), seed=1)
    (tmp_path / "store").symlink_to("first")
    (tmp_path / "next").symlink_to("other")
    with Store.open(tmp_path / "store") as store:
        feed = make_feed(store)
        blocks = feed.plan.blocks(0)
        feed.draw(0)
        (tmp_path / "next").replace(tmp_path / "store")  # in one operation: the next block is being read meanwhile
        with pytest.raises(StoreMismatch, match="was replaced while it was being read"):
            for step in range(sum(block.steps for block in blocks)):
                feed.draw(step)
        feed.close()


def test_nothing_is_read_for_steps_that_the_run_does_not_take(store, monkeypatch):
    from saemill.train.data.prefetch import Pool

    filled = []
    fill = Pool.fill
    monkeypatch.setattr(
        Pool, "fill", lambda pool, pieces, readers: filled.append(pieces) or fill(pool, pieces, readers)
    )
    feed = make_feed(store)
    first, second, *_ = feed.plan.blocks(0)
    feed.close()
    for steps, blocks in ((first.steps, [first]), (first.steps + 1, [first, second])):
        filled.clear()
        feed = make_feed(store, steps=steps)
        for step in range(steps):
            feed.draw(step)
        feed.close()
        assert filled == [block.pieces for block in blocks]
