"""What takes a model long to find out is kept on disk, as JSON named for all that decides it."""

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
    """The name of what these facts decide, all that do: a kept value is found again by the same facts alone."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def remembered(folder: str | Path, name: str, decided: str, compute: Callable[[], Any]) -> Any:
    """What `compute` returned when it was first asked for under this name; it must fit into JSON.

    A damaged file is none, and a disk that takes no file costs no result: it is computed again next time. Nor does a
    user without a home, as in containers.
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
    """What distinguishes a model from others: tokenizer, dtype, and the sum of every parameter, the head's too: it is
    cheap."""
    sums = [float(parameter.float().sum()) for parameter in model.model.parameters()]
    return json.dumps([model.tokenizer.digest, str(model.dtype), sums])
