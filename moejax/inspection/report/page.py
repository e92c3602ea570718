"""Pieces of HTML pages that stand alone: figures, tables, the frame, and how a page is written.

Images and styles are inside a page, and its content policy forbids the browser to fetch or send
anything, and to run any script except the one that a page may be given. A page reads at a desk and
on a phone: figures are small and flow into as many columns as fit, wide tables scroll inside their
box.
"""

import base64
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moejax.inspection import html
from moejax.inspection.analysis.expert_profile import ProfileError
from moejax.inspection.counterfactuals.result import CounterfactualError
from moejax.inspection.html import Markup
from moejax.inspection.runs.comparison import format_value
from moejax.paths import replace_shared_file
from moejax.training.health.alarms import AlarmFileError
from moejax.training.run_directory.evaluation_log import EvaluationError

MAX_LAYERS = 12  # drawn and listed; of deeper models, evenly spaced ones: they make a page's size
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'none'; "
    "base-uri 'none'"
)

Section = tuple[str, str, Markup]
"""Anchor, title and content."""


def render_page(
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    *,
    kind: str,
    script: Markup = html.EMPTY,
) -> str:
    """Renders the whole document, with a list of contents.

    Args:
      title: heading.
      subtitle: text or HTML.
      sections: in order.
      kind: of page, for the window's title.
      script: run at the end of the page; the page must read without it, too.
    """
    policy = POLICY
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    document = html.render(
        "page",
        title=title,
        subtitle=subtitle,
        sections=sections,
        kind=kind,
        policy=policy,
        script=script,
    )
    return f"{document}\n"


def write_page(path: str | Path, document: str) -> Path:
    """Writes a page in one rename, so that a reader never sees half of it."""
    path = Path(path)
    replace_shared_file(path, lambda file: file.write(document.encode("utf-8")))
    return path


def guarded(section: Callable[[], Markup]) -> Markup:
    """Returns a section, or why it cannot be made.

    So one damaged file of a run does not cost the rest of the page.
    """
    try:
        return section()
    except (AlarmFileError, CounterfactualError, EvaluationError, ProfileError) as error:
        return html.paragraph(f"Left out: {error}", "warning")


def number(value: float | None, missing: str = "not logged yet") -> str:
    """Returns a number in four digits, or all of those before the point; `missing` for None."""
    if value is None:
        return missing
    if not math.isfinite(value):
        return "not finite"
    return format_value(float(value))


def figure(
    title: str, reading: str, image: str, *, value: str = "", kind: str = "", alt: str = ""
) -> Markup:
    """Returns a figure under its heading.

    Args:
      title: its heading.
      reading: how to read it.
      image: a data URI.
      value: a number to show next to the heading.
      kind: a class of the style.
      alt: what the figure shows, for those who do not see it; without it, it is the title.
    """
    return html.render(
        "figure", title=title, reading=reading, image=image, value=value, kind=kind, alt=alt
    )


def grid(figures: Iterable[Markup]) -> Markup:
    """Returns figures side by side, as many as fit; four of them two by two; nothing for none."""
    found = list(figures)
    return html.render("grid", figures=found) if found else html.EMPTY


def table(head: Iterable[Any], rows: Iterable[Sequence[Any]], kind: str = "") -> Markup:
    """Returns a table, see `html.table`, that scrolls where it is wider than its place.

    A shade at its edge shows that there is more; it scrolls by keyboard, too.
    """
    return html.render("scroll", table=html.table(head, rows, kind))


def details(summary: str, content: Markup, *, is_open: bool = False) -> Markup:
    """Returns content that opens at a click."""
    return html.render("details", summary=summary, content=content, is_open=is_open)


def drawn_layers(num_layers: int, most: int = MAX_LAYERS) -> list[int]:
    """Returns the indices of the layers that are shown: evenly spaced, at most `most`."""
    places = np.linspace(0, num_layers - 1, min(num_layers, most))
    return np.unique(places.round().astype(int)).tolist()


def left_out(num_layers: int, most: int = MAX_LAYERS) -> Markup:
    """Says that `drawn_layers` leaves out some layers; nothing if it has all."""
    num_shown = len(drawn_layers(num_layers, most))
    if num_shown == num_layers:
        return html.EMPTY
    return html.paragraph(f"{num_shown} of {num_layers} MoE layers are shown, evenly spaced.")
