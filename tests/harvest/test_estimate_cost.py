"""What is said of a new store before anything is downloaded or read, and what is refused by then."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from saemill.cache_schema import Store, StoreFull
from saemill.cache_schema.disk_and_cloud_files import LocalFiles
from saemill.cache_schema.numbers_in_words import say_size
from saemill.harvest import cli, estimate_cost, run
from saemill.harvest import dry_run as dry_run_module
from saemill.harvest.config import HarvestConfig
from saemill.harvest.corpus import hugging_face
from saemill.harvest.corpus.source import DatasetOptions
from saemill.harvest.dry_run import dry_run, render
from saemill.harvest.errors import ContextTooLong, CorpusUnavailable, DeviceFull, SettingInvalid
from saemill.harvest.estimate_cost import Cost, bytes_by_array, forecast_manifest, tokens_per_second
from saemill.harvest.model.load_and_truncate import load_model
from saemill.harvest.model.resolve import Choice, ModelSource
from saemill.harvest.progress import Watch
from saemill.harvest.run import harvest
from saemill.harvest.store_plan import Plan, make_plan

from .conftest import make_text

Make = Callable[..., HarvestConfig]


@pytest.fixture
def described(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSource:
    """A model of which only the description is here; to fetch it fails the test. Any text is on the hub."""
    folder = tmp_path / "described"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    source = ModelSource("owner/name", "c0ffee", folder, to_download=10_460_000_000)
    monkeypatch.setattr(run, "fetch_description", lambda *_: source)
    monkeypatch.setattr(run, "fetch", lambda _: pytest.fail("was downloaded"))
    monkeypatch.setattr(hugging_face, "find_repository", lambda text: hugging_face.Repository(text.dataset, "c0ffee"))
    return source


def watched() -> tuple[Watch, io.StringIO]:
    said = io.StringIO()
    return Watch(Console(file=said, width=300)), said


def plan_of(config: HarvestConfig, source: ModelSource) -> Plan:
    return make_plan(config, source)


@pytest.mark.parametrize("changes", [{"tokens": 20 * 10**9 * 8, "shard_windows": 8}, {"tokens": 10**15}])
def test_more_shards_than_a_store_has_are_refused_before_anything_is_done(make_config: Make, described, changes):
    with pytest.raises(
        SettingInvalid, match=r"--tokens \d+: .* at most 100,000,000. Lower it, or raise --shard-windows"
    ):
        plan_of(make_config(**changes), described)


def test_a_context_that_attention_cannot_be_kept_of_is_refused_before_anything_is_done(make_config: Make, described):
    file = described.folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 2**20}))
    with pytest.raises(ContextTooLong, match="at most 32768 can be stored.*--attention-layers none"):
        plan_of(make_config(context=32769, tokens=10**6), described)
    plan_of(make_config(context=32769, tokens=10**6, attention_layers=()), described)


def test_a_dry_run_needs_no_weights_and_of_the_text_only_that_it_is_there(make_config: Make, described):
    config = make_config(model="owner/name", corpus=DatasetOptions("owner/text"), tokens=10_000_000, context=64)
    estimate = dry_run(config, Watch(is_quiet=True))
    page = io.StringIO()
    Console(file=page, width=120).print(render(estimate))
    for words in ("resid/layer_2", "attention/layer_3", "10.46 GB of weights", "GB at most", "tokens/s", "2,249,984"):
        assert words in page.getvalue()
    assert estimate.bytes_per_token["resid/layer_2"] == pytest.approx(2 * 16, rel=1e-3)
    assert estimate.seconds > 0
    assert not Path(config.out).exists()


@pytest.mark.parametrize("do", [harvest, dry_run])
def test_a_text_that_is_not_there_is_refused_before_the_weights_are_downloaded(make_config: Make, described, do):
    with pytest.raises(CorpusUnavailable, match=r"no file or folder '\./nowhere'"):
        do(make_config(model="owner/name", corpus=DatasetOptions("./nowhere")), Watch(is_quiet=True))


def test_a_batch_of_windows_is_measured_however_short_the_documents_are(make_config: Make, tmp_path, monkeypatch):
    """The first few alone, again and again, would be compressed to next to nothing."""
    (tmp_path / "short.txt").write_text("\n\n".join(make_text(seed, 2) for seed in range(200)))
    samples = []
    monkeypatch.setattr(dry_run_module, "measure_cost", lambda _, sample: samples.append(sample) or Cost({}, 1.0))
    dry_run(make_config(corpus=DatasetOptions(str(tmp_path / "short.txt"))), Watch(is_quiet=True))
    assert samples[0].shape == (8, 32) and len(np.unique(samples[0], axis=0)) == 8


def test_a_real_harvest_says_first_what_it_will_take(make_config: Make, described, model_folder, monkeypatch):
    monkeypatch.setattr(estimate_cost, "LONG_WORK", 0)
    fetched = []

    def fetch(choice: Choice) -> ModelSource:
        fetched.append((choice, said.getvalue()))
        return ModelSource(choice.name, "c0ffee", model_folder)

    monkeypatch.setattr(run, "fetch", fetch)
    watch, said = watched()
    harvest(make_config(model="owner/name"), watch)
    ((choice, before),) = fetched
    assert choice == Choice("owner/name", "c0ffee")
    memory = "memory: about 253.98 kB for two shards; less with --shard-windows"
    for words in (
        "to harvest: 4,000 tokens (train 3,680",
        "1.05 MB at most (",
        "to download: 10.46 GB",
        "time: about",
        memory,
    ):
        assert words in before
    watch, again = watched()
    monkeypatch.setattr(run, "fetch_description", lambda *_: ModelSource("owner/name", "c0ffee", model_folder))
    harvest(make_config(model="owner/name"), watch)
    assert "to write" not in again.getvalue()  # it is written


def test_memory_beside_a_gpu_is_that_of_page_locked_blocks(make_config: Make, described):
    """Of 26 layers of Gemma-2-2B 63 GB were told, and 112 were locked."""
    manifest = replace(forecast_manifest(plan := plan_of(make_config(), described)), shard_windows=11)
    acts = [11 * manifest.context * manifest.width_of(site.hook) * 2 for site in manifest.sites]
    exact, locked = (estimate_cost.memory_of_shards(manifest, is_pinned) for is_pinned in (False, True))
    assert locked - exact == 2 * sum(2 ** math.ceil(math.log2(size)) - size for size in acts) > 0
    said = estimate_cost.cost_lines(plan, manifest, None, torch.device("cuda"))
    assert any(f"about {say_size(locked)} for two shards" in line for line in said)


def test_a_disk_that_cannot_hold_the_store_is_told_before_the_download(make_config: Make, described, monkeypatch):
    monkeypatch.setattr(LocalFiles, "free_bytes", lambda _: 10**6)
    with pytest.raises(StoreFull, match="the harvest needs"):
        harvest(make_config(model="owner/name", corpus=DatasetOptions("owner/text"), tokens=10_000_000))


@pytest.mark.parametrize("is_one_disk", [True, False])
def test_weights_that_come_onto_the_same_disk_are_counted(make_config: Make, described, monkeypatch, is_one_disk):
    """Each alone would fit, and the disk be full after the download and hours of harvest."""
    monkeypatch.setattr(LocalFiles, "free_bytes", lambda _: 10_500_000_000)
    monkeypatch.setattr(estimate_cost, "on_one_disk", lambda *_: is_one_disk)
    config = make_config(model="owner/name", corpus=DatasetOptions("owner/text"), tokens=10_000_000)
    refused = pytest.raises(StoreFull, match=r"needs 400\.00 MB and 10\.46 GB for the model's weights \(HF_HOME")
    downloads = pytest.raises(pytest.fail.Exception, match="was downloaded")
    with refused if is_one_disk else downloads:
        harvest(config, Watch(is_quiet=True))
    with refused if is_one_disk else nullcontext():
        cli._estimate(config, is_json=True)


@pytest.mark.parametrize("shard_windows", [16, 100, 256])
def test_sizes_told_are_those_written(make_config: Make, model_folder, shard_windows):
    """To the byte where nothing is compressed, else at most: chunks of a shard with few windows are written whole."""
    config = make_config(shard_windows=shard_windows, batch_windows=4)
    plan = plan_of(config, ModelSource("tiny", "c0ffee", model_folder))
    told, estimate = bytes_by_array(forecast_manifest(plan)), dry_run(config, Watch(is_quiet=True))
    harvest(config)
    written = Counter()
    with Store.open(config.out) as store:
        for shard in range(store.manifest.shards):
            for path, array in store.record(shard).arrays.items():
                written[path] += array.bytes
        assert store.manifest.splits == forecast_manifest(plan).splits
    for path in ("resid/layer_2", "stats/layer_2", "tokens", "documents"):
        assert told[path] == estimate.sizes[path] == written[path]
    for layer in config.attention_layers:
        most = sum(size for path, size in written.items() if path.startswith(f"attention/layer_{layer}/"))
        assert told[f"attention/layer_{layer}"] >= most


def test_the_rate_counts_layers_and_kept_attention(make_config: Make, model_folder, monkeypatch):
    config = make_config(attention_layers=(1, 2, 3))
    plan = plan_of(config, ModelSource("tiny", "c0ffee", model_folder))
    monkeypatch.setattr(
        estimate_cost, "_seconds_per_token", lambda *_, keep_attention: {1: 3.0, 2: 5.0}[_[-1]] + 4.0 * keep_attention
    )
    rate = tokens_per_second(plan, forecast_manifest(plan), torch.device("cpu"))
    assert rate == pytest.approx(1 / (3 + 3 * 2 + 3 * 4))


def test_a_device_without_memory_for_the_layers_that_are_timed_is_named(make_config: Make, described, monkeypatch):
    def allocate(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.")

    monkeypatch.setattr(estimate_cost, "make_random", allocate)
    with pytest.raises(DeviceFull, match="cpu has no memory left for layers to be timed .*Tried to allocate"):
        dry_run(make_config(model="owner/name"), Watch(is_quiet=True))


def test_the_layers_that_are_timed_have_the_models_shape(model_folder):
    from saemill.harvest.model.load_and_truncate import Wanted, make_random

    real = load_model(model_folder, Wanted((1,)), torch.float32).stack.layers[1].state_dict()
    made = make_random(model_folder, 2, 256, torch.float32, "cpu").base_model.layers[1].state_dict()
    assert [(name, made[name].shape) for name in made] == [(name, real[name].shape) for name in real]
