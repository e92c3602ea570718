"""Pieces of HTML for notebooks, in which all that comes from a run is escaped."""

import re
from collections.abc import Iterable
from html import escape
from typing import Any

FORBIDDEN = {
    c: 0x2400 + c for c in range(32) if chr(c) not in "\t\n"
}  # by HTML: shown as their control pictures,
FORBIDDEN |= dict.fromkeys(
    [*range(127, 160), *range(0xD800, 0xE000)], 0xFFFD
)  # or as the replacement character

WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|\S)+""")  # of a command; quoted blanks are part of it


def text(value: Any) -> str:
    """Text from a run, made harmless: escaped, and characters that HTML forbids replaced."""
    return escape(str(value).translate(FORBIDDEN))


def command(line: str) -> str:
    """A command as code that is broken between its words alone: `--flag` stays whole where it fits into a line."""
    words = [f"<span>{text(word)}</span>" for word in WORD.findall(line)]
    return f'<code class="command">{" ".join(words)}</code>'


def visible(piece: str) -> str:
    """A token's text with blanks that can be seen; invisible characters by code point. Not escaped."""
    shown = piece.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in shown) or "∅"


def facts(rows: Iterable[tuple[str, Any]]) -> str:
    """A table of names and values."""
    return table((), rows)


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """A table whose first column names the rows; without titles of columns if there is no `head`."""
    titles = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    top = f"<thead><tr>{titles}</tr></thead>" if titles else ""
    body = "".join(f"<tr>{_row(*row)}</tr>" for row in rows)
    return f"<table>{top}<tbody>{body}</tbody></table>"


def _row(name: Any, *cells: Any) -> str:
    return f'<th scope="row">{text(name)}</th>' + "".join(
        f"<td>{text(cell)}</td>" for cell in cells
    )
