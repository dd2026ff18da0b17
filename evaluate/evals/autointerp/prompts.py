"""What the judge is asked, and how its answers are read.

The wording is ours, not SAEBench's. Whoever changes it increases the evaluation's `revision`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MARKS = "<<", ">>"
THINKING, THOUGHT = "<think>", "</think>"  # around what a reasoning model says before its answer
MOST_LETTERS = 500  # of an explanation
MOST_DIGITS = 4


def ask_to_explain(passages: Sequence[str]) -> str:
    begin, end = MARKS
    return (
        "One unit of a language model's sparse autoencoder is active on some tokens and silent on all others. The "
        f"passages below come from texts in which it is active; each token on which it is active stands between "
        f"{begin} and {end}. The passages with the highest activation come first. The sign \u21b5 is a line break.\n\n"
        f"{numbered(passages)}\n\n"
        "What do the marked tokens have in common? It may be a word or a part of one, a kind of word, a subject, a "
        "place in the sentence or the text, or a matter of spelling and layout. Cover most of the marked tokens, not "
        "only a few, and do not list examples at length. Reply with one short phrase of at most 20 words that "
        "completes the sentence: The unit is active on ..."
    )


def ask_to_score(explanation: str, passages: Sequence[str]) -> str:
    return (
        "One unit of a language model's sparse autoencoder is active on some tokens and silent on all others. "
        f"According to a short description, it is active on: {explanation}\n\n"
        f"Here are {len(passages)} passages in random order. The sign \u21b5 is a line break.\n\n"
        f"{numbered(passages)}\n\n"
        "In which of them would the unit be active on at least one token, if the description is right? Take the "
        "description in its broad sense. Reply with the numbers of these passages alone, separated by commas, or with "
        "the word none."
    )


def numbered(passages: Sequence[str]) -> str:
    return "\n".join(f"{number}. {passage}" for number, passage in enumerate(passages, 1))


def read_explanation(answer: str) -> str | None:
    """The phrase on one line; None if there is none, such as where the tokens ended before the reasoning did."""
    text = " ".join(answer.rpartition(THOUGHT)[2].split())
    if text.startswith(THINKING):
        return None
    text = re.sub(r"^the unit is active on\b[ :.]*", "", text, flags=re.IGNORECASE).strip("\"'` .")
    return text[:MOST_LETTERS] or None


def read_numbers(answer: str) -> list[int] | None:
    """The passages that the judge names, [] for none; None if it says anything else."""
    words = re.findall(r"[^\s,;\[\]]+", answer.rpartition(THOUGHT)[2].lower().strip().removesuffix("."))
    if not words or not all(is_number(word) or word in ("and", "none") for word in words):
        return None
    return sorted({int(word) for word in words if is_number(word)})


def is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= MOST_DIGITS
