"""temporal: how persistent codes are from token to token, at three scales, and which latent follows which.

TCS (temporal consistency score), by scale: mean cosine of codes at the scale's lags, minus that under shuffled order.
FSM (feature stability metric), by latent: P(active next | active) over its base rate. SAEs trained without temporal
groups get equal shares of their dictionary as groups.

W windows, T context, F latents, M latents in the transition matrix. Pairs lie in one window and in one document, with
no special token at either end. `follows` [W, T] marks tokens whose predecessor makes such a pair; `segment` [W, T]
numbers the stretches within one document, -1 where a token takes no part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...cache_schema.strict_json import to_json
from ..context.stored_windows import TextCount, ordinary_rows, read_windows, say_if_fewer, sums_of_codes
from ..model.batches import Sums, Windows
from .evaluation_contract import Context, Evaluation, Failure, LoadedSae, Needs, Result, remark_of
from .measures.assignment import Assignment, groups_of

SCALES: Mapping[str, tuple[int, int]] = {"short": (1, 4), "medium": (5, 16), "long": (17, 128)}
"""First and last lag of each scale, in tokens."""
ALL = "all"


@dataclass(frozen=True)
class Config:
    windows: int = 128
    """Of the test split."""
    batch_windows: int = 16
    least_firings: int = 20
    """A latent that fired less often has no meaningful stability."""
    most_frequent: int = 24
    """Latents in the transition matrix."""


@dataclass(eq=False)
class Seen:
    groups: Assignment
    frequent: Tensor  # the latents of the transition matrix
    consistency: dict[str, Consistency] = field(default_factory=dict)
    text: TextCount = field(default_factory=TextCount)
    persistence: Persistence = field(init=False)
    transition_counts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        none = torch.zeros(4, len(self.groups.of_latent), dtype=torch.float64, device=self.frequent.device)
        self.persistence = Persistence(0, *none)
        self.transition_counts = none.new_zeros(len(self.frequent), len(self.frequent))

    def take(self, acts_WTF: Tensor, batch: Windows, rows_WT: Tensor) -> None:
        assert batch.documents is not None, "windows of a store have documents"
        segment = segments(rows_WT, batch.documents)
        of_scales = {scale: self.groups.members(number) for number, scale in enumerate(SCALES)}
        for name, members in {ALL: slice(None), **of_scales}.items():
            found = consistency(acts_WTF[:, :, members], segment)
            self.consistency[name] = self.consistency[name] + found if name in self.consistency else found
        self.persistence += persistence(acts_WTF, segment)
        self.transition_counts += transitions(acts_WTF[:, :, self.frequent], segment)


def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    say_if_fewer(context, "temporal", config)
    frequent = choose_frequent(context, subjects, config)
    seen = {subject: Seen(groups_of(subject, len(SCALES) + 1), frequent[subject]) for subject in subjects}
    for batch in read_windows(context, subjects, "temporal", config.windows, config.batch_windows):
        for subject in subjects:
            rows = ordinary_rows(context, subject, batch)
            seen[subject].text.add(batch, rows)
            seen[subject].take(subject.encode(batch) * rows[:, :, None], batch, rows)
    for subject, one in seen.items():
        metrics = {"consistency": consistency_scores(one), "stability": stability(one, config)}
        rare = None if metrics["stability"]["measured"] else f"no latent fired {config.least_firings} times"
        found, remark = patterns(one, config), remark_of(too_short(one), rare)
        yield Result(subject, to_json(config), metrics, unstructured=found, remark=remark, measured_on=str(one.text))


def choose_frequent(context: Context, subjects: Sequence[LoadedSae], config: Config) -> dict[LoadedSae, Tensor]:
    count, title = min(config.windows, 16), "temporal: latents"
    fired = sums_of_codes(context, subjects, title, count, config.batch_windows, lambda acts: (acts > 0).sum(0))
    return {
        subject: fired_F.topk(min(config.most_frequent, len(fired_F))).indices
        for subject, (fired_F, _) in fired.items()
    }


def consistency_scores(seen: Seen) -> dict[str, float]:
    """Scores by scale: of the whole code, and of the latents that belong to the scale."""
    found, own = dict[str, float](), dict[str, float]()
    for scale, pairs in zip(SCALES, seen.consistency[ALL].pairs.tolist(), strict=True):
        if pairs:
            found |= {f"{name}_{scale}": value for name, value in seen.consistency[ALL].scores()[scale].items()}
            own[f"tcs_own_{scale}"] = seen.consistency[scale].scores()[scale]["tcs"]
    return found | own


def too_short(seen: Seen) -> str | None:
    """Which scales have no numbers, and why."""
    absent = [scale for scale, pairs in zip(SCALES, seen.consistency[ALL].pairs.tolist(), strict=True) if not pairs]
    if not absent:
        return None
    lag = SCALES[absent[0]][0]
    return f"no numbers for {', '.join(absent)} lags: no two tokens of one window and document are {lag} apart"


def stability(seen: Seen, config: Config) -> dict[str, float]:
    """Measures over latents that fired often enough; `measured` is their number."""
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


def segments(keep_WT: Tensor, documents_WT: Tensor) -> Tensor:
    """int64 [W, T]: the document of each token that takes part, -1 elsewhere."""
    return torch.where(keep_WT, documents_WT.long(), -1)


def follows(segment_WT: Tensor) -> Tensor:
    """bool [W, T]: the token and the one before it take part and lie in one document."""
    same = (segment_WT[:, 1:] == segment_WT[:, :-1]) & (segment_WT[:, 1:] >= 0)
    return functional.pad(same, (1, 0))


@dataclass(frozen=True, eq=False)
class Consistency(Sums):
    """Sums of cosines over pairs, by scale."""

    in_order: Tensor  # float64 [scales]
    shuffled: Tensor  # float64 [scales]
    pairs: Tensor  # float64 [scales]

    def scores(self) -> dict[str, dict[str, float]]:
        """For each scale: mean cosine in order, the same under shuffled order, and their difference, the TCS."""
        pairs = self.pairs.clamp_min(1)
        ordered, shuffled = (self.in_order / pairs).tolist(), (self.shuffled / pairs).tolist()
        return {
            scale: {"tcs": ordered[i] - shuffled[i], "cosine": ordered[i], "cosine_shuffled": shuffled[i]}
            for i, scale in enumerate(SCALES)
        }


def consistency(acts_WTF: Tensor, segment_WT: Tensor) -> Consistency:
    """Cosines between codes at the lags of each scale, in order and expected under shuffling of each stretch.

    Shuffling makes all pairs of a stretch equally likely, so the expectation is their mean, and nothing needs to be
    drawn. A token on which nothing fires has cosine 0 with all.
    """
    unit_WTF = functional.normalize(acts_WTF, dim=2)
    cosine = unit_WTF @ unit_WTF.mT
    same = (segment_WT[:, :, None] == segment_WT[:, None, :]) & (segment_WT >= 0)[:, :, None]
    place = torch.arange(segment_WT.shape[1], device=segment_WT.device)
    lag = place[:, None] - place
    paired = same & (lag > 0)  # with an earlier key
    usual = _mean_of_stretch(cosine, same, paired)
    chosen = [paired & (lag >= first) & (lag <= last) for first, last in SCALES.values()]
    return Consistency(
        torch.stack([cosine[pairs].double().sum() for pairs in chosen]),
        torch.stack([usual[pairs].double().sum() for pairs in chosen]),
        torch.stack([pairs.sum() for pairs in chosen]).double(),
    )


@dataclass(frozen=True, eq=False)
class Persistence(Sums):
    """Counts of each latent over tokens."""

    tokens: int
    fired: Tensor  # float64, tokens on which it fires
    runs: Tensor  # float64, unbroken stretches of firing
    followed: Tensor  # float64, firings that have a next token
    stayed: Tensor  # float64, firings after which it fires on the next token too

    @property
    def stay(self) -> Tensor:
        """P(active at i + 1 | active at i)."""
        return self.stayed / self.followed.clamp_min(1)

    @property
    def base(self) -> Tensor:
        """P(active)."""
        return self.fired / max(self.tokens, 1)

    @property
    def stability(self) -> Tensor:
        """FSM: how much likelier a latent is to fire right after it fired; 1 if that makes no difference."""
        return self.stay / self.base.clamp_min(1e-12)

    @property
    def lifetime(self) -> Tensor:
        """Mean length in tokens of an unbroken stretch of firing; 0 for a latent that never fires."""
        return self.fired / self.runs.clamp_min(1)


def persistence(acts_WTF: Tensor, segment_WT: Tensor) -> Persistence:
    """What each latent does from one token to the next."""
    on = (acts_WTF > 0) & (segment_WT >= 0)[:, :, None]
    joined = follows(segment_WT)[:, 1:, None]
    both = on[:, 1:] & on[:, :-1] & joined
    fired, stayed = on.sum((0, 1)).double(), both.sum((0, 1)).double()
    followed = (on[:, :-1] & joined).sum((0, 1)).double()
    return Persistence(int((segment_WT >= 0).sum()), fired, fired - stayed, followed, stayed)


def transitions(acts_WTM: Tensor, segment_WT: Tensor) -> Tensor:
    """float64 [M, M]: how often the column's latent fires on the token after one on which the row's fires."""
    on = (acts_WTM > 0) & (segment_WT >= 0)[:, :, None]
    after = (on[:, 1:] & follows(segment_WT)[:, 1:, None]).flatten(0, 1).float()
    return (on[:, :-1].flatten(0, 1).float().T @ after).double()


def _mean_of_stretch(cosine_WTT: Tensor, same_WTT: Tensor, paired_WTT: Tensor) -> Tensor:
    """[W, T, T]: for each pair, the mean cosine over all pairs of its stretch.

    A special token may interrupt a stretch, so sums go by membership (`same`), not by position.
    """
    member = same_WTT.float()
    of_query = torch.where(paired_WTT, cosine_WTT, 0.0).sum(2, keepdim=True)
    count_of_query = paired_WTT.sum(2, keepdim=True).float()
    return (member @ of_query / (member @ count_of_query).clamp_min(1)).expand_as(cosine_WTT)


EVALUATION = Evaluation(
    Config,
    evaluate,
    needs=Needs(store=True),
    summary=("consistency.tcs_short", "consistency.tcs_long", "stability.fsm_median", "stability.lifetime_mean"),
    least={"most_frequent": 1},
)
