"""Texts that differ in order alone: what a bag of words cannot tell apart.

`first`      a piece of code and a piece of prose: which came first
`reordered`  the words of a snippet as they were written, or shuffled
`position`   a piece of prose at the beginning, in the middle or at the end of code

Every class holds the same pieces, so that only their order says which class a text is of.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from .stdlib import Kind, Snippet

Groups = dict[str, list[str]]


def first(snippets: Sequence[Snippet], count: int, rng: random.Random) -> Groups:
    """Which of two pieces came first."""
    pairs = list(
        zip(_pieces(snippets, "code", count, rng, 60), _pieces(snippets, "prose", count, rng, 60), strict=True)
    )
    return {
        "code_first": [f"{code}\n{prose}" for code, prose in pairs],
        "prose_first": [f"{prose}\n{code}" for code, prose in pairs],
    }


def reordered(snippets: Sequence[Snippet], count: int, rng: random.Random) -> Groups:
    """The same words, as written or shuffled."""
    written = [" ".join(text.split()) for text in _drawn(snippets, "prose", count, rng)]
    return {"as_written": written, "shuffled": [_shuffled(text, rng) for text in written]}


def position(snippets: Sequence[Snippet], count: int, rng: random.Random) -> Groups:
    """Where among the pieces of code the prose stands."""
    codes = [(code[:36], code[36:]) for code in _pieces(snippets, "code", count, rng, 72)]
    parts = list(zip(_pieces(snippets, "prose", count, rng, 45), codes, strict=True))
    return {
        "beginning": [f"{prose}\n{one}\n{two}" for prose, (one, two) in parts],
        "middle": [f"{one}\n{prose}\n{two}" for prose, (one, two) in parts],
        "end": [f"{one}\n{two}\n{prose}" for prose, (one, two) in parts],
    }


TASKS: dict[str, Callable[[Sequence[Snippet], int, random.Random], Groups]] = {
    "first": first,
    "reordered": reordered,
    "position": position,
}


def _drawn(snippets: Sequence[Snippet], kind: Kind, count: int, rng: random.Random) -> list[str]:
    return rng.sample([snippet.text for snippet in snippets if snippet.kind == kind], count)


def _pieces(snippets: Sequence[Snippet], kind: Kind, count: int, rng: random.Random, characters: int) -> list[str]:
    """The beginnings of drawn snippets: short enough that no class is cut at the end more than another."""
    return [text[:characters] for text in _drawn(snippets, kind, count, rng)]


def _shuffled(text: str, rng: random.Random) -> str:
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)
