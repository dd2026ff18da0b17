"""From settings, model and corpus to the manifest that fixes a store before its first shard is written."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from ..cache_schema import AttentionSpec, CorpusSpec, HookSpec, Manifest, ModelSpec
from ..cache_schema.layout import find_too_large
from ..cache_schema.manifest import MOST_SHARDS, PART, seal
from ..cache_schema.numbers_in_words import counted
from ..cache_schema.sites import RESID
from ..cache_schema.splits import PER_MILLE, per_mille_for_tests, share_windows
from .config import ATTENTION_AROUND, HarvestConfig, read_hooks, read_layers
from .corpus import source_of
from .corpus.source import OPENWEBTEXT, SMALL_TOKENS, STDLIB, DatasetOptions
from .errors import SettingInvalid, TokenizerUnsuitable
from .model.load_and_truncate import ModelFacts, Wanted, read_facts
from .model.resolve import POCKET, SMOLLM2, Choice, ModelSource
from .model.tokenizer import TextEncoder, load_encoder
from .sparsify_attention import require_context

DEFAULT_TOKENS = 10_000_000
TEST = "test_per_mille"
BATCH = "batch_windows"


@dataclass(frozen=True)
class Plan:
    """Everything about a harvest that is decided without reading the corpus or the weights."""

    config: HarvestConfig
    source: ModelSource
    facts: ModelFacts
    wanted: Wanted
    encoder: TextEncoder
    choice: Choice | None = None
    """How the model was chosen."""

    @property
    def _name(self) -> str:
        """The model as asked for, because a folder may have the same name as the bundled model."""
        return self.choice.name if self.choice else ""

    @property
    def corpus(self) -> DatasetOptions:
        return self.config.corpus or DatasetOptions(STDLIB if self._name in (POCKET, SMOLLM2) else OPENWEBTEXT)

    @property
    def tokens(self) -> int:
        """The number of tokens asked for; the corpus may hold fewer."""
        suits_model = SMALL_TOKENS if self._name == POCKET else DEFAULT_TOKENS
        return self.config.tokens or source_of(self.corpus).tokens or suits_model

    @property
    def fell_back(self) -> tuple[str, ...]:
        """The banner, if `auto` fell back to the small model."""
        return self.choice.banner if self.choice and self.choice.name == POCKET else ()

    @property
    def windows(self) -> int:
        return self.tokens // self.config.context

    @property
    def model_spec(self) -> ModelSpec:
        return ModelSpec(
            id=self.source.id,
            revision=self.source.revision,
            d_model=self.facts.d_model,
            dtype=self.config.dtype,
            num_layers=self.facts.num_layers,
            tokenizer=self.encoder.digest,
            bos_token=self.encoder.bos_token,
            special_tokens=self.encoder.special_tokens,
        )

    @property
    def attention_spec(self) -> AttentionSpec:
        averaged = self.config.attention_heads == "mean"
        return AttentionSpec(
            layers=self.wanted.attention_layers,
            heads=1 if averaged else self.facts.num_heads,
            averaged=averaged,
            topk=min(self.config.attention_topk, self.config.context),
            mass=self.config.attention_mass,
            left_out=self.config.leave_out,
        )

    @property
    def windows_per_batch(self) -> int:
        return self.config.windows_per_batch(self.facts.d_model)


def make_plan(config: HarvestConfig, source: ModelSource, choice: Choice | None = None) -> Plan:
    """Read the model's configuration and tokenizer, and refuse settings that do not fit them."""
    facts = read_facts(source.folder)
    wanted = wanted_layers(config, facts)
    facts.validate_context(config.context)
    if wanted.attention_layers:
        require_context(config.context)
    plan = Plan(config, source, facts, wanted, load_encoder(source.folder), choice)
    _require_known(plan.encoder.bos_token, "the BOS token of the tokenizer", facts)
    _require_chunks_that_fit(plan)
    return plan


def _require_known(token: int, what: str, facts: ModelFacts) -> None:
    """Refuse a token that was added only to the tokenizer: the model's embedding has no row for it."""
    if token >= facts.vocab_size:
        raise TokenizerUnsuitable(
            f"{what} is {token}, but the model knows {facts.vocab_size:,} tokens: it was added to the "
            "tokenizer only. Choose one that the model was trained with in tokenizer_config.json"
        )


def require_known_tokens(packed: np.ndarray, facts: ModelFacts) -> None:
    """Check tokens before the first shard: the embedding would fail, on a GPU without a location."""
    if packed.size:
        _require_known(int(packed.max()), "the largest token of the text", facts)


def _require_chunks_that_fit(plan: Plan) -> None:
    """Refuse chunks that are too large before the corpus is tokenised and the model loaded."""
    shards = -(-plan.windows // plan.config.windows_per_shard)
    if shards > MOST_SHARDS:
        size = counted(plan.config.windows_per_shard, "window")
        raise SettingInvalid(
            f"--tokens {plan.tokens}: {shards:,} shards of {size}, but a store has at most {MOST_SHARDS:,}. Lower it, "
            "or raise --shard-windows"
        )
    manifest = expected_manifest(plan, corpus_spec(plan, plan.corpus.dataset, None, {}), plan.windows)
    if found := find_too_large(manifest):
        problem, is_window = found
        setting = f"--context ({manifest.context})" if is_window else f"--shard-windows ({manifest.shard_windows})"
        topk = f" or --attention-topk ({manifest.attention.topk})" if problem.startswith("attention/") else ""
        raise SettingInvalid(f"{problem}. Lower {setting}{topk}")


def wanted_layers(config: HarvestConfig, facts: ModelFacts) -> Wanted:
    """The layers asked for, relative to the model's usual one unless another is named."""
    layer = facts.usual_layer if config.layer is None else config.layer
    resid = read_layers(config.resid_layers, layer, "--resid-layers")
    if not isinstance(config.resid_layers, tuple):
        resid = tuple(sorted({layer, *resid}))
    kept = read_hooks(config.hooks, layer, resid)
    if config.attention_layers is None:  # the default, without layers that do not exist
        around = read_layers(ATTENTION_AROUND, layer, "--attention-layers")
        attention = tuple(each for each in around if 0 <= each < facts.num_layers)
    else:
        attention = read_layers(config.attention_layers, layer, "--attention-layers")
    wanted = Wanted(kept.pop(RESID, ()), attention, kept)
    wanted.validate(facts)
    return wanted


def corpus_spec(plan: Plan, name: str, revision: str | None, settings: dict[str, Any]) -> CorpusSpec:
    """The corpus, with all settings that decide windows and batches."""
    batch = plan.config.batch_windows or settings.get(BATCH) or plan.windows_per_batch
    decided = {"tokens": plan.tokens, BATCH: batch}
    return CorpusSpec(name, revision, plan.config.packing, settings | decided)


def settings_of_new(plan: Plan, settings: dict[str, Any], part: str | None = None) -> dict[str, Any]:
    """The corpus's own settings, plus those decided when a store is created: its test share, and the `part` of the
    corpus that can be read, if not all."""
    test = per_mille_for_tests(plan.tokens)
    return settings | ({TEST: test} if test != PER_MILLE["test"] else {}) | ({PART: part} if part else {})


def settings_of_store(settings: dict[str, Any], found: Manifest) -> dict[str, Any]:
    """The corpus's own settings, plus those decided when the store was created, whatever they would be now."""
    return settings | {key: found.corpus.settings[key] for key in (TEST, PART, BATCH) if key in found.corpus.settings}


def make_manifest(plan: Plan, corpus: CorpusSpec, windows: int, splits: dict[str, tuple[int, int]]) -> Manifest:
    """The manifest of a store for this plan, cache id included."""
    manifest = Manifest(
        model=plan.model_spec,
        corpus=corpus,
        context=plan.config.context,
        layers=plan.wanted.resid_layers,
        windows=windows,
        splits=splits,
        attention=plan.attention_spec,
        shard_windows=plan.config.windows_per_shard,
        codec=plan.config.codec,
        hooks={hook: HookSpec(layers, plan.facts.width_of(hook)) for hook, layers in plan.wanted.hooks.items()},
        stored_as=plan.config.stored_as,
    )
    return seal(manifest)


def expected_manifest(plan: Plan, corpus: CorpusSpec, windows: int) -> Manifest:
    """The manifest if the corpus has enough text: for estimates."""
    shares = share_windows(windows, corpus.settings.get(TEST, PER_MILLE["test"]))
    ends = list(accumulate(shares.values()))
    splits = {name: (end - share, end) for (name, share), end in zip(shares.items(), ends, strict=True)}
    return make_manifest(plan, corpus, windows, splits)
