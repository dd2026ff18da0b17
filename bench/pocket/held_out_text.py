"""The documents that the pocket model was not trained on, kept next to this file.

Another version of Python changes some files of its library, so a file whose text is held out there may have been
trained on here. The held-out documents of the training are therefore kept, as compressed JSON, except those that mostly
repeat other documents.
"""

import hashlib
import json
import lzma
from collections.abc import Iterable
from pathlib import Path

HELD_OUT_PER_MILLE = 40
HELD_OUT_FILE = Path(__file__).parent / "held_out.json.xz"


def is_held_out(text: str) -> bool:
    """Whether a document is held out, decided by a hash of its text."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < HELD_OUT_PER_MILLE


def without_repeats(held_out: Iterable[tuple[str, str]], trained: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The held-out documents that have at most half of their lines in a trained document too."""
    known = {line for _, text in trained for line in _distinctive_lines(text)}
    return [(name, text) for name, text in held_out if _share_known(text, known) <= 0.5]


def held_out_documents(file: Path = HELD_OUT_FILE) -> list[tuple[str, str]]:
    """(name, text) of every held-out document, in the order of the library."""
    return [(name, text) for name, text in json.loads(lzma.decompress(file.read_bytes()))]


def write_held_out(documents: Iterable[tuple[str, str]], file: Path = HELD_OUT_FILE) -> None:
    raw = json.dumps(list(documents), ensure_ascii=False).encode("utf-8")
    file.write_bytes(lzma.compress(raw, preset=9))


def _distinctive_lines(text: str) -> list[str]:
    """Lines long enough that two documents rarely share one by chance."""
    return [line.strip() for line in text.splitlines() if len(line.strip()) >= 30]


def _share_known(text: str, known: set[str]) -> float:
    lines = _distinctive_lines(text)
    return sum(line in known for line in lines) / max(1, len(lines))
