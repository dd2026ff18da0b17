"""The tokenizer of a model: what of it decides a store's tokens, and batches of text to token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..errors import UNREADABLE, TokenizerUnsuitable


@dataclass(frozen=True)
class TextEncoder:
    """Turns documents into token ids, without BOS: windows get theirs when they are packed."""

    backend: Any  # of the `tokenizers` library: encodes a batch on all cores
    bos_token: int
    special_tokens: tuple[int, ...]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    @property
    def digest(self) -> str:
        """A hash of vocabulary, merges, normaliser and the rest; how a user pads or cuts is left out."""
        rules = json.loads(self.backend.to_str())
        for setting in ("padding", "truncation"):
            rules.pop(setting, None)
        canonical = json.dumps(rules, sort_keys=True, ensure_ascii=True)
        return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def load_encoder(source: str | Path) -> TextEncoder:
    """The encoder of a model's folder or hub id."""
    return make_encoder(load_tokenizer(source), str(source))


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of transformers, by the rules of tokenizer.json, for some of its classes put in their own."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    alone: dict[str, Any] = {"trust_remote_code": False}  # left open, it asks at a terminal whether to run their code
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **alone)
        file = Path(source, "tokenizer.json")
        if not file.is_file() or not getattr(tokenizer, "is_fast", False):
            return tokenizer
        is_as_published = _rules_of(tokenizer.backend_tokenizer) == _rules_of(Tokenizer.from_file(str(file)))
        return tokenizer if is_as_published else PreTrainedTokenizerFast.from_pretrained(source, **alone)
    except UNREADABLE as error:
        raise TokenizerUnsuitable(
            f"{source} has no tokenizer that can be loaded ({error}). Save one beside the model "
            "with `tokenizer.save_pretrained`"
        ) from error


def _rules_of(backend: Tokenizer) -> list[Any]:
    """What decides the tokens of a text beside vocabulary and merges, which every class takes from the file."""
    stages = [stage and stage.__getstate__() for stage in (backend.normalizer, backend.pre_tokenizer)]
    return [*stages, *(getattr(backend.model, name, None) for name in ("byte_fallback", "ignore_merges"))]


def make_encoder(tokenizer: Any, name: str) -> TextEncoder:
    """The encoder of a tokenizer of transformers."""
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizerUnsuitable(f"the tokenizer of {name} has no fast form (tokenizer.json); convert it first")
    if tokenizer.bos_token_id is None:
        raise TokenizerUnsuitable(
            f"the tokenizer of {name} has no BOS token, but every window starts with one. "
            "Set `bos_token` in its tokenizer_config.json (often the end-of-text token serves)"
        )
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return TextEncoder(backend, int(tokenizer.bos_token_id), tuple(sorted(set(map(int, tokenizer.all_special_ids)))))
