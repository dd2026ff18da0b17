"""Whole harvests of a tiny model: content, statistics, resuming, repair, and what is refused."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from datasets import load_dataset
from huggingface_hub import constants
from rich.console import Console
from transformers import AutoModelForCausalLM

from saemill.cache_schema import (
    AddressInvalid,
    CorpusSpec,
    LaunchInvalid,
    Request,
    Site,
    Store,
    StoreBusy,
    StoreError,
    StoreFull,
    StoreMismatch,
    StoreUnreachable,
    StoreWriter,
    to_float32,
)
from saemill.cache_schema.cli import main as store_command
from saemill.cache_schema.commits import DEVICES_ASKED, DeviceRecord, read_devices, write_device
from saemill.cache_schema.disk_and_cloud_files import LocalFiles, open_files
from saemill.cache_schema.info import describe, render
from saemill.cache_schema.moments import is_special
from saemill.cache_schema.shard_claims import HELD_TRIED, Claims, open_claims
from saemill.cache_schema.splits import per_mille_for_tests
from saemill.cache_schema.stored_dtypes import SmallDtype
from saemill.cache_schema.verify_and_repair import repair, verify_shards
from saemill.harvest import create_or_resume_store, estimate_cost, run, shards, store_plan
from saemill.harvest.config import HarvestConfig, Worker
from saemill.harvest.corpus import hugging_face, local
from saemill.harvest.corpus.hugging_face import HubCorpus, Repository
from saemill.harvest.corpus.source import OPENWEBTEXT, DatasetOptions
from saemill.harvest.dry_run import dry_run
from saemill.harvest.errors import (
    ContextTooLong,
    LayerOutOfRange,
    NonFiniteResidual,
    SettingInvalid,
    SplitEmpty,
    TokensMissing,
)
from saemill.harvest.estimate_cost import RESERVE_BYTES, least_bytes
from saemill.harvest.model import resolve
from saemill.harvest.model.products_in_16_bits import is_widened
from saemill.harvest.model.resolve import FIRST_CHOICE, Choice, ModelSource
from saemill.harvest.process import Process
from saemill.harvest.progress import Watch
from saemill.harvest.run import Finished, reharvest
from saemill.harvest.shards import describe_device, other_devices_warning
from saemill.harvest.tokenise_corpus import Spool, spool_folder

from .conftest import digest_of

Make = Callable[..., HarvestConfig]


def harvest(config: HarvestConfig) -> Finished:
    return run.harvest(config, Watch(is_quiet=True))


@pytest.fixture(scope="module")
def reference(settings_of: Make, tmp_path_factory) -> Path:
    """A store harvested in one go, with every layer kept and no attention dropped."""
    out = tmp_path_factory.mktemp("reference") / "store"
    whole = {"attention_mass": 1.0, "attention_topk": 32, "attention_heads": "all", "dtype": "float32"}
    config = settings_of(out=str(out), resid_layers=(1, 2), attention_layers=(0, 3), **whole)
    assert harvest(config) == Finished(str(out), 8, 8, True)
    return out


def read_all(store: Store) -> dict[str, np.ndarray]:
    manifest = store.manifest
    parts = []
    for arrays in store.stream(Request(manifest.layers, manifest.attention.layers, tokens=True, documents=True)):
        assert arrays.tokens is not None and arrays.documents is not None
        part = {"tokens": arrays.tokens.copy(), "documents": arrays.documents.copy()}
        part |= {f"resid {layer}": values.copy() for layer, values in arrays.resid.items()}
        part |= {f"attention {layer}": csr.dense() for layer, csr in arrays.attention.items()}
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_the_store_holds_what_the_eager_model_computes(reference, model_folder):
    with Store.open(reference) as store:
        found = read_all(store)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager")
    ids = torch.from_numpy(found["tokens"][:24].astype(np.int64))
    with torch.no_grad():
        output = model(ids, output_hidden_states=True, output_attentions=True)
    for layer in (1, 2):
        expected = output.hidden_states[layer + 1].numpy()
        np.testing.assert_allclose(found[f"resid {layer}"][:24], expected, rtol=1e-5, atol=1e-6)
    for layer in (0, 3):
        np.testing.assert_allclose(found[f"attention {layer}"][:24], output.attentions[layer].numpy(), atol=1e-3)


def test_splits_follow_each_other_and_share_no_document(reference):
    with Store.open(reference) as store:
        documents, splits = read_all(store)["documents"], store.manifest.splits
    assert splits == {"train": (0, 115), "validation": (115, 120), "test": (120, 125)}
    owners = [set(documents[start:stop].ravel().tolist()) for start, stop in splits.values()]
    assert len(set.union(*owners)) == sum(map(len, owners))


def test_statistics_are_those_of_numpy(reference):
    with Store.open(reference) as store:
        found, manifest = read_all(store), store.manifest
        counted = ~is_special(found["tokens"], manifest.model.special_tokens)
        for layer in manifest.layers:
            resid = found[f"resid {layer}"].astype(np.float64)
            moments, norms = store.moments(layer), np.linalg.norm(resid, axis=-1)
            assert moments.count == counted.sum()
            np.testing.assert_allclose(moments.mean, resid[counted].mean(0), rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(moments.rms_norm, np.sqrt((norms[counted] ** 2).mean()), rtol=1e-12)
            np.testing.assert_allclose(moments.norm_by_position, norms.mean(0), rtol=1e-12)


def test_manifest_names_everything_that_decides_the_bytes_and_no_path(reference, model_folder, text_file):
    document = json.loads((reference / "zarr.json").read_text())["attributes"]["saemill"]
    assert document["corpus"]["revision"].startswith("sha256:")
    assert document["corpus"]["settings"] == {"kind": "file", "tokens": 4000, "batch_windows": 8}
    assert document["model"]["bos_token"] == 2
    assert document["model"]["special_tokens"] == [0, 1, 2]
    for path in (model_folder, text_file, reference):
        assert str(path.parent) not in json.dumps(document)


def test_no_scratch_files_are_left_beside_the_store(reference):
    assert [path.name for path in reference.parent.iterdir()] == ["store"]


def test_residuals_stay_in_the_dtype_of_the_model(straight, model_folder):
    with Store.open(straight) as store:
        found = read_all(store)
    assert found["resid 2"].dtype == np.uint16
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16, attn_implementation="eager")
    with torch.no_grad():
        output = model(torch.from_numpy(found["tokens"][:8].astype(np.int64)), output_hidden_states=True)
    expected = output.hidden_states[3].float().numpy()
    np.testing.assert_array_equal(to_float32(found["resid 2"][:8], "bfloat16"), expected)


@pytest.mark.parametrize("stop_after", [0, 5])
def test_an_interrupted_harvest_goes_on_to_the_same_store(make_config: Make, straight, monkeypatch, stop_after):
    compute, calls = shards.compute_shard, []

    def interrupted(*args):
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(None)
        return compute(*args)

    monkeypatch.setattr(shards, "compute_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        harvest(make_config())
    with Store.open(make_config().out) as store:
        assert store.committed.tolist() == [True] * stop_after + [False] * (8 - stop_after)
    monkeypatch.undo()
    harvest(make_config())
    assert digest_of(make_config().out) == digest_of(straight)


def test_a_second_start_does_not_tokenise_again(harvested, monkeypatch):
    monkeypatch.setattr(create_or_resume_store, "spool_corpus", lambda *_: pytest.fail("tokenised again"))
    monkeypatch.setattr(run, "load_model", lambda *_: pytest.fail("loaded the model for nothing"))
    assert harvest(harvested).committed == 8


@pytest.mark.usefixtures("share_only")
def test_workers_in_any_order_give_the_same_store(make_config: Make, straight):
    finished = [harvest(make_config(worker=Worker(index, 3))) for index in (0, 2, 1)]
    assert [item.committed for item in finished] == [3, 5, 8]
    assert all(item.speaks for item in finished)  # each in a terminal of its own
    assert digest_of(make_config().out) == digest_of(straight)


def test_workers_take_the_shares_of_those_that_never_come(make_config: Make, straight, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run, "_harvest_share", lambda *_: 0)
        harvest(make_config())  # tokens alone
    with StoreWriter.open(make_config().out) as other, other.claim(1) as mine, other.claim(2) as another:
        assert mine and another
        assert harvest(make_config(worker=Worker(1, 3))).committed == 6
    assert harvest(make_config(worker=Worker(0, 3))).committed == 8  # its own share is done
    assert digest_of(make_config().out) == digest_of(straight)


@pytest.fixture
def share_of(monkeypatch):
    """share_of(worker, shards, claims, done): how many a worker takes, without a model, and what it says in the end."""

    def take(worker: Worker, shards: int, claims: Claims, done: set[int]) -> tuple[int, str]:
        def pending() -> list[int]:
            return [shard for shard in range(shards) if shard not in done]

        def harvest_shards(_writer, _harvester, wanted, _report) -> list[int]:
            taken = [shard for shard in wanted if claims.take(shard)]
            done.update(taken)
            for shard in taken:
                claims.release(shard)
            return [shard for shard in wanted if shard not in taken]

        writer = SimpleNamespace(
            manifest=SimpleNamespace(shards=shards, context=32, shard_range=lambda shard: (shard, shard + 1)),
            files=None,
            pending=pending,
            left=lambda: (claims.worth_trying(pending()), len(pending())),
            if_killed=claims.if_killed,
        )
        monkeypatch.setattr(run, "make_harvester", lambda *_: None)
        monkeypatch.setattr(run, "_warn_of_other_devices", lambda *_: None)
        monkeypatch.setattr(run, "is_bound_to_fit", lambda *_: True)
        monkeypatch.setattr(run, "harvest_shards", harvest_shards)
        said = io.StringIO()
        process = Process(torch.device("cpu"), worker, takes_rest=True)
        plan: Any = SimpleNamespace(source=SimpleNamespace(to_download=None))
        written = run._harvest_share(plan, process, cast(StoreWriter, writer), Watch(Console(file=said, width=300)))
        return written, said.getvalue()

    return take


def test_what_is_left_to_others_is_counted_and_not_as_many_as_were_tried(share_of):
    """On an object store a worker tries few of the claims that others hold: what it says is of all."""
    files = open_files(f"memory://{uuid.uuid4().hex}")
    other, mine = open_claims(files), open_claims(files)
    assert all(other.take(shard) for shard in range(10, 40))
    written, said = share_of(Worker(0, 40), 40, mine, set())
    assert written == 10
    assert f"other writers, which hold or have committed them: 30 shards; {30 - HELD_TRIED} not tried" in said
    assert "may have lapsed. If that writer was killed, run again in 10 minutes" in said
    written, said = share_of(Worker(0, 40), 40, mine, set(range(25)))
    assert written == 0 and "left to other writers, which hold or have committed them: 15 shards. If" in said


def test_a_worker_whose_whole_share_is_held_takes_what_is_free(share_of):
    files = open_files(f"memory://{uuid.uuid4().hex}")
    other, mine = open_claims(files), open_claims(files)
    assert other.take(0) and other.take(2)
    written, said = share_of(Worker(0, 2), 4, mine, set())
    assert written == 2 and "left to other writers, which hold or have committed them: 2 shards" in said


@pytest.mark.parametrize("model", [{}, {"model": "auto"}])
def test_a_later_worker_waits_for_the_tokens_with_a_bound(make_config: Make, monkeypatch, model):
    """Under auto it does not decide by itself."""
    if model:
        monkeypatch.setattr(run, "choose", lambda _: pytest.fail("decided by itself"))
    monkeypatch.setattr(create_or_resume_store, "WAIT_SECONDS", 0)
    monkeypatch.setattr(create_or_resume_store, "POLL_SECONDS", 0.01)
    said = io.StringIO()
    with pytest.raises(TimeoutError, match="first worker"):
        run.harvest(make_config(worker=Worker(1, 2), **model), Watch(Console(file=said)))
    assert "waiting for worker 1 to write the tokens" in said.getvalue()


def test_workers_that_wait_for_tokens_ask_less_and_less_often(monkeypatch):
    """By one request each time; of 12 hours of two each every half second an object store would be full."""
    reads: list[str] = []

    def read(key: str) -> bytes:
        reads.append(key)
        if len(reads) < 20:
            raise KeyError(key)
        return b"{}"

    pauses: list[float] = []
    monkeypatch.setattr(create_or_resume_store.time, "sleep", pauses.append)
    create_or_resume_store.wait_for_tokens(
        cast(Any, SimpleNamespace(url="s3://bucket/store", read=read)), Watch(is_quiet=True)
    )
    assert len(reads) == 20 and 15 <= max(pauses) <= 30 and pauses[0] <= 0.5 and len(set(pauses[-9:])) == 9


@pytest.mark.parametrize("is_held", [False, True])
def test_who_waits_for_tokens_ends_soon_where_nobody_is_about_them(make_config: Make, monkeypatch, is_held):
    """On a disk, whose lock says so: else fifteen GPUs would wait twelve hours for a worker that failed."""
    clock = SimpleNamespace(now=0.0)
    clock.monotonic, clock.sleep = lambda: clock.now, lambda pause: setattr(clock, "now", clock.now + pause)
    monkeypatch.setattr(create_or_resume_store, "time", clock)
    files, said = open_files(make_config().out), io.StringIO()
    folder = spool_folder(files)
    with (
        create_or_resume_store.lock_spool(folder) if is_held else nullcontext(),
        pytest.raises(TokensMissing, match="waited 12 hours" if is_held else r"for 6\d\.\d minutes nobody .* start it"),
    ):
        create_or_resume_store.wait_for_tokens(files, Watch(Console(file=said, width=300)))
    assert clock.now > 12 * 3600 if is_held else 3600 <= clock.now < 3800
    told = said.getvalue().count(f"{'worker 1' if is_held else 'nobody'} is working on it\n")
    assert told == said.getvalue().count("still waiting") and (is_held or 24 < told <= 30)
    assert folder.exists() == is_held


def test_a_look_at_the_lock_does_not_hold_up_who_tokenises(tmp_path, monkeypatch):
    with create_or_resume_store.lock_spool(tmp_path):
        pass
    fd = os.open(tmp_path / "lock", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    waits = []
    monkeypatch.setattr(create_or_resume_store.time, "sleep", lambda _: waits.append(os.close(fd)))
    with create_or_resume_store.lock_spool(tmp_path):
        assert len(waits) == 1


def test_a_download_for_all_is_seen_by_those_who_wait(make_config: Make, model_folder, monkeypatch):
    seen = []

    def fetch(choice: Choice) -> ModelSource:
        seen.append(create_or_resume_store._is_locked(open_files(make_config().out)))
        return ModelSource(choice.name, "c0ffee", model_folder)

    monkeypatch.setattr(
        run, "fetch_description", lambda choice, _: ModelSource(choice.name, "c0ffee", model_folder, to_download=7)
    )
    monkeypatch.setattr(run, "fetch", fetch)
    harvest(make_config(model="somebody/model"))
    assert seen[0] is True


def test_of_one_launch_the_first_speaks_and_whoever_ends_the_work(make_config: Make, monkeypatch):
    def launched(rank: int) -> Finished:
        process = Process(torch.device("cpu"), Worker(rank, 2), speaks=rank == 0)
        monkeypatch.setattr(run, "open_process", lambda *_: nullcontext(process))
        return run.harvest(make_config(), Watch(is_quiet=True))

    first, second, again = launched(0), launched(1), launched(1)
    assert [(item.committed, item.speaks) for item in (first, second, again)] == [(4, True), (8, True), (8, False)]


@pytest.mark.parametrize(("rank", "is_quiet"), [(0, False), (1, True)])
def test_of_one_launch_only_the_first_shows_what_it_does(make_config: Make, monkeypatch, rank, is_quiet):
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    watches: list[Watch] = []
    monkeypatch.setattr(run, "open_process", lambda *_: nullcontext(Process(torch.device("cpu"), Worker(0), rank == 0)))
    monkeypatch.setattr(run, "decide", lambda _, watch: watches.append(watch))
    monkeypatch.setattr(run, "_begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.harvest(make_config())
    assert watches[0].console.quiet is is_quiet


def test_a_device_by_number_is_not_for_each_process_of_a_launch(make_config: Make, monkeypatch):
    """All would compute on those of their ranks, whatever was asked for."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingInvalid, match="--device cuda:1: each process of a launch .* Leave out the number"):
        harvest(make_config(device="cuda:1"))
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: int("no MASTER_ADDR"))  # as it refuses, in a ValueError
    with pytest.raises(LaunchInvalid, match="^WORLD_SIZE=2: .* to connect, found: .*MASTER_ADDR.*. Start them all"):
        harvest(make_config(device="cpu"))
    for said in ("", "0", "abc"):
        monkeypatch.setenv("WORLD_SIZE", said)
        with pytest.raises(LaunchInvalid, match=f"^WORLD_SIZE={said}: expected a number as torchrun sets it. Unset"):
            harvest(make_config())


def test_a_launch_that_gives_another_device_than_was_asked_for_is_refused(make_config: Make, monkeypatch):
    state = SimpleNamespace(device="cpu", num_processes=2, process_index=0, destroy_process_group=lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: state)
    with pytest.raises(SettingInvalid, match="--device cuda: the launch gave this process cpu"):
        harvest(make_config(device="cuda"))


def test_a_launch_without_gpus_is_several_processes_and_one_that_lacks_a_number_is_refused(
    make_config: Make, monkeypatch
):
    """Else each took itself for the only one, and all for the first."""
    asked: list[bool] = []

    def state(cpu: bool) -> SimpleNamespace:
        asked.append(cpu)
        return SimpleNamespace(device="cpu", num_processes=1, process_index=0, destroy_process_group=lambda: None)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", state)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingInvalid, match="expected RANK and LOCAL_RANK next to WORLD_SIZE=2"):
        harvest(make_config(device="auto"))
    assert asked == [True]


@pytest.fixture
def chosen(model_folder, monkeypatch) -> list[Choice]:
    """What was fetched; every model has the files of the tiny one."""
    choices: list[Choice] = []

    def fetch_description(choice: Choice, _: object) -> ModelSource:
        choices.append(choice)
        return ModelSource(choice.name, "c0ffee", model_folder)

    monkeypatch.setattr(run, "fetch_description", fetch_description)
    return choices


@pytest.mark.usefixtures("share_only")
@pytest.mark.parametrize("name", [FIRST_CHOICE, "pocket"])
def test_auto_is_decided_once_for_a_store(make_config: Make, chosen, monkeypatch, name):
    config = make_config(model="auto")
    monkeypatch.setattr(run, "choose", lambda _: Choice(name))
    harvest(replace(config, worker=Worker(0, 2)))
    monkeypatch.setattr(run, "choose", lambda _: pytest.fail("decided anew"))
    said = io.StringIO()
    assert run.harvest(replace(config, worker=Worker(1, 2)), Watch(Console(file=said, width=200))).committed == 8
    dry_run(config, Watch(is_quiet=True))
    assert [(choice.name, choice.revision) for choice in chosen[1:]] == [(name, "c0ffee")] * 2
    assert said.getvalue().startswith(f"model: {name}, because the store at --out was started with it\nto insist: ")


@pytest.mark.parametrize("name", ["pocket", "smollm2"])
def test_a_folder_that_is_called_as_a_model_of_ours_is_not_taken_for_it(
    make_config: Make, model_folder, tmp_path, name
):
    shutil.copytree(model_folder, tmp_path / name)
    plan = run.decide(make_config(model=str(tmp_path / name), corpus=None, tokens=None), Watch(is_quiet=True))
    assert (plan.source.id, plan.corpus.dataset, plan.tokens) == (name, OPENWEBTEXT, store_plan.DEFAULT_TOKENS)


FIRST, LATER = "1" * 40, "2" * 40  # commits


def put_on_hub(model_folder, tmp_path, monkeypatch, main: str) -> list[str]:
    """Both commits of a model; the only item of the list is what `main` is."""
    mains = [main]
    for commit in (FIRST, LATER):
        shutil.copytree(model_folder, tmp_path / "hub" / commit)
    monkeypatch.setattr(
        resolve, "snapshot_download", lambda _, revision=None, **__: str(tmp_path / "hub" / (revision or mains[0]))
    )
    return mains


@pytest.mark.usefixtures("share_only")
def test_a_model_of_the_hub_stays_at_the_commit_of_the_store(make_config: Make, model_folder, tmp_path, monkeypatch):
    """Whoever published it has moved `main`, and this machine has the later commit too."""
    main = put_on_hub(model_folder, tmp_path, monkeypatch, FIRST)
    config = make_config(model="somebody/model")
    harvest(replace(config, worker=Worker(0, 2)))
    main[0] = LATER
    assert not dry_run(config, Watch(is_quiet=True)).to_download
    assert harvest(replace(config, worker=Worker(1, 2))).committed == 8
    with Store.open(config.out) as store:
        assert store.manifest.model.revision == FIRST
    with pytest.raises(StoreMismatch, match=r"model\.id"):
        harvest(replace(config, model="another/model"))


@pytest.mark.usefixtures("share_only")
@pytest.mark.parametrize(("worker", "meanwhile"), [(Worker(1, 2), "wait_for_tokens"), (Worker(0), "announce")])
def test_who_has_waited_or_lost_the_race_takes_the_commit_of_the_store(
    make_config: Make, model_folder, tmp_path, monkeypatch, worker, meanwhile
):
    """Not its own, which was looked up before there was a store, and after the hub's `main` had moved."""
    main = put_on_hub(model_folder, tmp_path, monkeypatch, LATER)
    config = make_config(model="somebody/model")

    def begin(*_: object) -> None:
        monkeypatch.setattr(run, meanwhile, lambda *_: None)
        main[0] = FIRST
        harvest(replace(config, worker=Worker(0, 2)))
        main[0] = LATER

    monkeypatch.setattr(run, meanwhile, begin)
    assert harvest(replace(config, worker=worker)).committed == 8


@pytest.mark.usefixtures("share_only")
def test_weights_are_not_fetched_to_be_told_that_settings_differ(make_config: Make, model_folder, monkeypatch):
    """Nor for a dry run, nor where nothing is left to harvest."""
    monkeypatch.setattr(
        run, "fetch_description", lambda choice, _: ModelSource(choice.name, "c0ffee", model_folder, to_download=7)
    )
    monkeypatch.setattr(run, "fetch", lambda choice: ModelSource(choice.name, "c0ffee", model_folder))
    config = make_config(model="somebody/model")
    harvest(replace(config, worker=Worker(0, 2)))
    with monkeypatch.context() as patch:
        patch.setattr(run, "fetch", lambda _: pytest.fail("fetched the weights"))
        for worker in (Worker(0), Worker(1, 2)):
            with pytest.raises(StoreMismatch, match="attention.topk"):
                harvest(replace(config, attention_topk=8, worker=worker))
        with pytest.raises(StoreMismatch, match="attention.topk"):
            dry_run(replace(config, attention_topk=8), Watch(is_quiet=True))
        rest = dry_run(config, Watch(is_quiet=True))
        assert (rest.to_download, list(rest.work.shards), rest.work.is_started) == (7, [1, 3, 5, 7], True)
        assert rest.least_bytes == least_bytes(rest.work.manifest) // 2 < rest.needed_bytes
    harvest(config)
    monkeypatch.setattr(run, "fetch", lambda _: pytest.fail("fetched the weights"))
    assert harvest(config).committed == 8


def test_who_gets_the_small_model_for_the_real_one_is_told_again_at_the_end(make_config: Make, chosen, monkeypatch):
    banner = ("model: pocket, because there is no network", "to insist: ...")
    for choice, told in [
        (Choice("pocket", banner=banner), banner),
        (Choice("pocket"), ()),  # asked for
        (Choice(FIRST_CHOICE, banner=banner), ()),
    ]:
        monkeypatch.setattr(run, "choose", lambda _, choice=choice: choice)
        assert harvest(make_config(model="auto", out=f"memory://{uuid.uuid4().hex}")).fell_back == told


@pytest.mark.usefixtures("share_only")
def test_a_store_keeps_the_tests_it_was_begun_with(make_config: Make, monkeypatch):
    """Whatever rule is made later, and whether the store was begun before there was one."""
    for begun, later in [(40, 225), (225, 40)]:
        config = make_config(out=f"memory://{uuid.uuid4().hex}")
        monkeypatch.setattr(store_plan, "per_mille_for_tests", lambda _, begun=begun: begun)
        harvest(replace(config, worker=Worker(0, 2)))
        monkeypatch.setattr(store_plan, "per_mille_for_tests", lambda _, later=later: later)
        assert harvest(replace(config, worker=Worker(1, 2))).committed == 8
        with Store.open(config.out) as store:
            start, stop = store.manifest.splits["test"]
            assert stop - start == 125 * begun // 1000
            assert store.manifest.corpus.settings.get("test_per_mille", 40) == begun


def test_no_batch_is_said_to_be_larger_than_its_shard(make_config: Make, monkeypatch):
    """A store that says so, as they did, goes on all the same where no other number is asked for."""

    def batch_of(config: HarvestConfig) -> int:
        watch = Watch(is_quiet=True)
        plan, files = run.decide(config, watch), open_files(config.out)
        process = Process(torch.device("cpu"), Worker())
        with run.create_store(plan, run.find_corpus(plan, files), files, watch) or run.resume_store(
            plan, process, files, watch
        ) as writer:
            return writer.manifest.corpus.settings["batch_windows"]

    config = make_config(shard_windows=8, batch_windows=None)
    assert batch_of(config) == 8
    before = replace(config, out=f"{config.out}_before")
    with monkeypatch.context() as patch:
        patch.setattr(HarvestConfig, "windows_per_batch", lambda *_: 64)
        assert batch_of(before) == 64
    assert batch_of(before) == 64
    with pytest.raises(StoreMismatch, match="batch_windows"):
        batch_of(replace(before, batch_windows=8))


def test_a_store_keeps_its_size_of_shards_unless_another_is_asked_for(harvested: HarvestConfig):
    """Also where the default's chunks would be too large."""
    shutil.rmtree(Path(harvested.out) / "commits")
    assert run.decide(replace(harvested, shard_windows=None), Watch(is_quiet=True)).config.shard_windows == 16
    harvest(replace(harvested, shard_windows=None))
    with Store.open(harvested.out) as store:
        assert store.committed.all() and store.manifest.shard_windows == 16
    with pytest.raises(StoreMismatch, match="shard_windows: the store has 16, but 32 was asked for"):
        harvest(replace(harvested, shard_windows=32))


def test_a_corpus_that_comes_in_part_is_named_as_one(make_config: Make, text_file, monkeypatch):
    source = DatasetOptions("owner/name")
    corpus = HubCorpus(
        source,
        Repository("owner/name", "c0ffee", part="partial-train"),
        lambda: load_dataset("text", data_files=str(text_file), split="train", streaming=True),
    )
    monkeypatch.setattr(create_or_resume_store, "open_corpus", lambda _: corpus)
    said = io.StringIO()
    run.harvest(make_config(corpus=source), Watch(Console(file=said, width=200)))
    assert "owner/name can be streamed only in part (partial-train)" in said.getvalue()
    with Store.open(make_config().out) as store:
        page = io.StringIO()
        Console(file=page, width=200).print(render(describe(store)))
        assert "owner/name, a part of it (partial-train)" in page.getvalue()
    assert harvest(make_config(corpus=source)).committed == 8  # goes on without asking the hub


def test_auto_chooses_where_the_store_is_of_a_model_it_never_means(make_config: Make, chosen, monkeypatch):
    harvest(make_config())
    monkeypatch.setattr(run, "choose", lambda _: Choice("pocket"))
    with pytest.raises(StoreMismatch, match=r"model\.id"):
        harvest(make_config(model="auto"))


def test_a_dry_run_waits_for_nobody(make_config: Make, chosen, monkeypatch):
    monkeypatch.setattr(create_or_resume_store, "WAIT_SECONDS", 0)
    monkeypatch.setattr(run, "choose", lambda _: Choice("pocket"))
    dry_run(make_config(model="auto", worker=Worker(1, 2)), Watch(is_quiet=True))
    assert not Path(make_config().out).exists()


@pytest.mark.usefixtures("share_only")
def test_a_dry_run_counts_what_is_left(make_config: Make):
    config, quiet = make_config(), Watch(is_quiet=True)
    whole = dry_run(config, quiet)
    assert list(whole.work.shards) == list(range(8))
    harvest(replace(config, worker=Worker(0, 2)))
    rest = dry_run(config, quiet)
    assert list(rest.work.shards) == [1, 3, 5, 7]
    assert rest.work.manifest.tokens == 4000 and rest.work.is_started
    tokens = 16 * 32 * 3 + 13 * 32  # the last shard is a short one
    assert rest.seconds == pytest.approx(tokens / rest.cost.tokens_per_second)
    assert rest.needed_bytes == sum(rest.sizes.values()) + RESERVE_BYTES
    assert rest.sizes["resid/layer_2"] == 4 * (16 * 32 * 16 * 2 + 4) and sum(whole.sizes.values()) > 1.9 * sum(
        rest.sizes.values()
    )
    with pytest.raises(StoreMismatch, match="attention.topk"):
        dry_run(replace(config, attention_topk=8), quiet)
    harvest(config)
    assert (dry_run(config, quiet).needed_bytes, dry_run(config, quiet).seconds) == (0, 0)


def leave_spool(out: str) -> Path:
    """What a process leaves that dies between the store's root document and the end of its spool."""
    folder = Path(out + ".spool")
    folder.mkdir()
    for name in ("lock", "tokens.u32"):
        (folder / name).touch()
    return folder


def test_a_scratch_folder_that_was_left_behind_is_removed(harvested):
    folder = leave_spool(harvested.out)
    harvest(replace(harvested, worker=Worker(1, 2)))
    with create_or_resume_store.lock_spool(folder):
        harvest(harvested)
    assert (folder / "tokens.u32").exists()
    harvest(harvested)
    assert not folder.exists()


def test_a_folder_of_that_name_that_is_no_scratch_folder_stays(harvested):
    folder = leave_spool(harvested.out)
    (folder / "lock").unlink()
    harvest(harvested)
    assert folder.exists()


def test_other_settings_are_refused_with_their_differences(harvested):
    before = digest_of(harvested.out)
    with pytest.raises(StoreMismatch, match=r"(?s)settings.tokens: .*4000, .*5000.*attention.topk: .*16, .*8 was .*\n"):
        harvest(replace(harvested, tokens=5000, attention_topk=8))
    assert digest_of(harvested.out) == before


@pytest.mark.parametrize("is_large", [False, True])
def test_a_changed_corpus_is_refused(make_config: Make, tmp_path, monkeypatch, capsys, is_large):
    """A large one is read for its digest only if its file changed, and who starts the harvest is told."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(local, "LARGE_FILES", 1 if is_large else 2)
    monkeypatch.setattr(local, "TICK_SECONDS", 0.1)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"text {i} " * 9 for i in range(200)))
    config = make_config(corpus=DatasetOptions(str(text)))
    run.harvest(config)
    with monkeypatch.context() as patched:
        if is_large:
            patched.setattr(local.LocalCorpus, "_hash_files", None)
        run.harvest(config)
        dry_run(config)
    text.write_text(text.read_text().replace("text 7", "text 8"))
    with pytest.raises(StoreMismatch, match=r"corpus\.revision"):
        run.harvest(config)
    assert capsys.readouterr().err.count("for the corpus's digest") == 2 * is_large


def test_a_shard_held_by_another_writer_is_left_to_it(make_config: Make, monkeypatch):
    monkeypatch.setattr(run, "harvest_shards", lambda *_: [])
    harvest(make_config())
    monkeypatch.undo()
    with StoreWriter.open(make_config().out) as other, other.claim(3) as mine:
        assert mine
        assert harvest(make_config()).committed == 7
    assert harvest(make_config()).committed == 8


def test_a_shard_whose_claim_was_lost_is_another_writers(make_config: Make, monkeypatch):
    """To whoever slept through a lease; the others of the harvest are written."""
    write, lost = StoreWriter.write, [3]

    def write_or_not(writer: StoreWriter, shard: int, *rest: Any) -> Any:
        return None if shard in lost else write(writer, shard, *rest)

    monkeypatch.setattr(StoreWriter, "write", write_or_not)
    assert harvest(make_config()).committed == 7
    lost.clear()
    assert harvest(make_config()).committed == 8


def test_a_folder_for_tokens_that_is_another_users_is_refused(tmp_path, monkeypatch):
    """In the folder for temporary files, where everybody may make one of that name."""
    monkeypatch.setattr(create_or_resume_store.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = spool_folder(open_files(f"memory://{tmp_path.name}"))
    with create_or_resume_store.lock_spool(folder):
        assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(create_or_resume_store.os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(SettingInvalid, match="another user's"), create_or_resume_store.lock_spool(folder):
        pass
    monkeypatch.undo()
    monkeypatch.setattr(create_or_resume_store.tempfile, "gettempdir", lambda: str(tmp_path))
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SettingInvalid, match="not a folder"), create_or_resume_store.lock_spool(folder):
        pass


def test_two_cannot_tokenise_for_one_store(make_config: Make):
    with (
        create_or_resume_store.lock_spool(Path(make_config().out + ".spool")),
        pytest.raises(StoreBusy, match="tokenising"),
    ):
        harvest(make_config())


def test_a_store_that_another_began_meanwhile_is_not_tokenised_again(make_config: Make, straight, monkeypatch):
    """Between the look for a store and the lock lies the opening of the corpus, which may take minutes."""
    out, open_corpus = Path(make_config().out), create_or_resume_store.open_corpus

    def begun_meanwhile(options: DatasetOptions) -> Any:
        shutil.copytree(straight, out, dirs_exist_ok=True)
        return open_corpus(options)

    monkeypatch.setattr(create_or_resume_store, "open_corpus", begun_meanwhile)
    monkeypatch.setattr(create_or_resume_store, "spool_corpus", lambda *_: pytest.fail("tokenised again"))
    assert harvest(make_config()).committed == 8
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("leave_out", [(), ("bos", "self")])
def test_repair_harvests_damaged_shards_again(make_config: Make, model_folder, monkeypatch, capsys, leave_out):
    config = make_config(leave_out=leave_out)
    harvest(config)
    before = digest_of(config.out)
    with StoreWriter.open(config.out) as writer:
        for shard in (2, 7):
            (Path(config.out) / f"commits/{shard:05d}.json").unlink()
            chunk = writer.arrays["resid/layer_2"].chunk_key(shard)
            (Path(config.out) / chunk).write_bytes(b"damaged")
        (Path(config.out) / "commits/index.json").unlink()
    monkeypatch.chdir(model_folder.parent)
    reharvest(config.out, [2, 7])
    assert digest_of(config.out) == before
    assert "warning" not in capsys.readouterr().err
    with Store.open(config.out) as store:
        assert not [item for report in verify_shards(store) for item in report.damage]


def test_a_shard_says_what_computed_it_and_another_device_is_warned_of(harvested, model_folder, capsys):
    """In no id and no digest: a store that says nothing of it, as those of before, has the same digest."""
    files, before = open_files(harvested.out), digest_of(harvested.out)
    recorded = read_devices(files, range(10))
    here = describe_device(torch.device("cpu"), torch.bfloat16)
    assert recorded and set(recorded.values()) == {here} and here.torch == torch.__version__
    with Store.open(harvested.out) as store:
        assert describe(store)["computed_on"] == [str(here)]
    write_device(files, 2, replace(here, type="cuda", name="NVIDIA H100", float32_products="tf32"))
    repair(harvested.out, [1, 2])
    (Path(harvested.out) / "commits/00003.device.json").write_text("[" * 100_000)
    (Path(harvested.out) / "commits/00004.device.json").unlink()
    reharvest(harvested.out, [1, 2], model=str(model_folder))
    said = capsys.readouterr().err
    assert f"warning: shard 2 was computed on cuda (NVIDIA H100), torch {here.torch}, float32 products tf32" in said
    assert f"this is {here}" in said and "last digits" in said
    assert digest_of(harvested.out) == before
    assert read_devices(files, range(10)) == {shard: here for shard in recorded if shard not in (3, 4)}
    write_device(files, 0, replace(here, torch="1.0"))
    repair(harvested.out, [2])
    run.harvest(harvested, Watch())
    assert "warning: shard 0 was computed on" in capsys.readouterr().err


def test_processors_that_make_products_of_16_bits_otherwise_are_told_apart(monkeypatch):
    """At the default dtype they differ in the last digits, though torch takes the same instructions of both."""
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    found: dict[bool, tuple[DeviceRecord, DeviceRecord]] = {}
    for has_instructions in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has_instructions: has)
        is_widened.cache_clear()
        cpu = torch.device("cpu")
        found[has_instructions] = describe_device(cpu, torch.bfloat16), describe_device(cpu, torch.float32)
    is_widened.cache_clear()
    (native, whole), (widened, same) = found[True], found[False]
    assert whole == same == native
    assert "was computed on cpu" in other_devices_warning({0: native}, widened)
    assert ", 16-bit products in float32), torch" in other_devices_warning({0: native}, widened)


@pytest.mark.filterwarnings("ignore:Please use the new API settings")  # torch 2.9, of the older setting
def test_a_program_may_set_the_precision_of_products_in_either_way():
    """After torch's newer setting, its older question for the precision raises an error."""
    cpu, gpu, here = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul, torch.device("cpu")
    before, found = (cpu.fp32_precision, gpu.fp32_precision), []
    try:
        for older in ("high", "highest"):
            torch.set_float32_matmul_precision(older)
            found.append(describe_device(here, torch.bfloat16).float32_products)
        for newer in ("ieee", "tf32", "bf16"):
            cpu.fp32_precision = newer
            found.append(describe_device(here, torch.bfloat16).float32_products)
    finally:
        cpu.fp32_precision, gpu.fp32_precision = before
    assert found == ["tf32", "ieee", "ieee", "tf32", "tf32"]


def test_of_many_shards_few_are_asked_what_computed_them(tmp_path, monkeypatch):
    files, asked = open_files(tmp_path), []
    here = describe_device(torch.device("cpu"), torch.bfloat16)
    write_device(files, 0, here)
    read = files.read
    monkeypatch.setattr(files, "read", lambda key: asked.append(key) or read(key))
    monkeypatch.setattr(files, "which_exist", lambda folder, names: asked.extend(names) or [])
    assert read_devices(files, range(1_000_000)) == {0: here}
    assert len(asked) == DEVICES_ASKED
    assert read_devices(files, []) == {}


@pytest.mark.parametrize("small", get_args(SmallDtype))
def test_repair_rounds_harvested_shards_to_the_same_bits(make_config: Make, reference, model_folder, small):
    config = make_config(stored_as=small)
    harvest(config)
    before = digest_of(config.out)
    with Store.open(config.out) as store, Store.open(reference) as exact:
        request = Request(layers=(2,))
        for part, whole in zip(store.stream(request), exact.stream(request), strict=True):
            values, plain = part.values(Site("resid", 2)), whole.values(Site("resid", 2))
            errors = np.linalg.norm(values - plain, axis=2) / np.linalg.norm(plain, axis=2)
            assert 0 < errors.max() < 0.05
    repair(config.out, [1])
    reharvest(config.out, [1], model=str(model_folder))
    assert digest_of(config.out) == before


def test_sinks_left_out_are_recorded_and_in_no_row(make_config: Make):
    config = make_config(leave_out=("bos", "self"))
    harvest(config)
    with Store.open(config.out) as store:
        assert store.manifest.attention.left_out == ("bos", "self")
        for part in store.stream(Request(attention_layers=store.manifest.attention.layers)):
            for csr in part.attention.values():
                query = csr.row_of_entry() % csr.context
                assert csr.entries and (csr.indices > 0).all() and (csr.indices < query).all()
        facts = describe(store)
    assert all(links["links"] > 0 and links["bos_mass"] == 0 for links in facts["attention_links"].values())
    with pytest.raises(StoreMismatch, match=r"attention.left_out: the store has bos, self, but none was asked for"):
        harvest(replace(config, leave_out=()))


def test_a_store_that_leaves_nothing_out_says_nothing_of_it(reference):
    manifest = json.loads((reference / "zarr.json").read_text())["attributes"]["saemill"]
    assert "left_out" not in manifest["attention"]


def test_repair_refuses_another_model(harvested, model_folder, tmp_path):
    other = tmp_path / "tiny"
    shutil.copytree(model_folder, other)
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with pytest.raises(StoreError, match=r"expected tiny at sha256-.*same harvest"):
        reharvest(harvested.out, [0], model=str(other))


def test_repair_without_the_model_removes_nothing(harvested, model_folder, tmp_path, monkeypatch):
    """A split that lacks one shard cannot be read at all."""
    before = digest_of(harvested.out)
    with StoreWriter.open(harvested.out) as writer:
        chunk = Path(harvested.out) / writer.arrays["resid/layer_2"].chunk_key(2)
    chunk.write_bytes(chunk.read_bytes()[:-1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for more in ([], ["--model", str(tmp_path / "gone")], ["--device", "abacus", "--model", str(model_folder)]):
        result = CliRunner().invoke(store_command, ["repair", harvested.out, *more])
        said = result.output.splitlines()
        assert result.exit_code == 1 and said[-1].startswith("error: ") and "No shard was removed" in said[-1]
        with Store.open(harvested.out) as store:
            assert store.committed.all() and store.record(2)
    result = CliRunner().invoke(
        store_command, ["repair", harvested.out, "--model", str(model_folder), "--device", "cpu"]
    )
    assert result.exit_code == 0 and "harvested again: shard 2" in result.output, result.output
    assert digest_of(harvested.out) == before


def test_repair_of_what_no_harvest_wrote_removes_nothing(straight, tmp_path):
    """It says nothing of batches, which decide the last digits."""
    with Store.open(straight) as store:
        manifest = replace(store.manifest, corpus=CorpusSpec("mine"))
    ids = np.zeros((manifest.windows, manifest.context), np.uint32)
    StoreWriter.create(tmp_path / "mine", manifest, ids, ids).close()
    with pytest.raises(StoreError, match="mine was not written by a harvest: .*No shard was removed.* --remove-only"):
        reharvest(str(tmp_path / "mine"), [0], undo=lambda: pytest.fail("removed"))


def test_a_host_that_locks_no_more_pages_computes_all_the_same(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    ids = torch.arange(3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    assert shards._pinned(ids) is ids


def test_repair_leaves_committed_shards_alone(harvested, model_folder):
    with pytest.raises(StoreBusy, match=r"shards \[0\]"):
        reharvest(harvested.out, [0], model=str(model_folder))


def test_packing_by_documents(make_config: Make):
    harvest(make_config(packing="documents", tokens=2000))
    with Store.open(make_config().out) as store:
        found = read_all(store)
    assert (found["documents"] == found["documents"][:, :1]).all()
    assert (found["tokens"][:, 0] == 2).all() and (found["tokens"][:, 1:] != 2).all()


def test_without_attention(make_config: Make):
    harvest(make_config(attention_layers=()))
    with Store.open(make_config().out) as store:
        assert store.manifest.attention.layers == ()
        assert read_all(store)["resid 2"].shape == (125, 32, 16)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"resid_layers": (4,)}, LayerOutOfRange, "layers 0 to 3"),
        ({"resid_layers": (3,), "attention_layers": (1, 2, 3, 4)}, LayerOutOfRange, "attention of layer 4"),
        ({"context": 65}, ContextTooLong, "at most 64"),
        (
            {"shard_windows": 2**20, "attention_topk": 99},
            SettingInvalid,
            r"layer_0/data: .* 2.00 GiB, .* --shard-windows \(1048576\) or --attention-topk \(32\)",
        ),
        ({"shard_windows": 2**25, "attention_layers": ()}, SettingInvalid, r"tokens: .* --shard-windows .*\d\)$"),
    ],
)
def test_what_the_model_cannot_give_is_refused_before_anything_is_written(make_config: Make, changes, error, words):
    with pytest.raises(error, match=words):
        harvest(make_config(**changes))
    assert not Path(make_config().out).exists()


def test_a_disk_that_is_too_small_is_refused_before_the_first_shard(make_config: Make, monkeypatch):
    monkeypatch.setattr(LocalFiles, "free_bytes", lambda _: 2**20)
    with pytest.raises(StoreFull, match=r"needs .* MB.*Or remove the store first, .*--codec zstd"):
        harvest(make_config())
    with Store.open(make_config().out) as store:
        assert not store.committed.any()
    with pytest.raises(StoreMismatch, match="codec"):  # as long as it is there
        harvest(make_config(codec="zstd"))


def test_a_disk_must_hold_the_shards_of_all_workers(make_config: Make, monkeypatch):
    """All shards take 160 kB, this worker's 80 kB, which the bound of them says as well: nothing is compressed."""
    monkeypatch.setattr(LocalFiles, "free_bytes", lambda _: RESERVE_BYTES + 120_000)
    with pytest.raises(StoreFull, match="the harvest needs"):
        harvest(make_config(worker=Worker(0, 2), attention_layers=()))


def test_a_disk_that_only_the_bound_exceeds_is_measured_and_accepted(make_config: Make, monkeypatch):
    monkeypatch.setattr(LocalFiles, "free_bytes", lambda _: 64 * 2**20 + 650_000)
    measured = []
    monkeypatch.setattr(
        run, "measure_cost", lambda *args, real=run.measure_cost: measured.append(real(*args)) or measured[-1]
    )
    assert harvest(make_config()).committed == 8
    assert len(measured) == 1


def test_an_overflow_stops_the_run_names_the_layer_and_keeps_what_is_committed(make_config: Make, monkeypatch):
    compute, calls = shards.capture, []

    def overflowing(*args):
        captured = compute(*args)
        calls.append(None)
        if len(calls) > 4:  # two batches a shard: from the third shard on
            captured = replace(captured, acts={site: acts / 0 for site, acts in captured.acts.items()})
        return captured

    monkeypatch.setattr(shards, "capture", overflowing)
    with pytest.raises(NonFiniteResidual, match="layer 2: the residual at window 32 of the store"):
        harvest(make_config())
    with Store.open(make_config().out) as store:
        assert store.committed.tolist() == [True, True] + [False] * 6


@pytest.mark.parametrize(
    ("asked", "filled", "told"),
    [
        (
            78_125,
            3_125,
            "; 22.5 % of its documents are for tests, .* instead of 4 %.* start again with --tokens 400000",
        ),
        (78_125, 70_000, ""),
        (781_250, 78_125, ""),  # 4.6 % for tests, where its own count would have 22.5 %
        (4_000, 3_000, ""),
    ],
)
def test_a_corpus_that_ends_early_says_what_its_tests_cost(asked, filled, told):
    said = create_or_resume_store.describe_shortage(asked, filled, 128, per_mille_for_tests(asked * 128))
    assert re.fullmatch(f"the corpus fills {filled:,} windows of the {asked:,} asked for{told}", said)


def test_files_of_a_folder_that_are_no_text_are_told(make_config: Make, text_file, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    shutil.copy(text_file, tmp_path / "texts" / "a.jsonl.gz")
    for number, text in enumerate(text_file.read_text().split("\n\n")):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    config = make_config(corpus=DatasetOptions(str(tmp_path / "texts")))
    run.harvest(config)
    assert "warning: 1 file of" in capsys.readouterr().err
    assert harvest(config).committed == 8


def test_a_short_corpus_is_told(make_config: Make, monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(create_or_resume_store, "describe_shortage", lambda *numbers: f"short: {numbers}")
    run.harvest(make_config(tokens=10**6), Watch(Console(file=said, width=200)))
    with Store.open(make_config().out) as store:
        assert f"short: ({10**6 // 32}, {store.manifest.windows}, 32, 40)" in said.getvalue()


def test_too_little_text_is_refused(make_config: Make, tmp_path):
    (tmp_path / "short.txt").write_text("only one document here")
    with pytest.raises(SplitEmpty, match="train, validation and test"):
        harvest(replace(make_config(), corpus=DatasetOptions(str(tmp_path / "short.txt"))))
    assert not Path(make_config().out).exists()


def test_a_store_at_any_url_is_the_same_store(make_config: Make):
    harvest(make_config())
    remote = make_config(out=f"memory://{uuid.uuid4().hex}")
    harvest(remote)
    assert digest_of(remote.out) == digest_of(make_config().out)


def test_a_disk_that_fills_while_tokenising_is_named_and_what_was_read_is_kept(make_config: Make, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Spool, "append", full)
    with pytest.raises(StoreFull, match="full while tokenising"):
        harvest(make_config())
    monkeypatch.undo()
    assert harvest(make_config()).committed == 8


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_named(make_config: Make, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(create_or_resume_store.fcntl, "flock", refuse)
    with pytest.raises(StoreUnreachable, match=r"while locking \S+spool/lock: expected a disk whose file system has"):
        harvest(make_config())


def test_tokens_of_a_store_behind_a_link_lie_on_its_disk(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "store").symlink_to(tmp_path / "large" / "store")
    assert spool_folder(LocalFiles(tmp_path / "small" / "store")) == tmp_path / "large" / "store.spool"


def test_tokens_of_a_store_that_is_a_disk_lie_on_it(harvested, monkeypatch):
    """Beside it would be another disk, which may be small or not ours; the store is the same with them in it."""
    root = Path(harvested.out)
    before = digest_of(harvested.out)
    monkeypatch.setattr(Path, "is_mount", lambda self: self == root)
    assert spool_folder(LocalFiles(root)) == root / ".spool"
    (root / ".spool").mkdir()
    (root / ".spool" / "train.tokens.u32").touch()
    assert digest_of(harvested.out) == before
    (root / ".spool" / "lock").touch()
    harvest(harvested)
    assert not (root / ".spool").exists()


def test_a_link_to_nothing_is_no_place_for_a_store(make_config: Make, tmp_path):
    (tmp_path / "store").symlink_to(tmp_path / "gone")
    with pytest.raises(AddressInvalid, match="is a link to .*gone, which is missing. Make that folder"):
        harvest(make_config())
    with pytest.raises(AddressInvalid, match="is a link to"):
        harvest(make_config(out=str(tmp_path / "store" / "below")))
    assert not (tmp_path / "gone.spool").exists()


def test_the_root_of_the_disk_is_no_place_for_a_store(make_config: Make):
    with pytest.raises(SettingInvalid, match="--out /: expected a folder .* not the root"):
        harvest(make_config(out="/"))


@pytest.mark.parametrize("to_download", [None, 7])
def test_a_disk_without_space_for_a_folder_is_named(make_config: Make, model_folder, monkeypatch, to_download):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        run, "fetch_description", lambda *_: ModelSource("somebody/model", "c0ffee", model_folder, to_download)
    )
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(StoreFull, match=r"full while making \S+spool\."):
        harvest(make_config())


def test_a_large_corpus_of_the_hub_is_not_read_for_a_disk_that_cannot_hold_it(make_config: Make, monkeypatch):
    monkeypatch.setattr(LocalFiles, "free_bytes", lambda _: 10**9)
    source = DatasetOptions("owner/name")
    corpus = HubCorpus(source, Repository("owner/name", "c0ffee"), lambda: pytest.fail("was read"))
    monkeypatch.setattr(create_or_resume_store, "open_corpus", lambda _: corpus)
    with pytest.raises(StoreFull, match="needs 4[0-9]{2}"):
        harvest(make_config(corpus=source, tokens=10**10))


def test_tokens_of_a_store_elsewhere_are_not_read_for_a_folder_that_cannot_hold_them(
    make_config: Make, tmp_path, monkeypatch
):
    """What an earlier start has left there is a part of it. A dry run says it and goes on."""
    monkeypatch.setattr(create_or_resume_store.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(estimate_cost, "free_bytes_at", lambda _: 10**9)
    monkeypatch.setattr(create_or_resume_store, "open_corpus", lambda _: pytest.fail("was read"))
    config = make_config(out="memory://elsewhere", corpus=DatasetOptions("owner/name"), tokens=10**8)
    with pytest.raises(StoreFull, match=r"needs 1\.60 GB in .*\.spool, whose disk has 1\.00 GB .* Set TMPDIR"):
        harvest(config)
    said = io.StringIO()
    with pytest.raises(pytest.fail.Exception, match="was read"):
        dry_run(config, Watch(Console(file=said, width=500)))
    assert "to tokenise: 1.60 GB in" in said.getvalue()
    folder = spool_folder(open_files(config.out))
    folder.mkdir()
    with (folder / "train.tokens.u32").open("wb") as file:
        file.truncate(6 * 10**8)
    with pytest.raises(pytest.fail.Exception, match="was read"):
        harvest(config)


def test_a_corpus_of_the_hub_is_pinned_from_the_first_checkpoint(make_config: Make, text_file, monkeypatch, capsys):
    """The hub's commit is another at each start; who asks for a branch that was not meant begins anew, and is told."""
    commits = iter(["first", "second", "third"])
    monkeypatch.setattr(hugging_face, "find_repository", lambda _: Repository("owner/name", next(commits)))
    rows = partial(load_dataset, "text", data_files=str(text_file), split="train", streaming=True)
    monkeypatch.setattr(hugging_face, "load_dataset", lambda *_, **__: rows())
    source = DatasetOptions("owner/name")
    for again, revision, is_anew in [(source, "first", False), (replace(source, revision="dev"), "third", True)]:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Spool, "join", interrupt)
            harvest(make_config(corpus=source))
        run.harvest(make_config(corpus=again))
        with Store.open(make_config().out) as store:
            assert store.manifest.corpus.revision == revision
        assert ("tokenising starts over" in capsys.readouterr().err) == is_anew
        shutil.rmtree(make_config().out)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_corpus_of_the_hub_is_pinned_by_the_store(make_config: Make, text_file, monkeypatch):
    source = DatasetOptions("owner/name")
    load = partial(load_dataset, "text", data_files=str(text_file), split="train", streaming=True)
    corpus = HubCorpus(source, Repository("owner/name", "c0ffee"), load)
    monkeypatch.setattr(create_or_resume_store, "open_corpus", lambda _: corpus)
    harvest(make_config(corpus=source))
    monkeypatch.setattr(create_or_resume_store, "open_corpus", lambda _: pytest.fail("asked the hub"))
    for revision in (None, "main", hugging_face.CONVERSION):  # what a branch meant is decided
        assert harvest(make_config(corpus=replace(source, revision=revision))).committed == 8
    with pytest.raises(pytest.fail.Exception, match="asked the hub"):
        harvest(make_config(corpus=replace(source, revision="0123456789" * 4)))
    with pytest.raises(StoreMismatch, match=r"corpus\.settings\.column"):
        harvest(make_config(corpus=replace(source, column="body")))
