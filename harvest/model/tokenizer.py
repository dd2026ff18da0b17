"""A model's tokenizer: its identity, and batches of text to token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..errors import UNREADABLE, TokenizerUnsuitable
from .load_and_truncate import CONFIG_FILE


@dataclass(frozen=True)
class TextEncoder:
    """Turns documents into token ids without BOS, which is added when windows are packed."""

    backend: Any  # of the `tokenizers` library: encodes a batch on all cores
    bos_token: int
    special_tokens: tuple[int, ...]
    is_bos_of_configuration: bool = False  # because the tokenizer itself names none

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    @property
    def digest(self) -> str:
        """A hash of vocabulary, merges, normaliser and the rest; padding and truncation are left out."""
        rules = json.loads(self.backend.to_str())
        for setting in ("padding", "truncation"):
            rules.pop(setting, None)
        canonical = json.dumps(rules, sort_keys=True, ensure_ascii=True)
        return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def load_encoder(source: str | Path) -> TextEncoder:
    """The encoder for a model's folder or hub id."""
    return make_encoder(load_tokenizer(source), str(source))


def load_tokenizer(source: str | Path) -> Any:
    """transformers' tokenizer, but with the rules of tokenizer.json, which some of its classes override."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    options: dict[str, Any] = {"trust_remote_code": False}  # if unset, transformers asks on a terminal
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        file = Path(source, "tokenizer.json")
        if not file.is_file() or not getattr(tokenizer, "is_fast", False):
            return tokenizer
        is_as_published = _rules_of(tokenizer.backend_tokenizer) == _rules_of(Tokenizer.from_file(str(file)))
        return tokenizer if is_as_published else PreTrainedTokenizerFast.from_pretrained(source, **options)
    except UNREADABLE as error:
        raise TokenizerUnsuitable(
            f"{source} has no tokenizer that can be loaded ({error}). Save one next to the model "
            "with `tokenizer.save_pretrained`"
        ) from error


def _rules_of(backend: Tokenizer) -> list[Any]:
    """The rules that decide tokens besides vocabulary and merges, which every class takes from the file."""
    stages = [stage and stage.__getstate__() for stage in (backend.normalizer, backend.pre_tokenizer)]
    return [*stages, *(getattr(backend.model, name, None) for name in ("byte_fallback", "ignore_merges"))]


def make_encoder(tokenizer: Any, name: str) -> TextEncoder:
    """The encoder for a tokenizer of transformers."""
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizerUnsuitable(f"the tokenizer of {name} has no fast form (tokenizer.json). Convert it first")
    named = tokenizer.bos_token_id
    bos = _bos_of_configuration(tokenizer, Path(name)) if named is None else int(named)
    if bos is None:
        raise TokenizerUnsuitable(
            f"the tokenizer of {name} has no BOS token, but every window starts with one. "
            "Set `bos_token` in its tokenizer_config.json (often the end-of-text token serves)"
        )
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return TextEncoder(backend, bos, tuple(sorted({bos, *map(int, tokenizer.all_special_ids)})), named is None)


def _bos_of_configuration(tokenizer: Any, folder: Path) -> int | None:
    """The BOS that a configuration names although the tokenizer does not, as in Qwen's models. It must be a special
    token: some configurations have an arbitrary number."""
    try:
        found = json.loads((folder / CONFIG_FILE).read_bytes()).get("bos_token_id")
    except FileNotFoundError:
        return None
    token = tokenizer.added_tokens_decoder.get(found) if isinstance(found, int) else None
    return found if token and token.special else None
