"""What pages that are read in a browser share: their look, their charts, and how data reach a script."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILES = Path(__file__).parent / "web_files"


def web_file(name: str) -> str:
    return (FILES / name).read_text(encoding="utf-8")


def script_json(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """JSON that may stand in a script: ASCII, and `<` is escaped: text of a corpus cannot end a script or begin one."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"), default=default).replace("<", "\\u003c")
