"""Existing activations as sources of an import: numpy files, cached activations of SAELens, hidden states of vLLM.

A source returns the activations of windows start..stop, so that files of any size are imported shard by shard.
W windows, T context, D residual width.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.lib.format import open_memmap

from .errors import ImportInvalid
from .numbers_in_words import counted, some_of
from .sites import RESID, Site, site_named
from .stored_dtypes import STORED_AS, why_not_uint32

_DTYPES = {"float32": "float32", "float16": "float16", "uint16": "bfloat16"}
# For the tensors in vLLM's files.
_VLLM_TYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "I32": "<i4", "I64": "<i8"}
_VLLM_ACTS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


class Source(Protocol):
    """Windows of activations, by site, and their tokens."""

    windows: int
    context: int
    d_model: int
    dtype: str  # float32, float16 or bfloat16
    sites: tuple[Site, ...]
    tokens: np.ndarray | None  # uint32 [W, T]; None if unknown
    document_of: np.ndarray  # uint32 [W], rising: the number of each window's document
    left_out: str  # in words: rows in no window and files not read; empty if there are none
    warning: str

    def acts(self, site: Site, start: int, stop: int) -> np.ndarray: ...


class NumpySource:
    """`.npy` files, or folders of them: for each site activations [W, T, D], or rows [N, D] in runs of T, and
    optionally tokens [W, T] or [N]."""

    warning = ""

    def __init__(self, acts: dict[Site, Path], tokens: Path | None, context: int | None = None) -> None:
        self._acts = {site: _Joined(path) for site, path in acts.items()}
        shapes = {joined.shape for joined in self._acts.values()}
        dtypes = {joined.dtype.name for joined in self._acts.values()}
        if len(shapes) != 1 or len(dtypes) != 1:
            raise ImportInvalid(f"expected activations of one shape and type, found {sorted(shapes)}, {sorted(dtypes)}")
        shape, ids = shapes.pop(), None if tokens is None else _Joined(tokens)
        cut = context or (ids.shape[1] if ids is not None and len(ids.shape) == 2 else None)
        if len(shape) == 3 and context in (None, shape[1]):
            self._rows_per_window, windows = 1, shape
        elif len(shape) == 2 and cut:
            self._rows_per_window, windows = cut, (shape[0] // cut, cut, shape[1])
        else:
            raise ImportInvalid(
                f"expected activations [windows, tokens, width], or [rows, width] with --context T, the number of "
                f"consecutive rows from one text (1 if none are consecutive), found {shape}"
                + (f" with --context {context}" if context is not None else "")
            )
        self.windows, self.context, self.d_model = _require_not_empty(windows)
        self.dtype = _stored_dtype(dtypes.pop())
        self.sites = tuple(sorted(acts))
        rows = shape[0] * self.context // self._rows_per_window
        self.tokens = None if ids is None else _windows_of(ids, rows, self.windows, self.context)
        self.document_of = np.arange(self.windows, dtype=np.uint32)
        rest = rows - self.windows * self.context
        if any(length % self._rows_per_window for joined in self._acts.values() for length in joined.lengths[:-1]):
            self.warning = (
                f"windows of {self.context:,} rows run across files, whose lengths are not multiples of that: "
                "if each file is a separate text, some windows hold parts of two"
            )
        unused = f"{counted(rest, 'row')}, which fill no window of {self.context:,}" if rest else ""
        folders = [*self._acts.values(), *([] if ids is None else [ids])]
        read = {file for joined in folders for file in joined.files}
        self.left_out = "; ".join(filter(None, (unused, *(joined.say_others(read) for joined in folders))))

    def acts(self, site: Site, start: int, stop: int) -> np.ndarray:
        rows = self._acts[site].rows(start * self._rows_per_window, stop * self._rows_per_window)
        values = np.ascontiguousarray(rows, STORED_AS[self.dtype])  # a file may be big-endian
        return values.reshape(stop - start, self.context, self.d_model)


class _Joined:
    """The array of a file, or the concatenated arrays of a folder's files; only the rows asked for are read."""

    def __init__(self, path: Path) -> None:
        self.files = sorted(path.glob("*.npy"), key=_by_numbers) if path.is_dir() else [path]
        if not self.files:
            for other in sorted(path.iterdir()):
                _load(other)  # its error has the remedy for this kind of file
            raise ImportInvalid(f"{path}: expected .npy files in this folder, found none")
        self._path = path
        found = [(array.shape, array.dtype) for array in map(_load, self.files)]  # a map keeps its file open
        kinds = {(shape[1:], dtype) for shape, dtype in found}
        if len(kinds) != 1:
            listed = ", ".join(sorted(f"{dtype} {list(shape)}" for shape, dtype in kinds))
            raise ImportInvalid(
                f"{path}: expected .npy files of one type, and of one shape except for length, found {listed}"
            )
        (shape, self.dtype), *_ = kinds
        self.lengths = [shape[0] for shape, _ in found]
        self.shape = (sum(self.lengths), *shape)

    def say_others(self, read: Collection[Path]) -> str:
        """In words: the folder's files that no option reads."""
        return say_other_files(self._path, read, "the .npy files at its top") if self._path.is_dir() else ""

    def rows(self, start: int, stop: int) -> np.ndarray:
        begins = accumulate(self.lengths, initial=0)
        parts = [
            _load(file)[max(0, start - begin) : stop - begin]
            for file, begin, length in zip(self.files, begins, self.lengths, strict=False)
            if begin < stop and start < begin + length
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def say_other_files(folder: Path, read: Collection[Path], kind: str) -> str:
    """In words: the files in a folder or below it that are not read; empty if all are."""
    found = {file for file in folder.rglob("*") if file.is_file()} - {*read}
    names = [repr(file.relative_to(folder).as_posix()) for file in sorted(found)]  # repr can print any bytes
    return f"{counted(len(names), 'other file')} of {folder} ({some_of(names)}): only {kind} are read" if names else ""


def _by_numbers(file: Path) -> list[tuple[int, str]]:
    """A sort key that puts part_2 before part_10."""
    return [(int(part) if part.isdecimal() else 0, part) for part in re.split(r"([0-9]+)", file.name)]


class SaelensSource:
    """A folder written by SAELens' cache runner: one row per window, one column named after the hook, and token_ids
    if they were saved; otherwise tokens [W, T] may come from a file."""

    warning = ""

    def __init__(self, folder: Path, layer: int | None, tokens: Path | None = None) -> None:
        from datasets import Dataset, load_from_disk  # imported late: only this format needs it

        try:
            rows = load_from_disk(str(folder))
        except (FileNotFoundError, ValueError) as error:
            raise ImportInvalid(f"{folder} is not a data set that `datasets.load_from_disk` opens: {error}") from None
        if not isinstance(rows, Dataset):
            raise ImportInvalid(
                f"expected one data set in {folder}, found several splits: {list(rows)}. Give the folder of one of them"
            )
        self._rows = rows.with_format("numpy")
        hook, feature = _hook_column(folder, self._rows.features)
        self._hook = hook
        self.windows, self.context, self.d_model = _require_not_empty((len(self._rows), *feature.shape))
        self.dtype = _stored_dtype(feature.dtype)
        self.sites = (_site_of(hook, layer),)
        has_ids = "token_ids" in self._rows.features
        if has_ids and tokens is not None:
            raise ImportInvalid(f"{folder} holds token_ids: leave out --tokens {tokens}")
        ids = None if tokens is None else _Joined(tokens)
        self.tokens = None if ids is None else _windows_of(ids, self.windows * self.context, self.windows, self.context)
        self.left_out = "" if ids is None else ids.say_others(ids.files)
        if has_ids:
            self.tokens = as_tokens(np.asarray(self._read("token_ids", 0, self.windows)))
        self.document_of = np.arange(self.windows, dtype=np.uint32)

    def acts(self, site: Site, start: int, stop: int) -> np.ndarray:
        values = np.asarray(self._read(self._hook, start, stop), STORED_AS[self.dtype])
        return values.reshape(stop - start, self.context, self.d_model)

    def _read(self, column: str, start: int, stop: int) -> Any:
        """Select this column alone: whole rows are decoded, and the tokens of all windows are read at once."""
        return self._rows.select_columns(column)[start:stop][column]


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor is stored. It is mapped only while it is read: a map keeps one of many files open."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self, *part: slice | int) -> np.ndarray:
        try:
            return np.array(np.memmap(self.path, self.dtype, "r", self.offset, self.shape)[part])
        except (OSError, ValueError) as error:
            raise ImportInvalid(f"{self.path} changed while it was being read ({error}). Import again") from None


@dataclass(frozen=True)
class _Sequence:
    hidden: _Tensor  # [tokens, layers, width]
    tokens: _Tensor  # [tokens]
    dtype: str

    def __len__(self) -> int:
        return self.tokens.shape[0]


class VllmSource:
    """A folder of hidden states written by vLLM (`extract_hidden_states`): one safetensors file per request, with
    `hidden_states` [tokens, layers, width] and `token_ids` [tokens].

    The files record neither their layers nor the order of requests: layers are given by the user, and files are read
    in order of name. A request is a document. Each is cut into windows, and the rest is left out.
    """

    warning = ""

    def __init__(self, folder: Path, layers: Sequence[int], context: int | None) -> None:
        paths = sorted(folder.glob("**/*.safetensors"))
        if not paths:
            raise ImportInvalid(
                f"{folder}: expected hidden states of vLLM, one .safetensors file per request, found none"
            )
        found = [_read_vllm(path) for path in paths]
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
    too_short = f"; {short:,} of {counted(len(lengths), 'request')} are shorter than one" if short else ""
    return f"{rest:,} of {counted(sum(lengths), 'token')}, which fill no window of {context:,}{too_short}"


def _read_vllm(path: Path) -> _Sequence:
    """The two tensors of a file, not read yet. A safetensors file is a length, a JSON header and the bytes."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= 2**20:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        hidden, kind = _tensor(path, header["hidden_states"], 8 + length)
        tokens, _ = _tensor(path, header["token_ids"], 8 + length)
    except (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ImportInvalid(
            f"{path}: expected a safetensors file of hidden_states and token_ids as vLLM writes them ({error!r})"
        ) from None
    if len(hidden.shape) != 3 or tokens.shape != hidden.shape[:1] or kind not in _VLLM_ACTS or tokens.dtype.kind != "i":
        raise ImportInvalid(
            f"{path}: expected hidden_states [tokens, layers, width] of BF16, F16 or F32 and token_ids [tokens], "
            f"found {kind} {list(hidden.shape)} and {tokens.dtype} {list(tokens.shape)}"
        )
    return _Sequence(hidden, tokens, _VLLM_ACTS[kind])


def _tensor(path: Path, entry: dict[str, Any], begin: int) -> tuple[_Tensor, str]:
    first, last = entry["data_offsets"]
    dtype, shape = np.dtype(_VLLM_TYPES[entry["dtype"]]), tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (first, last, *shape)):
        raise ValueError(f"{entry} has invalid sizes")
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if not 0 <= first <= last <= path.stat().st_size - begin or last - first != size or size == 0:
        raise ValueError(f"{entry} does not fit the file")
    return _Tensor(path, begin + first, dtype, shape), entry["dtype"]


def _load(path: Path) -> np.ndarray:
    if path.suffix in (".pt", ".pth", ".pkl"):
        raise ImportInvalid(
            f"{path} is a pickle, as torch.save and activault write it: expected .npy, as pickles may run code and are "
            "not read. If you trust it, convert it once: found = torch.load(FILE, weights_only=True); "
            "np.save('acts.npy', found['states'].view(torch.uint16)); np.save('tokens.npy', found['input_ids']); "
            "then --resid acts.npy --tokens tokens.npy"
        )
    if path.suffix == ".safetensors":
        raise ImportInvalid(
            f"{path}: expected .npy. Convert it: found = safetensors.torch.load_file(FILE)[NAME]; np.save('acts.npy', "
            "found.view(torch.uint16) if found.dtype == torch.bfloat16 else found). --vllm reads files of vLLM"
        )
    try:
        array = open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise ImportInvalid(f"{path} is not a readable .npy file: {error}") from None
    if array.ndim == 0:
        raise ImportInvalid(f"{path}: expected an array, found a single number")
    return array


def _require_not_empty(shape: tuple[int, ...]) -> tuple[int, ...]:
    if 0 in shape:
        raise ImportInvalid(f"expected activations [windows, tokens, width] of at least 1 each, found {shape}")
    return shape


def _windows_of(tokens: _Joined, rows: int, windows: int, context: int) -> np.ndarray:
    """uint32 [W, T], from tokens given one per row or in windows."""
    if tokens.shape not in ((rows,), (windows, context)):
        raise ImportInvalid(
            f"expected tokens of shape {(windows, context)}, or one per row: {rows}; found {tokens.shape}"
        )
    found = tokens.rows(0, tokens.shape[0])
    return as_tokens(found.reshape(-1)[: windows * context].reshape(windows, context))


def _stored_dtype(name: str) -> str:
    if name not in _DTYPES:
        raise ImportInvalid(
            f"expected activations as float32, float16 or bfloat16 bits in uint16, found {name}. "
            "Convert them first: an import never rounds unasked"
        )
    return _DTYPES[name]


def as_tokens(tokens: np.ndarray) -> np.ndarray:
    if found := why_not_uint32(tokens):
        raise ImportInvalid(f"expected token ids from 0 to 2^32 - 1, found {found}")
    return np.ascontiguousarray(tokens, np.uint32)


def _hook_column(folder: Path, features: Any) -> tuple[str, Any]:
    columns = [(name, feature) for name, feature in features.items() if len(getattr(feature, "shape", ())) == 2]
    if len(columns) != 1:
        raise ImportInvalid(
            f"{folder}: expected one column of windows [tokens, width] besides token_ids, found {list(features)}"
        )
    return columns[0]


def _site_of(name: str, given: int | None) -> Site:
    """The site of a column named as in TransformerLens, or after a layer, whose output is the residual stream after it.
    Under any other name, activations are stored as residuals of the `given` layer."""
    if name.endswith("blocks.0.hook_resid_pre"):
        raise ImportInvalid(f"{name} is the embedding, before the first layer: a store has no place for it")
    found = site_named(name)
    if found is None:
        if given is None:
            raise ImportInvalid(
                f"cannot tell from the name {name!r} where in the model these activations come from: give --layer L "
                "if they are the residual stream after layer L"
            )
        return Site(RESID, given)
    if given not in (None, found.layer):
        raise ImportInvalid(
            f"expected --layer {found.layer}, as {name} is {found}, found --layer {given}: leave out --layer, which is "
            "for columns whose name gives no layer"
        )
    return found
