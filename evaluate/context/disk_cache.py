"""A disk cache of values that take a model long to compute: JSON files, named after everything that decides a value."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...train.disk.atomic_files import replace_file
from ..model.prefix_suffix import LanguageModel


def decided_by(**facts: Any) -> str:
    """A name for the value that these facts decide: a cached value is found only by exactly the same facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def remembered(folder: str | Path, name: str, decided: str, compute: Callable[[], Any]) -> Any:
    """What `compute` returned when first called under this name; it must be JSON.

    A damaged file is ignored. If none can be written, or the user has no home, as in some containers, the value is
    computed again next time.
    """
    try:
        file = Path(folder).expanduser() / f"{name}-{decided}.json"
    except RuntimeError:
        return compute()
    with suppress(OSError, ValueError, RecursionError):
        return json.loads(file.read_bytes())
    found = compute()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(found).encode())
    return found


def model_print(model: LanguageModel) -> str:
    """A cheap fingerprint of a model: tokenizer, dtype, and the sum of every parameter, including the head's."""
    sums = [float(parameter.float().sum()) for parameter in model.model.parameters()]
    return json.dumps([model.tokenizer.digest, str(model.dtype), sums])
