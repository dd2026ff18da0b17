"""The running Python's own standard library, read as a corpus of documents.

Every machine that can run the project has this text, so a demo, a test and the
pocket model need no download. What builds generate, sites install or container
images drop is left out, so that the same Python gives the same text; where a
distribution patched a file after all, `text_digest` shows it.

1. Walk the library folder in sorted order and keep `.py` files.
2. Leave out tests, graphical tools, packaging helpers, generated tables and
   anything a site installed.
3. Decode a file as the interpreter itself would; skip what does not decode or
   holds a zero byte.
4. One file is one document, but for the language reference of `pydoc`, whose
   topics are documents of plain English of their own.

Held-out text is kept with the pocket model. Another Python version has the same library slightly changed, so a file
that is held out by its text there may have been trained on here. The documents that were held out in training
therefore travel with the model, as compressed JSON, less those that only repeat what other documents say.
"""

import ast
import hashlib
import io
import json
import lzma
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

EXCLUDED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",  # generated tables of code points
        "ensurepip",  # bundles wheels, removed by distributions
        "idlelib",  # a package of its own on many systems
        "lib-dynload",
        "site-packages",
        "test",  # left out of most container images
        "tests",
        "tkinter",
        "turtledemo",
    }
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "turtle", "sitecustomize", "usercustomize")
TOPICS_FILE = "pydoc_data/topics.py"
MIN_CHARACTERS = 64  # empty package markers are not documents


def stdlib_documents(root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document, in the order of their names.

    `root` is the library folder; the running interpreter's by default.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    for name in sorted(_source_names(root)):
        text = _decode((root / name).read_bytes())
        if text is None:
            continue
        for document_name, document in _split(name, text):
            if len(document.strip()) >= MIN_CHARACTERS:
                yield document_name, document


def text_digest(documents: Iterable[tuple[str, str]]) -> str:
    """SHA-256 over names and texts: equal digests mean the same corpus."""
    digest = hashlib.sha256()
    for name, text in documents:
        for part in (name, text):
            raw = part.encode("utf-8")
            digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def _source_names(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not _is_left_out(name)]
        for file in files:
            if file.endswith(".py") and not file.startswith(EXCLUDED_PREFIXES):
                yield (Path(folder) / file).relative_to(root).as_posix()


def _is_left_out(folder: str) -> bool:
    return folder in EXCLUDED_FOLDERS or folder.startswith("config-")  # config-3.11-...: of this build alone


def _decode(raw: bytes) -> str | None:
    """The text of a source file, by its declared encoding; None where it has none."""
    if b"\0" in raw:
        return None
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return raw.decode(encoding).replace("\r\n", "\n")
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None


def _split(name: str, text: str) -> Iterator[tuple[str, str]]:
    topics = _topics(text) if name == TOPICS_FILE else None
    if topics is None:
        yield name, text
        return
    for topic in sorted(topics):
        yield f"{name}:{topic}", topics[topic].strip() + "\n"


def _topics(text: str) -> dict[str, str] | None:
    """The dictionary that the file assigns to `topics`, read without running it."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return None


HELD_OUT_PER_MILLE = 40
HELD_OUT_FILE = Path(__file__).parent / "held_out.json.xz"


def is_held_out(text: str) -> bool:
    """Whole documents, chosen by a hash of their text."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < HELD_OUT_PER_MILLE


def without_repeats(held_out: Iterable[tuple[str, str]], trained: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The held-out documents of whose lines at most half stand in a trained document too."""
    known = {line for _, text in trained for line in _telling_lines(text)}
    return [(name, text) for name, text in held_out if _share_known(text, known) <= 0.5]


def held_out_documents(file: Path = HELD_OUT_FILE) -> list[tuple[str, str]]:
    """(name, text) of every held-out document, in the order of the library."""
    return [(name, text) for name, text in json.loads(lzma.decompress(file.read_bytes()))]


def write_held_out(documents: Iterable[tuple[str, str]], file: Path = HELD_OUT_FILE) -> None:
    raw = json.dumps(list(documents), ensure_ascii=False).encode("utf-8")
    file.write_bytes(lzma.compress(raw, preset=9))


def _telling_lines(text: str) -> list[str]:
    """Lines long enough that two documents hardly share one by chance."""
    return [line.strip() for line in text.splitlines() if len(line.strip()) >= 30]


def _share_known(text: str, known: set[str]) -> float:
    lines = _telling_lines(text)
    return sum(line in known for line in lines) / max(1, len(lines))
