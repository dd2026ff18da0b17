"""Text the pocket model has never seen, kept with it.

Another Python version has the same library slightly changed, so a file that is
held out by its text there may have been trained on here. The documents that were
held out in training therefore travel with the model, as compressed JSON.
"""

import hashlib
import json
import lzma
from collections.abc import Iterable
from pathlib import Path

HELD_OUT_PER_MILLE = 40
HELD_OUT_FILE = Path(__file__).parent / "held_out.json.xz"


def is_held_out(text: str) -> bool:
    """Whole documents, chosen by a hash of their text."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < HELD_OUT_PER_MILLE


def held_out_documents(file: Path = HELD_OUT_FILE) -> list[tuple[str, str]]:
    """(name, text) of every held-out document, in the order of the library."""
    return [(name, text) for name, text in json.loads(lzma.decompress(file.read_bytes()))]


def write_held_out(documents: Iterable[tuple[str, str]], file: Path = HELD_OUT_FILE) -> None:
    raw = json.dumps(list(documents), ensure_ascii=False).encode("utf-8")
    file.write_bytes(lzma.compress(raw, preset=9))
