"""temporal: how much codes remember from token to token, at three scales, and which latent follows which.

TCS (temporal consistency score), by scale: mean cosine of codes at the scale's lags, less what shuffled order
would give. FSM (feature stability metric), by latent: P(active next | active) over its base rate.
SAEs that were trained without temporal groups have equal shares of their dictionary for groups.
F latents, M latents in the transition matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...cache_schema.strict import to_json
from ..context.ordinary_rows import ordinary_rows
from ..context.split_windows import read_windows
from ..model.windows import Windows
from .contract import Context, Evaluation, Failure, LoadedSae, Needs, Result
from .measures.assignment import Assignment, groups_of
from .measures.temporal import SCALES, Consistency, Persistence, consistency, persistence, segments, transitions

ALL = "all"


@dataclass(frozen=True)
class Config:
    windows: int = 128
    """Of the test split."""
    batch_windows: int = 16
    least_firings: int = 20
    """A latent that fired less often has no stability worth the name."""
    most_frequent: int = 24
    """Latents in the transition matrix."""


@dataclass(eq=False)
class Seen:
    """What a pass over windows leaves of one SAE."""

    groups: Assignment
    consistency: dict[str, Consistency] = field(default_factory=dict)
    persistence: Persistence | None = None
    frequent: Tensor | None = None  # chosen by the first batch
    transition_counts: Tensor | None = None

    def take(self, acts_WTF: Tensor, batch: Windows, rows_WT: Tensor, most_frequent: int) -> None:
        segment = segments(rows_WT, batch.documents)
        for name, members in {ALL: slice(None), **self._by_group()}.items():
            found = consistency(acts_WTF[:, :, members], segment)
            self.consistency[name] = self.consistency[name] + found if name in self.consistency else found
        found = persistence(acts_WTF, segment)
        self.persistence = found if self.persistence is None else self.persistence + found
        if self.frequent is None:
            self.frequent = found.fired.topk(min(most_frequent, len(found.fired))).indices
        counts = transitions(acts_WTF[:, :, self.frequent], segment)
        self.transition_counts = counts if self.transition_counts is None else self.transition_counts + counts

    def _by_group(self) -> dict[str, Any]:
        """The latents that are to be consistent at each scale."""
        return {scale: self.groups.members(number) for number, scale in enumerate(SCALES)}


def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    seen = {subject: Seen(groups_of(subject, len(SCALES) + 1)) for subject in subjects}
    for batch in read_windows(context, subjects, "temporal", config.windows, config.batch_windows):
        for subject in subjects:
            rows = ordinary_rows(context, subject, batch)
            seen[subject].take(subject.encode(batch) * rows[:, :, None], batch, rows, config.most_frequent)
    for subject, one in seen.items():
        metrics = {"consistency": consistency_scores(one), "stability": stability(one, config)}
        yield Result(subject, to_json(config), metrics, unstructured=patterns(one, config))


def consistency_scores(seen: Seen) -> dict[str, float]:
    """By scale: of the whole code, and of the latents that belong to the scale."""
    whole = seen.consistency[ALL].scores()
    found = {
        f"{name}_{scale}": value
        for scale, values in whole.items()
        for name, value in values.items()
        if seen.consistency[ALL].pairs[list(SCALES).index(scale)] > 0
    }
    own = {
        scale: seen.consistency[scale].scores()[scale]["tcs"]
        for number, scale in enumerate(SCALES)
        if seen.consistency[ALL].pairs[number] > 0
    }
    return found | {f"tcs_own_{scale}": value for scale, value in own.items()}


def stability(seen: Seen, config: Config) -> dict[str, float]:
    """Over latents that fired often enough; `measured` says how many there are."""
    assert seen.persistence is not None
    counts = seen.persistence
    often = counts.fired >= config.least_firings
    found: dict[str, float] = {"measured": int(often.sum())}
    if not often.any():
        return found
    lifetime, fsm, stay = (table[often] for table in (counts.lifetime, counts.stability, counts.stay))
    return found | {
        "fsm_mean": float(fsm.mean()),
        "fsm_median": float(fsm.median()),
        "stay_mean": float(stay.mean()),
        "lifetime_mean": float(lifetime.mean()),
        "lifetime_by_firing": float(counts.fired.sum() / counts.runs.sum().clamp_min(1)),
    }


def patterns(seen: Seen, config: Config) -> dict[str, Any]:
    """For plots: the transition matrix of the most frequent latents, and every latent's lifetime."""
    assert seen.persistence is not None and seen.frequent is not None and seen.transition_counts is not None
    counts, often = seen.persistence, seen.persistence.fired >= config.least_firings
    from_M = counts.followed[seen.frequent].clamp_min(1)
    return {
        "groups": seen.groups.source,
        "frequent_latents": seen.frequent.tolist(),
        "base_rates": counts.base[seen.frequent].tolist(),
        "transitions": (seen.transition_counts / from_M[:, None]).tolist(),
        "lifetimes": [round(value, 3) for value in counts.lifetime[often].tolist()],
        "stabilities": [round(value, 3) for value in counts.stability[often].tolist()],
    }


EVALUATION = Evaluation(
    Config,
    evaluate,
    needs=Needs(store=True),
    summary=("consistency.tcs_short", "consistency.tcs_long", "stability.fsm_median", "stability.lifetime_mean"),
)
