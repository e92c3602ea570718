"""HTML from the templates in `moejax/inspection/templates`, with all that comes from a run escaped.

Python computes values and chooses templates; markup is in the templates alone. A value is either
text, which is escaped where a template shows it, or `Markup`: HTML that a template made before.
"""

import functools
import re
from collections.abc import Iterable
from html import escape
from typing import Any

import jinja2
from markupsafe import Markup as Markup

# Characters that HTML forbids. Control characters are shown as their pictures, from U+2400 on;
# DEL, the C1 controls and lone surrogates as the replacement character.
CONTROLS = [code for code in range(32) if chr(code) not in "\t\n"]
OTHERS = [*range(127, 160), *range(0xD800, 0xE000)]
FORBIDDEN = {code: 0x2400 + code for code in CONTROLS} | dict.fromkeys(OTHERS, 0xFFFD)

WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|\S)+""")  # of a command; quoted blanks are part of it
EMPTY = Markup("")


def text(value: Any) -> Markup:
    """Returns a value as harmless HTML: escaped, with characters that HTML forbids replaced.

    What is `Markup` already stays as it is.
    """
    if isinstance(value, Markup):
        return value
    return Markup(escape(str(value).translate(FORBIDDEN)))


@functools.cache
def _environment() -> jinja2.Environment:
    """Returns the templates' environment, in which every value shown passes through `text`."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("moejax.inspection"),
        autoescape=True,
        finalize=text,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> Markup:
    """Renders a template.

    Args:
      template: its path below `moejax/inspection/templates`, without `.html.j2`.
      **values: every variable that the template names; text is escaped, `Markup` is not.
    """
    return Markup(_environment().get_template(f"{template}.html.j2").render(values))


def join(parts: Iterable[Markup]) -> Markup:
    """Returns pieces of HTML in a row."""
    return EMPTY.join(parts)


def paragraph(content: Any, kind: str = "") -> Markup:
    """Returns a paragraph; nothing if it has no content. `kind` is a class of the style."""
    return render("paragraph", content=content, kind=kind) if content else EMPTY


def code(content: Any) -> Markup:
    """Returns a piece of code within a line."""
    return render("code", content=content)


def command(line: str) -> Markup:
    """Returns a command as code that breaks between its words only.

    So `--flag` is not broken at its hyphens where it fits into a line.
    """
    return render("command", words=WORD.findall(line))


def visible(piece: str) -> str:
    """Returns a token's text with blanks that can be seen, and invisible characters by code point.

    The text is not escaped.
    """
    shown = piece.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    letters = [c if c.isprintable() else f"U+{ord(c):04X}" for c in shown]
    return "".join(letters) or "∅"


def facts(rows: Iterable[tuple[str, Any]]) -> Markup:
    """Returns a table of names and values."""
    return table((), rows)


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]], kind: str = "") -> Markup:
    """Returns a table whose first column names the rows.

    Args:
      head: titles of the columns; without any, the table has no head.
      rows: cells, text or `Markup`.
      kind: a class of the style.
    """
    return render("table", head=list(head), rows=[list(row) for row in rows], kind=kind)
