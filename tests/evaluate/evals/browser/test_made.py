"""What the browser is made of: everything it shows of a latent is what dense activations say."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import threading
import time
import tracemalloc
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from saemill.cache_schema import Store
from saemill.evaluate.context import bfloat16_then_float32
from saemill.evaluate.context import context as context_module
from saemill.evaluate.context.loaded_sae import LoadedSae
from saemill.evaluate.context.stored_windows import ordinary_rows, windows_by_split
from saemill.evaluate.context.write_and_read_results import Result, write_result
from saemill.evaluate.errors import BrowserUnwritten, ModelMissing, NotApplicable, ResultInvalid, SettingInvalid
from saemill.evaluate.evals.browser import (
    browser_folder,
    collect_firings,
    evaluation,
    exports,
    latents,
    read_and_encode,
    related,
)
from saemill.evaluate.evals.browser.browser_folder import read_data, unpacked, write_data
from saemill.evaluate.evals.browser.collect_firings import (
    BINS,
    LOW,
    SAMPLE,
    TOP,
    Batch,
    Firings,
    Keeper,
    Seen,
    bin_of,
    largest,
    lower_edges,
)
from saemill.evaluate.evals.browser.config import Config
from saemill.evaluate.evals.browser.latents import RANDOM, STEPS, Shown, most_alike
from saemill.evaluate.evals.browser.latents_for_report import pattern
from saemill.evaluate.evals.browser.overview import refresh
from saemill.evaluate.evals.browser.read_and_encode import LEFT_OUT, LEVELS, WORKERS, attended, side_by_side
from saemill.evaluate.evals.browser.related import by_direction, by_firing
from saemill.evaluate.evals.measures.token_text import Vocabulary, text_of
from saemill.evaluate.model.batches import store_batches
from saemill.evaluate.model.prefix_suffix import load_language_model
from saemill.evaluate.model.unembedding_head import Head, load_head
from saemill.evaluate.output.figures.records import COLUMNS, Record, read_records
from saemill.evaluate.run.find_saes_to_evaluate import find_all
from saemill.harvest.model.architectures import ARCHITECTURES, architecture_of
from saemill.harvest.model.tokenizer import load_encoder
from saemill.harvest.pocket import MODEL_FOLDER
from saemill.harvest.progress import Watch
from saemill.train.run.run_folder import RunFolder
from saemill.train.sae.kernels.codes import Codes

CONFIG = Config(windows=30, batch_windows=7, top=3, sample=8, low=2, promoted=4)
FEW = Config(top=2, sample=2, low=2)
PROBED = COLUMNS["probing"].metric.split(".")[1]
KINDS = tuple(browser_folder.KINDS.values())
SPLITS = ("test", "validation", "train")


def data_of(home: Path, name: str):
    """Data of a browser with their arrays."""

    def whole(value):
        if isinstance(value, list) and len(value) == 2 and value[0] in KINDS and isinstance(value[1], str):
            return unpacked(value)
        if isinstance(value, dict):
            return {key: whole(item) for key, item in value.items()}
        return [whole(item) for item in value] if isinstance(value, list) else value

    found = read_data(home / "browser", name)
    assert found is not None, name
    return whole(found)


def read_all(world, windows=30):
    """The windows that the browser reads, in its order."""
    batches = []
    with Store.open(world.store) as store:
        left = windows
        for split in SPLITS:
            count = min(left, store.manifest.splits[split][1] - store.manifest.splits[split][0])
            layers = store.manifest.attention.layers
            if count:
                batches += store_batches(store, split, store.manifest.layers, layers, count, count=count)
            left -= count
    return batches


def make(context, subjects, config=CONFIG):
    return list(evaluation.evaluate(context, subjects, config))


@pytest.fixture(scope="module")
def made_once(world, new_builder):
    """A browser of two SAEs, one of them sparse, with their dense activations [W, T, F], 0 where left out."""
    builder = new_builder()
    home = builder.run(world, "run_1", {"a": builder.make_sae(k=4, seed=1), "b": builder.make_sae(k=None, seed=2)})
    subjects, threads = subjects_of(home), torch.get_num_threads()
    torch.set_num_threads(2)  # batches are encoded by two workers
    try:
        with Store.open(world.store) as store:
            results = make(context_module.Context(store, watch=Watch(is_quiet=True)), subjects)
    finally:
        torch.set_num_threads(threads)
    assert [result.missing for result in results] == [None, None]
    acts = {}
    for subject in subjects:
        parts = [subject.encode(batch) * batch.keep[:, :, None] for batch in read_all(world)]
        acts[subject.label] = torch.cat(parts).numpy()
    return home, acts, results


@pytest.fixture
def made(made_once, tmp_path):
    """A copy of it, which a test may change."""
    home, acts, results = made_once
    return shutil.copytree(home, tmp_path / "runs" / home.name), acts, results


def test_a_result_that_cannot_be_read_costs_no_browser(world, builder, open_context, monkeypatch):
    home = builder.run(world, "run_1", {"a": builder.make_sae()})
    path, said = home / "evals/core/a_eval_results.json", []
    path.parent.mkdir(parents=True)
    path.write_text('{"eval')
    context = open_context(world)
    monkeypatch.setattr(context.watch, "say", said.append)
    (result,) = make(context, subjects_of(home))
    assert result.metrics and any(f"left out of pages and plots: {path} is damaged" in line for line in said)
    (home / "metrics.jsonl").write_text("{\n")
    monkeypatch.setattr(evaluation, "read", None)
    (failure,) = make(context, subjects_of(home))  # before text is read
    assert isinstance(failure.error, ResultInvalid) and "metrics.jsonl" in str(failure.error)


@pytest.mark.parametrize("damaged", ["metrics.jsonl", "result.json"])
def test_a_run_whose_browser_cannot_be_begun_costs_the_others_none(world, builder, open_context, damaged):
    """Nor their counterparts, which SAEs have that are read together."""
    runs = [builder.run(world, name, {"a": builder.make_sae(), "b": builder.make_sae(seed=1)}) for name in "pq"]
    subjects = [subject for run in runs for subject in subjects_of(run)]
    (runs[0] / damaged).write_text("{\n")
    found = make(open_context(world), subjects)
    assert all(damaged in str(failure.error) for failure in found[:2])
    assert [result.subject.name for result in found[2:]] == ["q/a", "q/b"] and found[2].metrics
    assert [sae["label"] for sae in read_data(runs[1] / "browser", "run")["saes"]] == ["a", "b"]


def test_an_sae_of_a_layer_that_the_store_does_not_hold_costs_the_others_nothing(world, builder, open_context):
    home = builder.run(world, "run_1", {"a": builder.make_sae()})
    builder.save(home / "b", builder.make_sae(), layers=(1,))
    failure, result = make(open_context(world), subjects_of(home))
    assert failure.subject.label == "b" and "residuals of layer 1" in str(failure.error)
    assert result.subject.label == "a" and evaluation.is_there(result.subject)


def test_nothing_may_be_kept_of_what_is_shown(world, builder, open_context):
    """Each number that may be 0 is."""
    config = Config(windows=5, exports=("saedashboard", "neuronpedia"), **evaluation.EVALUATION.least)
    (result,) = make(open_context(world), [builder.subject(builder.make_sae())], config)
    assert result.metrics["firing"]["alive_share"] > 0
    assert not data_of(result.subject.home, "sae_sae/latents/0")["counts"].any()


def subjects_of(home):
    return find_all([str(home)], home.parent)[0]


def examples_of(home, label):
    """Kept firings by latent, in the order of the files."""
    found = {}
    width = data_of(home, "run")["saes"][0]["width"]
    for file in range(-(-width // latents.FILE_LATENTS)):
        part = data_of(home, f"sae_{label}/latents/{file}")
        item = value = 0
        for row, count in enumerate(part["counts"]):
            listed = found.setdefault(file * latents.FILE_LATENTS + row, [])
            for _ in range(count):
                length = part["lengths"][item]
                entries = slice(value, value + length)
                one = {name: part[name][item] for name in ("window", "at", "peak", "reasons")}
                listed.append(one | {"positions": part["positions"][entries], "levels": part["levels"][entries]})
                item, value = item + 1, value + length
    return found


@pytest.mark.parametrize("label", ["a", "b"])
def test_examples_are_the_strongest_the_lowest_and_some_between(made, label):
    home, acts, _ = made
    dense = acts[label]
    for latent, examples in examples_of(home, label).items():
        column = dense[:, :, latent]
        peaks = column.max(1)
        firing = np.sort(peaks[peaks > 0])[::-1]
        are_all_shown = len(firing) < CONFIG.top
        by_reason = {bit: [one["peak"] for one in examples if one["reasons"] & bit] for bit in (TOP, SAMPLE, LOW)}
        assert by_reason[TOP] == pytest.approx(firing[: CONFIG.top])
        assert sorted(by_reason[LOW]) == pytest.approx(firing[::-1][: CONFIG.low])
        assert len(by_reason[SAMPLE]) == (0 if are_all_shown else min(CONFIG.sample, len(firing)))
        randoms = sum(bool(one["reasons"] & RANDOM) for one in examples)
        assert randoms == min(latents.SHOWN_RANDOM, len(by_reason[SAMPLE]))
        assert all(np.diff([one["peak"] for one in examples]) <= 0)
        for bits in (SAMPLE, TOP | LOW):
            windows = [one["window"] for one in examples if one["reasons"] & bits]
            assert len(set(windows)) == len(windows)
        for one in examples:
            row = column[one["window"]]
            assert row[one["at"]] == one["peak"] and (one["peak"] == row.max() or one["reasons"] & SAMPLE)
            assert one["positions"].tolist() == np.flatnonzero(row > 0).tolist()
            assert one["levels"] / STEPS * column.max() == pytest.approx(row[row > 0], abs=float(column.max()) / STEPS)


@pytest.mark.parametrize("label", ["a", "b"])
def test_sums_are_those_of_dense_activations(made, world, label):
    home, acts, results = made
    dense = acts[label].reshape(-1, acts[label].shape[-1])
    columns = data_of(home, f"sae_{label}/columns")
    fired = (dense > 0).sum(0)
    assert columns["fired"].tolist() == fired.tolist()
    assert columns["highest"] == pytest.approx(dense.max(0))
    assert columns["mean"] == pytest.approx(dense.sum(0) / np.maximum(fired, 1), rel=1e-5)
    part = data_of(home, f"sae_{label}/latents/0")
    assert part["parts"].reshape(len(fired), -1).sum(1).tolist() == fired.tolist()
    assert part["bins"].sum() == fired.sum()
    tokens = int(sum(int(batch.keep.sum()) for batch in read_all(world)))
    (result,) = [one for one in results if one.subject.label == label]
    assert result.metrics["firing"] == {
        "tokens": tokens,
        "massive_tokens": 0,
        "alive_share": (fired > 0).mean(),
        "dense_share": pytest.approx((fired / tokens > latents.DENSE).mean()),
        "l0": pytest.approx(fired.sum() / tokens),
    }
    tokens_WT = np.concatenate([batch.tokens.numpy() for batch in read_all(world)])
    for latent, examples in examples_of(home, label).items():
        top = [int(tokens_WT[one["window"], one["at"]]) for one in examples if one["reasons"] & TOP]
        assert columns["token"][latent] == max(top, key=lambda token: (top.count(token), -top.index(token)), default=-1)


def test_tokens_are_those_read_and_special_ones_are_marked(made, world):
    home, _, _ = made
    text = data_of(home, "text/0")
    batches = read_all(world)
    assert text["tokens"].tolist() == torch.cat([batch.tokens for batch in batches]).flatten().tolist()
    left_out = ~torch.cat([batch.keep for batch in batches]).flatten()
    assert ((text["marks"] & LEFT_OUT) > 0).tolist() == left_out.tolist()
    words = data_of(home, "words")
    assert set(text["tokens"].tolist()) <= set(words["ids"].tolist())
    run = data_of(home, "run")
    assert run["windows"] == {"test": 20, "validation": 4, "train": 6}
    assert run["without_words"] is None and run["without_model"] is None


def test_attended_tokens_are_the_strongest_earlier_ones(world):
    (batch,) = read_all(world, windows=5)
    (layer, *_) = sorted(batch.attention)
    positions, weights = attended(batch, [layer], 3)
    rows = batch.attention[layer]
    windows, heads, context = rows.kept_mass.shape
    dense = np.zeros((windows * heads * context, context))
    for row in range(len(dense)):
        entries = slice(rows.indptr[row], rows.indptr[row + 1])
        dense[row, rows.indices[entries]] = rows.data[entries]
    mean = dense.reshape(windows, heads, context, context).mean(1)
    for window in range(windows):
        for query in range(context):
            row = mean[window, query] * batch.keep[window].numpy()
            row[query] = 0
            expected = np.sort(row)[::-1][:3]
            assert weights[window, query, 0] / LEVELS == pytest.approx(expected, abs=0.51 / LEVELS)
            found = weights[window, query, 0] > 0
            assert row[positions[window, query, 0][found]] == pytest.approx(expected[found])
            assert (positions[window, query, 0][found] < query).all()


firings_lists = st.lists(st.tuples(st.integers(0, 3), st.floats(0.125, 100, width=32)), max_size=60)


@given(firings_lists, st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_a_keeper_keeps_what_sorting_everything_would(listed, size):
    """However the firings come in, and however often what waits is sorted out."""
    keeper = Keeper(4, Config(top=size, sample=size, low=size))
    for start in range(0, len(listed), 7):
        part = sorted(enumerate(listed[start : start + 7], start), key=lambda entry: entry[1][0])
        if part:
            keeper.add(firings_of(part))
            keeper._sort_out()
    kept, reasons = keeper.finish()
    whole = firings_of(list(enumerate(listed)))
    for latent in range(4):
        mine = whole.latent == latent
        chosen = kept.latent == latent
        peaks = np.sort(whole.peak[mine])
        assert np.sort(kept.peak[chosen & (reasons & TOP > 0)]).tolist() == peaks[::-1][:size][::-1].tolist()
        assert np.sort(kept.peak[chosen & (reasons & LOW > 0)]).tolist() == peaks[:size].tolist()
        wanted = np.sort(whole.priority[mine])[::-1][: size * (mine.sum() >= size)]
        assert np.sort(kept.priority[chosen & (reasons & SAMPLE > 0)])[::-1].tolist() == wanted.tolist()
    for number in range(len(kept.latent)):
        assert kept.take(np.array([number])).value.tolist() == [kept.peak[number]] * (1 + int(kept.window[number]) % 3)


def firings_of(entries) -> Firings:
    """A firing in each window; as many equal activations as its window's number says."""
    numbers = np.array([number for number, _ in entries], np.int32)
    latent = np.array([latent for _, (latent, _) in entries], np.int32)
    peak = np.array([peak for _, (_, peak) in entries], np.float32)
    count = (1 + numbers % 3).astype(np.int32)
    return Firings(latent, numbers, numbers * 0, peak, count, np.zeros(count.sum(), np.int16), np.repeat(peak, count))


def test_every_worker_works_on_the_device_that_was_asked_for(monkeypatch):
    """A thread has a GPU of its own, which is the first where nobody says another."""
    taken = []
    monkeypatch.setattr(
        read_and_encode, "take_device", lambda device: taken.append((device, threading.current_thread().name))
    )
    with side_by_side(torch.device("cpu"), []) as (_, pool):
        names = {pool.submit(lambda: threading.current_thread().name).result()}
    assert ("cpu", names) == (taken[0][0].type, {name for _, name in taken})


def test_workers_share_out_the_threads_of_products_and_give_them_back():
    threads = torch.get_num_threads()
    for found in (5, 1):
        torch.set_num_threads(found)
        try:
            with pytest.raises(ZeroDivisionError), side_by_side(torch.device("cpu"), []) as (workers, pool):
                assert workers == min(found, WORKERS)
                assert pool.submit(torch.get_num_threads).result() * workers <= found
                1 / 0  # noqa: B018
            assert torch.get_num_threads() == found
        finally:
            torch.set_num_threads(threads)


def seen_of(dense: np.ndarray, ordinary: np.ndarray, context: int = 16) -> Seen:
    """What is left of dense codes [N, F], some rows of which do not count."""
    tokens, seen = np.arange(len(dense)), Seen(dense.shape[1], context, FEW)
    place = Batch(0, (tokens // context).astype(np.int32), (tokens % context).astype(np.uint16), is_sampled=True)
    seen.take([Codes(torch.from_numpy(dense), None, *dense.shape)], place, ordinary)
    return seen


def test_what_goes_on_samples_as_many_tokens_as_what_was_never_stopped(monkeypatch):
    """Where massive rows are left out of the sample."""
    monkeypatch.setattr(collect_firings, "SAMPLE_ENTRIES", 150)
    dense, ordinary = np.ones((16, 12), np.float32), np.arange(16) < 8  # 192 that fire, 96 of them kept
    whole, stopped = seen_of(dense, ordinary), Seen(12, 16, FEW)
    stopped.restore(whole.state())
    place = Batch(1, np.ones(16, np.int32), np.arange(16).astype(np.uint16), is_sampled=True)
    for seen in (whole, stopped):
        seen.take([Codes(torch.from_numpy(dense), None, 16, 12)], place, ordinary)
    assert whole.together.shape == stopped.together.shape


def test_saes_are_held_against_each_other_token_by_token():
    """Also where one leaves out a token that the other counts."""
    rng = np.random.default_rng(0)
    dense = rng.random((320, 12), np.float32) * (rng.random((320, 12)) < 0.2)
    dense[7] = 0
    tables = [seen_of(dense, np.arange(320) != left_out).together for left_out in (-1, 7)]
    near = by_firing(*tables, 1, is_same=False)
    assert near.latents[:, 0].tolist() == list(range(12))
    assert near.scores[:, 0] == pytest.approx(1)


def test_the_table_that_an_sae_is_compared_by_is_joined_once():
    dense, rows = np.eye(4, dtype=np.float32), np.ones(4, bool)
    seen = seen_of(dense, rows)
    place = Batch(1, np.ones(4, np.int32), np.arange(4).astype(np.uint16), is_sampled=True)
    seen.take([Codes(torch.from_numpy(2 * dense), None, 4, 4)], place, rows)
    assert seen.together is seen.together
    assert seen.together.toarray().tolist() == [*np.eye(4).tolist(), *np.eye(4).tolist()]


def test_an_sae_is_compared_with_those_most_like_it():
    """First by layer, then by variant, then by width."""

    def of(layers, variant, width):
        subject = SimpleNamespace(target_layers=layers, variant=variant, width=width)
        return Shown("", cast(LoadedSae, subject), cast(Seen, None))

    one = of((5,), "topk", 64)
    nearest = [of((5,), "topk", 128), of((5,), "topk", 16), of((5,), "gated", 64), of((6,), "topk", 64)]
    nearest += [of((4,), "topk", 256), of((4,), "gated", 64), of((4, 7), "gated", 64), of((5, 8), "topk", 64)]
    everyone = [of((9,), "topk", 64), *reversed(nearest), one, of((1,), "topk", 64)]
    assert most_alike(one, everyone) == everyone[1:9]  # in the fleet's order
    assert most_alike(one, [one, *everyone[5:9]]) == everyone[5:9]


def test_a_large_fleet_is_compared_in_part_and_its_lists_are_not_kept(world, builder, open_context, monkeypatch):
    """What all have of all grows with the square of the fleet; the disk needs room for as many lists as there are."""
    saes = {name: builder.make_sae(seed=n, width=16 if name == "c" else 24) for n, name in enumerate("abc")}
    home, found, needed = builder.run(world, "run_1", saes), [], []
    compare, require = evaluation.neighbours, browser_folder.require_space

    def noted(*asked):
        assert not any(list_() for list_ in found[:-2])  # the one before may be held until it is replaced
        near = compare(*asked)
        found.extend(weakref.ref(near[name]) for name in ("by_direction", "by_firing"))
        return near

    def with_room(place, least):
        needed.append(least)
        require(place, least)

    monkeypatch.setattr(evaluation, "neighbours", noted)
    monkeypatch.setattr(browser_folder, "require_space", with_room)
    for limit, left_out, others in ((8, 0, ["b", "c"]), (1, 1, ["b"])):
        for module in (latents, evaluation):
            monkeypatch.setattr(module, "COMPARED", limit)
        make(open_context(world), subjects_of(home))
        assert [sae["not_compared"] for sae in data_of(home, "run")["saes"]] == [left_out] * 3
        listed = data_of(home, "sae_a/latents/0")["others"]
        assert list(dict.fromkeys(one["label"] for one in listed)) == others
    assert needed[0] - needed[1] == 2 * latents.LIST_BYTES * (24 + 24 + 16)


def test_how_far_neighbours_have_come_is_told(builder):
    """Of 262,144 latents each table that a decoder is compared with takes a core more than an hour."""
    told, parts = [], []
    seen = seen_of(np.ones((4, builder.F), np.float32), np.ones(4, bool))
    shown = [Shown("", builder.subject(builder.make_sae(seed=n), name), seen) for n, name in enumerate("abc")]
    watch = SimpleNamespace(stage=lambda *about: told.append(about) or nullcontext(parts.append))
    latents.neighbours(shown[0], shown, CONFIG, cast(Watch, watch))
    assert told == [("browser, neighbours of a", 3 * builder.F, "latents")] and parts == [builder.F] * 3


def test_what_is_left_out_fires_beside_nothing():
    seen = seen_of(np.ones((4, 2), np.float32), np.array([True, False, True, True]))
    assert seen.together.toarray().tolist() == [[1, 1], [0, 0], [1, 1], [1, 1]]


def test_a_first_window_without_ordinary_tokens_has_no_pattern():
    dense = np.ones((32, 3), np.float32)
    told = pattern(seen_of(dense, np.arange(32) >= 16), np.zeros((2, 16), int), cast(Vocabulary, None))
    assert told == {"tokens": [], "positions": [], "latents": [], "activations": []}


def test_a_sample_is_of_tokens_and_even():
    """Each of many tokens is as likely to be kept as any other, in whatever company of its window."""
    windows, keep = 8000, 400
    count = np.where(np.arange(windows) % 5, 1, 16).astype(np.int32)  # a fifth of the windows has four fifths of them
    value = np.arange(count.sum()).astype(np.float32)
    zeros, last = np.zeros(windows, np.int32), np.cumsum(count) - 1
    position = np.concatenate([np.arange(many) for many in count]).astype(np.uint16)
    keeper = Keeper(1, Config(top=0, sample=keep, low=0))
    keeper.add(
        Firings(zeros, np.arange(windows, dtype=np.int32), position[last].astype(np.int32), value[last], count,
                position, value)
    )  # fmt: skip
    kept, reasons = keeper.finish()
    assert len(kept.window) == keep == len(set(kept.window)) and (reasons == SAMPLE).all()
    quarters = np.bincount((kept.peak * 4 / len(value)).astype(int), minlength=4)
    assert quarters.min() > 70 and quarters.max() < 130
    assert (kept.count > 1).mean() == pytest.approx(0.8, abs=0.06)
    places = np.bincount(kept.at[kept.count > 1], minlength=16)
    assert places.min() > 7 and places.max() < 40
    assert kept.peak.tolist() == ((last + 1 - count)[kept.window] + kept.at).tolist()


def test_memory_grows_with_the_latents_and_not_with_the_text(monkeypatch):
    monkeypatch.setattr(collect_firings, "WAITING", 1 << 12)
    seen, tokens = Seen(64, 16, Config(top=3, sample=4, low=2)), np.arange(256)
    position = (tokens % 16).astype(np.uint16)
    generator, peaks = torch.Generator().manual_seed(0), []
    tracemalloc.start()
    try:
        for part in range(3):
            tracemalloc.reset_peak()
            for number in range(part * 20, part * 20 + 20):
                codes = Codes(torch.randn(256, 64, generator=generator).relu(), None, 256, 64)
                place = Batch(number * 16, (tokens // 16 + number * 16).astype(np.int32), position, is_sampled=False)
                seen.take([codes], place, np.ones(256, bool))
            peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert seen.tokens == 3 * 20 * 256
    assert peaks[2] < 1.1 * peaks[0], peaks


def test_the_largest_of_every_group_come_first():
    group = np.array([1, 0, 1, 1, 0], np.int32)
    key = np.array([-1.0, 5.0, 3.0, 2.0, -7.0], np.float32)
    assert largest(group, key, 2).tolist() == [1, 4, 2, 3]
    assert largest(group[:0], key[:0], 2).tolist() == []


@given(st.floats(2.0**-30, 2.0**30, width=32))
def test_bins_have_exact_edges(value):
    edges = [*lower_edges(), np.inf]
    found = int(bin_of(np.array([value], np.float32))[0])
    assert (edges[found] <= value or found == 0) and (value < edges[found + 1] or found == BINS - 1)


def test_neighbours_by_direction():
    rows = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    near = by_direction(rows, rows, 3, is_same=True)
    cosine = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2).fill_diagonal_(-2)
    values, found = cosine.topk(3)
    assert near.latents.tolist() == found.tolist()
    assert near.scores == pytest.approx(values.numpy(), abs=1e-5)
    assert by_direction(rows[:1], rows[:1], 3, is_same=True).latents.shape == (1, 0)


@pytest.mark.parametrize("looks_twice", [False, True])
def test_neighbours_by_direction_of_many(monkeypatch, looks_twice):
    """Twins, of which a row may find more than it asks for before itself, and latents that write nothing."""
    monkeypatch.setattr(bfloat16_then_float32, "has_fast_bfloat16", lambda device: looks_twice)
    rows = torch.randn(1024, 16, generator=torch.Generator().manual_seed(0))
    rows[10:20], rows[30:33] = rows[10].clone(), 0
    near = by_direction(rows, rows, 3, is_same=True)
    unit = torch.nn.functional.normalize(rows, dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    assert near.scores == pytest.approx(cosine.topk(3).values.numpy(), abs=1e-5)
    assert near.scores == pytest.approx(cosine.gather(1, torch.from_numpy(near.latents).long()).numpy(), abs=1e-5)


def test_neighbours_by_firing():
    fires = (np.random.default_rng(0).random((200, 20)) < 0.2).astype(np.float32)
    near = by_firing(scipy.sparse.csr_matrix(fires), scipy.sparse.csr_matrix(fires), 4, is_same=True)
    together = fires.T @ fires
    score = together / np.sqrt(np.outer(fires.sum(0), fires.sum(0)))
    np.fill_diagonal(score, 0)
    score[together < 3] = 0
    assert near.scores == pytest.approx(np.sort(score, axis=1)[:, ::-1][:, :4], abs=1e-5)
    rows = np.arange(20)[:, None]
    assert score[rows, near.latents] == pytest.approx(near.scores, abs=1e-5)


def test_where_many_fire_a_comparison_takes_tokens_from_all_over_the_text_and_says_how_many(monkeypatch):
    """Latent 0 fires with latent 1 in the first half, and with latent 2 in the second."""
    fires = scipy.sparse.csr_matrix(np.repeat([[1, 1, 0], [1, 0, 1]], 50, axis=0).astype(np.float32))
    for pairs, tokens in ((400, 100), (200, 50)):
        monkeypatch.setattr(related, "PAIRS", pairs)
        near = by_firing(fires, fires, 2, is_same=True)
        assert near.tokens == tokens and set(near.latents[0].tolist()) == {1, 2}
        assert near.scores[0] == pytest.approx(0.5**0.5)


def head_of(model):
    """The head of a whole model in memory."""
    norm = getattr(model.base_model, architecture_of(model.config.model_type).final_norm)
    return Head(norm, model.get_output_embeddings().weight)


def test_the_head_alone_says_what_the_whole_model_says(tmp_path):
    """Bit for bit, in every family that can be harvested, though none of their classes is imported for it."""
    for model_type in ARCHITECTURES:
        shape = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
        config = AutoConfig.for_model(model_type, vocab_size=40, **shape)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for number, parameter in enumerate(model.parameters()):  # norms start at constants that would hide errors
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        model.save_pretrained(tmp_path / model_type)
        rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
        alone = load_head(tmp_path / model_type, torch.device("cpu")).promotes(rows)
        assert torch.equal(alone, head_of(model).promotes(rows)), model_type


def test_promotion_is_what_the_norm_and_the_unembedding_make_of_a_direction():
    whole = load_language_model(MODEL_FOLDER, torch.float32, torch.device("cpu"))
    rows = torch.randn(3, whole.facts.d_model, generator=torch.Generator().manual_seed(0))
    alone = load_head(MODEL_FOLDER, torch.device("cpu")).promotes(rows)
    assert torch.equal(alone, head_of(whole.model).promotes(rows))
    normed = whole.model.base_model.norm(rows)
    assert alone == pytest.approx(whole.model.get_output_embeddings()(normed).numpy(), abs=1e-4)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no")])
def test_a_head_that_has_no_room_is_not_told_to_be_fetched_again(error, monkeypatch):
    def no_room(folder, modules):
        raise error

    monkeypatch.setattr("saemill.evaluate.model.unembedding_head.read_tables", no_room)
    with pytest.raises(ModelMissing, match="does not fit into memory .* Free some memory") as told:
        load_head(MODEL_FOLDER, torch.device("cpu"))
    assert "fetch" not in str(told.value)


def test_promoted_tokens_go_through_the_models_head(made, open_context, world):
    home, _, _ = made
    head = open_context(world).head
    part = data_of(home, "sae_a/latents/0")
    (subject, _) = subjects_of(home)
    logits = head.promotes(subject.sae.W_dec)
    for name, sign in (("promoted", 1), ("suppressed", -1)):
        values, tokens = (sign * logits).topk(4)
        assert part[name]["tokens"].reshape(-1, 4).tolist() == tokens.tolist()
        assert part[name]["values"].reshape(-1, 4) == pytest.approx(sign * values.numpy(), abs=1e-5)


def test_promoted_tokens_that_have_no_room_are_found_for_fewer_latents_at_once(made, open_context, world):
    (subject, _), whole, said = subjects_of(made[0]), open_context(world).head, []

    def promotes(rows):
        if len(rows) > 8:
            raise MemoryError("planted")
        return whole.promotes(rows)

    words = SimpleNamespace(include=lambda ids: ids)
    one = latents.Shown("sae_a", subject, seen=None)
    few, all_ = (latents.promoted(one, h, 4, words, said.append) for h in (SimpleNamespace(promotes=promotes), whole))
    assert said[-1] == "out of memory: continuing with 8 latents before the head at a time"
    for name in ("promoted", "suppressed"):
        assert (few[name][0] == all_[name][0]).all() and few[name][1] == pytest.approx(all_[name][1], abs=1e-5)


def test_words_are_what_stands_in_a_text_and_bytes_are_written_out():
    encoder = load_encoder(MODEL_FOLDER)
    ids = encoder.encode(["def walk(self):\n    return a\u4e2d"])[0]
    words = Vocabulary(SimpleNamespace(tokenizer=encoder, without_tokens=None))
    words.include(np.array(ids))
    told = words.texts()
    by_id = dict(zip(told["ids"].tolist(), told["texts"], strict=True))
    assert "".join(by_id[token] for token in ids).startswith("def walk(self):\n    return a")
    letters = [token for token in ids if by_id[token].startswith("\\x")]
    assert bytes.fromhex("".join(by_id[token].replace("\\x", "") for token in letters)).decode() == "\u4e2d"

    class Piece:
        id_to_token = staticmethod({1: "<0xE4>", 2: "\u0120\u00e4", 3: None}.get)

    assert text_of(Piece, 1, "\ufffd") == "\\xE4"
    assert text_of(Piece, 2, "\ufffd") == "\\x20\\xE4"
    assert text_of(Piece, 3, "") == "<3>"


def test_the_report_has_contexts_of_rare_and_common_latents(made, world, open_context):
    _, acts, results = made
    report = results[0].unstructured
    dense, tokens = acts["a"], np.concatenate([batch.tokens.numpy() for batch in read_all(world)])
    write = Vocabulary(open_context(world)).write
    shares = [entry["fired_share"] for entry in report["latents"]]
    assert shares == sorted(shares) and len(shares) > 10
    for entry in report["latents"]:
        column = dense[:, :, entry["latent"]]
        assert [shown["activation"] for shown in entry["contexts"]] == pytest.approx(np.sort(column.max(1))[::-1][:3])
        window, at = np.unravel_index(column.argmax(), column.shape)
        assert entry["contexts"][0]["token"] == write(tokens[window, [at]])
        assert entry["contexts"][0]["before"] == write(tokens[window, max(0, at - 16) : at])
        assert entry["contexts"][0]["after"] == write(tokens[window, at + 1 : at + 9])
    pattern = report["pattern"]
    assert pattern["positions"] == [place for place in range(1, tokens.shape[1]) if tokens[0, place] > 2]
    wanted = dense[0, pattern["positions"]][:, pattern["latents"]].T
    assert np.array(pattern["activations"]) == pytest.approx(wanted, abs=1e-4)


def test_massive_rows_are_left_out_and_counted(world, builder, open_context):
    """As they are of everything else that is measured: no example is of one, and the page marks them."""
    subject = builder.subject(builder.make_sae(k=None))
    context = open_context(world, massive_norms=1.3)
    (result,) = make(context, [subject])
    batches = read_all(world)
    rows = np.concatenate([ordinary_rows(context, subject, batch).numpy() for batch in batches])
    keep = np.concatenate([batch.keep.numpy() for batch in batches])
    firing = result.metrics["firing"]
    assert (firing["tokens"], firing["massive_tokens"]) == (rows.sum(), (keep & ~rows).sum())
    assert 0 < firing["massive_tokens"] < firing["tokens"]
    for examples in examples_of(subject.home, "sae").values():
        assert all(rows[one["window"], one["positions"]].all() for one in examples)
    assert ((data_of(subject.home, "text/0")["marks"] & LEFT_OUT) > 0).tolist() == (~rows).ravel().tolist()


def test_it_takes_the_tokenizer_and_the_head_and_leaves_the_layers_on_disk(world, builder, open_context, monkeypatch):
    """Gemma would be gigabytes for pages of text."""
    monkeypatch.setattr(context_module, "load_language_model", lambda *_: pytest.fail("the weights were loaded"))
    (result,) = make(open_context(world), [builder.subject(builder.make_sae())])
    assert result.missing is None


def test_exports_say_the_same_in_the_forms_of_others(made, world, open_context):
    home, acts, _ = made
    subjects = subjects_of(home)
    config = replace(CONFIG, exports=("saedashboard", "neuronpedia"))
    make(open_context(world), subjects, config)
    written = sum(file.stat().st_size for file in (home / "browser/exports").rglob("*") if file.is_file())
    kept = sum(len(listed) for subject in subjects for listed in examples_of(home, subject.label).values())
    assert exports.bytes_of(config.exports, kept, read_all(world)[0].tokens.shape[1]) == pytest.approx(written, rel=0.3)
    batch = json.loads((home / "browser/exports/saedashboard/a/batch-0.json").read_text())
    assert (batch["layer"], batch["sae_set"], len(batch["features"])) == (2, "run_1-a", 24)
    tokens = np.concatenate([part.tokens.numpy() for part in read_all(world)])
    words = data_of(home, "words")
    text = dict(zip(words["ids"].tolist(), words["texts"], strict=True))
    read = data_of(home, "run")["saes"][0]["tokens"]
    for latent, feature in enumerate(batch["features"]):
        column = acts["a"][:, :, latent]
        assert feature["frac_nonzero"] == pytest.approx(float((column > 0).sum() / read))
        assert sum(feature["freq_hist_data_bar_heights"]) == (column > 0).sum()
        best = feature["activations"][0]
        window, at = np.unravel_index(column.argmax(), column.shape)
        assert best["values"] == pytest.approx(column[window].tolist(), abs=6e-4)
        assert best["tokens"] == [text[token] for token in tokens[window].tolist()]
        assert (best["qualifying_token_index"], best["bin_min"]) == (at, -1)
        assert len(feature["pos_str"]) == len(feature["neg_values"]) == 4
    (source,) = (home / "browser/exports/neuronpedia").glob("*/2-run_1-a")
    rows = {name: jsonl(source / f"{name}/batch-0.jsonl.gz") for name in ("features", "activations")}
    assert [row["index"] for row in rows["features"]] == [str(latent) for latent in range(24)]
    for row in rows["activations"]:
        assert row["maxValueTokenIndex"] == row["qualifyingTokenIndex"] or row["binContains"] > 0  # drawn
        assert row["maxValue"] == row["values"][row["maxValueTokenIndex"]] == max(row["values"])
        assert row["binMin"] - 1e-3 <= row["values"][row["qualifyingTokenIndex"]] <= row["binMax"] + 1e-3
    assert len(rows["activations"]) == sum(len(feature["activations"]) for feature in batch["features"])
    assert len({row["id"] for row in rows["activations"]}) == len(rows["activations"])
    near = data_of(home, "sae_a/latents/0")["by_direction"]["latents"].reshape(24, -1)
    assert [row["topkCosSimIndices"] for row in rows["features"]] == near.tolist()
    assert jsonl(source / "source.jsonl")[0]["num_prompts"] == 30
    with pytest.raises(SettingInvalid, match="expected some of saedashboard, neuronpedia, found"):
        make(open_context(world), subjects, Config(exports=("html",)))


def jsonl(path: Path) -> list[dict]:
    data = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()]


# ---------------------------------------------------------------- what bad input gets


def test_hostile_text_is_ascii_json_and_ends_no_script(tmp_path):
    hostile = "</script><script>alert(1)</script>\u2028\ufeff\u202e\x00<!--"
    write_data(tmp_path, "words", {"texts": [hostile]})
    written = (tmp_path / "data" / "words.js").read_bytes()
    assert written.isascii() and b"<" not in written and written.count(b"\n") == 1
    assert read_data(tmp_path, "words") == {"texts": [hostile]}


def test_without_model_or_attention_it_is_made_and_says_so(make_world, builder, open_context):
    bare = make_world(attention_layers=())
    home = builder.run(bare, "run_1", {"a": builder.make_sae()})
    (result,) = make(open_context(bare, model_name="/no/such/model"), subjects_of(home))
    assert result.missing is not None and "promoted tokens need the model" in result.missing
    run = data_of(home, "run")
    assert run["attention_layers"] == [] and "model" in run["without_model"]
    words = data_of(home, "words")
    assert run["without_words"] and words["texts"] == [f"<{token}>" for token in words["ids"]]
    assert "promoted" not in data_of(home, "sae_a/latents/0")
    assert not (home / "browser" / "data" / "attention").exists()


def test_tokens_that_are_made_up_are_shown_as_ids(make_world, open_context):
    words = Vocabulary(open_context(make_world(model=MODEL_FOLDER, has_tokens=False)))
    assert "imported without tokens" in words.obstacle and words.write(np.array([5, 7])) == "<5> <7>"


def test_an_sae_of_several_layers_has_no_place_before_the_head(make_world, builder, open_context):
    wide = builder.subject(builder.make_sae(d_in=2 * builder.D), "wide", layers=(1, 2))
    (result,) = make(open_context(make_world(layers=(1, 2))), [wide])
    assert result.missing is None
    assert "promoted" not in data_of(wide.home, "sae_wide/latents/0")


def test_tiers_have_parents_and_children(world, builder, open_context):
    subject = builder.subject(builder.make_sae(), "tiered")
    membership = torch.arange(builder.F) * 3 // builder.F
    learned = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    subject.sae.extras_tensors = {
        "tiers.membership": membership,
        "composition.C2": torch.nn.functional.pad(learned, (0, 2, 0, 1)),
    }
    make(open_context(world), [subject])
    part = data_of(subject.home, "sae_tiered/latents/0")
    made_of = part["made_of"]["latents"].reshape(builder.F, -1)
    assert (made_of[:8] == -1).all()  # the lowest tier
    assert made_of[8:16].tolist() == learned.topk(latents.PARTS).indices.tolist()
    assert set(made_of[16:].ravel().tolist()) <= {-1, *range(8, 16)}
    part_of = part["part_of"]["latents"].reshape(builder.F, -1)
    assert part_of[:8].tolist() == (8 + learned.T.topk(latents.PARTS).indices).tolist()
    assert (part_of[16:] == -1).all()
    assert data_of(subject.home, "sae_tiered/columns")["marks"]["tier"].tolist() == membership.tolist()


def test_an_sae_that_never_fires_is_shown_dead(world, builder, open_context):
    silent = builder.make_sae(k=None)
    silent.b_enc.data.fill_(-1e6)
    subject = builder.subject(silent)
    (result,) = make(open_context(world), [subject])
    assert result.metrics["firing"]["alive_share"] == 0
    assert data_of(subject.home, "sae_sae/columns")["token"].tolist() == [-1] * builder.F


def test_a_store_without_windows_is_named(make_world, builder, open_context):
    empty = make_world(splits=(40, 40))
    with pytest.raises(NotApplicable, match="the store's splits test have no windows: harvest more text"):
        make(open_context(empty), [builder.subject(builder.make_sae())], Config(splits=("test",)))


def test_windows_too_long_for_the_page_are_named(world, builder, open_context, monkeypatch):
    """Its places have sixteen bits; in a longer window they would point to other tokens."""
    monkeypatch.setattr(evaluation, "LONGEST", world.tokens.shape[1] - 1)
    with pytest.raises(NotApplicable, match="windows of at most .* tokens, but the store's have .*: harvest text in"):
        make(open_context(world), [builder.subject(builder.make_sae())])


def test_a_split_that_no_store_has_is_named(world, builder, open_context):
    with pytest.raises(SettingInvalid, match="expected a split of train, validation, test, found 'tst'"):
        make(open_context(world), [builder.subject(builder.make_sae())], Config(splits=("tst",)))


def test_a_number_of_windows_that_is_none_is_named(world, builder, open_context):
    with pytest.raises(SettingInvalid, match="windows: expected at least 1 to be read, found 0"):
        make(open_context(world), [builder.subject(builder.make_sae())], Config(windows=0))


def test_a_split_that_is_named_twice_is_read_once(world, open_context):
    assert windows_by_split(open_context(world), "browser", 30, ("test", "test"), False) == {"test": 20}


def listing(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_an_interrupted_build_leaves_the_browser_of_before(made, open_context, world, monkeypatch):
    """Killed anywhere, a run has a whole browser or none; what is left lying is cleared by the next build."""
    home, _, _ = made
    before = listing(home / "browser")
    monkeypatch.setattr(evaluation, "write_latents", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        make(open_context(world), subjects_of(home))
    assert listing(home / "browser") == before
    monkeypatch.undo()
    (home / browser_folder.MAKING).mkdir()
    (home / browser_folder.MAKING / "index.html").write_text("half of one")
    make(open_context(world), subjects_of(home))
    assert sorted(path.name for path in home.iterdir() if path.name.startswith(".")) == []
    after = listing(home / "browser")
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {"index.html", "data/run.js"}  # the build's id


def test_a_full_disk_is_one_line_and_leaves_nothing(made, open_context, world, monkeypatch):
    home, _, _ = made
    before = listing(home / "browser")
    write = Path.write_text

    def full(path, *args, **kwargs):
        if "latents" in path.parts:
            raise OSError(28, os.strerror(28))
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    failures = make(open_context(world), subjects_of(home))
    monkeypatch.undo()
    assert [type(failure.error) for failure in failures] == [BrowserUnwritten] * 2
    assert "cannot be written: No space left on device. It needs about" in str(failures[0].error)
    assert listing(home / "browser") == before and not (home / browser_folder.MAKING).exists()
    monkeypatch.setattr(evaluation, "LATENT_BYTES", 1 << 50)
    (failure, _) = make(open_context(world), subjects_of(home))
    assert "are free there: free some space, or ask for fewer windows or examples" in str(failure.error)


def test_saes_of_the_run_that_are_not_evaluated_stay(made, open_context, world):
    home, _, _ = made
    (a, b) = subjects_of(home)
    other, text = listing(home / "browser" / "data" / "sae_a"), data_of(home, "text/0")
    marks = text["marks"] | LEFT_OUT  # as if `a` left out more than `b`
    browser_folder.write_data(home / "browser", "text/0", text | {"marks": marks})
    make(open_context(world), [b])
    assert (data_of(home, "text/0")["marks"] == marks).all()
    assert [sae["label"] for sae in data_of(home, "run")["saes"]] == ["b", "a"]
    assert listing(home / "browser" / "data" / "sae_a") == other
    assert evaluation.is_there(a) and evaluation.is_there(b)
    context, said = open_context(world), []
    context.say = said.append
    make(context, [b], Config(windows=5))  # other text: an SAE read on another cannot stand beside it
    assert [sae["label"] for sae in data_of(home, "run")["saes"]] == ["b"]
    assert [line for line in said if line.startswith("browser: a left out (read with other settings)")]
    assert a.home == home and evaluation.is_there(b) and not evaluation.is_there(a)
    write_data(home / "browser", "run", data_of(home, "run") | {"format": 1})
    assert not evaluation.is_there(b)
    make(context, [a], Config(windows=5))
    assert "browser: b left out (made by another version of saemill): name them too to show them" in said


@pytest.mark.parametrize("damage", ["gone", "half", "other", "pages"])
def test_saes_whose_pages_are_damaged_do_not_stay(damage, made, open_context, world):
    """Without the file of words nobody knows what the tokens of their pages are."""
    home, _, _ = made
    data, context, said = home / "browser" / "data", open_context(world), []
    if damage == "pages":
        shutil.rmtree(data / "sae_a")
    else:
        whole = (data / "words.js").read_text()
        left = {"gone": "", "half": whole[:60], "other": 'saemill("words",{"ids":7});\n'}
        (data / "words.js").write_text(left[damage])
    context.say = said.append
    make(context, [one for one in subjects_of(home) if one.label == "b"])
    assert [sae["label"] for sae in data_of(home, "run")["saes"]] == ["b"]
    assert "browser: a left out (pages are damaged): name them too to show them" in said


def test_saes_stay_with_their_exports_whatever_is_exported_now(made, open_context, world):
    home, _, _ = made
    (a, b) = subjects_of(home)
    exports = home / "browser/exports"
    make(open_context(world), [a], replace(CONFIG, exports=("saedashboard", "neuronpedia")))
    before = listing(exports)
    make(open_context(world), [b], replace(CONFIG, exports=("saedashboard",)))
    assert [sae["label"] for sae in data_of(home, "run")["saes"]] == ["b", "a"]
    assert before.items() <= listing(exports).items() and (exports / "saedashboard/b").is_dir()
    context, said = open_context(world), []
    context.say = said.append
    make(context, [a])
    assert {path.name for path in exports.glob("*/*")} == {"b"}
    assert any(line.endswith(f"of exports in {exports}") for line in said)
    (gone,) = (line for line in said if line.startswith("browser: removed "))
    assert "exports/saedashboard/a: --set browser.exports=neuronpedia,saedashboard writes" in gone


def test_an_sae_alone_has_the_examples_that_it_has_among_others(made, open_context, world):
    home, _, _ = made
    whole = {name: value for name, value in data_of(home, "sae_a/latents/0").items() if name != "others"}
    make(open_context(world), subjects_of(home)[:1])
    alone = {name: value for name, value in data_of(home, "sae_a/latents/0").items() if name != "others"}
    assert repr(alone) == repr(whole)


def test_the_overview_has_what_was_measured(made):
    home, _, _ = made
    core = {
        "eval_result_metrics": {"sparsity": {"l0": 4.0}},
        "saemill_metrics": {"explained_variance": 0.5, "confidence_95": {"explained_variance": [0.4, 0.6]}},
    }
    core["saemill_metrics"]["confidence_95"]["l0"] = [3.0, 3.5]  # of ordinary rows, and the number of all
    log = [{"sae": "a", "step": step, "loss": 1.0 / (step + 1)} for step in range(9)]
    before, beside = home / "browser/data/numbers.js", home.parent / "before.js"
    beside.hardlink_to(before)
    old = before.read_bytes()
    refresh(home, [Record("a", "run_1", "a", log=log, documents={"core": core})])
    assert beside.read_bytes() == old != before.read_bytes()  # replaced: a kill leaves one or the other, whole
    beside.unlink()
    numbers = data_of(home, "numbers")["saes"]["a"]
    assert numbers["numbers"]["explained_variance"] == {"value": 0.5, "low": 0.4, "high": 0.6}
    assert numbers["numbers"]["l0"] == {"value": 4.0, "low": None, "high": None}
    steps, values = numbers["curves"]["loss"]
    assert steps == [*range(9)] and values == [line["loss"] for line in log]
    outcome = {"l0": 9.0, "explained_variance": 0.7}
    trained = Record("b", "run_1", "b", outcome=outcome)
    told = {"saemill": {"measured_on": "test split", "settings": {"cache_id": "one"}}}
    refresh(home, [Record("a", "run_1", "a", documents={"core": core | told}), trained])
    mixed = data_of(home, "numbers")
    assert mixed["saes"]["b"]["numbers"] == {} and mixed["notes"] == ["core: test split."]
    refresh(home, [trained])
    of_training = data_of(home, "numbers")
    assert of_training["saes"]["b"]["numbers"]["l0"]["value"] == 9.0
    assert of_training["notes"] == ["L0 and explained variance of b: validation split, measured by training."]
    other = {"core": core | {"saemill": {"settings": {"cache_id": "two"}}}}
    refresh(home, [Record("a", "", "a", documents={"core": core | told}), Record("b", "", "b", documents=other)])
    assert "core: these numbers do not compare, results differ in cache_id." in data_of(home, "numbers")["notes"]
    half = {"core": {"eval_result_metrics": {"sparsity": {"l0": 4.0}}}}
    refresh(home, [replace(trained, documents=half)])
    assert data_of(home, "numbers")["saes"]["b"]["numbers"].keys() == {"l0"}  # not the other from training
    seeds = [Record(label, "run_1", label) for label in ("topk_seed0", "topk_seed1", "wide")]
    refresh(home, seeds)
    assert [one["place"] for one in data_of(home, "numbers")["saes"].values()] == [0, 0, 1]  # as plots colour them
    refresh(home.parent, [])  # no browser there: nothing happens
    assert json.dumps(sorted(path.name for path in home.parent.iterdir())) == '["run_1"]'


def test_the_overview_has_numbers_of_the_layer_and_the_weights_that_it_shows_alone(make_world, builder, open_context):
    """Where `--layer` names the layer of an SAE, each layer leaves results."""
    sae, context = builder.subject(builder.make_sae()), open_context(make_world(layers=(1, 2)))
    one, two = (replace(sae, config={}, layers=(layer,), target_layers=(layer,)) for layer in (1, 2))

    def shown():
        return {name: found["value"] for name, found in data_of(sae.home, "numbers")["saes"]["sae"]["numbers"].items()}

    def drawn(subject, eval_id):
        write_result(Result(subject, {}, {"sparsity": {"l0": 4.0}, "sae": {PROBED: 0.5}}), eval_id, {})
        time.sleep(0.002)  # results say when they were made to a thousandth of a second
        refresh(sae.home, read_records([RunFolder(sae.home)], print))
        return shown()

    make(context, [one], FEW)
    assert drawn(one, "sparse_probing") == {"probing": 0.5}
    assert drawn(two, "core") == {}  # the newest result is of another layer than the pages
    make(context, [one], FEW)
    assert shown() == {"probing": 0.5}
    make(context, [two], FEW)
    assert shown() == {"l0": 4.0}
    time.sleep(0.05)  # longer than two times of files need to differ
    builder.save(sae.folder, builder.make_sae(seed=9))
    assert drawn(replace(two), "core") == {}
    make(context, [replace(two)], FEW)
    assert shown() == {"l0": 4.0}
