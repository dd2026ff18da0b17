"""The templates of CONTRIBUTING.md for evaluations, corpus sources and architectures: copied, registered and run."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM

import saemill
from saemill.cache_schema import Site
from saemill.cache_schema.cli import main as sae_store
from saemill.evaluate import evals
from saemill.evaluate.cli import main as sae_eval
from saemill.harvest import corpus
from saemill.harvest.capture import run
from saemill.harvest.cli import main as sae_harvest
from saemill.harvest.corpus import open_corpus, source_of, sources
from saemill.harvest.corpus.source import DatasetOptions
from saemill.harvest.errors import CorpusUnavailable, DocumentInvalid, UnsupportedArchitecture
from saemill.harvest.model import architectures
from saemill.harvest.model.architectures import ARCHITECTURES
from saemill.harvest.model.load_and_truncate import Wanted, truncate
from saemill.train.data.scaling import unit_stats
from saemill.train.disk.sae_lens_folder import save_sae
from saemill.train.sae.gates import Relu
from saemill.train.sae.model import SparseAutoencoder

ROOT = Path(saemill.__file__).parent
TINY = "tests/harvest/conftest.py"


def imported_store(folder: Path) -> str:
    """Windows of four tokens: two residuals in the first direction, one in the second, and a massive one in that."""
    resid = np.tile(np.array([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1000.0]]], np.float32), (40, 1, 1))
    np.save(folder / "acts.npy", resid)
    np.save(folder / "tokens.npy", np.arange(160).reshape(40, 4) + 5)
    words = [
        "import",
        str(folder / "store"),
        "--resid",
        str(folder / "acts.npy"),
        "--tokens",
        str(folder / "tokens.npy"),
    ]
    done = CliRunner().invoke(sae_store, [*words, "--layer", "0", "--model", "tiny"])
    assert done.exit_code == 0, done.output
    return str(folder / "store")


def test_the_evaluation_of_the_page_runs_from_the_command(copied, tmp_path):
    """A latent for each direction, of which the first is that of two tokens in three that count; and one SAE whose
    latents never fire, which has no number."""
    name = copied(evals, "evaluate/evals/busiest.py")
    assert name in evals.names()
    metadata = {"layers": [0], "target_layers": [0], "hook_name": "blocks.0.hook_resid_post"}
    for folder, bias in (("sae", 0.0), ("dead", -1e6)):
        sae = SparseAutoencoder(torch.eye(2), torch.eye(2), Relu(), b_enc=torch.full((2,), bias))
        save_sae(tmp_path / folder, sae, unit_stats(2), metadata, {}, "standard", unit_stats(2))
    words = [str(tmp_path / "sae"), str(tmp_path / "dead"), "--evals", name, "--set", f"{name}.windows=2"]
    words += ["--cache", imported_store(tmp_path)]
    done = CliRunner().invoke(sae_eval, [*words, "--no-plots", "--runs", str(tmp_path / "runs")])
    assert done.exit_code == 0, done.output
    assert "busiest share" in done.output
    for folder, share in (("sae", 2 / 3), ("dead", -1)):
        (path,) = (tmp_path / folder / "evals" / name).glob("*.json")
        metrics = json.loads(path.read_text())["eval_result_metrics"]
        assert metrics == {"firing": {"busiest_share": pytest.approx(share)}}


OWN = """
from saemill.evaluate import evals
from saemill.harvest.corpus import sources
from saemill.train.kit.variant_registry import config_type
from saemill.train.run.run_folder import provenance
print(config_type("overlap")(width=64, k=4).build(8).sae, evals.load("busiest"), "csv_file" in sources())
print(evals.is_own("busiest"), evals.is_own("core"), provenance({})["SAEMILL_EXTRA"])
"""


def test_files_of_ones_own_lie_outside_the_repository(template, tmp_path):
    for place in ("train/variants/overlap.py", "evaluate/evals/busiest.py", "harvest/corpus/csv_file.py"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text(template(place))
    (tmp_path / "twice/train/variants").mkdir(parents=True)
    (tmp_path / "twice/train/variants/topk.py").touch()
    said_of = {"": "", "gone": "there is no such folder", "twice": "topk: saemill has a file of this name"}
    digests = set()
    for folder, said in ((tmp_path / name, said) for name, said in [*said_of.items(), ("", "")]):
        environment = {**os.environ, "SAEMILL_EXTRA": str(folder)}
        done = subprocess.run([sys.executable, "-c", OWN], env=environment, capture_output=True, text=True)
        assert (done.returncode == 0) == (folder == tmp_path) and said in done.stderr, done.stderr
        if folder == tmp_path:
            *rest, second = done.stdout.splitlines()
            assert "8 -> 64 -> 8, k 4" in "".join(rest) and rest[-1].endswith("True")
            assert second.startswith("True False sha256:")
            digests.add(second)
            with (folder / "train/variants/overlap.py").open("a") as file:
                file.write("# changed")
    assert len(digests) == 2  # results say which files they are of


def test_the_corpus_source_of_the_page_is_a_data_set(copied, tmp_path):
    name = copied(corpus, "harvest/corpus/csv_file.py")
    texts = ["one", 'two, "quoted"', "three\nlines", "four"]
    rows = "".join('"{}"\n'.format(text.replace('"', '""')) for text in texts)
    (tmp_path / "a.csv").write_text("text\n" + rows)
    options = DatasetOptions(str(tmp_path / "a.csv"))
    assert source_of(options) is sources()[name]
    found = open_corpus(options)
    assert list(found.documents()) == texts == list(found.documents())
    head = list(islice(found.documents(), 2))
    assert head + list(open_corpus(options).documents(json.loads(json.dumps(found.state())))) == texts
    assert str(tmp_path) not in json.dumps([found.id, found.revision, found.settings])
    with pytest.raises(CorpusUnavailable, match="no CSV file"):
        open_corpus(DatasetOptions("nothing.csv"))
    with pytest.raises(DocumentInvalid, match="row 1: expected text"):
        list(open_corpus(DatasetOptions(str(tmp_path / "a.csv"), column="body")).documents())
    (tmp_path / "bad.csv").write_bytes(b"text\none\n\xff\n")
    with pytest.raises(DocumentInvalid, match=r"bad\.csv, after row \d: .*invalid start byte"):
        list(open_corpus(DatasetOptions(str(tmp_path / "bad.csv"))).documents())
    assert "a csv file" in corpus.dataset_help()


def test_a_harvest_reads_the_corpus_source_of_the_page(copied, tmp_path):
    copied(corpus, "harvest/corpus/csv_file.py")
    rows = (f'"some words, number {number}, and more of them"\n' for number in range(400))
    (tmp_path / "a.csv").write_text("text\n" + "".join(rows))
    words = ["--model", "pocket", "--dataset", str(tmp_path / "a.csv"), "--tokens", "600", "--context", "16"]
    words += ["--layer", "1", "--attention-layers", "none", "--device", "cpu", "--out", str(tmp_path / "store")]
    done = CliRunner().invoke(sae_harvest, words)
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "store" / "zarr.json").read_text())
    assert '"csv"' in json.dumps(manifest)


def test_the_architecture_of_the_page_is_harvested_to_the_bit(monkeypatch, entry):
    model_type, settings = entry(TINY, runpy.run_path(str(ROOT / TINY)))
    same_type, architecture = entry("harvest/model/architectures.py", dict(vars(architectures)))
    assert same_type == model_type
    monkeypatch.delitem(ARCHITECTURES, model_type, raising=False)  # whoever followed the page has it
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with pytest.raises(UnsupportedArchitecture, match=f"model type '{model_type}' cannot be harvested"):
        truncate(model, Wanted(resid_layers=(1,)))
    monkeypatch.setitem(ARCHITECTURES, model_type, architecture)
    ids = torch.randint(3, config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids, output_hidden_states=True, output_attentions=True)
    seen = {}
    cut = truncate(model, Wanted(resid_layers=(2,), attention_layers=(1, 2)))
    resid = run(cut, ids, {layer: partial(seen.setdefault, layer) for layer in (1, 2)})
    assert torch.equal(resid[Site("resid", 2)], whole.hidden_states[3])
    assert all(torch.equal(seen[layer], whole.attentions[layer]) for layer in (1, 2))
