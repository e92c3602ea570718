"""Pieces of HTML for notebooks, in which all that comes from a run is escaped."""

from collections.abc import Iterable
from html import escape
from typing import Any

FORBIDDEN = {c: 0x2400 + c for c in range(32) if chr(c) not in "\t\n"}  # by HTML: shown as their control pictures,
FORBIDDEN |= dict.fromkeys([*range(127, 160), *range(0xD800, 0xE000)], 0xFFFD)  # or as the replacement character


def text(value: Any) -> str:
    """Text from a run, made harmless: escaped, and characters that HTML forbids replaced."""
    return escape(str(value).translate(FORBIDDEN))


def visible(piece: str) -> str:
    """A token's text with blanks that can be seen; invisible characters by code point. Not escaped."""
    shown = piece.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in shown) or "∅"


def facts(rows: Iterable[tuple[str, Any]]) -> str:
    """A table of names and values."""
    cells = "".join(f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in rows)
    return f"<table><tbody>{cells}</tbody></table>"
