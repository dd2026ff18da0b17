"""The passages from which a latent is explained, and those by which the explanation is scored.

1. One pass over the text counts how often every latent fires, and latents are drawn from those that fire often enough.
2. A second one keeps all activations of the drawn latents.
3. For each of them, passages are drawn: the `buffer` tokens on either side of a token, itself included.

Places are numbers of tokens in the text, window after window. W windows, T context, P places, L drawn latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse

from ...context.stored_windows import TextCount, ordinary_rows, read_windows, say_splits
from ...model.batches import Windows
from ...model.smaller_pieces import within
from ..browser.collect_firings import Table, joined_rows
from ..core.encoding import encode_codes
from ..evaluation_contract import Context, LoadedSae
from ..measures.token_text import BROKEN, Vocabulary
from .config import Config
from .prompts import MARKS

ACTIVATION_BYTES = 24  # of one kept activation, at most, while tables are joined
ROOM = 1 << 31  # bytes of kept activations at once: SAEs that need more are read one after another
TRIES = 40  # places drawn for each passage in which the latent is to be silent


class Passage(NamedTuple):
    tokens: np.ndarray
    active: np.ndarray  # bool, the tokens on which the latent is

    @property
    def is_active(self) -> bool:
        return bool(self.active.any())


class Passages(NamedTuple):
    """Of one latent."""

    explain: list[Passage]
    score: list[Passage]


@dataclass(frozen=True, eq=False)
class Text:
    """What the first pass found."""

    tokens: np.ndarray  # [W, T]
    counts: Mapping[LoadedSae, TextCount]
    latents: Mapping[LoadedSae, np.ndarray]
    """Those that are drawn, in ascending order."""
    num_activations: Mapping[LoadedSae, int]
    """Theirs."""


@dataclass(frozen=True, eq=False)
class Activations:
    """Those of the drawn latents of one SAE."""

    tokens: np.ndarray  # [W, T]
    latents: np.ndarray
    rows: np.ndarray  # int64 [P], the places that count, ascending
    table: Table  # [P, L], by column


class TooRare(Exception):
    """A latent without enough places at which it fires, apart from each other and from the ends of windows."""


class NeverSilent(Exception):
    """A latent that is active in almost every passage."""


def first_pass(context: Context, subjects: Sequence[LoadedSae], windows: Mapping[str, int], config: Config) -> Text:
    tokens, counts = list[np.ndarray](), {subject: TextCount(say_splits(windows)) for subject in subjects}
    fired = {subject: np.zeros(subject.width, np.int64) for subject in subjects}
    for batch, by_subject in _read(context, subjects, windows, config, "autointerp: which latents fire"):
        tokens.append(batch.tokens.cpu().numpy().astype(np.uint32))
        for subject, (rows_WT, codes) in by_subject:
            counts[subject].add(batch, rows_WT)
            fired[subject] += np.bincount(codes.indices, minlength=subject.width)
    latents = {subject: draw_latents(fired[subject], config) for subject in subjects}
    sums = {subject: int(fired[subject][latents[subject]].sum()) for subject in subjects}
    return Text(np.concatenate(tokens), counts, latents, sums)


def draw_latents(fired: np.ndarray, config: Config) -> np.ndarray:
    if config.override_latents is not None:
        return np.unique(np.array(config.override_latents, np.int64))
    alive = np.flatnonzero(fired > config.dead_latent_threshold)
    return np.sort(np.random.default_rng(config.random_seed).permutation(alive)[: config.n_latents])


def second_pass(
    context: Context, subjects: Sequence[LoadedSae], windows: Mapping[str, int], text: Text, config: Config
) -> Iterator[tuple[LoadedSae, Activations]]:
    for group in within(ROOM, subjects, lambda subject: text.num_activations[subject] * ACTIVATION_BYTES):
        kept: dict[LoadedSae, list[tuple[np.ndarray, Table]]] = {subject: [] for subject in group}
        start = 0
        for batch, by_subject in _read(context, group, windows, config, "autointerp: activations"):
            for subject, (rows_WT, codes) in by_subject:
                rows = start + np.flatnonzero(rows_WT.cpu().numpy())
                kept[subject].append((rows, codes[:, text.latents[subject]]))
            start += batch.tokens.numel()
        for subject in group:
            rows, tables = zip(*kept.pop(subject), strict=True)
            table: Table = scipy.sparse.vstack(tables, format="csc")
            table.sort_indices()
            yield subject, Activations(text.tokens, text.latents[subject], np.concatenate(rows), table)


def _read(
    context: Context, subjects: Sequence[LoadedSae], windows: Mapping[str, int], config: Config, title: str
) -> Iterator[tuple[Windows, Iterator[tuple[LoadedSae, tuple[Any, Table]]]]]:
    """Every batch; and for each SAE which of its tokens count, and their codes as a table [tokens, F]."""

    def codes_of(subject: LoadedSae, batch: Windows) -> tuple[LoadedSae, tuple[Any, Table]]:
        rows_WT = ordinary_rows(context, subject, batch)
        codes = joined_rows(encode_codes(subject, batch))
        return subject, (rows_WT, codes[np.flatnonzero(rows_WT[batch.keep].cpu().numpy())])

    for split, count in windows.items():
        for batch in read_windows(context, subjects, f"{title}, {split} split", count, config.batch_windows, split):
            yield batch, (codes_of(subject, batch) for subject in subjects)


@dataclass(eq=False)
class Drawing:
    """Draws the passages of one SAE's latents. What is drawn for a latent depends on no other."""

    acts: Activations
    config: Config
    inner: np.ndarray = field(init=False)  # the places that count and have `buffer` tokens of their window around them

    def __post_init__(self) -> None:
        self.inner = self.acts.rows[self._is_inner(self.acts.rows)]

    def passages(self, number: int) -> Passages:
        """The passages of a drawn latent, by its number among them."""
        config, acts = self.config, self.acts
        rng = np.random.default_rng([config.random_seed, int(acts.latents[number])])
        column = slice(acts.table.indptr[number], acts.table.indptr[number + 1])
        places, values = acts.rows[acts.table.indices[column]], acts.table.data[column]
        is_inner = self._is_inner(places)
        inside, heights = places[is_inner], values[is_inner].astype(np.float64)
        taken = set[int]()
        top = self._apart(inside[np.argsort(-heights, kind="stable")], config.n_top, taken)
        threshold = config.act_threshold_frac * float(self._around(top, places, values).max())
        is_below = heights < values[np.searchsorted(places, top[-1])]
        inside, heights = inside[is_below], heights[is_below]
        # The largest of log(uniform) / weight are a sample without replacement, each by its weight: the square.
        with np.errstate(divide="ignore"):
            keys = np.log(rng.random(len(heights))) / np.square(heights / heights.max(initial=math.ulp(0)))
        weighted = self._apart(inside[np.argsort(-keys, kind="stable")], config.n_weighted, taken)
        silent = self._silent(places, values, threshold, rng)
        top_explain, top_score = np.split(rng.permutation(top), [config.n_top_ex_for_generation])
        explain, score = np.split(rng.permutation(weighted), [config.n_iw_sampled_ex_for_generation])
        explain = np.concatenate([top_explain, explain])
        peaks = self._around(explain, places, values).max(1)
        explain = explain[np.argsort(-peaks, kind="stable")]
        score = rng.permutation(np.concatenate([top_score, score, silent]))

        def taken_out(chosen: np.ndarray) -> list[Passage]:
            active = self._around(chosen, places, values) > threshold
            return list(map(Passage, acts.tokens.reshape(-1)[self._span(chosen)], active))

        return Passages(taken_out(explain), taken_out(score))

    def _is_inner(self, places: np.ndarray) -> np.ndarray:
        context, buffer = self.acts.tokens.shape[1], self.config.buffer
        return (places % context >= buffer) & (places % context < context - buffer)

    def _span(self, places: np.ndarray) -> np.ndarray:
        return places[:, None] + np.arange(-self.config.buffer, self.config.buffer + 1)

    def _around(self, chosen: np.ndarray, places: np.ndarray, values: np.ndarray) -> np.ndarray:
        """The latent's activations in the passages around some places."""
        wanted = self._span(chosen)
        at = np.minimum(np.searchsorted(places, wanted), len(places) - 1)
        return np.where(places[at] == wanted, values[at], 0)

    def _apart(self, places: np.ndarray, count: int, taken: set[int]) -> np.ndarray:
        """The first places that are further than `buffer` from each other and from those taken before."""
        found = list[int]()
        for place in places.tolist():
            if len(found) == count:
                break
            if place not in taken:
                found.append(place)
                taken.update(range(place - self.config.buffer, place + self.config.buffer + 1))
        if len(found) < count:
            raise TooRare
        return np.array(found, np.int64)

    def _silent(self, places: np.ndarray, values: np.ndarray, threshold: float, rng: np.random.Generator) -> np.ndarray:
        wanted = self.config.n_random_ex_for_scoring
        drawn = rng.choice(self.inner, min(len(self.inner), TRIES * wanted), replace=False)
        silent = drawn[(self._around(drawn, places, values) <= threshold).all(1)][:wanted]
        if len(silent) < wanted:
            raise NeverSilent
        return silent


def written(passage: Passage, words: Vocabulary, is_marked: bool) -> str:
    """A passage as the judge reads it. Each token adds what the text up to it has more than the text before: characters
    of several tokens appear with their last one, and are marked if any of these is active."""
    parts, before, is_active = list[str](), "", False
    for end, active in enumerate(passage.active, 1):
        text = words.write(passage.tokens[:end]).rstrip(BROKEN)
        part, is_active = text[len(before) :], is_active or bool(active)
        if part:
            parts.append(f"{MARKS[0]}{part}{MARKS[1]}" if is_marked and is_active else part)
            before, is_active = text, False
    return "".join(parts).replace(BROKEN, "").replace("\r", "").replace("\n", "\u21b5")
