"""What is written about an SAE's latents: columns for the list, and files of a few latents each for the rest.

F latents, K neighbours or tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....harvest.progress import Watch
from ...context.loaded_sae import LoadedSae
from ...context.write_and_read_results import place_now
from ...model.smaller_pieces import PieceSize, in_pieces
from ...model.unembedding_head import Head
from ..measures.assignment import GROUPS, RANGES, TIERS, saved, saved_composition
from ..measures.token_text import Vocabulary
from .browser_folder import Folder
from .collect_firings import BINS, SAMPLE, TOP, Firings, Seen, largest, ranges
from .config import Config
from .related import Near, by_direction, by_firing

FILE_LATENTS = 32
RANDOM = 8  # set besides SAMPLE for a few of the sample, chosen at random to represent all
SHOWN_RANDOM = 5
DENSE = 0.1  # fires on more than this share of tokens
STEPS = 65_535  # levels of a written activation, from zero to the latent's highest
MARKS = {"tier": TIERS, "range": RANGES, "group": GROUPS}
COUNTERPARTS = 3
COMPARED = 8  # most other SAEs in which an SAE's counterparts are sought
LIST_BYTES = 40  # of a latent's counterparts in one of them by one measure, on disk, about
PARTS = 5
DENSITY_EDGES = np.arange(-6, 0.01, 0.25)  # log10 of the share of tokens


@dataclass(frozen=True, eq=False)
class Shown:
    folder: str
    subject: LoadedSae
    seen: Seen

    @property
    def rows(self) -> Tensor:
        """Its decoder."""
        return self.subject.sae.W_dec.detach()

    @cached_property
    def density(self) -> np.ndarray:
        return self.seen.fired / max(self.seen.tokens, 1)

    @cached_property
    def kept(self) -> tuple[Firings, np.ndarray]:
        """The examples, by latent and the highest first, and why each is kept."""
        kept, reasons = self.seen.keeper.finish()
        sampled = np.flatnonzero(reasons & SAMPLE)
        reasons[sampled[largest(kept.latent[sampled], kept.priority[sampled], SHOWN_RANDOM)]] |= RANDOM
        return kept, reasons

    @cached_property
    def items(self) -> np.ndarray:
        """int64 [F + 1]: where each latent's examples start."""
        return np.searchsorted(self.kept[0].latent, np.arange(self.subject.width + 1))

    @cached_property
    def entries(self) -> np.ndarray:
        """Where each example's activations start."""
        return np.concatenate([[0], np.cumsum(self.kept[0].count)])

    @property
    def shares(self) -> dict[str, float]:
        return {
            "alive_share": float((self.seen.fired > 0).mean()),
            "dense_share": float((self.density > DENSE).mean()),
            "l0": float(self.density.sum()),
        }


def summary_of(shown: Shown) -> dict[str, Any]:
    alive = shown.density[shown.density > 0]
    counts, _ = np.histogram(np.log10(np.maximum(alive, 1e-6)), DENSITY_EDGES)
    subject = shown.subject
    return {
        "folder": shown.folder,
        "label": subject.label,
        "variant": subject.variant,
        "width": subject.width,
        "sha256": subject.sha256,
        "place": place_now(subject),
        "target_layers": list(subject.target_layers),
        "tokens": shown.seen.tokens,
        **shown.shares,
        "density": {"edges": DENSITY_EDGES.tolist(), "counts": counts.tolist()},
        "dense": DENSE,
    }


def write_latents(
    folder: Folder,
    shown: Shown,
    near: Mapping[str, Any],
    tokens: Mapping[str, tuple[np.ndarray, np.ndarray]],
    tokens_WT: np.ndarray,
    watch: Watch,
) -> None:
    """All files of one SAE: columns, places of examples, and the latents themselves."""
    kept, reasons = shown.kept
    width = shown.subject.width
    write_columns(folder, shown, tokens, tokens_WT[kept.window, kept.at])
    starts, entries = shown.items, shown.entries
    counts = np.diff(starts).astype(np.uint16)
    for number, rows in enumerate(parts_of(width, 1 << 14)):  # as the page counts them
        items = slice(starts[rows.start], starts[rows.stop])
        places = {"window": kept.window[items].astype(np.uint32), "at": kept.at[items].astype(np.uint16)}
        folder.write(f"{shown.folder}/places/{number}", {"counts": counts[rows], **places})
    with watch.stage(f"browser, latents of {shown.subject.label}", width, "latents") as advance:
        for number, rows in enumerate(parts_of(width, FILE_LATENTS)):
            first, last = starts[rows.start], starts[rows.stop]
            firings = kept.part(slice(first, last), slice(entries[first], entries[last]))
            value = {
                "counts": counts[rows],
                "reasons": reasons[first:last],
                **firings_value(firings, shown.seen.highest),
                **histogram_value(shown.seen.histogram[rows]),
                "parts": shown.seen.by_part[rows].astype(np.uint32),
                **{name: near_value(one, rows) for name, one in near.items()},
                **{name: {"tokens": t[rows], "values": v[rows]} for name, (t, v) in tokens.items()},
            }
            folder.write(f"{shown.folder}/latents/{number}", value)
            advance(rows.stop - rows.start)


def parts_of(width: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, width)) for first in range(0, width, size)]


def firings_value(firings: Firings, highest: np.ndarray) -> dict[str, np.ndarray]:
    scale = np.repeat(highest[firings.latent], firings.count)
    return {
        "window": firings.window.astype(np.uint32),
        "at": firings.at.astype(np.uint16),
        "peak": firings.peak,
        "lengths": firings.count.astype(np.uint16),
        "positions": firings.position.astype(np.uint16),
        "levels": np.round(firings.value / scale * STEPS).astype(np.uint16),
    }


def histogram_value(counts: np.ndarray) -> dict[str, np.ndarray]:
    """The bins from the first to the last that is not empty."""
    filled = counts > 0
    first = filled.argmax(1)
    lengths = np.where(filled.any(1), BINS - filled[:, ::-1].argmax(1) - first, 0)
    row = np.repeat(np.arange(len(counts)), lengths)
    return {
        "bins_first": first.astype(np.uint8),
        "bins_count": lengths.astype(np.uint8),
        "bins": counts[row, ranges(first, lengths)].astype(np.uint32),
    }


def near_value(near: Near | list[tuple[LoadedSae, str, Near]], rows: slice) -> Any:
    if isinstance(near, list):  # identified by weights too: another SAE may get the same label
        return [{"label": of.label, "sha256": of.sha256, "by": by, **near_value(one, rows)} for of, by, one in near]
    tokens = {} if near.tokens is None else {"tokens": near.tokens}
    return {"latents": near.latents[rows], "scores": near.scores[rows], **tokens}


def neighbours(shown: Shown, everyone: Sequence[Shown], config: Config, watch: Watch) -> dict[str, Any]:
    """Near latents of the same SAE, counterparts in the others, and what a hierarchy joins."""
    rows, together, others = shown.rows, shown.seen.together, most_alike(shown, everyone)
    writes_there = [other.subject.target_layers == shown.subject.target_layers for other in others]
    counterparts: list[tuple[LoadedSae, str, Near]] = []
    title, compared = f"browser, neighbours of {shown.subject.label}", len(rows) * (1 + sum(writes_there))
    with watch.stage(title, compared, "latents") as advance:  # each with a whole table: slow for wide SAEs
        with ThreadPoolExecutor(1, "saemill-browser") as worker:  # on one core, `by_direction` on the rest
            firing = worker.submit(by_firing, together, together, config.neighbours, is_same=True)
            kept = worker.submit(lambda: shown.kept)  # cached for when it is written
            direction = by_direction(rows, rows, config.neighbours, is_same=True, advance=advance)
            kept.result()
        found: dict[str, Any] = {"by_direction": direction, "by_firing": firing.result()}
        for other, is_there in zip(others, writes_there, strict=True):
            if is_there:
                near = by_direction(rows, other.rows, COUNTERPARTS, is_same=False, advance=advance)
                counterparts.append((other.subject, "direction", near))
            near = by_firing(together, other.seen.together, COUNTERPARTS, is_same=False)
            counterparts.append((other.subject, "firing", near))
    return found | {"others": counterparts} | hierarchy(shown)


def most_alike(shown: Shown, everyone: Sequence[Shown]) -> list[Shown]:
    """The other SAEs to compare an SAE with, those most alike in layer, variant and width, in the fleet's order. Not
    all, because each of the 4,032 pairs of 64 SAEs would take a second or more."""
    subject = shown.subject

    def distance(other: Shown) -> tuple[float, ...]:
        its = other.subject
        layers = abs(fmean(its.target_layers) - fmean(subject.target_layers))
        is_other = its.target_layers != subject.target_layers, its.variant != subject.variant
        return is_other[0], layers, is_other[1], abs(math.log(its.width / subject.width))

    chosen = sorted((other for other in everyone if other is not shown), key=distance)[:COMPARED]
    return [other for other in everyone if other in chosen]


def hierarchy(shown: Shown) -> dict[str, Near]:
    """Latents of the tier below that a latent is made of, and of the tier above that it is a part of."""
    membership = saved(shown.subject, TIERS)
    if membership is None:
        return {}
    tier = membership.cpu().numpy()
    found = {
        name: Near(np.full((len(tier), PARTS), -1, np.int32), np.zeros((len(tier), PARTS), np.float32))
        for name in ("made_of", "part_of")
    }
    for upper in range(1, int(tier.max(initial=0)) + 1):
        above, below = np.flatnonzero(tier == upper), np.flatnonzero(tier == upper - 1)
        if not len(above) or not len(below):
            continue
        learned = saved_composition(shown.subject, upper, len(above), len(below))
        join(found["made_of"], above, below, shown.rows, learned)
        join(found["part_of"], below, above, shown.rows, None if learned is None else learned.T)
    return found


def join(near: Near, own: np.ndarray, others: np.ndarray, rows: Tensor, learned: Tensor | None) -> None:
    """Join by the weights that training learned, if it did; otherwise by direction."""
    if learned is None:
        place = torch.as_tensor(own, device=rows.device), torch.as_tensor(others, device=rows.device)
        found = by_direction(rows[place[0]], rows[place[1]], PARTS, is_same=False)
        scores, latents = found.scores, found.latents
    else:
        values, chosen = learned.topk(min(PARTS, learned.shape[1]), dim=1)
        scores, latents = values.cpu().numpy(), chosen.cpu().numpy()
    count = scores.shape[1]
    near.latents[own, :count] = np.where(scores > 0, others[latents], -1)
    near.scores[own, :count] = scores


def promoted(
    shown: Shown, head: Head | None, count: int, words: Vocabulary, say: Callable[[str], None]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The tokens [F, K] whose logits each latent's direction raises most and lowers most, and by how much."""
    if head is None or len(shown.subject.target_layers) != 1:
        return {}

    def read(start: int, stop: int) -> list[np.ndarray]:
        logits, found = head.promotes(shown.rows[start:stop]).float(), []
        for sign in (1, -1):
            values, tokens = (sign * logits).topk(min(count, logits.shape[1]), dim=1)
            found += [tokens.cpu().numpy(), sign * values.cpu().numpy()]
        return found

    size = PieceSize(256, "latents before the head", say)
    up, raised, down, lowered = map(np.concatenate, zip(*in_pieces(len(shown.rows), size, read), strict=True))
    return {
        "promoted": (words.include(up), raised.astype(np.float32)),
        "suppressed": (words.include(down), lowered.astype(np.float32)),
    }


def write_columns(
    folder: Folder, shown: Shown, tokens: Mapping[str, tuple[np.ndarray, np.ndarray]], peak_tokens: np.ndarray
) -> None:
    """What the list sorts and searches by."""
    seen = shown.seen
    kept, reasons = shown.kept
    marks = {name: saved(shown.subject, place) for name, place in MARKS.items()}
    folder.write(
        f"{shown.folder}/columns",
        {
            "fired": seen.fired.astype(np.uint32),
            "mean": (seen.mass / np.maximum(seen.fired, 1)).astype(np.float32),
            "highest": seen.highest,
            "token": top_tokens(kept, reasons, peak_tokens, shown.subject.width),
            **({"promoted": tokens["promoted"][0][:, :3]} if tokens else {}),
            "part_tokens": seen.part_tokens.astype(np.uint32),
            "marks": {name: mark.cpu().numpy().astype(np.int32) for name, mark in marks.items() if mark is not None},
        },
    )


def top_tokens(kept: Firings, reasons: np.ndarray, peak_tokens: np.ndarray, width: int) -> np.ndarray:
    """int32 [F]: the token that most of a latent's strongest examples peak on; in a tie, the strongest one's."""
    top = np.flatnonzero(reasons & TOP)
    latent, token = kept.latent[top], peak_tokens[top]
    pairs, first, counts = np.unique(latent.astype(np.int64) << 32 | token, return_index=True, return_counts=True)
    best = largest((pairs >> 32).astype(np.int32), counts - first / (len(top) + 1), 1)
    found = np.full(width, -1, np.int32)
    found[pairs[best] >> 32] = pairs[best] & 0xFFFFFFFF
    return found
