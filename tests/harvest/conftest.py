"""Tiny random models: one of every supported family, and one in a folder with a tokenizer and text."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from saemill.cache_schema import Store
from saemill.cache_schema.verify_and_repair import digest, verify_shards
from saemill.harvest import run
from saemill.harvest.config import HarvestConfig, Worker
from saemill.harvest.corpus.source import DatasetOptions
from saemill.harvest.model.architectures import architecture_of
from saemill.harvest.model.products_in_16_bits import is_widened
from saemill.harvest.process import Process
from saemill.harvest.progress import Watch

LAYERS, CONTEXT, VOCAB, WINDOWS = 5, 24, 60, 4

SHARED = {
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.4,  # large, so that attention is peaked and soft caps bite
}
GROUPED = {**SHARED, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
SLIDING = {"sliding_window": 7}  # shorter than the context
MIXED = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]

CONFIGS = {
    "gemma": GROUPED,
    "gemma2": {**GROUPED, **SLIDING, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 5},
    "gemma3_text": {**GROUPED, **SLIDING, "layer_types": MIXED, "query_pre_attn_scalar": 5},
    "llama": {**GROUPED, "attention_bias": True},
    "mistral": {**GROUPED, **SLIDING},
    "qwen2": {**GROUPED, **SLIDING, "use_sliding_window": True, "layer_types": MIXED},
    "qwen3": GROUPED,
    "gpt_neox": {**SHARED, "hidden_size": 32, "intermediate_size": 48},
    "gpt2": {**SHARED, "hidden_size": 32, "n_inner": 48},
}


@dataclass(frozen=True)
class Reference:
    """Everything that the whole eager model computes on some windows."""

    ids: torch.Tensor
    resid: list[torch.Tensor]
    attention: list[torch.Tensor]


def _make_model(model_type: str, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    for name, parameter in model.named_parameters():  # the constants of new norms and biases would hide errors
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


def _run_whole(model: PreTrainedModel) -> Reference:
    ids = torch.randint(3, VOCAB, (WINDOWS, CONTEXT), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 1
    resid: list[torch.Tensor] = []
    whole = copy.deepcopy(model)  # transformers leaves hooks on a model that reported its attention
    for layer in architecture_of(whole.config.model_type).layers_of(whole.base_model):
        layer.register_forward_hook(lambda _module, _args, output: resid.append(output))
    with torch.no_grad():
        attention = whole(ids, output_attentions=True, use_cache=False).attentions
    return Reference(ids, resid, list(attention))


@pytest.fixture(scope="session")
def is_same() -> Callable[[torch.Tensor, torch.Tensor], bool]:
    """Equal to the bit, or up to rounding if products have another type than transformers'."""

    def compare(found: torch.Tensor, expected: torch.Tensor) -> bool:
        if torch.equal(found, expected):
            return True
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        return is_widened("cpu", expected.dtype) and bool(error < 0.004)

    return compare


@pytest.fixture(scope="session")
def model_types() -> list[str]:
    return list(CONFIGS)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """Make a random causal language model: make_model(model_type, dtype, **config changes)."""
    return _make_model


@pytest.fixture(scope="session")
def run_whole() -> Callable[[PreTrainedModel], Reference]:
    """Run a model eagerly, and keep every residual and all attention."""
    return _run_whole


SENTENCE = "the a cat dog sat ran on under mat tree river and then it was not"
WORDS = SENTENCE.split()


def make_text(seed: int, words: int) -> str:
    """Random words."""
    picks = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[pick] for pick in picks.tolist())


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([make_text(0, 500)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", **special)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as `save_pretrained` writes it: 4 layers of width 16."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=64,
        sliding_window=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    make_tokenizer(bos_token="<bos>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents with blank lines between them."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("\n\n".join(make_text(seed, 20 + seed % 50) for seed in range(1, 301)))
    return path


@pytest.fixture
def make_config(settings_of: Callable[..., HarvestConfig], tmp_path: Path) -> Callable[..., HarvestConfig]:
    """Settings for a harvest of a second: 125 windows in 8 shards."""
    return lambda **changes: settings_of(**{"out": str(tmp_path / "store")} | changes)


@pytest.fixture(scope="session")
def settings_of(model_folder: Path, text_file: Path) -> Callable[..., HarvestConfig]:
    def make(**changes: Any) -> HarvestConfig:
        settings: dict[str, Any] = {
            "model": str(model_folder),
            "resid_layers": (2,),
            "attention_layers": (0, 1, 2, 3),
            "corpus": DatasetOptions(str(text_file)),
            "tokens": 4000,
            "context": 32,
            "shard_windows": 16,
            "batch_windows": 8,
            "device": "cpu",
        }
        return HarvestConfig(**settings | changes)

    return make


@pytest.fixture(scope="session")
def straight(settings_of: Callable[..., HarvestConfig], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The store of `make_config()`, harvested without interruption by one process; not to be changed."""
    return run.harvest(settings_of(out=str(tmp_path_factory.mktemp("straight") / "store")), Watch(is_quiet=True)).url


@pytest.fixture
def harvested(straight: str, make_config: Callable[..., HarvestConfig]) -> HarvestConfig:
    """`make_config()` with its finished store, which is a copy."""
    shutil.copytree(straight, make_config().out)
    return make_config()


def digest_of(url: str | Path) -> str:
    """The digest of a store, which must be complete and undamaged."""
    with Store.open(url) as store:
        assert store.committed.all()
        assert not [item for report in verify_shards(store) for item in report.damage]
        return digest(store)


@pytest.fixture
def share_only(monkeypatch) -> None:
    """Workers exit after their own share, as if killed then."""
    open_process = run.open_process

    @contextmanager
    def taken(device: str, worker: Worker) -> Iterator[Process]:
        with open_process(device, worker) as process:
            yield replace(process, takes_rest=False)

    monkeypatch.setattr(run, "open_process", taken)
