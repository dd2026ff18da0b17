"""`sae-harvest` as typed: what it prints, its exit codes, several processes, and processes that are killed."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from saemill.cache_schema import CorpusSpec, HookSpec, Manifest, ModelSpec, Store, StoreUnreachable
from saemill.cache_schema.disk_and_cloud_files import LocalFiles
from saemill.cache_schema.sites import by_hook
from saemill.harvest import cli, run, shards
from saemill.harvest import dry_run as dry_run_module
from saemill.harvest.cli import main
from saemill.harvest.config import HarvestConfig, Worker
from saemill.harvest.errors import TokenizerUnsuitable
from saemill.harvest.estimate_cost import RESERVE_BYTES
from saemill.harvest.model import load_and_truncate
from saemill.harvest.model.resolve import Choice
from saemill.harvest.process import Process
from saemill.harvest.store_plan import require_known_tokens
from saemill.train import train_runs
from saemill.train.cli import main as sae_train

from ..free_port import free_port
from .conftest import digest_of

Type = Callable[..., Result]

RUN = "from saemill.harvest.cli import main; main()"
KILLED = """
import os, signal
from saemill.cache_schema import writer
commit, done = writer.write_record, []
def killing(*args):
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(commit(*args))
writer.write_record = killing
"""


@pytest.fixture
def words(model_folder: Path, text_file: Path, tmp_path: Path) -> list[str]:
    """A command that takes a second: the settings of `make_config()`."""
    options = {
        "model": model_folder,
        "layer": 2,
        "attention-layers": "-2..+1",
        "dataset": text_file,
        "tokens": "4k",
        "context": 32,
        "shard-windows": 16,
        "batch-windows": 8,
        "device": "cpu",
        "out": tmp_path / "store",
    }
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.fixture
def type_(words: list[str]) -> Type:
    """Run the command in this process; later words win over earlier ones."""
    return lambda *more: CliRunner().invoke(main, [*words, *more])


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def test_a_harvest_ends_with_a_summary_and_the_next_command(type_: Type):
    result = type_()
    assert result.exit_code == 0, result.output
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f]", result.output) is None  # nobody looks: no bars
    for words in (
        "125 of 32 tokens",
        "train 3,680",
        "bytes per token",
        "kept mass",
        "cache id",
        "sae-train --variant topk --cache",
    ):
        assert words in result.output
    again = type_()
    assert again.exit_code == 0
    assert "resuming the store" in again.output


def test_a_small_model_in_place_of_the_real_one_is_told_first_and_last_and_in_the_stores_page(type_: Type, monkeypatch):
    banner = ("model: pocket, because the hub is away", "to insist: --model google/gemma-2-2b never falls back")
    monkeypatch.setattr(run, "choose", lambda _: Choice("pocket", banner=banner))
    result = type_("--model=auto", "--layer=19")
    assert tuple(result.stderr.splitlines()[:2]) == tuple(result.stdout.splitlines()[-2:]) == banner
    assert "(the small bundled model, not Gemma-2-2B)" in result.stdout.replace("\n", " ")


def test_make_passes_every_option_on():
    path = {"PATH": os.environ["PATH"]}  # of the environment nothing else, where variables of make may be set too

    def said(*variables: str) -> list[str]:
        make = ["make", "-n", "--no-print-directory", "-C", str(Path(__file__).parents[2]), "harvest"]
        out = subprocess.run([*make, *variables], capture_output=True, text=True, check=True, env=path).stdout
        return out[out.index("sae-harvest") :].replace("\\\n", " ").split()

    assert said() == ["sae-harvest", "--model", "auto", "--out", "./store"]
    options = {"model": "m", "layer": "3", "dataset": "d", "tokens": "1M", "context": "64", "codec": "zstd"}
    options |= {"dtype": "float32", "device": "cpu", "hooks": "resid,z"}
    words = said(*(f"{name.upper()}={value}" for name, value in options.items()), "STORE=s", "BATCH=8", "DRY_RUN=1")
    asked = [f"--{name} {value}" for name, value in (options | {"out": "s", "batch-windows": "8"}).items()]
    assert sorted(" ".join(words[1:]).replace(" --", "\n--").split("\n")) == sorted([*asked, "--dry-run"])


@pytest.mark.parametrize("load", [0.0, 999.0])
def test_a_dry_run_writes_nothing_and_says_what_it_would_cost(type_: Type, tmp_path, monkeypatch, load):
    """Also whether its time is that of a busy machine."""
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    result = type_("--dry-run")
    assert ("machine was busy in the last minute" in " ".join(result.output.split())) == (load > 0)
    assert result.exit_code == 0, result.output
    for words in ("4,000", "8 of 16 windows", "resid/layer_2", "kB", "tokens/s"):
        assert words in result.output
    assert re.search(r"\d seconds? for one process", result.output)
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("share_only")
def test_json_is_one_document_of_what_a_harvest_would_cost_and_of_what_it_made(type_: Type):
    estimate = json.loads(type_("--dry-run", "--json").stdout)
    assert estimate["tokens"] == estimate["tokens_to_go"] == 4000 and estimate["seconds"] > 0
    assert estimate["bytes_per_token"]["tokens"] > 0 and estimate["bytes_to_download"] is None
    assert estimate["bytes_needed"] - estimate["bytes"] == RESERVE_BYTES
    part = json.loads(type_("--worker=1/2", "--json").stdout)
    assert (part["shards_committed"], part["shards"]) == (4, 8)
    made = json.loads(type_("--json").stdout)
    assert made["shards_committed"] == made["shards"] == 8 and made["layers"] == [2] and made["remarks"] == []


@pytest.mark.parametrize(
    ("hooks", "command"),
    [
        ({"resid": (5,)}, "--variant topk"),
        ({"resid": (17, 19, 20), "mlp_in": (5,), "mlp_out": (5,)}, "--variant topk --layer 19"),
        ({"resid": (4, 5)}, "--variant topk --layer 5"),
        ({"resid": (5, 6, 7)}, "--variant topk --layer 6"),
        ({"mlp_in": (5,), "mlp_out": (5, 6)}, "--variant transcoder --set hook=mlp_in"),
        ({"mlp_in": (4, 5, 19), "mlp_out": (4, 5)}, "--variant transcoder --set hook=mlp_in --layer 5"),
        ({"mlp_in": (4,), "mlp_out": (5,)}, "--variant topk --set hook=mlp_in"),
        ({"z": (4, 6)}, "--variant topk --set hook=z --layer 6"),
    ],
)
def test_the_command_that_is_said_at_the_end_can_train_on_the_store(hooks, command):
    layers = hooks.get("resid", ())
    others = {hook: HookSpec(own, 16) for hook, own in hooks.items() if hook != "resid"}
    splits = {"train": (0, 9), "validation": (9, 9), "test": (9, 9)}
    manifest = Manifest(ModelSpec("m", 16), CorpusSpec("c"), 8, layers, 9, splits, hooks=others)
    said = cli.training_command(manifest, HarvestConfig(out="./a store"))
    assert said == f"sae-train {command} --cache './a store'"
    words = sae_train.make_context("sae-train", shlex.split(said)[1:]).params
    settings = train_runs._settings(words)
    ((member,),) = [
        request.members(lambda config: config.limits(manifest, 10**6), by_hook(manifest.sites))
        for request in train_runs.find_requests(words["variant"], None, None, settings, [{}])
    ]
    needs = member.config.needs()
    held = by_hook(manifest.sites)
    assert set(needs.inputs) <= set(held[needs.hook])
    assert set(needs.targets or ()) <= set(held[needs.to_hook or needs.hook])


@pytest.mark.usefixtures("share_only")
def test_each_worker_of_its_own_terminal_speaks_and_the_last_one_sums_up(type_: Type):
    first, second = type_("--worker=1/2"), type_("--worker=2/2")
    assert "4 of 8 shards are committed; others belong to other workers" in first.output
    assert "next: sae-train" not in first.output
    assert "resuming the store" in second.output
    assert "kept mass" in second.output and "next: sae-train" in second.output
    assert "0 shards, which size and time are for" in type_("--dry-run").output


def test_the_estimate_is_near_the_truth(type_: Type, tmp_path):
    estimate = type_("--dry-run").output
    type_()
    with Store.open(tmp_path / "store") as store:
        actual = np.mean([store.record(s).arrays["resid/layer_2"].bytes / 16 / 32 for s in range(7)])
    line = next(line for line in estimate.splitlines() if "resid/layer_2" in line)
    assert float(line.split("│")[2]) == pytest.approx(actual, rel=0.05)


def test_of_one_launch_the_first_process_alone_says_what_it_would_cost(type_: Type, monkeypatch):
    """Else `--json` would be one document for each."""
    for speaks in (False, True):
        process = Process(torch.device("cpu"), Worker(1, 2), speaks=speaks)
        monkeypatch.setattr(dry_run_module, "open_process", lambda *_, one=process: nullcontext(one))
        for more in ([], ["--json"]):
            result = type_("--dry-run", *more)
            assert (result.exit_code, result.output != "") == (0, speaks)


def test_a_dry_run_refuses_what_the_disk_cannot_hold(type_: Type, monkeypatch):
    monkeypatch.setattr(LocalFiles, "free_bytes", lambda _: 1000)
    result = type_("--dry-run")
    assert result.exit_code == 1
    assert "kB" in result.output  # the tables come first
    assert result.output.splitlines()[-1].startswith("error: the harvest needs")
    assert "--codec zstd" in result.output.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--layer=9"], "error: residual of layer 9"),
        (["--tokens=many"], "error: --tokens: expected a whole number such as 200k, 10M or 1.5B, found 'many'"),
        (["--leave-out=bos,me"], "error: --leave-out bos,me: expected bos, self,"),
        (["--worker=3/2"], "error: --worker 3/2"),
        (["--device=abacus"], "error: --device abacus"),
        (["--device=meta"], "error: --device meta: expected auto, cpu, cuda or cuda:1"),
        (["--device=cuda:99"], f"error: --device cuda:99: torch {torch.__version__} finds "),
        (["--dataset-split=test"], "error: --dataset-split test has no effect with --dataset"),
        (["--dataset=./nothing.txt"], "error: there is no file"),
        (["--dataset=my data"], "error: data set my data cannot be reached"),
        (["--model=./nothing"], "error: ./nothing"),
        (["--out=foo://store"], "error: foo://store cannot be opened"),
    ],
)
def test_bad_settings_get_one_line_and_write_nothing(type_: Type, tmp_path, more, line):
    result = type_(*more)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith(line)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("more", ["--dataset-config=en", "--dataset-split=test", "--dataset-revision=1", "--column=x"])
def test_what_goes_with_a_dataset_is_refused_without_one(tmp_path, more):
    result = CliRunner().invoke(main, [more, "--model=./nothing", f"--out={tmp_path}/store"])
    assert result.exit_code == 1
    assert result.output.startswith(f"error: {more.replace('=', ' ')} needs --dataset")


@pytest.mark.parametrize("below", ["", "/store", "/runs/store"])
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_an_out_that_is_a_file_is_refused_before_tokenising(type_: Type, tmp_path, below, more):
    (tmp_path / "afile").write_text("mine")
    result = type_(f"--out={tmp_path}/afile{below}", "--dataset=./never-looked-for.txt", *more)
    assert result.exit_code == 1
    assert result.output.startswith(f"error: --out {tmp_path}/afile{below}: expected a folder")
    assert [path.name for path in tmp_path.iterdir()] == ["afile"]


def test_an_out_that_cannot_be_written_is_refused_before_tokenising(type_: Type, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    result = type_("--dataset=./never-looked-for.txt")
    assert result.exit_code == 1
    assert result.output.startswith(f"error: --out {tmp_path}/store: {tmp_path} is not writable")
    assert not list(tmp_path.iterdir())


def test_the_scratch_folder_beside_the_store_must_be_writable_too(type_: Type, tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    assert f"{tmp_path} is not writable." in type_("--dataset=./never-looked-for.txt").output


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no document"),
        (b"good\n\nbad \xff", "byte 0xff at 4"),
        (b"one document", "fill no window of 32 tokens"),
    ],
)
def test_bad_text_gets_one_line(type_: Type, tmp_path, content, said):
    (tmp_path / "text.txt").write_bytes(content)
    result = type_(f"--dataset={tmp_path / 'text.txt'}")
    assert result.exit_code == 1
    line = result.output.splitlines()[-1]
    assert line.startswith("error: ") and said in line


def test_a_dry_run_counts_the_documents_that_there_are(type_: Type, tmp_path):
    (tmp_path / "text.txt").write_text("one\n\ntwo")
    result = type_(f"--dataset={tmp_path / 'text.txt'}", "--dry-run")
    assert result.exit_code == 1 and "the first 2 documents of" in result.output


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_what_the_disk_refuses_gets_one_line(type_: Type, text_file, monkeypatch, code):
    def refuse(path: Path, *_: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr("saemill.harvest.corpus.local._blocks_of_text", refuse)  # root may read everything
    result = type_()
    assert result.exit_code == 1 and f"{os.strerror(code).lower()}: {text_file}" in result.output


def test_a_tokenizer_without_bos_takes_the_configurations_or_is_refused(type_: Type, model_folder, tmp_path):
    """As those of Qwen. Of what the configuration names only a special token is taken."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    settings, config = folder / "tokenizer_config.json", folder / "config.json"
    settings.write_text(settings.read_text().replace('"bos_token": "<bos>",', ""))
    for other in ("null", "9"):
        config.write_text(
            (model_folder / "config.json").read_text().replace('"bos_token_id": 2', f'"bos_token_id": {other}')
        )
        result = type_(f"--model={folder}")
        assert result.exit_code == 1
        assert "error: " in result.output and "no BOS token" in result.output
    shutil.copy(model_folder / "config.json", config)
    result = type_(f"--model={folder}")
    assert result.exit_code == 0 and "BOS: <bos>, from the model's configuration" in result.output
    with Store.open(tmp_path / "store") as store:
        spec = store.manifest.model
        assert spec.bos_token == 2 and spec.special_tokens == (0, 1, 2)


def test_a_token_that_the_model_does_not_know_is_refused(type_: Type, model_folder, tmp_path):
    """Added to the tokenizer alone, it has no row in the embedding: as BOS it would begin every window."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"bos_token": "<bos>"', '"bos_token": "<new>"'))
    result = type_(f"--model={folder}")
    assert result.exit_code == 1
    assert "error: the BOS token of the tokenizer is" in result.output
    assert not (tmp_path / "store").exists()
    with pytest.raises(TokenizerUnsuitable, match="the largest token of the text is 9, but the model knows 9"):
        require_known_tokens(np.array([[1, 9]], np.uint32), SimpleNamespace(vocab_size=9))


def test_ctrl_c_where_the_store_is_out_of_reach(monkeypatch):
    def unreachable(url):
        raise StoreUnreachable(5, "the network is away")

    monkeypatch.setattr(cli.Store, "open", unreachable)
    assert cli._what_is_kept("s3://somewhere") == "Committed shards are safe"


@pytest.mark.usefixtures("sigterm_is_harmless")
def test_a_stop_says_what_is_safe(type_: Type, monkeypatch):
    """SIGTERM, as Ctrl-C."""
    compute, calls = shards.compute_shard, []

    def interrupted(*args):
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        calls.append(None)
        return compute(*args)

    monkeypatch.setattr(shards, "compute_shard", interrupted)
    result = type_()
    assert result.exit_code == 130
    assert "3 of 8 shards are committed; the same command resumes" in result.output
    monkeypatch.undo()
    assert type_().exit_code == 0


def test_a_device_without_memory_says_what_was_asked_and_what_to_turn(type_: Type, monkeypatch):
    def allocate(*_: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB of which "
            "1.06 GiB is free. Including non-PyTorch memory, this process has 78.12 GiB memory in use."
        )

    for module, name, asked in (
        (shards, "capture", "batches of 8 windows"),
        (load_and_truncate, "_truncated", "the model"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, allocate)
            result = type_()
        assert result.exit_code == 1 and f"error: cpu has no memory left for {asked} (CUDA" in result.output
        assert "Tried to allocate 2.00 GiB" in result.output and "1.06 GiB is free" in result.output
    assert type_().exit_code == 0


def test_a_killed_harvest_goes_on_to_the_same_store(words, type_: Type, straight, tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED + RUN, *words], env=environment(), capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    with Store.open(tmp_path / "store") as store:
        assert int(store.committed.sum()) == 2
    assert type_().exit_code == 0
    assert digest_of(tmp_path / "store") == digest_of(straight)


def test_two_launched_processes_give_the_same_store(words, straight, tmp_path):
    """As launchers start them."""
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", RUN, *words]
    started = [
        subprocess.Popen(
            command, env=environment() | launch | {"RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE
        )
        for rank in "01"
    ]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert b"next: sae-train" in b"".join(said)  # by whichever ended the work
    assert digest_of(tmp_path / "store") == digest_of(straight)


@pytest.mark.slow
def test_accelerate_launches_two_processes_that_give_the_same_store(words, straight, tmp_path):
    script = tmp_path / "harvest.py"
    script.write_text(RUN)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    ended = subprocess.run(
        [*launch, "--mixed_precision=no", "--dynamo_backend=no", str(script), *words],
        env=environment(),
        capture_output=True,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    assert digest_of(tmp_path / "store") == digest_of(straight)
