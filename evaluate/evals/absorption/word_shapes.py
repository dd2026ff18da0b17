"""A word's shape instead of its first letter: a class that even the pocket model knows.

Small models do not learn how their tokens are spelled, but whether a token begins a word, and whether it is a name,
a constant or plain text, they must know to go on.
"""

from __future__ import annotations

from .vocabulary import WordClasses

SHAPES = ("inside", "Inside", "INSIDE", "word", "Word", "WORD")
"""Lower case, capitalised and upper case; inside a word or name, and at the start of one."""


def shape_index(word: str) -> int:
    letters = word.removeprefix(" ")
    case = 0 if letters.islower() else 2 if letters.isupper() and len(letters) > 1 else 1
    return case + 3 * word.startswith(" ")


def shape_of(word: str) -> str:
    return SHAPES[shape_index(word)]


WORD_SHAPES = WordClasses(SHAPES, shape_index, shape_of, "{word} is:")
