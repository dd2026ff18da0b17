"""Pairs of prompts: the entity of one passes an attribute to that of the other.

Cause: the base asks for the attribute that is swapped, the source's label differs, and the answer must become the
source's. Isolation: both ask for another attribute, and the base's own answer must stay.

Scores say how often the right string came. SAEBench recognises a pair for isolation by its equal first tokens, so a
cause pair whose two labels begin with the same token is counted there, with the source's label: that is kept under
SAEBench's keys. Scores by what each pair was made for are our own (`by_kind`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from ...errors import NotApplicable
from .answers import is_right
from .prompts import Prompt


@dataclass(frozen=True)
class Pair:
    base: Prompt
    source: Prompt
    is_cause: bool

    @property
    def label(self) -> str:
        """What the answer to the base must be once the source's latents are put in."""
        return self.source.label if self.is_cause else self.base.label

    @property
    def target_token(self) -> int:
        """The first token of that answer."""
        return self.source.first_token if self.is_cause else self.base.first_token


def require_labels(prompts: Sequence[Prompt], attributes: Sequence[str]) -> None:
    """Require two labels of each attribute to draw pairs from."""
    for attribute in attributes:
        labels = {prompt.label for prompt in prompts if prompt.attribute == attribute}
        if len(labels) < 2:
            raise NotApplicable(
                f"RAVEL: the model answers prompts about {attribute!r} with {len(labels)} different labels, "
                "but swapping needs two. A larger model knows more"
            )


def draw_pairs(
    prompts: Sequence[Prompt], cause: str, others: Sequence[str], number: int, draw: random.Random
) -> list[Pair]:
    """As many pairs for isolation as for cause, in random order; draws are made in SAEBench's order."""
    cause_pairs = _pairs(prompts, cause, number, draw, is_cause=True)
    isolation_pairs = [pair for other in others for pair in _pairs(prompts, other, number, draw, is_cause=False)]
    draw.shuffle(isolation_pairs)
    pairs = cause_pairs + isolation_pairs[: len(cause_pairs)]
    draw.shuffle(pairs)
    return pairs


def _pairs(
    prompts: Sequence[Prompt], attribute: str, number: int, draw: random.Random, *, is_cause: bool
) -> list[Pair]:
    """Bases drawn without repetition (all of them if there are fewer), each with any source of another label."""
    asking = [prompt for prompt in prompts if prompt.attribute == attribute]
    sources = {label: [one for one in asking if one.label != label] for label in {prompt.label for prompt in asking}}
    bases = asking if len(asking) < number else draw.sample(asking, number)
    return [Pair(base, draw.choice(sources[base.label]), is_cause) for base in bases]


@dataclass(frozen=True)
class Scores:
    cause: float
    isolation: float

    @property
    def disentangle(self) -> float:
        return (self.cause + self.isolation) / 2

    def to_json(self) -> dict[str, float]:
        return {"cause_score": self.cause, "isolation_score": self.isolation, "disentangle_score": self.disentangle}


def by_first_token(pairs: Sequence[Pair], completions: Sequence[str]) -> Scores:
    """Scores by SAEBench's rule."""
    return _scores(pairs, completions, lambda pair: pair.target_token != pair.base.first_token)


def by_kind(pairs: Sequence[Pair], completions: Sequence[str]) -> Scores:
    """Scores by what each pair was made for."""
    return _scores(pairs, completions, lambda pair: pair.is_cause)


def mean_scores(scores: Sequence[Scores]) -> Scores:
    return Scores(fmean(each.cause for each in scores), fmean(each.isolation for each in scores))


def _scores(pairs: Sequence[Pair], completions: Sequence[str], is_cause: Callable[[Pair], bool]) -> Scores:
    right: dict[bool, list[bool]] = {True: [], False: []}
    for pair, completion in zip(pairs, completions, strict=True):
        right[is_cause(pair)].append(is_right(pair.base.text, pair.label, completion))
    return Scores(*(fmean(found) if found else math.nan for found in right.values()))  # results have NaN as -1
