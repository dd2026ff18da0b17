"""The look and the charts that all pages share, and how data reach their scripts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILES = Path(__file__).parent / "web_files"


def web_file(name: str) -> str:
    return (FILES / name).read_text(encoding="utf-8")


def script_json(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """JSON that is safe inside a script: ASCII with `<` escaped, so corpus text can neither end nor begin one."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"), default=default).replace("<", "\\u003c")
