"""A tiny Gemma-2 with a store of its residuals, SAEs for it, and the golden inputs as a store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from saemill.cache_schema import (
    AttentionSpec,
    CorpusSpec,
    Manifest,
    ModelSpec,
    Site,
    Store,
    from_float32,
)
from saemill.evaluate.context import context as context_module
from saemill.evaluate.context import evaluation_data_sets
from saemill.evaluate.context.context import Context
from saemill.evaluate.context.loaded_sae import LoadedSae
from saemill.evaluate.model.batches import store_batches
from saemill.evaluate.model.prefix_suffix import LanguageModel, make_language_model
from saemill.evaluate.run.find_saes_to_evaluate import make_subject
from saemill.harvest.capture import capture
from saemill.harvest.errors import ModelUnavailable
from saemill.harvest.model.load_and_truncate import Wanted, load_model
from saemill.harvest.progress import Watch
from saemill.harvest.sparsify_attention import to_csr
from saemill.train.data.scaling import unit_stats
from saemill.train.disk.atomic_files import write_json
from saemill.train.disk.sae_lens_folder import save_sae
from saemill.train.sae.gates import Relu, TopK
from saemill.train.sae.model import SparseAutoencoder

from ..write_shards import write_shards

GOLDEN = Path(__file__).parent.parent / "golden" / "saebench"
LAYER, CONTEXT, VOCAB, D, F = 2, 12, 50, 16, 24
SPECIAL = (0, 1, 2)
BOS = 2
WINDOWS, SPLITS = 40, (16, 20)


@pytest.fixture(scope="module")
def chromium():
    """A real browser, in which pages are tested."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on the path: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def contrasts() -> str:
    """A script that lists texts on a page with too little contrast."""
    return (Path(__file__).parent / "contrasts.js").read_text()


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never ask the network for a model or for a data set's commit, nor depend on this machine's downloads."""

    def refuse(choice: Any) -> Any:
        if choice.name != "pocket" and not Path(choice.name).is_dir():
            raise ModelUnavailable(f"{choice.name}: no network in tests")
        return fetch(choice)

    fetch = context_module.fetch
    monkeypatch.setattr(context_module, "fetch", refuse)
    monkeypatch.setattr(evaluation_data_sets, "ask_hub", lambda _: ConnectionError("no network in tests"))
    monkeypatch.setattr(evaluation_data_sets, "downloaded_commit", lambda _: None)
    evaluation_data_sets.commit_of.cache_clear()
    evaluation_data_sets._AWAY.clear()


@dataclass(frozen=True)
class World:
    """A model folder and a store of it."""

    model: Path
    store: str
    tokens: Tensor
    resid: Tensor  # of LAYER, float32


def make_model_folder(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(3)
    config = Gemma2Config(
        **{
            "vocab_size": VOCAB,
            "hidden_size": D,
            "intermediate_size": 24,
            "num_hidden_layers": 5,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "max_position_embeddings": 64,
            "sliding_window": 5,
            "final_logit_softcapping": 6.0,
            "initializer_range": 0.4,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": BOS,
            **changes,
        }
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


def harvest_rows(
    path: Path,
    model_folder: Path,
    tokens: Tensor,
    splits: tuple[int, int],
    dtype: str = "bfloat16",
    layers: tuple[int, ...] = (LAYER,),
    documents: np.ndarray | None = None,
    model_id: str | None = None,
    attention_layers: tuple[int, ...] | None = None,
    massive: Sequence[tuple[int, int]] = (),
    longer: float = 100.0,
    stored_as: str | None = None,
    has_tokens: bool = True,
) -> str:
    """Write a store of these rows, whose model is named by its folder's path and has no revision. `massive`: (window,
    position) of rows that become `longer` times as long. Without tokens, the store says so, as imported ones do."""
    windows, context = tokens.shape
    attention_layers = (layers[-1], layers[-1] + 1) if attention_layers is None else attention_layers
    spec = AttentionSpec(layers=attention_layers, topk=4, mass=1.0)
    model = load_model(model_folder, Wanted(layers, spec.layers), getattr(torch, dtype))
    captured = capture(model, tokens, spec)
    rows = tokens.numpy().astype(np.uint32)
    if documents is None:
        documents = np.repeat(np.arange(windows) // 2, context).reshape(windows, context)
    manifest = Manifest(
        model=ModelSpec(
            model_id or str(model_folder),
            captured.acts[Site("resid", layers[0])].shape[-1],
            dtype,
            special_tokens=SPECIAL,
            bos_token=BOS,
        ),
        corpus=CorpusSpec("golden", settings={} if has_tokens else {"tokens": False}),
        context=context,
        layers=layers,
        windows=windows,
        splits={"train": (0, splits[0]), "validation": splits, "test": (splits[1], windows)},
        attention=spec,
        shard_windows=7,
        stored_as=stored_as,
    )
    plain = {layer: captured.acts[Site("resid", layer)].float().numpy() for layer in layers}
    for values in plain.values():
        for place in massive:
            values[place] *= longer
    resid = {Site("resid", layer): from_float32(values, dtype) for layer, values in plain.items()}
    attention = {layer: to_csr(layer, kept) for layer, kept in captured.attention.items()}
    return write_shards(path, manifest, rows, documents.astype(np.uint32), resid, attention)


def make_tokens(windows: int = WINDOWS, seed: int = 0) -> Tensor:
    tokens = torch.randint(3, VOCAB, (windows, CONTEXT), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = BOS
    tokens[::3, 5] = 1
    return tokens


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A store in bfloat16 with 20 windows in the test split."""
    root = tmp_path_factory.mktemp("world")
    folder, tokens = make_model_folder(root / "model"), make_tokens()
    url = harvest_rows(root / "store", folder, tokens, SPLITS)
    with Store.open(url) as store:
        parts = [b.resid[LAYER] for s in store.manifest.splits for b in store_batches(store, s, (LAYER,))]
    return World(folder, url, tokens, torch.cat(parts).float())


@pytest.fixture(scope="session")
def make_world(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., World]:
    """Further stores: make_world(dtype=..., tokens=..., splits=..., layers=..., attention_layers=..., model=folder).
    Tests that ask for the same share one; a test that damages it, or counts files next to it, passes fresh=True."""
    shared: dict[str, World] = {}

    def make(
        model: Path = world.model, tokens: Tensor | None = None, splits: Any = SPLITS, fresh: bool = False, **how: Any
    ) -> World:
        key = json.dumps([str(model), splits, how], sort_keys=True, default=np.ndarray.tolist)
        is_shared = tokens is None and not fresh
        if is_shared and key in shared:
            return shared[key]
        rows = make_tokens() if tokens is None else tokens
        store = harvest_rows(tmp_path_factory.mktemp("world") / "store", model, rows, splits, **how)
        made = World(model, store, rows, torch.empty(0))
        if is_shared:
            shared[key] = made
        return made

    return make


@pytest.fixture
def open_context() -> Callable[..., Context]:
    """A quiet context on a store: open_context(world, dtype_name=..., from_tokens=...)."""
    opened: list[Store] = []

    def make(world: World | str, **settings: Any) -> Context:
        store = Store.open(world if isinstance(world, str) else world.store)
        opened.append(store)
        return Context(store, watch=Watch(is_quiet=True), **settings)

    yield make
    for store in opened:
        store.close()


@pytest.fixture(scope="session")
def language_model() -> Callable[..., LanguageModel]:
    def load(folder: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
        return make_language_model(Gemma2ForCausalLM.from_pretrained(folder, dtype=dtype), folder)

    return load


def make_sae(width: int = F, d_in: int = D, k: int | None = 4, seed: int = 0, **parts: Tensor) -> SparseAutoencoder:
    """An SAE of random directions: top-k, or ReLU if k is None."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(width, d_in, generator=generator), dim=1)
    gate = Relu() if k is None else TopK(k)
    return SparseAutoencoder(parts.pop("W_enc", 0.5 * W_dec.clone()), parts.pop("W_dec", W_dec), gate, **parts)


def save(
    folder: Path,
    sae: SparseAutoencoder,
    layers: tuple[int, ...] = (LAYER,),
    config: Mapping[str, Any] | None = None,
    **metadata: Any,
) -> Path:
    whole = {
        "model_name": "tiny",
        "hook_name": f"blocks.{layers[-1]}.hook_resid_post",
        "context_size": CONTEXT,
        "layers": list(layers),
        "target_layers": list(layers),
        **metadata,
    }
    save_sae(folder, sae, unit_stats(sae.d_in), whole, config or {}, "topk", unit_stats(sae.d_out))
    return folder


class Builder:
    """Makes SAEs, subjects and finished runs."""

    LAYER, D, F, CONTEXT, VOCAB = LAYER, D, F, CONTEXT, VOCAB
    make_sae = staticmethod(make_sae)
    save = staticmethod(save)

    def __init__(self, root: Path) -> None:
        self.root = root

    def subject(self, sae: SparseAutoencoder, name: str = "sae", **settings: Any) -> LoadedSae:
        return make_subject(save(self.root / name, sae, **settings), None)

    def run(self, world: World, name: str, saes: dict[str, SparseAutoencoder], finished: bool = True) -> Path:
        """A run's folder, as training leaves it."""
        with Store.open(world.store) as store:
            cache_id = store.manifest.cache_id
        run = self.root / "runs" / name
        for label, sae in saes.items():
            save(run / label, sae, cache_id=cache_id)
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "config.json", {"cache": {"url": world.store, "cache_id": cache_id}, "saes": {}})
        if finished:
            write_json(run / "result.json", {"run": name})
        return run


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    return Builder(tmp_path)


@pytest.fixture(scope="session")
def new_builder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Builder]:
    """Builders of objects that tests share."""
    return lambda: Builder(tmp_path_factory.mktemp("saes"))


@dataclass(frozen=True)
class Golden:
    """The official package's inputs as a store, and its outputs."""

    store: str
    folder: Path
    tokens: Tensor
    resid: Tensor

    def subject(self, name: str, root: Path) -> LoadedSae:
        """A copy, because results are written next to an SAE."""
        return make_subject(Path(shutil.copytree(self.folder / "saes" / name, root / name)), None)

    def output(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / f"core_{name}.json").read_text())


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    inputs = load_file(GOLDEN / "inputs.safetensors")
    tokens = inputs["tokens"]
    rows = torch.cat([tokens[:2], tokens])  # one window each for training and validation
    url = harvest_rows(
        tmp_path_factory.mktemp("golden") / "store", GOLDEN / "model", rows, (1, 2), dtype="float32", layers=(1,)
    )
    return Golden(url, GOLDEN, tokens, inputs["resid"])
