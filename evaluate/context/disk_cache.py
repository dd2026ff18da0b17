"""What takes a model long to find out is kept on disk, as JSON named for all that decides it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ...train.disk.whole_files import replace_file
from ..model.lm import LanguageModel


def remembered(folder: Path, name: str, decided_by: Iterable[str], compute: Callable[[], Any]) -> Any:
    """What `compute` returned when it was first asked for by these strings; it must fit into JSON."""
    file = folder / f"{name}-{_digest(decided_by)}.json"
    if file.is_file():
        return json.loads(file.read_text())
    found = compute()
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, json.dumps(found).encode())
    return found


def model_print(model: LanguageModel) -> str:
    """What tells a model from others: tokenizer, dtype, and the sum of every parameter, which is cheap."""
    sums = [float(parameter.float().sum()) for parameter in model.stack.parameters()]
    return json.dumps([model.tokenizer.digest, str(model.dtype), sums])


def _digest(parts: Iterable[str]) -> str:
    total = hashlib.sha256()
    for part in parts:
        raw = part.encode()
        total.update(len(raw).to_bytes(8, "little") + raw)
    return total.hexdigest()[:16]
