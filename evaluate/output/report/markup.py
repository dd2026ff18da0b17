"""HTML from parts, so that nothing reaches the page unescaped.

Corpus text is hostile: it may hold markup, scripts, control characters, or characters that reverse the direction of
everything after them. `text` takes strings from anywhere; only `Html` goes in as it is.
"""

from __future__ import annotations

import base64
import html
import unicodedata
from collections.abc import Iterable
from pathlib import Path

LINE_BREAK, TAB = "\N{DOWNWARDS ARROW WITH TIP LEFTWARDS}", "\N{RIGHTWARDS ARROW}"


class Html(str):
    """Markup that was made here."""

    __slots__ = ()


def text(value: object) -> Html:
    """Anything as text of the page."""
    return Html(html.escape("".join(map(_visible, str(value))), quote=True))


def element(name: str, *parts: str, **attributes: object) -> Html:
    """<name attributes>parts</name>; parts that are not Html are escaped. `class_` is class."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items())
    inner = "".join(part if isinstance(part, Html) else text(part) for part in parts)
    return Html(f"<{name}{written}>{inner}</{name}>")


def joined(parts: Iterable[Html], between: str = "") -> Html:
    return Html(between.join(parts))


def image(path: Path, title: str) -> Html:
    """A PNG inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return Html(f'<img alt="{text(title)}" src="data:image/png;base64,{data}">')


def _visible(letter: str) -> str:
    """A character, or a mark for one that would be invisible or affect its neighbours."""
    if letter == "\n":
        return LINE_BREAK
    if letter == "\t":
        return TAB
    is_control = unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return "\N{REPLACEMENT CHARACTER}" if is_control else letter
