"""Hidden states written by vLLM (`extract_hidden_states`): one safetensors file per request, with `hidden_states`
[tokens, layers, width] and `token_ids` [tokens].

Files say neither which layers they hold nor in what order the requests came: layers are given by the user, files are
read in order of name. A request is a document. Requests differ in length and windows do not, so each is cut into
windows and its rest left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ImportInvalid
from .import_sources import as_tokens, say_other_files
from .numbers_in_words import counted
from .sites import RESID, Site

_HEADER_BYTES = 2**20
_TYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "I32": "<i4", "I64": "<i8"}
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor is stored. It is mapped only while it is read: a map keeps its file open, and there are many."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self, *part: slice | int) -> np.ndarray:
        try:
            return np.array(np.memmap(self.path, self.dtype, "r", self.offset, self.shape)[part])
        except (OSError, ValueError) as error:
            raise ImportInvalid(f"{self.path} changed while it was read ({error}). Import again") from None


@dataclass(frozen=True)
class _Sequence:
    hidden: _Tensor  # [tokens, layers, width]
    tokens: _Tensor  # [tokens]
    dtype: str

    def __len__(self) -> int:
        return self.tokens.shape[0]


class VllmSource:
    """A folder of files written by vLLM."""

    warning = ""

    def __init__(self, folder: Path, layers: Sequence[int], context: int | None) -> None:
        paths = sorted(folder.glob("**/*.safetensors"))
        if not paths:
            raise ImportInvalid(
                f"{folder}: expected hidden states of vLLM, one .safetensors file per request, found none"
            )
        found = [_read(path) for path in paths]
        kinds = {(one.hidden.shape[1:], one.dtype) for one in found}
        if len(kinds) > 1:
            raise ImportInvalid(f"{folder}: expected files of the same layers, width and type, found {sorted(kinds)}")
        (count, self.d_model), self.dtype = kinds.pop()
        if len(layers) != count or len(set(layers)) != count:
            raise ImportInvalid(
                f"{folder}: expected {count} layers, as in its files, found --layer {list(layers)}. Give each once, in "
                "the order of vLLM's ids: its id L + 1 is the residual stream after layer L"
            )
        lengths = [len(one) for one in found]
        if context is None and len(set(lengths)) > 1:
            raise ImportInvalid(
                f"{folder}: requests have {min(lengths)} to {max(lengths)} tokens. Give --context T: each is cut into "
                "windows of T tokens, and what does not fill one is left out"
            )
        self.context = lengths[0] if context is None else context
        if self.context < 1:
            raise ImportInvalid(f"{folder}: expected a --context of at least 1, found {self.context}")
        self._windows = [
            (one, slice(start, start + self.context))
            for one in found
            for start in range(0, len(one) - self.context + 1, self.context)
        ]
        self.windows = len(self._windows)
        counts = [n // self.context for n in lengths if n >= self.context]
        self.document_of = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
        if not self.windows:
            raise ImportInvalid(
                f"{folder}: no request fills a window of {self.context} tokens. Give a smaller --context"
            )
        others = say_other_files(folder, paths, "its .safetensors files")
        self.left_out = "; ".join(filter(None, (_say_left_out(lengths, self.context), others)))
        self._place = {Site(RESID, layer): at for at, layer in enumerate(layers)}
        self.sites = tuple(sorted(self._place))
        self.tokens: np.ndarray | None = as_tokens(np.stack([one.tokens.read(window) for one, window in self._windows]))

    def acts(self, site: Site, start: int, stop: int) -> np.ndarray:
        at = self._place[site]
        return np.stack([one.hidden.read(window, at) for one, window in self._windows[start:stop]])


def _say_left_out(lengths: Sequence[int], context: int) -> str:
    rest = sum(length % context for length in lengths)
    if not rest:
        return ""
    short = sum(length < context for length in lengths)
    told = f"; {short:,} of {counted(len(lengths), 'request')} are shorter than one" if short else ""
    return f"{rest:,} of {counted(sum(lengths), 'token')}, which fill no window of {context:,}{told}"


def _read(path: Path) -> _Sequence:
    """The two tensors of a file, not read yet. A safetensors file is a length, a JSON header and the bytes."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= _HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        hidden, kind = _tensor(path, header["hidden_states"], 8 + length)
        tokens, _ = _tensor(path, header["token_ids"], 8 + length)
    except (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ImportInvalid(
            f"{path}: expected a safetensors file of hidden_states and token_ids as vLLM writes them ({error!r})"
        ) from None
    if len(hidden.shape) != 3 or tokens.shape != hidden.shape[:1] or kind not in _DTYPES or tokens.dtype.kind != "i":
        raise ImportInvalid(
            f"{path}: expected hidden_states [tokens, layers, width] of BF16, F16 or F32 and as many token_ids, "
            f"found {kind} {list(hidden.shape)} and {tokens.dtype} {list(tokens.shape)}"
        )
    return _Sequence(hidden, tokens, _DTYPES[kind])


def _tensor(path: Path, entry: dict[str, Any], begin: int) -> tuple[_Tensor, str]:
    first, last = entry["data_offsets"]
    dtype, shape = np.dtype(_TYPES[entry["dtype"]]), tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (first, last, *shape)):
        raise ValueError(f"{entry} has numbers that are no sizes")
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if not 0 <= first <= last <= path.stat().st_size - begin or last - first != size or size == 0:
        raise ValueError(f"{entry} does not fit the file")
    return _Tensor(path, begin + first, dtype, shape), entry["dtype"]
